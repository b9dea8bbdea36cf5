"""One safetensors file, written a block at a time and hashed on its way to the disk."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

BLOCK_BYTES = 32 << 20
OFFSETS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint says which rows a file holds

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]

_KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
}
_ARRAY_KINDS = {np.dtype("<f4"): "F32", np.dtype("<i8"): "I64", np.dtype("u1"): "U8"}


@dataclass(frozen=True)
class Column:
    """One tensor to be written: its shape, and its rows in blocks that are made one after another.

    kind: its type in the format's words; first_row: of the whole tensor, where this is a part of one.
    """

    kind: str
    itemsize: int
    shape: tuple[int, ...]
    blocks: Iterable[Array]
    first_row: int | None = None

    @classmethod
    def of_arrays(cls, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[Array]) -> Column:
        """Rows that come as arrays; they are made ``dtype``."""
        return cls(_ARRAY_KINDS[dtype], dtype.itemsize, shape, (np.ascontiguousarray(b, dtype) for b in blocks))

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor, first_row: int | None = None) -> Column:
        """A tensor in this machine's memory, as it is when it is written."""
        return cls(_KINDS[tensor.dtype], tensor.dtype.itemsize, tuple(tensor.shape), _bytes_of(tensor), first_row)

    @property
    def num_bytes(self) -> int:
        return self.itemsize * int(np.prod(self.shape, dtype=np.int64))


def write_file(path: Path, columns: Mapping[str, Column], progress: Progress | None = None) -> dict[str, Any]:
    """Write one safetensors file and wait until it is on the disk; returns its bytes and sha256.

    progress: gets (bytes done, bytes). **Memory**: a block. **Source**: the safetensors format, version 0.4.
    """
    ordered = sorted(columns.items(), key=lambda item: -item[1].itemsize)  # so that all rows are aligned
    header: dict[str, Any] = {}
    if any(column.first_row is not None for column in columns.values()):
        saved = {name: {"saved_offsets": _offsets(column)} for name, column in ordered}
        header["__metadata__"] = {OFFSETS: json.dumps(saved)}
    end = 0
    for name, column in ordered:
        entry = {"dtype": column.kind, "shape": list(column.shape)}
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
                flat = block.reshape(-1).view(np.uint8)
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


def _offsets(column: Column) -> list[int]:
    rest = [0] * (len(column.shape) - 1)
    return [column.first_row or 0, *rest] if column.shape else []


def _bytes_of(tensor: torch.Tensor) -> Iterator[Array]:
    if tensor.numel() == 0:
        return
    flat: Array = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    for low in range(0, len(flat), BLOCK_BYTES):
        yield flat[low : low + BLOCK_BYTES]
