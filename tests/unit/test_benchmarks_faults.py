"""The drills that need no run: a writer killed before each operation, files damaged, no room; and that they can find something."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults_files
from benchmarks.faults import marks_of, points_wrong
from benchmarks.faults_cost import measure_cost
from benchmarks.faults_elastic import Elastic, losses_apart, marks_of_elastic
from benchmarks.faults_files import damaged_files, full_disk, killed_writers, save, whole_steps
from benchmarks.faults_runs import KINDS, Drill, code_folder, moments
from lce_dist.errors import CheckpointError


def test_a_writer_killed_before_any_operation_loses_nothing(tmp_path: Path) -> None:
    found = killed_writers(tmp_path)
    assert found["operations"] >= 8 and found["moments"] >= found["operations"] and found["lost"] == 0


def test_a_save_that_loses_the_one_before_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(directory: Path, step: int) -> None:
        if step == 2:
            shutil.rmtree(directory / "step-00000001")
        save(directory, step)

    monkeypatch.setattr(faults_files, "save", careless)
    assert killed_writers(tmp_path)["lost"] > 0


def test_every_damage_is_told(tmp_path: Path) -> None:
    assert damaged_files(tmp_path) == {"cases": 4 + 7, "missed": []}  # of the rows' file and of the manifest


def test_damage_that_is_not_told_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_files.storage, "damage", lambda path, world: None)
    assert len(damaged_files(tmp_path)["missed"]) == 11


def test_no_room_is_told_and_the_one_before_stays(tmp_path: Path) -> None:
    found = full_disk(tmp_path / "full")
    if found is None:
        pytest.skip("needs the right to mount a tmpfs")
    assert found


def test_the_drills_can_find_something(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert whole_steps(tmp_path) == [1]
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002")  # values of another step
    with pytest.raises(AssertionError, match="other values"):
        whole_steps(tmp_path)
    (next((tmp_path / "step-00000002").glob("*.safetensors"))).unlink()
    with pytest.raises((AssertionError, CheckpointError)):
        whole_steps(tmp_path)


def test_marks_fail_by_one_drill_that_went_wrong() -> None:
    good = Drill("worker killed", "new", 7, 3, 5.0, {}, True, (), True, 0, 0)
    assert all(mark.met for mark in marks_of([good, good]))
    wrong: list[dict[str, Any]] = [
        {"same_weights": False},
        {"other_in_report": ("flips",)},
        {"same_batches": False},
        {"missing_points": 2},
        {"double_points": 1},
        {"repeated_steps": 21},
        {"failed": "ended with 1 after the fault"},
        {"recovery_s": None},
        {"recovery_s": 61.0},
    ]
    for harm in wrong:
        assert [mark.met for mark in marks_of([good, replace(good, **harm)])].count(False) == 1, harm
    assert points_wrong([replace(good, missing_points=2, double_points=1)] * 2) == 6


def test_moments_are_inside_of_training() -> None:
    counts = dict.fromkeys(KINDS, 50)
    found = moments(KINDS, counts, {"old": 60, "new": 320})
    assert len(found) == 50 * len(KINDS) and found == moments(KINDS, counts, {"old": 60, "new": 320})
    assert {stage for _, stage, _ in found} == {"old", "new"}
    assert all(0 < step < {"old": 60, "new": 320}[stage] for _, stage, step in found)
    fewer = moments(KINDS, {**counts, KINDS[0]: 3}, {"old": 60, "new": 320})
    assert fewer[:3] == found[:3] and fewer[3:] == found[50:], "those of fewer are done already"


def test_drills_of_other_code_are_no_drills_of_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = code_folder(tmp_path)
    assert here == code_folder(tmp_path) and here.parent == tmp_path
    monkeypatch.setattr("benchmarks.faults_runs.CONFIG", "[run]")
    assert code_folder(tmp_path) != here


def test_the_cost_is_of_a_checkpoint_that_was_written(tmp_path: Path) -> None:
    cost = measure_cost(tmp_path / "cost", 500)
    assert cost["bytes"] > 500 * 512 * 4 * 2 and 0.0 < cost["copy_s"] < cost["waiting_for_it_s"] < 60.0
    assert cost["share"] > 0.0 and not (tmp_path / "cost").exists()


def test_marks_of_nodes_that_go_and_come_can_fail() -> None:
    good = Elastic((4, 3, 2, 3), True, 0, 0, 0.001, 0.0)
    assert all(mark.met for mark in marks_of_elastic(good))
    harms: list[dict[str, Any]] = [{"sizes": (4, 2)}, {"same_batches": False}, {"double_points": 1}, {"apart": 0.03}]
    for harm in harms:
        assert [mark.met for mark in marks_of_elastic(replace(good, **harm))].count(False) == 1, harm


def test_how_far_apart_two_curves_are() -> None:
    calm = [("new", 10 * step, 2.0 - 0.01 * step) for step in range(40)] + [("old", 10, 5.0)]
    noisy = [(stage, step, loss + 0.1 * (-1) ** (step // 10)) for stage, step, loss in calm if stage == "new"]
    assert losses_apart(calm, calm) == 0.0 and losses_apart(calm, noisy) < 1e-9, "what evens out is not apart"
    higher = [(stage, step, 1.1 * loss if step >= 200 else loss) for stage, step, loss in calm]
    assert losses_apart(calm, higher) == pytest.approx(0.1)
    assert losses_apart(calm, []) == float("inf")
