"""What of a report over stored vectors goes to MLflow: one run, its numbers, figures, page and the files compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.run_tracking import gate_tags, result_metrics
from lce_dist.config import VectorsConfig
from lce_dist.tracking import Tracker

_CLOSE_S = 60.0


def track_upgrade(config: VectorsConfig, out: Path, report: dict[str, Any], gate: dict[str, Any]) -> bool:
    """Log the report in ``out`` to one run, the same one each time; whether MLflow has everything.

    Errors: ConfigError of ``tracking_uri``; RunError when another process logs from ``out``.
    """
    tracker = Tracker(config.tracking, out, config.run.name, out.resolve().parent)
    tracker.start_run("parent", config.run.name, tags={"lce.fingerprint": report["fingerprint"]})
    params = {f"evaluation.{key}": value for key, value in config.evaluation.model_dump(mode="json").items()}
    tracker.log_params("parent", params | {"mode": report["mode"], "seed": config.run.seed})
    for name, one in report["vectors"].items():
        profile = {"images": one["num_rows"], "dimensions": one["dim"], "space": one["space"]}
        tracker.log_input("parent", f"{name} vectors", one["sha256"], "evaluation", one["file"], profile)
    tracker.log_metrics("parent", result_metrics(report), report["revision"])
    tags = {"lce.space": report["space"], "lce.parent_space": report["parent_space"]}
    tracker.set_tags("parent", tags | gate_tags(report, gate, config))
    for figure in sorted((out / "figures").glob("*.png")):
        tracker.log_file("parent", figure, "figures")
    for name in ("report.html", "report.json", "gate.json"):
        tracker.log_file("parent", out / name)
    tracker.log_file("parent", out / "resolved.json", "config")
    tracker.end_run("parent")
    return tracker.close(_CLOSE_S)
