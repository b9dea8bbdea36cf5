"""Files of vectors, read and written a block at a time: Parquet, npz or npy, each row with its key.

    X.parquet   columns ``key``, ``vector`` (lists of floats of one length), and ``identity``, ``space`` or not
    X.npz       arrays ``keys`` (N,), ``vectors`` (N, D) floats, and ``identities``, ``spaces`` (N,) or not
    X.npy       (N, D) floats, beside X.keys.txt with N keys, one a line, and X.identities.txt, X.spaces.txt or not

Keys and identities are text, UTF-8 where they are bytes; whole numbers are taken as the text that they print. ``space`` says of
which model a vector is (lce train: ``space`` in report.json); all rows of a file must be of one. Vectors are float16, float32 or
float64, and are read as float32: what is not finite there is refused, and so is a zero vector.

What a file is its first bytes say; its name does when one is written. Here all rows pass in order; by key they are found in
lce_dist/models/stored_vectors.py. Errors name numbers of rows, never a key. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError, RunError

Vectors = npt.NDArray[np.float32]
# whatever numpy and zipfile meet first in bytes that are not what they were
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    SyntaxError,
)
SUFFIXES = (".parquet", ".npz", ".npy")
_FLOATS = ("float16", "float32", "float64")
_BLOCK_ROWS = 1 << 14


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that follow each other: b keys, (b, D) float32 vectors of any length, b identities where the file has them."""

    keys: list[str]
    rows_bD: Vectors
    identities: list[str] | None


@dataclass(frozen=True, eq=False)
class VectorFile:
    """A file that was opened: its rows, their dimension, whether it names identities, and a pass over all.

    space: of which model the vectors are; None where the file does not say. lies_at: where in the file (N, D) values of ``dtype``
    lie one after the other; None where they do not.
    """

    path: Path
    num_rows: int
    dim: int
    has_identities: bool
    blocks: Callable[[], Iterator[Block]]
    space: str | None
    dtype: np.dtype[Any]
    lies_at: int | None = None

    def mapped(self) -> npt.NDArray[Any] | None:
        """(N, D) rows as they lie in the file, read when they are looked at; changes stay in memory. None for other layouts."""
        if self.lies_at is None:
            return None
        return np.memmap(self.path, dtype=self.dtype, mode="c", offset=self.lies_at, shape=(self.num_rows, self.dim))


def open_vectors(path: Path) -> VectorFile:
    """Look at the file's head. Errors: DataError for what is absent, damaged, has other names or shapes, or holds objects;
    the pass raises it for a row without a key or without a direction (zero, not finite)."""
    if not path.is_file():
        raise DataError(f"vectors {path} is not a file; name a {' or '.join(SUFFIXES)} file")
    with path.open("rb") as file:
        head = file.read(6)
    kinds = {b"PAR1": _open_parquet, b"PK\3\4": _open_npz, b"\x93NUMPY": _open_npy}
    of_kind = next((one for first, one in kinds.items() if head.startswith(first)), None)
    if of_kind is None:
        raise DataError(f"vectors {path} are damaged or of no known kind; must be Parquet, npz or npy")
    opened = of_kind(path)
    if opened.num_rows == 0 or opened.dim == 0:
        raise DataError(
            f"vectors {path} have the shape ({opened.num_rows}, {opened.dim}); must have a row and a column"
        )

    def checked() -> Iterator[Block]:
        row = 0
        for block in opened.blocks():
            _check_block(path, row, block, opened.dim)
            row += len(block.keys)
            yield block
        if row != opened.num_rows:
            raise DataError(f"vectors {path}: {row} rows came of {opened.num_rows}; the file is damaged, copy it again")

    return replace(opened, blocks=checked)


