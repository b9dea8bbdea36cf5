"""Update rules for a chunk of class rows whose gradient is complete: no gradient of the whole table exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class RowGradient:
    """The gradient product_K * product_KD + along_K * weight_KD + old_K * old_KD + extra_KD, formed where it is used.

    The projection off the row's own direction and the alignment with old centres are multiples of the
    rows themselves, so they cost a factor each.
    """

    product_KD: torch.Tensor | None
    product_K: torch.Tensor | None
    along_K: torch.Tensor
    old_KD: torch.Tensor | None
    old_K: torch.Tensor | None
    extra_KD: torch.Tensor | None

    def add_to(self, sum_KD: torch.Tensor, weight_KD: torch.Tensor, decay: float) -> None:
        """sum_KD += gradient + decay * weight_KD."""
        if self.product_KD is not None and self.product_K is not None:
            sum_KD.addcmul_(self.product_KD, self.product_K[:, None])
        elif self.product_KD is not None:
            sum_KD.add_(self.product_KD)
        sum_KD.addcmul_(weight_KD, (self.along_K + decay)[:, None])
        if self.old_KD is not None and self.old_K is not None:
            sum_KD.addcmul_(self.old_KD, self.old_K[:, None])
        if self.extra_KD is not None:
            sum_KD.add_(self.extra_KD)


class Rule(Protocol):
    """How rows change; ``state_names`` are the (S, D) tensors that it keeps."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names, in the order of their noise."""
        ...

    def apply(
        self,
        weight_KD: torch.Tensor,
        state: dict[str, torch.Tensor],
        gradient: RowGradient | None,
        lr: float,
        step: int,
    ) -> None:
        """Change rows and state in place; ``gradient`` None means zero. ``step`` counts from 0."""
        ...


@dataclass(frozen=True)
class SGD:
    """v <- momentum * v + g + decay * w; w <- w - lr * v, as torch.optim.SGD does."""

    momentum: float
    weight_decay: float
    state_names: tuple[str, ...] = ("momentum",)

    def apply(
        self,
        weight_KD: torch.Tensor,
        state: dict[str, torch.Tensor],
        gradient: RowGradient | None,
        lr: float,
        step: int,
    ) -> None:
        v_KD = state["momentum"].mul_(self.momentum)
        if gradient is None:
            v_KD.add_(weight_KD, alpha=self.weight_decay)
        else:
            gradient.add_to(v_KD, weight_KD, self.weight_decay)
        weight_KD.sub_(v_KD, alpha=lr)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled decay, as torch.optim.AdamW does. **Source**: Loshchilov, Hutter, ICLR 2019."""

    beta1: float
    beta2: float
    weight_decay: float
    epsilon: float = 1e-8
    state_names: tuple[str, ...] = ("first", "second")

    def apply(
        self,
        weight_KD: torch.Tensor,
        state: dict[str, torch.Tensor],
        gradient: RowGradient | None,
        lr: float,
        step: int,
    ) -> None:
        first_KD, second_KD = state["first"].mul_(self.beta1), state["second"].mul_(self.beta2)
        if gradient is not None:
            g_KD = torch.zeros_like(weight_KD)
            gradient.add_to(g_KD, weight_KD, 0.0)
            first_KD.add_(g_KD, alpha=1.0 - self.beta1)
            second_KD.addcmul_(g_KD, g_KD, value=1.0 - self.beta2)
        weight_KD.mul_(1.0 - lr * self.weight_decay)
        size_KD = second_KD.sqrt().mul_(1.0 / math.sqrt(1.0 - self.beta2 ** (step + 1))).add_(self.epsilon)
        weight_KD.addcdiv_(first_KD, size_KD, value=-lr / (1.0 - self.beta1 ** (step + 1)))
