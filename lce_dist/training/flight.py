"""The last steps before a stage fails, kept in memory and written when it does: what a person looks at first."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import socket
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lce_dist.training.step import LossTerms

_KEPT = 50


@dataclass(frozen=True)
class _Step:
    step: int
    ended_s: float
    seconds: float
    waited_s: float
    rows: int
    lr: float
    net_norm: float
    terms: LossTerms
    ids: str | None


class FlightRecord:
    """Of one rank: nothing is read from the device and nothing is written until :meth:`write`.

    ids: on the first rank a hash of each global batch; who is in it cannot be read from that.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self._rank = path, rank
        self._steps: deque[_Step] = deque(maxlen=_KEPT)
        self._mark = time.perf_counter()

    def note(
        self,
        step: int,
        waited_s: float,
        rows: int,
        lr: float,
        net_norm: float,
        terms: LossTerms,
        ids: str | None,
    ) -> None:
        """Keep one step; the oldest goes."""
        now = time.perf_counter()
        self._steps.append(_Step(step, time.time(), now - self._mark, waited_s, rows, lr, net_norm, terms, ids))
        self._mark = now

    def write(self, error: BaseException) -> None:
        """Write all that is kept, the error and this machine's state; never raises."""
        with contextlib.suppress(Exception):  # the error that is under way counts, not this
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._values(error), indent=1) + "\n"
            partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
            partial.write_text(text)
            partial.replace(self.path)

    def _values(self, error: BaseException) -> dict[str, Any]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time_s": time.time(),
            "load": list(os.getloadavg()),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
            "device_memory_bytes": torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0,
            "steps": [self._step(one) for one in self._steps],
        }

    def _step(self, one: _Step) -> dict[str, Any]:
        losses = {name: _number(value) for name, value in vars(one.terms).items() if name != "why"}
        return {
            "step": one.step,
            "time_s": one.ended_s,
            "seconds": one.seconds,
            "data_wait_s": one.waited_s,
            "rows": one.rows,
            "lr": one.lr,
            "net_gradient_norm": _number(one.net_norm),
            "losses": losses,
            "batch_ids": one.ids,
        }


def _number(value: torch.Tensor | float) -> float | str:
    """JSON knows no NaN; on a device that has failed itself the value is not to be had."""
    try:
        number = float(value)
    except RuntimeError:
        return "lost with the device"
    return number if math.isfinite(number) else str(number)
