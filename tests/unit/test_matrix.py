"""The matrix compares the right models, and the verdict follows method and numbers worked by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lce_dist.errors import RunError
from lce_dist.evaluation.matrix import PAIRS, build_matrix, cells_of, criterion, report_entries
from lce_dist.evaluation.metrics import EmbeddingSet, PairResult, compare

FARS = (0.1, 0.01)


def pair(tar: float, num_impostor: int = 100_000) -> PairResult:
    empty = np.zeros(200, dtype=np.int64)
    curve = (np.array([1e-4, 1.0]), np.array([tar, 1.0]))
    return PairResult({"0.01": tar}, {"0.01": 0.3}, 0.9, 100, 1000, num_impostor, curve, empty, empty)


def model(name: str, seed: int, noise: float, rotated: bool = False) -> EmbeddingSet:
    labels = np.arange(120) % 20
    vectors = np.random.default_rng(0).normal(size=(20, 12))[labels]
    vectors = vectors + noise * np.random.default_rng(seed).normal(size=vectors.shape)
    if rotated:
        vectors = vectors @ np.linalg.qr(np.random.default_rng(5).normal(size=(12, 12)))[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingSet(name, vectors.astype(np.float32), labels, np.arange(120))


OLD, NEW, INDEPENDENT = model("old", 1, 1.0), model("new", 2, 0.5), model("independent", 3, 0.4, rotated=True)


def same(left: PairResult, right: PairResult) -> bool:
    return (left.tar_at_far, left.threshold_at_far, left.rank1) == (
        right.tar_at_far,
        right.threshold_at_far,
        right.rank1,
    )


def test_each_cell_is_its_pair() -> None:
    matrix = build_matrix(cells_of(OLD, NEW, INDEPENDENT), FARS)
    assert list(matrix) == list(PAIRS) == ["old_old", "new_old", "new_new", "independent_old", "independent_new"]
    assert same(matrix["old_old"], compare(OLD, OLD, FARS))
    assert same(matrix["new_old"], compare(NEW, OLD, FARS))
    # queries and galleries swapped give the same pairs, but other rank-1 lists
    assert not same(matrix["new_old"], compare(OLD, NEW, FARS))
    assert same(matrix["new_new"], compare(NEW, NEW, FARS))
    assert same(matrix["independent_old"], compare(INDEPENDENT, OLD, FARS))
    assert same(matrix["independent_new"], compare(INDEPENDENT, INDEPENDENT, FARS))
    assert matrix["independent_old"].tar_at_far["0.1"] < 0.3 < matrix["new_old"].tar_at_far["0.1"]


def test_without_an_independent_model() -> None:
    matrix = build_matrix(cells_of(OLD, NEW, None), FARS)
    assert list(matrix) == ["old_old", "new_old", "new_new"]
    verdict = criterion(matrix, 0.1)
    assert verdict.met
    assert verdict.update_gain is None
    assert len(verdict.reasons) == 1


def test_met_with_update_gain() -> None:
    tars = {"old_old": 0.700, "new_old": 0.711, "new_new": 0.835, "independent_old": 0.017, "independent_new": 0.860}
    verdict = criterion({key: pair(tar) for key, tar in tars.items()}, 1e-2)
    assert verdict.met
    assert verdict.update_gain == pytest.approx(0.011 / 0.160)
    assert verdict.reasons == (
        "TAR at FAR 0.01: new/old 0.7110 is above old/old 0.7000 (by 0.011); the criterion asks for new/old > old/old.",
        "Update gain +0.069: share of the step from old/old to independent/independent 0.8600.",
        "After re-encoding the gallery, new/new 0.8350 is below independent/independent 0.8600 (by 0.025).",
        "Without compatible training, independent/old 0.0170 is below old/old 0.7000 (by 0.68).",
    )


def test_not_met() -> None:
    tars = {"old_old": 0.611, "new_old": 0.592, "new_new": 0.753, "independent_new": 0.822}
    verdict = criterion({key: pair(tar) for key, tar in tars.items()}, 0.01)
    assert not verdict.met
    assert verdict.update_gain == pytest.approx(-0.019 / 0.211)
    assert "new/old 0.5920 is below old/old 0.6110 (by 0.019)" in verdict.reasons[0]


def test_equal_is_not_met() -> None:
    verdict = criterion({"old_old": pair(0.5), "new_old": pair(0.5), "new_new": pair(0.6)}, 0.01)
    assert not verdict.met
    assert "equals" in verdict.reasons[0]
    hair = np.nextafter(0.5, 1.0)
    assert criterion({"old_old": pair(0.5), "new_old": pair(hair), "new_new": pair(0.6)}, 0.01).met


@pytest.mark.parametrize("paragon", [0.6, 0.5])
def test_update_gain_needs_a_better_paragon(paragon: float) -> None:
    tars = {"old_old": 0.6, "new_old": 0.7, "new_new": 0.7, "independent_new": paragon}
    verdict = criterion({key: pair(tar) for key, tar in tars.items()}, 0.01)
    assert verdict.met
    assert verdict.update_gain is None
    assert any("Update gain is not defined" in reason for reason in verdict.reasons)


def test_scarce_impostors_are_said() -> None:
    few = {"old_old": pair(0.5, 99), "new_old": pair(0.6, 99), "new_new": pair(0.6, 99)}
    assert any("below 1 / impostor pairs (1 / 99)" in reason for reason in criterion(few, 0.01).reasons)
    enough = {"old_old": pair(0.5, 100), "new_old": pair(0.6, 100), "new_new": pair(0.6, 100)}
    assert len(criterion(enough, 0.01).reasons) == 1


def test_a_far_that_was_not_measured() -> None:
    with pytest.raises(RunError, match=r"FAR 0\.05 was not measured for old_old; must be one of 0\.01"):
        criterion({"old_old": pair(0.5), "new_old": pair(0.6), "new_new": pair(0.6)}, 0.05)


def test_report_entries_survive_json() -> None:
    matrix = build_matrix(cells_of(OLD, NEW, INDEPENDENT), FARS)
    entries = report_entries(matrix)
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    assert list(entries) == list(matrix)
    assert entries["new_old"] == {
        "tar_at_far": matrix["new_old"].tar_at_far,
        "rank1": matrix["new_old"].rank1,
        "threshold_at_far": matrix["new_old"].threshold_at_far,
        "num_genuine": 120 * 5,
        "num_impostor": 120 * 114,
        "exact_up_to_far": 1.0,
        "tar_error_at_far": matrix["new_old"].tar_error,
        "far_error_at_far": matrix["new_old"].far_error,
    }
