"""Genuine pairs one by one, scored by several pairs of models at once: what an upgrade does to people who were accepted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError
from lce_dist.evaluation.counting import STEPS_PER_UNIT, check_comparable, level_of
from lce_dist.evaluation.embeddings import EmbeddingSet

Ints = npt.NDArray[np.int64]
Pair = tuple[EmbeddingSet, EmbeddingSet]  # (query model, gallery model)

_BLOCK_SCORES = 1 << 22


@dataclass(frozen=True, eq=False)
class Mates:
    """Some genuine pairs (P,): rows of query and gallery, and for each cell the level of its score, as counted there."""

    query_P: Ints
    gallery_P: Ints
    level_P: dict[str, npt.NDArray[np.int32]]


def mates(cells: Mapping[str, Pair]) -> Iterator[Mates]:
    """All genuine pairs of different images, in the same order whatever the models; all cells must be of the same images.

    Errors: RunError when queries or galleries of two cells are of other images, or not in the same order.
    **Memory**: of a block of scores a cell, and 16 bytes an image.
    """
    names = list(cells)
    first_query, first_gallery = cells[names[0]]
    for name in names:
        for side, one, other in zip(("query", "gallery"), cells[name], (first_query, first_gallery), strict=True):
            if not np.array_equal(one.sample_ids_N, other.sample_ids_N):
                raise RunError(
                    f"the {side} images of {other.name!r} and {one.name!r} differ ({len(other.labels_N)} and "
                    f"{len(one.labels_N)}); flips are counted pair by pair. Embed the same images, in the same order, "
                    "with both models"
                )
        check_comparable(*cells[name])
    query_order = np.argsort(first_query.labels_N, kind="stable")
    gallery_order = np.argsort(first_gallery.labels_N, kind="stable")
    query_label, gallery_label = first_query.labels_N[query_order], first_gallery.labels_N[gallery_order]
    first = 0
    while first < len(query_order):
        last, low, high = _block(query_label, gallery_label, first)
        rows, columns = query_order[first:last], gallery_order[low:high]
        first = last
        chosen_BN = first_query.labels_N[rows, None] == first_gallery.labels_N[columns]
        chosen_BN &= first_query.sample_ids_N[rows, None] != first_gallery.sample_ids_N[columns]
        row_P, column_P = np.nonzero(chosen_BN)
        if len(row_P):
            levels = {name: _levels(*cells[name], rows, columns)[row_P, column_P] for name in names}
            yield Mates(rows[row_P], columns[column_P], levels)


def _block(query_label: Ints, gallery_label: Ints, first: int) -> tuple[int, int, int]:
    """One past the last query, and the range of gallery rows with their labels, so that a block of scores fits."""
    low = int(np.searchsorted(gallery_label, query_label[first]))
    last, step = first, 1
    # twice as many queries a time while it fits; a square of one large identity is cut by rows
    while step:
        after = min(last + step, len(query_label))
        high = int(np.searchsorted(gallery_label, query_label[after - 1], side="right"))
        if after > last and ((after - first) * (high - low) <= _BLOCK_SCORES or after == first + 1):
            last, step = after, 2 * step
        else:
            step = 0
    return last, low, int(np.searchsorted(gallery_label, query_label[last - 1], side="right"))


def _levels(query: EmbeddingSet, gallery: EmbeddingSet, rows: Ints, columns: Ints) -> npt.NDArray[np.int32]:
    score_BN = query.vectors_ND[rows] @ gallery.vectors_ND[columns].T
    score_BN *= STEPS_PER_UNIT
    np.rint(score_BN, out=score_BN)
    np.clip(score_BN, -STEPS_PER_UNIT, STEPS_PER_UNIT, out=score_BN)
    return score_BN.astype(np.int32) + STEPS_PER_UNIT


@dataclass(frozen=True)
class Flips:
    """Genuine pairs whose decision changes: accepted before and rejected after (negative), and the reverse."""

    negative: int
    positive: int
    num_genuine: int

    @property
    def negative_rate(self) -> float:
        """Of all genuine pairs."""
        return self.negative / self.num_genuine

    def __add__(self, other: Flips) -> Flips:
        return Flips(
            self.negative + other.negative, self.positive + other.positive, self.num_genuine + other.num_genuine
        )


def flips_at(some: Mates, before: str, after: str, thresholds: Mapping[str, float]) -> Flips:
    """Flips from cell ``before`` to cell ``after``, each at its own threshold, among ``some`` pairs."""
    was_P, is_P = (some.level_P[name] >= level_of(thresholds[name]) for name in (before, after))
    return Flips(int(np.count_nonzero(was_P & ~is_P)), int(np.count_nonzero(~was_P & is_P)), len(was_P))
