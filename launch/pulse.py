"""Where each worker is, told by a thread of its own; a run that stands still can say whom it waits for."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]
_OURS = tuple(str(_CHECKOUT / name) + os.sep for name in ("lce_dist", "pipelines", "launch"))
_COLLECTIVES = str(Path("lce_dist", "collectives.py"))
_WAITING = tuple(
    str(Path(*parts))
    for parts in (("torch", "distributed", "distributed_c10d.py"), ("deepspeed", "comm"), (_COLLECTIVES,))
)
_EVERY_S = 5.0
_SILENT_S = 3 * _EVERY_S
_REMEMBERED = 20
_TIMES_USUAL = 5.0


@dataclass(frozen=True)
class Place:
    """Where a worker was when it was heard of last. waits: in a collective, so for another rank."""

    rank: int
    host: str
    pid: int
    node_id: str
    where: str
    waits: bool

    def name(self) -> str:
        """The rank and where it can be found."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Pulse:
    """Tells ``send`` every few seconds where the thread that made it is; ends with the block."""

    def __init__(self, rank: int, node_id: str, send: Callable[[dict[str, Any]], None]) -> None:
        self._rank, self._node_id, self._send = rank, node_id, send
        self._thread_id = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _beat(self) -> None:
        host, pid = socket.gethostname(), os.getpid()
        while True:
            where, waits = where_is(self._thread_id)
            self._send(vars(Place(self._rank, host, pid, self._node_id, where, waits)))
            if self._ended.wait(_EVERY_S):
                return


def where_is(thread_id: int) -> tuple[str, bool]:
    """Our innermost line that a thread is in, or that its backward pass is in; and whether it waits in a collective."""
    frames = sys._current_frames()
    # a backward pass on a GPU runs in threads that Python has not started
    own = {thread.ident for thread in threading.enumerate()} - {thread_id}
    stacks = [_frames(frames[thread_id])] if thread_id in frames else []
    stacks += [_frames(frame) for number, frame in frames.items() if number != thread_id and number not in own]
    for stack in reversed(stacks):
        place = next((frame for frame in stack if _is_ours(frame.f_code.co_filename)), None)
        if place is not None:
            file = Path(place.f_code.co_filename).relative_to(_CHECKOUT)
            inner = stack[: stack.index(place) + 1]
            waits = any(part in frame.f_code.co_filename for frame in inner for part in _WAITING)
            return f"{file}:{place.f_lineno} in {place.f_code.co_name}", waits
    return "outside of our code", False


def _is_ours(file: str) -> bool:
    return file.startswith(_OURS) and not file.endswith(_COLLECTIVES)


def _frames(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


class Stall:
    """Notices that the steps of a stage have ceased. limit_s: how long is too long; where steps are slow it takes longer."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._stage: str | None = None
        self._last_s = 0.0
        self._between_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._told = False

    def see(self, event: Mapping[str, Any], now_s: float) -> None:
        """Take note of what the first rank reports."""
        kind = event["type"]
        if kind == "metrics" and event["metrics"] and event["step"] < event["total_steps"]:
            if self._stage == event["stage"]:
                self._between_s.append(now_s - self._last_s)
            else:
                self._stage = event["stage"]
                self._between_s.clear()
            self._last_s, self._told = now_s, False
        elif kind == "checkpoint":
            self._last_s = now_s
        elif kind in ("metrics", "stage_start", "stage_done", "stage_skipped", "workers_up"):
            self._stage = None

    def is_new(self, now_s: float) -> bool:
        """Whether it is time to tell that steps have ceased; once each time."""
        usual_s = median(self._between_s) if len(self._between_s) > 1 else self._limit_s  # the first steps may compile
        if self._told or self.seconds(now_s) < max(self._limit_s, _TIMES_USUAL * usual_s):
            return False
        self._told = True
        return True

    def seconds(self, now_s: float) -> float:
        """Since the last step of a stage that trains; 0 where none does."""
        return 0.0 if self._stage is None else now_s - self._last_s


def missing(places: Mapping[int, tuple[Place, float]]) -> list[Place]:
    """Workers that others wait for, or that say nothing any more; none where nobody waits."""
    silent = [place for place, age_s in places.values() if age_s > _SILENT_S]
    heard = [place for place, age_s in places.values() if age_s <= _SILENT_S]
    waited_for = [place for place in heard if not place.waits] if any(place.waits for place in heard) else []
    return silent + waited_for


def whom_it_waits_for(places: Mapping[int, tuple[Place, float]]) -> str:
    """In words. places: rank to place and seconds since it was heard."""
    words, heard = [], []
    for place, age_s in places.values():
        if age_s > _SILENT_S:
            words.append(f"{place.name()} has not been heard of for {age_s:.0f} s")
        else:
            heard.append(place)
    waiting = [place for place in heard if place.waits]
    working = [place for place in heard if not place.waits]
    if waiting:  # for those that have not come
        words += [f"{place.name()} is at {place.where}" for place in working]
        words += [
            f"{_ranks(group)} wait{'s' * (len(group) == 1)} for others at {where}"
            for where, group in _by_where(waiting)
        ]
    else:
        words += [
            f"{_ranks(group)} {'is' if len(group) == 1 else 'are'} at {where}" for where, group in _by_where(working)
        ]
    return "; ".join(words) or "no worker has been heard of"


def _by_where(places: Sequence[Place]) -> Iterator[tuple[str, list[int]]]:
    for where in sorted({place.where for place in places}):
        yield where, sorted(place.rank for place in places if place.where == where)


def _ranks(ranks: list[int]) -> str:
    """1, 2, 3, 7 as "ranks 1-3, 7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)
