"""Tensors on disk, whole or cut by class over ranks: written atomically, checked by hash, read by any number of ranks.

torch.distributed.checkpoint does the cutting and the reading back; its safetensors form is used, so no
pickle is written or read. A directory appears under its name only when complete (rename of a finished one).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lce_dist.collectives import all_reduce_max
from lce_dist.errors import CheckpointError, LceError, RunError
from lce_dist.world import World

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torch.distributed is.*", category=UserWarning)

MANIFEST = "manifest.json"
FORMAT = "lce-dist-tensors"
_LONGEST_WORDS = 2000  # bytes of an error that travel to the other ranks

T = TypeVar("T")


def class_rows(local_S: torch.Tensor, num_classes: int, world: World) -> torch.Tensor:
    """The local rows (``shard_bounds``) of a (num_classes, ...) tensor, marked as such for ``save`` and ``load``."""
    if world.size == 1:
        return local_S
    mesh = init_device_mesh(world.device.type, (world.size,))
    shape = torch.Size((num_classes, *local_S.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local_S, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def save(directory: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any], world: World) -> None:
    """Write ``tensors`` (every rank its rows; replicas once) and the JSON ``state``, then commit by one rename.

    A directory of that name is replaced. Errors: RunError, on every rank, where the file system refuses; what
    lay there before is as it was. **Collectives**: those of dcp.save, and three small all-reduces.
    """
    partial = directory.with_name(directory.name + ".partial")
    together(lambda: start(partial) if world.is_first else None, world, RunError)
    writer = HuggingFaceStorageWriter(path=str(partial), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as error:
        raise RunError(f"{partial} cannot be written: {_first_failure(error)}. Free space or go elsewhere") from None
    together(lambda: _write_hashes(partial, world), world, RunError)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    together(lambda: _commit(partial, directory, shapes, state) if world.is_first else None, world, RunError)


def start(partial: Path) -> None:
    """An empty directory to write into, in place of what a killed writer left."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)  # templates of people


def finish(
    partial: Path, directory: Path, files: dict[str, Any], shapes: dict[str, list[int]], state: dict[str, Any]
) -> None:
    """Give a directory that is written in full its manifest and its name; one of that name makes room."""
    write_json(partial / MANIFEST, {"format": FORMAT, "version": 1, "files": files, "shapes": shapes, "state": state})
    replaced = directory.with_name(directory.name + ".replaced")
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        directory.rename(replaced)
    partial.rename(directory)
    _fsync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@dataclass(frozen=True)
class Stored:
    """What a committed directory says of itself: files (bytes, sha256), shapes of whole tensors, JSON state."""

    files: dict[str, dict[str, Any]]
    shapes: dict[str, list[int]]
    state: dict[str, Any]


def read_manifest(directory: Path, world: World) -> Stored:
    """The manifest of a committed directory.

    Errors: CheckpointError, on every rank, when it is absent, damaged or from a later version.
    """
    return together(lambda: _read_manifest(directory), world)


def damage(directory: Path, world: World) -> str | None:
    """Why ``directory`` must not be loaded, or None; the same on every rank. Files are hashed, cut over the ranks.

    **Collectives**: a small all-reduce.
    """
    try:
        together(lambda: _check_hashes(directory, world), world)
    except CheckpointError as error:
        return str(error)
    return None


def load(directory: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill ``tensors`` in place from a committed directory, written by any number of ranks.

    Errors: CheckpointError, on every rank, when a name or a shape is not the stored one, or a file is gone.
    """
    together(lambda: _check_fit(directory, tensors), world)
    reader = HuggingFaceStorageReader(path=str(directory))
    try:
        dcp.load(dict(tensors), storage_reader=reader, no_dist=world.size == 1)
    except CheckpointException as error:
        raise CheckpointError(f"{directory} cannot be read: {_first_failure(error)}. Restore it") from None
    # the reader looks for files itself and leaves rows as they were whose file has gone meanwhile
    together(lambda: _check_files(directory), world)


def together(action: Callable[[], T], world: World, kind: type[LceError] = CheckpointError) -> T:
    """The value of ``action``, which talks to no other rank; where one fails, the same error ends it on every rank.

    Errors: ``kind`` with the words of the first rank that failed. **Collectives**: one all-reduce, and one more
    to tell an error.
    """
    value: T | None = None
    cause: Exception | None = None
    try:
        value = action()
    except Exception as error:  # noqa: BLE001 - whatever it is, ranks that wait in the next collective must learn of it
        cause = error
    words = None if cause is None else str(cause) if isinstance(cause, LceError) else f"{type(cause).__name__}: {cause}"
    told = _first_words(words, world)
    if told is not None:
        raise kind(told) from cause
    return value  # type: ignore[return-value]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _first_words(words: str | None, world: World) -> str | None:
    """The words of the lowest rank that has any, on every rank."""
    if world.size == 1:
        return words
    own = 0 if words is None else world.size - world.rank
    first = int(all_reduce_max(torch.tensor([own], device=world.device), world).item())
    if first == 0:
        return None
    text = np.zeros(_LONGEST_WORDS, dtype=np.uint8)
    if words is not None and own == first:
        encoded = words.encode()[:_LONGEST_WORDS]
        text[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    told = all_reduce_max(torch.from_numpy(text).to(world.device), world).cpu().numpy().tobytes()
    return told.rstrip(b"\0").decode(errors="replace")


def _first_failure(error: CheckpointException) -> str:
    cause = next(iter(error.failures.values()))[0]
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"


def _write_hashes(partial: Path, world: World) -> None:
    own = f"shard-{world.rank + 1:05d}-"
    hashes = {path.name: _describe(path) for path in sorted(partial.glob(own + "*.safetensors"))}
    write_json(partial / f"hashes-{world.rank:05d}.json", hashes)


def _commit(partial: Path, directory: Path, shapes: dict[str, list[int]], state: dict[str, Any]) -> None:
    files: dict[str, Any] = {}
    for part in sorted(partial.glob("hashes-*.json")):
        files |= json.loads(part.read_text())
        part.unlink()
    finish(partial, directory, files, shapes, state)


def _check_hashes(directory: Path, world: World) -> None:
    files = _read_manifest(directory).files
    for number, (name, expected) in enumerate(sorted(files.items())):
        if number % world.size == world.rank:
            found = _describe(directory / name) if (directory / name).exists() else None
            if found != expected:
                raise CheckpointError(
                    f"{directory / name} is missing, truncated or changed (its hash differs from {MANIFEST})"
                )


def _check_fit(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    shapes = _read_manifest(directory).shapes
    for name, tensor in tensors.items():
        if shapes.get(name) != list(tensor.shape):
            stored = "absent" if name not in shapes else f"stored with shape {shapes[name]}"
            raise CheckpointError(f"{directory}: {name} is {stored}; this run needs {list(tensor.shape)}")
    _check_files(directory)


def _check_files(directory: Path) -> None:
    for name, expected in _read_manifest(directory).files.items():
        path = directory / name
        if not path.exists() or path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} is missing or truncated; restore it")


def _read_manifest(directory: Path) -> Stored:
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; the directory was never finished") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != 1:
        raise CheckpointError(f"{path} is not version 1 of {FORMAT}; it was written by another program or release")
    try:
        return Stored(values["files"], values["shapes"], values["state"])
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it has no {error}") from None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
