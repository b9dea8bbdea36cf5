"""Shards from a URL on this machine: fetched once a node, shared by its ranks, the least lately used ones removed first."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lce_dist.errors import DataError
from pipelines.sources import Source

_LOG = logging.getLogger(__name__)
_AHEAD = 4  # shards that are fetched at a time
_MOST_COMING = 32
_SHARE = 4  # the part of the limit that a node's ranks together may hold open, and again of what is on its way to them
_DEFAULT_GIB = 100.0
_NAME_LENGTH = 64  # of a sha256
_STALE_S = 3600.0


@dataclass(frozen=True)
class CacheSettings:
    """Where shards are kept, and how many GiB of them. directory: None: below the folder for temporary files, by user.

    ranks: how many processes of this node share them at a time.
    """

    directory: Path | None = None
    gib: float = _DEFAULT_GIB
    ranks: int = 1

    @property
    def folder(self) -> Path:
        return self.directory or Path(tempfile.gettempdir()) / f"lce-dist-{os.getuid()}" / "shards"


DEFAULT_CACHE = CacheSettings()


@dataclass
class Fetched:
    """What a cache has done for this process: of shards asked for, how many lay there; bytes fetched; seconds waited."""

    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    fetching_s: float = 0.0
    waited_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: float) -> None:
        """Add to the counts named."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


@dataclass(frozen=True)
class RemoteShard:
    """A file of a source: its name there, its size and its hash, which is its name here."""

    name: str
    size_bytes: int
    sha256: str


