"""exp of the margin logits of one chunk of classes, and the matrix products with it, in plain PyTorch.

The slow twin of head/kernels.py for CUDA; on a CPU it is the fast path too: a chunk stays in the cache.
"""

from __future__ import annotations

import torch

from lce_dist.head.margins import HardNegatives

MAX_EXPONENT = 64.0  # e^64 summed over 2^32 classes is still a float32


def offset_of(scale: float, top: float) -> float:
    """What is taken from logits of at most ``scale * top`` so that their exponentials can be summed in float32.

    Zero for scale * top <= 64: then nothing is flushed at the lower end either (e^-64 is a normal float32).
    """
    return max(0.0, scale * top - MAX_EXPONENT)


def exp_cosines(
    emb_BD: torch.Tensor,
    rows_KD: torch.Tensor,
    column_K: torch.Tensor | None,
    scale: float,
    offset: float,
    hard: HardNegatives | None,
    conflict_cos: float | None,
    target_row_P: torch.Tensor,
    target_column_P: torch.Tensor,
    out_BK: torch.Tensor,
) -> torch.Tensor:
    """Row sums (B,) of E = exp(scale * n(cos) - offset) over a chunk; out_BK <- E * dn/dcos * column_K.

    cos = emb @ rows.T * column_K, n as CurricularFace's for hard negatives, else the identity. Targets
    (pairs of row and column) are left out: subtracting one from the full sum would cancel, it can be e^29
    times the rest. So are negatives above ``conflict_cos``. With ``column_K`` in it, out @ rows is a sum
    of unit rows.
    """
    direct = out_BK.dtype == emb_BD.dtype and emb_BD.dtype in (torch.float32, torch.float64)
    cos_BK = torch.mm(emb_BD, rows_KD.T, out=out_BK) if direct else product(emb_BD, rows_KD.T)
    if column_K is not None:
        cos_BK.mul_(column_K)
    conflicts_BK = cos_BK > conflict_cos if conflict_cos is not None else None
    slope_BK: torch.Tensor | None = None
    if hard is not None:
        is_hard_BK = cos_BK > hard.threshold_B[:, None]
        slope_BK = torch.where(is_hard_BK, hard.shift + 2.0 * cos_BK, 1.0)
        cos_BK.copy_(torch.where(is_hard_BK, cos_BK * (hard.shift + cos_BK), cos_BK))
    logit_BK = cos_BK.mul_(scale)
    if offset > 0.0:
        logit_BK.sub_(offset)
    exp_BK = logit_BK.exp_()
    if conflicts_BK is not None:
        exp_BK.masked_fill_(conflicts_BK, 0.0)
    exp_BK[target_row_P, target_column_P] = 0.0
    sum_B = exp_BK.sum(1)
    if slope_BK is not None:
        exp_BK.mul_(slope_BK)
    if column_K is not None:
        exp_BK.mul_(column_K)
    if not direct:
        out_BK.copy_(exp_BK)
    return sum_B


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right with float32 sums and a float32 result; two 16-bit operands are multiplied as they are."""
    if right.itemsize > 2:
        return left.to(right.dtype) @ right
    if left.device.type == "cuda":
        result: torch.Tensor = torch.mm(left, right.to(left.dtype), out_dtype=torch.float32)
        return result
    return left.float() @ right.float()  # products of 16-bit numbers are exact in float32
