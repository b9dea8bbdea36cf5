"""MXNet's RecordIO (train.rec, train.idx, train.lst) as a source to import, read without mxnet.

A record is the magic number, a word of 3 bits of kind and 29 of length, that many bytes, and padding to 4. Where its bytes
hold the magic number, it is cut there into parts (kinds 1, 2, 3) and the number left out. An image's record begins with a flag, a
float32 label and two numbers of 64 bits; with a flag above 0 as many float32 labels follow, and then the image.
**Source**: dmlc-core recordio.h, mxnet/recordio.py; arcface_torch/dataset.py for its first record and those without images.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from pipelines.importable import OpenFiles, Texts, digest, file_stamp, label_numbers
from pipelines.order import Int64Array

MAGIC = 0xCED7230A
FIRST_COLLAPSE = 2**24  # the first whole number that float32 gives to its neighbour too

_MAGIC_BYTES = struct.pack("<I", MAGIC)
_START = struct.Struct("<II")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LENGTH_BITS = 29
_FRAME_BYTES, _HEADER_BYTES = 8, 24
_ROWS = 1 << 18  # records looked at together


@dataclass(frozen=True, eq=False)
class RecordSource:
    """Images of a .rec file: offset_N and span_N (bytes with frames and padding) of their records, and their keys in the .idx."""

    stamp: str
    identities: Texts
    label_N: Int64Array
    bytes_N: Int64Array
    path: str
    offset_N: Int64Array
    span_N: Int64Array
    key_N: Int64Array
    kind: str = "recordio"
    group_N: None = None
    in_order: bool = False
    files: OpenFiles = field(default_factory=OpenFiles)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)  # offset and span of what is read next

    def expect(self, numbers: Int64Array) -> None:
        offsets, spans = self.offset_N[numbers].tolist(), self.span_N[numbers].tolist()
        self.places.clear()
        self.places.update(zip(numbers.tolist(), zip(offsets, spans, strict=True), strict=True))
        self.files.advise(self.path, offsets, spans)

    def read(self, number: int) -> bytes:
        offset, span = self.places.get(number) or (int(self.offset_N[number]), int(self.span_N[number]))
        framed = self.files.read(self.path, span, offset)
        if len(framed) == span and framed.startswith(_MAGIC_BYTES):
            word, num_labels = _START.unpack_from(framed, 4)
            if word == span - _FRAME_BYTES:  # whole, as nearly all are
                return framed[_FRAME_BYTES + _HEADER_BYTES + 4 * num_labels :]
        record = join_parts(self.path, offset, framed)
        num_labels = int.from_bytes(record[:4], "little")
        return record[_HEADER_BYTES + 4 * num_labels :]

    def name(self, number: int) -> str:
        return str(self.key_N[number])

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        return {}


def open_records(
    path: Path, labels: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[RecordSource, list[str]]:
    """The images of a .rec file, and notes on how they were found. ``labels``: a .lst to take labels from.

    Without an .idx beside it the file is gone through, record by record. Identity keys are nine-digit labels. The first record
    of the arcface_torch world and those of its identities hold no image and are passed over.
    Errors: DataError for a file that is cut off, a foreign or incomplete .idx, a foreign .lst, a label that is no whole number from 0, and labels of
    2^24 and more, which float32 cannot tell apart, unless a .lst has them.
    **Memory**: 64 bytes a record.
    """
    notes: list[str] = []
    try:
        words = np.memmap(path, dtype="<u4", mode="r", shape=(path.stat().st_size // 4,))
    except (OSError, ValueError) as error:
        raise DataError(f"record file {path} cannot be read ({error}); name a .rec file") from None
    index = path.with_suffix(".idx")
    if index.is_file():
        key_R, offset_R = _read_index(index, len(words) * 4)
    else:
        offset_R = _scan(path, words, progress)
        key_R = np.arange(len(offset_R), dtype=np.int64)
        notes.append(f"{index.name} is not there: {path.name} was gone through, {len(offset_R):,} records")
    found = _look_at(path, words, offset_R, index if index.is_file() else None, progress)
    images = np.flatnonzero(found.has_image_R)
    if not images.size:
        raise DataError(f"record file {path} holds no image in its {len(offset_R)} records; name a train.rec")
    if images.size < len(offset_R):
        notes.append(f"{len(offset_R) - images.size:,} records without an image were passed over")
    float_label_N = found.label_R[images]
    wrong = np.flatnonzero(~((float_label_N >= 0) & (float_label_N == np.floor(float_label_N))))
    if wrong.size:
        place = images[wrong[0]]
        raise DataError(
            f"record file {path}: the record at byte {offset_R[place]} has label {found.label_R[place]}; must be a whole "
            "number from 0. This is no file of identities"
        )
    collapsed = bool(float_label_N.max() >= FIRST_COLLAPSE)
    beside = path.with_suffix(".lst")
    if labels is None and collapsed and beside.is_file():
        labels = beside
    if labels is not None:
        number_N = _labels_of_list(labels, path, key_R[images], float_label_N)
        notes.append(f"labels are those of {labels.name}")
    elif collapsed:
        raise DataError(
            f"record file {path} has labels up to {float_label_N.max():.0f}; they are float32, which from {FIRST_COLLAPSE} on "
            "gives neighbouring identities the same label. Give its list with --labels FILE.lst"
        )
    else:
        number_N = float_label_N.astype(np.int64)
    identities, label_N = label_numbers(number_N)
    stamp = digest("recordio", file_stamp(path), offset_R, key_R, number_N)
    return (
        RecordSource(
            stamp,
            identities,
            label_N,
            found.image_bytes_R[images],
            str(path),
            offset_R[images],
            found.span_R[images],
            key_R[images],
        ),
        notes,
    )


def join_parts(path: str, offset: int, framed: bytes) -> bytes:
    """The contents of one record from its bytes in the file. Errors: DataError with the place in bytes."""
    parts: list[bytes] = []
    at = 0
    while True:
        if len(framed) < at + _FRAME_BYTES or framed[at : at + 4] != _MAGIC_BYTES:
            raise DataError(
                f"record file {path}: no record at byte {offset + at}; the file is damaged or was rewritten"
            )
        word = int.from_bytes(framed[at + 4 : at + _FRAME_BYTES], "little")
        kind, length = word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)
        part = framed[at + _FRAME_BYTES : at + _FRAME_BYTES + length]
        if len(part) < length or kind not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
            raise DataError(
                f"record file {path}: the record at byte {offset} is cut off or damaged at byte {offset + at}"
            )
        if kind == _WHOLE:
            return part
        parts.append(part)
        if kind == _LAST:
            return _MAGIC_BYTES.join(parts)
        at += _FRAME_BYTES + -(-length // 4) * 4


@dataclass(frozen=True, eq=False)
class _Found:
    """Of each record: whether an image is in it, its first label, the image's bytes, and its own bytes in the file."""

    has_image_R: npt.NDArray[np.bool_]
    label_R: npt.NDArray[np.float64]
    image_bytes_R: Int64Array
    span_R: Int64Array


