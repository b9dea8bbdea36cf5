"""Pairs counted a square at a time, high levels only, against the obvious way."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from lce_dist.errors import DataError
from lce_dist.evaluation import counting
from lce_dist.evaluation.counting import (
    NUM_LEVELS,
    STEPS_PER_UNIT,
    PairCounts,
    count_at_all_levels,
    count_pairs,
    error_levels,
)
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.metrics import result_of

FARS = (0.05, 0.01, 1e-3, 1e-4)


@pytest.fixture
def small_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is for millions of images, at sizes that a loop can follow."""
    monkeypatch.setattr(counting, "MOST_PAIRS_AT_ALL_LEVELS", 0)
    monkeypatch.setattr(counting, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(counting, "_SAMPLE_PAIRS", 1 << 12)
    monkeypatch.setattr(counting, "_SAMPLE_ABOVE", 50)
    monkeypatch.setattr(counting, "_GATHER_SCORES", 1000)


def corners(seed: int, num: int, num_labels: int, first_id: int = 0, name: str = "m") -> EmbeddingSet:
    """Rows of +-1/8 in 64 dimensions: every product is exact in float32, whatever the order of its sum; many ties."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, num_labels, num)
    likes = np.random.default_rng(5).choice([-1, 1], (num_labels, 64))[labels]
    vectors = np.where(draw.random((num, 64)) < 0.25, -likes, likes) / 8.0
    return EmbeddingSet(name, vectors.astype(np.float32), labels.astype(np.int64), np.arange(num) + first_id)


def relabelled(one: EmbeddingSet, seed: int) -> EmbeddingSet:
    """The same images by another model."""
    other = corners(seed, len(one.labels_N), int(one.labels_N.max()) + 1)
    likes = np.random.default_rng(5).choice([-1, 1], (int(one.labels_N.max()) + 1, 64))[one.labels_N]
    flips = np.random.default_rng(seed).random(other.vectors_ND.shape) < 0.3
    return EmbeddingSet(
        "other", (np.where(flips, -likes, likes) / 8.0).astype(np.float32), one.labels_N, one.sample_ids_N
    )


def assert_same(fast: PairCounts, slow: PairCounts) -> None:
    assert fast.num_genuine == slow.num_genuine
    assert fast.num_impostor == slow.num_impostor
    assert (fast.num_ranked, fast.num_correct) == (slow.num_ranked, slow.num_correct)
    np.testing.assert_array_equal(fast.genuine_L, slow.genuine_L)
    np.testing.assert_array_equal(fast.impostor_L[fast.exact_from :], slow.impostor_L[fast.exact_from :])
    far_F = [far for far in FARS if far <= fast.exact_up_to_far]
    assert far_F, "nothing was exact"
    for one, other in zip(fast.operating_points(far_F), slow.operating_points(far_F), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("num_labels", [3, 40, 300])
@pytest.mark.usefixtures("small_squares")
def test_a_model_against_itself_and_others_is_counted_as_the_obvious_way_does(num_labels: int) -> None:
    one = corners(1, 333, num_labels)
    for gallery in (
        one,
        relabelled(one, 2),
        corners(3, 150, num_labels, first_id=1200),
        corners(4, 77, num_labels, 9000),
    ):
        fast = count_pairs(one, gallery, FARS)
        assert fast.exact_from > 0 and fast.exact_up_to_far >= max(FARS)
        assert_same(fast, count_at_all_levels(one, gallery))


@pytest.mark.usefixtures("small_squares")
def test_more_labels_of_one_kind_do_not_hide_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # every score is the same: all above any cut, or none
    vectors = np.full((200, 4), 0.5, dtype=np.float32)
    one = EmbeddingSet("flat", vectors, np.repeat(np.arange(100), 2), np.arange(200))
    fast, slow = count_pairs(one, one, [0.01]), count_at_all_levels(one, one)
    assert_same_at = fast.operating_points([0.01]), slow.operating_points([0.01])
    np.testing.assert_array_equal(*assert_same_at)
    assert (fast.num_correct, fast.num_ranked) == (0, 200)
    monkeypatch.setattr(counting, "_NEAR_FAR", 1e-3)  # a cut that is far too high at first is lowered until it serves
    monkeypatch.setattr(counting, "_SAMPLE_ABOVE", 0)
    low = corners(1, 333, 40)
    counted = count_pairs(low, low, FARS)
    assert counted.exact_up_to_far > max(FARS)
    assert_same(counted, count_at_all_levels(low, low))


@pytest.mark.usefixtures("small_squares")
def test_estimates_below_the_cut_fill_the_sum_and_look_like_the_whole() -> None:
    one = corners(1, 700, 60)
    fast, slow = count_pairs(one, one, [1e-3]), count_at_all_levels(one, one)
    assert fast.exact_up_to_far < 0.2 < 1.0 == slow.exact_up_to_far
    near, whole = (result_of(counts, [1e-3]) for counts in (fast, slow))
    assert near.tar_at_far == whole.tar_at_far and near.rank1 == whole.rank1
    assert near.impostor_histogram.sum() == pytest.approx(whole.impostor_histogram.sum(), abs=200)
    share = np.abs(near.impostor_histogram - whole.impostor_histogram).sum() / whole.impostor_histogram.sum()
    assert 0.0 < share < 0.1
    assert near.exact_up_to_far == fast.exact_up_to_far


def normal(num: int, common: float, seed: int = 1, dim: int = 64) -> EmbeddingSet:
    """Unit vectors around likes, with a share of one direction that all of them have."""
    draw = np.random.default_rng(seed)
    labels = np.arange(num) % (num // 4)
    rows = np.random.default_rng(2).normal(size=(num // 4, dim))[labels] + 1.3 * draw.normal(size=(num, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, 0] += common
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet("m", rows.astype(np.float32), labels.astype(np.int64), np.arange(num))


def unrounded(one: EmbeddingSet, far: float) -> float:
    """TAR at FAR of scores in float64, as they are."""
    score = one.vectors_ND.astype(np.float64) @ one.vectors_ND.astype(np.float64).T
    same = one.labels_N[:, None] == one.labels_N
    impostor = np.sort(score[~same])[::-1]
    return float(np.mean(score[same & ~np.eye(len(score), dtype=bool)] > impostor[int(far * len(impostor))]))


def test_rounding_moves_tar_by_no_more_than_is_said() -> None:
    moved = 0.0
    for common in (0.0, 30.0, 100.0, 300.0):  # cosines near 1 - 1e-3, 1e-4, 1e-5
        one = normal(600, common)
        result = result_of(count_pairs(one, one, FARS), FARS)
        for far in FARS:
            off = abs(result.tar_at_far[repr(far)] - unrounded(one, far))
            assert off <= result.tar_error[repr(far)] + 1e-12, (common, far)
            moved = max(moved, off)
        # everything is said to be exact where it is, and to be coarse where it is
        assert bool(result.coarse_at()) is (common > 0.0)
        if common == 0.0:
            assert max(result.tar_error.values()) < 1e-3
    assert moved > 1e-3


def test_rounding_errors_by_hand() -> None:
    genuine_L, impostor_L = np.zeros(NUM_LEVELS, dtype=np.int64), np.zeros(NUM_LEVELS)
    setting = 1_500_000  # level of the impostor that no false accept at all leaves out
    impostor_L[[setting, 5]] = 1, 9
    for level, count in ((setting - 2, 32), (setting - 1, 1), (setting, 2), (setting + 1, 4), (setting + 2, 8)):
        genuine_L[level] = count
    genuine_L[setting + 3] = 53
    tar_F, far_F = PairCounts(genuine_L, impostor_L, 0, 0).rounding_errors([0.01])
    assert (tar_F[0], far_F[0]) == (0.12, 0.1)
    assert PairCounts(genuine_L, impostor_L, 0, 0).rounding_errors([1.0])[0][0] == 0.0


def test_rounding_errors_of_a_wider_reach_by_hand() -> None:
    genuine_L, impostor_L = np.zeros(NUM_LEVELS, dtype=np.int64), np.zeros(NUM_LEVELS)
    setting = 1_500_000
    # within 2 * 3.3 levels of the impostor that sets the threshold: 6 below it and 6 above it
    genuine_L[setting - 8 : setting + 9] = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 70]
    impostor_L[[setting, setting - 2, setting - 3, setting + 1 - 2_000, setting - 4]] = 1, 10, 20, 929, 40
    tar_F, far_F = PairCounts(genuine_L, impostor_L, 0, 0, off_by=3.3).rounding_errors([1e-4])
    assert tar_F[0] == 12 / genuine_L.sum() and far_F[0] == 11 / 1000
    # at the ends of the scale there is nothing beyond
    genuine_L[-1], impostor_L[-1] = 9, 5
    tar_F, far_F = PairCounts(genuine_L, impostor_L, 0, 0, off_by=3.3).rounding_errors([1e-4])
    assert tar_F[0] == 9 / genuine_L.sum() and far_F[0] == 5 / impostor_L.sum()


@pytest.mark.parametrize("dim", [16, 128, 512, 1024])
def test_no_score_is_counted_farther_from_its_own_than_is_said(dim: int) -> None:
    draw = np.random.default_rng(0)
    one_value = draw.normal(size=(1000, dim))
    one_value[:, 0] += 3.0 * np.sqrt(dim)
    farthest = 0.0
    for rows_ND in (1.0 + 0.05 * draw.normal(size=(1000, dim)), one_value):
        rows_ND = (rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)).astype(np.float32)
        own_NN = (rows_ND.astype(np.float64) @ rows_ND.T.astype(np.float64) + 1.0) * STEPS_PER_UNIT
        place_NN = counting._levels(rows_ND @ rows_ND.T)
        rows = torch.from_numpy(rows_ND)
        for level_NN in (place_NN, counting._levels_of(torch.mm(rows, rows.T)).numpy()):
            off_NN = np.abs(level_NN - own_NN)
            np.fill_diagonal(off_NN, 0.0)  # lengths are not 1 to the last bit, so these are beyond the last level
            farthest = max(farthest, float(off_NN.max()))
    assert farthest <= error_levels(dim)
    assert dim < 128 or farthest > 1.0  # one level is not enough
    many = EmbeddingSet("m", rows_ND, np.arange(1000) % 100, np.arange(1000))
    assert count_pairs(many, many, FARS).off_by == error_levels(dim)


@pytest.mark.usefixtures("small_squares")
def test_counts_are_exact_down_to_a_threshold_that_is_kept() -> None:
    one, other = corners(1, 333, 40), corners(4, 77, 40, 9000)
    slow = count_at_all_levels(one, other)
    for threshold in (0.25, -0.5, -1.0):
        fast = count_pairs(one, other, [1e-3], down_to=threshold)
        assert fast.exact_from <= counting.level_of(threshold)
        assert (fast.far_from(threshold), fast.tar_from(threshold)) == (
            slow.far_from(threshold),
            slow.tar_from(threshold),
        )
    assert count_pairs(one, other, [1e-3]).exact_from > counting.level_of(0.25)


def test_the_sample_that_places_the_cut_is_of_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(counting, "_SAMPLE_PAIRS", 1 << 12)
    monkeypatch.setattr(counting, "count_at_all_levels", lambda *pair: seen.append(pair) or count_at_all_levels(*pair))
    one = corners(1, 3000, 40)
    counting._sample(one, one)
    ((query, gallery),) = seen
    assert (len(query.labels_N), len(gallery.labels_N)) == (64, 64)


def test_shares_at_a_threshold_by_hand() -> None:
    genuine_L, impostor_L = np.zeros(NUM_LEVELS, dtype=np.int64), np.zeros(NUM_LEVELS)
    for score, genuine, impostor in ((0.75, 1, 0), (0.5, 2, 1), (0.25, 1, 3)):
        genuine_L[counting.level_of(score)], impostor_L[counting.level_of(score)] = genuine, impostor
    counts = PairCounts(genuine_L, impostor_L, 0, 0)
    for threshold, far, tar in (
        (0.5, 0.25, 0.75),
        (0.500001, 0.0, 0.25),
        (-1.0, 1.0, 1.0),
        (-3.0, 1.0, 1.0),
        (1.5, 0.0, 0.0),
    ):
        assert (counts.far_from(threshold), counts.tar_from(threshold)) == (far, tar)


@pytest.mark.usefixtures("small_squares")
def test_refusals() -> None:
    alone = corners(1, 100, 1)
    with pytest.raises(DataError, match="0 impostor pairs"):
        count_pairs(alone, alone, [0.1])
    vectors = np.eye(8, dtype=np.float32)
    nobody = EmbeddingSet("m", vectors, np.arange(8), np.arange(8))
    with pytest.raises(DataError, match="0 genuine pairs"):
        count_pairs(nobody, nobody, [0.1])


def test_memory_stays_while_pairs_grow() -> None:
    peaks = []
    for num in (9_000, 18_000):
        draw = np.random.default_rng(1)
        vectors = draw.normal(size=(num, 8)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        one = EmbeddingSet("m", vectors, np.arange(num) // 3, np.arange(num))
        torch.set_num_threads(1)
        tracemalloc.start()
        counts = count_pairs(one, one, [1e-3])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert counts.exact_from > 0 and counts.num_impostor == num * (num - 3)
    assert peaks[1] < 1.1 * peaks[0] + 18_000 * 100
