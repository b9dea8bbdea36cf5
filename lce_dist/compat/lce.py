"""Learning Compatible Embeddings, direct manner: alignment of class rows and the old classes' boundaries.

**Source**: Meng, Zhang, Xu, Zhou, "Learning Compatible Embeddings", ICCV 2021 (arXiv 2108.01958).
Both terms touch only the local class shard; what they need of the batch is already gathered for the head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from lce_dist.collectives import sum_over_ranks
from lce_dist.world import World


def alignment_loss(
    weight_SD: torch.Tensor, old_centre_SD: torch.Tensor, num_classes: int, world: World
) -> torch.Tensor:
    """Mean over all classes of 1 - cos(class row, old centre); centres have unit rows.

    **Collectives**: one all-reduce of one float.
    """
    cos_S = (F.normalize(weight_SD) * old_centre_SD).sum(1)
    return sum_over_ranks((1.0 - cos_S).sum() / num_classes, world)


def boundary_loss(
    emb_GD: torch.Tensor,
    labels_G: torch.Tensor,
    row_weight_G: torch.Tensor,
    old_centre_SD: torch.Tensor,
    cos_boundary_S: torch.Tensor,
    first_class: int,
    kind: Literal["cos", "angle"],
    world: World,
) -> torch.Tensor:
    """Weighted sum over rows of how far the new vector lies outside the old class's boundary.

    ``cos``: max(0, c_y - cos(f, w1_y)); ``angle``: max(0, theta - b_y) in radians. emb_GD has unit rows.
    A boundary of -1 is never crossed. **Collectives**: one all-reduce of one float.
    """
    local_G = labels_G - first_class
    owned_O = torch.nonzero((local_G >= 0) & (local_G < old_centre_SD.shape[0])).squeeze(1)
    target_O = local_G[owned_O]
    cos_O = (emb_GD[owned_O] * old_centre_SD[target_O]).sum(1)
    bound_O = cos_boundary_S[target_O]
    if kind == "cos":
        outside_O = (bound_O - cos_O).clamp_min(0.0)
    else:
        outside_O = (_angle_rad(cos_O) - _angle_rad(bound_O)).clamp_min(0.0)
        outside_O = torch.where(bound_O <= -1.0, torch.zeros_like(outside_O), outside_O)
    return sum_over_ranks((outside_O * row_weight_G[owned_O]).sum(), world)


def _angle_rad(cos: torch.Tensor) -> torch.Tensor:
    # acos has an infinite slope at +-1; one part in 10^6 of a cosine is 1.4 mrad there
    limit = 1.0 - 1e-6
    return torch.where(cos.abs() < limit, torch.acos(cos.clamp(-limit, limit)), torch.where(cos > 0, 0.0, math.pi))
