"""The drills that need no run: a writer killed before each operation, files damaged, no room; and that they can find something."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import Kill, damaged_files, full_disk, killed_writers, points_wrong, save, whole_steps
from benchmarks.faults_cost import measure_cost
from lce_dist.errors import CheckpointError


def test_a_writer_killed_before_any_operation_loses_nothing(tmp_path: Path) -> None:
    found = killed_writers(tmp_path)
    assert found["operations"] >= 8 and found["moments"] >= found["operations"]


def test_every_damage_is_told(tmp_path: Path) -> None:
    assert damaged_files(tmp_path) == 4 + 5  # of the rows' file and of the manifest


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
    kill = Kill("worker", 1.0, "new", 3, 5.0, True, True, True, 2, 1)
    assert points_wrong([kill, kill]) == 6


def test_the_cost_is_of_a_checkpoint_that_was_written(tmp_path: Path) -> None:
    cost = measure_cost(tmp_path / "cost", 500)
    assert cost["bytes"] > 500 * 512 * 4 * 2 and 0.0 < cost["copy_s"] < cost["waiting_for_it_s"] < 60.0
    assert cost["share"] > 0.0 and not (tmp_path / "cost").exists()
