"""Vectors of an old model that nobody can run any more: by key from Parquet, npz or npy, mapped from disk.

    X.parquet   columns ``key`` (text) and ``vector`` (list, or list of fixed size, of floats)
    X.npz       arrays ``keys`` (N,) text and ``vectors`` (N, D) floats
    X.npy       (N, D) floats, beside X.keys.txt with N keys, one a line, UTF-8

A key is what the rows are asked by: an image's path in the folder or archive that was packed, or an identity key.
Keys are personal: errors name numbers of rows, never a key, and only hashes of them are kept in
memory, 24 bytes a row. Measured with 10^7 rows of 16 floats: opened in 13 s, 128 rows found in 0.23 ms.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.keys import hash_keys

_BLOCK_BYTES = 64 << 20
_BLOCK_KEYS = 1 << 18
_BLOCK_VECTORS = 1 << 14
_FLOATS = ("float16", "float32", "float64")

Int64Array = npt.NDArray[np.int64]
Vectors = npt.NDArray[Any]
KeyBlocks = Callable[[], Iterator[list[str]]]


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
        if not path.is_file():
            raise DataError(f"stored vectors {path} is not a file; name a .parquet, .npz or .npy file")
        with path.open("rb") as file:
            head = file.read(6)
        if head.startswith(b"PAR1"):
            vectors, keys = _from_parquet(path, cache_dir)
        elif head.startswith(b"PK"):
            vectors, keys = _from_npz(path, cache_dir)
        elif head == b"\x93NUMPY":
            vectors, keys = _from_npy(path)
        else:
            raise DataError(f"stored vectors {path} is damaged or of no known kind; must be Parquet, npz or npy")
        digest = hashlib.sha256()
        order_N, hash_N, check_N, run = _index(path, keys, len(vectors), digest)
        _check_vectors(path, vectors, digest)
        fingerprint = digest.hexdigest()[:16]
        return cls(path, vectors.shape[1], len(vectors), fingerprint, vectors, hash_N, check_N, order_N, run)

    def find(self, keys: Sequence[str]) -> Int64Array:
        """(n,) row numbers of ``keys``. Errors: DataError saying how many are missing and the place of the first."""
        row_n = self.look_up(hash_keys(keys))
        missing = np.flatnonzero(row_n < 0)
        if missing.size:
            raise DataError(
                f"stored vectors {self.path} ({self.num_rows} rows) lack {missing.size} of the {len(keys)} keys asked "
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


def _index(
    path: Path, keys: KeyBlocks, num_rows: int, digest: Any
) -> tuple[Int64Array, npt.NDArray[np.uint64], npt.NDArray[np.uint64], int]:
    """Rows in the order of their keys' hashes, both halves of the hashes, and how many share a first half at most."""
    hash_N, check_N = np.zeros(num_rows, np.uint64), np.zeros(num_rows, np.uint64)
    row = 0
    for block in keys():
        for place, key in enumerate(block):
            if not key or "\0" in key or "\n" in key:
                raise DataError(
                    f"stored vectors {path}: the key of row {row + place + 1} is empty or holds a NUL or a line break; "
                    "give it a key"
                )
        stop = row + len(block)
        if stop > num_rows:
            raise DataError(f"stored vectors {path}: more keys than the {num_rows} vectors; must be one each")
        hash_n2 = hash_keys(block)
        hash_N[row:stop], check_N[row:stop] = hash_n2.T
        digest.update(hash_n2.astype("<u8"))  # row by row: formats differ in their blocks
        row = stop
    if row != num_rows:
        raise DataError(f"stored vectors {path}: {row} keys for {num_rows} vectors; must be one each")
    order_N = np.lexsort((check_N, hash_N)).astype(np.int64)
    hash_N, check_N = hash_N[order_N], check_N[order_N]
    same_first = hash_N[1:] == hash_N[:-1]
    twice = np.flatnonzero(same_first & (check_N[1:] == check_N[:-1]))
    if twice.size:
        first = int(np.minimum.reduce(np.maximum(order_N[twice], order_N[twice + 1])))
        raise DataError(
            f"stored vectors {path}: {twice.size} keys stand there again; the first in row {first + 1}. "
            "Keep one vector a key"
        )
    run = longest = 1
    for at in np.flatnonzero(same_first):  # as good as never one
        run = run + 1 if at and same_first[at - 1] else 2
        longest = max(longest, run)
    return order_N, hash_N, check_N, longest


