"""The contrast of new vectors and old centres: against loops in float64, the same on 1 to 3 ranks, seen classes alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lce_dist.compat.contrast import contrast_loss
from lce_dist.compat.old_space import OldSpace
from lce_dist.head.margins import ArcFace, CosFace, Margin, PlainSoftmax
from lce_dist.world import World, shard_bounds

CLASSES, DIM, ROWS, SCALE = 9, 6, 14, 8.0
MARGINS: dict[str, Margin] = {"softmax": PlainSoftmax(), "cosface": CosFace(0.2), "arcface": ArcFace(0.3)}
SEEN = torch.tensor([True, False, True, True, True, False, True, True, True])


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw vectors, labels with classes of several rows and classes of none, weights, centres."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(ROWS, DIM, generator=generator)
    labels = torch.tensor([0, 1, 1, 2, 4, 4, 4, 5, 7, 7, 8, 0, 2, 4])
    weight = torch.rand(ROWS, generator=generator) / ROWS
    return raw, labels, weight, F.normalize(torch.randn(CLASSES, DIM, generator=generator))


def on_rank(world: World, splits: tuple[int, ...], margin: str, seen_only: bool) -> dict[str, torch.Tensor]:
    raw, labels, weight, centres = rows()
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    share = SEEN.float()[first:last] * CLASSES / SEEN.sum() if seen_only else None
    space = OldSpace(centres[first:last], torch.zeros(last - first), torch.ones(last - first), CLASSES, first, share)
    low = sum(splits[: world.rank])
    own = slice(low, low + splits[world.rank])
    mine = raw[own].clone().requires_grad_()
    loss = contrast_loss(F.normalize(mine), labels, weight, own, space, SCALE, MARGINS[margin], world)
    loss.backward()
    assert mine.grad is not None
    return {"loss": loss.detach(), "raw": mine.grad}


def by_loops(margin: str, seen_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    raw, labels, weight, centres = rows()
    raw, weight, centres = raw.double().requires_grad_(), weight.double(), centres.double()
    classes = [c for c in range(CLASSES) if c in labels and (SEEN[c] or not seen_only)]
    loss = raw.new_zeros(())
    for vector, label, share in zip(raw, labels.tolist(), weight, strict=True):
        if label not in classes:
            continue
        unit = vector / vector.norm()
        values = {c: (unit * centres[c]).sum() for c in classes}
        if margin == "cosface":
            values[label] = values[label] - 0.2
        if margin == "arcface":
            angle = torch.acos(values[label])
            assert angle + 0.3 < math.pi
            values[label] = torch.cos(angle + 0.3)
        total = sum((SCALE * value).exp() for value in values.values())
        loss = loss + share * (torch.as_tensor(total).log() - SCALE * values[label])
    loss.backward()
    assert raw.grad is not None
    return loss.detach(), raw.grad


@pytest.mark.parametrize("splits", [(14,), (5, 9), (14, 0), (6, 0, 8)])
@pytest.mark.parametrize(("margin", "seen_only"), [("softmax", False), ("cosface", True), ("arcface", False)])
def test_it_is_the_softmax_over_the_batchs_old_centres(run_distributed, splits, margin, seen_only):
    parts = run_distributed(on_rank, len(splits), splits, margin, seen_only)
    loss, grad = by_loops(margin, seen_only)
    for part in parts:
        torch.testing.assert_close(part["loss"].double(), loss, rtol=1e-5, atol=1e-7)
    found = torch.cat([part["raw"] for part in parts]).double()
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-7)
    if seen_only:  # rows of classes that the old model never saw are not moved
        assert not found[rows()[1] == 1].any()
    # another margin is another loss
    assert not torch.allclose(loss, by_loops("arcface" if margin != "arcface" else "softmax", seen_only)[0], rtol=1e-3)
