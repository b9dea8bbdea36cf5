"""Sharded equals dense: loss and both gradients, on 1 to 4 ranks, with shards and batches that do not divide."""

import pytest
import torch
import torch.nn.functional as F

from lce_dist.collectives import gather_rows
from lce_dist.config import HeadConfig
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.layer import ShardedHead, initial_rows
from lce_dist.head.margins import margin_of
from lce_dist.head.optimizer import HeadSGD
from lce_dist.world import World, shard_bounds

ROWS, DIM, SEED = 11, 6, 5
HEADS = {
    "arcface": HeadConfig(loss="arcface", margin_rad=0.5, scale=48.0, chunk_classes=3),
    "cosface": HeadConfig(loss="cosface", margin_cos=0.35, scale=64.0, chunk_classes=4),
    "softmax": HeadConfig(loss="softmax", scale=16.0, chunk_classes=100),
}


def data(num_classes: int, labels: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw embeddings (ROWS, DIM), labels, row weights; float64 so that only real errors show."""
    generator = torch.Generator().manual_seed(num_classes)
    emb = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    chosen = torch.randint(num_classes, (ROWS,), generator=generator)
    if labels == "all on one shard":
        chosen = torch.full_like(chosen, num_classes - 1)
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    return emb, chosen, weights


def rows_of(size: int, uneven: bool) -> tuple[int, ...]:
    if uneven and size > 1:
        return (*(1 for _ in range(size - 2)), ROWS - (size - 2), 0)  # one row a rank, the rest, and an empty rank
    return tuple((r + 1) * ROWS // size - r * ROWS // size for r in range(size))


def sharded(world: World, head_name: str, num_classes: int, labels: str, uneven: bool) -> dict[str, torch.Tensor]:
    emb, y, row_weights = data(num_classes, labels)
    rows = rows_of(world.size, uneven)
    low = sum(rows[: world.rank])
    own = slice(low, low + rows[world.rank])
    head = ShardedHead(HEADS[head_name], num_classes, DIM, SEED, world).double()
    local = emb[own].clone().requires_grad_()
    gathered = gather_rows(F.normalize(local), rows, world)
    loss = head(gathered, gather_rows(y[own], rows, world), row_weights)
    loss.backward()
    assert head.weight.grad is not None and local.grad is not None
    optimizer = HeadSGD(head, momentum=0.9, weight_decay=0.01, clip_norm=0.05)
    weight_grad = head.weight.grad.clone()
    for _ in range(2):
        head.weight.grad = weight_grad.clone()
        optimizer.step(lr=0.1)
    return {"loss": loss.detach(), "emb": local.grad, "weight": weight_grad, "updated": head.weight.detach()}


def dense(head_name: str, num_classes: int, labels: str) -> dict[str, torch.Tensor]:
    emb, y, row_weights = data(num_classes, labels)
    config = HEADS[head_name]
    emb.requires_grad_()
    weight = initial_rows(0, num_classes, DIM, SEED).double().requires_grad_()
    loss = dense_margin_softmax(emb, weight, y, row_weights, margin_of(config), config.scale)
    loss.backward()
    assert weight.grad is not None and emb.grad is not None
    grad = weight.grad.clone()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        weight.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([weight], 0.05)
        optimizer.step()
    return {"loss": loss.detach(), "emb": emb.grad, "weight": grad, "updated": weight.detach()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("head_name", "num_classes", "labels", "uneven"),
    [
        ("arcface", 10, "spread", False),  # 10 classes: 3, 3, 3, 1 on four ranks
        ("cosface", 13, "spread", True),
        ("softmax", 3, "spread", False),  # fewer classes than ranks: an empty shard
        ("cosface", 9, "all on one shard", True),  # shards without a positive; duplicated labels
        ("arcface", 5, "spread", True),  # 2, 2, 1, 0
    ],
)
def test_loss_gradients_and_update_equal_dense(run_distributed, size, head_name, num_classes, labels, uneven):
    parts = run_distributed(sharded, size, head_name, num_classes, labels, uneven)
    truth = dense(head_name, num_classes, labels)
    for part in parts:
        torch.testing.assert_close(part["loss"], truth["loss"], rtol=1e-12, atol=1e-12)
    for key in ("emb", "weight", "updated"):
        whole = torch.cat([part[key] for part in parts])
        torch.testing.assert_close(whole, truth[key], rtol=1e-9, atol=1e-11)


def test_the_comparison_can_fail(run_distributed):
    parts = run_distributed(sharded, 2, "cosface", 13, "spread", False)
    truth = dense("arcface", 13, "spread")
    assert not torch.allclose(torch.cat([part["weight"] for part in parts]), truth["weight"], rtol=1e-3)


@pytest.mark.parametrize(("num_classes", "size"), [(10, 3), (3, 4), (1, 1), (7, 7)])
def test_shards_cover_every_class_once(num_classes, size):
    bounds = [shard_bounds(num_classes, rank, size) for rank in range(size)]
    assert [c for low, high in bounds for c in range(low, high)] == list(range(num_classes))
    chunks = [len(chunk) for chunk in torch.arange(num_classes).chunk(size)]
    assert [high - low for low, high in bounds if high > low] == chunks
