"""One function over many independent parts of a data set, in processes, with their results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from lce_dist.errors import RunError

Part = TypeVar("Part")
Found = TypeVar("Found")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def over_parts(
    work: Callable[[Part], Found], parts: Iterable[Part], num_parts: int, num_workers: int | None = None
) -> Iterator[Found]:
    """``work`` of each part, in order, in at most ``num_workers`` processes (None: one a core); in this one where 1 suffices.

    Errors: what ``work`` raises; RunError when a process dies. **Memory**: two parts and results a process.
    """
    workers = min(num_workers or num_cores(), num_parts)
    if workers <= 1:
        yield from map(work, parts)
        return
    waiting: deque[Future[Found]] = deque()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(work, part))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                f"one of {workers} processes died (out of memory, or killed); run again with fewer: --workers 1"
            ) from None
        finally:
            for future in waiting:
                future.cancel()
