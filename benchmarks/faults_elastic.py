"""One run on nodes that go and come: 4, then 2, then 3; beside the same run on 4 that stay."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from ray.cluster_utils import Cluster

from benchmarks.faults_runs import end, mlflow_points, same_batches, start, steps_of
from benchmarks.record import Mark

EPOCHS = 2000  # long enough that nodes are missed and found, for which Ray takes a minute each
WINDOW = 20  # points of the loss, of 10 steps each
MOST_APART = 0.02  # of the mean loss of a window
_MEMORY: dict[str, Any] = {"object_store_memory": 80 << 20}


@dataclass(frozen=True)
class Elastic:
    """sizes: numbers of workers in turn; apart: largest relative distance of the mean losses of a window, and of M(new, old)."""

    sizes: tuple[int, ...]
    same_batches: bool
    missing_points: int
    double_points: int
    apart: float
    tar_apart: float


def losses_apart(calm: Sequence[tuple[str, int, float]], other: Sequence[tuple[str, int, float]]) -> float:
    """Largest relative distance of the means of the new model's loss over ``WINDOW`` points that follow each other."""
    curves = [
        [loss for _, loss in sorted({step: v for stage, step, v in points if stage == "new"}.items())]
        for points in (calm, other)
    ]
    means = [
        [statistics.fmean(curve[low : low + WINDOW]) for low in range(0, len(curve) - WINDOW + 1, WINDOW)]
        for curve in curves
    ]
    return max((abs(a - b) / max(abs(a), 1e-9) for a, b in zip(*means, strict=False)), default=float("inf"))


@contextmanager
def _cluster(num_nodes: int) -> Iterator[Cluster]:
    """A head without processors, and nodes of one each."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with mock.patch.dict(os.environ, {**clean, "RAY_AUTH_MODE": "disabled"}, clear=True):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **_MEMORY})
        try:
            for _ in range(num_nodes):
                cluster.add_node(num_cpus=1, **_MEMORY)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    deadline = time.monotonic() + 600.0
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(
                f"{what}: did not come; the run {'goes on' if process.poll() is None else process.returncode}"
            )
        time.sleep(0.05)


def elastic_drill(folder: Path) -> Elastic:
    """``folder`` holds drill.toml; a run that is there is not made again. Errors: AssertionError where a number of workers does not come."""
    for name, changing in (("elastic-calm", False), ("elastic", True)):
        if (folder / "runs" / name / "report.json").exists():
            continue
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)  # of a drill that was broken off
        (folder / f"{name}.out").unlink(missing_ok=True)
        with _cluster(4) as nodes:
            words = [sys.executable, "-m", "launch.cli", "job", "--config", "drill.toml", "--name", name]
            words += ["--nodes", "2:4" if changing else "4", "--set", f"new.epochs={EPOCHS}"]
            process = start(folder, name, words, RAY_ADDRESS=nodes.address, RAY_AUTH_MODE="disabled")
            try:
                if changing:
                    _change(folder, name, process, nodes)
                if process.wait() != 0:
                    raise AssertionError(f"{name}: ended with {process.returncode}")
            finally:
                end(process)
    calm, run = (folder / "runs" / name for name in ("elastic-calm", "elastic"))
    points = [mlflow_points(folder, path) for path in (calm, run)]
    places = [{(stage, step) for stage, step, _ in one} for one in points]
    tars = [json.loads((path / "report.json").read_text())["new_old"]["tar_at_far"]["0.01"] for path in (calm, run)]
    said = (folder / "elastic.out").read_text(errors="replace")
    sizes = (4, *(int(found) for found in re.findall(r"now (\d+) workers", said)))
    return Elastic(
        sizes,
        same_batches(calm, run),
        len(places[0] - places[1]),
        len(points[1]) - len(places[1]),
        losses_apart(*points),
        abs(tars[0] - tars[1]),
    )


def _change(folder: Path, name: str, process: subprocess.Popen[bytes], nodes: Cluster) -> None:
    run, said = folder / "runs" / name, folder / f"{name}.out"

    def workers(number: int) -> bool:
        return f"now {number} workers" in said.read_text(errors="replace")

    def steps_more(number: int) -> None:
        done = steps_of(run, "new")
        _until(lambda: steps_of(run, "new") > done + number, process, f"{number} steps more")

    _until(lambda: steps_of(run, "new") > 200, process, "the first steps")
    for node in list(nodes.worker_nodes)[:2]:
        nodes.remove_node(node, allow_graceful=False)
    _until(lambda: workers(2), process, "2 workers")
    steps_more(100)
    nodes.add_node(num_cpus=1, **_MEMORY)
    _until(lambda: workers(3), process, "3 workers")


def marks_of_elastic(found: Elastic) -> list[Mark]:
    wrong = found.missing_points + found.double_points
    in_turn = found.sizes[0] == 4 and found.sizes[-2:] == (
        2,
        3,
    )  # two nodes are lost at once, and missed one by one at times
    return [
        Mark("elastic: 4 workers became 2, and then 3", in_turn, "holds", in_turn),
        Mark("elastic: the batches of the run that stayed on 4", found.same_batches, "holds", found.same_batches),
        Mark("elastic: points missing or double in MLflow", float(wrong), "= 0", wrong == 0),
        Mark("elastic: loss apart, of means of 200 steps", found.apart, f"<= {MOST_APART}", found.apart <= MOST_APART),
    ]
