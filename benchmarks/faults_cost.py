"""What a checkpoint costs the training: the same steps with one and without, beside the bytes that it writes."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lce_dist.batch import Batch
from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.head.build import build_head
from lce_dist.head.identity import identity_tensor
from lce_dist.training.checkpoint import Checkpoints
from lce_dist.training.engine import Engine
from lce_dist.training.step import train_step
from lce_dist.world import World

DIM, ROWS, EVERY, ROUNDS = 512, 256, 500, 3
_LR = 1e-3
_HEAD = HeadConfig(loss="cosface", margin_cos=0.4, scale=64.0)


def measure_cost(folder: Path, num_classes: int) -> dict[str, float]:
    """Seconds of a step, of taking a copy, of the steps beside the writing; and their share of ``EVERY`` steps.

    The network is one linear layer, so a step is the classification layer alone: real steps are longer, shares smaller.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World()
    chance = torch.Generator().manual_seed(1)
    head = build_head(_HEAD, OptimConfig(global_batch=ROWS), num_classes, DIM, 1, world, lambda step: _LR)
    images = torch.randn((ROWS, 3, 8, 8), generator=chance)
    batch = Batch(images, torch.randint(num_classes, (ROWS,), generator=chance), torch.arange(ROWS), (ROWS,))
    engine = Engine(nn.Sequential(nn.Flatten(), nn.Linear(192, DIM)), OptimConfig(global_batch=ROWS), world)
    keys = identity_tensor([f"{number:08d}" for number in range(num_classes)], 0, world)
    checkpoints = Checkpoints(folder, 1, engine, head, keys, world)
    steps = 0

    def step() -> float:
        nonlocal steps
        started = time.perf_counter()
        train_step(engine, head, batch, steps, _LR, world, None)
        engine.step(_LR)
        head.step()
        steps += 1
        return time.perf_counter() - started

    step()
    usual, copies, extra, sync = [], [], [], []
    for number in range(ROUNDS):
        usual += [step() for _ in range(4)]
        plain_s = statistics.median(usual)
        started = time.perf_counter()
        checkpoints.save(2 * number + 1, {"fingerprint": "cost"})
        copies.append(time.perf_counter() - started)
        beside = [step()]
        while not checkpoints.committed():
            beside.append(step())
        extra.append(max(0.0, sum(beside) - plain_s * len(beside)))
        started = time.perf_counter()
        checkpoints.save(2 * number + 2, {"fingerprint": "cost"})
        checkpoints.finish()
        checkpoints.committed()
        sync.append(time.perf_counter() - started)
    step_s, copy_s, extra_s = (statistics.median(values) for values in (usual, copies, extra))
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    floor_s = _write_s(folder, written)
    shutil.rmtree(folder)
    return {
        "classes": num_classes,
        "bytes": written,
        "step_s": step_s,
        "copy_s": copy_s,
        "slower_steps_s": extra_s,
        "waiting_for_it_s": statistics.median(sync),
        "floor_write_s": floor_s,
        "share": (copy_s + extra_s) / (EVERY * step_s),
    }


def _write_s(folder: Path, num_bytes: int) -> float:
    """Seconds to write and flush as many zeros: what no checkpoint can be faster than."""
    block = bytes(32 << 20)
    started = time.perf_counter()
    with (folder / "zeros").open("wb") as file:
        for low in range(0, num_bytes, len(block)):
            file.write(block[: min(len(block), num_bytes - low)])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started
