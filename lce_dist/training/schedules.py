"""The learning rate as a pure function of the step: linear warm-up, then a half cosine to zero."""

from __future__ import annotations

import math


def lr_at(step: int, total_steps: int, peak_lr: float, warmup_fraction: float) -> float:
    """Learning rate for ``step`` (from 0) of ``total_steps``; its state is the step alone."""
    warmup = max(1, round(warmup_fraction * total_steps))
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 0.5 * peak_lr * (1.0 + math.cos(math.pi * progress))
