"""What each rank's steps are made of, who is slow, what is asked for, and a profile on demand."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lce_dist.batch import Batch
from lce_dist.collectives import all_reduce_sum
from lce_dist.config import Config
from lce_dist.head.rows import local_classes
from lce_dist.training.loop import Stage, train_stage
from lce_dist.training.ranks import RankTimes, StepTimes, rank_metrics
from lce_dist.training.requests import PROFILE_FILE, SAVE_FILE, Asked, Requests
from lce_dist.world import World

CLASSES, DIM, STEPS, ROWS = 6, 4, 30, 12


def train(world: World, folder: str, slow_s: float):
    """Events of a stage whose last rank reads slowly; a profile and a checkpoint are asked for on the way."""
    config = Config.model_validate(
        {
            "data": {"shards": "unused"},
            "old": {"net": "unused"},
            "new": {"net": "unused"},
            "head": {"loss": "softmax", "scale": 8.0},
            "optim": {"lr": 0.01, "precision": "fp32", "global_batch": ROWS},
            "tracking": {"every_steps": 1},
            "checkpoint": {"every_steps": 1000},
        }
    )
    root = Path(folder)
    keys = tuple(f"id{number}" for number in range(CLASSES))[slice(*local_classes(CLASSES, world))]
    stage = Stage("new", CLASSES, DIM, STEPS, 7, root / "new", "print", None, keys, None, root)
    rows = tuple(ROWS // world.size for _ in range(world.size))
    events = []

    @contextmanager
    def batches_from(first: int):
        def batches():
            for step in range(first, STEPS):
                if world.is_first and step == 15:
                    (root / PROFILE_FILE).write_text("4")
                    (root / SAVE_FILE).touch()
                if world.rank == world.size - 1:
                    time.sleep(slow_s)
                images = torch.randn(rows[world.rank], 3, 2, 2)
                labels = torch.arange(len(images)) % CLASSES
                yield Batch(images, labels, labels, rows)

        yield batches()

    net = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM))
    train_stage(stage, net, config, None, batches_from, lambda ids: "ids", world, events.append)
    return events


@pytest.mark.parametrize("size", [1, 2])
def test_times_a_straggler_a_profile_and_a_checkpoint_that_was_asked_for(run_distributed, tmp_path, size):
    everybody = run_distributed(train, size, str(tmp_path), 0.05)
    for rank, events in enumerate(everybody):
        points = [event for event in events if event["type"] == "metrics"]
        assert len(points) == STEPS
        for event in points[5:]:
            assert event["own"].step_s >= event["own"].data_wait_s + event["own"].communication_s > -1.0
            told = event["metrics"]
            assert told["ranks/data_wait_s_max"] >= 0.05 and told["ranks/step_s"] >= 0.05
            assert told["ranks/memory_gib_max"] > 0.01
            assert (event["own"].data_wait_s >= 0.05) == (rank == size - 1)
            if size > 1 and rank == 0:  # it waits in the first collective of the step
                assert event["own"].communication_s >= 0.03
        slowest = [event["metrics"]["ranks/slowest"] for event in points[1:14]]  # before a profile slows the first rank
        assert sum(one == size - 1 for one in slowest) >= 10
        notes = [event["text"] for event in events if event["type"] == "warning"]
        assert len(notes) == (size > 1)
        if size > 1:
            assert notes[0].startswith("rank 1 is slow, and the others wait for it: 0.0") and "for data" in notes[0]
        assert [event["step"] for event in events if event["type"] == "checkpoint"] == [16, STEPS]
        profiles = [event for event in events if event["type"] == "profile"]
        assert len(profiles) == (rank == 0)
    (profile,) = [event for event in everybody[0] if event["type"] == "profile"]
    assert profile["step"] == 20
    trace, table = map(Path, profile["files"])
    recorded = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#SGD.step" for event in recorded) >= 4
    assert "aten::" in table.read_text()
    assert not (tmp_path / PROFILE_FILE).exists() and not (tmp_path / SAVE_FILE).exists()


def asked(world: World, folder: str) -> list[Asked]:
    requests = Requests(Path(folder), world)
    before = requests.read()
    if world.is_first:
        (Path(folder) / PROFILE_FILE).write_text("no number")
    all_reduce_sum(torch.zeros(1), world)
    nonsense = requests.read()
    if world.rank == world.size - 1:  # a file system may show a file to one rank first
        (Path(folder) / PROFILE_FILE).write_text("7")
    return [before, nonsense, requests.read()]


@pytest.mark.parametrize("size", [1, 3])
def test_every_rank_is_asked_the_same(run_distributed, tmp_path, size):
    for answers in run_distributed(asked, size, str(tmp_path)):
        assert answers == [Asked(), Asked(), Asked(profile_steps=7)]
    assert Requests(None, World()).read() == Asked()


def test_a_straggler_is_told_once_and_only_after_a_while():
    times = RankTimes(World())
    usual, slow = StepTimes(0.2, 0.0, 0.1, 1.0), StepTimes(0.2, 0.0, 0.01, 1.0)
    told = [times.straggler([usual, usual, slow]) for _ in range(30)]
    assert [number for number, text in enumerate(told) if text] == [9]
    assert told[9] == "rank 2 is slow, and the others wait for it: 0.190 s a step; the median rank takes 0.100 s"
    assert times.straggler([usual, usual, usual]) is None
    assert [times.straggler([usual, slow, usual]) is not None for _ in range(10)] == [False] * 9 + [True]
    assert rank_metrics([usual, slow])["ranks/slowest"] == 1.0
