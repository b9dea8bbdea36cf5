"""1:N identification in an open set: is the person of a probe enrolled, and who is it.

Everybody in the gallery has a score for a probe: the best of their vectors. A search returns who scores highest, if that is
at or above the threshold. Scores are float64; two that differ by no more than 1e-12 are a tie, because sums in another
order differ that much, and a tie counts against the model.
**Source**: Grother et al., "Face Recognition Vendor Test, Part 2: Identification", NISTIR 8271, 2019; Maze et al., "IARPA
Janus Benchmark C", ICB 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.verification import Roc, check_dimensions, roc_of_two, score_pairs

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Enrolment = Literal["best", "mean"]
ENROLMENTS: tuple[Enrolment, ...] = get_args(Enrolment)

SAME_SCORE = 1e-12

_BLOCK_PROBES = 512
_BLOCK_GALLERY = 1 << 13


@dataclass(frozen=True, eq=False)
class Identification:
    """Rank (M,) of each mated probe's mate, 1 = first; curve: threshold, FPIR (its ``far_P``) and TPIR (its ``tar_P``).

    FPIR: share of the non-mated probes that anybody is returned for. TPIR: share of the mated probes whose mate is first
    and is returned. mated_N: which probes have a mate; score_N: what a probe is returned with: the mate's score, and where it is
    not first -inf; of a non-mated probe the best of anybody.
    """

    rank_M: Ints
    curve: Roc
    num_nonmated: int
    num_identities: int
    mated_N: npt.NDArray[np.bool_]
    score_N: Floats

    def rank_rate(self, k: int) -> float:
        """Share of the mated probes whose mate is among the first ``k``."""
        return float(np.mean(self.rank_M <= k))

    def tpir_at(self, fpirs: Sequence[float]) -> tuple[Floats, Floats]:
        """TPIR (F,) and threshold (F,): the smallest score that leaves (non-mated >= it) / non-mated <= FPIR."""
        return self.curve.at(fpirs)


def identify(probe: EmbeddingSet, gallery: EmbeddingSet, enrolment: Enrolment = "best") -> Identification:
    """Search every probe among the gallery's identities; a probe is mated when its label is enrolled.

    The vectors of probes and gallery may be of two models. enrolment: an identity of several vectors scores by the best of
    them, or by the direction of their mean.
    Errors: DataError when dimensions differ, an image is in both sets, or no probe is mated, or none is not.
    **Memory**: 32 MiB of scores, two blocks of vectors in float64, 24 bytes a probe; an identity's vectors are one block.
    """
    check_dimensions(probe, gallery)
    shared = np.intersect1d(probe.sample_ids_N, gallery.sample_ids_N, assume_unique=True)
    if shared.size:
        raise DataError(
            f"{len(shared)} images are both probes of {probe.name!r} and in the gallery of {gallery.name!r}; must be in one "
            "of the two. Leave them out of one list"
        )
    if enrolment == "mean":
        gallery = mean_of_identities(gallery)
    order_G = np.argsort(gallery.labels_N, kind="stable")
    identity_I, start_I = np.unique(gallery.labels_N[order_G], return_index=True)
    place_N = np.minimum(np.searchsorted(identity_I, probe.labels_N), len(identity_I) - 1)
    mated_N = identity_I[place_N] == probe.labels_N
    for what, count in (("mated", np.count_nonzero(mated_N)), ("non-mated", np.count_nonzero(~mated_N))):
        if count == 0:
            there = "is" if what == "mated" else "is not"
            raise DataError(
                f"none of the {len(mated_N)} probes is {what}; must be at least 1 whose identity {there} among the "
                f"{len(identity_I)} of the gallery. Look at the two lists"
            )
    bound_I = np.append(start_I, len(order_G))
    best_N, ahead_N = np.empty(len(mated_N)), np.empty(len(mated_N), dtype=np.int64)
    mate_N = np.full(len(mated_N), np.inf)
    for low in range(0, len(mated_N), _BLOCK_PROBES):
        rows = np.arange(low, min(low + _BLOCK_PROBES, len(mated_N)))
        mates = rows[mated_N[rows]]
        if len(mates):
            row_P, place_P = spans(bound_I[place_N[mates]], bound_I[place_N[mates] + 1])
            score_P = score_pairs(probe, gallery, mates[row_P], order_G[place_P])
            mate_N[mates] = np.maximum.reduceat(score_P, np.flatnonzero(np.append(True, row_P[1:] != row_P[:-1])))
        own_B = np.where(mated_N[rows], place_N[rows], -1)
        best_N[rows], ahead_N[rows] = _others(probe, gallery, rows, own_B, mate_N[rows], order_G, bound_I)
    rank_M = ahead_N[mated_N] + 1
    accepted = mate_N[mated_N][rank_M == 1]
    curve = roc_of_two(accepted, best_N[~mated_N], len(rank_M))
    score_N = np.where(mated_N, np.where(ahead_N == 0, mate_N, -np.inf), best_N)
    return Identification(rank_M, curve, int(np.count_nonzero(~mated_N)), len(identity_I), mated_N, score_N)


def mean_of_identities(gallery: EmbeddingSet) -> EmbeddingSet:
    """One vector an identity: the direction of the mean of its unit vectors; sample ids are the labels.

    Errors: DataError where the vectors of an identity cancel. **Memory**: two copies in float64.
    """
    order_N = np.argsort(gallery.labels_N, kind="stable")
    label_I, start_I = np.unique(gallery.labels_N[order_N], return_index=True)
    sum_ID = np.add.reduceat(gallery.vectors_ND[order_N].astype(np.float64), start_I, axis=0)
    norm_I = np.linalg.norm(sum_ID, axis=1, keepdims=True)
    if (norm_I < SAME_SCORE).any():
        raise DataError(
            f"the vectors of {np.count_nonzero(norm_I < SAME_SCORE)} identities of {gallery.name!r} cancel; their mean must "
            "have a direction. Score by the best vector instead"
        )
    return EmbeddingSet(gallery.name, (sum_ID / norm_I).astype(np.float32), label_I, label_I)


def spans(first_B: Ints, after_B: Ints) -> tuple[Ints, Ints]:
    """The places first ... after - 1 of each of B spans (P,), and which span each is of (P,); ``[2, 5], [4, 6]`` gives
    ``[0, 0, 1], [2, 3, 5]``."""
    count_B = after_B - first_B
    row_P = np.repeat(np.arange(len(count_B)), count_B)
    return row_P, np.arange(len(row_P)) + np.repeat(first_B - (np.cumsum(count_B) - count_B), count_B)


def _others(
    probe: EmbeddingSet, gallery: EmbeddingSet, rows: Ints, own_B: Ints, mate_B: Floats, order_G: Ints, bound_I: Ints
) -> tuple[Floats, Ints]:
    """The best score of any identity but the probe's own (B,), and how many of them are level with the mate or ahead (B,)."""
    probe_BD = probe.vectors_ND[rows].astype(np.float64)
    best_B, ahead_B = np.full(len(rows), -np.inf), np.zeros(len(rows), dtype=np.int64)
    for low, high in _whole_identities(bound_I):
        block_GD = gallery.vectors_ND[order_G[bound_I[low] : bound_I[high]]].astype(np.float64)
        score_BI = np.maximum.reduceat(probe_BD @ block_GD.T, bound_I[low:high] - bound_I[low], axis=1)
        mine = np.flatnonzero((own_B >= low) & (own_B < high))
        score_BI[mine, own_B[mine] - low] = -np.inf
        best_B = np.maximum(best_B, score_BI.max(axis=1))
        ahead_B += np.count_nonzero(score_BI >= (mate_B - SAME_SCORE)[:, None], axis=1)
    return best_B, ahead_B


def _whole_identities(bound_I: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of identities whose vectors make a block, at least one identity each."""
    low = 0
    while low < len(bound_I) - 1:
        high = int(np.searchsorted(bound_I, bound_I[low] + _BLOCK_GALLERY, side="right")) - 1
        high = max(high, low + 1)
        yield low, high
        low = high
