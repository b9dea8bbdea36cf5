"""The parts of the way back from a fault, from what driver and workers wrote down."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.starts import Starts, read_starts, recovery_parts


def line(what: str, time_s: float, process_s: float) -> dict[str, object]:
    return {"what": what, "time_s": time_s, "process_s": process_s, "stage": "new"}


def test_what_is_written_down(tmp_path: Path) -> None:
    starts = Starts(tmp_path, 5.0)
    for kind in ("workers_up", "metrics", "stage_start", "points", "metrics", "metrics", "checkpoint", "failure"):
        starts.see({"type": kind, "stage": "old"})
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"what": "cut')
    assert [one["what"] for one in read_starts(tmp_path)] == ["workers_up", "stage_start", "first_step", "failure"]
    assert {one["process_s"] for one in read_starts(tmp_path)} == {5.0}


def test_a_step_of_a_worker_that_outlived_its_driver_is_no_recovery() -> None:
    before = [line("workers_up", 2, 1), line("stage_start", 3, 1), line("first_step", 4, 1)]
    orphan = [line("stage_start", 11, 1), line("first_step", 12, 1)]  # the next stage, by an old process
    assert recovery_parts(before + orphan, 10.0) is None
    after = [
        line("failure", 11, 0),
        line("workers_up", 18, 13),
        line("stage_start", 19.5, 13),
        line("first_step", 20, 13),
    ]
    parts = recovery_parts(before + orphan + after, 10.0)
    assert parts == pytest.approx(
        {"detect_s": 1.0, "restart_s": 2.0, "imports_s": 5.0, "load_s": 1.5, "first_step_s": 0.5}
    )
    assert sum(parts.values()) == pytest.approx(20.0 - 10.0)


def test_a_process_that_ray_had_begun_before_is_a_recovery_too() -> None:
    lines = [
        line("workers_up", 2, 1),
        line("first_step", 4, 1),
        line("failure", 31, 0),  # told after a time-out
        line("workers_up", 33, 9),
        line("stage_start", 35, 9),
        line("first_step", 36, 9),
    ]
    parts = recovery_parts(lines, 10.0)
    assert parts == pytest.approx(
        {"detect_s": 21.0, "restart_s": 0.0, "imports_s": 2.0, "load_s": 2.0, "first_step_s": 1.0}
    )


def test_workers_that_came_and_were_lost_again_are_no_recovery() -> None:
    lines = [line("failure", 11, 0), line("workers_up", 12, 11.5), line("failure", 13, 0)]
    assert recovery_parts(lines, 10.0) is None
    lines += [line("workers_up", 20, 15), line("stage_start", 21, 15), line("first_step", 22, 15)]
    parts = recovery_parts(lines, 10.0)
    assert parts is not None and sum(parts.values()) == pytest.approx(12.0) and parts["detect_s"] == pytest.approx(1.0)
