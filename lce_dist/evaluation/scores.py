"""What an upgrade is worth, in single numbers: update gain and P-scores, thresholds kept, decisions that flip.

M(query model, gallery model) is any metric where more is better; * is a new model trained without the old one.
**Source**: method.md section 7 of the project; P-scores: Pan et al., AdvBCT, CVPR 2023; negative flips: Yan et al.,
Positive-Congruent Training, CVPR 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError
from lce_dist.evaluation.counting import count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.mates import Flips, Pair, flips_at, mates
from lce_dist.evaluation.metrics import compare, far_key

_STEPS_PER_UNIT = 1 << 20  # scores are multiples of 2^-20, as in ``compare``
_BLOCK_SCORES = 1 << 22  # as ``compare`` cuts, so that the same products give the same scores


@dataclass(frozen=True)
class Cells:
    """The metric of one test set: M(o,o), M(n,o), M(n,n) and, as ``independent``, M(*,*)."""

    old_old: float
    new_old: float
    new_new: float
    independent: float

    @property
    def update_gain(self) -> float | None:
        """(M(n,o) - M(o,o)) / (M(*,*) - M(o,o)); None unless M(*,*) is above M(o,o)."""
        if self.independent <= self.old_old:
            return None
        return (self.new_old - self.old_old) / (self.independent - self.old_old)

    @property
    def relative_change(self) -> float:
        """(M(n,n) - M(*,*)) / M(*,*): what compatibility did to the new model itself."""
        return (self.new_new - self.independent) / self.independent


@dataclass(frozen=True)
class PScores:
    """Means over test sets of the sigmoid of the update gain (comp) and of the relative change (up); p_1: harmonic mean.

    p_comp and p_1 are None when the update gain is not defined for a test set; ``undefined`` names those.
    """

    p_comp: float | None
    p_up: float
    p_1: float | None
    undefined: tuple[str, ...]


def p_scores(cells: Mapping[str, Cells]) -> PScores:
    """P_comp, P_up and P_1 over test sets by name.

    Errors: RunError for no test set, or one whose M(*,*) is not positive.
    **Source**: Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning in Image
    Retrieval", CVPR 2023.
    """
    if not cells:
        raise RunError("P-scores of 0 test sets; they are means over at least 1")
    for name, cell in cells.items():
        if cell.independent <= 0.0:
            raise RunError(
                f"M(*,*) of test set {name!r} is {cell.independent}; must be above 0 to measure the new model against it. "
                "Ask a larger FAR"
            )
    gains = {name: cell.update_gain for name, cell in cells.items()}
    undefined = tuple(name for name, gain in gains.items() if gain is None)
    p_up = _mean_sigmoid([cell.relative_change for cell in cells.values()])
    if undefined:
        return PScores(None, p_up, None, undefined)
    p_comp = _mean_sigmoid([gain for gain in gains.values() if gain is not None])
    return PScores(p_comp, p_up, 2.0 * p_comp * p_up / (p_comp + p_up), ())


@dataclass(frozen=True)
class Reached:
    """Shares of impostor (``far``) and genuine (``tar``) pairs at or above a threshold."""

    threshold: float
    far: float
    tar: float


def keep_threshold(kept: Pair, changed: Pair, far: float) -> Reached:
    """What ``changed`` reaches at the threshold that gave ``kept`` its FAR: the drift of an operating point.

    Errors: RunError of ``compare``. **Memory**: of a block of scores.
    """
    threshold = compare(*kept, [far]).threshold_at_far[far_key(far)]
    return reached_at(changed, threshold)


def reached_at(pair: Pair, threshold: float) -> Reached:
    """FAR and TAR of ``pair`` at a given threshold, over the pairs of images that ``compare`` counts.

    Errors: RunError when there is no genuine or no impostor pair.
    """
    counts = count_pairs(*pair, [1e-3], down_to=threshold)
    return Reached(threshold, counts.far_from(threshold), counts.tar_from(threshold))


def flips(before: Pair, after: Pair, far: float) -> Flips:
    """Count flips between two pairs of models over the same images, each at its own threshold for ``far``.

    Errors: RunError when the images of the two queries, or of the two galleries, differ; and those of ``compare``.
    **Memory**: of two blocks of scores.
    """
    thresholds = {
        name: compare(*pair, [far]).threshold_at_far[far_key(far)] for name, pair in (("b", before), ("a", after))
    }
    total = Flips(0, 0, 0)
    for some in mates({"b": before, "a": after}):
        total += flips_at(some, "b", "a", thresholds)
    return total


@dataclass(frozen=True, eq=False)
class ScoreBlock:
    """Queries ``rows`` against the whole gallery: scores in units of 2^-20, who is a mate, which image is the same."""

    rows: slice
    level_BN: npt.NDArray[np.int32]
    mate_BN: npt.NDArray[np.bool_]
    same_image_BN: npt.NDArray[np.bool_]


def score_blocks(query: EmbeddingSet, gallery: EmbeddingSet) -> Iterator[ScoreBlock]:
    """Scores of all pairs, exactly as ``compare`` has them. **Memory**: 10 bytes * max(2^22, gallery images)."""
    block_rows = max(1, _BLOCK_SCORES // len(gallery.labels_N))
    for first in range(0, len(query.labels_N), block_rows):
        rows = slice(first, min(first + block_rows, len(query.labels_N)))
        score_BN = query.vectors_ND[rows] @ gallery.vectors_ND.T
        score_BN *= _STEPS_PER_UNIT
        np.rint(score_BN, out=score_BN)
        np.clip(score_BN, -_STEPS_PER_UNIT, _STEPS_PER_UNIT, out=score_BN)
        yield ScoreBlock(
            rows,
            score_BN.astype(np.int32),
            query.labels_N[rows, None] == gallery.labels_N,
            query.sample_ids_N[rows, None] == gallery.sample_ids_N,
        )


def _mean_sigmoid(values: list[float]) -> float:
    return math.fsum(_sigmoid(value) for value in values) / len(values)


def _sigmoid(value: float) -> float:
    if value >= 0.0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))  # exp of a large positive number would overflow
