"""Random bits that are a function of their place, and rounding to bfloat16 with them.

The draw for (key, step, row, column) is the same on any number of ranks, in PyTorch and in Triton.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
ROW, COLUMN, _STEP = 0x9E3779B1, 0xC2B2AE3D, 0x85EBCA77


def noise_bits(key: int, step: int, rows_K: torch.Tensor, num_columns: int) -> torch.Tensor:
    """(K, num_columns) int32 in [0, 2^16), for global rows ``rows_K`` (int64).

    In uint32 arithmetic: row word r = mix(row_low * ROW + mix(key + step * STEP) + row_high), bits =
    upper half of mix(r ^ (column * COLUMN)). **Source** of mix: the finalizer of MurmurHash3, Appleby.
    """
    row_K = _mix(((rows_K & _MASK) * ROW + step_word(key, step) + (rows_K >> 32)) & _MASK)
    column_D = torch.arange(num_columns, device=rows_K.device, dtype=torch.int64) * COLUMN & _MASK
    return (_mix(row_K[:, None] ^ column_D) >> 16).int()


def step_word(key: int, step: int) -> int:
    """mix(key + step * STEP), the part of ``noise_bits`` that all rows share, in [0, 2^32)."""
    return _mix_int((key + step * _STEP) & _MASK)


def round_stochastically(values_KD: torch.Tensor, bits_KD: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16, up with the probability of the part that is cut off; finite values stay finite."""
    exact = values_KD.contiguous().view(torch.int32)
    magnitude = exact & 0x7FFFFFFF
    largest = 0x7F7F0000  # of bfloat16
    rounded = torch.where(magnitude < largest, exact + bits_KD, exact) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
