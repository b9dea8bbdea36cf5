"""Choosing a map over two frozen models: closed forms and trained ones, judged on identities held out of the fitting.

A trained map starts as the best closed form, with its residual silent, and learns to bring every vector to its
partner (pairs), every class centre to its centre (alignment), and each vector into the cone of its class (boundary).
It replaces the closed form only if it is better on held-out identities by more than the noise of that difference.
**Source**: cross model compatibility of Meng et al., "Learning Compatible Embeddings", ICCV 2021; the pair term is
that of regression baselines such as Ramanujan et al., "Forward Compatible Training", CVPR 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from lce_dist.compat.bridges import Bridge, Kind, build_bridge
from lce_dist.compat.closed_form import PairSums, least_squares, procrustes
from lce_dist.errors import RunError

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_TRAINED: tuple[Kind, ...] = ("linear", "mlp", "stacked")
_BATCH, _STEPS, _CHECKS, _LR, _DECAY = 256, 600, 6, 1e-3, 1e-2
_LEAST_HELDOUT = 8  # identities; fewer cannot tell maps apart

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
class Candidate:
    """A map and what it reaches on held-out identities: mean score, and standard error of it over identities."""

    name: str
    bridge: Bridge
    score: float
    score_error: float


@dataclass(frozen=True)
class Fitted:
    """The chosen map, and all candidates in the order in which they were tried."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    num_heldout_identities: int


def fit_bridge(
    pairs: Pairs,
    score: Score,
    kind: str,
    heldout: float,
    seed: int,
    given: dict[str, Bridge] | None = None,
    report: Callable[[str], None] | None = None,
) -> Fitted:
    """Fit every map that ``kind`` allows ("auto": all) without a share ``heldout`` of the identities, and choose there.

    given: maps that exist already, such as those trained with a network; they are candidates as they are.
    A chosen closed form is fitted once more with all identities; a trained map stays as it was judged.
    Errors: RunError for fewer than 16 identities. **Memory**: a few copies of the pairs.
    """
    labels = torch.unique(pairs.label_N)
    draw = np.random.default_rng(seed)
    num_heldout = max(_LEAST_HELDOUT, round(heldout * len(labels)))
    if len(labels) < 2 * _LEAST_HELDOUT:
        raise RunError(f"{len(labels)} identities have pairs; choosing a map needs at least {2 * _LEAST_HELDOUT}")
    out = torch.isin(pairs.label_N, labels[torch.from_numpy(draw.permutation(len(labels))[:num_heldout])])
    seen, unseen = pairs.of(~out), pairs.of(out)
    sums = PairSums.of(seen.source_ND, seen.target_NE)
    per_identity: dict[str, torch.Tensor] = {}

    def judged(name: str, bridge: Bridge) -> Candidate:
        bridge.eval()
        with torch.no_grad():
            mapped_ME = F.normalize(bridge(unseen.source_ND))
        score_I = per_identity[name] = score(mapped_ME, unseen.target_NE, unseen.label_N)
        error = float(score_I.std() / len(score_I) ** 0.5)
        if report is not None:
            report(f"map {name}: {float(score_I.mean()):.3f} +- {error:.3f} on {num_heldout} held-out identities")
        return Candidate(name, bridge, float(score_I.mean()), error)

    closed: dict[str, Callable[[PairSums], torch.Tensor]] = {"procrustes": procrustes}
    closed |= {f"least_squares {ridge:g}": partial(least_squares, ridge=ridge) for ridge in RIDGES}
    candidates = []
    for name, solve in closed.items():
        if kind in ("auto", name.partition(" ")[0]) or kind in _TRAINED or kind == "orthogonal":
            candidates.append(judged(name, _matrix_bridge(solve(sums), seed)))
    best_closed = best = max(candidates, key=lambda candidate: candidate.score)
    wanted = [kind_ for kind_ in (*_TRAINED, "orthogonal") if kind == kind_ or (kind == "auto" and kind_ in _TRAINED)]
    further = [(f"trained {name}", train_bridge(name, best_closed.bridge, seen, seed)) for name in wanted]
    for name, bridge in [*further, *((f"given {name}", bridge) for name, bridge in (given or {}).items())]:
        candidate = judged(name, bridge)
        candidates.append(candidate)
        gain_I = per_identity[name] - per_identity[best.name]
        named = kind in (*_TRAINED, "orthogonal") and name == f"trained {kind}" and best is best_closed
        if named or float(gain_I.mean()) > 2.0 * float(gain_I.std()) / len(gain_I) ** 0.5:
            best = candidate
    if best.name in closed:
        whole = PairSums.of(pairs.source_ND, pairs.target_NE)
        best = Candidate(best.name, _matrix_bridge(closed[best.name](whole), seed), best.score, best.score_error)
    return Fitted(best, tuple(candidates), num_heldout)


