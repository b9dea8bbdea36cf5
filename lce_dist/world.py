"""What one rank knows about the world: one frozen value, made once by whoever started the processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class World:
    """``size`` ranks on ``num_nodes`` nodes; this one is ``rank`` and computes on ``device``.

    A world of one needs no process group.
    """

    rank: int = 0
    size: int = 1
    num_nodes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


def shard_bounds(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """First and one-past-last row of ``rank``: blocks of ceil(num_rows / size), as ``torch.chunk`` cuts them.

    The last shards may be shorter or empty. Every class-sharded tensor here uses this cut, so that a
    shard is a DTensor ``Shard(0)`` without moving a row.
    """
    block = -(-num_rows // size)
    return min(rank * block, num_rows), min((rank + 1) * block, num_rows)
