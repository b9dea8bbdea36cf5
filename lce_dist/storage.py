"""Tensors on disk, whole or cut by class over ranks: written atomically, checked by hash, read by any number of ranks.

Each rank writes one safetensors file of its own, in the form that torch.distributed.checkpoint reads back on any number of
ranks; no pickle is written or read. A directory appears under its name only when complete (rename of a finished one).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lce_dist.collectives import all_reduce_max
from lce_dist.errors import CheckpointError, LceError, RunError
from lce_dist.tensor_file import Column, write_file
from lce_dist.world import World, shard_bounds

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torch.distributed is.*", category=UserWarning)

MANIFEST = "manifest.json"
FORMAT = "lce-dist-tensors"
_KEYS = {"format", "version", "files", "shapes", "state", "sha256"}
_LOOK_S = 0.05  # between two looks for the files of other ranks
_SEEN_S = 300.0  # until a network file system shows what others have written, at the latest
_LEAVE_S = 30.0
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
    lay there before is as it was. **Collectives**: three small all-reduces.
    """
    Writing(directory, tensors, state, world, copied=False).finish()


class Writing:
    """A directory on its way to the disk, in a thread; when every rank's file is there, the first rank's thread commits it.

    copied: values are as they were when it began, whatever becomes of the tensors; otherwise they must stay as they are.
    allow: asked by the first rank's thread immediately before the commit; its error prevents it. then: called after it. Errors: RunError, on every rank, where it cannot begin.
    **Memory**: with copied, the rank's part once more, in the machine's memory. **Collectives**: a small all-reduce.
    """

    def __init__(
        self,
        directory: Path,
        tensors: dict[str, torch.Tensor],
        state: dict[str, Any],
        world: World,
        copied: bool = True,
        then: Callable[[], None] | None = None,
        allow: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_committed = False
        self._directory, self._state, self._world = directory, state, world
        self._then, self._allow = then, allow
        self._partial = directory.with_name(directory.name + ".partial")
        self._shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self._error: Exception | None = None
        self._given_up = threading.Event()
        together(lambda: start(self._partial) if world.is_first else None, world, RunError)
        self._columns = _own_columns(tensors, world, copied)
        self._own = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._all = threading.Thread(target=self._commit, name="commit", daemon=True)
        self._own.start()
        if world.is_first:
            self._all.start()

    def finish(self) -> None:
        """Wait until it is committed. Errors: RunError, on every rank, where the file system refused.

        **Collectives**: two small all-reduces.
        """
        self._own.join()
        try:
            together(self._raise, self._world, RunError)
        except RunError:
            self._given_up.set()
            raise
        if self._world.is_first:
            self._all.join(_SEEN_S)
            if self._all.is_alive():
                self._given_up.set()
                self._error = RunError(
                    f"{self._partial}: files of other ranks are not seen here after {_SEEN_S:.0f} s. Is it shared storage?"
                )
        together(self._raise, self._world, RunError)
        self.is_committed = True

    def leave(self) -> None:
        """Wait for a while without asking the other ranks, which may be no more; for a process that ends."""
        self._own.join(_LEAVE_S)
        if self._world.is_first:
            self._all.join(_LEAVE_S)
        self._given_up.set()

    def _raise(self) -> None:
        if isinstance(self._error, LceError):
            raise self._error
        if self._error is not None:
            words = f"{type(self._error).__name__}: {self._error}"
            raise RunError(f"{self._partial} cannot be written: {words}. Free space or go elsewhere") from self._error

    def _write(self) -> None:
        try:
            files = {}
            if self._columns:
                name = f"shard-{self._world.rank + 1:05d}-of-{self._world.size:05d}.safetensors"
                files[name] = write_file(self._partial / name, self._columns)
            self._columns = {}
            unnamed = self._partial / f"hashes-{self._world.rank:05d}"
            write_json(unnamed, files)
            unnamed.rename(unnamed.with_suffix(".json"))
        except Exception as error:  # noqa: BLE001 - whatever it is, the ranks learn of it when they finish
            self._error = error

    def _commit(self) -> None:
        """Once all have written; by waiting for their files, since a collective here would meet those of the training."""
        try:
            parts = [self._partial / f"hashes-{rank:05d}.json" for rank in range(self._world.size)]
            while not all(part.exists() for part in parts):
                if self._given_up.wait(_LOOK_S) or self._error is not None:
                    return
            files: dict[str, Any] = {}
            for part in parts:
                files |= json.loads(part.read_text())
                part.unlink()
            finish(self._partial, self._directory, files, self._shapes, self._state, self._allow)
            self.is_committed = True
            if self._then is not None:
                self._then()
        except Exception as error:  # noqa: BLE001 - as above
            self._error = error


def _own_columns(tensors: dict[str, torch.Tensor], world: World, copied: bool) -> dict[str, Column]:
    """What this rank writes: its rows of what is cut by class, and its share of what every rank has."""
    columns = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        first_row = None
        if isinstance(tensor, DTensor):
            first_row, last_row = shard_bounds(tensor.shape[0], world.rank, world.size)
            if first_row == last_row:
                continue
            tensor = tensor.to_local()
        elif number % world.size != world.rank:
            continue
        columns[name] = Column.of_tensor(tensor.detach().to("cpu", copy=copied), first_row)
    return columns


def start(partial: Path) -> None:
    """An empty directory to write into, in place of what a killed writer left."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)  # templates of people


def finish(
    partial: Path,
    directory: Path,
    files: dict[str, Any],
    shapes: dict[str, list[int]],
    state: dict[str, Any],
    allow: Callable[[], None] = lambda: None,
) -> None:
    """Give a directory that is written in full its manifest and its name; one of that name makes room.

    allow: asked immediately before that; its error leaves everything as it was.
    """
    manifest = {"format": FORMAT, "version": 1, "files": files, "shapes": shapes, "state": state}
    write_json(partial / MANIFEST, {**manifest, "sha256": _seal(manifest)})
    allow()
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


def missing(directory: Path, world: World) -> str | None:
    """As ``damage``, by the sizes of the files alone. **Collectives**: a small all-reduce."""
    try:
        together(lambda: _check_files(directory), world)
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
    if unknown := sorted(values.keys() - _KEYS):
        raise CheckpointError(f"{path} is damaged: it has {unknown[0]!r}; it may have {', '.join(sorted(_KEYS))}")
    sealed = {key: value for key, value in values.items() if key != "sha256"}
    if "sha256" in values and values["sha256"] != _seal(sealed):  # older ones have none
        raise CheckpointError(f"{path} is damaged: what it says is not what was written (its sha256 differs)")
    try:
        return Stored(values["files"], values["shapes"], values["state"])
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it has no {error}") from None


def _seal(manifest: dict[str, Any]) -> str:
    """Of what a manifest says, whatever the spacing of its JSON."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


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
