"""One (S, D) tensor of class rows or optimizer state in a storage format: read and written a chunk of rows at a time.

Arithmetic is float32 whatever the format (float64 where a plain table holds float64).
"""

from __future__ import annotations

from typing import Protocol

import torch

from lce_dist.head.noise import noise_bits, round_stochastically

Rows = slice | torch.Tensor  # a range of local rows, or their int64 numbers


class Table(Protocol):
    """(S, D) values; ``bytes_per_value`` is the memory law."""

    bytes_per_value: int

    def load(self, rows: Rows) -> torch.Tensor:
        """(K, D) in the format of arithmetic. A range of a plain table is a view: changes to it are kept."""
        ...

    def store(self, rows: Rows, values_KD: torch.Tensor, step: int) -> None:
        """Keep changed values of rows that ``load`` gave."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by suffix, for checkpoints; writing into them changes the table."""
        ...


class PlainTable:
    """Values as they are: float32, 4 bytes each (float64 for reference runs)."""

    def __init__(self, values_SD: torch.Tensor) -> None:
        self.values_SD = values_SD
        self.bytes_per_value = values_SD.element_size()

    def load(self, rows: Rows) -> torch.Tensor:
        return self.values_SD[rows]

    def store(self, rows: Rows, values_KD: torch.Tensor, step: int) -> None:
        if isinstance(rows, torch.Tensor) or values_KD.data_ptr() != self.values_SD[rows].data_ptr():
            self.values_SD[rows] = values_KD

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"": self.values_SD}


class SplitTable:
    """float32 as two 16-bit halves, bit for bit: the upper one alone is the value rounded to bfloat16.

    float32 bits = (upper bits << 16) + lower, lower signed. Matrix products read the upper half where it
    lies, so no 16-bit copy of the rows exists beside them.
    """

    bytes_per_value = 4

    def __init__(self, values_SD: torch.Tensor) -> None:
        self.upper_SD = torch.empty_like(values_SD, dtype=torch.bfloat16)
        self.lower_SD = torch.empty_like(values_SD, dtype=torch.int16)
        for low in range(0, values_SD.shape[0], 65536):  # no temporaries as large as the table
            self.store(slice(low, low + 65536), values_SD[low : low + 65536], 0)

    def load(self, rows: Rows) -> torch.Tensor:
        upper = self.upper_SD[rows].view(torch.int16).int()
        return ((upper << 16) + self.lower_SD[rows].int()).view(torch.float32)

    def store(self, rows: Rows, values_KD: torch.Tensor, step: int) -> None:
        bits = values_KD.contiguous().view(torch.int32)
        upper = (bits + 0x8000) >> 16
        self.upper_SD[rows] = upper.to(torch.int16).view(torch.bfloat16)
        self.lower_SD[rows] = (bits - (upper << 16)).to(torch.int16)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {".upper": self.upper_SD, ".lower": self.lower_SD}


class HalfTable:
    """bfloat16, rounded up or down at random in proportion, so that small changes are not lost on average.

    The draw depends on (key, step, global row, column) alone: the same on any number of ranks.
    """

    bytes_per_value = 2

    def __init__(self, values_SD: torch.Tensor, key: int, first_row: int) -> None:
        self.values_SD = values_SD.to(torch.bfloat16)  # itself, if it is so already
        self.key = key
        self.first_row = first_row

    def load(self, rows: Rows) -> torch.Tensor:
        return self.values_SD[rows].float()

    def store(self, rows: Rows, values_KD: torch.Tensor, step: int) -> None:
        if isinstance(rows, slice):
            numbers = torch.arange(*rows.indices(self.values_SD.shape[0]), device=values_KD.device)
        else:
            numbers = rows
        bits = noise_bits(self.key, step, numbers + self.first_row, values_KD.shape[1])
        self.values_SD[rows] = round_stochastically(values_KD, bits)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"": self.values_SD}
