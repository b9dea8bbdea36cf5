"""Stored tensors a block of rows at a time, by one process: memory is bounded by the block, not by the table.

Reads what ``storage.save`` wrote on any number of ranks; writes single safetensors files, which ``storage.load``
reads on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist import storage
from lce_dist.errors import CheckpointError, RunError

BLOCK_BYTES = 32 << 20
BLOCK_ROWS = 16384  # keys become Python objects of 40 bytes and more, however short they are
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OFFSETS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint says which rows a file holds

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """Rows [first, last) of a tensor: bytes of a file."""

    first: int
    last: int
    path: Path
    offset: int


class StoredRows:
    """One tensor (C, ...) of a committed directory, read from its files when asked.

    **Memory**: what is asked for, and pages of files that the system can drop.
    """

    def __init__(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[Part]) -> None:
        self.dtype = dtype
        self.shape = shape
        self._parts = sorted((part for part in parts if part.last > part.first), key=lambda part: part.first)
        covered = 0
        for part in self._parts:
            if part.first != covered:
                raise CheckpointError(
                    f"{part.path}: {name} has rows from {part.first}; the file before ends at {covered}"
                )
            covered = part.last
        if covered != shape[0]:
            raise CheckpointError(f"{name} has {covered} rows in its files; the manifest says {shape[0]}. Restore it")

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def take(self, rows_N: npt.NDArray[np.int64]) -> Array:
        """Rows by number, in the order asked for, as (N, ...)."""
        taken = np.empty((len(rows_N), *self.shape[1:]), self.dtype)
        for part in self._parts:
            here = np.flatnonzero((rows_N >= part.first) & (rows_N < part.last))
            if here.size:
                taken[here] = self._map(part)[rows_N[here] - part.first]
        return taken

    def blocks(self, rows_N: npt.NDArray[np.int64] | None = None) -> Iterator[Array]:
        """All rows, or those asked for in that order: at most ``BLOCK_ROWS`` and about ``BLOCK_BYTES`` at a time."""
        step = min(BLOCK_ROWS, max(1, BLOCK_BYTES // self.row_bytes))
        if rows_N is not None:
            for low in range(0, len(rows_N), step):
                yield self.take(rows_N[low : low + step])
            return
        for part in self._parts:
            mapped = self._map(part)
            for low in range(0, part.last - part.first, step):
                yield np.array(mapped[low : low + step])

    def _map(self, part: Part) -> Array:
        shape = (part.last - part.first, *self.shape[1:])
        return np.memmap(part.path, self.dtype, "r", part.offset, shape)


def open_rows(directory: Path, stored: storage.Stored) -> dict[str, StoredRows]:
    """Every tensor of a committed directory by name; the files' hashes are the caller's matter.

    Errors: CheckpointError when files and manifest do not fit.
    """
    parts: dict[str, list[Part]] = {name: [] for name in stored.shapes}
    dtypes: dict[str, np.dtype[Any]] = {}
    for file in stored.files:
        path = directory / file
        try:
            header, begin = _read_header(path)
            offsets = json.loads(header.pop("__metadata__", {}).get(_OFFSETS, "{}"))
            for name, entry in header.items():
                dtypes[name] = _DTYPES[entry["dtype"]]
                first = offsets[name]["saved_offsets"][0] if name in offsets else 0
                parts[name].append(Part(first, first + entry["shape"][0], path, begin + entry["data_offsets"][0]))
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise CheckpointError(
                f"{path} is damaged or foreign ({type(error).__name__}: {error}); restore it"
            ) from None
    missing = sorted(set(stored.shapes) - set(dtypes))
    if missing:
        raise CheckpointError(f"{directory} lacks the tensor {missing[0]!r} that its manifest names; restore it")
    return {name: StoredRows(name, dtypes[name], tuple(shape), parts[name]) for name, shape in stored.shapes.items()}


@dataclass(frozen=True)
class Column:
    """One tensor to be written: its shape, and its rows in blocks that are made one after another."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Iterable[Array]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def write_file(path: Path, columns: dict[str, Column], progress: Progress | None = None) -> dict[str, Any]:
    """Write one safetensors file and wait until it is on the disk; returns its bytes and sha256.

    progress: gets (bytes done, bytes). **Memory**: a block. **Source**: the safetensors format, version 0.4.
    """
    ordered = sorted(columns.items(), key=lambda item: -item[1].dtype.itemsize)  # so that all rows are aligned
    header: dict[str, Any] = {}
    end = 0
    for name, column in ordered:
        entry = {"dtype": _NAMES[column.dtype], "shape": list(column.shape)}
        header[name] = entry | {"data_offsets": [end, end + column.num_bytes]}
        end += column.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    done = 0
    with path.open("wb") as file:
        for data in (struct.pack("<Q", len(text)), text):
            file.write(data)
            digest.update(data)
        for name, column in ordered:
            before = done
            for block in column.blocks:
                flat = np.ascontiguousarray(block, column.dtype).reshape(-1).view(np.uint8)
                file.write(flat.data)
                digest.update(flat.data)
                done += flat.nbytes
                if progress is not None:
                    progress(done, end)
            if done - before != column.num_bytes:
                raise AssertionError(f"{name}: {done - before} bytes came, {column.num_bytes} were promised")
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}


def write_directory(
    out: Path, columns: dict[str, Column], state: dict[str, Any], progress: Progress | None = None
) -> None:
    """A new directory as ``storage.save`` writes it; it has its name only when it is complete.

    Errors: RunError when ``out`` exists, or the file system refuses.
    """
    refuse_existing(out)
    partial = out.with_name(out.name + ".partial")
    try:
        storage.start(partial)
        described = write_file(partial / "model.safetensors", columns, progress)
        shapes = {name: list(column.shape) for name, column in columns.items()}
        refuse_existing(out)
        storage.finish(partial, out, {"model.safetensors": described}, shapes, state)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error}. Free space or choose another place") from None


def refuse_existing(out: Path) -> None:
    """Errors: RunError when ``out`` exists."""
    if out.exists():
        raise RunError(f"{out} exists and is not overwritten; choose another name, or remove it")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"its header has {length} bytes")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length