def _look_at(
    path: Path,
    words: npt.NDArray[np.uint32],
    offset_R: Int64Array,
    index: Path | None,
    progress: Callable[[int, int], None] | None,
) -> _Found:
    num_records, size = len(offset_R), path.stat().st_size
    found = _Found(
        np.zeros(num_records, dtype=np.bool_),
        np.zeros(num_records),
        np.zeros(num_records, dtype=np.int64),
        np.zeros(num_records, dtype=np.int64),
    )
    for first in range(0, num_records, _ROWS):
        rows = slice(first, first + _ROWS)
        at_R = offset_R[rows] // 4
        kind_R, length_R = (
            words[at_R + 1] >> _LENGTH_BITS,
            (words[at_R + 1] & ((1 << _LENGTH_BITS) - 1)).astype(np.int64),
        )
        wrong = np.flatnonzero((words[at_R] != MAGIC) | (kind_R > _FIRST))
        if wrong.size:
            offset = int(offset_R[first + wrong[0]])
            whose = f"{index} does not belong to it" if index is not None else "the file is damaged"
            raise DataError(f"record file {path}: no record begins at byte {offset}; {whose}. Restore the pair of them")
        end_R = offset_R[rows] + _FRAME_BYTES + length_R
        cut = np.flatnonzero(end_R > size)
        if cut.size:
            raise DataError(
                f"record file {path} ends at byte {size}, inside the record at byte {offset_R[first + cut[0]]}; it is cut off. "
                "Restore it"
            )
        short = np.flatnonzero((kind_R == _WHOLE) & (length_R < _HEADER_BYTES))
        if short.size:
            raise DataError(
                f"record file {path}: the record at byte {offset_R[first + short[0]]} has {length_R[short[0]]} bytes; must "
                f"have {_HEADER_BYTES} and an image. This is no file of images"
            )
        whole_R = kind_R == _WHOLE
        safe_R = np.where(whole_R, at_R, 0)  # parts are joined below
        num_labels_R = np.where(whole_R, words[safe_R + 2], 0).astype(np.int64)
        has_labels_R = (num_labels_R > 0) & (4 * num_labels_R <= length_R - _HEADER_BYTES)
        label_R = words[np.where(has_labels_R, safe_R + 8, safe_R + 3)].view("<f4")
        found.label_R[rows] = label_R
        found.image_bytes_R[rows] = length_R - _HEADER_BYTES - 4 * num_labels_R
        found.span_R[rows] = _FRAME_BYTES + length_R
        for row in np.flatnonzero(~whole_R).tolist():
            _look_at_parts(path, first + row, int(offset_R[first + row]), size, found)
        if progress is not None:
            progress(min(first + _ROWS, num_records), num_records)
    if index is not None:
        _refuse_gaps(path, size, offset_R, found.span_R, index)
    found.has_image_R[:] = found.image_bytes_R > 0
    return found


