"""A stage whose loss leaves the finite numbers: every rank stops in the same step and leaves its last steps behind."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lce_dist.batch import Batch
from lce_dist.config import Config
from lce_dist.errors import Interrupted, RunError
from lce_dist.head.rows import local_classes
from lce_dist.training.loop import Stage, train_stage
from lce_dist.world import World

CLASSES, DIM, STEPS = 6, 4, 80


def trained(world: World, folder: str, breaks_at: int | None, stop: bool) -> str:
    config = Config.model_validate(
        {
            "data": {"shards": "unused"},
            "old": {"net": "unused"},
            "new": {"net": "unused"},
            "head": {"loss": "softmax", "scale": 8.0},
            "optim": {"lr": 0.01, "precision": "fp32", "global_batch": 8},
            "tracking": {"every_steps": 1},
            "checkpoint": {"every_steps": 1000},
        }
    )
    root = Path(folder)
    keys = tuple(f"id{number}" for number in range(CLASSES))[slice(*local_classes(CLASSES, world))]
    stage = Stage("new", CLASSES, DIM, STEPS, 7, root / "run", "print", None, keys, None, root)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM))
    rows = tuple(8 // world.size for _ in range(world.size))
    if stop and world.is_first:
        (root / "stop").touch()

    @contextmanager
    def batches_from(first: int):
        def batches():
            for step in range(first, STEPS):
                images = torch.randn(rows[world.rank], 3, 2, 2)
                if step == breaks_at and world.rank == world.size - 1:
                    images[0, 0, 0, 0] = float("nan")
                labels = torch.arange(len(images)) % CLASSES
                yield Batch(images, labels, labels, rows)

        yield batches()

    with pytest.raises((RunError, Interrupted)) as caught:
        train_stage(stage, net, config, None, batches_from, lambda ids: f"{len(ids)} ids", world, lambda event: None)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_the_last_steps_are_left_where_a_stage_fails(run_distributed, tmp_path, size):
    told = run_distributed(trained, size, str(tmp_path), 60, False)
    assert len(set(told)) == 1 and "finite" in told[0]
    for rank in range(size):
        record = json.loads((tmp_path / "run" / f"flight-{rank}.json").read_text())
        assert record["rank"] == rank and record["error"].startswith("RunError: ") and record["peak_memory_bytes"] > 0
        numbers = [one["step"] for one in record["steps"]]
        assert numbers == list(range(numbers[-1] - 49, numbers[-1] + 1)) and numbers[-1] in (60, 61)
        assert all(isinstance(one["losses"]["total"], float) for one in record["steps"][:-1])
        assert all(one["rows"] == 8 and one["seconds"] >= one["data_wait_s"] >= 0.0 for one in record["steps"])
        assert {one["batch_ids"] for one in record["steps"]} == ({"8 ids"} if rank == 0 else {None})
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")), "nothing that is not finite is saved"


def test_asked_to_stop_is_no_failure(run_distributed, tmp_path):
    told = run_distributed(trained, 2, str(tmp_path), None, True)
    assert all(text.startswith("stopped as asked after step 1 of 80") for text in told)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert not list((tmp_path / "run").glob("flight-*"))
