"""Which classes take part in a step: the positives and a random share of the others, drawn class by class.

Whether a class is drawn depends on (seed, step, class) alone, so any cut over ranks draws the same set.
**Source**: An et al., Partial FC, CVPR 2022, for training with a share of the negatives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 1 << 20


def active_classes(
    seed: int, step: int, rate: float, first_class: int, last_class: int, labels_G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local numbers (N,) of this shard's classes in the step, rising, and which of them (N,) were drawn.

    A positive that was not drawn takes part too; its flag is False. ``labels_G``: global labels of the
    whole step, any order, duplicates allowed.
    """
    drawn = [
        torch.nonzero(drawn_flags(seed, step, rate, low, min(low + _BLOCK, last_class))).squeeze(1)
        + (low - first_class)
        for low in range(first_class, last_class, _BLOCK)
    ]
    drawn_N = torch.cat(drawn).to(labels_G.device) if drawn else labels_G.new_zeros(0)
    local = labels_G[(labels_G >= first_class) & (labels_G < last_class)] - first_class
    active_N = torch.unique(torch.cat([drawn_N, local]))  # sorted
    return active_N, torch.isin(active_N, drawn_N, assume_unique=True)


def drawn_flags(seed: int, step: int, rate: float, first_class: int, last_class: int) -> torch.Tensor:
    """Which of the classes [first_class, last_class) are drawn in ``step``: a bool tensor on the CPU."""
    bits = class_bits(seed, step, first_class, last_class)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rate)


def class_bits(seed: int, step: int, first_class: int, last_class: int) -> npt.NDArray[np.uint64]:
    """64 random bits for each of the classes [first_class, last_class): a function of (seed, step, class)."""
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.array([seed & (2**64 - 1)], np.uint64)) + np.uint64(step))
        return _mix(key + np.arange(first_class, last_class, dtype=np.uint64) * np.uint64(_GOLDEN))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def decay_over(
    gaps_K: torch.Tensor, step: int, lr_of: Callable[[int], float], momentum: float, weight_decay: float
) -> torch.Tensor:
    """(K, 2, 2) float64 maps of (w, v) over the ``gaps_K`` steps before ``step`` in which a row had no gradient.

    One such step is v <- momentum v + decay w; w <- w - lr v, linear in (w, v), so a gap is a product of
    2 x 2 matrices. ``lr_of(i)`` is step i's learning rate.
    """
    longest = int(gaps_K.max()) if gaps_K.numel() else 0
    products = np.empty((longest + 1, 2, 2))
    products[0] = np.eye(2)
    for gap in range(1, longest + 1):
        lr = lr_of(step - gap)
        one = np.array([[1.0 - lr * weight_decay, -lr * momentum], [weight_decay, momentum]])
        products[gap] = products[gap - 1] @ one
    return torch.from_numpy(products)[gaps_K.cpu().long()].to(gaps_K.device)
