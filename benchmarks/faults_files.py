"""Drills of a checkpoint's files: a writer killed before each of its operations, files damaged, a disk without room."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from lce_dist import storage
from lce_dist.errors import LceError, RunError
from lce_dist.world import World

ALONE = World()
KILLED = 77  # exit code of a writer that was ended by its drill


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    """What checkpoint ``step`` of the writer drills holds."""
    return {"rows": torch.full((4096, 64), float(step)), "net": torch.full((512,), float(step))}


def save(directory: Path, step: int) -> None:
    storage.save(directory / f"step-{step:08d}", tensors_of(step), {"step": step}, ALONE)


def whole_steps(directory: Path) -> list[int]:
    """Steps of committed checkpoints; raises where one does not hold what its writer gave it."""
    steps = []
    for path in sorted(directory.glob("step-*")):
        if path.name[5:].isdigit():
            step = int(path.name[5:])
            reason = storage.damage(path, ALONE)
            found = {name: torch.zeros_like(value) for name, value in tensors_of(step).items()}
            storage.load(path, found, ALONE)
            if reason is not None or any(
                not torch.equal(found[name], value) for name, value in tensors_of(step).items()
            ):
                raise AssertionError(f"{path}: {reason or 'other values'}")
            steps.append(step)
    return steps


@contextmanager
def ends_before(operation: int, seen: list[str]) -> Iterator[None]:
    """End this process, as SIGKILL would, before its ``operation``-th operation on the file system."""

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(seen) == operation:
                os._exit(KILLED)
            seen.append(name)
            return real(*args, **kwargs)

        return wrapper

    with (
        mock.patch("os.fsync", counted("fsync", os.fsync)),
        mock.patch("shutil.rmtree", counted("rmtree", shutil.rmtree)),
        mock.patch.object(Path, "rename", counted("rename", Path.rename)),
        mock.patch.object(Path, "mkdir", counted("mkdir", Path.mkdir)),
        mock.patch.object(Path, "open", counted("open", Path.open)),
        mock.patch.object(Path, "unlink", counted("unlink", Path.unlink)),
    ):
        yield


def killed_writers(folder: Path) -> dict[str, int]:
    """A writer killed before each operation of a save: how often something was lost, or was in the way of the next save.

    moments: kills after which the save had not happened; operations: those of one save.
    """
    context = multiprocessing.get_context("fork")
    operation = moments = lost = 0
    for step_saved in (2, 1):  # beside the one that is there, and in its place
        operation = 0
        while True:
            directory = folder / f"{step_saved}-{operation}"
            save(directory, 1)

            def child(directory: Path = directory, operation: int = operation, step: int = step_saved) -> None:
                torch.set_num_threads(1)
                with ends_before(operation, []):
                    save(directory, step)

            process = context.Process(target=child)
            process.start()
            process.join()
            if process.exitcode not in (0, KILLED):
                raise AssertionError(f"the writer ended with {process.exitcode}")
            lost += not _goes_on(directory, step_saved)
            moments += process.exitcode == KILLED
            shutil.rmtree(directory)
            if process.exitcode == 0:
                break
            operation += 1
    return {"operations": operation, "moments": moments, "lost": lost}


def _goes_on(directory: Path, step_saved: int) -> bool:
    """Whether what is committed is whole, holds the checkpoint before, and the next save works."""
    try:
        steps = whole_steps(directory)
        save(directory, 3)
        return (step_saved == 1 or 1 in steps) and 3 in whole_steps(directory)
    except (AssertionError, LceError):
        return False


def damaged_files(folder: Path) -> dict[str, Any]:
    """Each file of a checkpoint cut, emptied, changed in one bit, removed; the manifest of another release.

    cases: how many; missed: those that were not told, or whose telling names no path.
    """
    save(folder, 1)
    cases, missed = 0, []
    path = folder / "step-00000001"
    for name in sorted(file.name for file in path.iterdir()):
        content = (path / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        harms: dict[str, bytes | None] = {"cut": content[:-7], "emptied": b"", "bit": bytes(flipped), "removed": None}
        if name == storage.MANIFEST:
            harms["later version"] = content.replace(b'"version": 1', b'"version": 9')
            harms["other program"] = content.replace(storage.FORMAT.encode(), b"another")
            harms["digit"] = content.replace(b'"step": 1', b'"step": 9')
        for what, harm in harms.items():
            (path / name).unlink()
            if harm is not None:
                (path / name).write_bytes(harm)
            reason = storage.damage(path, ALONE)
            cases += 1
            if reason is None or str(path) not in reason:
                missed.append(f"{name}, {what}: {reason}")
            (path / name).write_bytes(content)
    if storage.damage(path, ALONE) is not None:
        missed.append("restored, and still refused")
    return {"cases": cases, "missed": missed}


def full_disk(folder: Path) -> bool | None:
    """A save on a file system without room: refused in words, and the one before stays. None where none can be mounted."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(words, capture_output=True, check=False).returncode != 0:
        return None
    try:
        save(folder, 1)
        try:
            save(folder, 2)
        except RunError as error:
            return "No space left" in str(error) and whole_steps(folder) == [1]
        return False
    finally:
        subprocess.run(["umount", str(folder)], check=False)
