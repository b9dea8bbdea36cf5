"""A local append-only list of events that survives kill -9: one JSON object a line, plus a cursor file.

One process writes (a lock file says so); a record that was cut off by a crash is removed when the spool is opened
again, so no later record can be glued to it. Nothing here knows who reads the events.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lce_dist.errors import RunError

_BLOCK_BYTES = 1 << 16


class Spool:
    """The events of one run folder, in the order of :meth:`append`; offsets are bytes at line starts.

    Errors: RunError when another process holds the spool.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock_fd = _lock(_lock_path(path), path)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._mutex = threading.Lock()
        self._closed = False
        os.ftruncate(self._fd, self._end_of_last_line())

    def append(self, event: dict[str, Any]) -> None:
        """Add one event; when this returns, the kernel has it and a killed process loses nothing.

        Errors: OSError (a full disk); the spool then is as it was before.
        """
        line = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        with self._mutex:
            if self._closed:
                raise ValueError(f"{self.path} is closed; append before close")
            start = os.fstat(self._fd).st_size
            try:
                written = os.write(self._fd, line)
                if written != len(line):
                    raise OSError(f"only {written} of {len(line)} bytes fitted")
            except OSError:
                os.ftruncate(self._fd, start)
                raise

    def read_from(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The events from ``offset`` on, as ``read_events`` has them."""
        return read_events(self.path, offset)

    def count_from(self, offset: int) -> int:
        """How many complete lines follow ``offset``."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))

    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def sync(self) -> None:
        """Ask for the disk itself; appends alone survive a killed process, this survives a power cut."""
        with self._mutex:
            fd = None if self._closed else os.dup(self._fd)
        if fd is not None:
            # Outside the mutex: a slow disk must not make append wait.
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        """Sync and let the next process in, also when the disk fails; a second call does nothing. Errors: OSError of the disk."""
        try:
            self.sync()
        finally:
            with self._mutex:
                if not self._closed:
                    self._closed = True
                    try:
                        os.close(self._fd)
                    finally:
                        os.close(self._lock_fd)

    def _end_of_last_line(self) -> int:
        end = os.fstat(self._fd).st_size
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (event, next_offset) from ``offset`` on; a line without its newline is not there yet. Needs no lock.

    A damaged line comes back as an empty event, so that the reader's position moves past it.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _parse(line), offset


def read_cursor(path: Path) -> dict[str, Any] | None:
    """The state that :func:`write_cursor` left, or None when there is none or it is damaged."""
    try:
        return _parse(path.read_bytes()) or None
    except FileNotFoundError:
        return None


def write_cursor(path: Path, state: dict[str, Any]) -> None:
    """Replace the state as a whole: a reader sees the old or the new one, never a part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def holder(spool: Path) -> int | None:
    """The process that writes to the spool on this machine; None when there is none. Nothing is created."""
    try:
        fd = os.open(_lock_path(spool), os.O_RDWR)
    except OSError:
        return None
    try:
        # F_GETLK: who holds it, without taking it; pid 0 is a process that is not seen from here
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else int(pid)


def _lock_path(spool: Path) -> Path:
    return spool.with_name(spool.name + ".lock")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _lock(path: Path, spool: Path) -> int:
    # A POSIX record lock, on a file of its own: it ends with the process even after kill -9, forked children do not
    # inherit it, and closing some other descriptor of the spool does not drop it.
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise RunError(
            f"{spool} is written by another process (pid {holder or 'unknown'}); a run folder has one writer. "
            "Wait for that process, stop it, or choose another run.name"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
