"""Drills: what is lost when a process is killed, a file is damaged, a disk is full; and what checkpoints cost.

    python -m benchmarks.faults [--quick] [--out DIR]

Real runs (Ray, DeepSpeed, DALI, MLflow) on one rank are killed at random moments of their whole length, once the worker and
once the driver, and compared with an undisturbed one: weights bit for bit, report, batches, points in MLflow. A checkpoint's writer is
killed before each of its operations on the file system. Takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from benchmarks.faults_cost import measure_cost
from benchmarks.record import Mark, file_stem, write_record
from lce_dist import storage
from lce_dist.errors import RunError
from lce_dist.world import World

NAME = "faults"
ALONE = World()
KILLED = 77  # exit code of a writer that was ended by its drill
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
epochs = 60.0
[new]
net = "tiny8-gn"
embedding_dim = 32
epochs = 240.0
[head]
loss = "cosface"
scale = 16.0
margin_cos = 0.1
[optim]
global_batch = 24
zero_stage = 1
[checkpoint]
every_steps = {EVERY_STEPS}
evaluate = "off"
[tracking]
every_steps = {EVERY_STEPS}
"""


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """What checkpoint ``step`` of the writer drills holds."""
    return {"rows": torch.full((4096, 64), float(step)), "net": torch.full((512,), float(step))}


def save(directory: Path, step: int) -> None:
    storage.save(directory / f"step-{step:08d}", tensors_of(step), {"step": step}, ALONE)


def whole_steps(directory: Path) -> list[int]:
    """Steps of committed checkpoints; raises where one does not hold what its writer gave it."""
    steps = []
    for path in sorted(directory.glob("step-*")):
        if path.name[5:].isdigit():
            step = int(path.name[5:])
            reason = storage.damage(path, ALONE)
            found = {name: torch.zeros_like(value) for name, value in tensors_of(step).items()}
            storage.load(path, found, ALONE)
            if reason is not None or any(
                not torch.equal(found[name], value) for name, value in tensors_of(step).items()
            ):
                raise AssertionError(f"{path}: {reason or 'other values'}")
            steps.append(step)
    return steps


@contextmanager
def ends_before(operation: int, seen: list[str]) -> Iterator[None]:
    """End this process, as SIGKILL would, before its ``operation``-th operation on the file system."""

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(seen) == operation:
                os._exit(KILLED)
            seen.append(name)
            return real(*args, **kwargs)

        return wrapper

    with (
        mock.patch("os.fsync", counted("fsync", os.fsync)),
        mock.patch("shutil.rmtree", counted("rmtree", shutil.rmtree)),
        mock.patch.object(Path, "rename", counted("rename", Path.rename)),
        mock.patch.object(Path, "mkdir", counted("mkdir", Path.mkdir)),
        mock.patch.object(Path, "open", counted("open", Path.open)),
        mock.patch.object(Path, "unlink", counted("unlink", Path.unlink)),
    ):
        yield


def killed_writers(folder: Path) -> dict[str, int]:
    """A writer killed before each operation of a save: what is committed afterwards is whole, and the next save works."""
    context = multiprocessing.get_context("fork")
    operation = first_kept = 0
    for step_saved in (2, 1):  # beside the one that is there, and in its place
        operation = 0
        while True:
            directory = folder / f"{step_saved}-{operation}"
            save(directory, 1)

            def child(directory: Path = directory, operation: int = operation, step: int = step_saved) -> None:
                torch.set_num_threads(1)
                with ends_before(operation, []):
                    save(directory, step)

            process = context.Process(target=child)
            process.start()
            process.join()
            if process.exitcode not in (0, KILLED):
                raise AssertionError(f"the writer ended with {process.exitcode}")
            steps = whole_steps(directory)
            if step_saved == 2 and 1 not in steps:
                raise AssertionError(f"the checkpoint before was lost at operation {operation}")
            first_kept += steps == [1]
            save(directory, 3)
            if 3 not in whole_steps(directory):
                raise AssertionError("what the killed writer left was in the way")
            shutil.rmtree(directory)
            if process.exitcode == 0:
                break
            operation += 1
    return {"operations": operation, "moments": first_kept}


