"""1:1 verification on a list of pairs: ROC, TAR at FAR, equal error rate, and the accuracy by folds of LFW.

A pair is accepted when its score is at or above the threshold. Scores are float64 and exact: none is rounded or binned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_BLOCK_PAIRS = 1 << 14


@dataclass(frozen=True, eq=False)
class Roc:
    """FAR and TAR (P,) from each distinct score on, highest first; the first point, at infinity, accepts nothing."""

    threshold_P: Floats
    far_P: Floats
    tar_P: Floats

    def at(self, fars: Sequence[float]) -> tuple[Floats, Floats]:
        """TAR (F,) and threshold (F,) by the rule of ``metrics.compare``: the smallest score of any pair that leaves
        (impostors >= it) / impostors <= FAR; where no score does, one step above the highest, and a TAR of 0."""
        place_F = np.searchsorted(self.far_P, np.asarray(fars, dtype=np.float64), side="right") - 1
        threshold_F = self.threshold_P[np.maximum(place_F, 1)]
        return self.tar_P[place_F], np.where(place_F > 0, threshold_F, np.nextafter(threshold_F, np.inf))

    @property
    def equal_error_rate(self) -> float:
        """Where FAR = 1 - TAR on the straight line between the two points of the curve around it."""
        excess_P = self.far_P + self.tar_P - 1.0  # rises from -1 to 1: each point accepts a pair more
        after = int(np.searchsorted(excess_P, 0.0))
        way = -excess_P[after - 1] / (excess_P[after] - excess_P[after - 1])
        return float(self.far_P[after - 1] + way * (self.far_P[after] - self.far_P[after - 1]))


@dataclass(frozen=True, eq=False)
class FoldAccuracy:
    """Share of right decisions on each fold (K,), at the threshold (K,) that the other folds chose.

    std is that of the K accuracies about their mean (the sum of squares divided by K), as the public code prints it.
    """

    accuracy_K: Floats
    threshold_K: Floats

    @property
    def mean(self) -> float:
        return float(self.accuracy_K.mean())

    @property
    def std(self) -> float:
        return float(self.accuracy_K.std())


def score_pairs(query: EmbeddingSet, gallery: EmbeddingSet, first_P: Ints, second_P: Ints) -> Floats:
    """Cosine (P,) in float64 of row ``first_P`` of the query model with row ``second_P`` of the gallery model.

    Errors: DataError when the models' dimensions differ. **Memory**: 8 bytes a pair and a block of vectors.
    """
    check_dimensions(query, gallery)
    score_P = np.empty(len(first_P), dtype=np.float64)
    for low in range(0, len(first_P), _BLOCK_PAIRS):
        part = slice(low, low + _BLOCK_PAIRS)
        one_BD = query.vectors_ND[first_P[part]].astype(np.float64)
        other_BD = gallery.vectors_ND[second_P[part]].astype(np.float64)
        score_P[part] = np.einsum("bd,bd->b", one_BD, other_BD)
    return score_P


def check_dimensions(query: EmbeddingSet, gallery: EmbeddingSet) -> None:
    """Errors: DataError when the models' dimensions differ."""
    dims = query.vectors_ND.shape[1], gallery.vectors_ND.shape[1]
    if dims[0] != dims[1]:
        raise DataError(
            f"query vectors of {query.name!r} have {dims[0]} dimensions and gallery vectors of {gallery.name!r} have "
            f"{dims[1]}; must be equal to be compared. Send one of them through a map between the two models"
        )


def roc_of_scores(scores: npt.ArrayLike, is_genuine: npt.ArrayLike) -> Roc:
    """The exact ROC: one point for each distinct score, ties together.

    Errors: DataError for lengths that differ, a score that is not finite, no genuine or no impostor pair.
    """
    score_P, genuine_P = _checked(scores, is_genuine)
    return roc_of_two(score_P[genuine_P], score_P[~genuine_P], int(np.count_nonzero(genuine_P)))


def roc_of_two(genuine_G: Floats, impostor_I: Floats, num_genuine: int) -> Roc:
    """The ROC of genuine and impostor scores; ``num_genuine`` may count more than have a score: those are never accepted."""
    score_P = np.concatenate([genuine_G, impostor_I])
    accepted_P = np.zeros(len(score_P), dtype=np.int64)
    accepted_P[: len(genuine_G)] = 1
    order_P = np.argsort(-score_P, kind="stable")
    score_P, accepted_P = score_P[order_P], np.cumsum(accepted_P[order_P])
    last_P = np.flatnonzero(np.append(score_P[1:] != score_P[:-1], True))  # of each run of equal scores
    genuine = np.append(0, accepted_P[last_P])
    impostor = np.append(0, last_P + 1) - genuine
    return Roc(np.append(np.inf, score_P[last_P]), impostor / len(impostor_I), genuine / num_genuine)


def tar_at_far(scores: npt.ArrayLike, is_genuine: npt.ArrayLike, fars: Sequence[float]) -> tuple[Floats, Floats]:
    """TAR (F,) and threshold (F,) at each FAR: the rule of :meth:`Roc.at`. Errors: those of :func:`roc_of_scores`."""
    return roc_of_scores(scores, is_genuine).at(fars)


