"""What a run's page in MLflow says of checkpoints that were looked at: a warning goes when the cross-test recovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from launch.run_tracking import RunTracking
from lce_dist.config import load_config
from lce_dist.tracking import Tracker

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml"


def look(step: int, warning: str | None) -> dict[str, Any]:
    return {"type": "beside", "stage": "new", "step": step, "metrics": {"beside/joint": 0.5}, "warning": warning}


def test_a_warning_is_taken_back_also_by_the_next_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, run = load_config(QUICKSTART, ["run.name=one"]), tmp_path / "one"
    run.mkdir()
    tags = []
    for looks in ([look(1, None)], [look(2, "falls"), look(3, None)], [look(4, "falls")], [look(5, None)]):
        tracking = RunTracking(Tracker(config.tracking, run, "one", tmp_path), run)
        tracking.tracker.start_run("parent", "one")
        tracking.follow({"type": "stage_start", "stage": "new"})
        for event in looks:
            tracking.follow(event)
        assert tracking.close("FINISHED")
        parent = json.loads((run / "tracking.json").read_text())["runs"]["parent"]
        tags.append(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(parent).data.tags.get("lce.warning"))
    assert tags == [None, "", "falls", ""]
