"""A record of some steps of the first rank by torch.profiler: a trace for a viewer, and a table for the eye."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lce_dist.world import World

_ROWS = 30


class StepProfile:
    """``start``, then ``step`` after each step; both cost nothing while none is under way, and on other ranks."""

    def __init__(self, directory: Path, world: World) -> None:
        self._directory, self._world = directory, world
        self._left = 0
        self._recorded: profile | None = None

    def start(self, steps: int) -> None:
        """Record the next ``steps`` steps; nothing when a record is under way."""
        if self._world.is_first and self._recorded is None:
            device = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
            self._recorded, self._left = profile(activities=[ProfilerActivity.CPU, *device]), steps
            self._recorded.start()

    def step(self, done: int) -> tuple[Path, Path] | None:
        """The trace and the table, when step number ``done`` was the last of them."""
        if self._recorded is None:
            return None
        self._left -= 1
        if self._left > 0:
            return None
        recorded, self._recorded = self._recorded, None
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        recorded.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        trace, table = self._directory / f"step-{done:08d}.json.gz", self._directory / f"step-{done:08d}.txt"
        partial = self._directory / f"partial-{trace.name}"
        recorded.export_chrome_trace(str(partial))
        by = "self_cuda_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
        table.write_text(recorded.key_averages().table(sort_by=by, row_limit=_ROWS))
        partial.replace(trace)  # the trace is there when both are
        return trace, table
