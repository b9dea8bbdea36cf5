"""Drills of runs: a real one on two ranks meets a fault at a step of its training, and is compared with an undisturbed one.

What is done is kept below a folder that is named after the code: the same command goes on there, and other code begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from launch.starts import read_starts, recovery_parts
from lce_dist.errors import Interrupted
from lce_dist.training.checkpoint import committed_steps

EVERY_STEPS = 10
CONFIG = f"""
[run]
name = "drill"
[data]
image_size = 32
heldout_identities = 8
[data.synthetic]
identities = 24
photos_per_identity = 6
photo_size = 64
[old]
net = "tiny8-gn"
embedding_dim = 32
epochs = 30.0
[new]
net = "tiny8-gn"
embedding_dim = 32
epochs = 80.0
[head]
loss = "cosface"
scale = 16.0
margin_cos = 0.1
[optim]
global_batch = 24
zero_stage = 1
[faults]
stall_note_s = 20
collective_timeout_s = 20
[checkpoint]
every_steps = {EVERY_STEPS}
evaluate = "off"
[tracking]
every_steps = {EVERY_STEPS}
"""


@dataclass(frozen=True)
class Drill:
    """One fault in a run of two ranks, and what became of it. at_step: of its stage, when it was done; parts: of recovery_s.

    failed: why the run did not come to its end; None where it did.
    """

    kind: str
    stage: str
    at_step: int
    repeated_steps: int = 0
    recovery_s: float | None = None
    parts: dict[str, float] | None = None
    same_weights: bool = False
    other_in_report: tuple[str, ...] = ()
    same_batches: bool = False
    missing_points: int = 0
    double_points: int = 0
    failed: str | None = None

    @property
    def is_undisturbed(self) -> bool:
        """Whether its run ended as the one without a fault."""
        return self.failed is None and self.same_weights and self.same_batches and not self.other_in_report


KINDS = (
    "worker killed",
    "driver killed",
    "worker stopped (SIGSTOP)",
    "SIGTERM to the driver",
    "head and driver killed",
)
SPEEDS = {"images_per_s", "images_per_s_by_stage"}


def command(name: str, nodes: str = "2") -> list[str]:
    words = [sys.executable, "-m", "launch.cli", "train", "--config", "drill.toml"]
    return [*words, "--nodes", nodes, "--name", name]


def environment(**more: str) -> dict[str, str]:
    checkout = str(Path(__file__).resolve().parents[1])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return {**kept, "PYTHONPATH": checkout, **more}


def start(folder: Path, name: str, words: Sequence[str] | None = None, **more: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.out").open("ab") as output:
        return subprocess.Popen(
            words or command(name),
            cwd=folder,
            env=environment(**more),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def steps_of(run: Path, stage: str) -> int:
    """Steps that a stage has done so far."""
    log = run / stage / "batch_ids.tsv"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def checkpoints_of(run: Path, stage: str) -> int:
    return max(committed_steps(run / stage / "checkpoints"), default=0)


def do(kind: str, process: subprocess.Popen[bytes]) -> bool:
    """Do it to a run; returns whether its driver has to be started again."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in family if "RayTrainWorker" in one.name() or "RayTrainWorker" in " ".join(one.cmdline())]
    if kind == "worker killed":
        workers[0].kill()
    elif kind == "worker stopped (SIGSTOP)":
        workers[-1].suspend()
    elif kind == "SIGTERM to the driver":
        process.terminate()
        if process.wait() != Interrupted.exit_code:
            raise AssertionError(f"SIGTERM: the driver ended with {process.returncode}")
    else:
        if kind == "head and driver killed":
            for one in family:
                if one.name() in ("gcs_server", "raylet"):
                    one.kill()
        process.kill()
        process.wait()
    return process.poll() is not None


def drill(folder: Path, kind: str, stage: str, at_step: int) -> Drill:
    """Start a run, do ``kind`` to it after a step of a stage, start it again where that is needed, and compare it with "calm"."""
    name = f"drill-{KINDS.index(kind)}-{stage}-{at_step}"
    run = folder / "runs" / name
    process = start(folder, name)
    try:
        while steps_of(run, stage) < at_step:
            if process.poll() is not None:
                return Drill(kind, stage, at_step, failed=f"ended with {process.returncode} before the fault")
            time.sleep(0.01)
        fault_s = time.time()
        restart = do(kind, process)
        before, saved = steps_of(run, stage), checkpoints_of(run, stage)
        if restart:
            process = start(folder, name)
        if process.wait() != 0:
            return Drill(kind, stage, at_step, failed=f"ended with {process.returncode} after the fault")
    except AssertionError as error:
        return Drill(kind, stage, at_step, failed=str(error))
    finally:
        end(process)
    parts = recovery_parts(read_starts(run), fault_s)
    calm = folder / "runs" / "calm"
    weights = [load_file(path / "new" / "model.safetensors") for path in (calm, run)]
    reports = [json.loads((path / "report.json").read_text()) for path in (calm, run)]
    points = {path.name: mlflow_points(folder, path) for path in (calm, run)}
    keys = (reports[0].keys() | reports[1].keys()) - SPEEDS
    return Drill(
        kind,
        stage,
        at_step,
        max(0, before - saved),
        None if parts is None else sum(parts.values()),
        parts,
        weights[0].keys() == weights[1].keys()
        and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]),
        tuple(sorted(key for key in keys if reports[0].get(key) != reports[1].get(key))),
        same_batches(calm, run),
        len(set(points["calm"]) - set(points[name])),
        len(points[name]) - len(set(points[name])),
    )


