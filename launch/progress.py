"""What a person sees while a run goes on: one live line a stage in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lce_dist.errors import LceError

_NAMES = {
    "old": "old model",
    "centres": "old space",
    "new": "new model",
    "independent": "independent",
    "evaluation": "evaluation",
}
_PLAIN_EVERY_S = 10.0


class RunProgress:
    """Shows events; in a terminal as bars, otherwise as a line at most every ten seconds a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}"),
            console=console,
            transient=False,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed_s: dict[str, float] = {}
        self._ranks = 0  # none before the first attempt
        self._log: TextIO | None = None
        self._early: list[str] = []  # said before there was a file

    def __enter__(self) -> RunProgress:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()
        if isinstance(error, LceError):
            self._keep(f"{type(error).__name__}: {error}")
        elif error is not None:
            self._keep(f"{type(error).__name__}: {error}; its traceback went to the terminal")
        if self._log is not None:
            self._log.close()

    def keep_in(self, path: Path) -> None:
        """Write what is told also to the end of a file, with the time."""
        self._log = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        self._log.writelines(self._early)

    def _keep(self, text: str) -> None:
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n"
        if self._log is None:
            self._early.append(line)
        else:
            with contextlib.suppress(OSError):  # a disk without room ends no run by its log
                self._log.write(line)

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._keep(text)
        self._console.print(text, highlight=False, soft_wrap=True)

    def count(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Progress of something that only counts, such as packing; detail: its speed, where it takes long."""
        self._update(what, done, total, detail, last=done == total)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event of the job; kinds that say nothing to a person are passed over."""
        kind, stage = event["type"], event.get("stage", "")
        name = _NAMES.get(stage, stage)
        if kind == "workers_up":
            ranks, before, self._ranks = event["num_ranks"], self._ranks, event["num_ranks"]
            if before == ranks:
                self.note("a worker was lost; all of them were restarted and go on from the last checkpoint")
            elif before:
                self.note(f"now {ranks} worker{'s' * (ranks > 1)}, after {before}: going on from the last checkpoint")
        elif kind == "stage_start":
            classes = f", {event['num_classes']:,} classes" if "num_classes" in event else ""
            if event["first_step"]:
                self.note(f"{name}: going on from step {event['first_step']} of {event['total_steps']}{classes}")
            elif not self._live and event["total_steps"] > 1:
                self.note(f"{name}: {event['total_steps']} steps{classes}")
            self._update(name, event["first_step"], event["total_steps"], "", last=self._live)
        elif kind == "metrics":
            self._update(
                name, event["step"], event["total_steps"], _detail(event), event["step"] == event["total_steps"]
            )
        elif kind == "stage_done":
            if name in self._tasks:
                self._progress.update(self._tasks[name], completed=self._progress.tasks[self._tasks[name]].total)
            if not self._live:
                self.note(f"{name}: done")
        elif kind == "rows_started":
            known, others = event["known_classes"], event["other_classes"]
            self.note(f"{name}: rows of {known:,} identities as given by head.start_from, {others:,} drawn")
        elif kind in ("note", "code_changed"):
            self.note(event["text"])
        elif kind == "stage_skipped":
            self.note(f"{name}: {event['why']}")
            if name in self._tasks:
                self._progress.update(self._tasks[name], completed=self._progress.tasks[self._tasks[name]].total)
        elif kind == "warning":
            self.note(f"warning: {event['text']}")
        elif kind == "profile":
            self.note(f"{name}: profile up to step {event['step']}: {event['files'][0]}")
        elif kind == "beside":
            told = {key.removeprefix("beside/"): value for key, value in event["metrics"].items()}
            cells = [
                f"{key.replace('_', '/')} {told[key]:.3f}" for key in ("old_old", "new_old", "new_new") if key in told
            ]
            self.note(f"{name}: at step {event['step']} TAR {', '.join(cells)}")
            if event["warning"] is not None:
                self.note(f"warning: {event['warning']}")

    def _update(self, name: str, done: int, total: int, detail: str, last: bool) -> None:
        if self._live:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, detail="")
            self._progress.update(self._tasks[name], completed=done, total=total, detail=detail)
        if detail or last:
            now = time.monotonic()
            if last or now - self._printed_s.get(name, -_PLAIN_EVERY_S) >= _PLAIN_EVERY_S:
                self._printed_s[name] = now
                (self._keep if self._live else self.note)(f"{name}: {done}/{total} {detail}".rstrip())


def _detail(event: dict[str, Any]) -> str:
    metrics = event["metrics"]
    if "loss/total" not in metrics:
        return ""
    parts = [f"{metrics['speed/images_per_s']:5.0f} images/s", f"loss {metrics['loss/total']:.3f}"]
    parts += [
        f"{word} {metrics[key]:.3f}"
        for word, key in (("align", "loss/alignment"), ("boundary", "loss/boundary"))
        if key in metrics
    ]
    minutes, seconds = divmod(round(event["eta_s"]), 60)
    return "  ".join([*parts, f"ETA {minutes}:{seconds:02d}"])
