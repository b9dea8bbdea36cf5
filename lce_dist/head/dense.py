"""The textbook head: whole logits, autograd does the rest. The slow, obvious twin of head/chunked.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lce_dist.head.margins import Margin


def dense_margin_softmax(
    emb_BD: torch.Tensor,
    weight_CD: torch.Tensor,
    labels_B: torch.Tensor,
    row_weight_B: torch.Tensor,
    margin: Margin,
    scale: float,
) -> torch.Tensor:
    """Sum over rows of row_weight * cross-entropy(scale * cosines with the target's margin).

    **Memory**: the whole (B, C) logits, several times over.
    """
    cos_BC = F.normalize(emb_BD) @ F.normalize(weight_CD).T
    target_cos = cos_BC.gather(1, labels_B[:, None])
    value, slope = margin(target_cos.detach())
    target = value + slope * (target_cos - target_cos.detach())  # value and derivative as the margin gives them
    logits_BC = scale * cos_BC.scatter(1, labels_B[:, None], target)
    losses_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    return (losses_B * row_weight_B).sum()
