"""What is known of images beside their identity: columns of words, looked up for the images that are evaluated.

    X.csv, X.parquet   a column ``key`` (an image's path in the folder or archive that was packed, or an identity), and one or more
                       others: words, booleans, or numbers, which are cut at their quartiles when there are more than 12

Keys and values are personal: errors name rows and columns, never a key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from lce_dist.config import SyntheticConfig
from lce_dist.errors import DataError
from lce_dist.keys import hash_keys
from pipelines.manifest import PackedDataset
from pipelines.synthetic import photo_attributes

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Columns = dict[str, npt.NDArray[np.str_]]

UNKNOWN = "unknown"
_MOST_WORDS = 64  # of a column: groups beyond are no groups
_MOST_NUMBERS = 12
_BLOCK_ROWS = 1 << 18


def attributes_of(path: Path, dataset: PackedDataset, sample_ids: Int64Array) -> Columns:
    """The columns of ``path`` for images (N,) of ``dataset``; "unknown" where the file has no value.

    Errors: DataError for a file of another kind, without a key or another column, with a key twice, with more than 64 words
    in a column, or of which no key names an image or identity of the data. **Memory**: the file, and 24 bytes a row.
    """
    labels, label_N = np.unique(dataset.index["label"][sample_ids], return_inverse=True)
    identity_N2 = hash_keys([dataset.identities[int(label)] for label in labels])[label_N]
    names_N2 = None if dataset.name_hash_N2 is None else dataset.name_hash_N2[sample_ids]
    return _columns(path, names_N2, identity_N2)


def attributes_by_key(path: Path, keys: Sequence[str], identities: Sequence[str]) -> Columns:
    """The columns of ``path`` for images (N,) that are known by their keys and identities. Errors, **Memory**: of ``attributes_of``."""
    return _columns(path, hash_keys(keys), hash_keys(identities))


def drawn_attributes(config: SyntheticConfig, sample_ids: Int64Array) -> Columns:
    """What the embedded faces were drawn with; samples are packed by identity, then photo."""
    rows = [photo_attributes(config, *divmod(sample, config.photos_per_identity)) for sample in sample_ids.tolist()]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _read(path: Path) -> pa.Table:
    in_order = pyarrow.csv.ReadOptions(use_threads=False)  # so that errors know the row
    readers = {".csv": lambda csv: pyarrow.csv.read_csv(csv, in_order), ".parquet": pyarrow.parquet.read_table}
    if path.suffix not in readers:
        raise DataError(f"attributes {path} end in {path.suffix!r}; must be .csv or .parquet")
    if not path.is_file():
        raise DataError(f"attributes {path} is not a file; name a .csv or .parquet with a column 'key'")
    try:
        table: pa.Table = readers[path.suffix](path)
    except (pa.ArrowException, OSError) as error:
        # arrow's words end with the line itself, which is personal
        known = re.match(r"CSV parse error: (Row #\d+: )?Expected \d+ columns, got \d+", str(error))
        reason = known.group() if known else type(error).__name__
        raise DataError(f"attributes {path} cannot be read ({reason}); write it again") from None
    if "key" not in table.column_names or table.num_columns < 2 or len(set(table.column_names)) < table.num_columns:
        raise DataError(
            f"attributes {path} have the columns {', '.join(map(repr, table.column_names))}; must be 'key' and at least one "
            "other, each once"
        )
    return table


def _columns(path: Path, name_N2: UInt64Array | None, identity_N2: UInt64Array) -> Columns:
    table = _read(path)
    row_N = _rows_of(path, table.column("key"), name_N2, identity_N2)
    found: Columns = {}
    for name in table.column_names:
        if name != "key":
            column = table.column(name).combine_chunks()
            found[name] = _words(path, name, column.take(pa.array(row_N, mask=row_N < 0)))
    return found


def _rows_of(path: Path, key: pa.ChunkedArray, name_N2: UInt64Array | None, identity_N2: UInt64Array) -> Int64Array:
    """Row (N,) of each image, by its name or else its identity; -1 where there is none."""
    hashes = np.concatenate(
        [
            hash_keys([str(word) for word in key.slice(first, _BLOCK_ROWS).to_pylist()])
            for first in range(0, len(key), _BLOCK_ROWS)
        ]
        or [np.zeros((0, 2), np.uint64)]
    )
    row_of: dict[tuple[int, int], int] = {}
    for row, (one, two) in enumerate(hashes.tolist()):
        before = row_of.setdefault((one, two), row)
        if before != row:
            both = f"rows {before + 1} and {row + 1}" + (" below the head" if path.suffix == ".csv" else "")
            raise DataError(f"attributes {path}: {both} have one key; each must be there once")
    row_N = np.full(len(identity_N2), -1, dtype=np.int64)
    for each_N2 in (identity_N2, name_N2):
        if each_N2 is not None:
            found_N = np.array([row_of.get((one, two), -1) for one, two in each_N2.tolist()], dtype=np.int64)
            row_N = np.where(found_N >= 0, found_N, row_N)
    if len(row_N) and row_N.max() < 0:
        raise DataError(
            f"attributes {path}: none of {len(hashes)} keys names one of the {len(row_N)} evaluated images or their "
            "identities. Key each row by the image's path in the folder or archive that was packed, or by identity"
        )
    return row_N


def _words(path: Path, name: str, column: Any) -> npt.NDArray[np.str_]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        number_N = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)
        if len(np.unique(number_N[np.isfinite(number_N)])) > _MOST_NUMBERS:
            return _quartiles(number_N)
        column = pa.array(column.to_pylist(), mask=~np.isfinite(number_N))
    elif not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_null(kind)
    ):
        raise DataError(f"attributes {path}: column {name!r} is of type {kind}; must be words, numbers or booleans")
    words = np.array([UNKNOWN if value is None or value == "" else str(value) for value in column.to_pylist()])
    if len(np.unique(words)) > _MOST_WORDS:
        raise DataError(
            f"attributes {path}: column {name!r} has {len(np.unique(words))} different words among the evaluated images; "
            f"must be at most {_MOST_WORDS} to be groups. Leave the column out, or make its words coarser"
        )
    return words


def _quartiles(number_N: npt.NDArray[np.float64]) -> npt.NDArray[np.str_]:
    known = number_N[np.isfinite(number_N)]
    edges = np.unique(np.quantile(known, [0.0, 0.25, 0.5, 0.75, 1.0]))
    place_N = np.clip(np.searchsorted(edges, number_N, side="right") - 1, 0, max(0, len(edges) - 2))
    names = np.array([f"{low:.4g} to {high:.4g}" for low, high in zip(edges, [*edges[1:], edges[-1]], strict=True)])
    return np.where(np.isfinite(number_N), names[place_N], UNKNOWN)
