"""What an importer needs of a source of images, whatever its format: identities, labels, sizes, and bytes by number.

Sources are frozen data that worker processes share: their arrays are mapped from disk, files are opened where they are read.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from pipelines.manifest import MANIFEST_FILE, PackedDataset
from pipelines.order import Int64Array, UInt64Array

_MAX_OPEN_FILES = 128
_KEY_DIGITS = 9


@dataclass(frozen=True, eq=False)
class Texts:
    """Many short texts in two arrays: UTF-8 bytes (B,), and where each ends (N,)."""

    blob_B: npt.NDArray[np.uint8]
    end_N: Int64Array

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        parts = [text.encode(errors="surrogateescape") for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.end_N)

    def __getitem__(self, number: int) -> str:
        first = int(self.end_N[number - 1]) if number else 0
        return self.blob_B[first : int(self.end_N[number])].tobytes().decode(errors="surrogateescape")


class TextsInProgress:
    """Texts that are added one by one. **Memory**: what they take in UTF-8, and 8 bytes each."""

    def __init__(self) -> None:
        self._blob, self._ends = bytearray(), array("q")

    def add(self, text: str) -> None:
        self._blob += text.encode(errors="surrogateescape")
        self._ends.append(len(self._blob))

    def texts(self, number_N: Int64Array | None = None) -> Texts:
        """The texts, or those of these numbers in their order: runs of neighbours are copied at once."""
        end_N = np.frombuffer(self._ends, dtype=np.int64)
        blob_B = np.frombuffer(self._blob, dtype=np.uint8)
        if number_N is None or not len(number_N):
            return Texts(blob_B, end_N)
        size_N = np.diff(end_N, prepend=0)[number_N]
        runs = np.flatnonzero(np.diff(number_N, prepend=number_N[0] - 2) != 1)
        lasts = np.append(runs[1:], len(number_N)) - 1
        pieces = [
            blob_B[end_N[first - 1] if first else 0 : end_N[last]]
            for first, last in zip(number_N[runs].tolist(), number_N[lasts].tolist(), strict=True)
        ]
        return Texts(np.concatenate(pieces), np.cumsum(size_N))


class Source(Protocol):
    """Images by number, 0 .. N-1.

    kind: the format's name; stamp: changes whenever the content does; identities: sorted keys; label_N: the place of
    each image's identity in them; bytes_N: about how large each image is, for planning; group_N: rising numbers of
    the blocks that are read as a whole (row groups), or None where any image can be read alone; in_order: not to be shuffled.
    """

    @property
    def kind(self) -> str: ...
    @property
    def stamp(self) -> str: ...
    @property
    def identities(self) -> Texts: ...
    @property
    def label_N(self) -> Int64Array: ...  # noqa: N802
    @property
    def bytes_N(self) -> Int64Array: ...  # noqa: N802
    @property
    def group_N(self) -> Int64Array | None: ...  # noqa: N802
    @property
    def in_order(self) -> bool: ...

    def expect(self, numbers: Int64Array) -> None:
        """These will be read next, in this order."""

    def read(self, number: int) -> bytes:
        """One image file. Errors: DataError naming it, where it alone is damaged or gone."""

    def name(self, number: int) -> str:
        """What the image is called in the source; asked for after it was read."""

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        """Further files for the packed data set, name to text. order_M: the numbers of the images in it, in their order."""


@runtime_checkable
class KeepsNames(Protocol):
    """A source that knows its images' names by their hashes alone."""

    def name_hashes(self, numbers: Int64Array) -> UInt64Array:
        """(n, 2) as :func:`lce_dist.keys.hash_keys`."""


class SourceDamagedError(DataError):
    """The source itself is damaged: no policy for single bad images applies."""