def equal_error_rate(scores: npt.ArrayLike, is_genuine: npt.ArrayLike) -> float:
    """The rule of :attr:`Roc.equal_error_rate`. Errors: those of :func:`roc_of_scores`."""
    return roc_of_scores(scores, is_genuine).equal_error_rate


def accuracy_by_folds(
    scores: npt.ArrayLike, is_genuine: npt.ArrayLike, num_folds: int = 10, folds: npt.ArrayLike | None = None
) -> FoldAccuracy:
    """LFW's accuracy: a fold is decided at the threshold that is right most often on all other folds.

    folds: the fold (P,) of each pair; without it the list is cut into ``num_folds`` consecutive blocks, the first ones a
    pair longer where they are not equal. Thresholds tried are the middles between neighbouring scores, and both ends; of
    those equally right the highest. The public code tries the squared distances 0, 0.01 ... 3.99 instead (also the
    strictest of the best first), so its accuracy differs where two scores lie closer than its step.
    Errors: DataError of :func:`roc_of_scores`; for fewer than two folds, or folds that leave only one kind of pair.
    **Source**: Huang et al., "Labeled Faces in the Wild", 2007, view 2; insightface, arcface_torch/eval/verification.py.
    """
    score_P, genuine_P = _checked(scores, is_genuine)
    if folds is None:
        if not 2 <= num_folds <= len(score_P):
            raise DataError(
                f"{len(score_P)} pairs in {num_folds} folds; folds must be at least 2 and at most the pairs"
            )
        sizes = [len(block) for block in np.array_split(score_P, num_folds)]
        fold_P = np.repeat(np.arange(num_folds), sizes)
    else:
        fold_P = np.unique(np.asarray(folds), return_inverse=True)[1]
        if fold_P.shape != score_P.shape or fold_P.max() == 0:
            raise DataError(f"folds of shape {fold_P.shape} for {len(score_P)} pairs; must be one a pair, at least two")
    order_P = np.argsort(score_P, kind="stable")
    score_P, genuine_P, fold_P = score_P[order_P], genuine_P[order_P], fold_P[order_P]
    accuracy, thresholds = [], []
    for fold in range(int(fold_P.max()) + 1):
        here_P = fold_P == fold
        threshold = _best_threshold(score_P[~here_P], genuine_P[~here_P], fold)
        thresholds.append(threshold)
        accuracy.append(np.mean((score_P[here_P] >= threshold) == genuine_P[here_P]))
    return FoldAccuracy(np.array(accuracy, dtype=np.float64), np.array(thresholds, dtype=np.float64))


def _best_threshold(score_P: Floats, genuine_P: Bools, fold: int) -> float:
    """Of rising scores."""
    if genuine_P.all() or not genuine_P.any():
        kind = "impostor" if genuine_P.all() else "genuine"
        raise DataError(
            f"without fold {fold + 1} of the list no {kind} pair is left to choose a threshold by; must be both kinds. "
            "Spread genuine and impostor pairs over the list, or name fewer or other folds"
        )
    # right when the first c pairs are rejected and the others accepted, c = 0 ... P
    right = np.append(0, np.cumsum(~genuine_P)) + np.append(np.cumsum(genuine_P[::-1])[::-1], 0)
    cut = np.append(True, score_P[1:] != score_P[:-1])  # equal scores cannot be told apart
    cut_C = np.append(np.flatnonzero(cut), len(score_P))
    best = int(cut_C[np.flatnonzero(right[cut_C] == right[cut_C].max())[-1]])
    if best == 0:
        return float(score_P[0])
    if best == len(score_P):
        return float(np.nextafter(score_P[-1], np.inf))
    low, high = float(score_P[best - 1]), float(score_P[best])
    middle = (low + high) / 2.0
    return middle if middle > low else high  # neighbouring floats have no middle


def _checked(scores: npt.ArrayLike, is_genuine: npt.ArrayLike) -> tuple[Floats, Bools]:
    score_P, genuine_P = np.asarray(scores, dtype=np.float64), np.asarray(is_genuine)
    if score_P.ndim != 1 or score_P.shape != genuine_P.shape or genuine_P.dtype != np.bool_:
        raise DataError(
            f"scores of shape {score_P.shape} and is_genuine of shape {genuine_P.shape} ({genuine_P.dtype}); must be one "
            "score and one bool a pair"
        )
    wrong_P = np.flatnonzero(~np.isfinite(score_P))
    if wrong_P.size:
        raise DataError(
            f"the score of pair {wrong_P[0] + 1} is {score_P[wrong_P[0]]} ({wrong_P.size} such pairs); must be finite. "
            "Look for vectors of a diverged training"
        )
    num_genuine = int(np.count_nonzero(genuine_P))
    for kind, count in (("genuine", num_genuine), ("impostor", len(genuine_P) - num_genuine)):
        if count == 0:
            raise DataError(f"the list of {len(genuine_P)} pairs has 0 {kind} pairs; must have at least 1. Add one")
    return score_P, genuine_P
