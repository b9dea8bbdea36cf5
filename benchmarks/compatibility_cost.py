"""What LCE's terms add to a step at many classes: each manner and none, in turns, in one process, over the same rows.

The network is one small linear layer, so a step is the classification layer: forward, backward and update for 256
embeddings of 512 dimensions. A network of any use takes many times as long; shares of such a step are smaller still.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.record import Mark
from lce_dist.batch import Batch
from lce_dist.compat.methods import MethodInputs, build_method
from lce_dist.compat.old_space import OldSpace
from lce_dist.config import CompatConfig, HeadConfig, OptimConfig, weights_for
from lce_dist.head.build import build_head
from lce_dist.head.layer import ShardedHead
from lce_dist.training.engine import Engine
from lce_dist.training.step import Compatibility, train_step
from lce_dist.world import World

DIM, ROWS = 512, 256
MOST = 0.05  # of a step without the terms
NOTHING = "no compatibility"
MANNERS = ("training-direct", "training-backward", "training-forward")
_LR = 1e-3
_HEAD = HeadConfig(loss="cosface", margin_cos=0.4, scale=64.0)


@dataclass
class _Contestant:
    engine: Engine
    head: ShardedHead
    compat: Compatibility | None
    batch: Batch
    world: World
    steps: int = 0

    def step(self) -> None:
        self.head.anchor = self.compat.method.anchor() if self.compat is not None else None
        train_step(self.engine, self.head, self.batch, self.steps, _LR, self.world, self.compat)
        self.engine.step(_LR)
        self.head.step()
        self.steps += 1


@dataclass(frozen=True)
class Turn:
    """Seconds a step without the terms, and with them: each the mean of two, taken as none, with, with, none."""

    none: float
    with_terms: float


def measure_cost(num_classes: int, rounds: int) -> dict[str, list[Turn]]:
    """Turns by manner. A slow drift of the machine falls on both sides of a turn alike, a disturbance on one turn alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    contestants = _contestants(num_classes, World())
    for contestant in contestants.values():
        _seconds(contestant)
    turns: dict[str, list[Turn]] = {name: [] for name in MANNERS}
    for _ in range(rounds):
        for name in MANNERS:
            first = _seconds(contestants[NOTHING])
            both = _seconds(contestants[name]) + _seconds(contestants[name])
            turns[name].append(Turn((first + _seconds(contestants[NOTHING])) / 2.0, both / 2.0))
    return turns


def _seconds(contestant: _Contestant) -> float:
    started = time.perf_counter()
    contestant.step()
    return time.perf_counter() - started


def _contestants(num_classes: int, world: World) -> dict[str, _Contestant]:
    chance = torch.Generator().manual_seed(1)
    optim = OptimConfig(global_batch=ROWS)
    head = build_head(_HEAD, optim, num_classes, DIM, 1, world, lambda step: _LR)
    images = torch.randn((ROWS, 3, 8, 8), generator=chance)
    labels = torch.randint(num_classes, (ROWS,), generator=chance)
    batch = Batch(images, labels, torch.arange(ROWS), (ROWS,))
    centre_SD = F.normalize(torch.randn((num_classes, DIM), generator=chance))
    # half of the vectors inside their boundary
    cos_S = torch.linspace(-0.1, 0.1, num_classes)
    space = OldSpace(centre_SD, cos_S, torch.full((num_classes,), 10), num_classes, 0)
    old = nn.Sequential(nn.Flatten(), nn.Linear(192, DIM)).requires_grad_(False)
    contestants = {}
    for name in (NOTHING, *MANNERS):
        compat = None
        if name != NOTHING:
            config = CompatConfig.model_validate({"mode": name, **weights_for(_HEAD.scale, name)})
            inputs = MethodInputs(
                config=config,
                head=_HEAD,
                space=space,
                old_vectors=None,
                new_dim=DIM,
                old_dim=DIM,
                seed=1,
                steps=1000,
                world=world,
            )
            method = build_method("lce", inputs)
            compat = Compatibility(
                method, space, (lambda images, ids: old(images)) if method.uses_old_vectors else None
            )
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, DIM))
        engine = Engine(net, optim, world, compat.method if compat is not None else None)
        contestants[name] = _Contestant(engine, head, compat, batch, world)
    return contestants


def judge_cost(turns: dict[str, list[Turn]], num_classes: int) -> list[Mark]:
    """Print the table; a mark a manner, the median over turns of what it adds."""
    head = "a step, C = " + format(num_classes, ",") + f", B = {ROWS}"
    print(f"\n{head:32}{'none, ms':>10}{'with, ms':>10}{'added':>9}{'  of the turns, half within':>30}")
    marks = []
    for name, taken in turns.items():
        ratios = sorted(turn.with_terms / turn.none - 1.0 for turn in taken)
        added = statistics.median(ratios)
        none, with_terms = (
            1e3 * statistics.median(column) for column in zip(*((t.none, t.with_terms) for t in taken), strict=True)
        )
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        print(f"{name:32}{none:10.1f}{with_terms:10.1f}{added:9.1%}{low:20.1%} to {high:.1%}")
        manner = name.removeprefix("training-")
        marks.append(Mark(f"LCE {manner}: added to a step at C={num_classes:,}", added, f"< {MOST}", added < MOST))
    return marks


def raw_cost(turns: dict[str, list[Turn]], num_classes: int) -> dict[str, Any]:
    """What the record keeps."""
    seconds = {name: [asdict(turn) for turn in taken] for name, taken in turns.items()}
    return {"num_classes": num_classes, "batch": ROWS, "dim": DIM, "seconds_a_step": seconds}
