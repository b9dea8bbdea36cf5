"""A run's verdict: judged, written beside the run and into its page, and told to MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from launch.html_report import html_report
from launch.run_tracking import gate_tags, registered_by, version_text
from lce_dist.config import Judged
from lce_dist.errors import DataError, RunError, SetupError
from lce_dist.evaluation.answers import answers_of
from lce_dist.evaluation.gate import GateVerdict, judge
from lce_dist.registry import describe_version, log_run_file, set_model_alias, tag_run
from lce_dist.spool import read_cursor, read_events
from lce_dist.tracking import tracking_uri


def conclude_gate(
    run_dir: Path, config: Judged, report: dict[str, Any], overridden: Sequence[str] = ()
) -> tuple[GateVerdict, dict[str, Any]]:
    """Judge ``report`` by ``config.gate`` and write gate.json and report.html; returns the verdict, and as it was written.

    overridden: what of ``config.gate`` was set by hand; both files say so. Errors: DataError for a report that lacks parts;
    SetupError where they cannot be written.
    """
    try:
        verdict = judge(report, config.gate)
        answers = answers_of(report, verdict, config.gate.min_slice_images)
        if overridden:
            by_hand = f"{answers.safe} Judged with {', '.join(overridden)} instead of what the run's config asks."
            answers = replace(answers, safe=by_hand)
        page = html_report(config.run.name, report, verdict, answers, run_dir / "figures", overridden)
        known = {key: report[key] for key in ("fingerprint", "examination")}
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        # a file that somebody else may have written: what is missing shows where it is read
        raise DataError(
            f"{run_dir / 'report.json'} is damaged ({type(error).__name__}: {error}); delete it and run the training command "
            "again, which evaluates the trained models anew"
        ) from None
    entry: dict[str, Any] = {
        "passed": verdict.passed,
        "checks": [
            {"name": check.name, "asked": check.asked, "reached": check.reached, "passed": check.passed}
            for check in verdict.checks
        ],
        "answers": dict(answers.rows()),
        "gate": config.gate.model_dump(mode="json"),
        "overridden": list(overridden),
        **known,
    }
    _write(run_dir / "report.html", page)
    _write(run_dir / "gate.json", json.dumps(entry, indent=2) + "\n")
    return verdict, entry


def judged_before(run_dir: Path) -> dict[str, Any] | None:
    """What ``conclude_gate`` wrote last; None where there is nothing, or it is damaged."""
    try:
        entry = json.loads((run_dir / "gate.json").read_text())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) else None


def tell_mlflow(
    run_dir: Path,
    config: Judged,
    report: dict[str, Any],
    verdict: GateVerdict,
    entry: dict[str, Any],
    alias: str,
    replace: bool = False,
) -> str:
    """Tell the run and its model's version of the verdict and, when passed, move the alias; returns what was done.

    Errors: RunError when MLflow does not answer, has not got the model yet, or an earlier verdict still waits to be sent; those of
    ``set_model_alias``.
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
    if _verdict_waits(run_dir):
        raise RunError(
            f"{run_dir / 'tracking.jsonl'} holds an earlier verdict that MLflow has not taken and that would be sent after this one; "
            f"run lce sync {run_dir}, then the same command again"
        )
    uri = tracking_uri(config.tracking, run_dir.resolve().parent)
    tag_run(uri, run_id, gate_tags(report, entry, config))
    for name in ("gate.json", "report.html"):
        log_run_file(uri, run_id, run_dir / name, "")
    of_model = runs.get(registered_by(run_dir))
    model = config.tracking.model or config.run.name
    if of_model is not None:
        describe_version(uri, model, of_model, version_text(entry))
    if not verdict.passed:
        return f"MLflow: run {run_id} is tagged; the alias stays where it is"
    if of_model is None:
        return f"MLflow: run {run_id} is tagged; it has no model of its own, so no alias moves"
    version = set_model_alias(uri, model, of_model, alias, replace)
    return f"MLflow: {model}@{alias} is now version {version}, of run {run_id}"


def _verdict_waits(run_dir: Path) -> bool:
    """Whether the spool has yet to tell MLflow of a verdict, by the run's tags or the version's description."""
    spool, cursor = run_dir / "tracking.jsonl", read_cursor(run_dir / "tracking.json") or {}
    if not spool.is_file():
        return False
    size = spool.stat().st_size
    offset, deferred = cursor.get("offset", 0), cursor.get("deferred", ())
    if not isinstance(offset, int) or not isinstance(deferred, list | tuple):
        offset, deferred = 0, ()  # damaged: what was sent is not known
    waiting = [event for event, _ in read_events(spool, min(offset, size))]
    deferred = [place for place in deferred if isinstance(place, int) and place < size]
    waiting += [event for place in deferred for event, _ in islice(read_events(spool, place), 1)]
    return any(event.get("kind") == "model" or "lce.gate" in event.get("tags", ()) for event in waiting)


def _write(path: Path, text: str) -> None:
    """Errors: SetupError, as 1 is the exit code of a verdict."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise SetupError(
            f"{path} cannot be written: {error.strerror}. Free space, or gate as who may write there"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
