"""What workers keep a line a step, and how a driver catches up with workers that outlived the one before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from mlflow.tracking import MlflowClient

from launch.run_tracking import RunTracking
from lce_dist.config import TrackingConfig
from lce_dist.tracking import Tracker
from lce_dist.training.step_log import IdsLog, PointsLog, points_after


def test_lines_from_the_step_on_are_dropped_and_a_cut_line_too(tmp_path: Path) -> None:
    log = IdsLog(tmp_path / "ids.tsv", 0, lambda ids: f"h{ids.sum()}")
    assert [log.write(step, np.array([step, 1])) for step in range(4)] == ["h1", "h2", "h3", "h4"]
    log.close()
    with (tmp_path / "ids.tsv").open("a") as file:
        file.write("4\t2\th")  # killed in the middle of a line
    IdsLog(tmp_path / "ids.tsv", 3, str).close()
    assert (tmp_path / "ids.tsv").read_text() == "0\t2\th1\n1\t2\th2\n2\t2\th3\n"

    points = PointsLog(tmp_path / "points.jsonl", 0)
    for step in (1, 5, 10):
        points.write(step, 1000 + step, {"loss/total": step / 3})
    points.close()
    with (tmp_path / "points.jsonl").open("a") as file:
        file.write('{"step": 15')
    assert [one["step"] for one in points_after(tmp_path / "points.jsonl", 1)] == [5, 10]
    PointsLog(tmp_path / "points.jsonl", 5).close()
    assert points_after(tmp_path / "points.jsonl", 1) == [
        {"step": 5, "time_ms": 1005, "metrics": {"loss/total": 5 / 3}}
    ]
    assert points_after(tmp_path / "absent", 0) == []


def test_a_driver_catches_up_with_workers_that_outlived_the_one_before(tmp_path: Path) -> None:
    def tracking() -> RunTracking:
        return RunTracking(Tracker(TrackingConfig(), tmp_path / "run", "run", tmp_path), tmp_path / "run")

    def metrics(stage: str, step: int) -> dict:
        return {"type": "metrics", "stage": stage, "step": step, "metrics": {"loss/total": float(step)}}

    killed = tracking()
    assert killed.told_steps == {}
    killed.tracker.start_run("parent", "run")
    for stage in ("done", "old"):
        killed.follow({"type": "stage_start", "stage": stage})
        killed.follow(metrics(stage, 10))
    killed.follow({"type": "stage_done", "stage": "done"})
    killed.follow(metrics("old", 20))
    assert killed.tracker.close(60)  # as a killed one: no run is ended

    # its workers ended the stage "old", and began and ended "new", while nobody listened
    later = tracking()
    assert later.told_steps == {"done": 10, "old": 20}
    later.tracker.start_run("parent", "run")
    for stage, steps in (("done", ()), ("old", (30, 40)), ("new", (10, 20))):
        points = [{"step": step, "time_ms": 7, "metrics": {"loss/total": float(step)}} for step in steps]
        later.follow({"type": "points", "stage": stage, "points": points})
        if stage == "old":
            (tmp_path / "run" / "old").mkdir()
            (tmp_path / "run" / "old" / "model.safetensors").write_bytes(b"weights")
        later.follow({"type": "stage_skipped", "stage": stage, "why": "finished before"})
    assert later.close("FINISHED")

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = json.loads((tmp_path / "run" / "tracking.json").read_text())["runs"]
    for stage, steps in (("done", [10]), ("old", [10, 20, 30, 40]), ("new", [10, 20])):
        assert sorted(point.step for point in client.get_metric_history(runs[stage], "loss/total")) == steps
        assert client.get_run(runs[stage]).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(runs["old"], "model")] == ["model/model.safetensors"]
