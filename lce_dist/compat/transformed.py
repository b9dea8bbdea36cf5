"""Alignment through learned maps between the spaces, on a subset of the classes that rotates through all of them.

A map costs millions of operations a class, so a step evaluates a stated share of the classes; every class
comes once in each cycle, and the terms are scaled so that a cycle's mean is the mean over all classes.
**Source**: Meng et al., ICCV 2021, transformed manners of LCE.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lce_dist.head.sampling import class_bits

Map = Callable[[torch.Tensor], torch.Tensor]


def rotating_subset(
    seed: int, step: int, period: int, first_class: int, last_class: int, device: torch.device | None = None
) -> torch.Tensor:
    """Local numbers (N,), rising, of the classes whose turn ``step`` is: about 1 / period of them.

    Each class has one turn in steps k * period ... (k + 1) * period - 1, at a place drawn anew for every k
    and by (seed, k, class) alone, so any cut over ranks gives the same subset.
    """
    if period < 1:
        raise ValueError(f"period is {period}; must be at least 1")
    turn = class_bits(seed, step // period, first_class, last_class, device) % period
    return torch.nonzero(turn == step % period).squeeze(1)


def transformed_alignment(
    weight_ND: torch.Tensor,
    old_ND: torch.Tensor,
    old_to_new: Map,
    new_to_old: Map,
    num_classes: int,
    period: int,
    class_weight_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """This shard's part of the loss: half of 1 - cos(T12(old centre), row), half of 1 - cos(T21(row), old centre).

    weight_ND, old_ND: class rows (any length) and old centres (unit) of the rotating subset; dimensions may
    differ. class_weight_N: weights with mean 1 over all classes (None: all 1). The sum over ranks, averaged over a cycle of ``period`` steps, is the mean over all classes.
    Differentiable in the rows and in the maps' parameters; the rows' gradient goes to
    ``ShardedHead.add_row_gradient``.
    """
    unit_ND = F.normalize(weight_ND)
    forward_N = (F.normalize(old_to_new(old_ND)) * unit_ND).sum(1)
    backward_N = (F.normalize(new_to_old(unit_ND)) * old_ND).sum(1)
    apart_N = 1.0 - 0.5 * (forward_N + backward_N)
    if class_weight_N is not None:
        apart_N = apart_N * class_weight_N
    return apart_N.sum() * (period / num_classes)