def _refuse_gaps(path: Path, size: int, offset_R: Int64Array, span_R: Int64Array, index: Path) -> None:
    """Errors: DataError unless each record begins where the one before it ends, and the last ends with the file."""
    begins_R1 = np.append(offset_R, -(-size // 4) * 4)
    ends_R1 = np.append(0, offset_R + -(-span_R // 4) * 4)
    wrong = np.flatnonzero(begins_R1 != ends_R1)
    if wrong.size:
        end, begin = int(ends_R1[wrong[0]]), min(int(begins_R1[wrong[0]]), size)
        raise DataError(
            f"index {index} names {len(offset_R)} records and nothing from byte {end} to {begin} of {path} ({size} bytes); it "
            "must name every record. Restore it, or remove it to have the .rec gone through"
        )


def _look_at_parts(path: Path, record: int, offset: int, size: int, found: _Found) -> None:
    with path.open("rb") as file:
        file.seek(offset)
        span = 0
        while True:
            frame = file.read(_FRAME_BYTES)
            if len(frame) < _FRAME_BYTES:
                raise DataError(
                    f"record file {path} ends at byte {size}, inside the record at byte {offset}; restore it"
                )
            word = int.from_bytes(frame[4:], "little")
            length = word & ((1 << _LENGTH_BITS) - 1)
            last = word >> _LENGTH_BITS == _LAST
            span += _FRAME_BYTES + (length if last else -(-length // 4) * 4)
            if last:
                break
            file.seek(offset + span)
        file.seek(offset)
        contents = join_parts(str(path), offset, file.read(span))
    if len(contents) < _HEADER_BYTES:
        raise DataError(f"record file {path}: the record at byte {offset} has {len(contents)} bytes; it is no image's")
    num_labels, label = struct.unpack_from("<If", contents)
    if num_labels and len(contents) >= _HEADER_BYTES + 4 * num_labels:
        (label,) = struct.unpack_from("<f", contents, _HEADER_BYTES)
    found.label_R[record] = label
    found.image_bytes_R[record] = len(contents) - _HEADER_BYTES - 4 * num_labels
    found.span_R[record] = span


def _read_index(path: Path, size: int) -> tuple[Int64Array, Int64Array]:
    key_R, offset_R = (_whole(path, column) for column in _columns(path)[:2])
    if not len(key_R):
        raise DataError(f"index {path} is empty; remove it, and the .rec file is gone through instead")
    wrong = np.flatnonzero((offset_R < 0) | (offset_R % 4 != 0) | (offset_R > size - _FRAME_BYTES - _HEADER_BYTES))
    if wrong.size:
        raise DataError(
            f"{path}:{wrong[0] + 1}: offset {offset_R[wrong[0]]} is in no record file of {size} bytes; must be a multiple of 4 "
            "before its last record. The .rec file is cut off, or the index of another: restore the pair of them"
        )
    order = np.argsort(offset_R, kind="stable")
    key_R, offset_R = key_R[order], offset_R[order]
    if len(offset_R) > 1 and not np.diff(offset_R).all():
        twice = offset_R[np.flatnonzero(np.diff(offset_R) == 0)[0]]
        raise DataError(
            f"index {path} names byte {twice} twice; restore it, or remove it to have the .rec gone through"
        )
    return key_R, offset_R


def _scan(path: Path, words: npt.NDArray[np.uint32], progress: Callable[[int, int], None] | None) -> Int64Array:
    offsets: list[int] = []
    at, size, inside = 0, path.stat().st_size, False
    view = words.data.cast("B").cast("I")
    while at + 2 <= len(view):
        kind, length = view[at + 1] >> _LENGTH_BITS, view[at + 1] & ((1 << _LENGTH_BITS) - 1)
        if view[at] != MAGIC or (kind in (_WHOLE, _FIRST)) is inside:
            raise DataError(f"record file {path}: no record begins at byte {4 * at}; the file is damaged. Restore it")
        if 4 * at + _FRAME_BYTES + length > size:
            raise DataError(
                f"record file {path} ends at byte {size}, inside the record at byte {4 * at}; it is cut off"
            )
        if not inside:
            offsets.append(4 * at)
            if progress is not None and len(offsets) % _ROWS == 0:
                progress(4 * at, size)
        inside = kind in (_FIRST, _MIDDLE)
        at += 2 + -(-length // 4)
    if inside or 4 * at < size:
        raise DataError(f"record file {path} ends at byte {size} inside a record; it is cut off. Restore it")
    return np.array(offsets, dtype=np.int64)


def _labels_of_list(path: Path, records: Path, key_N: Int64Array, float_label_N: npt.NDArray[np.float64]) -> Int64Array:
    """Labels by key: of im2rec's lists (key, label, ..., path), or of arcface_torch's (1, path, label: keys are lines from 1)."""
    columns = _columns(path)
    if len(columns) < 2:
        raise DataError(f"list {path} has {len(columns)} column; must be key, label and path, with tabs between them")
    try:
        key_L, label_L = _whole(path, columns[0]), _whole(path, columns[1])
    except DataError:
        if len(columns) < 3:
            raise
        label_L = _whole(path, columns[2])
        key_L = np.arange(1, len(label_L) + 1, dtype=np.int64)
    order = np.argsort(key_L, kind="stable")
    place = np.searchsorted(key_L[order], key_N)
    place_N = order[np.minimum(place, len(order) - 1)]
    missing = np.flatnonzero(key_L[place_N] != key_N)
    if missing.size:
        raise DataError(
            f"list {path} has no line for image {key_N[missing[0]]} of {records}; it belongs to another file"
        )
    label_N = label_L[place_N]
    other = np.flatnonzero(label_N.astype(np.float32) != float_label_N.astype(np.float32))
    if other.size:
        raise DataError(
            f"list {path} says {label_N[other[0]]} of image {key_N[other[0]]}, {records} {float_label_N[other[0]]:.0f}; it "
            "belongs to another file"
        )
    return label_N


def _columns(path: Path) -> list[npt.NDArray[np.generic]]:
    import pyarrow
    from pyarrow import csv

    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(autogenerate_column_names=True),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        )
    except OSError as error:
        raise DataError(f"list {path} cannot be read ({error.strerror or error}); name a file that is there") from None
    except pyarrow.ArrowException as error:
        if not path.stat().st_size:
            return [np.zeros(0, dtype=np.int64)] * 2
        raise DataError(f"{path} is no table with tabs ({str(error).splitlines()[0]}); restore it") from None
    return [column.to_numpy() for column in table.columns]


def _whole(path: Path, column: npt.NDArray[np.generic]) -> Int64Array:
    if column.dtype.kind == "i":
        return column.astype(np.int64)
    if column.dtype.kind == "f":
        floats = column.astype(np.float64)
        if np.isfinite(floats).all() and (floats == np.floor(floats)).all() and np.abs(floats).max(initial=0) < 2**53:
            return floats.astype(np.int64)
    raise DataError(f"{path} holds what is no whole number where one must be; it is damaged or of another kind")
