"""Units of work on several processes: each leaves its result on disk, so that a killed run goes on where it stopped.

Workers share a counter of units and report what they did; they end when their parent does, however it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from multiprocessing import connection, get_context
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from lce_dist.errors import DataError, LceError, SetupError

_REPORT_EVERY_S = 0.2
_LOCK_PATIENCE_S = 10.0  # the workers of a killed run end with the image that they are at
_T = TypeVar("_T")

Told = Callable[[int, int], None]
Watched = Callable[[int, int], None]


class Job(Protocol):
    """Work in numbered units, any of which may be done by any process, in any order."""

    def run(self, unit: int, told: Told) -> None:
        """Do one unit; ``told`` gets (images, bytes) as they are done."""


class _ParentGoneError(Exception):
    """The process that started this one was killed."""


def run_units(job: Job, units: Sequence[int], num_workers: int, watched: Watched) -> None:
    """Run ``units`` of ``job`` on ``num_workers`` processes; ``watched`` gets (images, bytes) done so far, often.

    One worker is this process itself. Errors: the first worker's own; SetupError for a worker that was killed. The others
    are stopped then; what they finished stays.
    """
    if num_workers == 1 or len(units) <= 1:
        done = [0, 0]

        def told(images: int, size: int) -> None:
            done[0] += images
            done[1] += size
            watched(*done)

        job = ForkingPickler.loads(ForkingPickler.dumps(job))  # as another process gets it
        for unit in units:
            job.run(unit, told)
        return
    # spawn: the caller may hold threads (torch, DALI, Ray), and a fork of those can lock up.
    context = get_context("spawn")
    num_workers = min(num_workers, len(units))
    counter = context.Value("q", 0)
    tally = context.RawArray("q", 2 * num_workers)
    processes, readers = [], []
    try:
        for worker in range(num_workers):
            reader, writer = context.Pipe(duplex=False)
            arguments = (job, tuple(units), counter, tally, worker, writer, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            writer.close()
            processes.append(process)
            readers.append(reader)
        running = dict(zip(readers, processes, strict=True))
        while running:
            for ready in connection.wait(list(running), timeout=_REPORT_EVERY_S):
                process = running.pop(ready)  # type: ignore[call-overload]
                _raise_what_failed(ready, process)
            watched(sum(tally[0::2]), sum(tally[1::2]))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _raise_what_failed(reader: Any, process: Any) -> None:
    try:
        failure = reader.recv()
    except EOFError:
        process.join()
        raise SetupError(
            f"a worker process ended by {_how(process.exitcode)}; memory may have run out. Run again with fewer "
            "--workers: finished shards are kept"
        ) from None
    if failure is not None:
        raise failure


def _how(exit_code: int) -> str:
    return f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit code {exit_code}"


def _work(
    job: Job, units: Sequence[int], counter: Any, tally: Any, worker: int, writer: connection.Connection, parent: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it too, and stops us
    _end_with_parent()

    def told(images: int, size: int) -> None:
        tally[2 * worker] += images
        tally[2 * worker + 1] += size
        if os.getppid() != parent:
            raise _ParentGoneError

    failure: BaseException | None = None
    try:
        while True:
            told(0, 0)
            with counter.get_lock():
                place = counter.value
                counter.value += 1
            if place >= len(units):
                break
            job.run(units[place], told)
    except _ParentGoneError:
        return
    except (LceError, OSError, MemoryError) as error:
        failure = error
    writer.send(failure)


def _end_with_parent() -> None:
    """Linux kills this process with its parent; elsewhere ``told`` notices an image later."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[bool]:
    """Nobody else is in here with the same file. False: who had it has removed the file.

    Errors: DataError when somebody is and stays.
    """
    with path.open("w") as lock:
        give_up_s = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up_s:
                    raise DataError(f"{what} is being written by another process; wait for it or stop it") from None
                time.sleep(0.1)
        try:
            is_there = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except FileNotFoundError:
            is_there = False
        yield is_there


def on_disk(value: _T, folder: Path, name: str = "part") -> _T:
    """A copy of frozen data whose arrays are mapped from files below ``folder``: worker processes then share them."""
    if isinstance(value, np.ndarray):
        if value.size == 0:
            return value
        path = folder / f"{name}.npy"
        np.save(path, value, allow_pickle=False)
        mapped: _T = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    if is_dataclass(value) and not isinstance(value, type):
        parts = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        return replace(value, **{key: on_disk(part, folder, f"{name}.{key}") for key, part in parts.items()})
    return value


def _map_again(path: str, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> Any:
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))  # quicker to index


def _reduce_mapped(array: Any) -> tuple[Any, ...]:
    if array.filename is None or isinstance(array.base, np.memmap):  # a part: its place in the file is not known
        return np.array, (np.asarray(array).tolist(), array.dtype)
    return _map_again, (str(array.filename), array.dtype, array.offset, array.shape)


ForkingPickler.register(np.memmap, _reduce_mapped)
