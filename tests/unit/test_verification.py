"""1:1 verification against numbers worked by hand, loops in float64, scikit-learn and scipy."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.metrics import compare, far_key
from lce_dist.evaluation.verification import (
    accuracy_by_folds,
    equal_error_rate,
    roc_of_scores,
    score_pairs,
    tar_at_far,
)

FARS = (0.5, 0.34, 0.1, 0.01, 0.001)
# few distinct values, so that most draws are full of ties; also all equal
SCORES = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.1 + 1e-16, 0.3, 0.7, 1.0]), st.booleans()),
    min_size=2,
    max_size=60,
).filter(lambda pairs: len({genuine for _, genuine in pairs}) == 2)


def some_set(name: str, num: int, dim: int, seed: int, first_id: int = 0, labels: int = 5) -> EmbeddingSet:
    rng = np.random.default_rng(seed)
    label_N = rng.integers(0, labels, num)
    vectors = np.random.default_rng(7).normal(size=(labels, dim))[label_N] + rng.normal(size=(num, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingSet(name, vectors.astype(np.float32), label_N, np.arange(first_id, first_id + num))


def slow_tar(pairs: list[tuple[float, bool]], far: float) -> tuple[float, float]:
    """Every score as a threshold, from the lowest up."""
    genuine = [score for score, same in pairs if same]
    impostor = [score for score, same in pairs if not same]
    for threshold in sorted(score for score, _ in pairs):
        if sum(score >= threshold for score in impostor) / len(impostor) <= far:
            return sum(score >= threshold for score in genuine) / len(genuine), threshold
    return 0.0, float(np.nextafter(max(score for score, _ in pairs), np.inf))


def slow_folds(scores: list[float], genuine: list[bool], folds: list[int]) -> list[tuple[float, float]]:
    """Accuracy and threshold of each fold: all middles and both ends are tried one by one."""
    found = []
    for fold in sorted(set(folds)):
        train = [(score, same) for score, same, one in zip(scores, genuine, folds, strict=True) if one != fold]
        test = [(score, same) for score, same, one in zip(scores, genuine, folds, strict=True) if one == fold]
        levels = sorted({score for score, _ in train})
        tried = [
            levels[0],
            *((a + b) / 2 for a, b in itertools.pairwise(levels)),
            np.nextafter(levels[-1], 9),
        ]
        best, best_threshold = -1, 0.0
        for threshold in tried:
            right = sum((score >= threshold) == same for score, same in train)
            if right >= best:
                best, best_threshold = right, threshold
        found.append(
            (sum((score >= best_threshold) == same for score, same in test) / len(test), float(best_threshold))
        )
    return found


class TestByHand:
    SCORES = (0.9, 0.8, 0.8, 0.4, 0.2)
    GENUINE = (True, True, False, True, False)

    def test_roc(self):
        roc = roc_of_scores(self.SCORES, self.GENUINE)
        assert roc.threshold_P.tolist() == [np.inf, 0.9, 0.8, 0.4, 0.2]
        assert roc.far_P.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0]
        assert roc.tar_P.tolist() == [0.0, 1 / 3, 2 / 3, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("far", "tar", "threshold"), [(0.49, 1 / 3, 0.9), (0.5, 1.0, 0.4), (0.99, 1.0, 0.4), (1.0, 1.0, 0.2)]
    )
    def test_smallest_threshold_that_keeps_the_far(self, far, tar, threshold):
        tar_F, threshold_F = tar_at_far(self.SCORES, self.GENUINE, [far])
        assert (tar_F[0], threshold_F[0]) == (tar, threshold)

    def test_nothing_is_accepted_where_an_impostor_is_highest(self):
        tar_F, threshold_F = tar_at_far([0.3, 0.7, 0.7], [True, True, False], [0.5])
        assert tar_F[0] == 0.0
        assert 0.7 < threshold_F[0] < 0.7 + 1e-15

    def test_equal_error_rate(self):
        # (FAR, TAR) goes from (0, 1/3) to (1/2, 2/3): FAR = 1 - TAR where t/2 = 2/3 - t/3, at t = 4/5
        assert equal_error_rate(self.SCORES, self.GENUINE) == pytest.approx(0.4, abs=1e-12)
        assert equal_error_rate([0.9, 0.1], [True, False]) == 0.0
        assert equal_error_rate([0.1, 0.9], [True, False]) == 1.0
        assert equal_error_rate([0.5, 0.5], [True, False]) == 0.5

    def test_accuracy_by_folds(self):
        # block 1 is decided by block 2, where 0.5 (the middle of 0.3 and 0.7) is right on both pairs; and 0.55 of block 1
        found = accuracy_by_folds([0.8, 0.6, 0.5, 0.3, 0.7, 0.1], [True, True, False, False, True, False], num_folds=2)
        assert found.threshold_K.tolist() == [0.5, 0.55]
        assert found.accuracy_K.tolist() == [2 / 3, 1.0]
        assert found.mean == pytest.approx(5 / 6)
        assert found.std == pytest.approx(1 / 6)

    def test_of_equally_right_thresholds_the_highest(self):
        # of block 2 both 0.7 and above everything are wrong on one pair
        found = accuracy_by_folds([0.9, 0.1, 0.7, 0.8], [True, False, True, False], folds=[0, 0, 1, 1])
        assert found.threshold_K[0] > 0.8
        assert found.accuracy_K[0] == 1.0

    def test_blocks_that_are_not_equal_are_longer_first(self):
        scores = np.linspace(0, 1, 11)
        genuine = np.arange(11) % 2 == 0
        folds = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
        blocks, named = accuracy_by_folds(scores, genuine, 3), accuracy_by_folds(scores, genuine, folds=folds)
        assert blocks.accuracy_K.tolist() == named.accuracy_K.tolist()
        assert blocks.threshold_K.tolist() == named.threshold_K.tolist()


@given(SCORES)
@settings(max_examples=200, deadline=None)
def test_roc_is_that_of_scikit_learn(pairs):
    scores, genuine = (np.array(column) for column in zip(*pairs, strict=True))
    far_P, tar_P, threshold_P = roc_curve(genuine, scores, drop_intermediate=False)
    found = roc_of_scores(scores, genuine)
    np.testing.assert_allclose(found.far_P, far_P, atol=1e-9)
    np.testing.assert_allclose(found.tar_P, tar_P, atol=1e-9)
    np.testing.assert_array_equal(found.threshold_P, threshold_P)


@given(SCORES, st.sampled_from(FARS))
@settings(max_examples=200, deadline=None)
def test_tar_at_far_is_that_of_a_loop(pairs, far):
    scores, genuine = zip(*pairs, strict=True)
    tar_F, threshold_F = tar_at_far(scores, genuine, [far])
    assert (tar_F[0], threshold_F[0]) == slow_tar(pairs, far)


@given(SCORES)
@settings(max_examples=200, deadline=None)
def test_equal_error_rate_is_where_exact_lines_cross(pairs):
    genuine = [score for score, same in pairs if same]
    impostor = [score for score, same in pairs if not same]
    points = [(Fraction(0), Fraction(0))]
    for level in sorted({score for score, _ in pairs}, reverse=True):
        far = Fraction(sum(score >= level for score in impostor), len(impostor))
        points.append((far, Fraction(sum(score >= level for score in genuine), len(genuine))))
    for (far, tar), (next_far, next_tar) in itertools.pairwise(points):
        if far + tar < 1 <= next_far + next_tar:
            way = (1 - far - tar) / (next_far + next_tar - far - tar)
            assert equal_error_rate(*zip(*pairs, strict=True)) == pytest.approx(
                float(far + way * (next_far - far)), abs=1e-12
            )


def test_equal_error_rate_is_that_of_a_root_finder():
    rng = np.random.default_rng(1)
    genuine = rng.random(3000) < 0.4
    scores = rng.normal(size=3000) + genuine
    far_P, tar_P, _ = roc_curve(genuine, scores)
    root = brentq(lambda far: 1.0 - far - interp1d(far_P, tar_P)(far), 0.0, 1.0, xtol=1e-12)
    assert equal_error_rate(scores, genuine) == pytest.approx(root, abs=1e-9)


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_folds_are_those_of_a_loop(num_folds, seed):
    rng = np.random.default_rng(seed)
    genuine = np.arange(40) % 2 == 0
    scores = np.round(rng.normal(size=40) + genuine, 1)  # many ties
    folds = rng.permutation(np.arange(40) // 2 % num_folds) if seed % 2 else np.sort(np.arange(40) % num_folds)
    found = accuracy_by_folds(scores, genuine, num_folds, folds if seed % 2 else None)
    truth = slow_folds(scores.tolist(), genuine.tolist(), folds.tolist())
    assert found.accuracy_K.tolist() == [accuracy for accuracy, _ in truth]
    np.testing.assert_allclose(found.threshold_K, [threshold for _, threshold in truth], atol=1e-15)


def test_folds_are_those_of_the_public_grid_where_it_can_tell_all_scores_apart():
    rng = np.random.default_rng(3)
    genuine = rng.random(600) < 0.5
    # squared distances in the middle of the grid's steps
    distance = 0.005 + 0.01 * np.clip(rng.normal(150, 40, 600) - 60 * genuine, 0, 398).astype(int)
    grid = np.arange(0, 4, 0.01)
    truth = []
    for block in np.array_split(np.arange(600), 10):
        others = np.setdiff1d(np.arange(600), block)
        right = [np.mean((distance[others] < level) == genuine[others]) for level in grid]
        truth.append(np.mean((distance[block] < grid[int(np.argmax(right))]) == genuine[block]))
    found = accuracy_by_folds(1.0 - distance / 2.0, genuine)
    assert found.accuracy_K.tolist() == truth
    assert (found.mean, found.std) == (np.mean(truth), np.std(truth))


def test_thresholds_between_neighbouring_floats_still_separate():
    low = 0.5
    high = float(np.nextafter(low, 1.0))
    found = accuracy_by_folds([high, low, high, low], [True, False, True, False], 2)
    assert found.accuracy_K.tolist() == [1.0, 1.0]


def test_the_rule_is_that_of_all_pairs():
    query, gallery = some_set("q", 60, 8, 1), some_set("g", 70, 8, 2, first_id=1000)
    first, second = (index.ravel() for index in np.meshgrid(np.arange(60), np.arange(70), indexing="ij"))
    score_P = score_pairs(query, gallery, first, second)
    every = compare(query, gallery, FARS)
    tar_F, threshold_F = tar_at_far(score_P, query.labels_N[first] == gallery.labels_N[second], FARS)
    for far, tar, threshold in zip(FARS, tar_F, threshold_F, strict=True):
        assert tar == every.tar_at_far[far_key(far)]
        assert threshold == pytest.approx(every.threshold_at_far[far_key(far)], abs=2.0**-20)


def test_scores_are_cosines_in_float64_of_two_models(monkeypatch):
    monkeypatch.setattr("lce_dist.evaluation.verification._BLOCK_PAIRS", 7)
    query, gallery = some_set("q", 20, 6, 1), some_set("g", 30, 6, 2)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 20, 50), rng.integers(0, 30, 50)
    truth = []
    for one, other in zip(first, second, strict=True):
        a, b = query.vectors_ND[one].tolist(), gallery.vectors_ND[other].tolist()
        truth.append(sum(x * y for x, y in zip(a, b, strict=True)))
    np.testing.assert_allclose(score_pairs(query, gallery, first, second), truth, atol=1e-15)


@pytest.mark.parametrize(
    ("scores", "genuine", "words"),
    [
        ([0.1, np.nan, 0.2], [True, False, True], "the score of pair 2 is nan"),
        ([0.1, np.inf], [True, False], "pair 2 is inf"),
        ([0.1, 0.2], [True, True], "0 impostor pairs"),
        ([0.1, 0.2], [False, False], "0 genuine pairs"),
        ([0.1, 0.2], [True], r"shape \(2,\).*shape \(1,\)"),
        ([0.1, 0.2], [1, 0], "one bool a pair"),
        ([], [], "must be one"),
        ([[0.1, 0.2]], [[True, False]], "one score"),
    ],
)
def test_lists_that_cannot_be_measured_are_refused(scores, genuine, words):
    for measure in (roc_of_scores, equal_error_rate, accuracy_by_folds):
        with pytest.raises(DataError, match=words):
            measure(scores, genuine)


def test_folds_that_leave_one_kind_are_refused():
    sorted_list = [True] * 5 + [False] * 5
    with pytest.raises(DataError, match=r"without fold 1 of the list no genuine pair"):
        accuracy_by_folds(np.arange(10.0), sorted_list, 2)
    for num_folds in (1, 11):
        with pytest.raises(DataError, match=f"10 pairs in {num_folds} folds"):
            accuracy_by_folds(np.arange(10.0), sorted_list, num_folds)
    with pytest.raises(DataError, match="at least two"):
        accuracy_by_folds(np.arange(10.0), sorted_list, folds=[3] * 10)


def test_models_of_other_dimensions_are_refused():
    with pytest.raises(DataError, match=r"'q' have 6 dimensions .* 'g' have 5"):
        score_pairs(some_set("q", 4, 6, 1), some_set("g", 4, 5, 1), np.array([0]), np.array([0]))
