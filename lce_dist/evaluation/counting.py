"""Pairs of images counted by their score: all of them, or, of very many, those high enough to decide a TAR at a FAR.

Scores are inner products in float32, rounded to multiples of 2^-20 (about 1e-6, what float32 sums are good for): level 0
is the score -1, level 2^21 the score 1. From there on all is counting of integers. Of up to 2^26 pairs every level is
counted, in plain numpy. Of more, a sample of pairs gives a level below which impostors are only estimated; above it,
where thresholds lie, every pair is counted, a block of scores at a time, on any number of ranks.

What rounding can do is counted too: a score lies within ``error_levels`` of its own, so exact scores can only change the order of pairs
that are near the impostor that sets the threshold. A sum of D terms, partial sums below 1, rounds D times by at most half of 2^-24: not
in one direction (vectors of D equal values would), so the error of the sum is random, of a standard deviation of at most sqrt(D / 12) 2^-24.
The bound takes 2 sqrt(D) 2^-24, which is 6.9 of them: sqrt(D) / 8 levels; rounding to a level adds a half.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lce_dist.collectives import all_reduce_max, all_reduce_sum
from lce_dist.errors import DataError, RunError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.world import World

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

STEPS_PER_UNIT = 1 << 20
NUM_LEVELS = 2 * STEPS_PER_UNIT + 1
MOST_PAIRS_AT_ALL_LEVELS = 1 << 26

_BLOCK_SCORES = 1 << 22
_SIDE = {"cpu": 2048, "cuda": 16384}  # of a square of scores: 16 MiB, 1 GiB
_NOBODY = -2.0  # below every score: in place of mates, so that a block holds impostors alone
_GATHER_SCORES = 1 << 22  # scores that are waiting to be counted
_SAMPLE_PAIRS = 1 << 25
_SAMPLE_ABOVE = 20_000  # impostors of the sample that are looked for above the cut
_NEAR_FAR = 2.0  # the cut leaves this many times the largest FAR, so that a sample's error does not matter


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Ordered pairs (query image, gallery image) of different images at each level (NUM_LEVELS,); genuine = same label.

    impostor_L is exact from level ``exact_from`` on; below, it is a sample's share of the pairs that are left, so that
    the sum is right. num_ranked: queries with a mate in the gallery; num_correct: those whose mate came first. off_by: levels
    that a counted score can be from its own (``error_levels``).
    """

    genuine_L: Counts
    impostor_L: Floats
    num_ranked: int
    num_correct: int
    exact_from: int = 0
    off_by: float = 1.0

    @property
    def num_genuine(self) -> int:
        return int(self.genuine_L.sum())

    @property
    def num_impostor(self) -> int:
        return round(float(self.impostor_L.sum()))

    @property
    def exact_up_to_far(self) -> float:
        """FARs up to here have exact thresholds and TARs."""
        return 1.0 if self.exact_from == 0 else float(self.impostor_L[self.exact_from :].sum()) / self.num_impostor

    def operating_points(self, fars: Sequence[float] | Floats) -> tuple[Floats, Floats]:
        """TAR (F,) and threshold (F,): the smallest score of any pair that leaves (impostors >= it) / impostors <= FAR.

        A FAR below 1 / impostors allows no false accept: its TAR is the share of genuine pairs above every impostor.
        """
        far_F = np.asarray(fars, dtype=np.float64)
        impostor_from_L = np.cumsum(self.impostor_L[::-1])[::-1]
        genuine_from_L = np.append(np.cumsum(self.genuine_L[::-1])[::-1], 0)
        lowest_F = self._lowest(far_F, impostor_from_L)
        taken = np.flatnonzero((self.genuine_L > 0) | (self.impostor_L > 0))
        # Without any score up there the threshold stays one step above the highest impostor: nothing is accepted.
        next_F = np.searchsorted(taken, lowest_F)
        level_F = np.where(next_F < len(taken), taken[np.minimum(next_F, len(taken) - 1)], lowest_F)
        return genuine_from_L[level_F] / genuine_from_L[0], level_F / STEPS_PER_UNIT - 1.0

    def _lowest(self, far_F: Floats, impostor_from_L: Floats) -> Counts:
        """The lowest level (F,) that leaves no more impostors than each FAR allows; the one below is the level of an impostor."""
        num_impostor = self.num_impostor
        # floor(FAR * n) may be off by one (0.29 * 100 < 29); the rule is on the quotient.
        allowed_F = np.floor(far_F * num_impostor)
        allowed_F += (allowed_F + 1) / num_impostor <= far_F
        allowed_F -= allowed_F / num_impostor > far_F
        return NUM_LEVELS - np.searchsorted(impostor_from_L[::-1], allowed_F, side="right")

    def rounding_errors(self, fars: Sequence[float] | Floats) -> tuple[Floats, Floats]:
        """How far TAR at FAR (F,), and the FAR that its threshold gives (F,), can be from those of scores that are not rounded.

        The impostor that sets the threshold is within ``off_by`` levels of where it was counted, and so is every genuine pair: those
        more than twice as far away keep their side. At the threshold itself only impostors within ``off_by`` may change theirs.
        """
        far_F = np.asarray(fars, dtype=np.float64)
        setting_F = self._lowest(far_F, np.cumsum(self.impostor_L[::-1])[::-1]) - 1
        _, threshold_F = self.operating_points(far_F)
        at_F = np.rint((threshold_F + 1.0) * STEPS_PER_UNIT).astype(np.int64)
        off, twice = self.off_by, 2.0 * self.off_by
        more_F = _between(self.genuine_L, setting_F + 1 - math.ceil(twice), setting_F + 1)
        fewer_F = _between(self.genuine_L, setting_F + 1, setting_F + 1 + math.floor(twice))
        tar_F = np.where(setting_F >= 0, np.maximum(more_F, fewer_F), 0.0) / self.num_genuine
        above_F = _between(self.impostor_L, at_F, at_F + math.ceil(off))
        below_F = _between(self.impostor_L, at_F - math.floor(off), at_F)
        return tar_F, np.maximum(above_F, below_F) / self.num_impostor

    def far_from(self, threshold: float) -> float:
        """Share of impostors at or above a threshold."""
        return float(self.impostor_L[max(level_of(threshold), 0) :].sum()) / self.num_impostor

    def tar_from(self, threshold: float) -> float:
        """Share of genuine pairs at or above a threshold."""
        return float(self.genuine_L[max(level_of(threshold), 0) :].sum()) / self.num_genuine


