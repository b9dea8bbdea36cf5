"""LCE with its terms of images: DeepSpeed's step on any number of ranks equals plain SGD over net, rows and maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.batch import Batch
from lce_dist.compat.frozen_rows import steady_margin
from lce_dist.compat.methods.lce import Lce
from lce_dist.compat.old_space import OldSpace
from lce_dist.compat.transformed import rotating_subset
from lce_dist.compat.vector_weights import vector_weights_for
from lce_dist.config import CompatConfig, HeadConfig, OptimConfig
from lce_dist.head.build import build_head
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.margins import CosFace
from lce_dist.head.rows import initial_rows
from lce_dist.head.sampling import drawn_flags
from lce_dist.training.engine import Engine
from lce_dist.training.step import Compatibility, train_step
from lce_dist.world import World, shard_bounds

CLASSES, NEW, OLD, ROWS, STEPS = 9, 4, 3, 12, 4
HEAD = {"loss": "cosface", "margin_cos": 0.2, "scale": 8.0, "chunk_classes": 4}


def compat_of(mode: str, kind: str) -> CompatConfig:
    weights = {"align_weight": 3.0, "boundary_weight": 2.0, "pair_weight": 1.5, "contrast_weight": 0.0}
    return CompatConfig.model_validate({"mode": mode, "boundary": kind, "align_share": 0.5, **weights})


def old_dim(mode: str) -> int:
    return NEW if mode == "training-direct" else OLD


def module(inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, NEW))


def old_model(images: torch.Tensor, dim: int) -> torch.Tensor:
    return images.flatten(1)[:, :dim] + 0.1


def inputs(dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 2, 2, generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    centres = F.normalize(torch.randn(CLASSES, dim, generator=generator))
    return images, labels, centres, torch.full((CLASSES,), 0.6)


def trained(world: World, mode: str, kind: str, accumulation: int, rate: float) -> dict[str, torch.Tensor]:
    images, labels, centres, bound = inputs(old_dim(mode))
    rows = tuple((r + 1) * ROWS // world.size - r * ROWS // world.size for r in range(world.size))
    low = sum(rows[: world.rank])
    own = slice(low, low + rows[world.rank])
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    space = OldSpace(centres[first:last], bound[first:last], torch.ones(last - first), CLASSES, first)
    config = compat_of(mode, kind)
    maps = (None, None) if mode == "training-direct" else (module(OLD, NEW, 1), module(NEW, OLD, 2))
    head_config = HeadConfig.model_validate({**HEAD, "sample_rate": rate, "sample_policy": "dense"})
    weights = vector_weights_for(config, head_config.scale, CLASSES, NEW)
    method = Lce(config.manner, config, space, *maps, 3, weights, head_config.scale, steady_margin(head_config))
    optim = OptimConfig(global_batch=ROWS, accumulation=accumulation, clip_norm=0.0, precision="fp32")
    head = build_head(head_config, optim, CLASSES, NEW, 7, world, lambda step: 0.2, method.anchor())
    engine = Engine(net(), optim, world, method)
    assert method.uses_old_vectors
    compat = Compatibility(method, space, lambda images, sample_ids: old_model(images, old_dim(mode)))
    batch = Batch(images[own], labels[own], torch.arange(own.start, own.stop), rows)
    losses = []
    for step in range(STEPS):
        terms = train_step(engine, head, batch, step, 0.2, world, compat)
        engine.step(0.1)
        head.step()
        losses.append(terms.total)
    found = {name: value for name, value in engine.tensors().items() if name.startswith("weight.")}
    return {**found, "rows": head.rows.weight.load(slice(None)).clone(), "loss": torch.stack(losses)}


def outside(bound: torch.Tensor, cos: torch.Tensor, kind: str) -> torch.Tensor:
    return (bound - cos if kind == "cos" else torch.acos(cos) - torch.acos(bound)).clamp_min(0.0)


def plain(mode: str, kind: str, rate: float) -> dict[str, torch.Tensor]:
    """One process, whole matrices, autograd, torch.optim.SGD."""
    images, labels, centres, bound = inputs(old_dim(mode))
    model, forth, back = net(), module(OLD, NEW, 1), module(NEW, OLD, 2)
    rows = initial_rows(0, CLASSES, NEW, 7).requires_grad_()
    decay = OptimConfig().weight_decay
    parameters = [p for part in (model, forth, back) for p in part.parameters()]
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=decay)
    rows_sgd = torch.optim.SGD([rows], lr=0.2, momentum=0.9, weight_decay=decay)
    old = F.normalize(old_model(images, old_dim(mode)))
    losses = []
    for step in range(STEPS):
        unit = F.normalize(model(images))
        weights = torch.full((ROWS,), 1 / ROWS)
        drawn = drawn_flags(7, step, rate, 0, CLASSES)
        active = torch.nonzero(drawn | torch.isin(torch.arange(CLASSES), labels)).squeeze(1)
        place = torch.searchsorted(active, labels)
        loss = dense_margin_softmax(unit, rows[active], place, weights, None, CosFace(0.2), 8.0, None, World())
        turn = rotating_subset(3, step, 2, 0, CLASSES)
        turn = turn[drawn[turn]]
        if len(turn) and mode != "training-direct":
            row = F.normalize(rows[turn])
            there = (F.normalize(forth(centres[turn])) * row).sum(1)
            here = (F.normalize(back(row)) * centres[turn]).sum(1)
            loss = loss + 3.0 * (1.0 - 0.5 * (there + here)).sum() * 2 / CLASSES / rate
        if mode == "training-direct":
            far = outside(bound[labels], (unit * centres[labels]).sum(1), kind)
            pair = 1.0 - (unit * old).sum(1)
        elif mode.endswith("backward"):
            far = outside(bound[labels], (F.normalize(back(unit)) * centres[labels]).sum(1), kind)
            pair = 1.0 - (F.normalize(back(unit)) * old).sum(1)
        else:
            row = F.normalize(rows[labels]).detach()
            far = outside((unit.detach() * row).sum(1), (F.normalize(forth(old)) * row).sum(1), kind)
            pair = 1.0 - (F.normalize(forth(old)) * unit).sum(1)
        loss = loss + 2.0 * far.mean() + 1.5 * pair.mean()
        losses.append(loss.detach().double())
        if mode == "training-direct":  # the head aligns rows in its update, and does not tell it as a loss
            loss = loss + 3.0 * (1.0 - (F.normalize(rows) * centres).sum(1)).mean()
        sgd.zero_grad()
        rows_sgd.zero_grad()
        loss.backward()
        sgd.step()
        rows_sgd.step()
    if mode == "training-direct":  # without maps the network is the engine's only module
        found = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
        return {**found, "rows": rows.detach(), "loss": torch.stack(losses)}
    found = {f"weight.net.{name}": p.detach() for name, p in model.named_parameters()}
    found |= {f"weight.beside.forth.{name}": p.detach() for name, p in forth.named_parameters()}
    found |= {f"weight.beside.back.{name}": p.detach() for name, p in back.named_parameters()}
    return {**found, "rows": rows.detach(), "loss": torch.stack(losses)}


@pytest.mark.parametrize(
    ("size", "mode", "kind", "accumulation", "rate"),
    [
        (1, "training-direct", "cos", 1, 1.0),
        (3, "training-direct", "angle", 2, 1.0),
        (1, "training-backward", "cos", 1, 1.0),
        (2, "training-backward", "angle", 3, 1.0),
        (3, "training-backward", "cos", 1, 0.6),
        (1, "training-forward", "cos", 2, 1.0),
        (2, "training-forward", "cos", 1, 0.6),
        (3, "training-forward", "angle", 1, 1.0),
    ],
)
def test_maps_rows_and_network_move_as_in_plain_sgd(run_distributed, size, mode, kind, accumulation, rate):
    parts, truth = run_distributed(trained, size, mode, kind, accumulation, rate), plain(mode, kind, rate)
    for key, value in truth.items():
        found = torch.cat([part["rows"] for part in parts]) if key == "rows" else parts[0][key]
        torch.testing.assert_close(found, value, rtol=2e-4, atol=2e-6)
    if mode == "training-direct":
        return
    before = module(OLD, NEW, 1)[0].weight
    assert not torch.allclose(parts[0]["weight.beside.forth.0.weight"], before, atol=1e-4)


def test_the_comparison_can_fail(run_distributed):
    part = run_distributed(trained, 1, "training-backward", "cos", 1, 1.0)[0]
    truth = plain("training-forward", "cos", 1.0)
    assert not torch.allclose(part["weight.beside.back.0.weight"], truth["weight.beside.back.0.weight"], rtol=1e-3)