def write_vectors(path: Path, dim: int, num_rows: int, blocks: Iterable[Block], space: str | None = None) -> None:
    """Write ``blocks`` in the format of ``path``'s ending, and that they are of ``space``; the file appears whole or not at all.

    Nobody else may read it.

    Errors: DataError for another ending; RunError where the file system refuses.
    **Memory**: a block; npz: all keys.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"vectors {path} end in {path.suffix!r}; must be {', '.join(SUFFIXES)}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write = {".parquet": _write_parquet, ".npz": _write_npz, ".npy": _write_npy}[path.suffix]
    before = os.umask(0o077)  # templates of people: files 0600, folders that are made 0700
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # names of what lies beside an npy come before it: without the npy nobody looks at them
        for written, name in write(path, partial, dim, num_rows, iter(blocks), space):
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(name)
    except OSError as error:
        raise RunError(f"vectors {path} cannot be written: {error}. Free space or choose another place") from None
    finally:
        os.umask(before)
        for left in path.parent.glob(f"{glob.escape(partial.name)}*"):
            left.unlink(missing_ok=True)


def _one_space(path: Path, spaces: Iterable[str | None]) -> str | None:
    """The space of all rows; None where none says it. Errors: DataError at the first row of another one."""
    first = None
    for row, space in enumerate(spaces):
        if row == 0:
            first = space
        if space != first:
            said = [f"of space {one!r}" if one is not None else "of none that it says" for one in (space, first)]
            raise DataError(
                f"vectors {path}: row {row + 1} is {said[0]}, the first {said[1]}; a file holds the vectors of one model. Write "
                "one file a model"
            )
    return first


def _check_block(path: Path, first: int, block: Block, dim: int) -> None:
    count = len(block.keys)
    if block.rows_bD.shape != (count, dim) or (block.identities is not None and len(block.identities) != count):
        raise DataError(f"vectors {path}: from row {first + 1} on keys, vectors and identities are not one each")
    for column in (block.keys, block.identities or []):
        for place, word in enumerate(column):
            if not word or "\0" in word or "\n" in word:
                raise DataError(
                    f"vectors {path}: the key or identity of row {first + place + 1} is empty, or holds a NUL or a line "
                    "break; give it another"
                )
    with np.errstate(over="ignore", invalid="ignore"):
        square_b = np.einsum("bd,bd->b", block.rows_bD, block.rows_bD, dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(square_b) & (square_b > 0.0)))
    if wrong.size:
        raise DataError(
            f"vectors {path}: row {first + int(wrong[0]) + 1} is zero or not finite in float32; it has no direction. "
            "Leave the image out, or compute its vector again"
        )


def _single(rows: npt.NDArray[Any]) -> Vectors:
    """A copy as float32; what is too large for it becomes infinite, which ``_check_block`` refuses."""
    with np.errstate(over="ignore"):
        return rows.astype(np.float32)


def _open_npy(path: Path) -> VectorFile:
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except _DAMAGED as error:
        raise DataError(f"vectors {path} is damaged or holds objects ({error}); save it again") from None
    _check_array(path, vectors.shape, vectors.dtype)
    keys_file, identities_file, spaces_file = (
        path.with_name(f"{path.stem}.{what}.txt") for what in ("keys", "identities", "spaces")
    )
    if not keys_file.is_file():
        raise DataError(f"vectors {path} have no {keys_file.name} beside them; write one key a line, in their order")
    has_identities = identities_file.is_file()

    def blocks() -> Iterator[Block]:
        keys, identities = lines_of(keys_file), lines_of(identities_file) if has_identities else None
        for low in range(0, len(vectors), _BLOCK_ROWS):
            rows_bD = _single(vectors[low : low + _BLOCK_ROWS])
            names = list(itertools.islice(keys, len(rows_bD)))
            groups = None if identities is None else list(itertools.islice(identities, len(rows_bD)))
            for file, words in ((keys_file, names), (identities_file, groups)):
                if words is not None and len(words) < len(rows_bD):
                    raise DataError(
                        f"{file} ends at line {low + len(words)}; must have {len(vectors)}, one for each of the vectors {path}"
                    )
            yield Block(names, rows_bD, groups)
        for file, more in ((keys_file, keys), (identities_file, identities)):
            if more is not None and next(more, None) is not None:
                raise DataError(
                    f"{file}:{len(vectors) + 1}: a line too many; must be {len(vectors)}, one for each of the vectors {path}"
                )

    space = _one_space(path, lines_of(spaces_file)) if spaces_file.is_file() else None
    by_row = isinstance(vectors, np.memmap) and vectors.flags.c_contiguous
    lies_at = int(vectors.offset) if by_row else None
    return VectorFile(path, vectors.shape[0], vectors.shape[1], has_identities, blocks, space, vectors.dtype, lies_at)


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text, without their ends and the mark that editors put first. Errors: DataError for other bytes."""
    try:
        # newline="\n": other characters that end lines elsewhere may stand in a key
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for line in file:
                yield line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text; write one name a line") from None


