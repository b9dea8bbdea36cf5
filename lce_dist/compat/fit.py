"""Choosing a map over two frozen models: closed forms and trained ones, judged on identities held out of the fitting.

Closed forms map to the vectors of the other model, or to the centres of their identities (identity-level averaging:
what differs between photos of one person is noise that a map should drop). A trained map starts as the best closed form,
its residual silent, and learns what the cross-test asks: that the mapped vector of a photo finds *another* photo of the
same identity among those of others, while it stays near its own partner. It replaces the closed form only if it is
better on held-out identities by more than the noise of that difference.
**Source**: cross model compatibility of Meng et al., "Learning Compatible Embeddings", ICCV 2021. The contrast is InfoNCE
(van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018) between the two spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lce_dist.compat.boundaries import NEVER_CROSSED
from lce_dist.compat.bridges import Bridge, Kind, build_bridge
from lce_dist.compat.closed_form import PairSums, class_centres, least_squares, procrustes
from lce_dist.compat.lce import outside
from lce_dist.errors import DataError

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BATCH, _EPOCHS, _MOST_STEPS, _LR = 512, 30, 2000, 1e-3
_LEAST_HELDOUT = 8  # identities; fewer cannot tell maps apart
LEAST_IDENTITIES = 2 * _LEAST_HELDOUT  # with two images or more
_ENOUGH_HELDOUT, _MOST_FOLDS = 150, 4  # where one fold holds out fewer, others are fitted and judged too
_DRAWS, _SURE = 1000, 0.95  # of identities, and in how many of them a trained map must be the better one

# (M, E) unit rows that a map made of ``Pairs.source_ND``, and their labels -> one score an identity (I,), higher is better
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pairs:
    """Unit vectors of the same images in two spaces: source_ND is mapped to target_NE; label_N numbers identities."""

    source_ND: torch.Tensor
    target_NE: torch.Tensor
    label_N: torch.Tensor

    def of(self, chosen_N: torch.Tensor) -> Pairs:
        """Some of the rows."""
        return Pairs(self.source_ND[chosen_N], self.target_NE[chosen_N], self.label_N[chosen_N])


@dataclass(frozen=True)
class Terms:
    """Weights of a trained map's loss, and the temperature of its contrast; all terms are of 1 - cos, or of cos.

    pair: to the partner. contrast: to another image of the identity, among those of the batch. align: class centres to
    class centres. boundary: into the cone of the class, its hinge in cosine or angle; the last two are LCE's class terms.
    """

    pair: float = 0.0
    contrast: float = 0.0
    align: float = 0.0
    boundary: float = 0.0
    temperature: float = 0.07
    hinge: Literal["cos", "angle"] = "cos"


@dataclass(frozen=True)
class Recipe:
    """How a map is trained: ``start``: the closed form that it begins as; "identity": none."""

    kind: Kind
    terms: Terms
    start: Literal["best", "procrustes", "identity"] = "best"


# Weights by trial on the embedded faces and Omniglot, 80 to 224 identities: pair alone, or LCE's class terms alone, fall
# below the best closed form; contrast and pair together rise above it, and class terms beside them change nothing.
DEFAULT = Terms(pair=3.0, contrast=1.0)
RECIPES: dict[str, Recipe] = {
    "linear": Recipe("linear", DEFAULT),
    "mlp": Recipe("mlp", DEFAULT),
    "stacked": Recipe("stacked", DEFAULT),
    "orthogonal": Recipe("orthogonal", DEFAULT, "procrustes"),
    # figure 3 with the losses of section 3 of Meng et al., ICCV 2021, alone
    "paper": Recipe("paper", Terms(align=1.0, boundary=1.0), "identity"),
    # regression of the new vector by an MLP, as Ramanujan et al., "Forward Compatible Training", CVPR 2022
    "fct": Recipe("mlp", Terms(pair=1.0), "identity"),
}
_TRIED: tuple[str, ...] = ("linear", "mlp")  # of kind "auto"; stacked blocks are no better and take 3 times as long


@dataclass(frozen=True)
class Candidate:
    """A map and what it reaches on held-out identities: mean score, its standard error over identities, and the interval
    of 95 % from ``low`` to ``high`` by drawing identities again."""

    name: str
    bridge: Bridge
    score: float
    score_error: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Fitted:
    """The chosen map, and all candidates in the order in which they were tried; on how many identities they were judged."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    num_heldout_identities: int
    num_scored_identities: int


