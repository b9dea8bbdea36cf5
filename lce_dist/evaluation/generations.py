"""More than two generations: every later model against every earlier gallery, as they are or through composed maps.

**Source**: method.md section 7 of the project; AC and AM: Biondi et al., "CoReS: Compatible Representations via
Stationarity", TPAMI 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError
from lce_dist.evaluation.bootstrap import Interval, tar_interval
from lce_dist.evaluation.embeddings import EmbeddingSet, whole_identities
from lce_dist.evaluation.metrics import PairResult, compare, far_key

_MOST_IMAGES_DRAWN = 8192

Vectors = npt.NDArray[np.float32]
Map = Callable[[Vectors], npt.NDArray[np.floating]]  # (N, D) unit rows to (N, E); lengths do not matter


@dataclass(frozen=True, eq=False)
class Generations:
    """The matrix C[i, j] = TAR of model i's queries in model j's gallery at one FAR, for i >= j; nan elsewhere.

    cells: all that was measured, by (i, j); intervals: of C, over identities drawn again (of at most 8,192 images).
    """

    names: tuple[str, ...]
    tar_GG: npt.NDArray[np.float64]
    cells: Mapping[tuple[int, int], PairResult] = field(default_factory=dict)
    intervals: Mapping[tuple[int, int], Interval] = field(default_factory=dict)

    @property
    def average_compatibility(self) -> float:
        """AC: share of the pairs i > j in which C[i, j] > C[j, j], strictly."""
        return float(np.mean([self.tar_GG[i, j] > self.tar_GG[j, j] for i, j in self._below()]))

    @property
    def average_metric(self) -> float:
        """AM: mean of C[i, j] over i >= j."""
        return float(np.nanmean(self.tar_GG))

    def _below(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(len(self.names)) for j in range(i)]


def compare_generations(
    sets: Sequence[EmbeddingSet],
    far: float,
    maps: Sequence[Map] | None = None,
    manner: Literal["direct", "backward", "forward"] = "direct",
    more_fars: Sequence[float] = (),
    seed: int = 0,
) -> Generations:
    """Compare generations 0, 1, ... (oldest first) of the same images; more_fars: measured, too, and not judged.

    maps: one for each two neighbours. Backward: maps[k] takes vectors of generation k + 1 to the space of k, and queries
    are mapped; forward: of k to the space of k + 1, and galleries are mapped. Over several generations they are
    composed, of unit vectors each time.
    Errors: RunError for fewer than two generations, maps that do not fit the manner, and those of ``compare``.
    **Memory**: one mapped set and one comparison at a time.
    """
    count = len(sets)
    if count < 2:
        raise RunError(f"{count} generations were given; must be at least 2")
    wanted = 0 if manner == "direct" else count - 1
    if len(maps or ()) != wanted:
        raise RunError(f"{len(maps or ())} maps were given; the {manner} manner of {count} generations needs {wanted}")
    cells: dict[tuple[int, int], PairResult] = {}
    intervals: dict[tuple[int, int], Interval] = {}
    fars = [far, *(other for other in more_fars if other != far)]
    some = whole_identities(sets[0], _MOST_IMAGES_DRAWN, seed)

    def measure(i: int, j: int, query: EmbeddingSet, gallery: EmbeddingSet) -> None:
        cells[i, j] = compare(query, gallery, fars)
        intervals[i, j] = replace(
            tar_interval(query.rows(some), gallery.rows(some), far, seed=seed),
            value=cells[i, j].tar_at_far[far_key(far)],
        )

    for start in range(count):
        seen = sets[start]
        if manner == "forward":  # the gallery of ``start`` travels up
            for i in range(start, count):
                if i > start and maps is not None:
                    seen = _mapped(seen, maps[i - 1])
                measure(i, start, sets[i], seen)
            continue
        for j in range(start, -1, -1):  # the queries of ``start`` travel down
            if j < start and maps is not None and manner == "backward":
                seen = _mapped(seen, maps[j])
            measure(start, j, seen, sets[j])
    tar_GG = np.full((count, count), np.nan)
    for place, interval in intervals.items():
        tar_GG[place] = interval.value
    return Generations(tuple(each.name for each in sets), tar_GG, cells, intervals)


def _mapped(seen: EmbeddingSet, map_: Map) -> EmbeddingSet:
    vectors_NE = np.asarray(map_(seen.vectors_ND), dtype=np.float32)
    length_N = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return replace(seen, vectors_ND=vectors_NE / np.maximum(length_N, np.float32(1e-12)))
