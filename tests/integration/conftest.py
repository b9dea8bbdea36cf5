"""A small run as a user starts it: the command in a process of its own, in an empty directory."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.synthetic import draw_photo

CHECKOUT = Path(__file__).resolve().parents[2]
CANARY = "canary-7f3a91c2"  # a secret of the environment, which must be found nowhere
CONFIG = """
[run]
name = "small"
[data]
image_size = 32
heldout_identities = 8
[data.synthetic]
identities = 24
photos_per_identity = 6
photo_size = 64
[old]
net = "tiny8"
embedding_dim = 32
epochs = 10.0
[new]
net = "NET"
embedding_dim = 32
epochs = 30.0
[head]
loss = "cosface"
scale = 16.0
margin_cos = 0.1
[optim]
global_batch = 24
zero_stage = 1
[checkpoint]
every_steps = 10
[tracking]
every_steps = 10
"""


@dataclass(frozen=True)
class Workplace:
    """A directory to run ``lce`` in, and what it leaves there."""

    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "launch.cli", *arguments]

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        secrets = {"MLFLOW_TRACKING_PASSWORD": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY, "SOME_API_TOKEN": CANARY}
        return {**kept, **secrets, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env={**self.environment(), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    def report(self, name: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folder / "runs" / name / "report.json").read_text())
        return report

    def batch_ids(self, name: str, stage: str) -> list[str]:
        return (self.folder / "runs" / name / stage / "batch_ids.tsv").read_text().splitlines()

    def losses(self, name: str, stage: str) -> dict[int, float]:
        """Total loss by step, as it was sent to MLflow."""
        points: dict[int, float] = {}
        for line in (self.folder / "runs" / name / "tracking.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["kind"] == "metrics" and event["key"] == stage and "loss/total" in event["metrics"]:
                points[event["step"]] = event["metrics"]["loss/total"]
        return points

    def points(self, name: str, stage: str, every: int) -> list[tuple[int, float]]:
        """(step, loss) of each point that MLflow holds, where ``every`` divides the step."""
        runs = json.loads((self.folder / "runs" / name / "tracking.json").read_text())["runs"]
        client = MlflowClient(f"sqlite:///{self.folder}/runs/mlflow.db")
        history = client.get_metric_history(runs[stage], "loss/total")
        return sorted((point.step, point.value) for point in history if point.step % every == 0)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("work place")  # a space, as users have
    write_pairs(folder / "drawn.bin")
    (folder / "small.toml").write_text(CONFIG.replace("NET", "tiny16") + '[evaluation]\npairs = ["drawn.bin"]\n')
    (folder / "gn.toml").write_text(CONFIG.replace("NET", "tiny8-gn").replace('"tiny8"', '"tiny8-gn"'))
    return Workplace(folder)


def write_pairs(path: Path, num_pairs: int = 20) -> None:
    """A pair file as arcface_torch ships them, of drawn faces that no run has: half of its pairs are of one person."""
    images = []
    for number in range(2 * num_pairs):
        pair, second = divmod(number, 2)
        person = pair if pair % 2 == 0 else pair + 1000 * second
        jpeg = io.BytesIO()
        Image.fromarray(draw_photo(99, person, number, 64, 0.3)).save(jpeg, "JPEG")
        images.append(jpeg.getvalue())
    path.write_bytes(pickle.dumps((images, [pair % 2 == 0 for pair in range(num_pairs)])))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float) -> None:
    """Wait until ``condition`` holds; fails when the process ends first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training workers that descend from a driver, its raylets included."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found