class ShardCache:
    """Files in ``settings.folder``, named by their hashes, so several data sets and runs share it.

    Processes agree by locks on files: one fetches a shard, the others wait for it. A killed one leaves nothing that is taken
    for whole. What is open is not removed. Safe to use from several threads.
    """

    def __init__(self, source: Source, settings: CacheSettings) -> None:
        self.fetched = Fetched()
        self._source = source
        self._limit, self._ranks, self._has_warned = int(settings.gib * 2**30), settings.ranks, False
        self._folder = settings.folder
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cluster.cache_dir is {self._folder}; it cannot be made ({error.strerror}). Name a folder of a local disk"
            ) from None
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="shard-cache")
        self._coming: dict[str, tuple[int, Future[int]]] = {}
        self._lock = threading.Lock()

    @property
    def holds_bytes(self) -> int:
        """How much a process should keep open: what is open cannot make room for others."""
        return self._limit // (_SHARE * self._ranks)

    def check_room(self, largest_bytes: int) -> None:
        """Errors: DataError where each rank's least, a shard that is read and one on its way, is more than the limit."""
        needed = 2 * self._ranks * largest_bytes
        if self._ranks > 1 and needed > self._limit:
            raise DataError(
                f"cluster.cache_gib is {self._limit / 2**30:.3g}; {self._ranks} ranks of a node hold two shards each, of up to "
                f"{largest_bytes / 2**30:.3g} GiB: it must be at least {needed / 2**30:.3g}, and better twice that. Raise it, or "
                "pack smaller shards (--shard-mb)"
            )

    def prefetch(self, shard: RemoteShard) -> None:
        """Begin to fetch a shard that will be opened; nothing when as much as is sensible is on its way."""
        with self._lock:
            if shard.sha256 not in self._coming and self._has_room(shard.size_bytes):
                self._coming[shard.sha256] = shard.size_bytes, self._pool.submit(self._descriptor, shard)

    def has_room_ahead(self) -> bool:
        """Whether half of what may be on its way to this process is not."""
        with self._lock:
            coming = sum(size for size, _ in self._coming.values())
            return len(self._coming) <= _MOST_COMING // 2 and coming <= self.holds_bytes // 2

    def _has_room(self, size_bytes: int) -> bool:
        coming = sum(size for size, _ in self._coming.values())
        return not self._coming or (len(self._coming) < _MOST_COMING and coming + size_bytes <= self.holds_bytes)

    def open(self, shard: RemoteShard) -> int:
        """A descriptor of the whole shard, to be closed by the caller. Errors: DataError where it cannot be had."""
        with self._lock:
            coming = self._coming.pop(shard.sha256, None)
        start_s = time.perf_counter()
        descriptor = self._descriptor(shard) if coming is None else coming[1].result()
        self.fetched.add(waited_s=time.perf_counter() - start_s)
        return descriptor

    def path(self, shard: RemoteShard) -> Path:
        """Where the shard lies, for reading at once."""
        os.close(self.open(shard))
        return self._folder / shard.sha256

    def forget(self) -> None:
        """Let go of shards that were to be opened and are not any more; the files stay."""
        with self._lock:
            coming = list(self._coming.values())
            self._coming.clear()
        for _, future in coming:
            if not future.cancel():
                future.add_done_callback(_close_result)

    def _descriptor(self, shard: RemoteShard) -> int:
        path = self._folder / shard.sha256
        descriptor = _opened(path)
        if descriptor is not None:
            self.fetched.add(hits=1)
            return descriptor
        with _locked(self._folder / f"{shard.sha256}.lock") as lock:
            descriptor = _opened(path)  # another process has been here
            if descriptor is not None:
                self.fetched.add(hits=1)
                return descriptor
            self._make_room(shard, lock)
            start_s = time.perf_counter()
            try:
                self._source.fetch(shard.name, path, shard.size_bytes, shard.sha256)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be written ({error.strerror}); free space there, or lower cluster.cache_gib, or name another "
                    "cluster.cache_dir"
                ) from None
            finally:
                lock.truncate(0)
            took_s = time.perf_counter() - start_s
            self.fetched.add(misses=1, bytes_fetched=shard.size_bytes, fetching_s=took_s)
            descriptor = _opened(path)
        if descriptor is None:
            return self._descriptor(shard)  # removed by another process that needed room at once
        return descriptor

    def _make_room(self, shard: RemoteShard, lock: IO[str]) -> None:
        """Remove what was not used for longest; ``lock`` says from then on how many bytes come, so that others count them."""
        if shard.size_bytes > self._limit:
            raise DataError(
                f"cluster.cache_gib is {self._limit / 2**30:.3g}; shard {shard.name} alone has {shard.size_bytes / 2**30:.3g} GiB. Raise it"
            )
        with _locked(self._folder / "room.lock"):
            there, coming = [], 0
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if len(path.name) == _NAME_LENGTH:
                        there.append((status.st_mtime_ns, status.st_size, path))
                    elif path.suffix == ".lock" and status.st_size and not path.with_suffix("").exists():
                        coming += _announced(path)
                    elif path.suffix == ".partial" and time.time() - status.st_mtime > _STALE_S:
                        path.unlink()  # of a process that was killed
            total = coming + sum(size for _, size, _ in there)
            for _, size, path in sorted(there):
                if total + shard.size_bytes <= self._limit:
                    break
                if _remove_unused(path):
                    total -= size
            lock.write(str(shard.size_bytes))
            lock.flush()
        if total + shard.size_bytes > self._limit and not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "%s holds %.3g GiB that are open or on their way, and %.3g GiB come; cluster.cache_gib is %.3g. Raise it, or let "
                "fewer runs share it",
                self._folder,
                total / 2**30,
                shard.size_bytes / 2**30,
                self._limit / 2**30,
            )


def _close_result(future: Future[int]) -> None:
    if not future.cancelled() and future.exception() is None:
        os.close(future.result())


def _opened(path: Path) -> int | None:
    """Open and mark as used now; a shared lock is held until it is closed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # removed in between
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return descriptor


def _remove_unused(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False  # somebody has it open
        path.unlink()
        return True
    return False


def _announced(path: Path) -> int:
    """How many bytes the process that holds a shard's lock is fetching; nothing where it was killed."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0)
    return 0


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)  # left by one that was killed
        yield file
