"""Runs on this machine after their command was typed: what they are at, their end, and how to go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.gate import judged_before
from launch.report import read_report
from lce_dist.config import Config, parse_config
from lce_dist.errors import ConfigError, RunError
from lce_dist.spool import holder
from lce_dist.storage import MANIFEST
from lce_dist.training.requests import MOST_PROFILED, PROFILE_FILE

LAUNCH_FILE = "launch.json"
LOG_FILE = "log.txt"  # what the driver told, with the time
_TAIL_BYTES = 1 << 18
_POLL_S = 0.2
_JUDGED = ("fingerprint", "examination")  # what says of which report a verdict is
_TRACES = "*/profiles/step-*.json.gz"

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RunStatus:
    """What a run's directory says. pid: of the driver that is at work; step, metrics: the last that a stage reported."""

    name: str
    state: State
    pid: int | None
    stage: str | None
    step: int | None
    metrics: Mapping[str, float]
    passed: bool | None
    checkpoints: Mapping[str, str]
    by_hand: bool = False  # the verdict is of rules that were set by hand

    def line(self) -> str:
        """All of it as one line for people."""
        words = [self.state if self.pid is None else f"running (pid {self.pid})"]
        if self.state == "finished":
            words.append({True: "safe to ship", False: "do not ship", None: "not judged"}[self.passed])
            words += ["by rules set by hand"] if self.by_hand else []
        elif self.stage is not None:
            words.append(f"{self.stage}, step {self.step}")
            shown = {"loss": "loss/total", "images/s": "speed/images_per_s"}
            words += [f"{word} {self.metrics[key]:.4g}" for word, key in shown.items() if key in self.metrics]
        if self.state in ("failed", "interrupted") and self.checkpoints:
            last = ", ".join(f"{stage} {name}" for stage, name in self.checkpoints.items())
            words.append(f"checkpoints: {last}")
        return ", ".join(words)


def find_run(run: Path, root: Path) -> Path:
    """The directory of a run that was named by it or, below ``root``, by its name. Errors: ConfigError."""
    for place in (run, root / run):
        if (place / "config.json").is_file():
            return place.resolve()
    there = ", ".join(path.name for path in runs_below(root)) or "none"
    raise ConfigError(f"{run} is no run: neither it nor {root / run} holds a config.json. Runs of {root}: {there}")


def runs_below(root: Path) -> list[Path]:
    """Directories of runs, by name."""
    return sorted(path.parent for path in root.glob("*/config.json"))


def status_of(run_dir: Path) -> RunStatus:
    """Read it; nothing is locked or changed."""
    pid = holder(run_dir / "tracking.jsonl")
    report = read_report(run_dir / "report.json")
    last = _last_metrics(run_dir / "tracking.jsonl")
    gate = judged_before(run_dir)
    if gate is not None and report is not None and any(gate.get(key) != report.get(key) for key in _JUDGED):
        gate = None  # the verdict on a report that was there before this one
    state: State = "interrupted"
    if pid is not None:
        state = "running"
    elif report is not None:
        state = "finished"
    elif (run_dir / "failure.log").exists():
        state = "failed"
    whole = {
        folder.parent.name: [path.parent.name for path in folder.glob(f"step-*[0-9]/{MANIFEST}")]
        for folder in sorted(run_dir.glob("*/checkpoints"))
    }
    return RunStatus(
        run_dir.name,
        state,
        pid,
        last.get("key"),
        last.get("step"),
        last.get("metrics", {}),
        None if gate is None else bool(gate.get("passed")),
        {stage: max(names) for stage, names in whole.items() if names},
        gate is not None and bool(gate.get("overridden")),
    )


def _last_metrics(spool: Path) -> dict[str, Any]:
    """The last point of a stage: of the driver's own load nothing is said."""
    try:
        with spool.open("rb") as file:
            file.seek(max(0, spool.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("kind") == "metrics" and event.get("key") != "parent":
            return event
    return {}


def stop_run(run_dir: Path, timeout_s: float) -> None:
    """Ask the run's driver to end, as Ctrl-C does, and wait until it has. Errors: RunError when it does not, or none is at work."""
    pid = holder(run_dir / "tracking.jsonl")
    if pid is None:
        raise RunError(f"run {run_dir} has no driver at work on this machine; lce status {run_dir} says what it is at")
    os.kill(pid, signal.SIGTERM)
    deadline_s = time.monotonic() + timeout_s
    while holder(run_dir / "tracking.jsonl") == pid:
        if time.monotonic() > deadline_s:
            raise RunError(
                f"run {run_dir}: its driver (pid {pid}) still works {timeout_s:.0f} s after SIGTERM. Wait, or kill -9 {pid}: "
                "the same command then goes on from the last checkpoint"
            )
        time.sleep(_POLL_S)


def profile_run(run_dir: Path, steps: int, timeout_s: float) -> tuple[Path, Path]:
    """Ask a run that trains for a profile of its next steps, and wait for the trace and the table.

    Errors: ConfigError for a number of steps; RunError when the run has ended, or gives none in time.
    """
    if not 1 <= steps <= MOST_PROFILED:
        raise ConfigError(f"--steps is {steps}; must be 1 to {MOST_PROFILED}")
    status = status_of(run_dir)
    if status.state == "finished":
        raise RunError(f"run {run_dir} has finished; there are no steps left to record")
    before = set(run_dir.glob(_TRACES))
    request = run_dir / PROFILE_FILE
    partial = run_dir / f"{PROFILE_FILE}.partial"
    partial.write_text(f"{steps}\n")
    partial.replace(request)
    deadline_s = time.monotonic() + timeout_s
    while not (found := sorted(set(run_dir.glob(_TRACES)) - before)):
        if time.monotonic() > deadline_s:
            taken = not request.exists()
            request.unlink(missing_ok=True)
            why = (
                "its steps are under way" if taken else "no rank has asked what there is to do: it is not training now"
            )
            raise RunError(f"run {run_dir} gave no profile in {timeout_s:.0f} s; {why} ({status.line()})")
        time.sleep(_POLL_S)
    return found[0], found[0].with_name(found[0].name.replace(".json.gz", ".txt"))


def write_launch(run_dir: Path, config: Config, nodes: str, workers_per_node: int, with_independent: bool) -> None:
    """Keep what ``lce resume`` needs: the settings, with places as seen from here, and what the command line added."""
    values = {
        "config": config.with_absolute_places().model_dump(mode="json"),
        "nodes": nodes,
        "workers_per_node": workers_per_node,
        "with_independent": with_independent,
    }
    partial = run_dir / f"{LAUNCH_FILE}.partial"
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(run_dir / LAUNCH_FILE)


def read_launch(run_dir: Path) -> tuple[Config, dict[str, Any]]:
    """What ``write_launch`` kept. Errors: ConfigError."""
    path = run_dir / LAUNCH_FILE
    try:
        values = json.loads(path.read_text())
        settings = values.pop("config")
    except (OSError, ValueError, KeyError, AttributeError):
        raise ConfigError(f"{path} is absent or damaged; run the training command itself again, it goes on") from None
    return parse_config(settings, str(path), json_mode=True), values