def _open_npz(path: Path) -> VectorFile:
    def damaged(error: Exception) -> DataError:
        return DataError(f"vectors {path} is damaged or holds objects ({error}); save it again")

    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if not {"keys", "vectors"} <= names <= {"keys", "vectors", "identities", "spaces"}:
                found = ", ".join(sorted(names)[:6]) or "nothing"
                raise DataError(
                    f"vectors {path} holds {found}; must hold keys and vectors, and identities and spaces or not. "
                    "Write it with np.savez(path, keys=..., vectors=...)"
                )
            with archive.open("vectors.npy") as member:
                shape, by_column, dtype = _header(member)
                header_bytes = member.tell()
            info = archive.getinfo("vectors.npy")
            lies_at = None if by_column else _place_in_zip(path, info, header_bytes)
    except _DAMAGED as error:
        raise damaged(error) from None
    _check_array(path, shape, dtype)

    def words(name: str) -> npt.NDArray[Any]:
        with np.load(path, allow_pickle=False) as arrays:
            column: npt.NDArray[Any] = arrays[name]
        if column.ndim != 1 or column.dtype.kind not in "USiu" or len(column) != shape[0]:
            raise DataError(
                f"vectors {path}: {name} is {column.dtype} of shape {column.shape}; must be ({shape[0]},) of text: "
                "np.asarray(names, dtype=str)"
            )
        return column

    def blocks() -> Iterator[Block]:
        try:
            keys, identities = words("keys"), words("identities") if "identities" in names else None
            for low, rows_bD in _rows_in_zip(path, shape, by_column, dtype):
                part = slice(low, low + len(rows_bD))
                groups = None if identities is None else _texts(path, "identities", low, identities[part])
                yield Block(_texts(path, "keys", low, keys[part]), rows_bD, groups)
        except _DAMAGED as error:
            raise damaged(error) from None

    try:
        space = _one_space(path, _texts(path, "spaces", 0, words("spaces"))) if "spaces" in names else None
    except _DAMAGED as error:
        raise damaged(error) from None
    return VectorFile(path, shape[0], shape[1], "identities" in names, blocks, space, dtype, lies_at)


def _rows_in_zip(
    path: Path, shape: tuple[int, ...], by_column: bool, dtype: np.dtype[Any]
) -> Iterator[tuple[int, Vectors]]:
    """Blocks of rows as float32, and the number of each one's first. **Memory**: a block; of columns, all."""
    if by_column:
        with np.load(path, allow_pickle=False) as arrays:
            vectors = arrays["vectors"]
        for low in range(0, shape[0], _BLOCK_ROWS):
            yield low, _single(vectors[low : low + _BLOCK_ROWS])
        return
    with zipfile.ZipFile(path) as archive, archive.open("vectors.npy") as member:
        _header(member)
        for low in range(0, shape[0], _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, shape[0] - low)
            raw = member.read(count * shape[1] * dtype.itemsize)
            yield low, _single(np.frombuffer(raw, dtype).reshape(count, shape[1]))


def _texts(path: Path, name: str, first: int, column: npt.NDArray[Any]) -> list[str]:
    """What is text, bytes of UTF-8 or a whole number, as text."""
    words: list[Any] = column.tolist()
    if column.dtype.kind != "S":
        return [str(word) for word in words]
    for place, word in enumerate(words):
        try:
            words[place] = word.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"vectors {path}: row {first + place + 1} of {name} is not UTF-8 text; write it as text"
            ) from None
    return words


def _place_in_zip(path: Path, info: zipfile.ZipInfo, header_bytes: int) -> int | None:
    """Where the array's values begin in the archive; None where they are compressed."""
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)  # lengths of name and extra field of the entry's own head, of 30 bytes
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return int(info.header_offset) + 30 + int(name_bytes) + int(extra_bytes) + header_bytes


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(member)
    return shape, by_column, dtype


def _check_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if len(shape) != 2 or dtype.name not in _FLOATS:
        raise DataError(f"vectors {path} are {dtype} of shape {shape}; must be (rows, D) of {', '.join(_FLOATS)}")


