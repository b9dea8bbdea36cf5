"""A batch: what one rank sees of one global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one global batch.

    images: (B, 3, H, W) float32, normalised to [-1, 1], on the rank's device.
    labels: (B,) int64, class numbers of the view that was read (0 .. num_classes - 1), same device; -1 in a pass that leaves
    images out which cannot be decoded: the row is of no meaning.
    sample_ids: (B,) int64 on the CPU, positions in the packed data set; -1 likewise.
    rows_per_rank: how many rows each rank has of this global batch; sums to its size. May hold zeros.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    rows_per_rank: tuple[int, ...]

    @property
    def global_rows(self) -> int:
        return sum(self.rows_per_rank)
