"""The class rows of one rank: weights, optimizer state and inverse lengths, all cut by class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

from lce_dist.head.tables import HalfTable, PlainTable, Rows, SplitTable, Table
from lce_dist.world import World, shard_bounds

# A row shorter than this has no direction worth training; it also bounds the gradient 1/|w|.
_SHORTEST = 1e-12


class ClassRows:
    """Rows [first_class, last_class) of a (num_classes, dim) classifier with its optimizer state.

    **Memory**: ``bytes_per_class``; nothing else of this size exists in a step.
    """

    def __init__(
        self,
        weight: Table,
        state: dict[str, Table],
        inv_norm_S: torch.Tensor,
        touched_S: torch.Tensor | None,
        num_classes: int,
        first_class: int,
    ) -> None:
        self.weight = weight
        self.state = state
        self.inv_norm_S = inv_norm_S
        self.touched_S = touched_S  # with lazy decay: the step up to which a row is current
        self.num_classes = num_classes
        self.first_class = first_class
        self.last_class = first_class + inv_norm_S.shape[0]

    @classmethod
    def from_weight(
        cls,
        weight_SD: torch.Tensor,
        state_names: Iterable[str],
        row_format: Literal["fp32", "split"],
        state_format: Literal["fp32", "bf16"],
        lazy: bool,
        num_classes: int,
        first_class: int,
        seed: int,
    ) -> ClassRows:
        """Fresh rows: ``weight_SD`` in its storage format, state zero."""
        state: dict[str, Table] = {}
        for number, name in enumerate(state_names):
            if state_format == "bf16":
                zeros_SD = torch.zeros_like(weight_SD, dtype=torch.bfloat16)
                state[name] = HalfTable(zeros_SD, (seed * 4 + number) & 0x7FFFFFFF, first_class)
            else:
                state[name] = PlainTable(torch.zeros_like(weight_SD))
        inv_norm_S = inverse_norm(weight_SD)
        touched_S = torch.zeros(weight_SD.shape[0], dtype=torch.int32, device=weight_SD.device) if lazy else None
        weight: Table = SplitTable(weight_SD) if row_format == "split" else PlainTable(weight_SD)
        return cls(weight, state, inv_norm_S, touched_S, num_classes, first_class)

    @property
    def num_local(self) -> int:
        return self.last_class - self.first_class

    def bytes_per_class(self, dim: int) -> int:
        """Stored bytes of one class: the memory law of ``lce plan``."""
        per_value = self.weight.bytes_per_value + sum(table.bytes_per_value for table in self.state.values())
        return dim * per_value + self.inv_norm_S.element_size() + (4 if self.touched_S is not None else 0)

    def unit(self, rows: Rows) -> torch.Tensor:
        """(K, D) rows of unit length, in the format of arithmetic."""
        return self.weight.load(rows) * self.inv_norm_S[rows, None]

    def operand(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """(K, D) matrix operand; times ``column_factor`` its rows are unit.

        float32 rows are not copied, nor are the upper halves of split rows; other 16-bit operands are unit
        rows rounded, so that no length can leave the range of their format.
        """
        if dtype.itemsize > 2:
            return self.weight.load(rows)
        if isinstance(self.weight, SplitTable):
            return self.weight.upper_SD[rows].to(dtype)
        return self.unit(rows).to(dtype)

    def column_factor(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor | None:
        """(K,) inverse lengths of ``operand``'s rows; None where they are unit already."""
        if dtype.itemsize > 2 or isinstance(self.weight, SplitTable):
            return self.inv_norm_S[rows]
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every stored tensor by name, class-sharded; writing into them changes the rows."""
        tables = {"weight": self.weight} | self.state
        tensors = {f"{name}{suffix}": t for name, table in tables.items() for suffix, t in table.tensors().items()}
        tensors["inv_norm"] = self.inv_norm_S
        if self.touched_S is not None:
            tensors["touched"] = self.touched_S
        return tensors


def inverse_norm(weight_KD: torch.Tensor) -> torch.Tensor:
    """1 / length of each row (K,); rows without a length get a large finite number."""
    norm: torch.Tensor = torch.linalg.vector_norm(weight_KD, dim=1)
    return norm.clamp_min_(_SHORTEST).reciprocal_()


def local_classes(num_classes: int, world: World) -> tuple[int, int]:
    """First and one-past-last class of this rank."""
    return shard_bounds(num_classes, world.rank, world.size)


def initial_rows(first_class: int, last_class: int, embedding_dim: int, seed: int) -> torch.Tensor:
    """Rows (last - first, embedding_dim) of independent normals with standard deviation 0.01.

    A counter-based generator is advanced to the first row, so any cut of the classes gives the same rows.
    """
    draws_per_row = -(-embedding_dim // 2) * 2  # Box-Muller uses pairs
    draws_per_row += -draws_per_row % 4  # the generator's counter moves in fours
    rows = np.empty((last_class - first_class, embedding_dim), dtype=np.float32)
    block = 65536
    for low in range(0, rows.shape[0], block):
        high = min(low + block, rows.shape[0])
        bits = np.random.Philox(key=seed)
        bits.advance((first_class + low) * draws_per_row // 4)
        raw = bits.random_raw((high - low) * draws_per_row).reshape(high - low, draws_per_row)
        uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        half = draws_per_row // 2
        radius = np.sqrt(-2.0 * np.log(uniform[:, :half]))
        angle = 2.0 * np.pi * uniform[:, half:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        rows[low:high] = 0.01 * normal[:, :embedding_dim]
    return torch.from_numpy(rows)