def level_of(score: float) -> int:
    """The level of a score or threshold."""
    return round((score + 1.0) * STEPS_PER_UNIT)


def error_levels(dim: int) -> float:
    """How many levels a counted score of vectors of ``dim`` values can be from the score that real numbers have."""
    return 0.5 + math.sqrt(dim) / 8.0


def count_pairs(
    query: EmbeddingSet,
    gallery: EmbeddingSet,
    fars: Sequence[float],
    world: World | None = None,
    down_to: float | None = None,
) -> PairCounts:
    """Count all ordered pairs; exact at all levels up to 2^26 pairs, else for FARs up to the largest of ``fars``.

    down_to: a score from which on counts must be exact, too.

    The same vectors as query and gallery are scored once a pair of images.
    Errors: RunError when dimensions differ or an image has two labels; DataError for no genuine or no impostor pair.
    **Collectives**: three all-reduces of 34 MB; every rank passes all vectors and returns the same counts.
    **Memory**: 16 MiB of scores (a GPU: 1 GiB), 150 MB of counts, 16 bytes an image; pairs are not kept.
    """
    check_comparable(query, gallery)
    if len(query.labels_N) * len(gallery.labels_N) <= MOST_PAIRS_AT_ALL_LEVELS:
        counts = count_at_all_levels(query, gallery)
    else:
        counts = _count_high_levels(query, gallery, max(fars), world or World(), down_to)
    if counts.num_genuine == 0 or counts.num_impostor == 0:
        kind, need = (
            ("genuine", "an identity with two images") if counts.num_genuine == 0 else ("impostor", "two identities")
        )
        raise DataError(
            f"queries of {query.name!r} ({len(query.labels_N)} images) against the gallery of {gallery.name!r} "
            f"({len(gallery.labels_N)} images) have 0 {kind} pairs; TAR at FAR needs at least 1: {need}"
        )
    return counts


