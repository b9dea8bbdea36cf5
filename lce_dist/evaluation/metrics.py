"""How well one model's queries find another model's gallery: every pair of images is scored and counted once.

Scores are inner products in float32, rounded to multiples of 2^-20 (about 1e-6, what float32 sums are good for).
From there on all is counting of integers: thresholds, TAR, ROC and histograms are exact for the rounded scores,
equal scores are ties on every machine, and memory does not grow with the number of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

HISTOGRAM_EDGES: Floats = np.linspace(-1.0, 1.0, 201)

_STEPS_PER_UNIT = 1 << 20
# Level 0 is the score -1, level 2^21 the score 1.
_NUM_LEVELS = 2 * _STEPS_PER_UNIT + 1
_BLOCK_SCORES = 1 << 22
_ROC_POINTS = 161
_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class EmbeddingSet:
    """One model's unit vectors (N, D) float32 of N images, with their identities and image numbers (N,) int64.

    Errors: RunError when a shape or type is wrong, a value is not finite, a norm is off 1 by more than 1e-3, or an
    image occurs twice (a padded batch would count pairs twice).
    """

    name: str
    vectors_ND: npt.NDArray[np.float32]
    labels_N: Counts
    sample_ids_N: Counts

    def __post_init__(self) -> None:
        shape = self.vectors_ND.shape
        if len(shape) != 2 or 0 in shape or self.vectors_ND.dtype != np.float32:
            raise RunError(
                f"vectors of model {self.name!r} are {self.vectors_ND.dtype} of shape {shape}; "
                "must be float32 of shape (images, dimensions), both at least 1. Cast and reshape them"
            )
        for kind, column in (("labels", self.labels_N), ("sample ids", self.sample_ids_N)):
            if column.shape != shape[:1] or column.dtype != np.int64:
                raise RunError(
                    f"{kind} of model {self.name!r} are {column.dtype} of shape {column.shape}; "
                    f"must be int64 of shape ({shape[0]},), one a vector. Pass one for each vector"
                )
        # A sum of squares is not finite when any element is not, so one pass finds both faults.
        norm_N = np.sqrt(np.einsum("nd,nd->n", self.vectors_ND, self.vectors_ND))
        wrong_N = np.flatnonzero(~(np.abs(norm_N - 1.0) <= _NORM_TOLERANCE))
        if wrong_N.size:
            row = int(wrong_N[0])
            raise RunError(
                f"vector of image {self.sample_ids_N[row]} of model {self.name!r} has norm {norm_N[row]:.6g} "
                f"({wrong_N.size} of {shape[0]} such vectors); must be finite and within {_NORM_TOLERANCE} of 1. "
                "Normalise the vectors, and look for a diverged training when they are not finite"
            )
        unique, times = np.unique(self.sample_ids_N, return_counts=True)
        if len(unique) != shape[0]:
            raise RunError(
                f"image {unique[times > 1][0]} occurs {times.max()} times among the {shape[0]} vectors of model "
                f"{self.name!r}; each image must occur once. Drop padded rows before building the set"
            )


@dataclass(frozen=True, eq=False)
class PairResult:
    """What one (query model, gallery model) pair reaches; keys of the two dicts are ``far_key(far)``.

    roc: (FAR, TAR), both (P,), FAR spaced evenly in its logarithm. Histograms: pairs a bin of ``HISTOGRAM_EDGES``.
    num_ranked: queries with a mate in the gallery, those that rank-1 is a share of.
    """

    tar_at_far: dict[str, float]
    threshold_at_far: dict[str, float]
    rank1: float
    num_ranked: int
    num_genuine: int
    num_impostor: int
    roc: tuple[Floats, Floats]
    genuine_histogram: Counts
    impostor_histogram: Counts


def far_key(far: float) -> str:
    """The key of a FAR in results: the shortest text that reads back as the same float, such as ``0.01``."""
    return repr(float(far))


def compare(query: EmbeddingSet, gallery: EmbeddingSet, fars: Sequence[float]) -> PairResult:
    """Score all ordered pairs (query image, gallery image) of different images; genuine = same label.

    TAR at FAR: the threshold is the smallest score of any pair that leaves (impostors >= it) / impostors <= FAR; accept
    from it on. A FAR below 1 / impostors allows no false accept: its TAR is the share of genuine above every impostor.
    Rank-1: best of the gallery without the query image itself; a tie with another identity counts as a miss.
    Errors: RunError when dimensions differ, an image has two labels, or there is no genuine or no impostor pair.
    **Memory**: 14 bytes * max(2^22, gallery images) for a block of scores, and 120 MB of counts; pairs are not kept.
    """
    _check_comparable(query, gallery)
    tally = _count_pairs(query, gallery)
    num_genuine, num_impostor = int(tally.genuine_L.sum()), int(tally.impostor_L.sum())
    if num_genuine == 0 or num_impostor == 0:
        kind, need = ("genuine", "an identity with two images") if num_genuine == 0 else ("impostor", "two identities")
        raise RunError(
            f"queries of {query.name!r} ({len(query.labels_N)} images) against the gallery of {gallery.name!r} "
            f"({len(gallery.labels_N)} images) have 0 {kind} pairs; TAR at FAR needs at least 1. Hold out {need}"
        )
    lowest_far = max(1.0 / num_impostor, min([1e-4, *fars]))
    roc_far_P = np.geomspace(lowest_far, 1.0, _ROC_POINTS)
    tar_F, threshold_F = _operating_points(tally, np.concatenate([np.asarray(fars, dtype=np.float64), roc_far_P]))
    keys = [far_key(far) for far in fars]
    return PairResult(
        tar_at_far=dict(zip(keys, tar_F.tolist(), strict=False)),
        threshold_at_far=dict(zip(keys, threshold_F.tolist(), strict=False)),
        rank1=tally.num_correct / tally.num_ranked,
        num_ranked=tally.num_ranked,
        num_genuine=num_genuine,
        num_impostor=num_impostor,
        roc=(roc_far_P, tar_F[len(keys) :]),
        genuine_histogram=_coarse(tally.genuine_L),
        impostor_histogram=_coarse(tally.impostor_L),
    )


@dataclass(frozen=True, eq=False)
class _Tally:
    """Pairs at each level (_NUM_LEVELS,), queries with a mate, and those whose mate came first."""

    genuine_L: Counts
    impostor_L: Counts
    num_ranked: int
    num_correct: int


def _check_comparable(query: EmbeddingSet, gallery: EmbeddingSet) -> None:
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


def _count_pairs(query: EmbeddingSet, gallery: EmbeddingSet) -> _Tally:
    genuine_L = np.zeros(_NUM_LEVELS, dtype=np.int64)
    impostor_L = np.zeros(_NUM_LEVELS, dtype=np.int64)
    num_ranked = num_correct = 0
    block_rows = max(1, _BLOCK_SCORES // len(gallery.labels_N))
    for first in range(0, len(query.labels_N), block_rows):
        block = slice(first, first + block_rows)
        # One more than the level, so that 0 is free to mean "no impostor here".
        place_BN = _level(query.vectors_ND[block] @ gallery.vectors_ND.T)
        place_BN += 1
        row_P, column_P = np.nonzero(query.labels_N[block, None] == gallery.labels_N)
        place_P = place_BN[row_P, column_P]
        place_BN[row_P, column_P] = 0
        other_P = query.sample_ids_N[block][row_P] != gallery.sample_ids_N[column_P]
        impostor_L += np.bincount(place_BN.ravel(), minlength=_NUM_LEVELS + 1)[1:]
        genuine_L += np.bincount(place_P[other_P], minlength=_NUM_LEVELS + 1)[1:]
        best_mate_B = np.zeros(len(place_BN), dtype=np.int64)
        np.maximum.at(best_mate_B, row_P[other_P], place_P[other_P])
        num_ranked += int(np.count_nonzero(best_mate_B))
        num_correct += int(np.count_nonzero(best_mate_B > place_BN.max(axis=1)))
    return _Tally(genuine_L, impostor_L, num_ranked, num_correct)


def _level(cos: npt.NDArray[np.float32]) -> Counts:
    # The factor is a power of two, so only rint rounds. Norms within tolerance of 1 may pass 1 a little.
    np.multiply(cos, _STEPS_PER_UNIT, out=cos)
    np.rint(cos, out=cos)
    np.clip(cos, -_STEPS_PER_UNIT, _STEPS_PER_UNIT, out=cos)
    level = cos.astype(np.int64)
    level += _STEPS_PER_UNIT
    return level


def _operating_points(tally: _Tally, far_F: Floats) -> tuple[Floats, Floats]:
    """TAR (F,) and threshold (F,) of each FAR, by the rule in :func:`compare`."""
    num_impostor = int(tally.impostor_L.sum())
    impostor_from_L = np.cumsum(tally.impostor_L[::-1])[::-1]
    genuine_from_L = np.append(np.cumsum(tally.genuine_L[::-1])[::-1], 0)
    # floor(FAR * n) may be off by one (0.29 * 100 < 29); the rule is on the quotient.
    allowed_F = np.floor(far_F * num_impostor)
    allowed_F += (allowed_F + 1) / num_impostor <= far_F
    allowed_F -= allowed_F / num_impostor > far_F
    lowest_F = _NUM_LEVELS - np.searchsorted(impostor_from_L[::-1], allowed_F, side="right")
    taken = np.flatnonzero(tally.genuine_L + tally.impostor_L)
    # Without any score up there the threshold stays one step above the highest impostor: nothing is accepted.
    next_F = np.searchsorted(taken, lowest_F)
    level_F = np.where(next_F < len(taken), taken[np.minimum(next_F, len(taken) - 1)], lowest_F)
    return genuine_from_L[level_F] / genuine_from_L[0], level_F / _STEPS_PER_UNIT - 1.0


def _coarse(count_L: Counts) -> Counts:
    # Bins are [edge, next edge), the last one with its end, as numpy.histogram has them.
    score_L = np.arange(_NUM_LEVELS) / _STEPS_PER_UNIT - 1.0
    return np.add.reduceat(count_L, np.searchsorted(score_L, HISTOGRAM_EDGES[:-1]))
