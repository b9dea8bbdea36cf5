"""The few collectives that a step needs, with gradients; the door to torch.distributed for arithmetic.

Every function is the identity, or a plain sum, in a world of one, and then needs no process group.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lce_dist.world import World


class Clock:
    """Adds up the seconds that this process spends in the collectives here, waiting for other ranks included.

    On a GPU they are the device's, by events, read when they are asked for.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=4096)

    @contextmanager
    def over(self, value: torch.Tensor) -> Iterator[None]:
        """Time what is done to ``value`` in the block."""
        if value.is_cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((first, last))
        else:
            start_s = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start_s

    def take_s(self) -> float:
        """Seconds since the last call; waits for the device."""
        seconds, self._seconds = self._seconds, 0.0
        while self._events:
            first, last = self._events.popleft()
            last.synchronize()
            seconds += first.elapsed_time(last) / 1000.0
        return seconds


communication = Clock()


def all_reduce_sum(value: torch.Tensor, world: World) -> torch.Tensor:
    """Sum over ranks, in place. **Collectives**: one all-reduce of ``value``."""
    if world.size > 1:
        with communication.over(value):
            dist.all_reduce(value)
    return value


def all_reduce_max(value: torch.Tensor, world: World) -> torch.Tensor:
    """Largest over ranks, in place. **Collectives**: one all-reduce of ``value``."""
    if world.size > 1:
        with communication.over(value):
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_agree(flag: bool, world: World) -> bool:
    """Whether ``flag`` holds on every rank; the same answer everywhere, for decisions that lead to collectives."""
    return all_reduce_max(torch.tensor([float(not flag)], device=world.device), world).item() == 0.0


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        all_reduce_sum(torch.zeros(1, device=world.device), world)


def sum_over_ranks(local: torch.Tensor, world: World) -> torch.Tensor:
    """Global sum of each rank's term; the gradient to the own term is one.

    Backward is the identity because every rank differentiates the same global loss.
    **Collectives**: one all-reduce, forward only.
    """
    return _SumOverRanks.apply(local, world) if world.size > 1 else local


def gather_rows(
    rows_bD: torch.Tensor,
    rows_per_rank: tuple[int, ...],
    world: World,
    wire: torch.dtype | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> torch.Tensor:
    """(b, D) of every rank, in rank order, as (B, D); b may differ by rank and may be zero.

    ``wire``: format in which rows travel (and are rounded to, also in a world of one). Backward sums, over
    ranks, the gradient that each rank holds for the own rows; gradients keep their format. ``meanwhile``:
    what to compute while they travel; not called in a world of one.
    **Collectives**: all-gather of W * max(b) * D values; backward one reduce-scatter of the same number.
    """
    if world.size == 1 and wire is None:
        return rows_bD
    gathered: torch.Tensor = _GatherRows.apply(rows_bD, rows_per_rank, world, wire or rows_bD.dtype, meanwhile)
    return gathered


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, world: World) -> torch.Tensor:
        return all_reduce_sum(local.clone(), world)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_bD: torch.Tensor,
        rows_per_rank: tuple[int, ...],
        world: World,
        wire: torch.dtype,
        meanwhile: Callable[[], None] | None,
    ) -> torch.Tensor:
        ctx.rows_per_rank, ctx.world, ctx.meanwhile = rows_per_rank, world, meanwhile
        if world.size == 1:
            return rows_bD.to(wire).to(rows_bD.dtype)
        most = max(rows_per_rank)
        padded = _pad_rows(rows_bD.to(wire), most)
        gathered = padded.new_empty((world.size * most, *padded.shape[1:]))
        with communication.over(gathered):
            dist.all_gather_into_tensor(gathered, padded.contiguous())
        if min(rows_per_rank) != most:
            blocks = gathered.view(world.size, most, *padded.shape[1:])
            gathered = torch.cat([blocks[rank, :rows] for rank, rows in enumerate(rows_per_rank)])
        return gathered.to(rows_bD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        rows_per_rank, world = ctx.rows_per_rank, ctx.world
        if world.size == 1:
            return grads[0], None, None, None, None
        most = max(rows_per_rank)
        grad = grads[0].contiguous()
        if min(rows_per_rank) != most:
            grad = torch.cat([_pad_rows(part, most) for part in grad.split(list(rows_per_rank))])
        own = grad.new_empty((most, *grad.shape[1:]))
        on_its_way = dist.reduce_scatter_tensor(own, grad, async_op=True)
        if ctx.meanwhile is not None:
            ctx.meanwhile()
        with communication.over(own):
            on_its_way.wait()
        return own[: rows_per_rank[world.rank]], None, None, None, None


def _pad_rows(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    if rows.shape[0] == num_rows:
        return rows
    return torch.cat([rows, rows.new_zeros((num_rows - rows.shape[0], *rows.shape[1:]))])
