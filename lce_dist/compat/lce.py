"""Learning Compatible Embeddings, direct manner: alignment of class rows and the old classes' boundaries.

**Source**: Meng, Zhang, Xu, Zhou, "Learning Compatible Embeddings", ICCV 2021 (arXiv 2108.01958).
Both terms touch only the local class shard. ``OldAnchor`` is what the head computes in its own passes; the
functions ``alignment_loss`` and ``boundary_loss`` say the same with autograd, as its slow, obvious twins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from lce_dist.collectives import sum_over_ranks
from lce_dist.world import World

_COS_LIMIT = 1.0 - 1e-6  # acos has an infinite slope at +-1; one part in 10^6 of a cosine is 1.4 mrad there


@dataclass(frozen=True)
class OldAnchor:
    """This shard's old centres (S, D), unit rows in any float format, and cosines of boundaries (S,).

    The head draws its rows to ``old_rows`` and keeps vectors inside the boundaries; see head/softmax.py.
    class_weight_S: weight of each class in the alignment (None: all 1), as ``OldSpace.align_weight_S``.
    """

    centre_SD: torch.Tensor
    cos_boundary_S: torch.Tensor
    align_weight: float
    boundary_weight: float
    kind: Literal["cos", "angle"]
    class_weight_S: torch.Tensor | None = None

    def outside(self, emb_OD: torch.Tensor, local_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far unit vectors lie outside their old classes (O,), and the gradient (O, D)."""
        centre_OD = self.centre_SD[local_O].to(emb_OD.dtype)
        cos_O = (emb_OD * centre_OD).sum(1)
        bound_O = self.cos_boundary_S[local_O].to(emb_OD.dtype)
        if self.kind == "cos":
            outside_O = (bound_O - cos_O).clamp_min(0.0)
            slope_O = -torch.ones_like(cos_O)
        else:
            outside_O = (_angle_rad(cos_O) - _angle_rad(bound_O)).clamp_min(0.0)
            outside_O = torch.where(bound_O <= -1.0, torch.zeros_like(outside_O), outside_O)
            sin_O = (1.0 - cos_O * cos_O).clamp_min(torch.finfo(cos_O.dtype).tiny).sqrt()
            slope_O = torch.where(cos_O.abs() < _COS_LIMIT, -1.0 / sin_O, torch.zeros_like(cos_O))
        slope_O = torch.where(outside_O > 0.0, slope_O, torch.zeros_like(slope_O))
        return outside_O, slope_O[:, None] * centre_OD

    def old_rows(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """(K, D) old centres of local classes."""
        return self.centre_SD[rows]

    def class_weight(self, rows: slice | torch.Tensor) -> torch.Tensor | None:
        """(K,) weights of local classes in the alignment; None where all are 1."""
        return None if self.class_weight_S is None else self.class_weight_S[rows]


def alignment_loss(
    weight_SD: torch.Tensor,
    old_centre_SD: torch.Tensor,
    num_classes: int,
    world: World,
    class_weight_S: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over all classes of 1 - cos(class row, old centre), times a class's weight; centres have unit rows.

    **Collectives**: one all-reduce of one float.
    """
    apart_S = 1.0 - (F.normalize(weight_SD) * old_centre_SD).sum(1)
    if class_weight_S is not None:
        apart_S = apart_S * class_weight_S
    return sum_over_ranks(apart_S.sum() / num_classes, world)


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
    outside_O = outside(bound_O, cos_O, kind)
    return sum_over_ranks((outside_O * row_weight_G[owned_O]).sum(), world)


def outside(bound_O: torch.Tensor, cos_O: torch.Tensor, kind: Literal["cos", "angle"]) -> torch.Tensor:
    """How far cosines (O,) lie beyond bounds (O,), in cosine or in radians; a bound of -1 is never crossed."""
    if kind == "cos":
        return (bound_O - cos_O).clamp_min(0.0)
    outside_O = (_angle_rad(cos_O) - _angle_rad(bound_O)).clamp_min(0.0)
    return torch.where(bound_O <= -1.0, torch.zeros_like(outside_O), outside_O)


def _angle_rad(cos: torch.Tensor) -> torch.Tensor:
    inside = torch.acos(cos.clamp(-_COS_LIMIT, _COS_LIMIT))
    return torch.where(cos.abs() < _COS_LIMIT, inside, torch.where(cos > 0, 0.0, math.pi))
