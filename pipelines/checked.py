"""A packed data set that was found whole is not hashed again: a cache says which files were.

A file counts as the same while size, times and inode are. Whoever can forge those can forge the manifest. Nothing in the cache is
needed: without it, or where it cannot be written, everything is checked each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_STAMP, _STARTS = "stamp.json", "starts.npy"
_VERSION = 1

Int64Array = npt.NDArray[np.int64]


def default_cache() -> Path:
    """The user's own cache, by the XDG rules; for who has no run."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if named.startswith("/") else Path("~/.cache").expanduser()) / "lce-dist"


def recall(cache: Path, directory: Path, fingerprint: str, files: Sequence[str]) -> Int64Array | None:
    """Starts of identities' lines, of a data set whose ``files`` were found whole; None: look again."""
    folder = _folder(cache, directory)
    try:
        if json.loads((folder / _STAMP).read_text()) != _stamp(directory, fingerprint, files):
            return None
        starts: Int64Array = np.load(folder / _STARTS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return starts


def remember(cache: Path, directory: Path, fingerprint: str, files: Sequence[str], starts: Int64Array) -> None:
    """Keep what a full check found; where it cannot be kept, nothing is lost but time."""
    folder = _folder(cache, directory)
    beside = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(OSError):
        try:
            beside.mkdir(parents=True)
            np.save(beside / _STARTS, starts, allow_pickle=False)
            (beside / _STAMP).write_text(json.dumps(_stamp(directory, fingerprint, files)))
            if folder.exists():  # of other contents; whoever reads it now has its files open
                shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _folder(cache: Path, directory: Path) -> Path:
    return cache / f"checked-{hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]}"


def _stamp(directory: Path, fingerprint: str, files: Sequence[str]) -> dict[str, Any]:
    known = {}
    for name in files:
        found = (directory / name).stat()
        known[name] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
    return {"version": _VERSION, "fingerprint": fingerprint, "files": known}
