"""Several packed data sets become one: shuffled over all of them, in parallel, and resumed after a kill, as an import is."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.keys import hash_keys
from pipelines.importable import OpenFiles, SourceDamagedError, Texts, digest
from pipelines.importing import ImportSettings, Progress, import_images
from pipelines.manifest import (
    INDEX_DTYPE,
    INDEX_FILE,
    NAMES_FILE,
    QUARANTINE_FILE,
    PackedDataset,
    Quarantined,
    read_quarantine,
)
from pipelines.members import BLOCK_BYTES, image_ending
from pipelines.order import Int64Array, UInt64Array
from pipelines.rows import Rows

IdentityMap = Mapping[tuple[int, str], str]  # (number of the set, key there) -> key in the merged set


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged data set; ``shared_names`` image names, as ``shared_identities`` keys, are in more than one set."""

    dataset: PackedDataset
    shared_identities: int
    shared_names: int


@dataclass(frozen=True, eq=False)
class MergeSource:
    """The samples of some packed data sets, one set's numbers after another's.

    edge_S1: the number at which each set begins, and the end; shards: paths of all of their tars; shard_S: the first of each set
    among them; quarantined: number and reason.
    """

    stamp: str
    identities: Texts
    label_N: Int64Array
    bytes_N: Int64Array
    edge_S1: Int64Array
    folders: Texts
    fingerprints: Texts
    shards: Texts
    shard_S: Int64Array
    quarantined: tuple[tuple[int, str], ...]
    kind: str = "merge"
    group_N: None = None
    in_order: bool = False
    files: OpenFiles = field(default_factory=OpenFiles)
    places: dict[int, tuple[str, int, int]] = field(default_factory=dict)  # what is read next: tar, offset, size
    opened: dict[int, tuple[Rows[np.void], Any]] = field(default_factory=dict)  # index and names, of this process alone

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}, "places": {}}

    def expect(self, numbers: Int64Array) -> None:
        self.places.clear()
        for place, rows in self._rows(numbers):
            shards = (rows["shard"] + self.shard_S[place[1]]).tolist()
            path_of = {shard: self.shards[shard] for shard in set(shards)}
            facts = zip(map(path_of.__getitem__, shards), rows["offset"].tolist(), rows["size"].tolist(), strict=True)
            self.places.update(zip(numbers[place[0]].tolist(), facts, strict=True))

    def read(self, number: int) -> bytes:
        if number not in self.places:
            self.expect(np.array([number]))
        path, offset, size = self.places[number]
        try:
            payload = self.files.read(path, size, offset)
        except OSError as error:
            raise SourceDamagedError(
                f"shard {path} cannot be read ({error.strerror}); restore it or pack again"
            ) from None
        if len(payload) != size:
            raise SourceDamagedError(f"shard {path} ends before byte {offset + size}; restore it or pack again")
        return payload

    def name(self, number: int) -> str:
        """Tar and byte: what the image was called is known by its hash only."""
        path, offset, _ = self.places[number]
        return f"{path}:{offset}"

    def name_hashes(self, numbers: Int64Array) -> UInt64Array:
        hashes = np.zeros((len(numbers), 2), dtype=np.uint64)
        for (places, of_set), _ in self._rows(numbers, read=False):
            names = self._open(of_set)[1]
            if names is None:
                self.expect(numbers[places])
                keys = [self._made_up(of_set, number) for number in numbers[places].tolist()]
                hashes[places] = hash_keys(keys)
            else:
                hashes[places] = names[numbers[places] - self.edge_S1[of_set]]
        return hashes

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        if not self.quarantined:
            return {}
        reason_of = dict(self.quarantined)
        found = np.flatnonzero(np.isin(order_M, list(reason_of)))
        listed = []
        for new, number in zip(found.tolist(), order_M[found].tolist(), strict=True):
            self.expect(np.array([number]))
            listed.append(Quarantined(new, f"{new:09d}.{image_ending(self.read(number))}", reason_of[number]))
        return {QUARANTINE_FILE: json.dumps({"samples": [asdict(one) for one in listed]}, indent=1) + "\n"}

    def _rows(
        self, numbers: Int64Array, read: bool = True
    ) -> list[tuple[tuple[Int64Array, int], npt.NDArray[np.void]]]:
        """((places in ``numbers``, set), rows of its index) of each set that has some of them."""
        set_n = np.searchsorted(self.edge_S1, numbers, side="right") - 1
        found = []
        for of_set in np.unique(set_n).tolist():
            places = np.flatnonzero(set_n == of_set)
            rows = self._open(of_set)[0][numbers[places] - self.edge_S1[of_set]] if read else np.zeros(0, INDEX_DTYPE)
            found.append(((places, of_set), rows))
        return found

    def _open(self, of_set: int) -> tuple[Rows[np.void], Any]:
        if of_set not in self.opened:
            folder = Path(self.folders[of_set])
            path = folder / NAMES_FILE
            names = np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None
            self.opened[of_set] = Rows(folder / INDEX_FILE, INDEX_DTYPE), names
        return self.opened[of_set]

    def _made_up(self, of_set: int, number: int) -> str:
        """Of sets without names: fingerprint and tar member."""
        path, offset, _ = self.places[number]
        header = self.files.read(path, BLOCK_BYTES, offset - BLOCK_BYTES)
        return f"{self.fingerprints[of_set]}:{header[:100].rstrip(bytes(1)).decode('utf-8', errors='replace')}"