@dataclass(frozen=True)
class _Fold:
    seen: Pairs
    unseen: Pairs


_Make = Callable[[Pairs], Bridge]


def fit_bridge(
    pairs: Pairs,
    score: Score,
    kind: str,
    heldout: float,
    seed: int,
    given: dict[str, Bridge] | None = None,
    report: Callable[[str], None] | None = None,
    class_terms: Terms | None = None,
) -> Fitted:
    """Fit every map that ``kind`` allows ("auto": all) without a share ``heldout`` of the identities, and choose there.

    Where that share is small, up to four disjoint ones are held out in turn. ``kind`` "auto": the best closed form, or the
    best trained map where it is better with confidence 0.95; a kind of ``RECIPES`` is taken as it is, its scores beside
    those of the closed forms. The chosen one is fitted once more with all identities. given: maps that exist already, as
    those trained with a network, judged as they are; one replaces the choice only if it is better with that confidence.
    class_terms: of kind "paper", in place of equal weights. Errors: DataError for fewer than 16 identities of two images.
    **Memory**: a few copies of the pairs.
    """
    folds = _folds(pairs, heldout, seed)
    num_heldout = sum(len(torch.unique(fold.unseen.label_N)) for fold in folds)
    per_identity: dict[str, torch.Tensor] = {}

    def judged(name: str, make: _Make) -> Candidate:
        parts, bridges = [], []
        for fold in folds:
            bridges.append(make(fold.seen).eval())
            with torch.no_grad():
                mapped_ME = F.normalize(bridges[-1](fold.unseen.source_ND))
            parts.append(score(mapped_ME, fold.unseen.target_NE, fold.unseen.label_N))
        score_I = per_identity[name] = torch.cat(parts)
        mean, error = float(score_I.mean()), float(score_I.std() / len(score_I) ** 0.5)
        low, high = np.quantile(_drawn_means(score_I), (0.025, 0.975)).tolist()
        if report is not None:
            judged_on = f"{len(score_I)} of {num_heldout}" if len(score_I) < num_heldout else f"{num_heldout}"
            report(f"map {name}: {mean:.3f} ({low:.3f} to {high:.3f}) on {judged_on} held-out identities")
        return Candidate(name, bridges[0], mean, error, low, high)

    def better(one: Candidate, other: Candidate) -> bool:
        gain_I = per_identity[one.name] - per_identity[other.name]
        return float(np.quantile(_drawn_means(gain_I), 1.0 - _SURE)) > 0.0

    closed = _closed_forms(seed)
    if kind in ("procrustes", "least_squares"):
        closed = {name: make for name, make in closed.items() if name.startswith(kind)}
    made = {name: judged(name, make) for name, make in closed.items()}
    best_closed = best = max(made.values(), key=lambda candidate: candidate.score)
    trained: dict[str, _Make] = {}
    for name in _TRIED if kind == "auto" else [kind] if kind in RECIPES else []:
        recipe = RECIPES[name]
        if name == "paper" and class_terms is not None:
            recipe = replace(recipe, terms=class_terms)
        trained[f"trained {name}"] = _training(recipe, closed, best_closed.name, seed)
    ours = [judged(name, make) for name, make in trained.items()]
    if ours:
        foremost = max(ours, key=lambda candidate: candidate.score)
        if kind != "auto" or better(foremost, best_closed):
            best = foremost
    theirs = [judged(f"given {name}", _as_it_is(bridge)) for name, bridge in (given or {}).items()]
    for candidate in theirs:
        if better(candidate, best):
            best = candidate
    makers = closed | trained
    if best.name in makers:
        best = replace(best, bridge=makers[best.name](pairs).eval())
    num_scored = len(per_identity[best.name])
    return Fitted(best, (*made.values(), *ours, *theirs), num_heldout, num_scored)


