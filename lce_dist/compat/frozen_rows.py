"""Classification by rows that nobody trains, such as old centres: the head's own softmax, in its chunks and formats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lce_dist.compat.old_space import OldSpace
from lce_dist.config import HeadConfig
from lce_dist.head import margins
from lce_dist.head.build import margin_of
from lce_dist.head.layer import ShardedHead
from lce_dist.head.rows import ClassRows
from lce_dist.head.softmax import Chunk, MicroBatch
from lce_dist.world import World


def frozen_rows(unit_SE: torch.Tensor, space: OldSpace) -> ClassRows:
    """Class rows of this shard that are classified by and never trained: no optimizer state."""
    return ClassRows.from_weight(unit_SE.float(), (), "fp32", "fp32", False, space.num_classes, space.first_class, 0)


def softmax_over_frozen(
    emb_GD: torch.Tensor,
    labels_G: torch.Tensor,
    weight_G: torch.Tensor,
    rows: ClassRows,
    margin: margins.Margin,
    head: ShardedHead,
    world: World,
) -> torch.Tensor:
    """The head's margin softmax (scale, formats, chunks) over all of ``rows``, which get no gradient; a global loss.

    The gradient is taken in the forward pass: rows of the head itself may have moved by the time of backward.
    Exponentials are recomputed: the head's are kept, and two sets would not fit where one does.
    **Memory**: G * chunk_classes values. **Collectives**: one all-reduce of 3G floats.
    """
    size = head.chunk_classes
    chunks = []
    for low in range(0, rows.num_local, size):
        high = min(low + size, rows.num_local)
        chunks.append(Chunk(slice(low, high), low, high))
    settings = replace(head.settings, kept=None)
    micro = MicroBatch(rows, chunks, None, margin, settings, None, None, world, emb_GD, labels_G, weight_G)
    loss: torch.Tensor = _Frozen.apply(emb_GD, micro)
    return loss


def steady_margin(config: HeadConfig) -> margins.Margin:
    """The head's margin as it acts without running statistics and norms, which belong to the head's own classes.

    AdaFace at a norm of the mean is cos - m; MagFace is ArcFace with its lower margin; CurricularFace is ArcFace.
    """
    if config.loss == "adaface":
        return margins.CosFace(config.margin_rad or 0.0)
    if config.loss in ("magface", "curricularface"):
        return margins.ArcFace(config.margin_rad or 0.0, straight_through=config.straight_through)
    return margin_of(config)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, emb_GD: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
        total = micro.forward(None)[0]
        grad_GD, _ = micro.backward(torch.ones_like(total), None)
        ctx.save_for_backward(grad_GD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_GD,) = ctx.saved_tensors
        return grads[0] * grad_GD, None
