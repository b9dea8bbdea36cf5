"""Who sees what: the samples of the old model, of the new one, and of those who are held out from both, as lists in a folder.

OUT/split.json       scenario, seed, of which data set, hashes of the lists; written last
OUT/old.npy          samples (rows of the data set, rising) that the old model is trained on
OUT/new.npy          the same for the new model
OUT/heldout.npy      samples of people whom neither sees
OUT/old.txt ...      their identity keys, one a line

extended-data    the same people; the new model sees more images of each
extended-class   the people of the old model are a part of those of the new one
open-data        the same people, but no image twice
open-class       other people
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lce_dist.errors import DataError, RunError
from pipelines.checked import default_cache, recall, remember
from pipelines.identities import Chosen, Identities, line_starts
from pipelines.manifest import (
    INDEX_FILE,
    IdentitySplit,
    PackedDataset,
    View,
    file_sha256,
    index_pieces,
    split_identities,
)
from pipelines.order import Int64Array, UInt64Array, derive_key, mix64

Scenario = Literal["extended-data", "extended-class", "open-data", "open-class"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
PARTS = ("old", "new", "heldout")
SPLIT_FILE = "split.json"

_FORMAT, _VERSION = "lce-dist-split", 1
_LARGE_SAMPLES = 1 << 20  # below that checking takes a moment, and nothing is kept of it
_PIECE_ROWS = 1 << 20
_AT_ONCE = 1 << 21  # samples whose places among their person's are found together
_BY_IMAGE = ("extended-data", "open-data")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PartRecord(_Record):
    """One list: how much it holds and the hashes of its two files."""

    num_samples: Annotated[int, Field(ge=1)]
    num_identities: Annotated[int, Field(ge=1)]
    samples_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    identities_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SplitRecord(_Record):
    """The contents of split.json. ``dataset``: fingerprint of the data set whose rows the lists name."""

    format: str
    version: int
    scenario: Scenario
    seed: int
    fraction: float
    heldout_identities: int
    dataset: str
    parts: dict[str, PartRecord]


@dataclass(frozen=True, eq=False)
class Split:
    """Sample ids (rising) of what the old model, the new one, and neither sees."""

    scenario: Scenario
    seed: int
    fraction: float
    heldout_identities: int
    old: Int64Array
    new: Int64Array
    heldout: Int64Array

    def part(self, name: str) -> Int64Array:
        return {"old": self.old, "new": self.new, "heldout": self.heldout}[name]


def make_split(dataset: PackedDataset, scenario: Scenario, heldout: int, fraction: float, seed: int) -> Split:
    """Draw a split; the same seed gives the same people and images wherever the samples lie in their shards.

    heldout: people held out from both. fraction: of the other people (of each one's images for ``-data``) for the old model.
    In open-data a person with one image goes to the new model; otherwise every person keeps one on each side.
    Errors: DataError where a side would have fewer than 2 people. **Memory**: 30 bytes a sample, 60 an identity.
    """
    if scenario not in SCENARIOS:
        raise DataError(f"scenario {scenario!r} is unknown; must be one of {', '.join(SCENARIOS)}")
    if not 0.0 < fraction < 1.0:
        raise DataError(f"fraction is {fraction}; must be above 0 and below 1, so that old and new differ")
    share = 1.0 if scenario in _BY_IMAGE else fraction
    people = split_identities(dataset.identities, heldout, share, seed)
    label_N = labels_at(dataset, None)
    owner_N = _owners(dataset, people)[label_N]
    owner_N[dataset.quarantined] = _NOBODY
    held, is_old_N = np.flatnonzero(owner_N == _HELDOUT), owner_N == _OLD
    if scenario in _BY_IMAGE:
        is_old_N[:] = False
        for samples in _people_by_people(label_N, owner_N != _NOBODY, len(dataset.identities)):
            samples = samples[owner_N[samples] != _HELDOUT]
            place, size = _places(dataset, samples, label_N[samples], seed)
            most = size - 1 if scenario == "open-data" else size
            quota = np.minimum(np.maximum(1, np.rint(fraction * size)), most)
            is_old_N[samples] = place < quota
    is_trained_N = (owner_N == _TRAIN) | (owner_N == _OLD)
    old = np.flatnonzero(is_old_N)
    new = np.flatnonzero(is_trained_N if scenario.startswith("extended") else is_trained_N & ~is_old_N)
    split = Split(scenario, seed, fraction, heldout, old, new, held)
    for part in PARTS:
        num = len(labels_of(dataset, split.part(part)))
        if num < 2:
            raise DataError(
                f"{scenario} of {dataset.directory} leaves {num} identities for {part!r}; must be at least 2. "
                f"Change --fraction ({fraction}) or --heldout ({heldout}), or bring more images"
            )
    return split


def labels_of(dataset: PackedDataset, samples: Int64Array) -> Int64Array:
    """The labels (rising) of whom some samples (rising) are. **Memory**: 9 bytes an identity."""
    seen = np.zeros(len(dataset.identities), dtype=np.bool_)
    for _, labels in _label_pieces(dataset, samples):
        seen[labels] = True
    return np.flatnonzero(seen)


def labels_at(dataset: PackedDataset, samples: Int64Array | None) -> npt.NDArray[np.int32] | Int64Array:
    """(n,) labels of some samples (rising), or of all of them. **Memory**: 4 bytes a sample."""
    kind = np.int32 if len(dataset.identities) < 2**31 else np.int64
    num = dataset.num_samples if samples is None else len(samples)
    found: npt.NDArray[Any] = np.empty(num, dtype=kind)
    for first, labels in _label_pieces(dataset, samples):
        found[first : first + len(labels)] = labels
    return found


def _label_pieces(dataset: PackedDataset, samples: Int64Array | None) -> Iterator[tuple[int, Int64Array]]:
    """Where a piece begins, and its labels; the index is read, not mapped, so that what was passed takes no memory."""
    for first, rows in index_pieces(dataset.directory / INDEX_FILE):
        if samples is None:
            yield first, rows["label"]
        else:
            low, high = np.searchsorted(samples, (first, first + len(rows))).tolist()
            yield low, rows["label"][samples[low:high] - first]


def write_split(dataset: PackedDataset, split: Split, out: Path) -> Path:
    """Write the lists into a new folder ``out``, whole or not at all; returns the path of split.json.

    Errors: DataError where ``out`` exists; RunError where the file system refuses.
    """
    if out.exists():
        raise DataError(f"{out} exists; it is not written over. Choose another place, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        parts = {}
        for name in PARTS:
            samples = split.part(name)
            labels = labels_of(dataset, samples)
            np.save(partial / f"{name}.npy", samples, allow_pickle=False)
            with open(partial / f"{name}.txt", "w", encoding="utf-8", newline="") as file:
                file.writelines(f"{key}\n" for key in Chosen(dataset.identities, labels))
            parts[name] = PartRecord(
                num_samples=len(samples),
                num_identities=len(labels),
                samples_sha256=file_sha256(partial / f"{name}.npy"),
                identities_sha256=file_sha256(partial / f"{name}.txt"),
            )
        record = SplitRecord(
            format=_FORMAT,
            version=_VERSION,
            scenario=split.scenario,
            seed=split.seed,
            fraction=split.fraction,
            heldout_identities=split.heldout_identities,
            dataset=dataset.fingerprint,
            parts=parts,
        )
        with open(partial / SPLIT_FILE, "w", encoding="utf-8") as file:
            file.write(json.dumps(record.model_dump(), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"split {out} cannot be written: {error}. Free space or choose another place") from None
    return out / SPLIT_FILE


@dataclass(frozen=True, eq=False)
class OpenSplit:
    """A split of ``dataset`` that was found whole; ``fingerprint`` is 64 hex digits over all of it."""

    record: SplitRecord
    split: Split
    identities: IdentitySplit
    fingerprint: str


def open_split(path: Path, dataset: PackedDataset, checked: Path | None = None) -> OpenSplit:
    """Read and check what :func:`write_split` wrote; samples and keys stay on the disk.

    checked: a folder in which it is kept that a large split was found whole; None: the user's cache.
    Errors: DataError for a missing, damaged or edited file, and for a split of another data set.
    """
    if path.is_dir():
        path = path / SPLIT_FILE
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"split {path} cannot be read ({error.strerror}); name the split.json of lce data split"
        ) from None
    try:
        record = SplitRecord.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"split {path} is damaged ({reason}); make it anew with lce data split") from None
    if (record.format, record.version) != (_FORMAT, _VERSION) or set(record.parts) != set(PARTS):
        raise DataError(f"split {path} is of another version; make it anew with lce data split")
    if record.dataset != dataset.fingerprint:
        raise DataError(
            f"split {path} is of another data set (fingerprint {record.dataset[:16]}; {dataset.directory} has "
            f"{dataset.fingerprint[:16]}). Name its data set, or make the split anew: lce data split {dataset.directory} OUT "
            f"--scenario {record.scenario} --seed {record.seed}"
        )
    folder, fingerprint = path.parent, hashlib.sha256(text).hexdigest()
    files = [f"{name}.{ending}" for name in PARTS for ending in ("npy", "txt")]
    is_large = sum(part.num_samples for part in record.parts.values()) >= _LARGE_SAMPLES
    checked = checked or default_cache()
    try:
        known = recall(checked, folder, fingerprint, files) if is_large else None
    except OSError:
        known = None  # a file is missing
    samples: dict[str, Int64Array] = {}
    starts: dict[str, Int64Array] = {}
    for name in PARTS:
        part = record.parts[name]
        if known is None:
            _check_files(folder, name, part)
        samples[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if known is None:
            _check_samples(folder / f"{name}.npy", samples[name], part, dataset)
            starts[name] = line_starts(folder / f"{name}.txt")
        else:
            starts[name], known = known[: part.num_identities + 1], known[part.num_identities + 1 :]
    if is_large and known is None:
        remember(checked, folder, fingerprint, files, np.concatenate([starts[name] for name in PARTS]))
    keys = {name: Identities(folder / f"{name}.txt", starts[name]) for name in PARTS}
    split = Split(
        record.scenario,
        record.seed,
        record.fraction,
        record.heldout_identities,
        samples["old"],
        samples["new"],
        samples["heldout"],
    )
    people = IdentitySplit(train=keys["new"], old=keys["old"], heldout=keys["heldout"])
    return OpenSplit(record, split, people, fingerprint)


def _check_files(folder: Path, name: str, part: PartRecord) -> None:
    for file, expected in ((f"{name}.npy", part.samples_sha256), (f"{name}.txt", part.identities_sha256)):
        place = folder / file
        if not place.is_file() or file_sha256(place) != expected:
            raise DataError(f"{place} is missing or changed since the split was made; make it anew")


def _check_samples(path: Path, ids: Int64Array, part: PartRecord, dataset: PackedDataset) -> None:
    wrong = ids.dtype != np.int64 or ids.ndim != 1 or len(ids) != part.num_samples
    wrong = wrong or ids[0] < 0 or ids[-1] >= dataset.num_samples
    for first in range(0, 0 if wrong else len(ids), _PIECE_ROWS):
        piece = np.asarray(ids[first : first + _PIECE_ROWS + 1])
        wrong = wrong or not bool(np.all(piece[1:] > piece[:-1]))
    if wrong:
        raise DataError(f"{path} must hold rising rows of the data set; make the split anew")


def select_samples(dataset: PackedDataset, sample_ids: Int64Array) -> View:
    """Some samples (rising rows), without the quarantined ones, relabelled 0 .. C-1 in the sorted order of their keys.

    Errors: DataError when none is left.
    """
    ids = np.asarray(sample_ids, dtype=np.int64)
    if len(dataset.quarantined):
        ids = ids[~np.isin(ids, dataset.quarantined, assume_unique=True)]
    if not len(ids):
        raise DataError(f"{dataset.directory}: no sample is left of a list; it is empty or all of it is in quarantine")
    labels = labels_at(dataset, ids)
    counts = np.bincount(labels, minlength=len(dataset.identities))
    class_C = np.flatnonzero(counts)
    new_label = np.empty(len(counts), dtype=np.int64)
    new_label[class_C] = np.arange(len(class_C))
    listed = hashlib.sha256(np.ascontiguousarray(ids).data)
    digest = hashlib.sha256(f"{dataset.fingerprint}\nsamples {listed.hexdigest()}".encode())
    return View(dataset, ids, new_label[labels], counts[class_C], class_C, digest.hexdigest())


_NOBODY, _TRAIN, _OLD, _HELDOUT = range(4)


def _owners(dataset: PackedDataset, people: IdentitySplit) -> npt.NDArray[np.int8]:
    whose = np.zeros(len(dataset.identities), dtype=np.int8)
    for part, owner in ((people.train, _TRAIN), (people.old, _OLD), (people.heldout, _HELDOUT)):
        assert isinstance(part, Chosen), "drawn from the data set's identities"
        whose[part.place_C] = owner
    return whose


def _people_by_people(
    label_N: npt.NDArray[np.int32] | Int64Array, is_used_N: npt.NDArray[np.bool_], num_labels: int
) -> Iterator[Int64Array]:
    """All used samples of some people, of then others, a bounded number at a time. **Memory**: 100 bytes each of those."""
    ends_C = np.cumsum(np.bincount(label_N, minlength=num_labels))
    first = 0
    while first < num_labels:
        before = int(ends_C[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends_C, before + _AT_ONCE, side="right")))
        yield np.flatnonzero(is_used_N & (label_N >= first) & (label_N < last))
        first = last


def _places(
    dataset: PackedDataset, samples: Int64Array, labels: npt.NDArray[np.int32] | Int64Array, seed: int
) -> tuple[Int64Array, Int64Array]:
    """Place of each sample in its person's images by a seeded hash of its name, and how many that person has."""
    names = dataset.name_hash_N2
    halves: UInt64Array = samples.astype(np.uint64) if names is None else np.asarray(names[samples][:, 0])
    chance = mix64(halves ^ np.uint64(derive_key(seed, *b"images")))
    order = np.lexsort((chance, labels))  # stable, and samples rise
    starts = np.flatnonzero(np.concatenate(([True], np.diff(labels[order]) != 0)))
    sizes = np.diff(np.append(starts, len(order)))
    place, size = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    size[order] = np.repeat(sizes, sizes)
    return place, size