def _open_parquet(path: Path) -> VectorFile:
    import pyarrow as pa  # here, because it takes a third of a second
    import pyarrow.parquet as pq

    def damaged(error: Exception) -> DataError:
        reason = str(error).partition("\n")[0][:200]
        return DataError(f"vectors {path} is damaged Parquet ({reason}); write it again")

    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            first = (
                next(file.iter_batches(batch_size=1, columns=["vector"]), None) if "vector" in schema.names else None
            )
    except (pa.ArrowException, OSError) as error:
        raise damaged(error) from None
    columns = [name for name in ("key", "vector", "identity") if name in schema.names]
    if columns[:2] != ["key", "vector"] or {*schema.names} - {*columns, "space"}:
        found = ", ".join(schema.names[:6])
        raise DataError(
            f"vectors {path} has the columns {found}; must be key and vector, and identity and space or not"
        )
    kind = schema.field("vector").type
    listed = (pa.types.is_list(kind), pa.types.is_large_list(kind), pa.types.is_fixed_size_list(kind))
    if not any(listed) or not pa.types.is_floating(kind.value_type):
        raise DataError(f"vectors {path}: vector is {kind}; must be a list of floats")
    for name in {*schema.names} - {"vector"}:
        word = schema.field(name).type
        word = word.value_type if pa.types.is_dictionary(word) else word
        if not (pa.types.is_string(word) or pa.types.is_large_string(word) or pa.types.is_integer(word)):
            raise DataError(f"vectors {path}: {name} is {word}; must be text or whole numbers. Cast it to string")
    dim = 0 if first is None or num_rows == 0 else len(first.column(0)[0].as_py() or ())

    def blocks() -> Iterator[Block]:
        row = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BLOCK_ROWS, columns=columns):
                    vector, *words = (
                        batch.column("vector"),
                        *(batch.column(name) for name in columns if name != "vector"),
                    )
                    flat = vector.flatten()
                    lengths = vector.value_lengths().to_numpy(zero_copy_only=False)
                    if any(one.null_count for one in (vector, flat, *words)) or (lengths != dim).any():
                        raise _first_wrong(path, row, batch, dim)
                    rows_bD = _single(flat.to_numpy(zero_copy_only=False).reshape(len(vector), dim))
                    names = [one.cast(pa.string()).to_pylist() for one in words]
                    row += len(vector)
                    yield Block(names[0], rows_bD, names[1] if len(names) > 1 else None)
        except (pa.ArrowException, OSError) as error:
            raise damaged(error) from None

    def spaces() -> Iterator[str | None]:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=_BLOCK_ROWS, columns=["space"]):
                    yield from (None if space is None else str(space) for space in batch.column(0).to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise damaged(error) from None

    space = _one_space(path, spaces()) if "space" in schema.names else None
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    return VectorFile(path, num_rows, dim, "identity" in columns, blocks, space, dtype)


def _first_wrong(path: Path, first: int, batch: Any, dim: int) -> DataError:
    """What is wrong with the first row of the batch that has a fault."""
    for place in range(batch.num_rows):
        for name in batch.schema.names:
            value = batch.column(name)[place].as_py()
            fault = None
            if value is None:
                fault = f"has no {name}"
            elif name == "vector" and len(value) != dim:
                fault = f"has a vector of {len(value)} numbers, the first row of {dim}"
            elif name == "vector" and None in value:
                fault = f"has no number at place {value.index(None) + 1} of its vector"
            if fault is not None:
                return DataError(
                    f"vectors {path}: row {first + place + 1} {fault}; write it again, or leave the row out"
                )
    return DataError(f"vectors {path}: a row from {first + 1} on is not whole; write the file again")


_Written = Iterator[tuple[Path, Path]]


def _write_parquet(
    path: Path, partial: Path, dim: int, num_rows: int, blocks: Iterator[Block], space: str | None
) -> _Written:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    with contextlib.ExitStack() as stack:
        for block in blocks:
            values = pa.array(block.rows_bD.reshape(-1), pa.float32())
            columns = {"key": pa.array(block.keys), "vector": pa.FixedSizeListArray.from_arrays(values, dim)}
            if block.identities is not None:
                columns["identity"] = pa.array(block.identities)
            if space is not None:
                columns["space"] = pa.array([space] * len(block.keys))
            table = pa.table(columns)
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(partial, table.schema))
            writer.write_table(table)
    yield partial, path


def _write_npy(
    path: Path, partial: Path, dim: int, num_rows: int, blocks: Iterator[Block], space: str | None
) -> _Written:
    names = {what: partial.with_name(f"{partial.name}.{what}") for what in ("keys", "identities", "spaces")}
    with contextlib.ExitStack() as stack:
        texts = {
            what: stack.enter_context(name.open("w", encoding="utf-8", newline="\n")) for what, name in names.items()
        }
        _write_rows(partial, dim, num_rows, blocks, lambda what, words: texts[what].writelines(f"{w}\n" for w in words))
        texts["spaces"].writelines([] if space is None else [f"{space}\n"])
    for what, name in names.items():
        beside = path.with_name(f"{path.stem}.{what}.txt")
        if name.stat().st_size:
            yield name, beside
        else:
            beside.unlink(missing_ok=True)  # of vectors that lay here before, and would name these
    yield partial, path


def _write_npz(
    path: Path, partial: Path, dim: int, num_rows: int, blocks: Iterator[Block], space: str | None
) -> _Written:
    words: dict[str, list[str]] = {"keys": [], "identities": []}
    rows = partial.with_name(f"{partial.name}.rows")
    _write_rows(rows, dim, num_rows, blocks, lambda what, some: words[what].extend(some))
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.write(rows, "vectors.npy")
        words["spaces"] = [] if space is None else [space] * num_rows
        for what, column in words.items():
            if column:
                with archive.open(f"{what}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(column, dtype=str), allow_pickle=False)
    yield partial, path


def _write_rows(
    partial: Path, dim: int, num_rows: int, blocks: Iterator[Block], words: Callable[[str, list[str]], None]
) -> None:
    rows = np.lib.format.open_memmap(partial, "w+", np.float32, (num_rows, dim))
    low = 0
    for block in blocks:
        rows[low : low + len(block.keys)] = block.rows_bD
        low += len(block.keys)
        words("keys", block.keys)
        words("identities", block.identities or [])
    rows.flush()
