"""Drills: what is lost when a process is killed, hangs or is asked to end, a file is damaged, a disk is full; and what checkpoints cost.

    python -m benchmarks.faults [--quick] [--moments N] [--out DIR]

Real runs (Ray, DeepSpeed, DALI, MLflow) on two ranks meet each kind of fault at random steps of their training, and are compared with
an undisturbed one: weights bit for bit, the whole report, batches, points in MLflow. A checkpoint's writer is killed before each of its
operations on the file system. Takes about an hour on two cores that are free.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from launch.starts import read_starts, recovery_parts
from lce_dist import storage
from lce_dist.errors import Interrupted, RunError
from lce_dist.training.checkpoint import committed_steps
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
            harms["digit"] = content.replace(b'"step": 1', b'"step": 9')
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
class Drill:
    """One fault in a run of two ranks, and what became of it. at_step: of its stage, when it was done; parts: of recovery_s."""

    kind: str
    stage: str
    at_step: int
    repeated_steps: int
    recovery_s: float | None
    parts: dict[str, float] | None
    same_weights: bool
    other_in_report: list[str]
    same_batches: bool
    missing_points: int
    double_points: int

    @property
    def is_undisturbed(self) -> bool:
        """Whether its run ended as the one without a fault."""
        return self.same_weights and self.same_batches and not self.other_in_report


KINDS = (
    "worker killed",
    "driver killed",
    "worker stopped (SIGSTOP)",
    "SIGTERM to the driver",
    "head and driver killed",
)
SPEEDS = {"images_per_s", "images_per_s_by_stage"}


def command(folder: Path, name: str) -> list[str]:
    words = [sys.executable, "-m", "launch.cli", "train", "--config", str(folder / "drill.toml")]
    return [*words, "--nodes", "2", "--name", name]


def environment() -> dict[str, str]:
    checkout = str(Path(__file__).resolve().parents[1])
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}, "PYTHONPATH": checkout}


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.out").open("ab") as output:
        return subprocess.Popen(
            command(folder, name),
            cwd=folder,
            env=environment(),
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


def drill(folder: Path, kind: str, stage: str, at_step: int, number: int) -> Drill:
    """Start a run, do ``kind`` to it after a step of a stage, start it again where that is needed, and compare it with "calm"."""
    name = f"drill-{KINDS.index(kind)}-{number}"
    run = folder / "runs" / name
    process = start(folder, name)
    while steps_of(run, stage) < at_step:
        if process.poll() is not None:
            raise AssertionError(f"{name}: ended with {process.returncode} before step {at_step}")
        time.sleep(0.01)
    fault_s = time.time()
    restart = do(kind, process)
    before, saved = steps_of(run, stage), checkpoints_of(run, stage)
    if restart:
        process = start(folder, name)
    if process.wait() != 0:
        raise AssertionError(f"{name}: ended with {process.returncode} after {kind} at step {at_step} of {stage}")
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
        sorted(key for key in keys if reports[0].get(key) != reports[1].get(key)),
        all(
            (calm / stage / "batch_ids.tsv").read_bytes() == (run / stage / "batch_ids.tsv").read_bytes()
            for stage in ("old", "new")
        ),
        len(set(points["calm"]) - set(points[name])),
        len(points[name]) - len(set(points[name])),
    )


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
    """(kind, stage, step) of each drill, the same at each call; steps are drawn evenly over all of both stages."""
    draw, all_steps = random.Random(1), sum(totals.values())
    found = []
    for kind in kinds:
        for _ in range(counts[kind]):
            step = draw.randrange(1, all_steps - 1)
            stage, at = ("old", step) if step < totals["old"] else ("new", step - totals["old"] + 1)
            found.append((kind, stage, min(at, totals[stage] - 1)))
    return found


def run_drills(folder: Path, counts: Mapping[str, int]) -> tuple[float, list[Drill]]:
    """Seconds of the undisturbed run, and the drills at random moments of its training."""
    (folder / "drill.toml").write_text(CONFIG)
    started = time.monotonic()
    subprocess.run(command(folder, "calm"), cwd=folder, env=environment(), check=True, capture_output=True)
    seconds = time.monotonic() - started
    totals = {stage: steps_of(folder / "runs" / "calm", stage) for stage in ("old", "new")}
    done: list[Drill] = []
    for number, (kind, stage, step) in enumerate(moments([kind for kind in KINDS if kind in counts], counts, totals)):
        done.append(drill(folder, kind, stage, step, number))
        print(json.dumps(asdict(done[-1])), flush=True)
        shutil.rmtree(folder / "runs" / f"drill-{KINDS.index(kind)}-{number}")
    return seconds, done


def marks_of(drills: list[Drill]) -> list[Mark]:
    """What must hold of every drill."""
    same, points = sum(one.is_undisturbed for one in drills), points_wrong(drills)
    repeated = max(one.repeated_steps for one in drills)
    seconds = [one.recovery_s for one in drills if one.recovery_s is not None and "SIGSTOP" not in one.kind]
    unknown = sum(one.recovery_s is None for one in drills)
    return [
        Mark("faults after which the run is the undisturbed one", same / len(drills), "= 1", same == len(drills)),
        Mark("points missing or double in MLflow", float(points), "= 0", points == 0),
        # what was being written when it came is not there yet
        Mark("steps repeated, at most", float(repeated), f"<= {2 * EVERY_STEPS}", repeated <= 2 * EVERY_STEPS),
        Mark("faults without a step of new workers after them", float(unknown), "= 0", unknown == 0),
        Mark(
            "fault to next step, seconds, at most",
            max(seconds, default=float("nan")),
            "<= 60",
            max(seconds, default=float("inf")) <= 60,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each kind once, a smaller table; a few minutes")
    parser.add_argument(
        "--moments", type=int, default=10, help="of each kill; a third of them of the rest (default: 10)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    kills = 1 if arguments.quick else arguments.moments
    counts = {kind: kills if number < 2 else -(-kills * 3 // 10) for number, kind in enumerate(KINDS)}
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
        calm_s, drills = run_drills(folder, counts)
    marks = [
        Mark("moments at which a writer was killed and nothing was lost", float(writers["moments"]), "> 0", True),
        Mark("damaged files that were told and named", float(damages), "= all", damages > 0),
        *([] if full is None else [Mark("full disk: refused in words, the one before stays", full, "holds", full)]),
        *marks_of(drills),
        Mark("a checkpoint each 500 steps: share of the steps' time", cost["share"], "<= 0.02", cost["share"] <= 0.02),
    ]
    raw = {"writers": writers, "damages": damages, "full_disk": full, "cost": cost, "calm_s": calm_s}
    raw |= {"not_judged": ["full disk"] if full is None else [], "counts": counts, "load": os.getloadavg()}
    stem = file_stem(NAME + ("-quick" if arguments.quick else ""))
    return write_record(NAME, arguments.out, marks, raw | {"drills": [asdict(one) for one in drills]}, stem)


def points_wrong(drills: list[Drill]) -> int:
    return sum(one.missing_points + one.double_points for one in drills)


if __name__ == "__main__":
    sys.exit(main())