def train_bridge(kind: Kind, start: Bridge | None, pairs: Pairs, seed: int, terms: Terms = DEFAULT) -> Bridge:
    """A bridge of ``kind`` that starts as ``start``'s matrix, after AdamW on ``terms``; in eval mode.

    30 passes over the pairs in batches of 512, at most 2,000 steps, the rate falling to zero as a cosine. **Memory**: a
    batch's 512 x 512 scores.
    """
    dims = pairs.source_ND.shape[1], pairs.target_NE.shape[1]
    bridge = build_bridge(kind, *dims, seed)
    if start is not None:
        weight = start.matrix.weight
        assert isinstance(weight, torch.Tensor)
        bridge.start_from(weight.detach())
    classes = ClassTable.of(pairs)
    num_pairs = len(pairs.label_N)
    rows_of_batch = min(_BATCH, num_pairs)
    steps_of_pass = num_pairs // rows_of_batch
    steps = min(_MOST_STEPS, _EPOCHS * steps_of_pass)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    order_N = torch.zeros(0, dtype=torch.int64)
    bridge.train()
    for step in range(steps):
        place = step % steps_of_pass
        if place == 0:
            order_N = torch.randperm(num_pairs, generator=draw)
        chosen_B = order_N[place * rows_of_batch : (place + 1) * rows_of_batch]
        optimizer.zero_grad()
        map_loss(bridge, pairs, classes, chosen_B, terms, draw).backward()
        optimizer.step()
        schedule.step()
    return bridge.eval()


