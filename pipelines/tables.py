"""Tables as sources to import: a .csv of paths, and Parquet files with the images' bytes inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute, csv, parquet

from lce_dist.errors import ConfigError, DataError
from pipelines.folders import FileSource
from pipelines.importable import Texts, digest, file_stamp, label_coded, label_numbers
from pipelines.order import Int64Array


def open_csv(
    path: Path,
    root: Path | None = None,
    image_column: str = "path",
    label_column: str = "identity",
    skip_bad: bool = False,
) -> FileSource:
    """Image files that a table lists, below ``root`` (its own folder when None).

    Errors: DataError for a missing column or value, for a path that leaves ``root``, and for a missing file, unless
    ``skip_bad``: then reading it is the error.
    """
    root = path.parent if root is None else root
    try:
        table = csv.read_csv(
            path,
            convert_options=csv.ConvertOptions(
                column_types={image_column: pyarrow.string(), label_column: pyarrow.string()},
                include_columns=[image_column, label_column],
                strings_can_be_null=False,
            ),
        )
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"table {path} cannot be read ({str(error).splitlines()[0]}); must be CSV with the columns {image_column!r} and "
            f"{label_column!r} (--image-column, --label-column)"
        ) from None
    paths: list[str] = table.column(image_column).to_pylist()
    keys, code_N = _coded(table.column(label_column))
    if not paths:
        raise DataError(f"table {path} lists no image; it needs a line for each")
    if "" in keys:
        row = int(np.flatnonzero(code_N == keys.index(""))[0])
        raise DataError(f"{path}: image {paths[row]!r} has no {label_column}; give it one or leave the line out")
    identities, label_N = label_coded(keys, code_N)
    relative = [_below(path, row, text, root) for row, text in enumerate(paths)]
    size_N, time_N = (np.zeros(len(relative), dtype=np.int64) for _ in range(2))
    for row, text in enumerate(relative):
        try:
            status = (root / text).stat()
        except OSError as error:
            if skip_bad:
                continue
            raise DataError(
                f"{path}: image {root / text} of row {row + 1} cannot be read ({error.strerror}). With --bad skip such images "
                "are left out and listed"
            ) from None
        size_N[row], time_N[row] = status.st_size, status.st_mtime_ns
    texts = Texts.of(relative)
    stamp = digest("csv", texts.blob_B, texts.end_N, size_N, time_N, label_N, identities.blob_B)
    return FileSource("csv", stamp, identities, label_N, size_N, str(root), texts)


def _below(table: Path, row: int, text: str, root: Path) -> str:
    place = PurePosixPath(text)
    if place.is_absolute() and place.is_relative_to(root.absolute()):
        place = place.relative_to(root.absolute())
    if not text or place.is_absolute() or ".." in place.parts or "\0" in text:
        raise DataError(f"{table}: path {text!r} of row {row + 1} must lie below {root}; say where with --root FOLDER")
    return str(place)


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """Images in a column of Parquet files. Row groups (G,): file_G, group_in_file_G, first_G (their first image's number)."""

    stamp: str
    identities: Texts
    label_N: Int64Array
    bytes_N: Int64Array
    group_N: Int64Array
    files: Texts
    file_names: Texts
    file_G: Int64Array
    group_in_file_G: Int64Array
    first_G: Int64Array
    first_in_file_G: Int64Array
    image_column: str
    kind: str = "parquet"
    in_order: bool = False
    loaded: dict[int, Any] = field(default_factory=dict)  # row groups in memory, of this process alone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loaded": {}}

    def expect(self, numbers: Int64Array) -> None:
        wanted = set(np.unique(self.group_N[numbers]).tolist())
        for group in self.loaded.keys() - wanted:
            del self.loaded[group]

    def read(self, number: int) -> bytes:
        group = int(self.group_N[number])
        if group not in self.loaded:
            self.loaded[group] = self._load(group)
        value = self.loaded[group][number - int(self.first_G[group])]
        if not value.is_valid:
            raise DataError(f"image {self.name(number)} has no bytes; leave its row out")
        payload: bytes = value.as_buffer().to_pybytes()
        return payload

    def name(self, number: int) -> str:
        group = int(self.group_N[number])
        row = number - int(self.first_G[group]) + int(self.first_in_file_G[group])
        return f"{self.file_names[int(self.file_G[group])]}:{row}"

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        return {}

    def _load(self, group: int) -> Any:
        path = self.files[int(self.file_G[group])]
        try:
            with parquet.ParquetFile(path) as file:
                table = file.read_row_group(
                    int(self.group_in_file_G[group]), columns=[self.image_column], use_threads=False
                )
        except (pyarrow.ArrowException, OSError) as error:
            raise SourceFailedError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it") from None
        chunks = table.column(0).chunks  # more than one above 2 GB
        if pyarrow.types.is_struct(table.column(0).type):
            chunks = [chunk.field("bytes") for chunk in chunks]
        return chunks[0] if len(chunks) == 1 else pyarrow.chunked_array(chunks)


class SourceFailedError(OSError):
    """A file of the source is damaged as a whole: no policy for bad images applies."""


def open_parquet(
    paths: Sequence[Path], image_column: str | None = None, label_column: str | None = None
) -> ParquetSource:
    """Images in Parquet files: a binary column, or a struct with ``bytes`` as Hugging Face writes it.

    Without names the only column that can hold images is taken, and ``label`` or ``identity``. Whole numbers become nine-digit keys;
    where the file has names for them (Hugging Face's ClassLabel), the names do.
    Errors: ConfigError for columns that are not there or cannot be meant; DataError for damaged files and missing labels.
    **Memory**: 40 bytes an image.
    """
    first = _metadata(paths[0])
    image_column = image_column or _only_image_column(paths[0], first.schema_arrow)
    if label_column is None:
        label_column = next((name for name in ("identity", "label") if name in first.schema_arrow.names), "label")
    file_G, group_in_file_G, first_in_file_G, rows_G, bytes_G = [], [], [], [], []
    labels, stamps = [], []
    names = _label_names(first.schema_arrow, label_column)
    for number, path in enumerate(paths):
        file = _metadata(path)
        _check_columns(path, file.schema_arrow, image_column, label_column)
        try:
            column = parquet.read_table(path, columns=[label_column], use_threads=False, partitioning=None).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it") from None
        if column.null_count:
            raise DataError(f"{path}: {column.null_count} rows have no {label_column}; give each one or leave it out")
        labels.append(column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column)
        stamps.append(file_stamp(path))
        row = 0
        for group in range(file.metadata.num_row_groups):
            facts = file.metadata.row_group(group)
            if not facts.num_rows:
                continue
            chunks = (facts.column(at) for at in range(facts.num_columns))
            size = sum(
                chunk.total_uncompressed_size
                for chunk in chunks
                if chunk.path_in_schema in (image_column, f"{image_column}.bytes")
            )
            file_G.append(number)
            group_in_file_G.append(group)
            first_in_file_G.append(row)
            rows_G.append(facts.num_rows)
            bytes_G.append(size)
            row += facts.num_rows
    if not rows_G:
        raise DataError(f"{paths[0].parent if len(paths) > 1 else paths[0]} has no rows; it needs one for each image")
    rows = np.array(rows_G, dtype=np.int64)
    group_N = np.repeat(np.arange(len(rows), dtype=np.int64), rows)
    identities, label_N = _labels(labels, names, paths[0], label_column)
    root = Path(paths[0]).parent if len(paths) == 1 else Path(*_shared_parts(paths))
    return ParquetSource(
        digest("parquet", image_column, label_column, *stamps),
        identities,
        label_N,
        np.repeat(np.array(bytes_G, dtype=np.int64) // rows, rows),
        group_N,
        Texts.of(str(path) for path in paths),
        Texts.of(path.relative_to(root).as_posix() for path in paths),
        np.array(file_G, dtype=np.int64),
        np.array(group_in_file_G, dtype=np.int64),
        np.concatenate([[0], np.cumsum(rows)[:-1]]).astype(np.int64),
        np.array(first_in_file_G, dtype=np.int64),
        image_column,
    )


def _shared_parts(paths: Sequence[Path]) -> list[str]:
    shared: list[str] = []
    for parts in zip(*(path.parent.parts for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared or ["."]


def _metadata(path: Path) -> Any:
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is no Parquet file ({str(error).splitlines()[0]}); restore it or leave it out"
        ) from None


def _holds_images(kind: Any) -> bool:
    if pyarrow.types.is_struct(kind):
        return any(one.name == "bytes" and _holds_images(one.type) for one in kind)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _only_image_column(path: Path, schema: Any) -> str:
    found = [one.name for one in schema if _holds_images(one.type)]
    if len(found) != 1:
        raise ConfigError(
            f"{path} has {len(found)} columns that may hold images ({', '.join(found) or ', '.join(schema.names)}); say "
            "which with --image-column"
        )
    name: str = found[0]
    return name


def _check_columns(path: Path, schema: Any, image_column: str, label_column: str) -> None:
    for flag, name in (("--image-column", image_column), ("--label-column", label_column)):
        if name not in schema.names:
            raise ConfigError(f"{path} has no column {name!r} but {', '.join(schema.names)}; say which with {flag}")
    kind = schema.field(image_column).type
    if not _holds_images(kind):
        raise ConfigError(
            f"{path}: column {image_column!r} is {kind}; must be binary or a struct with bytes (--image-column)"
        )


def _label_names(schema: Any, label_column: str) -> list[str] | None:
    """Names that Hugging Face keeps in the schema's metadata for whole-number labels."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(one, str) for one in names) else None


def _labels(columns: Sequence[Any], names: list[str] | None, path: Path, label_column: str) -> tuple[Texts, Int64Array]:
    kinds = {str(column.type) for column in columns}
    if len(kinds) > 1:
        raise DataError(f"column {label_column!r} is {' and '.join(sorted(kinds))} in different files; must be one")
    column = pyarrow.chunked_array([chunk for column in columns for chunk in column.chunks], type=columns[0].type)
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        return label_coded(*_coded(column))
    if not pyarrow.types.is_integer(column.type):
        raise ConfigError(
            f"{path}: column {label_column!r} is {column.type}; must be whole numbers or text (--label-column)"
        )
    try:
        number_N = compute.cast(column, pyarrow.int64()).to_numpy()
    except pyarrow.ArrowInvalid:
        raise DataError(
            f"{path}: column {label_column!r} holds {compute.max(column)}; must be below 2^63. Write such keys as text"
        ) from None
    lowest, highest = int(number_N.min()), int(number_N.max())
    if lowest < 0:
        raise DataError(
            f"column {label_column!r} holds {lowest}; must be 0 or more. Rows without an identity cannot be used"
        )
    if names is not None and highest < len(names):
        return label_coded(names, number_N)
    return label_numbers(number_N)


def _coded(column: Any) -> tuple[list[str], Int64Array]:
    """The different texts of a column, and which of them each row has."""
    encoded = pyarrow.chunked_array(column).combine_chunks().dictionary_encode() if column.num_chunks else None
    if encoded is None:
        return [], np.zeros(0, dtype=np.int64)
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)
