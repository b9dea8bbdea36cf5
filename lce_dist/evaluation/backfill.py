"""What re-encoding a part of the gallery already gives: the metric by the share that is re-encoded, for several orders.

Queries are the new model's; gallery images that were re-encoded have new vectors, the others their old ones (through a map
where one stands between). Orders use what is known before anything is re-encoded: the old vectors and whose they are.
**Source**: method.md section 7 of the project; FastFill: Jaeckle et al., "FastFill: Efficient Compatible Model Update", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError
from lce_dist.evaluation.counting import MOST_PAIRS_AT_ALL_LEVELS, PairCounts, count_at_all_levels, count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet, whole_identities

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Order = Literal["random", "boundary_excess_first", "farthest_from_centre_first"]
ORDERS: tuple[Order, ...] = get_args(Order)
_NUM_PARTS = 10
_MOST_GALLERY = 1 << 15


@dataclass(frozen=True, eq=False)
class Backfill:
    """TAR (11,) at one FAR by the share (11,) of the gallery that is re-encoded, in tenths, for each order."""

    far: float
    share_K: Floats
    tar_K: Mapping[Order, Floats]

    def area(self, order: Order) -> float:
        """Mean TAR over the way, by trapezoids: what users see on average when photos come back at a steady pace."""
        return float(np.trapezoid(self.tar_K[order], self.share_K))


def backfill(
    old_crossing: tuple[EmbeddingSet, EmbeddingSet],
    new: tuple[EmbeddingSet, EmbeddingSet],
    old_gallery: EmbeddingSet,
    far: float,
    seed: int = 0,
) -> Backfill:
    """Curves of TAR at ``far``, the threshold chosen anew for every mixture.

    Of more than 32,768 images over whole identities, and of more than 2^26 pairs over queries, drawn by ``seed``; each image keeps
    its place in the order of all.

    old_crossing: queries and gallery of the cross-test, as they are compared (through a map where there is one). new: those
    of the new model alone. old_gallery: the old vectors, by which images are put in order.
    Errors: RunError when queries or galleries are not of the same images in the same order; those of ``count_pairs``.
    **Memory**: four counts of 34 MB. Time: seven passes over 2^26 pairs at most.
    """
    for one, other in ((old_crossing[0], new[0]), (old_crossing[1], new[1]), (old_gallery, new[1])):
        if not np.array_equal(one.sample_ids_N, other.sample_ids_N):
            raise RunError(
                f"{one.name!r} and {other.name!r} are of {len(one.labels_N)} and {len(other.labels_N)} images, or of others; "
                "must be the same images in the same order. Embed the same view with both models"
            )
    some_M = whole_identities(old_gallery, _MOST_GALLERY, seed)
    num_queries = max(1, MOST_PAIRS_AT_ALL_LEVELS // len(some_M))
    queries = np.sort(np.random.default_rng(seed).permutation(some_M)[:num_queries])
    old_pair = old_crossing[0].rows(queries), old_crossing[1].rows(some_M)
    new_pair = new[0].rows(queries), new[1].rows(some_M)
    nothing_done = count_pairs(*old_pair, [far])
    curves = {}
    for order in ORDERS:
        order_N = backfill_order(old_gallery, order, seed)
        of_some_M = np.searchsorted(some_M, order_N[np.isin(order_N, some_M)])
        curves[order] = _curve(nothing_done, old_pair, new_pair, of_some_M, far)
    sizes = [len(part) for part in np.array_split(some_M, _NUM_PARTS)]
    return Backfill(far, np.cumsum([0, *sizes]) / len(some_M), curves)


def backfill_order(gallery: EmbeddingSet, order: Order, seed: int = 0) -> Ints:
    """Rows (N,) of the gallery, first to re-encode first.

    A centre is the mean direction of an identity's old vectors. Boundary excess: how much farther from the centre an image
    is than every other image of its identity; negative inside, and last of all where there is no other image.
    """
    draw = np.random.default_rng(seed)
    shuffled = draw.permutation(len(gallery.labels_N))
    if order == "random":
        return shuffled
    angle_N, others_N = _angles(gallery)
    key_N = angle_N if order == "farthest_from_centre_first" else angle_N - others_N
    return shuffled[np.argsort(-key_N[shuffled], kind="stable")]


def _angles(gallery: EmbeddingSet) -> tuple[Floats, Floats]:
    """Each image's angle to its identity's centre, and the largest angle among the identity's other images (N,)."""
    _, label_N, count_I = np.unique(gallery.labels_N, return_inverse=True, return_counts=True)
    order_N = np.argsort(label_N, kind="stable")
    start_I = np.cumsum(count_I) - count_I
    centre_ID = np.add.reduceat(gallery.vectors_ND[order_N], start_I, axis=0, dtype=np.float64)
    centre_ID /= np.maximum(np.linalg.norm(centre_ID, axis=1, keepdims=True), 1e-12)
    angle_N = np.empty(len(label_N))
    for first in range(0, len(label_N), 1 << 16):
        rows = slice(first, first + (1 << 16))
        cos = np.einsum("nd,nd->n", gallery.vectors_ND[rows].astype(np.float64), centre_ID[label_N[rows]])
        angle_N[rows] = np.arccos(np.clip(cos, -1.0, 1.0))
    by_angle_N = np.lexsort((angle_N, label_N))  # within an identity, rising
    highest_I = by_angle_N[start_I + count_I - 1]
    others_N = angle_N[highest_I][label_N]
    second_I = np.where(count_I > 1, angle_N[by_angle_N[start_I + np.maximum(count_I - 2, 0)]], np.inf)
    others_N[highest_I] = second_I
    return angle_N, others_N


def _curve(
    nothing_done: PairCounts,
    old: tuple[EmbeddingSet, EmbeddingSet],
    new: tuple[EmbeddingSet, EmbeddingSet],
    order_N: Ints,
    far: float,
) -> Floats:
    # counts of parts of the gallery add up: a part is counted once with each model, a mixture never
    genuine_L, impostor_L = nothing_done.genuine_L.copy(), nothing_done.impostor_L.copy()
    tar = [float(nothing_done.operating_points([far])[0][0])]
    for rows in np.array_split(order_N, _NUM_PARTS):
        if len(rows):
            before, after = (count_at_all_levels(query, gallery.rows(rows)) for query, gallery in (old, new))
            genuine_L += after.genuine_L - before.genuine_L
            impostor_L += after.impostor_L - before.impostor_L
        tar.append(float(PairCounts(genuine_L, impostor_L, 0, 0).operating_points([far])[0][0]))
    return np.array(tar)