def damaged_files(folder: Path) -> int:
    """Each file of a checkpoint cut, emptied, changed in one bit, removed; the manifest of another release. Returns the cases found."""
    save(folder, 1)
    found = 0
    path = folder / "step-00000001"
    for name in sorted(file.name for file in path.iterdir()):
        content = (path / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        harms: dict[str, bytes | None] = {"cut": content[:-7], "emptied": b"", "bit": bytes(flipped), "removed": None}
        if name == storage.MANIFEST:
            harms["later version"] = content.replace(b'"version": 1', b'"version": 9')
            harms["other program"] = content.replace(storage.FORMAT.encode(), b"another")
            del harms["bit"]  # in a manifest it may change a word that only its reader judges
        for harm in harms.values():
            (path / name).unlink()
            if harm is not None:
                (path / name).write_bytes(harm)
            reason = storage.damage(path, ALONE)
            if reason is None or str(path) not in reason:
                raise AssertionError(f"{name}: {reason}")
            found += 1
            (path / name).write_bytes(content)
    if storage.damage(path, ALONE) is not None:
        raise AssertionError("restored, and still refused")
    return found


def full_disk(folder: Path) -> bool | None:
    """A save on a file system without room: refused in words, and the one before stays. None where none can be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode != 0:
        return None
    try:
        save(folder, 1)
        try:
            save(folder, 2)
        except RunError as error:
            return "No space left" in str(error) and whole_steps(folder) == [1]
        return False
    finally:
        subprocess.run(["umount", str(folder)], check=False)


@dataclass(frozen=True)
class Kill:
    """One drill. at_s: since the start; recovery_s: from the kill to the next step, where it fell into training."""

    who: str
    at_s: float
    stage: str
    repeated_steps: int
    recovery_s: float | None
    same_weights: bool
    same_report: bool
    same_batches: bool
    missing_points: int
    double_points: int


def command(folder: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "train", "--config", str(folder / "drill.toml"), "--name", name]


def environment() -> dict[str, str]:
    checkout = str(Path(__file__).resolve().parents[1])
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}, "PYTHONPATH": checkout}


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(folder, name),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def lines_of(run: Path) -> dict[str, int]:
    """Steps that each stage has done so far."""
    return {
        stage: len((run / stage / "batch_ids.tsv").read_bytes().splitlines())
        for stage in ("old", "new")
        if (run / stage / "batch_ids.tsv").exists()
    }


def checkpoints_of(run: Path, stage: str) -> int:
    names = (path.name[5:] for path in (run / stage / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def drill(folder: Path, who: str, at_s: float, number: int) -> Kill:
    """Start a run, kill ``who`` of it at a moment, start it again where that is needed, and compare it with "calm"."""
    name = f"{who}-{number}"
    run = folder / "runs" / name
    process = start(folder, name)
    started = time.monotonic()
    while time.monotonic() - started < at_s and process.poll() is None:
        time.sleep(0.01)
    victims = [process.pid] if who == "driver" else []
    while who == "worker" and not victims and process.poll() is None:
        victims = workers_of(process.pid)
        time.sleep(0.02)
    for victim in victims:
        try:
            os.kill(victim, 9)
        except ProcessLookupError:
            victims = []
    if who == "driver":
        process.wait()
    killed = time.monotonic()
    done = lines_of(run)
    stage = "new" if "new" in done else "old" if "old" in done else "before training"
    saved = checkpoints_of(run, stage)
    if who == "driver":
        process = start(folder, name)
    recovery_s, before, lowest = None, done.get(stage, 0), done.get(stage, 0)
    while process.poll() is None:
        now = lines_of(run).get(stage, 0)
        lowest = min(lowest, now)
        if recovery_s is None and victims and (now > before or now != lowest):
            recovery_s = time.monotonic() - killed
        time.sleep(0.05)
    if process.returncode != 0:
        raise AssertionError(f"{name}: ended with {process.returncode} after a kill of the {who} at {at_s:.1f} s")
    calm = folder / "runs" / "calm"
    weights = [load_file(path / "new" / "model.safetensors") for path in (calm, run)]
    reports = [json.loads((path / "report.json").read_text()) for path in (calm, run)]
    points = {path.name: mlflow_points(folder, path) for path in (calm, run)}
    return Kill(
        who,
        at_s,
        stage,
        max(0, before - saved) if victims else 0,
        recovery_s if before and before < total_steps(calm, stage) else None,
        weights[0].keys() == weights[1].keys()
        and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]),
        all(reports[0][key] == reports[1][key] for key in ("old_old", "new_old", "new_new", "criterion_met")),
        all(
            (calm / stage / "batch_ids.tsv").read_bytes() == (run / stage / "batch_ids.tsv").read_bytes()
            for stage in ("old", "new")
        ),
        len(set(points["calm"]) - set(points[name])),
        len(points[name]) - len(set(points[name])),
    )


def total_steps(run: Path, stage: str) -> int:
    return lines_of(run).get(stage, 0)


def workers_of(pid: int) -> list[int]:
    found = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            if any("RayTrainWorker" in part for part in child.cmdline()):
                found.append(child.pid)
    except psutil.NoSuchProcess:
        pass
    return found


def mlflow_points(folder: Path, run: Path) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of every point that MLflow's own database holds."""
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    children = json.loads((run / "tracking.json").read_text())["runs"]
    return [
        (stage, point.step, point.value)
        for stage in ("old", "new")
        for point in client.get_metric_history(children[stage], "loss/total")
    ]


def run_drills(folder: Path, kills: int) -> tuple[float, list[Kill]]:
    """Seconds of the undisturbed run, and the drills at random moments of it."""
    (folder / "drill.toml").write_text(CONFIG)
    started = time.monotonic()
    subprocess.run(command(folder, "calm"), cwd=folder, env=environment(), check=True, capture_output=True)
    seconds = time.monotonic() - started
    draw, done = random.Random(1), []
    for number in range(kills):
        for who in ("worker", "driver"):
            done.append(drill(folder, who, draw.uniform(0.1, 0.95) * seconds, number))
            print(json.dumps(asdict(done[-1])), flush=True)
            shutil.rmtree(folder / "runs" / f"{who}-{number}")
    return seconds, done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kill each, a smaller table; a few minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        writers = killed_writers(folder / "writers")
        damages = damaged_files(folder / "damages")
        full = full_disk(folder / "full")
        print(
            f"writers killed before each operation: {writers}; damages found: {damages}; full disk: {full}", flush=True
        )
        cost = measure_cost(folder / "cost", 10_000 if arguments.quick else 100_000)
        print(json.dumps(cost), flush=True)
        (folder / "runs").mkdir()
        calm_s, kills = run_drills(folder, 1 if arguments.quick else 10)
    recoveries = [kill.recovery_s for kill in kills if kill.recovery_s is not None]
    repeated = max(kill.repeated_steps for kill in kills)
    same = sum(kill.same_weights and kill.same_report and kill.same_batches for kill in kills)
    marks = [
        Mark("a writer killed at any operation: nothing committed is damaged", True, "holds", True),
        Mark("damaged files that were told and named", float(damages), "all", damages > 0),
        Mark("full disk: refused in words, the one before stays", bool(full), "holds", full is not False),
        Mark(
            "kills after which the run is the undisturbed one, bit for bit",
            same / len(kills),
            "= 1",
            same == len(kills),
        ),
        Mark("points missing or double in MLflow", float(points_wrong(kills)), "= 0", points_wrong(kills) == 0),
        Mark("steps repeated, at most", float(repeated), f"<= {2 * EVERY_STEPS}", repeated <= 2 * EVERY_STEPS),
        Mark(
            "kill to next step, median seconds",
            statistics.median(recoveries or [0.0]),
            "<= 60",
            max(recoveries or [0]) <= 60,
        ),
        Mark("a checkpoint each 500 steps: share of the steps' time", cost["share"], "<= 0.02", cost["share"] <= 0.02),
    ]
    raw = {"writers": writers, "damages": damages, "full_disk": full, "cost": cost, "calm_s": calm_s}
    stem = file_stem(NAME + ("-quick" if arguments.quick else ""))
    return write_record(NAME, arguments.out, marks, raw | {"kills": [asdict(kill) for kill in kills]}, stem)


def points_wrong(kills: list[Kill]) -> int:
    return sum(kill.missing_points + kill.double_points for kill in kills)


if __name__ == "__main__":
    sys.exit(main())
