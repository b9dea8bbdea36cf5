"""The head's two inner loops as Triton kernels: exponentials of a chunk of cosines, and the update of a chunk of rows.

Their slow twins are head/chunked.py and head/optimizer.py with head/tables.py and head/noise.py. Neither kernel uses
atomics or locks, so with the same tile sizes a result repeats bit for bit. With TRITON_INTERPRET=1 in the environment
when this module is imported they run on a CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from lce_dist.head.margins import HardNegatives
from lce_dist.head.noise import COLUMN, ROW, step_word

_SHORTEST = tl.constexpr(1e-12)  # as in head/rows.py
_ROW, _COLUMN = tl.constexpr(ROW), tl.constexpr(COLUMN)
_VALUES_PER_PROGRAM = 2048  # of an update: four tensors of them are 64 registers of each of 128 threads


def _config(block_b: int, block_k: int, block_d: int, num_warps: int, num_stages: int) -> triton.Config:
    # A class tile is read by GROUP_B batch tiles in a row: it is fetched from memory once for them all.
    sizes = {"BLOCK_B": block_b, "BLOCK_K": block_k, "BLOCK_D": block_d, "GROUP_B": 16}
    return triton.Config(sizes, num_warps=num_warps, num_stages=num_stages)


# The epilogue of hard negatives keeps two tiles in registers: there only 128 x 128 with 8 warps does not spill.
_CONFIGS_16_BIT = [
    _config(128, 128, 64, 4, 3),
    _config(128, 128, 64, 4, 4),
    _config(128, 128, 64, 8, 3),
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
]
_CONFIGS_32_BIT = [_config(64, 64, 32, 4, 3)]  # no tensor cores: larger tiles spill
_CONFIGS = _CONFIGS_16_BIT + _CONFIGS_32_BIT
if triton.knobs.runtime.interpret:
    _CONFIGS = [triton.Config({"BLOCK_B": 16, "BLOCK_K": 32, "BLOCK_D": 32, "GROUP_B": 2})]
_SMALLEST_BLOCK_K = min(config.kwargs["BLOCK_K"] for config in _CONFIGS)
# The interpreter multiplies bfloat16 by its bits; in float32 the products of 16-bit numbers are exact.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


def _fitting(configs: list[triton.Config], args: dict[str, Any], **_: Any) -> list[triton.Config]:
    return _CONFIGS_32_BIT if args["emb"].dtype == torch.float32 else _CONFIGS_16_BIT


# The choice is kept on disk beside the compiled kernels, so that the next run on this machine has the same tiles and bits.
@triton.autotune(
    configs=_CONFIGS,
    key=["D", "HARD", "CONFLICT"],
    prune_configs_by={"early_config_prune": _fitting},
    cache_results=True,
)
@triton.jit(do_not_specialize=["num_rows"])  # but num_classes: its divisibility lets masked stores stay wide
def _exp_cosines_kernel(
    emb: tl.tensor,
    rows: tl.tensor,
    column: tl.tensor,
    threshold: tl.tensor,
    target: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    num_rows: tl.tensor,
    num_classes: tl.tensor,
    emb_stride_b: tl.tensor,
    emb_stride_d: tl.tensor,
    rows_stride_k: tl.tensor,
    rows_stride_d: tl.tensor,
    out_stride_b: tl.tensor,
    out_stride_k: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    shift: tl.tensor,
    conflict_cos: tl.tensor,
    D: tl.constexpr,
    HARD: tl.constexpr,
    CONFLICT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_B: tl.constexpr,
) -> None:
    tiles_b = (num_rows + BLOCK_B - 1) // BLOCK_B
    tiles_k = (num_classes + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    group = program // (GROUP_B * tiles_k)
    within = program % (GROUP_B * tiles_k)
    group_size = tl.minimum(tiles_b - group * GROUP_B, GROUP_B)
    tile_b = group * GROUP_B + within % group_size
    tile_k = within // group_size

    b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    # Past the end the last row is read again: no mask in the loop. int64: offsets of a chunk can pass 2^31.
    inside_b = tl.minimum(b, num_rows - 1).to(tl.int64)
    inside_k = tl.minimum(k, num_classes - 1).to(tl.int64)
    emb_at = emb + inside_b[:, None] * emb_stride_b + d[None, :] * emb_stride_d
    rows_at = rows + inside_k[None, :] * rows_stride_k + d[:, None] * rows_stride_d
    cos = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    for low in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            emb_tile = tl.load(emb_at)
            rows_tile = tl.load(rows_at)
        else:
            emb_tile = tl.load(emb_at, mask=(low + d < D)[None, :], other=0.0)
            rows_tile = tl.load(rows_at, mask=(low + d < D)[:, None], other=0.0)
        if _WIDEN:
            emb_tile, rows_tile = emb_tile.to(tl.float32), rows_tile.to(tl.float32)
        cos = tl.dot(emb_tile, rows_tile, cos, input_precision="ieee")
        emb_at += BLOCK_D * emb_stride_d
        rows_at += BLOCK_D * rows_stride_d

    if column is not None:
        column_k = tl.load(column + inside_k)
        cos = cos * column_k[None, :]
    value = cos
    if HARD:
        is_hard = cos > tl.load(threshold + inside_b)[:, None]
        value = tl.where(is_hard, cos * (shift + cos), cos)
    exp = tl.exp2(value * scale - offset)
    if CONFLICT:
        exp = tl.where(cos > conflict_cos, 0.0, exp)
    target_b = tl.load(target + inside_b)
    exp = tl.where((k[None, :] == target_b[:, None]) | (k >= num_classes)[None, :], 0.0, exp)
    tl.store(partial + tile_k.to(tl.int64) * num_rows + b, tl.sum(exp, axis=1), mask=b < num_rows)
    if HARD:
        exp = tl.where(is_hard, exp * (shift + 2.0 * cos), exp)
    if column is not None:
        exp = exp * column_k[None, :]
    out_at = out + b.to(tl.int64)[:, None] * out_stride_b + k.to(tl.int64)[None, :] * out_stride_k
    tl.store(out_at, exp, mask=(b < num_rows)[:, None] & (k < num_classes)[None, :])


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

    As head/chunked.py's, for float32, float16 and bfloat16 operands (both alike) and sums in float32; a row of
    the batch has at most one target. Any strides. float32 operands are not rounded to TF32.
    **Memory**: B values for every tile of classes, at least 64 wide.
    """
    (num_rows, dim), num_classes = emb_BD.shape, rows_KD.shape[0]
    target_B = torch.full((num_rows,), -1, dtype=torch.int32, device=emb_BD.device)
    target_B[target_row_P] = target_column_P.to(torch.int32)
    partial = emb_BD.new_empty((triton.cdiv(num_classes, _SMALLEST_BLOCK_K), num_rows), dtype=torch.float32)

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(num_rows, sizes["BLOCK_B"]) * triton.cdiv(num_classes, sizes["BLOCK_K"]),)

    _exp_cosines_kernel[grid](
        emb_BD,
        rows_KD,
        column_K,
        hard.threshold_B if hard is not None else None,
        target_B,
        out_BK,
        partial,
        num_rows,
        num_classes,
        *emb_BD.stride(),
        *rows_KD.stride(),
        *out_BK.stride(),
        scale * math.log2(math.e),
        offset * math.log2(math.e),
        hard.shift if hard is not None else 0.0,
        conflict_cos if conflict_cos is not None else 0.0,
        D=dim,
        HARD=hard is not None,
        CONFLICT=conflict_cos is not None,
        enable_fp_fusion=True,
    )
    block_k = _exp_cosines_kernel.best_config.kwargs["BLOCK_K"]
    return partial[: triton.cdiv(num_classes, block_k)].sum(0)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise(word: tl.tensor, number: tl.tensor, d: tl.tensor) -> tl.tensor:
    # head/noise.py's noise_bits; ``word`` is its step_word
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    row = _mix(low * _ROW + word.to(tl.uint32, bitcast=True) + high)
    return (_mix(row[:, None] ^ (d.to(tl.uint32) * _COLUMN)[None, :]) >> 16).to(tl.int32)


