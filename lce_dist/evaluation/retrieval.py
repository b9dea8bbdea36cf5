"""Retrieval: the gallery in the order of its scores, for each query; mAP and CMC, with re-identification's camera rule.

Scores are float64; two that differ by no more than 1e-12 are a tie, and in a tie images of other identities come first: a
tie counts against the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.identification import SAME_SCORE, spans
from lce_dist.evaluation.verification import check_dimensions, score_pairs

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

JUNK = -1  # a label: images of nobody, which no query is charged with

_BLOCK_QUERIES = 256
_BLOCK_MATES = 1 << 20
_BLOCK_GALLERY = 1 << 14


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Of each query that has a mate (Q,): its row, its average precision, its MAP@R term, the rank of its first mate.

    num_queries: of all. A query without a mate that counts has no precision; it is left out, as the public code does.
    """

    query_Q: Ints
    average_precision_Q: Floats
    precision_at_r_Q: Floats
    first_rank_Q: Ints
    num_queries: int

    @property
    def mean_average_precision(self) -> float:
        """mAP over the whole gallery."""
        return float(self.average_precision_Q.mean())

    @property
    def map_at_r(self) -> float:
        """mAP over the first R places of a query with R mates."""
        return float(self.precision_at_r_Q.mean())

    def rank_rate(self, k: int) -> float:
        """CMC: share of the queries with a mate among the first ``k``; what metric learning calls recall@k."""
        return float(np.mean(self.first_rank_Q <= k))


def retrieve(
    query: EmbeddingSet, gallery: EmbeddingSet, query_camera_N: Ints | None = None, gallery_camera_N: Ints | None = None
) -> Retrieval:
    """Put the gallery in order for each query; the vectors of the two may be of two models.

    Not counted, neither right nor wrong: the query image itself, gallery images labelled ``JUNK``, and, where cameras are
    given, those of the query's identity seen by the query's camera. Average precision: mean over the mates of (mates up to
    its place) / (images up to its place), no interpolation. MAP@R: the same sum over mates at the first R places, over R.
    Errors: DataError when dimensions differ, cameras are of one side only, or no query has a mate.
    **Memory**: 32 MiB of scores, two blocks of vectors in float64, 32 bytes for each mate of a block of queries.
    **Source**: Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015 (camera rule, junk); Musgrave et
    al., "A Metric Learning Reality Check", ECCV 2020 (MAP@R).
    """
    check_dimensions(query, gallery)
    if (query_camera_N is None) != (gallery_camera_N is None):
        raise DataError("cameras are given of queries or gallery alone; must be given of both, or of none")
    order_G = np.argsort(gallery.labels_N, kind="stable")
    order_G = order_G[gallery.labels_N[order_G] != JUNK]
    label_G = gallery.labels_N[order_G]
    first_N, after_N = (np.searchsorted(label_G, query.labels_N, side=side) for side in ("left", "right"))
    found = []
    for rows in _blocks(after_N - first_N):
        row_P, place_P = spans(first_N[rows], after_N[rows])
        here_P, there_P = rows[row_P], order_G[place_P]
        counts_P = query.sample_ids_N[here_P] != gallery.sample_ids_N[there_P]
        if query_camera_N is not None and gallery_camera_N is not None:
            counts_P &= query_camera_N[here_P] != gallery_camera_N[there_P]
        if counts_P.any():
            score_P = score_pairs(query, gallery, here_P[counts_P], there_P[counts_P])
            found.append(_block(query, gallery, rows, row_P[counts_P], score_P, order_G, label_G))
    if not found:
        raise DataError(
            f"none of the {len(query.labels_N)} queries of {query.name!r} has a mate that counts among the "
            f"{len(gallery.labels_N)} images of the gallery of {gallery.name!r}; must be at least 1. Look at identities, "
            "and at cameras if they are given: a mate must be of another camera"
        )
    row, average, at_r, rank = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Retrieval(row, average, at_r, rank, len(query.labels_N))


def _blocks(num_mates_N: Ints) -> Iterator[Ints]:
    """Rows of queries, up to as many as have the mates of a block between them, at least one."""
    total_N = np.cumsum(num_mates_N)
    low = 0
    while low < len(num_mates_N):
        before = total_N[low - 1] if low else 0
        high = int(np.searchsorted(total_N, before + _BLOCK_MATES, side="right"))
        high = min(max(high, low + 1), low + _BLOCK_QUERIES, len(num_mates_N))
        yield np.arange(low, high)
        low = high


def _block(
    query: EmbeddingSet, gallery: EmbeddingSet, rows: Ints, row_P: Ints, score_P: Floats, order_G: Ints, label_G: Ints
) -> tuple[Ints, Floats, Floats, Ints]:
    """The measures of those queries of ``rows`` that have mates: P of them, with their row in the block and score."""
    order_P = np.lexsort((score_P, row_P))
    bar_P = score_P[order_P] - SAME_SCORE  # what an image of another identity must reach to come first; rising in a row
    present, start = np.unique(row_P, return_index=True)
    end = np.append(start[1:], len(row_P))
    lowest_B = np.full(len(rows), np.inf)
    lowest_B[present] = bar_P[start]
    span_of = {row: slice(first, after) for row, first, after in zip(present, start, end, strict=True)}
    ahead_P = np.zeros(len(row_P), dtype=np.int64)
    query_BD = query.vectors_ND[rows].astype(np.float64)
    for low in range(0, len(order_G), _BLOCK_GALLERY):
        part = slice(low, low + _BLOCK_GALLERY)
        score_BG = query_BD @ gallery.vectors_ND[order_G[part]].astype(np.float64).T
        high_BG = score_BG >= lowest_B[:, None]
        high_BG &= query.labels_N[rows, None] != label_G[part]
        for row in np.flatnonzero(high_BG.any(axis=1)):
            span = span_of[row]
            passed = np.searchsorted(bar_P[span], score_BG[row, high_BG[row]], side="right")
            np.add.at(ahead_P, span.start + passed - 1, 1)  # ahead of this mate and all lower ones
    average, at_r, rank = np.empty(len(present)), np.empty(len(present)), np.empty(len(present), dtype=np.int64)
    for number, row in enumerate(present):
        # highest first
        ahead = np.cumsum(ahead_P[span_of[row]][::-1])
        nth = np.arange(1, len(ahead) + 1)
        place = nth + ahead
        average[number] = np.mean(nth / place)
        at_r[number] = np.sum((nth / place)[place <= len(ahead)]) / len(ahead)
        rank[number] = place[0]
    return rows[present], average, at_r, rank
