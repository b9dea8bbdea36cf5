"""Margin softmax over sharded classes, a chunk of classes at a time: logits never exist whole.

Cosine logits are bounded by the scale s, so exp(z - s/2) cannot overflow for s <= 80 and no maximum has
to be found first: one pass gives the row sums, one all-reduce of 2B floats makes them global, and the
backward pass recomputes each chunk. A chunk sees the whole batch, so its row gradient is complete.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lce_dist.collectives import all_reduce_sum
from lce_dist.head.margins import Margin
from lce_dist.world import World


def chunked_margin_softmax(
    emb_BD: torch.Tensor,
    weight_SD: torch.Tensor,
    labels_B: torch.Tensor,
    row_weight_B: torch.Tensor,
    first_class: int,
    margin: Margin,
    scale: float,
    chunk_classes: int,
    world: World,
) -> torch.Tensor:
    """Global loss sum_i row_weight_i * (logsumexp_j z_ij - z_iy), z = scale * cos, the target's with margin.

    emb_BD: the global batch on every rank, rows of unit length. weight_SD: this rank's class rows, of any
    length. labels_B: global class numbers. Gradients are exact: weight's is complete, emb's is this
    shard's part (the parts of all ranks sum to the whole; ``gather_rows`` sums them).
    **Collectives**: one all-reduce of 2B floats, forward. **Memory**: B * chunk_classes floats.
    """
    loss: torch.Tensor = _ChunkedMarginSoftmax.apply(
        emb_BD, weight_SD, labels_B, row_weight_B, first_class, margin, scale, chunk_classes, world
    )
    return loss


class _ChunkedMarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        emb_BD: torch.Tensor,
        weight_SD: torch.Tensor,
        labels_B: torch.Tensor,
        row_weight_B: torch.Tensor,
        first_class: int,
        margin: Margin,
        scale: float,
        chunk_classes: int,
        world: World,
    ) -> torch.Tensor:
        inv_norm_S = 1.0 / weight_SD.norm(dim=1).clamp_min(torch.finfo(weight_SD.dtype).tiny)
        local_B = labels_B - first_class
        owned_O = torch.nonzero((local_B >= 0) & (local_B < weight_SD.shape[0])).squeeze(1)
        target_O = local_B[owned_O]
        unit_OD = weight_SD[target_O] * inv_norm_S[target_O, None]
        value_O, slope_O = margin((emb_BD[owned_O] * unit_OD).sum(1))

        sums = emb_BD.new_zeros((2, emb_BD.shape[0]))
        for low, high in _chunks(weight_SD.shape[0], chunk_classes):
            cos_BK = (emb_BD @ weight_SD[low:high].T).mul_(inv_norm_S[low:high])
            exp_BK = cos_BK.mul_(scale).sub_(scale / 2).exp_()
            inside = (target_O >= low) & (target_O < high)
            # The target is left out here and added with its margin below: subtracting it from the full
            # sum would cancel, it can be e^29 times the rest.
            exp_BK[owned_O[inside], target_O[inside] - low] = 0.0
            sums[0] += exp_BK.sum(1)
        sums[1, owned_O] = scale * value_O
        all_reduce_sum(sums, world)
        target_logit_B = sums[1]
        # logsumexp - z_target without forming it: both are near s, and their small difference is the loss
        excess_B = scale / 2 + sums[0].log() - target_logit_B
        loss_B = torch.logaddexp(excess_B, torch.zeros_like(excess_B))
        ctx.save_for_backward(
            emb_BD, weight_SD, inv_norm_S, row_weight_B, loss_B, target_logit_B, owned_O, target_O, slope_O
        )
        ctx.scale, ctx.chunk_classes = scale, chunk_classes
        return (loss_B * row_weight_B).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        emb_BD, weight_SD, inv_norm_S, row_weight_B, loss_B, target_logit_B, owned_O, target_O, slope_O = (
            ctx.saved_tensors
        )
        scale = ctx.scale
        row_B = grads[0] * row_weight_B * scale
        lse_B = target_logit_B + loss_B
        target_grad_O = row_B[owned_O] * torch.expm1(-loss_B[owned_O]) * slope_O  # expm1(-loss) = p_target - 1
        grad_emb_BD = torch.zeros_like(emb_BD)
        grad_weight_SD = torch.empty_like(weight_SD)
        for low, high in _chunks(weight_SD.shape[0], ctx.chunk_classes):
            weight_KD, inv_K = weight_SD[low:high], inv_norm_S[low:high]
            cos_BK = (emb_BD @ weight_KD.T).mul_(inv_K)  # as in forward, so that the probabilities sum to one
            dcos_BK = cos_BK.mul_(scale).sub_(lse_B[:, None]).exp_().mul_(row_B[:, None])
            inside = (target_O >= low) & (target_O < high)
            dcos_BK[owned_O[inside], target_O[inside] - low] = target_grad_O[inside]
            grad_unit_KD = dcos_BK.T @ emb_BD
            unit_KD = weight_KD * inv_K[:, None]
            along_K = (grad_unit_KD * unit_KD).sum(1, keepdim=True)
            grad_weight_SD[low:high] = (grad_unit_KD - along_K * unit_KD) * inv_K[:, None]
            grad_emb_BD += dcos_BK @ unit_KD
        return grad_emb_BD, grad_weight_SD, None, None, None, None, None, None, None


def _chunks(num_classes: int, chunk_classes: int) -> list[tuple[int, int]]:
    count = math.ceil(num_classes / chunk_classes)
    return [(k * chunk_classes, min((k + 1) * chunk_classes, num_classes)) for k in range(count)]
