"""Rows of a .npy file by their numbers: read where they are asked for, so that nothing of the file stays in a process's memory.

A mapping of gigabytes that is touched at random becomes resident as a whole; this does not, and costs a microsecond a row.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt

from pipelines.preads import Preads

T = TypeVar("T", bound=np.generic)


class Rows(Generic[T]):
    """A one-dimensional .npy; indexed by a number, a slice or an array of numbers, as the array itself would be.

    Errors: ValueError for a file that is no such array, or shorter than it says; OSError.
    """

    def __init__(self, path: Path, dtype: np.dtype[T]) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as this object is)
        version = np.lib.format.read_magic(self._file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read_header(self._file)
        self.dtype, self._start, self._preads = dtype, self._file.tell(), Preads()
        if found != dtype or len(shape) != 1:
            raise ValueError(f"{path} has dtype {found}, shape {shape}; must be one row of {dtype} each")
        self._size = int(shape[0])
        if os.fstat(self._file.fileno()).st_size < self._start + self._size * dtype.itemsize:
            raise ValueError(f"{path} is shorter than its header says")

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice | npt.NDArray[np.integer[Any]]) -> npt.NDArray[T]: ...
    def __getitem__(self, place: int | slice | npt.NDArray[np.integer[Any]]) -> T | npt.NDArray[T]:
        if isinstance(place, slice):
            first, last, step = place.indices(self._size)
            if step == 1:
                return self._run(first, max(first, last))
            return self[np.arange(first, last, step)]
        if not isinstance(place, np.ndarray):
            (row,) = self[np.array([place])]
            found: T = row
            return found
        numbers = np.where(place < 0, place + self._size, place)
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < self._size):
            raise IndexError(f"row {int(place[np.argmax((numbers < 0) | (numbers >= self._size))])} of {self._size}")
        if (
            len(numbers)
            and int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1
            and bool(np.all(np.diff(numbers) == 1))
        ):
            return self._run(int(numbers[0]), int(numbers[-1]) + 1)
        size, file = self.dtype.itemsize, self._file.fileno()
        places = [(file, size, start) for start in (self._start + numbers * size).tolist()]
        return np.frombuffer(bytearray(b"".join(self._preads.read(places))), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        whole = self._run(0, self._size)
        return whole if dtype is None else whole.astype(dtype)

    def _run(self, first: int, last: int) -> npt.NDArray[T]:
        size = self.dtype.itemsize
        out = bytearray((last - first) * size)
        view, done = memoryview(out), 0
        while done < len(out):  # the kernel reads 2 GiB at a time at most
            got = os.preadv(self._file.fileno(), [view[done:]], self._start + first * size + done)
            if not got:
                raise ValueError(f"{self._file.name} was cut while it was read")
            done += got
        return np.frombuffer(out, self.dtype)