def same_batches(calm: Path, run: Path) -> bool:
    """Whether both runs had the same global batches in the same order."""
    logs = ([(path / stage / "batch_ids.tsv").read_bytes() for stage in ("old", "new")] for path in (calm, run))
    return next(logs) == next(logs)


def end(process: subprocess.Popen[bytes]) -> None:
    """What a broken-off drill left must not be beside the next one."""
    if process.poll() is None:
        for one in psutil.Process(process.pid).children(recursive=True):
            one.kill()
        process.kill()
        process.wait()


def mlflow_points(folder: Path, run: Path) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of every point that MLflow's own database holds; an attempt's first step has one of its own."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    children = json.loads((run / "tracking.json").read_text())["runs"]
    return [
        (stage, point.step, point.value)
        for stage in ("old", "new")
        for point in client.get_metric_history(children[stage], "loss/total")
        if point.step % EVERY_STEPS == 0
    ]


def moments(kinds: Sequence[str], counts: Mapping[str, int], totals: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """(kind, stage, step) of each drill, the same at each call; steps are drawn evenly over all of both stages.

    More of a kind begin with those of fewer.
    """
    all_steps = sum(totals.values())
    found = []
    for kind in kinds:
        draw = random.Random(kind)
        steps: dict[tuple[str, str, int], None] = {}
        while len(steps) < counts[kind]:
            step = draw.randrange(1, all_steps - 1)
            stage, at = ("old", step) if step < totals["old"] else ("new", step - totals["old"] + 1)
            steps[kind, stage, min(at, totals[stage] - 1)] = None
        found += list(steps)
    return found


def code_folder(work: Path) -> Path:
    """Below ``work``, where drills of this code are kept: those of other code say nothing about it."""
    checkout = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256(CONFIG.encode())
    files = (file for room in ("lce_dist", "launch", "pipelines") for file in (checkout / room).rglob("*.py"))
    for file in sorted(files):
        digest.update(str(file.relative_to(checkout)).encode() + file.read_bytes())
    return work / digest.hexdigest()[:12]


def calm_run(folder: Path) -> float:
    """Seconds of the undisturbed run, which is made where it is not there."""
    told = folder / "calm.json"
    if not told.exists():
        shutil.rmtree(folder / "runs", ignore_errors=True)  # of one that was broken off
        (folder / "runs").mkdir(parents=True)
        (folder / "drill.toml").write_text(CONFIG)
        started = time.monotonic()
        subprocess.run(command("calm"), cwd=folder, env=environment(), check=True, capture_output=True)
        _write(told, {"seconds": time.monotonic() - started})
    seconds: float = json.loads(told.read_text())["seconds"]
    return seconds


def run_drills(folder: Path, counts: Mapping[str, int]) -> list[Drill]:
    """Each kind at ``counts`` random moments of the training; what was done before is read."""
    calm_run(folder)
    totals = {stage: steps_of(folder / "runs" / "calm", stage) for stage in ("old", "new")}
    done: list[Drill] = []
    asked = moments([kind for kind in KINDS if kind in counts], counts, totals)
    for number, (kind, stage, step) in enumerate(asked, start=1):
        told = folder / "drills" / f"{KINDS.index(kind)}-{stage}-{step}.json"
        if told.exists():
            found = json.loads(told.read_text())
            done.append(Drill(**{**found, "other_in_report": tuple(found["other_in_report"])}))
            continue
        run = folder / "runs" / f"drill-{KINDS.index(kind)}-{stage}-{step}"
        shutil.rmtree(run, ignore_errors=True)
        done.append(drill(folder, kind, stage, step))
        _write(told, asdict(done[-1]))
        shutil.rmtree(run, ignore_errors=True)
        print(f"[{number}/{len(asked)}] {json.dumps(asdict(done[-1]))}", flush=True)
    return done


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
