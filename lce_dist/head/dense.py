"""The textbook head: whole logits, autograd does the rest. The slow, obvious twin of head/softmax.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lce_dist.collectives import all_reduce_max, all_reduce_sum, sum_over_ranks
from lce_dist.head.margins import Margin
from lce_dist.world import World


def dense_margin_softmax(
    emb_BD: torch.Tensor,
    weight_SD: torch.Tensor,
    place_B: torch.Tensor,
    row_weight_B: torch.Tensor,
    norm_B: torch.Tensor | None,
    margin: Margin,
    scale: float,
    conflict_cos: float | None,
    world: World,
) -> torch.Tensor:
    """Sum over rows of row_weight * cross-entropy of scale * cosines with the margin, plus the margin's regulariser.

    place_B: the label's row in ``weight_SD``, or -1 where another rank has it.
    **Memory**: the whole (B, S) logits, several times over. **Collectives**: four all-reduces of B values.
    """
    cos_BS = F.normalize(emb_BD) @ F.normalize(weight_SD).T
    owned_O = torch.nonzero(place_B >= 0).squeeze(1)
    target_cos_O = cos_BS[owned_O, place_B[owned_O]]
    target_cos_B = all_reduce_sum(torch.zeros_like(row_weight_B).index_add(0, owned_O, target_cos_O.detach()), world)
    margin.observe(norm_B, target_cos_B, row_weight_B)
    norm_O = norm_B[owned_O] if norm_B is not None else None
    term = margin.target(target_cos_O.detach(), norm_O.detach() if norm_O is not None else None)
    # value and derivatives as the margin gives them
    target_O = term.value_O + term.slope_O * (target_cos_O - target_cos_O.detach())
    if term.norm_slope_O is not None and norm_O is not None:
        target_O = target_O + term.norm_slope_O * (norm_O - norm_O.detach())

    negative_BS = cos_BS
    hard = margin.negatives(target_cos_B)
    if hard is not None:
        harder_BS = cos_BS * (hard.shift + cos_BS)
        negative_BS = torch.where(cos_BS.detach() > hard.threshold_B[:, None], harder_BS, cos_BS)
    if conflict_cos is not None:
        negative_BS = negative_BS.masked_fill(cos_BS.detach() > conflict_cos, -torch.inf)
    cell_O = (owned_O, place_B[owned_O])
    logits_BS = scale * negative_BS.index_put(cell_O, target_O.to(cos_BS.dtype))

    largest_B = logits_BS.detach().amax(1) if logits_BS.shape[1] else torch.full_like(row_weight_B, -torch.inf)
    all_reduce_max(largest_B, world)
    sum_B = sum_over_ranks((logits_BS - largest_B[:, None]).exp().sum(1), world)
    target_B = sum_over_ranks(torch.zeros_like(row_weight_B).index_add(0, owned_O, logits_BS[cell_O]), world)
    loss = ((largest_B + sum_B.log() - target_B) * row_weight_B).sum()
    regulariser = margin.regulariser(norm_B.detach()) if norm_B is not None else None
    if regulariser is not None and norm_B is not None:
        value_B = regulariser[0] + regulariser[1] * (norm_B - norm_B.detach())
        # every rank holds the norms: each takes a share, so that the sum of the gradients is right
        loss = loss + sum_over_ranks((value_B * row_weight_B).sum() / world.size, world)
    return loss
