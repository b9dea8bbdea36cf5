"""The benchmark's own oracles: they agree with what they judge, and can disagree."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.evaluation import curve_distance, equality, score_sets, slow_tar
from benchmarks.evaluation_oracles import (
    cosines,
    differences,
    people,
    refusals,
    rounding,
    slow_folds,
    slow_map,
    slow_tpir,
)
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


def test_protocols_agree_with_plain_loops_and_the_loops_can_disagree() -> None:
    found = differences()
    assert found.pop("templates (float32)") <= 1e-6
    assert len(found) == 3 and max(found.values()) <= 1e-9
    one, other = people(1), people(2, noise=1.2)
    assert slow_map(one, people(2)) > slow_map(one, other)
    probe, gallery = one.rows(np.arange(0, 180, 2)), people(2).rows(np.arange(1, 120, 2))
    assert slow_tpir(probe, gallery, 0.5) > slow_tpir(probe, gallery, 0.05)
    scores, genuine = cosines(one, one)[:60, 60:120].ravel(), np.arange(3600) % 2 == 0
    assert slow_folds(scores + genuine, genuine, 10) > 0.9 > slow_folds(scores, genuine, 10)


def test_what_rounding_does_is_seen_and_bounded_and_what_is_wrong_is_refused() -> None:
    beyond, moved = rounding()
    assert beyond <= 1e-12 < 1e-3 < moved
    assert len(refusals()) == 5 and all(refusals().values())
