"""When workers were lost, came, had loaded and made their first step: one JSON line each, in a run's directory."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STARTS_FILE = "starts.jsonl"


class Starts:
    """Told by the driver of failures, and by the first worker of what it does; times are seconds since 1970.

    process_s: when the process began that writes this.
    """

    def __init__(self, run_dir: Path, process_s: float) -> None:
        self._path, self._process_s = run_dir / STARTS_FILE, process_s
        self._first = False

    def see(self, event: Mapping[str, Any]) -> None:
        """Write down a failure, ``workers_up``, ``stage_start`` and the first step after that; pass over the rest."""
        kind = event["type"]
        is_first_step = kind == "metrics" and self._first
        self._first = kind == "stage_start" or (self._first and kind != "metrics")
        if is_first_step or kind in ("failure", "workers_up", "stage_start"):
            what = "first_step" if is_first_step else kind
            line = {"what": what, "time_s": time.time(), "process_s": self._process_s, "stage": event.get("stage")}
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """All lines that are whole, oldest first."""
    path = run_dir / STARTS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def recovery_parts(starts: list[dict[str, Any]], fault_s: float) -> dict[str, float] | None:
    """Seconds of each part of the way from a fault to the first step of workers that came after it; None: there were none.

    Ray may have begun their process before, so that a part is what was waited for, not what it took.
    """
    came = [one for one in starts if one["what"] == "workers_up" and one["time_s"] > fault_s]
    for up in came:
        own = [one for one in starts if one["process_s"] == up["process_s"] and one["time_s"] >= up["time_s"]]
        first = next((one for one in own if one["what"] == "first_step"), None)
        if first is None:
            continue
        loaded = max(one["time_s"] for one in own if one["what"] == "stage_start" and one["time_s"] <= first["time_s"])
        failures = (one["time_s"] for one in starts if one["what"] == "failure")
        noticed = min((told for told in failures if fault_s <= told <= up["time_s"]), default=fault_s)
        began = min(max(up["process_s"], noticed), up["time_s"])
        return {
            "detect_s": noticed - fault_s,
            "restart_s": began - noticed,
            "imports_s": up["time_s"] - began,
            "load_s": loaded - up["time_s"],
            "first_step_s": first["time_s"] - loaded,
        }
    return None
