"""What each rank's steps are made of, and whose are longer than the others'."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from lce_dist.collectives import communication, gather_rows
from lce_dist.world import World

_SLOW = 1.5  # times the median rank
_SLOW_S = 0.01
_IN_A_ROW = 10


@dataclass(frozen=True)
class StepTimes:
    """Means a step over some steps, in seconds: all of it, waiting for data, in collectives of ours; peak memory in bytes.

    ``busy_s`` is the rest: reading to the end of the update, what DeepSpeed exchanges included.
    """

    step_s: float
    data_wait_s: float
    communication_s: float
    memory_bytes: float

    @property
    def busy_s(self) -> float:
        return max(0.0, self.step_s - self.data_wait_s - self.communication_s)

    @property
    def own_s(self) -> float:
        """What others wait for: everything but waiting for them."""
        return max(0.0, self.step_s - self.communication_s)


class RankTimes:
    """Measures this rank; ``take`` brings all ranks' numbers together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._start_s = time.perf_counter()
        self._waited_s, self._steps = 0.0, 0
        self._slowest, self._in_a_row = -1, 0
        self._told: set[int] = set()
        communication.take_s()

    def step(self, waited_s: float) -> None:
        """A step is over that waited so long for its data."""
        self._waited_s += waited_s
        self._steps += 1

    def take(self) -> tuple[StepTimes, list[StepTimes]]:
        """This rank's means since the last call, and every rank's, in rank order. **Collectives**: one small gather."""
        now_s, steps = time.perf_counter(), max(1, self._steps)
        memory = (
            torch.cuda.max_memory_allocated(self._world.device)
            if self._world.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        values = [
            (now_s - self._start_s) / steps,
            self._waited_s / steps,
            communication.take_s() / steps,
            float(memory),
        ]
        own = torch.tensor([values], dtype=torch.float64, device=self._world.device)
        everybody = gather_rows(own, (1,) * self._world.size, self._world).tolist()
        self._start_s, self._waited_s, self._steps = time.perf_counter(), 0.0, 0
        communication.take_s()
        return StepTimes(*values), [StepTimes(*row) for row in everybody]

    def straggler(self, ranks: list[StepTimes]) -> str | None:
        """In words, once a rank, one that has been the slowest by far for a while."""
        own = [times.own_s for times in ranks]
        slowest = max(range(len(own)), key=own.__getitem__)
        median_s = sorted(own)[(len(own) - 1) // 2]
        if own[slowest] < max(_SLOW * median_s, median_s + _SLOW_S):
            self._slowest, self._in_a_row = -1, 0
            return None
        self._in_a_row = self._in_a_row + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        if self._in_a_row < _IN_A_ROW or slowest in self._told:
            return None
        self._told.add(slowest)
        data = f", {ranks[slowest].data_wait_s:.3f} s of it for data" if ranks[slowest].data_wait_s > _SLOW_S else ""
        return (
            f"rank {slowest} is slow, and the others wait for it: {own[slowest]:.3f} s a step{data}; the median rank takes "
            f"{median_s:.3f} s"
        )


def rank_metrics(ranks: list[StepTimes]) -> dict[str, float]:
    """What is worth a curve: the means and the extremes over ranks."""
    own = [times.own_s for times in ranks]
    return {
        "ranks/step_s": max(times.step_s for times in ranks),
        "ranks/busy_s_mean": sum(times.busy_s for times in ranks) / len(ranks),
        "ranks/busy_s_max": max(times.busy_s for times in ranks),
        "ranks/data_wait_s_max": max(times.data_wait_s for times in ranks),
        "ranks/communication_s_mean": sum(times.communication_s for times in ranks) / len(ranks),
        "ranks/memory_gib_max": max(times.memory_bytes for times in ranks) / 2**30,
        "ranks/slowest": float(max(range(len(own)), key=own.__getitem__)),
    }
