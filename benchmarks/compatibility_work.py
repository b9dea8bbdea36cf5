"""Tasks that depend on each other, done by a few processes, each result one file: what is there is not done again.

A file appears whole or not at all, so the same command goes on after any kind of end.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Perform = Callable[["Task"], Result]


@dataclass(frozen=True)
class Task:
    """settings: all that its result depends on, as plain values; they name its file. job: what to do, for who does it.

    group: tasks of one group take about the same time, for the estimate of what is left. needs: keys of other tasks.
    """

    title: str
    group: str
    settings: dict[str, Any] = field(hash=False)
    job: Any = field(hash=False, compare=False)
    needs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """20 hex digits over the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:20]


class Results:
    """``directory``/KEY.json for each finished task."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Result | None:
        """The result; None where there is none, or none that can be read."""
        try:
            found: Result = json.loads((self.directory / f"{key}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def put(self, key: str, result: Result) -> None:
        partial = self.directory / f"{key}.{os.getpid()}.partial"
        with partial.open("w") as file:
            json.dump(result, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.directory / f"{key}.json")


def perform_all(
    tasks: Sequence[Task],
    results: Results,
    start: Callable[..., Perform],
    arguments: tuple[Any, ...],
    num_processes: int,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Do what is not done, in order as far as needs allow; what failed, by key, with its traceback.

    ``start(*arguments)`` is called once in every process and gives the function that performs a task. What needs a
    failed task fails with it; the rest goes on.
    """
    done = {task.key for task in tasks if results.get(task.key) is not None}
    waiting = [task for task in tasks if task.key not in done]
    say(f"{len(tasks)} tasks, {len(done)} done before")
    failed: dict[str, str] = {}
    if not waiting:
        return failed
    clock = _Clock(tasks, results, num_processes)
    context = multiprocessing.get_context("spawn")
    pipes: dict[Connection, Task | None] = {}
    processes = []
    for _ in range(min(num_processes, len(waiting))):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, results.directory, start, arguments), daemon=True)
        process.start()
        there.close()
        pipes[here] = None
        processes.append(process)
    try:
        while waiting or any(pipes.values()):
            for task in [task for task in waiting if any(need in failed for need in task.needs)]:
                waiting.remove(task)
                failed[task.key] = f"{task.title}: needs a task that failed"
            for pipe in [pipe for pipe, busy in pipes.items() if busy is None]:
                ready = next((task for task in waiting if done.issuperset(task.needs)), None)
                if ready is None:
                    break
                waiting.remove(ready)
                pipes[pipe] = ready
                pipe.send(ready)
            at_work = {pipe: task for pipe, task in pipes.items() if task is not None}
            if not at_work:  # all that was left needed what failed
                continue
            happened = wait([*at_work, *(process.sentinel for process in processes)])
            if any(process.sentinel in happened for process in processes):
                titles = ", ".join(repr(task.title) for task in at_work.values())
                raise RuntimeError(
                    f"a process at work on {titles} was ended from outside; start the same command again"
                )
            for pipe, task in at_work.items():
                if pipe not in happened:
                    continue
                good, answer, seconds = pipe.recv()
                pipes[pipe] = None
                if good:
                    done.add(task.key)
                    clock.add(task, seconds)
                    say(f"{clock.line(waiting, pipes.values())}  {task.title}: {answer} ({seconds:.1f} s)")
                else:
                    failed[task.key] = answer
                    say(f"FAILED  {task.title}: {answer.strip().splitlines()[-1]}")
    finally:
        for process in processes:
            process.kill()
    return failed


class _Clock:
    """How long is left, from what tasks of each group took."""

    def __init__(self, tasks: Sequence[Task], results: Results, num_processes: int) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._processes = num_processes
        self._started = time.perf_counter()
        self._total = len(tasks)
        for task in tasks:
            known = results.get(task.key)
            if known is not None:
                self.add(task, known["seconds"])

    def add(self, task: Task, seconds: float) -> None:
        self._seconds.setdefault(task.group, []).append(seconds)

    def line(self, waiting: Sequence[Task], at_work: Any) -> str:
        everything = [s for group in self._seconds.values() for s in group]
        mean = sum(everything) / len(everything)
        half_done = sum(task is not None for task in at_work)

        def of(task: Task) -> float:
            known = self._seconds.get(task.group)
            return sum(known) / len(known) if known else mean

        left_s = (sum(of(task) for task in waiting) + 0.5 * half_done * mean) / self._processes
        passed_s = time.perf_counter() - self._started
        count = self._total - len(waiting) - half_done
        return f"[{count}/{self._total}] {passed_s / 60:.1f} min, about {left_s / 60:.0f} min left"


def _serve(pipe: Connection, directory: Path, start: Callable[..., Perform], arguments: tuple[Any, ...]) -> None:
    results = Results(directory)
    perform: Perform | None = None
    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:  # the parent is gone
            return
        started = time.perf_counter()
        try:
            if perform is None:
                perform = start(*arguments)
                started = time.perf_counter()
            result = perform(task)
            seconds = time.perf_counter() - started
            results.put(task.key, {"title": task.title, "settings": task.settings, "seconds": seconds, **result})
            pipe.send((True, result["line"], seconds))
        except BrokenPipeError:  # the parent is gone, and the result is kept
            return
        except Exception:  # noqa: BLE001 - told to the parent with its traceback
            pipe.send((False, traceback.format_exc(), 0.0))