def check_comparable(query: EmbeddingSet, gallery: EmbeddingSet) -> None:
    """Errors: RunError when dimensions differ or an image has two labels."""
    dims = query.vectors_ND.shape[1], gallery.vectors_ND.shape[1]
    if dims[0] != dims[1]:
        raise RunError(
            f"query model {query.name!r} has {dims[0]} dimensions and gallery model {gallery.name!r} has {dims[1]}; "
            "must be equal to be compared. Train the new model with the old embedding_dim"
        )
    shared, in_query, in_gallery = np.intersect1d(
        query.sample_ids_N, gallery.sample_ids_N, assume_unique=True, return_indices=True
    )
    differ = np.flatnonzero(query.labels_N[in_query] != gallery.labels_N[in_gallery])
    if differ.size:
        first = differ[0]
        raise RunError(
            f"image {shared[first]} has label {query.labels_N[in_query[first]]} in {query.name!r} and "
            f"{gallery.labels_N[in_gallery[first]]} in {gallery.name!r} ({differ.size} such images); "
            "must be the same. Embed the same view of the data with both models"
        )


def count_at_all_levels(query: EmbeddingSet, gallery: EmbeddingSet) -> PairCounts:
    """Every pair at every level: the obvious way. **Memory**: 14 bytes * max(2^22, gallery images)."""
    genuine_L = np.zeros(NUM_LEVELS, dtype=np.int64)
    impostor_L = np.zeros(NUM_LEVELS, dtype=np.int64)
    num_ranked = num_correct = 0
    block_rows = max(1, _BLOCK_SCORES // len(gallery.labels_N))
    for first in range(0, len(query.labels_N), block_rows):
        block = slice(first, first + block_rows)
        # One more than the level, so that 0 is free to mean "no impostor here".
        place_BN = _levels(query.vectors_ND[block] @ gallery.vectors_ND.T)
        place_BN += 1
        row_P, column_P = np.nonzero(query.labels_N[block, None] == gallery.labels_N)
        place_P = place_BN[row_P, column_P]
        place_BN[row_P, column_P] = 0
        other_P = query.sample_ids_N[block][row_P] != gallery.sample_ids_N[column_P]
        impostor_L += np.bincount(place_BN.ravel(), minlength=NUM_LEVELS + 1)[1:]
        genuine_L += np.bincount(place_P[other_P], minlength=NUM_LEVELS + 1)[1:]
        best_mate_B = np.zeros(len(place_BN), dtype=np.int64)
        np.maximum.at(best_mate_B, row_P[other_P], place_P[other_P])
        num_ranked += int(np.count_nonzero(best_mate_B))
        num_correct += int(np.count_nonzero(best_mate_B > place_BN.max(axis=1)))
    off_by = error_levels(query.vectors_ND.shape[1])
    return PairCounts(genuine_L, impostor_L.astype(np.float64), num_ranked, num_correct, off_by=off_by)


def _between(count_L: Counts | Floats, low_F: Counts, high_F: Counts) -> Floats:
    """Pairs from level ``low`` up to, and without, level ``high`` (F,)."""
    ends_F = (np.clip(low_F, 0, NUM_LEVELS), np.clip(high_F, 0, NUM_LEVELS))
    return np.array([count_L[low:high].sum() for low, high in zip(*ends_F, strict=True)], dtype=np.float64)


def _levels(cos: npt.NDArray[np.float32]) -> Counts:
    # The factor is a power of two, so only rint rounds. Norms within tolerance of 1 may pass 1 a little.
    np.multiply(cos, STEPS_PER_UNIT, out=cos)
    np.rint(cos, out=cos)
    np.clip(cos, -STEPS_PER_UNIT, STEPS_PER_UNIT, out=cos)
    level = cos.astype(np.int64)
    level += STEPS_PER_UNIT
    return level


def _count_high_levels(
    query: EmbeddingSet, gallery: EmbeddingSet, largest_far: float, world: World, down_to: float | None
) -> PairCounts:
    """As ``count_at_all_levels`` has it from a level on that the largest FAR does not reach."""
    sample_L = _sample(query, gallery)
    num_sampled = float(sample_L.sum())
    far = max(_NEAR_FAR * largest_far, _SAMPLE_ABOVE / max(1.0, num_sampled))
    while True:
        cut = _cut(sample_L, far, world)
        if down_to is not None:
            cut = max(0, min(cut, level_of(down_to) - 1))
        high = _HighCounter(query, gallery, cut, world).count()
        num_below = high.num_below
        num_impostor = float(high.impostor_L.sum()) + num_below
        # exact when more pairs than the largest FAR allows are above the cut
        if cut == 0 or num_impostor == 0 or high.impostor_L.sum() > largest_far * num_impostor:
            break
        far *= 4.0
    impostor_L = high.impostor_L.astype(np.float64)
    below_L = sample_L[:cut].astype(np.float64)
    if num_below:
        if below_L.sum() == 0:
            below_L[-1] = 1.0
        impostor_L[:cut] = below_L * (num_below / below_L.sum())
    off_by = error_levels(query.vectors_ND.shape[1])
    return PairCounts(high.genuine_L, impostor_L, high.num_ranked, high.num_correct, cut, off_by)


def _sample(query: EmbeddingSet, gallery: EmbeddingSet) -> Counts:
    """Impostors of some queries in a part of the gallery, drawn by a fixed seed, at each level.

    As many of the one as of the other: pairs of one image depend on each other, so few images would be a poor sample.
    """
    draw = np.random.default_rng(0)
    num_queries = min(len(query.labels_N), math.isqrt(_SAMPLE_PAIRS))
    rows = np.sort(draw.permutation(len(query.labels_N))[:num_queries])
    columns = np.sort(draw.permutation(len(gallery.labels_N))[: _SAMPLE_PAIRS // num_queries])
    return count_at_all_levels(query.rows(rows), gallery.rows(columns)).impostor_L.astype(np.int64)


def _cut(sample_L: Counts, far: float, world: World) -> int:
    """The lowest level above which ``far`` of the sample lies; the same on all ranks."""
    allowed = far * sample_L.sum()
    from_L = np.cumsum(sample_L[::-1])[::-1]
    cut = 0 if allowed >= from_L[0] else int(NUM_LEVELS - np.searchsorted(from_L[::-1], allowed, side="right"))
    # processors may round a sample's sums differently
    return NUM_LEVELS - int(all_reduce_max(torch.tensor([NUM_LEVELS - cut], device=world.device), world).item())


@dataclass(frozen=True, eq=False)
class _High:
    genuine_L: Counts
    impostor_L: Counts
    num_below: int
    num_ranked: int
    num_correct: int


class _HighCounter:
    """One pass over squares of scores; images in the order of their labels, so that mates lie side by side."""

    def __init__(self, query: EmbeddingSet, gallery: EmbeddingSet, cut: int, world: World) -> None:
        self._world, self._cut = world, cut
        self._side = _SIDE[world.device.type]
        self._mirrored = query.vectors_ND is gallery.vectors_ND and query.sample_ids_N is gallery.sample_ids_N
        self._query, self._gallery = _Sorted.of(query), _Sorted.of(gallery)
        labels = self._gallery.label_N
        self._mates_from = torch.searchsorted(labels, self._query.label_N)
        self._mates_to = torch.searchsorted(labels, self._query.label_N, right=True)
        self._genuine_L, self._impostor_L = (torch.zeros(NUM_LEVELS, dtype=torch.int64) for _ in range(2))
        # Nothing that stays is allocated between squares: it would keep the memory of squares before it from being used again.
        self._score = torch.empty(self._side * self._side, device=world.device)
        self._waiting_W = torch.empty(_GATHER_SCORES, dtype=torch.int64)
        self._num_waiting = self._waiting_times = self._num_impostor = 0
        # levels; 0 stands for nobody, as one more than a level does in the obvious way
        self._best_mate_N, self._best_other_N = (
            torch.zeros(len(self._query.label_N), dtype=torch.int64) for _ in range(2)
        )

    def count(self) -> _High:
        for rows, columns in self._squares():
            self._square(rows, columns)
        self._settle()
        world, device = self._world, self._world.device
        sums = torch.cat([self._genuine_L, self._impostor_L, torch.tensor([self._num_impostor], dtype=torch.int64)]).to(
            device
        )
        sum_L = all_reduce_sum(sums, world).cpu().numpy()
        best_mate_N = all_reduce_max(self._best_mate_N.to(device), world).cpu()
        best_other_N = all_reduce_max(self._best_other_N.to(device), world).cpu()
        genuine_L, impostor_L = sum_L[:NUM_LEVELS], sum_L[NUM_LEVELS : 2 * NUM_LEVELS]
        return _High(
            genuine_L,
            impostor_L,
            int(sum_L[-1]) - int(impostor_L.sum()),
            int((best_mate_N > 0).sum()),
            int(((best_mate_N > 0) & (best_mate_N > best_other_N)).sum()),
        )

    def _squares(self) -> Iterator[tuple[slice, slice]]:
        """This rank's squares; of mirrored sets those on and above the diagonal."""
        side, world = self._side, self._world
        ends = [[*range(0, len(sorted_.label_N), side)] for sorted_ in (self._query, self._gallery)]
        every = [(row, column) for row in ends[0] for column in ends[1] if not self._mirrored or column >= row]
        # neighbours share their query rows; a rank takes a run of them
        first, last = (len(every) * rank // world.size for rank in (world.rank, world.rank + 1))
        for row, column in every[first:last]:
            yield slice(row, row + side), slice(column, column + side)

    def _square(self, rows: slice, columns: slice) -> None:
        device, twice = self._world.device, self._mirrored and rows.start != columns.start
        query_BD, gallery_ND = self._query.rows(rows, device), self._gallery.rows(columns, device)
        score_BN = self._score[: len(query_BD) * len(gallery_ND)].view(len(query_BD), len(gallery_ND))
        torch.mm(query_BD, gallery_ND.T, out=score_BN)
        row_P, column_P = (index.to(device) for index in self._mates(rows, columns))
        if len(row_P):
            mate_P = score_BN[row_P, column_P]
            score_BN[row_P, column_P] = _NOBODY
            row_P, column_P, mate_P = row_P.cpu(), column_P.cpu(), mate_P.cpu()
            other_P = self._query.id_N[rows][row_P] != self._gallery.id_N[columns][column_P]
            level_P = _levels_of(mate_P[other_P])
            row_P, column_P = row_P[other_P], column_P[other_P]
            self._genuine_L += torch.bincount(level_P, minlength=NUM_LEVELS) * (2 if twice else 1)
            _raise_to(self._best_mate_N[rows], row_P, level_P + 1)
            if twice:
                _raise_to(self._best_mate_N[columns], column_P, level_P + 1)
            num_mates = len(mate_P)
        else:
            num_mates = 0
        self._num_impostor += (score_BN.numel() - num_mates) * (2 if twice else 1)
        best_B = score_BN.amax(1)
        best_other_B = _levels_or_nobody(best_B.cpu())
        torch.maximum(self._best_other_N[rows], best_other_B, out=self._best_other_N[rows])
        if twice:
            best_other_N = _levels_or_nobody(score_BN.amax(0).cpu())
            torch.maximum(self._best_other_N[columns], best_other_N, out=self._best_other_N[columns])
        # half a step is where rounding turns, a whole one leaves room; levels decide
        least = (self._cut - 1) / STEPS_PER_UNIT - 1.0
        reaching = best_B >= least
        if not bool(reaching.any()):
            return
        if int(reaching.sum()) * 2 < len(reaching):
            score_BN = score_BN[reaching]
        level_P = _levels_of(score_BN[score_BN >= max(least, -1.5)])
        level_P = level_P[level_P >= self._cut].cpu()
        self._wait(level_P, 2 if twice else 1)

    def _wait(self, level_P: torch.Tensor, times: int) -> None:
        """Have the levels counted ``times`` times, together with others: a count goes over all levels."""
        if times != self._waiting_times or self._num_waiting + len(level_P) > len(self._waiting_W):
            self._settle()
            self._waiting_times = times
        if len(level_P) > len(self._waiting_W):
            self._impostor_L += times * torch.bincount(level_P, minlength=NUM_LEVELS)
        else:
            self._waiting_W[self._num_waiting : self._num_waiting + len(level_P)] = level_P
            self._num_waiting += len(level_P)

    def _settle(self) -> None:
        if self._num_waiting:
            counted_L = torch.bincount(self._waiting_W[: self._num_waiting], minlength=NUM_LEVELS)
            self._impostor_L += self._waiting_times * counted_L
        self._num_waiting = 0

    def _mates(self, rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column (P,), in the square, of pairs with the same label."""
        from_B = self._mates_from[rows].clamp(columns.start, columns.stop) - columns.start
        to_B = self._mates_to[rows].clamp(columns.start, columns.stop) - columns.start
        count_B = to_B - from_B
        row_P = torch.repeat_interleave(torch.arange(len(count_B)), count_B)
        before_B = torch.cumsum(count_B, 0) - count_B
        return row_P, torch.arange(len(row_P)) - before_B[row_P] + from_B[row_P]


@dataclass(frozen=True, eq=False)
class _Sorted:
    """A set seen in the order of its labels; vectors stay where they are."""

    vectors_ND: torch.Tensor
    order_N: torch.Tensor
    label_N: torch.Tensor
    id_N: torch.Tensor

    @classmethod
    def of(cls, one: EmbeddingSet) -> _Sorted:
        order_N = torch.from_numpy(np.argsort(one.labels_N, kind="stable"))
        vectors_ND, labels_N, ids_N = (
            torch.from_numpy(np.ascontiguousarray(column))
            for column in (one.vectors_ND, one.labels_N, one.sample_ids_N)
        )
        return cls(vectors_ND, order_N, labels_N[order_N].contiguous(), ids_N[order_N])

    def rows(self, rows: slice, device: torch.device) -> torch.Tensor:
        return self.vectors_ND[self.order_N[rows]].to(device)


def _levels_of(score: torch.Tensor) -> torch.Tensor:
    return score.mul(STEPS_PER_UNIT).round_().clamp_(-STEPS_PER_UNIT, STEPS_PER_UNIT).long().add_(STEPS_PER_UNIT)


def _levels_or_nobody(score: torch.Tensor) -> torch.Tensor:
    """One more than the level; 0 where no impostor was."""
    return torch.where(score > -1.5, _levels_of(score) + 1, 0)


def _raise_to(value_N: torch.Tensor, place_P: torch.Tensor, level_P: torch.Tensor) -> None:
    value_N.scatter_reduce_(0, place_P, level_P, "amax")
