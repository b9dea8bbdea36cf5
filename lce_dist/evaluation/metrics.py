"""How well one model's queries find another model's gallery: TAR at FAR, thresholds, rank-1, ROC and histograms.

Numbers are exact for scores rounded to multiples of 2^-20, and what rounding can do to them is said beside them; of more than 2^26
pairs, for FARs up to the largest one that was asked (see counting.py, which counts the pairs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lce_dist.evaluation.counting import NUM_LEVELS, STEPS_PER_UNIT, PairCounts, count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.world import World

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

HISTOGRAM_EDGES: Floats = np.linspace(-1.0, 1.0, 201)

_ROC_POINTS = 161
_COARSE = 1e-3


@dataclass(frozen=True, eq=False)
class PairResult:
    """What one (query model, gallery model) pair reaches; keys of the two dicts are ``far_key(far)``.

    roc: (FAR, TAR), both (P,), FAR spaced evenly in its logarithm. Histograms: pairs a bin of ``HISTOGRAM_EDGES``.
    num_ranked: queries with a mate in the gallery, those that rank-1 is a share of. Above ``exact_up_to_far`` the ROC,
    and in scores below it the impostors' histogram, is an estimate from a sample of pairs. kept: (FAR, TAR) at given
    thresholds, by their FARs elsewhere. tar_error, far_error: how far rounding of scores can have moved TAR at FAR, and the FAR
    of its threshold.
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
    exact_up_to_far: float = 1.0
    kept: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tar_error: Mapping[str, float] = field(default_factory=dict)
    far_error: Mapping[str, float] = field(default_factory=dict)

    def coarse_at(self) -> list[str]:
        """FARs at which rounding can have moved TAR or FAR by more than a thousandth: scores lie too close together."""
        return [key for key, error in self.tar_error.items() if max(error, self.far_error[key]) > _COARSE]


def far_key(far: float) -> str:
    """The key of a FAR in results: the shortest text that reads back as the same float, such as ``0.01``."""
    return repr(float(far))


def compare(
    query: EmbeddingSet, gallery: EmbeddingSet, fars: Sequence[float], world: World | None = None
) -> PairResult:
    """Score all ordered pairs (query image, gallery image) of different images; genuine = same label.

    TAR at FAR: the threshold is the smallest score of any pair that leaves (impostors >= it) / impostors <= FAR; accept
    from it on. A FAR below 1 / impostors allows no false accept: its TAR is the share of genuine above every impostor.
    Rank-1: best of the gallery without the query image itself; a tie with another identity counts as a miss.
    Errors, **Collectives**, **Memory**: those of :func:`~lce_dist.evaluation.counting.count_pairs`.
    """
    return result_of(count_pairs(query, gallery, fars, world), fars)


def result_of(counts: PairCounts, fars: Sequence[float], thresholds: Mapping[str, float] | None = None) -> PairResult:
    """What :func:`compare` returns, from pairs that were counted before; ``thresholds``: those of ``kept``."""
    lowest_far = max(1.0 / counts.num_impostor, min([1e-4, *fars]))
    roc_far_P = np.geomspace(lowest_far, 1.0, _ROC_POINTS)
    tar_F, threshold_F = counts.operating_points(np.concatenate([np.asarray(fars, dtype=np.float64), roc_far_P]))
    keys = [far_key(far) for far in fars]
    tar_error_F, far_error_F = counts.rounding_errors(fars)
    return PairResult(
        tar_at_far=dict(zip(keys, tar_F.tolist(), strict=False)),
        threshold_at_far=dict(zip(keys, threshold_F.tolist(), strict=False)),
        rank1=counts.num_correct / max(1, counts.num_ranked),
        num_ranked=counts.num_ranked,
        num_genuine=counts.num_genuine,
        num_impostor=counts.num_impostor,
        roc=(roc_far_P, tar_F[len(keys) :]),
        genuine_histogram=_coarse(counts.genuine_L),
        impostor_histogram=_coarse(counts.impostor_L),
        exact_up_to_far=counts.exact_up_to_far,
        kept={key: (counts.far_from(at), counts.tar_from(at)) for key, at in (thresholds or {}).items()},
        tar_error=dict(zip(keys, tar_error_F.tolist(), strict=True)),
        far_error=dict(zip(keys, far_error_F.tolist(), strict=True)),
    )


def _coarse(count_L: Counts | Floats) -> Counts:
    # Bins are [edge, next edge), the last one with its end, as numpy.histogram has them.
    score_L = np.arange(NUM_LEVELS) / STEPS_PER_UNIT - 1.0
    return np.rint(np.add.reduceat(count_L, np.searchsorted(score_L, HISTOGRAM_EDGES[:-1]))).astype(np.int64)
