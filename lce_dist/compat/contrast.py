"""A new vector tells its class's old centre from those of the other classes in the batch.

It is the head's margin softmax over a few frozen rows. What a second softmax over all old centres teaches (BCT) is nearly
all there, at a cost that does not grow with the number of classes.
"""

from __future__ import annotations

import torch

from lce_dist.collectives import all_reduce_sum, sum_over_ranks
from lce_dist.compat.old_space import OldSpace
from lce_dist.head.margins import Margin
from lce_dist.world import World


def contrast_loss(
    new_bD: torch.Tensor,
    labels_G: torch.Tensor,
    weight_G: torch.Tensor,
    own: slice,
    space: OldSpace,
    scale: float,
    margin: Margin,
    world: World,
) -> torch.Tensor:
    """Weighted sum over rows of -log softmax(scale * cos) over the batch's classes, with the margin at the own one.

    new_bD: unit rows of this rank, ``own`` of the G of all. A class counts once, however many rows it has; classes of
    weight 0 in the alignment (``seen_only``), and their rows, are left out. **Memory**: b * G values.
    **Collectives**: one all-reduce of G * (D + 1) values, forward only, and one of one float.
    """
    local_G = labels_G - space.first_class
    owned_O = torch.nonzero((local_G >= 0) & (local_G < space.centre_SD.shape[0])).squeeze(1)
    gathered_GE = new_bD.new_zeros((len(labels_G), space.centre_SD.shape[1] + 1))
    gathered_GE[owned_O, :-1] = space.centre_SD[local_G[owned_O]].to(gathered_GE.dtype)
    weight_S = space.align_weight_S
    gathered_GE[owned_O, -1] = 1.0 if weight_S is None else (weight_S[local_G[owned_O]] > 0.0).to(gathered_GE.dtype)
    all_reduce_sum(gathered_GE, world)
    centre_GD, is_known_G = gathered_GE[:, :-1], gathered_GE[:, -1] > 0.5
    cos_b = (new_bD * centre_GD[own]).sum(1)
    term = margin.target(cos_b.detach(), None)
    target_b = term.value_O + term.slope_O * (cos_b - cos_b.detach())
    same_bG = labels_G[own, None] == labels_G[None, :]
    cos_bG = torch.where(same_bG, target_b[:, None], new_bD @ centre_GD.T)
    _, place_G, rows_K = torch.unique(labels_G, return_inverse=True, return_counts=True)
    logits_bG = scale * cos_bG - rows_K[place_G].to(cos_bG.dtype).log()  # a class of k rows has k columns
    log_sum_b = logits_bG.masked_fill(~is_known_G, torch.finfo(logits_bG.dtype).min).logsumexp(1)
    apart_b = torch.where(is_known_G[own], log_sum_b - scale * target_b, 0.0)
    return sum_over_ranks((apart_b * weight_G[own]).sum(), world)