def merge(
    directories: Sequence[Path],
    out: Path,
    settings: ImportSettings,
    identity_map: IdentityMap,
    prefix: bool,
    num_workers: int,
    progress: Progress | None = None,
) -> Merged:
    """One data set of all samples, shuffled; identities of one key, or that the map gives one key, become one.

    prefix: keys that the map does not name become FOLDER/KEY, so that equal keys of two sets stay two people.
    Image bytes, names and quarantine stay. An interrupted merge goes on, a finished one is opened; ``progress`` as of imports.
    Errors: DataError for sets that cannot be read, a foreign ``out``, a key in the map that its set does not have; SetupError
    when the disk refuses. **Memory**: of an import, and the keys.
    """
    sets = [PackedDataset.open(directory) for directory in directories]
    source, shared = _source(sets, identity_map, prefix)
    dataset = import_images(source, out, settings, num_workers, progress).dataset
    assert dataset.name_hash_N2 is not None, "imports keep names"
    distinct = sum(
        len(np.unique(source.name_hashes(np.arange(*pair))[:, 0])) for pair in itertools.pairwise(source.edge_S1)
    )
    return Merged(dataset, shared, distinct - len(np.unique(dataset.name_hash_N2[:, 0])))


def _source(sets: Sequence[PackedDataset], identity_map: IdentityMap, prefix: bool) -> tuple[MergeSource, int]:
    """All samples of all sets, and how many identities are in more than one."""
    keys = [_new_keys(number, one, identity_map, prefix) for number, one in enumerate(sets)]
    identities = sorted(set().union(*keys))
    label_of = {key: label for label, key in enumerate(identities)}
    new_labels = [np.fromiter((label_of[key] for key in of_set), np.int64, len(of_set)) for of_set in keys]
    edges = np.cumsum([0, *(one.num_samples for one in sets)])
    texts = Texts.of(identities)
    shards = [one.shard_path(shard).absolute() for one in sets for shard in range(len(one.manifest.shards))]
    source = MergeSource(
        digest("merge", *(one.fingerprint_in_use for one in sets), texts.blob_B, texts.end_N, *new_labels),
        texts,
        np.concatenate([labels[one.index["label"]] for one, labels in zip(sets, new_labels, strict=True)]),
        np.concatenate([one.index["size"].astype(np.int64) for one in sets]),
        edges,
        Texts.of(str(one.directory.absolute()) for one in sets),
        Texts.of(one.fingerprint for one in sets),
        Texts.of(map(str, shards)),
        np.cumsum([0, *(len(one.manifest.shards) for one in sets)])[:-1],
        tuple(
            (int(first) + one.sample, one.reason)
            for first, of_set in zip(edges, sets, strict=False)
            for one in read_quarantine(of_set.directory, of_set.num_samples)
        ),
    )
    return source, sum(len(set(of_set)) for of_set in keys) - len(identities)


def read_identity_map(path: Path, directories: Sequence[Path]) -> IdentityMap:
    """A CSV with the columns ``set`` (a folder as given, or its last part), ``key`` (there) and ``identity`` (the new key).

    Errors: DataError with the line for an unknown set, an empty value, and a key that gets two identities.
    """
    number_of = {str(directory): number for number, directory in enumerate(directories)}
    for number, directory in enumerate(directories):
        number_of.setdefault(directory.resolve().name, number)
    found: dict[tuple[int, str], str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # spreadsheets put a mark before the first column
            rows = csv.DictReader(file)
            missing = sorted({"set", "key", "identity"} - set(rows.fieldnames or ()))
            if missing:
                raise DataError(f"identity map {path} lacks the column {missing[0]!r}; must have set, key and identity")
            for line, row in enumerate(rows, 2):
                folder, key, identity = row["set"], row["key"], row["identity"]
                if not folder or not key or not identity:
                    raise DataError(
                        f"identity map {path}, line {line}: a value is empty; fill in set, key and identity"
                    )
                if folder not in number_of:
                    known = ", ".join(str(directory) for directory in directories)
                    raise DataError(f"identity map {path}, line {line}: set {folder!r} is none of {known}")
                place = number_of[folder], key
                if found.setdefault(place, identity) != identity:
                    raise DataError(
                        f"identity map {path}, line {line}: {key!r} of {folder} is {found[place]!r} and {identity!r}"
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"identity map {path} cannot be read ({error}); name a CSV in UTF-8") from None
    return found


def _new_keys(number: int, dataset: PackedDataset, identity_map: IdentityMap, prefix: bool) -> list[str]:
    named = [key for of_set, key in identity_map if of_set == number]
    unknown = np.flatnonzero(dataset.identities.labels_of(named) < 0)
    if unknown.size:
        raise DataError(
            f"the identity map names {named[int(unknown[0])]!r} of {dataset.directory}, which has no such identity"
        )
    folder = dataset.directory.resolve().name
    keys = []
    for key in dataset.identities:
        mapped = identity_map.get((number, key), f"{folder}/{key}" if prefix else key)
        if any(character in mapped for character in "\n\r\0"):
            raise DataError(f"identity key {mapped!r} must have no line break; change the map")
        keys.append(mapped)
    return keys
