"""Stored tensors a block of rows at a time, by one process: memory is bounded by the block, not by the table.

Reads what ``storage.save`` wrote on any number of ranks; writes single safetensors files, which ``storage.load``
reads on any number of ranks.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist import storage
from lce_dist.errors import CheckpointError, RunError
from lce_dist.tensor_file import BLOCK_BYTES, OFFSETS, Array, Column, Progress, write_file

BLOCK_ROWS = 16384  # keys become Python objects of 40 bytes and more, however short they are
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}


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
            offsets = json.loads(header.pop("__metadata__", {}).get(OFFSETS, "{}"))
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