@dataclass(frozen=True)
class ClassTable:
    """Of pairs, per class: unit centres in both spaces, the cosine of its farthest target; and its images, one after another.

    A class of one image has no boundary: its cosine is -1, never crossed. place_N: class of each row; images_N: rows in the order of their classes; rank_N: each row's place in its class.
    """

    source_CD: torch.Tensor
    target_CE: torch.Tensor
    cos_boundary_C: torch.Tensor
    place_N: torch.Tensor
    images_N: torch.Tensor
    rank_N: torch.Tensor
    first_C: torch.Tensor
    count_C: torch.Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> ClassTable:
        """Count and sort once, before the steps."""
        labels, place_N, count_C = torch.unique(pairs.label_N, return_inverse=True, return_counts=True)
        target_CE = class_centres(pairs.target_NE, place_N, len(labels))
        cos_N = (pairs.target_NE * target_CE[place_N]).sum(1)
        farthest_C = cos_N.new_full((len(labels),), 2.0).scatter_reduce(0, place_N, cos_N, "amin")
        images_N = torch.argsort(place_N, stable=True)
        first_C = torch.cumsum(count_C, 0) - count_C
        rank_N = torch.empty_like(images_N)
        rank_N[images_N] = torch.arange(len(images_N)) - first_C[place_N[images_N]]
        return cls(
            class_centres(pairs.source_ND, place_N, len(labels)),
            target_CE,
            farthest_C.masked_fill(count_C == 1, NEVER_CROSSED),
            place_N,
            images_N,
            rank_N,
            first_C,
            count_C,
        )

    def another(self, chosen_B: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """For each row another one of its class, by chance; itself where it is alone."""
        place_B = self.place_N[chosen_B]
        count_B = self.count_C[place_B]
        ahead_B = 1 + (torch.rand(len(chosen_B), generator=draw) * (count_B - 1)).long()
        return self.images_N[self.first_C[place_B] + (self.rank_N[chosen_B] + ahead_B) % count_B]


def map_loss(
    bridge: Bridge, pairs: Pairs, classes: ClassTable, chosen_B: torch.Tensor, terms: Terms, draw: torch.Generator
) -> torch.Tensor:
    """The weighted sum of ``terms`` over the pairs ``chosen_B``; whom each is contrasted with comes from ``draw``."""
    place_B = classes.place_N[chosen_B]
    rows = pairs.source_ND[chosen_B]
    if terms.align > 0.0:
        rows = torch.cat([rows, classes.source_CD[place_B]])
    mapped = F.normalize(bridge(rows))
    mapped_BE, centre_BE = mapped[: len(chosen_B)], mapped[len(chosen_B) :]
    loss = mapped.new_zeros(())
    if terms.pair > 0.0:
        loss = loss + terms.pair * (1.0 - (mapped_BE * pairs.target_NE[chosen_B]).sum(1)).mean()
    if terms.align > 0.0:
        loss = loss + terms.align * (1.0 - (centre_BE * classes.target_CE[place_B]).sum(1)).mean()
    if terms.boundary > 0.0:
        cos_B = (mapped_BE * classes.target_CE[place_B]).sum(1)
        loss = loss + terms.boundary * outside(classes.cos_boundary_C[place_B], cos_B, terms.hinge).mean()
    if terms.contrast > 0.0:
        other_BE = pairs.target_NE[classes.another(chosen_B, draw)]
        logits_BB = mapped_BE @ other_BE.T / terms.temperature
        same_BB = (place_B[:, None] == place_B[None, :]).fill_diagonal_(False)  # neither right nor wrong answers
        logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
        answer_B = torch.arange(len(chosen_B))
        both = F.cross_entropy(logits_BB, answer_B) + F.cross_entropy(logits_BB.T, answer_B)
        loss = loss + terms.contrast * 0.5 * both
    return loss


def _closed_forms(seed: int) -> dict[str, _Make]:
    """Each closed form by name, as a function of pairs."""

    def turned(pairs: Pairs) -> Bridge:
        return _matrix_bridge(procrustes(PairSums.of(pairs.source_ND, pairs.target_NE)), seed)

    def regressed(ridge: float, to_centres: bool) -> _Make:
        def make(pairs: Pairs) -> Bridge:
            target_NE = pairs.target_NE
            if to_centres:
                labels, place_N = torch.unique(pairs.label_N, return_inverse=True)
                target_NE = class_centres(target_NE, place_N, len(labels))[place_N]
            return _matrix_bridge(least_squares(PairSums.of(pairs.source_ND, target_NE), ridge), seed)

        return make

    makes: dict[str, _Make] = {"procrustes": turned}
    for to_centres, words in ((False, ""), (True, " to centres")):
        for ridge in RIDGES:
            makes[f"least_squares {ridge:g}{words}"] = regressed(ridge, to_centres)
    return makes


def _training(recipe: Recipe, closed: dict[str, _Make], best: str, seed: int) -> _Make:
    def make(pairs: Pairs) -> Bridge:
        name = {"best": best, "procrustes": "procrustes", "identity": None}[recipe.start]
        start = None if name is None else closed[name](pairs)
        return train_bridge(recipe.kind, start, pairs, seed, recipe.terms)

    return make


def _as_it_is(bridge: Bridge) -> _Make:
    return lambda pairs: bridge


def _matrix_bridge(matrix_ED: torch.Tensor, seed: int) -> Bridge:
    bridge = build_bridge("linear", matrix_ED.shape[1], matrix_ED.shape[0], seed)
    bridge.start_from(matrix_ED.float())
    return bridge.eval()


def _folds(pairs: Pairs, heldout: float, seed: int) -> list[_Fold]:
    """Disjoint sets of identities held out, one after another; those of one image, which judge nothing, never are."""
    every, count_C = torch.unique(pairs.label_N, return_counts=True)
    labels = every[count_C > 1]
    if len(labels) < LEAST_IDENTITIES:
        raise DataError(
            f"{len(labels)} of {len(every)} identities have two images or more; choosing a map needs at least "
            f"{LEAST_IDENTITIES} of these, because a photo has to find another of its person. Give more images or identities"
        )
    size = min(max(_LEAST_HELDOUT, round(heldout * len(labels))), len(labels) - _LEAST_HELDOUT)
    number = max(1, min(-(-_ENOUGH_HELDOUT // size), _MOST_FOLDS, len(labels) // size))
    order = labels[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]
    folds = []
    for first in range(0, number * size, size):
        out = torch.isin(pairs.label_N, order[first : first + size])
        folds.append(_Fold(pairs.of(~out), pairs.of(out)))
    return folds


def _drawn_means(value_I: torch.Tensor) -> npt.NDArray[np.float64]:
    """(draws,) means over identities drawn with replacement; the same draws for as many identities."""
    count = len(value_I)
    weight_RI = np.random.default_rng(count).multinomial(count, np.full(count, 1.0 / count), _DRAWS)
    means: npt.NDArray[np.float64] = weight_RI @ value_I.double().numpy() / count
    return means
