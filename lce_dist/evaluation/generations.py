"""More than two generations: every later model against every earlier gallery, as they are or through composed maps.

**Source**: method.md section 7 of the project; AC and AM: Biondi et al., "CoReS: Compatible Representations via
Stationarity", TPAMI 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError
from lce_dist.evaluation.metrics import EmbeddingSet, compare, far_key

Vectors = npt.NDArray[np.float32]
Map = Callable[[Vectors], npt.NDArray[np.floating]]  # (N, D) unit rows to (N, E); lengths do not matter


@dataclass(frozen=True, eq=False)
class Generations:
    """The matrix C[i, j] = TAR of model i's queries in model j's gallery at one FAR, for i >= j; nan elsewhere."""

    names: tuple[str, ...]
    tar_GG: npt.NDArray[np.float64]

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
) -> Generations:
    """Compare generations 0, 1, ... (oldest first) of the same images.

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
    tar_GG = np.full((count, count), np.nan)
    for start in range(count):
        seen = sets[start]
        if manner == "forward":  # the gallery of ``start`` travels up
            for i in range(start, count):
                if i > start and maps is not None:
                    seen = _mapped(seen, maps[i - 1])
                tar_GG[i, start] = _tar(sets[i], seen, far)
            continue
        for j in range(start, -1, -1):  # the queries of ``start`` travel down
            if j < start and maps is not None and manner == "backward":
                seen = _mapped(seen, maps[j])
            tar_GG[start, j] = _tar(seen, sets[j], far)
    return Generations(tuple(each.name for each in sets), tar_GG)


def _tar(query: EmbeddingSet, gallery: EmbeddingSet, far: float) -> float:
    return compare(query, gallery, [far]).tar_at_far[far_key(far)]


def _mapped(seen: EmbeddingSet, map_: Map) -> EmbeddingSet:
    vectors_NE = np.asarray(map_(seen.vectors_ND), dtype=np.float32)
    length_N = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return replace(seen, vectors_ND=vectors_NE / np.maximum(length_N, np.float32(1e-12)))
