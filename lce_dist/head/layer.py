"""The classification layer: one row a class, the rows cut over all ranks. It lives outside DeepSpeed.

DeepSpeed takes every parameter for a replica and would overwrite the shards with rank 0's.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from lce_dist.config import HeadConfig
from lce_dist.head.chunked import chunked_margin_softmax
from lce_dist.head.margins import margin_of
from lce_dist.world import World, shard_bounds


class ShardedHead(nn.Module):
    """Rows [first_class, last_class) of a (num_classes, embedding_dim) classifier, float32.

    Initial rows depend on (seed, class) alone, so not on the number of ranks.
    **Memory**: 4 * embedding_dim bytes per local class, and the same again for the gradient.
    """

    def __init__(self, config: HeadConfig, num_classes: int, embedding_dim: int, seed: int, world: World) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.world = world
        self.margin = margin_of(config)
        self.first_class, self.last_class = shard_bounds(num_classes, world.rank, world.size)
        rows = initial_rows(self.first_class, self.last_class, embedding_dim, seed)
        self.weight = nn.Parameter(rows.to(world.device))

    def forward(self, emb_GD: torch.Tensor, labels_G: torch.Tensor, row_weight_G: torch.Tensor) -> torch.Tensor:
        """Global loss of the gathered batch (see ``chunked_margin_softmax``); emb_GD has unit rows."""
        return chunked_margin_softmax(
            emb_GD,
            self.weight,
            labels_G,
            row_weight_G,
            self.first_class,
            self.margin,
            self.config.scale,
            self.config.chunk_classes,
            self.world,
        )


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
