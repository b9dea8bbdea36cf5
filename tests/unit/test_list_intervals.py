"""Intervals of protocols: samples of identities against the obvious way, which copies every entry as often as it counts."""

from __future__ import annotations

import time

import numpy as np
import pytest

from lce_dist.errors import RunError
from lce_dist.evaluation.list_intervals import (
    Scored,
    drawn_weights,
    interval_of,
    linked,
    num_samples,
    pair_weight_sums,
    resampled_means,
    resampled_rates,
)
from lce_dist.evaluation.verification import roc_of_scores

RATES = [0.01, 0.1, 0.5]


def some_list(num: int, people: int, seed: int, ties: bool = True) -> Scored:
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, people, num), draw.integers(0, people, num)
    genuine = draw.random(num) < 0.4
    second = np.where(genuine, first, np.where(second == first, (first + 1) % people, second))
    score = draw.normal(size=num) + 1.5 * genuine
    return Scored(np.round(score, 1) if ties else score, genuine, first, second)


@pytest.mark.parametrize("seed", range(4))
def test_rates_are_those_of_a_list_of_copies(seed: int) -> None:
    scored = some_list(300, 20, seed)
    weights = drawn_weights(20, 30, seed)
    found = resampled_rates(scored, RATES, weights)
    for sample, weight in enumerate(weights.astype(int)):
        times = np.where(scored.genuine_P, weight[scored.first_P], weight[scored.first_P] * weight[scored.second_P])
        copies = np.repeat(np.arange(300), times)
        truth = roc_of_scores(scored.score_P[copies], scored.genuine_P[copies]).at(RATES)[0]
        np.testing.assert_allclose(found[:, sample], truth, rtol=0, atol=1e-12)
    assert found.std(axis=1).min() > 0.0
    # every identity once is the list itself
    once = resampled_rates(scored, RATES, np.ones((1, 20), dtype=np.float32))[:, 0]
    np.testing.assert_allclose(once, roc_of_scores(scored.score_P, scored.genuine_P).at(RATES)[0], atol=1e-12)


def test_entries_that_are_never_accepted_and_samples_of_one_kind() -> None:
    score = np.array([-np.inf, 2.0, 1.0, 0.0])
    genuine = np.array([True, True, False, False])
    people = np.arange(4)
    weights = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [3, 1, 1, 1]], dtype=np.float32)
    found = resampled_rates(Scored(score, genuine, people, people), [0.1], weights)[0]
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan, 0.25])
    assert interval_of(0.5, np.full(3, np.nan)) is None


def test_means_and_sums_are_those_of_copies() -> None:
    draw = np.random.default_rng(1)
    label, value = draw.integers(0, 9, 60), draw.random((60, 3))
    weights = drawn_weights(10, 20, 1)  # one identity has no entry
    found = resampled_means(value, label, weights)
    scored = some_list(60, 10, 2)
    sums = pair_weight_sums(scored, value, weights)
    for sample, weight in enumerate(weights.astype(int)):
        copies = np.repeat(np.arange(60), weight[label])
        np.testing.assert_allclose(found[:, sample], value[copies].mean(axis=0))
        times = np.where(scored.genuine_P, weight[scored.first_P], weight[scored.first_P] * weight[scored.second_P])
        np.testing.assert_allclose(sums[:, sample], value[np.repeat(np.arange(60), times)].sum(axis=0), atol=1e-4)


def test_an_interval_holds_the_truth_as_often_as_it_says_and_independent_draws_would_not() -> None:
    """Queries of one person stand or fall together: 200 worlds of 40 people with 10 queries each, half of the people right."""
    draw = np.random.default_rng(0)
    label = np.repeat(np.arange(40), 10)
    held = {"people": 0, "queries": 0}
    for _ in range(200):
        value = np.repeat(draw.random(40) < 0.5, 10).astype(float)[:, None]
        for name, unit in (("people", label), ("queries", np.arange(400))):
            weights = drawn_weights(int(unit.max()) + 1, 200, int(draw.integers(1 << 30)))
            found = interval_of(float(value.mean()), resampled_means(value, unit, weights)[0])
            assert found is not None
            held[name] += found["low"] <= 0.5 <= found["high"]
    assert held["people"] > 180 and held["queries"] < 120


def test_images_that_genuine_pairs_link_are_one() -> None:
    first, second = linked(np.array([10, 11, 20, 10]), np.array([11, 12, 21, 20]), np.array([True, True, True, False]))
    assert first.tolist() == [*second.tolist()[:3], first[0]] and len({*first, *second}) == 2


def test_long_lists_have_fewer_samples_and_stay_fast() -> None:
    assert [num_samples(n) for n in (6000, 4_000_000, 20_000_000)] == [1000, 500, 200]
    with pytest.raises(RunError, match="cannot be drawn again"):
        drawn_weights(1, 10)
    scored = some_list(6000, 1500, 3, ties=False)
    start_s = time.process_time()
    resampled_rates(scored, RATES, drawn_weights(1500, 1000))
    assert time.process_time() - start_s < 10.0  # 0.3 s of a free core
