"""Which classes take part in a step: the positives and a random share of the others, drawn class by class.

Whether a class is drawn depends on (seed, step, class) alone, so any cut over ranks draws the same set.
**Source**: An et al., Partial FC, CVPR 2022, for training with a share of the negatives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
# classes at a time: on a CPU a block's temporaries stay in the cache, on a GPU they are few launches
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


def active_classes(
    seed: int, step: int, rate: float, first_class: int, last_class: int, labels_G: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local numbers (N,) of this shard's classes in the step, rising, and which of them (N,) were drawn.

    A positive that was not drawn takes part too; its flag is False. ``labels_G``: global labels of the
    whole step, any order, duplicates allowed; the draw is made on their device.
    """
    device, block = labels_G.device, _BLOCK[labels_G.device.type]
    drawn = [
        torch.nonzero(drawn_flags(seed, step, rate, low, min(low + block, last_class), device)).squeeze(1)
        + (low - first_class)
        for low in range(first_class, last_class, block)
    ]
    drawn_N = torch.cat(drawn) if drawn else labels_G.new_zeros(0)
    local = labels_G[(labels_G >= first_class) & (labels_G < last_class)] - first_class
    active_N = torch.unique(torch.cat([drawn_N, local]))  # sorted
    return active_N, torch.isin(active_N, drawn_N, assume_unique=True)


def drawn_flags(
    seed: int, step: int, rate: float, first_class: int, last_class: int, device: torch.device | None = None
) -> torch.Tensor:
    """Which of the classes [first_class, last_class) are drawn in ``step``: bool."""
    return class_bits(seed, step, first_class, last_class, device).double() * 2.0**-53 < rate


def class_bits(
    seed: int, step: int, first_class: int, last_class: int, device: torch.device | None = None
) -> torch.Tensor:
    """53 random bits (int64) for each of the classes [first_class, last_class): a function of (seed, step, class)."""
    key = int(_mix(_mix(torch.tensor([_signed(seed)])) + step))
    classes = torch.arange(first_class, last_class, dtype=torch.int64, device=device)
    return _shift(_mix(classes.mul_(_signed(_GOLDEN)).add_(key)), 11)


def _mix(x: torch.Tensor) -> torch.Tensor:
    # the finalizer of splitmix64 (Steele, Lea, Flood, OOPSLA 2014); int64 products wrap as uint64 ones do
    x = (x ^ _shift(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x = (x ^ _shift(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    word &= 2**64 - 1
    return word - (1 << 64) if word >= 1 << 63 else word


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
