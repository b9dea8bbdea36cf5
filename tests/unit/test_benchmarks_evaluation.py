"""The benchmark's own oracles: they agree with what they judge, and can disagree."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.evaluation import curve_distance, equality, score_sets, slow_tar
from lce_dist.evaluation.verification import tar_at_far


def test_hard_scores_agree_with_scikit_learn() -> None:
    worst = equality(np.random.default_rng(1), 600)
    assert len(worst) == len(score_sets(np.random.default_rng(1), 600)) == 9
    assert max(worst.values()) <= 1e-9


def test_the_oracle_can_disagree() -> None:
    scores, genuine = score_sets(np.random.default_rng(1), 600)["random"]
    (tar,), _ = tar_at_far(scores, genuine, [0.1])
    assert slow_tar(scores, genuine, 0.1) == tar != slow_tar(-scores, genuine, 0.1)
    far_P, tar_P = np.array([0.0, 0.5, 1.0]), np.array([0.5, 0.5, 1.0])
    assert curve_distance(far_P, tar_P, far_P, tar_P) == 0.0
    assert curve_distance(far_P, tar_P, far_P, np.array([0.5, 0.75, 1.0])) == 0.25
    assert curve_distance(far_P, tar_P, far_P[1:], tar_P[1:]) == math.inf