def train_bridge(kind: Kind, start: Bridge, pairs: Pairs, seed: int) -> Bridge:
    """A bridge of ``kind`` that starts as ``start``'s matrix, after AdamW on pairs, centres and boundaries.

    The steps are few and the best of several moments, by the same loss on a tenth of the identities, is kept.
    """
    bridge = build_bridge(kind, start.dim_in, start.dim_out, seed)
    weight = start.matrix.weight
    assert isinstance(weight, torch.Tensor)
    bridge.start_from(weight.detach())
    labels, place_N = torch.unique(pairs.label_N, return_inverse=True)
    held = place_N % 10 == 0
    target_CE = _centres(pairs.target_NE, place_N, len(labels))
    source_CD = _centres(pairs.source_ND, place_N, len(labels))
    cos_N = (pairs.target_NE * target_CE[place_N]).sum(1)
    bound_C = torch.full((len(labels),), 2.0).scatter_reduce(0, place_N, cos_N, "amin")
    train_N = torch.nonzero(~held).squeeze(1)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=_LR, weight_decay=0.0)
    first = [parameter.detach().clone() for parameter in bridge.parameters()]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    draw = torch.Generator().manual_seed(seed)

    def loss_of(chosen_N: torch.Tensor) -> torch.Tensor:
        place_B = place_N[chosen_N]
        rows = torch.cat([pairs.source_ND[chosen_N], source_CD[place_B]])
        mapped, centre = F.normalize(bridge(rows)).split(len(chosen_N))
        pair = (1.0 - (mapped * pairs.target_NE[chosen_N]).sum(1)).mean()
        align = (1.0 - (centre * target_CE[place_B]).sum(1)).mean()
        boundary = (bound_C[place_B] - (mapped * target_CE[place_B]).sum(1)).clamp_min(0.0).mean()
        return pair + align + boundary

    def held_loss() -> float:
        bridge.eval()
        with torch.no_grad():
            value = float(loss_of(torch.nonzero(held).squeeze(1)))
        bridge.train()
        return value

    kept, least = copy.deepcopy(bridge.state_dict()), held_loss()
    bridge.train()
    for step in range(_STEPS):
        chosen_N = train_N[torch.randint(len(train_N), (min(_BATCH, len(train_N)),), generator=draw)]
        optimizer.zero_grad()
        loss_of(chosen_N).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():  # decay towards the closed form, not towards zero
            for parameter, start_value in zip(bridge.parameters(), first, strict=True):
                parameter.lerp_(start_value, _DECAY * schedule.get_last_lr()[0])
        if (step + 1) % (_STEPS // _CHECKS) == 0 and (now := held_loss()) < least:
            kept, least = copy.deepcopy(bridge.state_dict()), now
    bridge.load_state_dict(kept)
    return bridge.eval()


def _matrix_bridge(matrix_ED: torch.Tensor, seed: int) -> Bridge:
    bridge = build_bridge("linear", matrix_ED.shape[1], matrix_ED.shape[0], seed)
    bridge.start_from(matrix_ED.float())
    return bridge.eval()


def _centres(rows_ND: torch.Tensor, place_N: torch.Tensor, num_classes: int) -> torch.Tensor:
    return F.normalize(torch.zeros(num_classes, rows_ND.shape[1]).index_add_(0, place_N, rows_ND))