class OpenFiles:
    """Byte ranges of many files, by at most 128 descriptors; a copy in another process starts without any."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def read(self, path: str, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor(path), size, offset)

    def advise(self, path: str, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        """Let the kernel fetch ranges that are read soon."""
        if hasattr(os, "posix_fadvise"):
            descriptor = self._descriptor(path)
            for offset, size in zip(offsets, sizes, strict=True):
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, path: str) -> int:
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
            if len(self._descriptors) > _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        else:
            self._descriptors.move_to_end(path)
        return descriptor


def number_key(number: int) -> str:
    """The identity key of a numeric label: nine digits, so that keys sort as their numbers do, whatever the data set."""
    return f"{number:0{_KEY_DIGITS}d}"


def label_texts(keys: Sequence[str]) -> tuple[Texts, Int64Array]:
    """Sorted unique keys, and the place of each of ``keys`` in them (N,): the same map whatever the order."""
    unique = sorted(set(keys))
    check_identities(unique)
    place = {key: label for label, key in enumerate(unique)}
    return Texts.of(unique), np.fromiter((place[key] for key in keys), dtype=np.int64, count=len(keys))


def label_coded(keys: Sequence[str], code_N: Int64Array) -> tuple[Texts, Int64Array]:
    """As :func:`label_texts`, of codes (N,) that say which of ``keys`` each image has; keys without images are left out."""
    used, code_N = np.unique(code_N, return_inverse=True)
    texts, label_U = label_texts([keys[int(code)] for code in used])
    return texts, label_U[code_N]


def label_numbers(number_N: Int64Array) -> tuple[Texts, Int64Array]:
    """As :func:`label_texts`, of whole numbers from 0 (N,)."""
    unique, code_N = np.unique(number_N, return_inverse=True)
    return label_coded([number_key(int(number)) for number in unique], code_N)


def look_sorted(label_N: Int64Array, num_labels: int) -> bool:
    """Whether neighbours are of one identity far more often than in a shuffled set.

    By chance as many are as the squares of the identities' shares sum up to. Three times that, and 1 % more, is no chance.
    """
    if len(label_N) < 2 or num_labels < 2:
        return False
    share_C = np.bincount(label_N, minlength=num_labels) / len(label_N)
    by_chance = float(share_C @ share_C)
    found = float(np.mean(label_N[1:] == label_N[:-1]))
    return found > max(0.01 + by_chance, min(3 * by_chance, (1 + by_chance) / 2))


def digest(*parts: bytes | npt.NDArray[np.generic] | str) -> str:
    """64 hex digits over texts and arrays."""
    hashed = hashlib.sha256()
    for part in parts:
        raw = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        if isinstance(raw, np.ndarray):
            hashed.update(raw.nbytes.to_bytes(8, "little"))
            hashed.update(np.ascontiguousarray(raw).view(np.uint8).data)
        else:
            hashed.update(len(raw).to_bytes(8, "little"))
            hashed.update(raw)
    return hashed.hexdigest()


def file_stamp(path: Path) -> str:
    """Name, size and time of a file, as a part of a stamp. Errors: DataError where it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it or name another") from None
    return f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}"


def check_identities(identities: Sequence[str]) -> None:
    """Errors: DataError unless keys are sorted and unique text without control characters, at least one."""
    if not identities:
        raise DataError("there is no identity to pack; at least 1 is needed")
    if list(identities) != sorted(set(identities)):
        raise DataError(f"the {len(identities)} identity keys must be sorted and unique; sort them")
    for key in identities:
        if not is_identity(key):
            raise DataError(f"identity key {key!r} must be UTF-8 text without control characters; rename its folder")


def is_identity(key: str) -> bool:
    """Whether it is text that a list of keys can hold: no control characters, no half of a surrogate pair."""
    return bool(key) and not any(unicodedata.category(character) in ("Cc", "Cs") for character in key)


def already_packed(out: Path, source: str) -> PackedDataset | None:
    """What ``out`` holds, if it is of ``source``; None where nothing is there. Errors: DataError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(f"output {out} exists and is no packed data set; name another or remove it")
    dataset = PackedDataset.open(out)
    if dataset.manifest.source != source:
        raise DataError(
            f"output {out} already holds a data set {dataset.manifest.name!r} from another source or other arguments "
            f"({dataset.num_samples} images of {len(dataset.identities)} identities); name another or remove it"
        )
    return dataset
