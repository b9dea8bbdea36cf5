"""A run's verdict: judged, written beside the run and into its page, and told to MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launch.html_report import html_report
from lce_dist.config import Config
from lce_dist.errors import RunError
from lce_dist.evaluation.answers import answers_of
from lce_dist.evaluation.gate import GateVerdict, judge
from lce_dist.registry import log_run_file, set_model_alias, tag_run
from lce_dist.spool import read_cursor
from lce_dist.tracking import tracking_uri


def conclude_gate(run_dir: Path, config: Config, report: dict[str, Any]) -> tuple[GateVerdict, dict[str, Any]]:
    """Judge ``report`` by ``config.gate`` and write gate.json and report.html; returns the verdict, and as it was written."""
    verdict = judge(report, config.gate)
    answers = answers_of(report, verdict, config.gate.min_slice_images)
    entry: dict[str, Any] = {
        "passed": verdict.passed,
        "checks": [
            {"name": check.name, "asked": check.asked, "reached": check.reached, "passed": check.passed}
            for check in verdict.checks
        ],
        "answers": dict(answers.rows()),
        "gate": config.gate.model_dump(mode="json"),
        "fingerprint": report["fingerprint"],
    }
    _write(run_dir / "report.html", html_report(config.run.name, report, verdict, answers, run_dir / "figures"))
    _write(run_dir / "gate.json", json.dumps(entry, indent=2) + "\n")
    return verdict, entry


def tell_mlflow(run_dir: Path, config: Config, verdict: GateVerdict, alias: str) -> str:
    """Tag the run and, when passed, move the alias to its model; returns what was done.

    Errors: RunError when MLflow does not answer, or has not got the model yet.
    """
    runs = (read_cursor(run_dir / "tracking.json") or {}).get("runs")
    if not isinstance(runs, dict):
        runs = {}
    run_id = runs.get("parent")
    if run_id is None and (run_dir / "tracking.jsonl").exists():
        raise RunError(
            f"{run_dir / 'tracking.json'} names no run of MLflow; run the training command again, it finds the run"
        )
    if run_id is None:
        return "MLflow does not know this run; nothing was told to it"
    uri = tracking_uri(config.tracking, run_dir.resolve().parent)
    failed = "; ".join(f"{check.name}: {check.reached}" for check in verdict.failed)
    tag_run(uri, run_id, {"lce.gate": "passed" if verdict.passed else "not passed", "lce.gate.reasons": failed})
    for name in ("gate.json", "report.html"):
        log_run_file(uri, run_id, run_dir / name, "")
    if not verdict.passed:
        return f"MLflow: run {run_id} is tagged; the alias stays where it is"
    if not (run_dir / "new" / "model.safetensors").exists() or "new" not in runs:
        return f"MLflow: run {run_id} is tagged; it trained no new model, so no alias moves"
    model = config.tracking.model or config.run.name
    version = set_model_alias(uri, model, runs["new"], alias)
    return f"MLflow: {model}@{alias} is now version {version}, of run {run_id}"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