@triton.jit
def _load_weight(weight: tl.tensor, lower: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    if lower is None:
        value = tl.load(weight + at, mask=mask, other=0.0)
    else:
        upper = tl.load(weight + at, mask=mask, other=0).to(tl.int32)
        bits = (upper << 16) + tl.load(lower + at, mask=mask, other=0).to(tl.int32)
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def _store_weight(weight: tl.tensor, lower: tl.tensor, at: tl.tensor, mask: tl.tensor, value: tl.tensor) -> None:
    if lower is None:
        tl.store(weight + at, value, mask=mask)
    else:
        bits = value.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(weight + at, upper.to(tl.int16), mask=mask)
        tl.store(lower + at, (bits - (upper << 16)).to(tl.int16), mask=mask)


@triton.jit
def _load_state(state: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    if state.dtype.element_ty == tl.int16:  # the bits of bfloat16
        value = (tl.load(state + at, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(state + at, mask=mask, other=0.0)
    return value


@triton.jit
def _store_state(
    state: tl.tensor, at: tl.tensor, mask: tl.tensor, value: tl.tensor, word: tl.tensor, number: tl.tensor, d: tl.tensor
) -> None:
    if state.dtype.element_ty == tl.int16:  # head/noise.py's round_stochastically
        exact = value.to(tl.int32, bitcast=True)
        noisy = tl.where((exact & 0x7FFFFFFF) < 0x7F7F0000, exact + _noise(word, number, d), exact)
        tl.store(state + at, (noisy >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(state + at, value, mask=mask)


@triton.jit
def _store_inverse_norm(inv_norm: tl.tensor, row: tl.tensor, mask: tl.tensor, value: tl.tensor) -> None:
    norm = tl.sqrt_rn(tl.sum(value * value, axis=1))
    # not tl.maximum: it would turn the length NaN into the shortest one
    norm = tl.where(norm < _SHORTEST, _SHORTEST, norm)
    tl.store(inv_norm + row, tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), norm), mask=mask)


@triton.jit
def _gradient(
    product: tl.tensor,
    old: tl.tensor,
    align: tl.tensor,
    extra: tl.tensor,
    old_cos: tl.tensor,
    chunk_at: tl.tensor,
    k: tl.tensor,
    mask_k: tl.tensor,
    mask: tl.tensor,
    value: tl.tensor,
    inv: tl.tensor,
    SCALED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    # dL/dw but for its part along w, and that part's factor for each row
    grad = tl.load(product + chunk_at, mask=mask, other=0.0)
    along = -tl.sum(grad * value, axis=1) * (inv * inv)
    if not SCALED:
        grad = grad * inv[:, None]
        along = along * inv
    if old is not None:
        old_value = tl.load(old + chunk_at, mask=mask, other=0.0).to(tl.float32)
        align_k = tl.load(align + k, mask=mask_k, other=0.0)
        cos = tl.sum(old_value * value, axis=1) * inv
        tl.store(old_cos + k, cos, mask=mask_k)
        grad = grad - (align_k * inv)[:, None] * old_value
        along = along + align_k * (inv * inv) * cos
    if extra is not None:
        grad = grad + tl.load(extra + chunk_at, mask=mask, other=0.0)
    return grad, along


@triton.jit(do_not_specialize=["num_rows", "first_row", "word"])
def _sgd_kernel(
    weight: tl.tensor,
    lower: tl.tensor,
    state: tl.tensor,
    inv_norm: tl.tensor,
    product: tl.tensor,
    place: tl.tensor,
    old: tl.tensor,
    align: tl.tensor,
    extra: tl.tensor,
    old_cos: tl.tensor,
    num_rows: tl.tensor,
    first_row: tl.tensor,
    word: tl.tensor,
    lr: tl.tensor,
    momentum: tl.tensor,
    weight_decay: tl.tensor,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    mask_k = k < num_rows
    k = k.to(tl.int64)
    mask = mask_k[:, None] & (d < D)[None, :]
    row = k if place is None else tl.load(place + k, mask=mask_k, other=0)
    at, chunk_at = row[:, None] * D + d[None, :], k[:, None] * D + d[None, :]
    value = _load_weight(weight, lower, at, mask)
    inv = tl.load(inv_norm + row, mask=mask_k, other=0.0)
    grad, along = _gradient(product, old, align, extra, old_cos, chunk_at, k, mask_k, mask, value, inv, SCALED)
    velocity = momentum * _load_state(state, at, mask) + grad + (along + weight_decay)[:, None] * value
    value = value - lr * velocity
    _store_state(state, at, mask, velocity, word, row + first_row, d)
    _store_weight(weight, lower, at, mask, value)
    _store_inverse_norm(inv_norm, row, mask_k, value)


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_word", "second_word"])
def _adamw_kernel(
    weight: tl.tensor,
    lower: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    inv_norm: tl.tensor,
    product: tl.tensor,
    place: tl.tensor,
    old: tl.tensor,
    align: tl.tensor,
    extra: tl.tensor,
    old_cos: tl.tensor,
    num_rows: tl.tensor,
    first_row: tl.tensor,
    first_word: tl.tensor,
    second_word: tl.tensor,
    beta1: tl.tensor,
    gain1: tl.tensor,
    beta2: tl.tensor,
    gain2: tl.tensor,
    keep: tl.tensor,
    unbias2: tl.tensor,
    epsilon: tl.tensor,
    rate: tl.tensor,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    mask_k = k < num_rows
    k = k.to(tl.int64)
    mask = mask_k[:, None] & (d < D)[None, :]
    row = k if place is None else tl.load(place + k, mask=mask_k, other=0)
    at, chunk_at = row[:, None] * D + d[None, :], k[:, None] * D + d[None, :]
    value = _load_weight(weight, lower, at, mask)
    inv = tl.load(inv_norm + row, mask=mask_k, other=0.0)
    grad, along = _gradient(product, old, align, extra, old_cos, chunk_at, k, mask_k, mask, value, inv, SCALED)
    grad = grad + along[:, None] * value
    mean = beta1 * _load_state(first, at, mask) + gain1 * grad
    square = beta2 * _load_state(second, at, mask) + gain2 * (grad * grad)
    value = keep * value - rate * tl.div_rn(mean, tl.sqrt_rn(square) * unbias2 + epsilon)
    _store_state(first, at, mask, mean, first_word, row + first_row, d)
    _store_state(second, at, mask, square, second_word, row + first_row, d)
    _store_weight(weight, lower, at, mask, value)
    _store_inverse_norm(inv_norm, row, mask_k, value)


def update_rows_sgd(
    weight_SD: torch.Tensor,
    lower_SD: torch.Tensor | None,
    momentum_SD: torch.Tensor,
    inv_norm_S: torch.Tensor,
    product_KD: torch.Tensor,
    scaled: bool,
    place_K: torch.Tensor | None,
    old_KD: torch.Tensor | None,
    align_K: torch.Tensor | None,
    extra_KD: torch.Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    key: int,
    step: int,
    first_row: int,
) -> torch.Tensor | None:
    """SGD with momentum on K rows, in place and in one pass; returns their cosines (K,) with ``old_KD`` before it.

    g = inv product + inv^3 (-product.w) w + align inv (inv cos w - old) + extra, or, if ``scaled``, with inv already
    in ``product_KD``; v <- momentum v + g + weight_decay w; w <- w - lr v; inv <- 1 / |w|, in float32.
    weight_SD: float32, or bfloat16 upper halves with int16 ``lower_SD``. momentum_SD: float32, or bfloat16 rounded with
    the noise of (key, step, first_row + row, column). place_K: int64 distinct rows of the tables; None: 0 to K - 1.
    old_KD: float32 or 16-bit. align_K, product_KD, extra_KD: float32.
    """
    num_rows, dim, sizes = _sizes(product_KD)
    old_cos_K = torch.empty_like(product_KD[:, 0]) if old_KD is not None else None
    _sgd_kernel[(triton.cdiv(num_rows, sizes["BLOCK_K"]),)](
        _bits(weight_SD),
        lower_SD,
        _bits(momentum_SD),
        inv_norm_S,
        product_KD.contiguous(),
        place_K,
        old_KD.contiguous() if old_KD is not None else None,
        align_K,
        extra_KD.contiguous() if extra_KD is not None else None,
        old_cos_K,
        num_rows,
        first_row,
        _signed(step_word(key, step)),
        lr,
        momentum,
        weight_decay,
        D=dim,
        SCALED=scaled,
        enable_fp_fusion=False,  # rounded where PyTorch rounds
        **sizes,
    )
    return old_cos_K


def update_rows_adamw(
    weight_SD: torch.Tensor,
    lower_SD: torch.Tensor | None,
    first_SD: torch.Tensor,
    second_SD: torch.Tensor,
    inv_norm_S: torch.Tensor,
    product_KD: torch.Tensor,
    scaled: bool,
    place_K: torch.Tensor | None,
    old_KD: torch.Tensor | None,
    align_K: torch.Tensor | None,
    extra_KD: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    keys: tuple[int, int],
    step: int,
    num_updates: int,
    first_row: int,
) -> torch.Tensor | None:
    """AdamW on K rows, in place and in one pass; arguments and result as ``update_rows_sgd``'s.

    keys: of the noise of the first and the second moment, at ``step``. num_updates: of these rows, this one
    counted (from 1), for the correction of the moments' start at zero.
    **Source**: Loshchilov, Hutter, ICLR 2019.
    """
    num_rows, dim, sizes = _sizes(product_KD)
    old_cos_K = torch.empty_like(product_KD[:, 0]) if old_KD is not None else None
    _adamw_kernel[(triton.cdiv(num_rows, sizes["BLOCK_K"]),)](
        _bits(weight_SD),
        lower_SD,
        _bits(first_SD),
        _bits(second_SD),
        inv_norm_S,
        product_KD.contiguous(),
        place_K,
        old_KD.contiguous() if old_KD is not None else None,
        align_K,
        extra_KD.contiguous() if extra_KD is not None else None,
        old_cos_K,
        num_rows,
        first_row,
        _signed(step_word(keys[0], step)),
        _signed(step_word(keys[1], step)),
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 - lr * weight_decay,
        1.0 / math.sqrt(1.0 - beta2**num_updates),
        epsilon,
        lr / (1.0 - beta1**num_updates),
        D=dim,
        SCALED=scaled,
        enable_fp_fusion=False,  # rounded where PyTorch rounds
        **sizes,
    )
    return old_cos_K


def _sizes(product_KD: torch.Tensor) -> tuple[int, int, dict[str, int]]:
    num_rows, dim = product_KD.shape
    block_d = triton.next_power_of_2(dim)
    return num_rows, dim, {"BLOCK_K": max(1, _VALUES_PER_PROGRAM // block_d), "BLOCK_D": block_d}


def _bits(table_SD: torch.Tensor) -> torch.Tensor:
    assert table_SD.is_contiguous(), "tables are written in place, row after row"
    return table_SD.view(torch.int16) if table_SD.dtype == torch.bfloat16 else table_SD


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word  # one type for every step: no kernel is compiled again
