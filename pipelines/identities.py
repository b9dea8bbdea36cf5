"""Identity keys of a data set, ten or ten million: read from the disk where they are asked for, never all at once."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

_LINE_FEED = 10
_SEARCHED_BYTES = 1 << 24
_READ_KEYS = 1 << 16


class _Keys(Sequence[str]):
    """Equal to any sequence of the same keys."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


class Identities(_Keys):
    """The lines of identities.txt, sorted and unique, one key a label; equal to any sequence of the same keys.

    start_C (C + 1,): the byte at which each line begins, and the end of the file.
    **Memory**: what is touched of the files.
    """

    def __init__(self, path: Path, start_C: Int64Array) -> None:
        self.start_C = start_C
        with open(path, "rb") as file:
            # a mapping of its own: an object that is garbage takes it along
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(start_C) > 1 else b""

    def __len__(self) -> int:
        return len(self.start_C) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            first, last, step = place.indices(len(self))
            if step == 1:
                return tuple(self._lines(first, max(first, last)))
            return tuple(self[label] for label in range(first, last, step))
        label = place + len(self) if place < 0 else place
        if not 0 <= label < len(self):
            raise IndexError(f"label {place} of {len(self)} identities")
        return self._text[int(self.start_C[label]) : int(self.start_C[label + 1]) - 1].decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _READ_KEYS):
            yield from self._lines(first, min(first + _READ_KEYS, len(self)))

    def __repr__(self) -> str:
        return f"Identities({len(self)})"  # who they are is personal

    def labels_of(self, keys: Sequence[str]) -> Int64Array:
        """(n,) the label of each key; -1 where it is unknown."""
        if len(keys) > len(self) // 64:  # one pass is faster than as many searches
            label_of = {key: label for label, key in enumerate(self)}
            return np.array([label_of.get(key, -1) for key in keys], dtype=np.int64)
        return np.array([self._search(key) for key in keys], dtype=np.int64)

    def _search(self, key: str) -> int:
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self[middle]
            if found == key:
                return middle
            low, high = (middle + 1, high) if found < key else (low, middle)
        return -1

    def _lines(self, first: int, last: int) -> list[str]:
        text = self._text[int(self.start_C[first]) : int(self.start_C[last])]
        # not splitlines(): it would also split at characters that a key may hold, such as U+2028
        return text.decode("utf-8").split("\n")[:-1]


class Chosen(_Keys):
    """Some keys of a sequence, by their places in it; read where they are asked for."""

    def __init__(self, keys: Sequence[str], place_C: Int64Array) -> None:
        self.keys, self.place_C = keys, place_C

    def __len__(self) -> int:
        return len(self.place_C)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self._some(self.place_C[place]))
        return self.keys[int(self.place_C[place])]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _READ_KEYS):
            yield from self._some(self.place_C[first : first + _READ_KEYS])

    def __repr__(self) -> str:
        return f"Chosen({len(self)} of {len(self.keys)})"

    def _some(self, places: Int64Array) -> Sequence[str]:
        """Neighbours are read at once."""
        if not len(places):
            return ()
        first, last = int(places[0]), int(places[-1])
        if 0 <= last - first < 4 * len(places) and bool(np.all(places[1:] > places[:-1])):
            near = self.keys[first : last + 1]
            return near if len(near) == len(places) else [near[place] for place in (places - first).tolist()]
        return [self.keys[place] for place in places.tolist()]


def line_starts(path: Path) -> Int64Array:
    """(C + 1,) where each line of a file begins, and its end; what follows the last line feed is no line."""
    parts, done = [np.zeros(1, dtype=np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(_SEARCHED_BYTES):
            parts.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _LINE_FEED) + done + 1)
            done += len(block)
    return np.concatenate(parts)


def first_unsorted(keys: Iterable[str]) -> int | None:
    """The place of the first key that is not above the one before it; None where they are sorted and unique."""
    before: str | None = None
    for place, key in enumerate(keys):
        if before is not None and key <= before:
            return place
        before = key
    return None
