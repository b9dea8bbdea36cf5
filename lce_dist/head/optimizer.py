"""SGD with momentum on the local class rows, clipped by the norm over all shards."""

from __future__ import annotations

import torch

from lce_dist.collectives import all_reduce_sum
from lce_dist.head.layer import ShardedHead


class HeadSGD:
    """v <- momentum * v + g + decay * w; w <- w - lr * v, as torch.optim.SGD does, row by row.

    The norm that is clipped is that of the whole (num_classes, D) gradient, so the step does not depend
    on how the rows are cut. **Memory**: 4 * D bytes of momentum per local class.
    """

    def __init__(self, head: ShardedHead, momentum: float, weight_decay: float, clip_norm: float) -> None:
        self.head = head
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.momentum_SD = torch.zeros_like(head.weight.data)

    @torch.no_grad()
    def step(self, lr: float) -> torch.Tensor:
        """Update the rows, drop the gradient, return the global gradient norm () before clipping.

        **Collectives**: one all-reduce of one float.
        """
        weight = self.head.weight
        grad = weight.grad
        if grad is None:
            raise AssertionError("HeadSGD.step without a gradient: call backward first")
        square = all_reduce_sum(grad.double().square().sum(), self.head.world)
        norm = square.sqrt()
        if self.clip_norm > 0.0:
            grad.mul_((self.clip_norm / norm.clamp_min(1e-12)).clamp_max(1.0).to(grad.dtype))
        self.momentum_SD.mul_(self.momentum).add_(grad).add_(weight, alpha=self.weight_decay)
        weight.sub_(self.momentum_SD, alpha=lr)
        weight.grad = None
        return norm
