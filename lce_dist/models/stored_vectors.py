"""Vectors of an old model that nobody can run any more: by key from Parquet, npz or npy, mapped from disk.

The formats, and what of them is refused, are those of lce_dist/vector_files.py. A key is what the rows are asked by: an image's path in the folder or archive that was packed, or an identity key.
Keys are personal: errors name numbers of rows, never a key, and only hashes of them are kept in
memory, 24 bytes a row. Measured with 10^7 rows of 16 floats: opened in 13 s, 128 rows found in 0.23 ms.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.keys import hash_keys
from lce_dist.vector_files import open_vectors

_BLOCK_BYTES = 64 << 20

Int64Array = npt.NDArray[np.int64]
Vectors = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class StoredVectors:
    """(num_rows, embedding_dim) vectors, found by key; fingerprint: 16 hex digits over keys and vectors, in order.

    The fingerprint is that of the values as float32, so equal content has one whatever the format.
    """

    path: Path
    embedding_dim: int
    num_rows: int
    fingerprint: str
    _vectors: Vectors
    _hash_N: npt.NDArray[np.uint64]  # sorted; the second half of the hash settles the first one's collisions
    _check_N: npt.NDArray[np.uint64]
    _row_N: Int64Array
    _longest_run: int

    @classmethod
    def open(cls, path: Path, cache_dir: Path) -> StoredVectors:
        """Open ``path`` and check every row in one pass.

        npy and uncompressed npz are mapped where they lie; Parquet and compressed npz are decoded once into
        ``cache_dir``, which other ranks then find. Errors: DataError for what is damaged, has other names or shapes,
        holds objects (which only a pickle could read), a key twice, or a vector that is zero or not finite.
        """
        file = open_vectors(path)
        hash_N2 = np.zeros((file.num_rows, 2), np.uint64)
        copy = _copy_of(path, cache_dir) if file.lies_at is None else None
        with _written(copy, file.num_rows, file.dim) as rows_ND:
            row = 0
            for block in file.blocks():
                part = slice(row, row + len(block.keys))
                hash_N2[part] = hash_keys(block.keys)
                if rows_ND is not None:
                    rows_ND[part] = block.rows_bD
                row = part.stop
        vectors = file.mapped() if copy is None else np.load(copy, mmap_mode="r", allow_pickle=False)
        assert vectors is not None
        digest = hashlib.sha256(hash_N2.astype("<u8", copy=False).tobytes())
        _add_values(digest, vectors)
        order_N, longest = _index(path, hash_N2)
        hash_N, check_N = hash_N2[order_N].T.copy()
        return cls(path, file.dim, file.num_rows, digest.hexdigest()[:16], vectors, hash_N, check_N, order_N, longest)

    def find(self, keys: Sequence[str]) -> Int64Array:
        """(n,) row numbers of ``keys``. Errors: DataError saying how many are missing and the place of the first."""
        row_n = self.look_up(hash_keys(keys))
        missing = np.flatnonzero(row_n < 0)
        if missing.size:
            raise DataError(
                f"vectors {self.path} ({self.num_rows} rows) lack {missing.size} of the {len(keys)} keys asked "
                f"for; the first is number {int(missing[0]) + 1} of them. Store a vector for each, under the same key"
            )
        return row_n

    def look_up(self, hash_n2: npt.NDArray[np.uint64]) -> Int64Array:
        """(n,) row numbers of keys given as ``hash_keys`` of them; -1 where there is none."""
        hash_n, check_n = hash_n2[:, 0], hash_n2[:, 1]
        place_n = np.searchsorted(self._hash_N, hash_n)
        row_n = np.full(len(hash_n2), -1, dtype=np.int64)
        for step in range(self._longest_run):
            at_n = np.minimum(place_n + step, self.num_rows - 1)
            found_n = (self._hash_N[at_n] == hash_n) & (self._check_N[at_n] == check_n)
            row_n[found_n] = self._row_N[at_n[found_n]]
        return row_n

    def take(self, row_n: Int64Array) -> npt.NDArray[np.float32]:
        """(n, D) unit vectors of rows that :meth:`find` gave."""
        rows_nD = np.asarray(self._vectors[row_n], dtype=np.float64)
        unit_nD = rows_nD / np.linalg.norm(rows_nD, axis=1, keepdims=True)
        return unit_nD.astype(np.float32)

    def rows(self, keys: Sequence[str]) -> npt.NDArray[np.float32]:
        """(n, D) unit vectors of ``keys``. Errors: as :meth:`find`."""
        return self.take(self.find(keys))


def _index(path: Path, hash_N2: npt.NDArray[np.uint64]) -> tuple[Int64Array, int]:
    """Rows in the order of their keys' hashes, and how many share a first half at most. Errors: DataError for a key twice."""
    hash_N, check_N = hash_N2.T
    order_N = np.lexsort((check_N, hash_N)).astype(np.int64)
    hash_N, check_N = hash_N[order_N], check_N[order_N]
    same_first = hash_N[1:] == hash_N[:-1]
    twice = np.flatnonzero(same_first & (check_N[1:] == check_N[:-1]))
    if twice.size:
        first = int(np.minimum.reduce(np.maximum(order_N[twice], order_N[twice + 1])))
        raise DataError(
            f"vectors {path}: {twice.size} keys stand there again; the first in row {first + 1}. Keep one vector a key"
        )
    run = longest = 1
    for at in np.flatnonzero(same_first):  # as good as never one
        run = run + 1 if at and same_first[at - 1] else 2
        longest = max(longest, run)
    return order_N, longest


def _add_values(digest: Any, vectors: Vectors) -> None:
    """All values enter ``digest``, as float32, in blocks."""
    num_rows, dim = vectors.shape
    digest.update(f"{num_rows} {dim}\n".encode())
    block = max(1, _BLOCK_BYTES // (4 * dim))
    for low in range(0, num_rows, block):
        digest.update(np.ascontiguousarray(vectors[low : low + block], dtype="<f4"))


def _copy_of(path: Path, cache_dir: Path) -> Path:
    """Where the copy of rows lies that cannot be mapped in ``path``; its name is of the file's bytes."""
    with path.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return cache_dir / f"stored-vectors-{name}.npy"


@contextmanager
def _written(copy: Path | None, num_rows: int, dim: int) -> Iterator[Vectors | None]:
    """Rows to fill, which become ``copy``, whole or not at all; None where there is nothing to write."""
    if copy is None or copy.is_file():
        yield None
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_suffix(f".{os.getpid()}.partial")
    try:
        rows_ND = np.lib.format.open_memmap(partial, "w+", np.float32, (num_rows, dim))
        yield rows_ND
        rows_ND.flush()
        partial.replace(copy)
    finally:
        partial.unlink(missing_ok=True)
