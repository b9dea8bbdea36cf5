"""Many small reads of files: one after the other where the page cache answers, side by side where each takes long.

A network file system or a cold disk takes a millisecond a read, and serves dozens at a time.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

Place = tuple[int, int, int]  # descriptor, bytes, offset

_SIDE_BY_SIDE = 32
_SLOW_S = 100e-6  # a read, on average: ten times what the page cache takes


class Preads:
    """Remembers whether reads were slow."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def read(self, places: list[Place]) -> list[bytes]:
        """What stands at each place; shorter where a file ends before. Errors: OSError."""
        if self._pool is not None:
            return [*self._pool.map(_read_at, places)]
        started = time.perf_counter()
        found = [os.pread(*place) for place in places]
        if len(places) >= _SIDE_BY_SIDE and time.perf_counter() - started > _SLOW_S * len(places):
            self._pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="reads")
        return found

    def close(self) -> None:
        """End its threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _read_at(place: Place) -> bytes:
    return os.pread(*place)
