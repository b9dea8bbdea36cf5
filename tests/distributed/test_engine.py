"""DeepSpeed's step equals plain SGD on the whole batch; its state moves to other ranks, stages and processes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.batch import Batch
from lce_dist.collectives import all_reduce_sum
from lce_dist.compat.frozen_rows import steady_margin
from lce_dist.compat.methods.lce import Lce
from lce_dist.compat.old_space import OldSpace
from lce_dist.compat.vector_weights import VectorWeights
from lce_dist.config import CompatConfig, HeadConfig, OptimConfig
from lce_dist.head.build import build_head
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.identity import identity_tensor
from lce_dist.head.layer import ShardedHead
from lce_dist.head.margins import CosFace
from lce_dist.head.rows import initial_rows
from lce_dist.training.checkpoint import Checkpoints
from lce_dist.training.engine import Engine
from lce_dist.training.step import train_step
from lce_dist.world import World, shard_bounds

CLASSES, DIM, ROWS = 9, 4, 12
HEAD = HeadConfig(loss="cosface", margin_cos=0.2, scale=8.0, chunk_classes=4)
COMPAT = CompatConfig(align_weight=3.0, boundary_weight=2.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, DIM))


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(ROWS, 3, 2, 2, generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    centres = F.normalize(torch.randn(CLASSES, DIM, generator=generator))
    return images, labels, centres, torch.full((CLASSES,), 0.5)


def parts_of(world: World, optim: OptimConfig, head_config: HeadConfig) -> tuple[Engine, ShardedHead, Batch]:
    images, labels, centres, bound = inputs()
    rows = tuple((r + 1) * ROWS // world.size - r * ROWS // world.size for r in range(world.size))
    low = sum(rows[: world.rank])
    own = slice(low, low + rows[world.rank])
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    space = OldSpace(centres[first:last], bound[first:last], torch.ones(last - first), CLASSES, first)
    method = Lce(
        "direct", COMPAT, space, None, None, 3, VectorWeights(0.0, 0.0), head_config.scale, steady_margin(head_config)
    )
    head = build_head(head_config, optim, CLASSES, DIM, 7, world, lambda step: 0.2, method.anchor())
    batch = Batch(images[own], labels[own], torch.arange(own.start, own.stop), rows)
    return Engine(net(), optim, world, method), head, batch


def train(
    world: World, optim: OptimConfig, steps: int, folder: str | None = None, head_config: HeadConfig = HEAD
) -> dict[str, torch.Tensor]:
    engine, head, batch = parts_of(world, optim, head_config)
    identities = identity_tensor([str(c) for c in range(*shard_bounds(CLASSES, world.rank, world.size))], 0, world)
    checkpoints = Checkpoints(Path(folder or "unused") / "ck", 2, engine, head, identities, world)
    first = 0
    if folder is not None:
        state = checkpoints.resume("print", lambda text: None)
        first = 0 if state is None else state["step"]
    losses = []
    for step in range(first, steps):
        terms = train_step(engine, head, batch, step, 0.2, world)
        engine.step(0.1)
        alignment = all_reduce_sum(head.step(), world)
        losses.append(terms.total + COMPAT.align_weight * alignment.double())
        if folder is not None:
            checkpoints.save(step + 1, {"fingerprint": "print"})
    checkpoints.finish()
    return {
        **{name: t for name, t in engine.tensors().items() if world.rank == 0},
        **{f"head.{name}": tensor.clone() for name, tensor in head.tensors().items()},
        "rows": head.rows.weight.load(slice(0, head.rows.num_local)).clone(),
        "loss": torch.stack(losses) if losses else torch.zeros(0),
        "first": torch.tensor(first),
    }


def plain(optim: OptimConfig, steps: int) -> dict[str, torch.Tensor]:
    """The same training in one process: whole batch, dense head, autograd, torch.optim.SGD."""
    images, labels, centres, bound = inputs()
    model, rows = net(), initial_rows(0, CLASSES, DIM, 7).requires_grad_()
    decay = optim.weight_decay
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    model_sgd = torch.optim.SGD(groups, lr=0.1, momentum=optim.momentum, weight_decay=decay)
    rows_sgd = torch.optim.SGD([rows], lr=0.2, momentum=optim.momentum, weight_decay=decay)
    losses = []
    for _ in range(steps):
        emb = model(images)
        weights = torch.full((ROWS,), 1 / ROWS)
        loss = dense_margin_softmax(emb, rows, labels, weights, None, CosFace(0.2), 8.0, None, World())
        loss = loss + 3.0 * (1 - (F.normalize(rows) * centres).sum(1)).mean()
        loss = loss + 2.0 * (bound[labels] - (F.normalize(emb) * centres[labels]).sum(1)).clamp_min(0).mean()
        losses.append(loss.detach().double())
        model_sgd.zero_grad()
        rows_sgd.zero_grad()
        loss.backward()
        if optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        model_sgd.step()
        rows_sgd.step()
    return {
        "rows": rows.detach(),
        "loss": torch.stack(losses),
        **{f"weight.{n}": p.detach() for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize(
    ("size", "zero_stage", "accumulation", "clip_norm"),
    [(1, 0, 1, 0.0), (1, 1, 2, 0.3), (2, 0, 1, 0.3), (2, 1, 3, 0.3), (3, 2, 2, 0.0), (4, 1, 1, 0.3), (3, 1, 4, 0.3)],
)
def test_step_equals_plain_sgd_on_the_whole_batch(run_distributed, size, zero_stage, accumulation, clip_norm):
    optim = OptimConfig(
        global_batch=ROWS, accumulation=accumulation, zero_stage=zero_stage, clip_norm=clip_norm, precision="fp32"
    )
    parts, truth = run_distributed(train, size, optim, 4), plain(optim, 4)
    for part in parts:
        torch.testing.assert_close(part["loss"], truth["loss"], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(torch.cat([p["rows"] for p in parts]), truth["rows"], rtol=1e-4, atol=2e-6)
    for name, value in truth.items():
        if name.startswith("weight."):
            torch.testing.assert_close(parts[0][name], value, rtol=1e-4, atol=2e-6)


def test_clipping_matters_in_these_cases():
    free, clipped = plain(OptimConfig(clip_norm=0.0), 4), plain(OptimConfig(clip_norm=0.3), 4)
    assert not torch.allclose(free["weight.1.weight"], clipped["weight.1.weight"], rtol=1e-3)


def test_bf16_stays_near_fp32(run_distributed):
    results = [
        run_distributed(train, 2, OptimConfig(global_batch=ROWS, precision=precision), 4)[0]["loss"]
        for precision in ("fp32", "bf16")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)
    assert not torch.equal(results[0], results[1])


HEADS = {
    "fp32": HEAD,
    "split rows, bf16 momentum": HEAD.model_copy(update={"rows": "split", "state": "bf16"}),
    "adamw": HEAD.model_copy(update={"optimizer": "adamw", "state": "bf16"}),
    "sampled, lazy": HEAD.model_copy(update={"sample_rate": 0.4, "sample_policy": "lazy"}),
    "adaface": HeadConfig(loss="adaface", margin_rad=0.4, scale=8.0, chunk_classes=4),
}


@pytest.mark.parametrize("name", HEADS)
def test_resume_is_bitwise_and_moves_to_other_ranks_and_stages(run_distributed, tmp_path, name):
    optim, config = OptimConfig(global_batch=ROWS, zero_stage=1, precision="fp32"), HEADS[name]
    undisturbed = run_distributed(train, 2, optim, 6, None, config)
    run_distributed(train, 2, optim, 3, str(tmp_path), config)
    resumed = run_distributed(train, 2, optim, 6, str(tmp_path), config)
    assert resumed[0]["first"] == 3
    for key, value in undisturbed[0].items():
        if key.startswith(("weight.", "momentum.")):
            assert torch.equal(resumed[0][key], value), key
    for key in (key for key in undisturbed[0] if key.startswith("head.")):
        assert torch.equal(torch.cat([p[key] for p in resumed]), torch.cat([p[key] for p in undisturbed])), key

    # step 6 is on disk: three ranks and another ZeRO stage read the very same numbers
    other = OptimConfig(global_batch=ROWS, zero_stage=2, precision="fp32")
    moved = run_distributed(train, 3, other, 6, str(tmp_path), config)
    assert moved[0]["first"] == 6
    for key, value in undisturbed[0].items():
        if key.startswith(("weight.", "momentum.")):
            assert torch.equal(moved[0][key], value), key
    for key in (key for key in undisturbed[0] if key.startswith("head.")):
        assert torch.equal(torch.cat([p[key] for p in moved]), torch.cat([p[key] for p in undisturbed])), key


def test_a_damaged_checkpoint_is_passed_over(run_distributed, tmp_path):
    optim = OptimConfig(global_batch=ROWS, precision="fp32")
    run_distributed(train, 2, optim, 3, str(tmp_path))
    newest = tmp_path / "ck" / "step-00000003"
    shard = sorted(newest.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    (tmp_path / "ck" / "step-00000009.partial").mkdir()  # left by a killed writer
    assert run_distributed(train, 2, optim, 3, str(tmp_path))[0]["first"] == 2