def _check_vectors(path: Path, vectors: Vectors, digest: Any) -> None:
    """Refuse vectors without a direction, in blocks; all values enter ``digest``."""
    num_rows, dim = vectors.shape
    digest.update(f"{num_rows} {dim}\n".encode())
    block = max(1, _BLOCK_BYTES // (4 * dim))
    bad, first = 0, None
    for low in range(0, num_rows, block):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is counted
            rows_bD = np.ascontiguousarray(vectors[low : low + block], dtype="<f4")
        digest.update(rows_bD)
        with np.errstate(over="ignore", invalid="ignore"):
            square_b = np.einsum("bd,bd->b", rows_bD, rows_bD, dtype=np.float64)
        wrong = np.flatnonzero(~(np.isfinite(square_b) & (square_b > 0.0)))
        if wrong.size and first is None:
            first = low + int(wrong[0]) + 1
        bad += wrong.size
    if bad:
        raise DataError(
            f"stored vectors {path}: {bad} of {num_rows} vectors are zero or not finite, the first in row {first}; "
            "they have no direction. Leave these images out, or compute their vectors again"
        )


def _check_shape(path: Path, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 2 or 0 in shape or dtype.name not in _FLOATS:
        raise DataError(
            f"stored vectors {path}: {what} is {dtype} of shape {shape}; must be (rows, D) of {', '.join(_FLOATS)}"
        )


def _from_npy(path: Path) -> tuple[Vectors, KeyBlocks]:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"stored vectors {path} is damaged or holds objects ({error}); save it again") from None
    _check_shape(path, "the array", vectors.shape, vectors.dtype)
    names = path.with_name(path.stem + ".keys.txt")
    if not names.is_file():
        raise DataError(f"stored vectors {path} have no {names.name} beside them; write one key a line, in their order")

    def keys() -> Iterator[list[str]]:
        block: list[str] = []
        try:
            # newline="\n": other characters that end lines elsewhere may stand in a key
            with names.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    block.append(line.removesuffix("\n").removesuffix("\r"))
                    if len(block) == _BLOCK_KEYS:
                        yield block
                        block = []
        except UnicodeDecodeError:
            raise DataError(f"{names} is not UTF-8 text; write one key a line") from None
        yield block

    return vectors, keys


_MEMBERS = ("keys", "vectors", "identities", "spaces")


def _from_npz(path: Path, cache_dir: Path) -> tuple[Vectors, KeyBlocks]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
            if not {"keys.npy", "vectors.npy"} <= {*names} <= {f"{name}.npy" for name in _MEMBERS}:
                found = ", ".join(name.removesuffix(".npy") for name in names[:6]) or "nothing"
                raise DataError(
                    f"stored vectors {path} holds {found}; must hold keys and vectors (identities and spaces are passed over). "
                    "Write it with np.savez(path, keys=..., vectors=...)"
                )
            key_shape, _, key_dtype, _ = _npy_header(path, archive, "keys.npy")
            if len(key_shape) != 1 or key_dtype.kind not in "US":
                raise DataError(
                    f"stored vectors {path}: keys is {key_dtype} of shape {key_shape}; must be (rows,) of text, not "
                    "objects: np.asarray(keys, dtype=str)"
                )
            shape, fortran, dtype, start = _npy_header(path, archive, "vectors.npy")
            _check_shape(path, "vectors", shape, dtype)
            entry = archive.getinfo("vectors.npy")
            if entry.compress_type == zipfile.ZIP_STORED and not fortran:
                with archive.open(entry) as member:  # to its end: zipfile then compares the checksum
                    while member.read(_BLOCK_BYTES):
                        pass
                begin = _payload(path, entry.header_offset) + start
                vectors: Vectors = np.memmap(path, dtype, "r", offset=begin, shape=shape)
            else:
                vectors = _decoded(path, cache_dir, shape, dtype, lambda: _npz_blocks(path))
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise DataError(f"stored vectors {path} is damaged ({error}); save it again") from None

    def keys() -> Iterator[list[str]]:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names_N = arrays["keys"]
        except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
            raise DataError(f"stored vectors {path} is damaged ({error}); save it again") from None
        for low in range(0, len(names_N), _BLOCK_KEYS):
            block = names_N[low : low + _BLOCK_KEYS].tolist()
            yield block if key_dtype.kind == "U" else [key.decode("utf-8", "surrogateescape") for key in block]

    return vectors, keys


def _npz_blocks(path: Path) -> Iterator[Vectors]:
    with np.load(path, allow_pickle=False) as arrays:
        yield arrays["vectors"]  # numpy gives it whole or not at all


def _npy_header(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, column order, dtype, and where in the member the values begin."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if dtype.hasobject:
            raise DataError(f"stored vectors {path}: {name} holds objects, which only a pickle could read; refused")
        return shape, fortran, dtype, member.tell()


def _payload(path: Path, header_offset: int) -> int:
    """Where a zip member begins: behind its local header, whose last two fields are the lengths of what follows."""
    with path.open("rb") as file:
        file.seek(header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2").tolist()
    return header_offset + 30 + int(name_bytes) + int(extra_bytes)


def _from_parquet(path: Path, cache_dir: Path) -> tuple[Vectors, KeyBlocks]:
    import pyarrow as pa  # here, because it takes a third of a second and few runs need it
    import pyarrow.parquet as pq

    def batches(column: str) -> Iterator[Any]:
        try:
            with pq.ParquetFile(path) as file:
                size = _BLOCK_KEYS if column == "key" else _BLOCK_VECTORS
                for batch in file.iter_batches(batch_size=size, columns=[column]):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(error) from None

    def _damaged(error: Exception) -> DataError:
        reason = str(error).partition("\n")[0][:200]
        return DataError(f"stored vectors {path} is damaged Parquet ({reason}); write it again")

    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _damaged(error) from None
    names = schema.names
    if not {"key", "vector"} <= {*names} <= {"key", "vector", "identity", "space"}:
        raise DataError(
            f"stored vectors {path} has the columns {', '.join(names[:6])}; must be key and vector (identity and space are "
            "passed over). Rename them"
        )
    key_type, vector_type = (schema.field(name).type for name in ("key", "vector"))
    if pa.types.is_dictionary(key_type):
        key_type = key_type.value_type
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not (pa.types.is_string(key_type) or pa.types.is_large_string(key_type)):
        raise DataError(f"stored vectors {path}: key is {key_type}; must be text. Cast it to string")
    if not any(is_kind(vector_type) for is_kind in lists) or not pa.types.is_floating(vector_type.value_type):
        raise DataError(f"stored vectors {path}: vector is {vector_type}; must be a list of floats")

    def blocks() -> Iterator[Vectors]:
        dim, row = None, 0
        for column in batches("vector"):
            lengths = column.value_lengths().to_numpy(zero_copy_only=False) if len(column) else np.zeros(0)
            dim = lengths[0] if dim is None and len(lengths) else dim
            odd = np.flatnonzero(lengths != dim)  # also of a null, whose length is not a number
            if odd.size or column.flatten().null_count or not dim or dim != dim:
                place = row + (int(odd[0]) if odd.size else 0) + 1
                raise DataError(
                    f"stored vectors {path}: from row {place} on a vector is absent, holds a null, or has another "
                    "length than the first; all must have one length"
                )
            row += len(lengths)
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(len(lengths), int(dim))

    if num_rows == 0:
        raise DataError(f"stored vectors {path} has no rows; write one a key")
    first = next(blocks())
    vectors = _decoded(path, cache_dir, (num_rows, first.shape[1]), first.dtype, blocks)

    def keys() -> Iterator[list[str]]:
        row = 0
        for column in batches("key"):
            if column.null_count:
                raise DataError(
                    f"stored vectors {path}: {column.null_count} keys after row {row} are null; give each a key"
                )
            row += len(column)
            yield column.to_pylist()

    return vectors, keys


def _decoded(
    path: Path, cache_dir: Path, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Callable[[], Iterator[Vectors]]
) -> Vectors:
    """A mapped copy of rows that cannot be mapped where they lie; made once for the bytes of ``path``."""
    with path.open("rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    copy = cache_dir / f"stored-vectors-{name}.npy"
    if not copy.is_file():
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = copy.with_suffix(f".{os.getpid()}.partial")
        try:
            rows = np.lib.format.open_memmap(partial, "w+", dtype, shape)
            low = 0
            for block in blocks():
                rows[low : low + len(block)] = block
                low += len(block)
            rows.flush()
            del rows
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)
    vectors: Vectors = np.load(copy, mmap_mode="r", allow_pickle=False)
    return vectors
