"""A packed data set on disk: tar shards, one index of byte ranges, and a manifest that vouches for both.

    DIR/NAME-000000.tar ...  WebDataset shards, a .cls and a .jpg member per sample
    DIR/index.npy            one row per sample: where its JPEG lies, and its label
    DIR/identities.txt       the identity key of each label, one a line
    DIR/names.npy            a hash of each sample's name in what was packed, by which stored vectors are found
    DIR/manifest.json        sizes and hashes of all of it; written last, so its presence means "complete"
    DIR/quarantine.json      samples that are not used, and why; optional, written by ``lce data verify``

Shards may lie elsewhere (``root``: a folder or a URL). Everything is checked once, in :meth:`PackedDataset.open`; what
reads samples later trusts it. Index and identities stay on the disk: a hundred million samples of ten million identities
cost what is touched of them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lce_dist.errors import DataError
from pipelines.cache import DEFAULT_CACHE, CacheSettings, RemoteShard, ShardCache
from pipelines.checked import default_cache, recall, remember
from pipelines.identities import Chosen, Identities, first_unsorted, line_starts
from pipelines.order import Int64Array, UInt64Array
from pipelines.rows import Rows
from pipelines.sources import Source

FORMAT, VERSION = "lce-dist-shards", 1
MANIFEST_FILE, INDEX_FILE, IDENTITIES_FILE = "manifest.json", "index.npy", "identities.txt"
NAMES_FILE, QUARANTINE_FILE = "names.npy", "quarantine.json"
INDEX_DTYPE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i8")])

_TAR_BLOCK_BYTES = 512
_LARGE_SAMPLES = 1 << 18  # below that a check takes a moment, and nothing is kept of it
_PIECE_ROWS = 1 << 18  # index rows looked at together, so that a hundred million samples need no gigabytes


def _below_its_root(file: str) -> str:
    if not file or "\\" in file or "\0" in file or any(part in ("", ".", "..") for part in file.split("/")):
        raise ValueError(f"{file!r} is no relative path below its root")
    return file


FileName = Annotated[str, AfterValidator(_below_its_root)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardRecord(_Record):
    """One tar file: what it must weigh, hold and hash to."""

    file: FileName
    size_bytes: Annotated[int, Field(ge=1)]
    num_samples: Annotated[int, Field(ge=1)]
    sha256: Sha256


class Manifest(_Record):
    """The contents of manifest.json. ``source`` names what was packed, so that a second run can reuse it.

    root: where the shards lie, a URL, or a folder relative to that of the manifest; None: beside it.
    shuffled: whether neighbours are a random part of all samples; None: nobody looked.
    """

    format: str
    version: int
    name: str
    num_samples: Annotated[int, Field(ge=1)]
    num_identities: Annotated[int, Field(ge=1)]
    shards: list[ShardRecord]
    index_sha256: Sha256
    identities_sha256: Sha256
    names_sha256: Sha256 | None = None  # None: packed before names were kept
    root: str | None = None
    shuffled: bool | None = None
    source: str
    fingerprint: Sha256

    def content_fingerprint(self) -> str:
        """64 hex digits over everything that a reader of the data can see."""
        text = json.dumps(
            self.model_dump(exclude={"fingerprint", "source", "root", "shuffled"}, exclude_none=True), sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class View:
    """Some identities of a packed data set, with labels 0 .. C-1 in the sorted order of their keys.

    sample_ids (N,): rows of the packed data set, ascending; labels (N,); count_C (C,): images of each label;
    class_C (C,): labels of the packed data set. All may lie on the disk. fingerprint: 64 hex digits over all of it.
    """

    dataset: PackedDataset
    sample_ids: Int64Array | Rows[np.int64]
    labels: Int64Array | Rows[np.int64]
    count_C: Int64Array
    class_C: Int64Array
    fingerprint: str

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_C)

    @property
    def identities(self) -> Chosen:
        """The C keys, read where they are asked for."""
        return Chosen(self.dataset.identities, self.class_C)


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """A packed data set that was found whole; ``index`` is mapped from disk, not loaded."""

    directory: Path
    manifest: Manifest
    index: npt.NDArray[np.void]
    identities: Identities
    name_hash_N2: npt.NDArray[np.uint64] | None  # keys.hash_keys of each sample's name in what was packed
    quarantined: Int64Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # rising; not in any view
    cache_settings: CacheSettings = DEFAULT_CACHE

    @classmethod
    def open(cls, directory: Path, cache: CacheSettings = DEFAULT_CACHE, checked: Path | None = None) -> PackedDataset:
        """Open and check a packed data set; shard contents are not read (see :func:`verify_checksums`).

        cache: where shards that lie at a URL are kept when they are read. checked: a folder in which it is kept that the data
        set was found whole, so that the next process need not look again; None: the user's cache.

        Errors: DataError naming the file, its value, the rule and the fix.
        """
        manifest = _read_manifest(directory)
        if not is_url(manifest.root):
            for shard in manifest.shards:
                _check_shard_size(directory / (manifest.root or ""), shard)
        files = [INDEX_FILE, IDENTITIES_FILE, *([NAMES_FILE] if manifest.names_sha256 is not None else [])]
        checked = checked or default_cache()
        is_large = manifest.num_samples >= _LARGE_SAMPLES
        known = recall(checked, directory, manifest.fingerprint, files) if is_large else None
        if known is None:
            _check_hash(directory / INDEX_FILE, manifest.index_sha256)
            _check_hash(directory / IDENTITIES_FILE, manifest.identities_sha256)
            if manifest.names_sha256 is not None:
                _check_hash(directory / NAMES_FILE, manifest.names_sha256)
        starts = line_starts(directory / IDENTITIES_FILE) if known is None else known
        identities = Identities(directory / IDENTITIES_FILE, starts)
        index = _map_index(directory / INDEX_FILE)
        if len(identities) != manifest.num_identities or len(index) != manifest.num_samples:
            raise DataError(
                f"{directory / MANIFEST_FILE} promises {manifest.num_samples} samples of {manifest.num_identities} "
                f"identities; {INDEX_FILE} has {len(index)} rows and {IDENTITIES_FILE} {len(identities)} lines. "
                "Pack the data set again"
            )
        if known is None:
            _check_identities(directory / IDENTITIES_FILE, identities)
            _check_rows(directory / INDEX_FILE, manifest.shards, identities)
        names = _map_names(directory / NAMES_FILE, manifest)
        if known is None and is_large:
            remember(checked, directory, manifest.fingerprint, files, identities.start_C)
        quarantined = np.array([one.sample for one in read_quarantine(directory, len(index))], dtype=np.int64)
        return cls(directory, manifest, index, identities, names, np.unique(quarantined), cache)

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def fingerprint_in_use(self) -> str:
        """``fingerprint``, and which samples are quarantined."""
        if not len(self.quarantined):
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint} without {self.quarantined.tolist()}".encode()).hexdigest()

    def shard_location(self, shard: int) -> str:
        """Path or URL of the tar file that shard number ``shard`` of the index lies in."""
        root, file = self.manifest.root, self.manifest.shards[shard].file
        if root is not None and is_url(root):
            return f"{root.rstrip('/')}/{file}"
        return str(self.directory / (root or "") / file)

    def shard_path(self, shard: int) -> Path:
        """``shard_location`` of shards on this machine. Errors: DataError when they are elsewhere."""
        if is_url(self.manifest.root):
            raise DataError(f"{self.directory} has its shards at {self.manifest.root}; this needs them on a disk")
        return Path(self.shard_location(shard))

    @functools.cached_property
    def rows(self) -> Rows[np.void]:
        """``index`` for those who read at random: see pipelines/rows.py."""
        return Rows(self.directory / INDEX_FILE, INDEX_DTYPE)

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie at a URL."""
        return is_url(self.manifest.root)

    @functools.cached_property
    def cache(self) -> ShardCache:
        """Of shards that lie at a URL. Errors: DataError where this node's ranks have no room in it."""
        assert self.manifest.root is not None, "shards on this machine need no cache"
        cache = ShardCache(Source(self.manifest.root), self.cache_settings)
        cache.check_room(max(shard.size_bytes for shard in self.manifest.shards))
        return cache

    def remote_shard(self, shard: int) -> RemoteShard:
        """What the cache needs to know of a shard."""
        record = self.manifest.shards[shard]
        return RemoteShard(record.file, record.size_bytes, record.sha256)

    def local_shard(self, shard: int) -> Path:
        """Where shard number ``shard`` can be read on this machine; fetched first when it lies at a URL."""
        return self.cache.path(self.remote_shard(shard)) if self.is_remote else self.shard_path(shard)

    def sample_key(self, sample_id: int) -> str:
        """The name of the sample's tar member, read from the header in front of its payload."""
        row = self.index[sample_id]
        with open(self.local_shard(int(row["shard"])), "rb") as file:
            header = os.pread(file.fileno(), _TAR_BLOCK_BYTES, int(row["offset"]) - _TAR_BLOCK_BYTES)
        return header[:100].rstrip(b"\0").decode("utf-8", errors="replace")

    def select(self, identity_keys: Iterable[str]) -> View:
        """The samples of some identities, relabelled 0 .. C-1 in the sorted order of the keys.

        Quarantined samples are left out, and identities that have no others.
        Errors: DataError for an unknown or repeated key, or none at all.
        """
        keys = tuple(identity_keys)
        labels = self.identities.labels_of(keys)
        unknown = np.flatnonzero(labels < 0)
        if unknown.size:
            raise DataError(
                f"{self.directory} has no identity {keys[int(unknown[0])]!r} (it has {len(self.identities)} others)"
            )
        return self.select_labels(labels)

    def select_labels(self, label_C: Int64Array) -> View:
        """``select`` by labels of this data set."""
        return self.choose(label_C).view()

    def choose(self, label_C: Int64Array) -> Choice:
        """What a view of some labels will hold, before its samples are listed. Errors: as ``select``."""
        if not len(label_C):
            raise DataError(f"{self.directory}: no identity was selected; a view needs at least 1")
        class_C = np.sort(label_C)
        repeated = np.flatnonzero(class_C[1:] == class_C[:-1])
        if repeated.size:
            raise DataError(
                f"identity {self.identities[int(class_C[repeated[0]])]!r} was selected twice; name each once"
            )
        counts = self.images_per_label()[class_C]
        if not bool(np.all(counts)):
            class_C, counts = class_C[counts > 0], counts[counts > 0]
            if not len(class_C):
                raise DataError(
                    f"{self.directory}: {QUARANTINE_FILE} leaves no sample of those identities; look at its reasons"
                )
        return Choice(self, class_C, counts)

    def images_per_label(self) -> Int64Array:
        """(C,) without quarantined samples."""
        counts = np.zeros(len(self.identities), dtype=np.int64)
        for _, rows in index_pieces(self.directory / INDEX_FILE):
            counts += np.bincount(rows["label"], minlength=len(counts))
        if len(self.quarantined):
            counts -= np.bincount(self.index["label"][self.quarantined], minlength=len(counts))
        return counts


@dataclass(frozen=True, eq=False)
class Choice:
    """Labels of a packed data set in the sorted order of their keys, and how many samples of each are in use."""

    dataset: PackedDataset
    class_C: Int64Array
    count_C: Int64Array

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.dataset.fingerprint_in_use.encode())
        for key in Chosen(self.dataset.identities, self.class_C):
            digest.update(b"\n" + key.encode())
        return digest.hexdigest()

    def view(self) -> View:
        """**Memory**: 16 bytes a sample of the view, 16 an identity of the data set."""
        parts = [*self.pieces()]
        ids, labels = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
        return View(self.dataset, ids, labels, self.count_C, self.class_C, self.fingerprint)

    def pieces(self) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Sample ids, rising, and their new labels, a part of the index at a time."""
        dataset = self.dataset
        new_label = np.full(len(dataset.identities), -1, dtype=np.int64)
        new_label[self.class_C] = np.arange(len(self.class_C))
        for first, rows in index_pieces(dataset.directory / INDEX_FILE):
            labels = new_label[rows["label"]]
            low, high = np.searchsorted(dataset.quarantined, (first, first + len(rows)))
            labels[dataset.quarantined[low:high] - first] = -1
            here = np.flatnonzero(labels >= 0)
            yield here + first, labels[here]


def shard_edges(view: View) -> Int64Array:
    """(K + 1,) positions of the view at which another shard begins, and its end; equal parts where samples are not in the order
    of their shards.
    """
    counts = np.array([shard.num_samples for shard in view.dataset.manifest.shards], dtype=np.int64)
    ends = np.cumsum(counts)
    firsts = ends - counts
    if int(ends[-1]) == view.dataset.num_samples:
        shard_of = view.dataset.rows[np.concatenate([firsts, ends - 1])]["shard"]
        if np.array_equal(shard_of, np.tile(np.arange(len(counts)), 2)):
            edges = np.unique([0, *(_first_at_least(view.sample_ids, int(end)) for end in ends.tolist())])
            return edges.astype(np.int64)
    parts = min(len(counts), view.num_samples)
    return np.arange(parts + 1, dtype=np.int64) * view.num_samples // parts


def _first_at_least(rising: Int64Array | Rows[np.int64], value: int) -> int:
    """How many numbers of a rising list are below ``value``."""
    low, high = 0, len(rising)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if int(rising[middle]) < value else (low, middle)
    return low


def index_pieces(path: Path) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
    """The first row's number and the rows, a part at a time; read, not mapped: what was passed takes no memory."""
    rows = Rows(path, INDEX_DTYPE)
    for first in range(0, len(rows), _PIECE_ROWS):
        yield first, rows[first : first + _PIECE_ROWS]


@dataclass(frozen=True)
class IdentitySplit:
    """Who trains and who is tested: ``heldout`` shares nobody with ``train``; ``old`` is a part of ``train``.

    Keys in their sorted order.
    """

    train: Sequence[str]
    old: Sequence[str]
    heldout: Sequence[str]


def split_identities(identities: Sequence[str], heldout: int, old_fraction: float, seed: int) -> IdentitySplit:
    """Split identity keys by a seeded hash of each key, so that the order of the input does not matter.

    Errors: DataError when train, old or heldout would hold fewer than 2 identities.
    **Memory**: 40 bytes an identity where they are :class:`Identities`.
    """
    keys = identities if isinstance(identities, Identities) else sorted(identities)
    if not isinstance(keys, Identities) and (place := first_unsorted(keys)) is not None:
        raise DataError(f"identity {keys[place]!r} appears twice; keys must be unique")
    if heldout < 2 or len(keys) - heldout < 2:
        raise DataError(
            f"data.heldout_identities is {heldout} of {len(keys)} identities; must leave at least 2 on each side "
            f"(2 to {len(keys) - 2}). Lower it or bring more identities"
        )
    by_chance = np.lexsort(_keyed_hashes(seed, "heldout", keys))
    train = np.sort(by_chance[heldout:])
    num_old = round(old_fraction * len(train))
    if not 2 <= num_old <= len(train):
        raise DataError(
            f"data.old_identities is {old_fraction} of {len(train)} training identities = {num_old}; must give "
            f"2 to {len(train)}. Use {2 / len(train):.3g} or more, up to 1"
        )
    first = np.lexsort(_keyed_hashes(seed, "old", Chosen(keys, train)))[:num_old]
    places = (train, train[np.sort(first)], np.sort(by_chance[:heldout]))
    return IdentitySplit(*(Chosen(keys, place) for place in places))


def _keyed_hashes(seed: int, purpose: str, keys: Sequence[str]) -> tuple[UInt64Array, UInt64Array]:
    """The lower and the higher halves of a 128-bit hash of each key."""
    halves = np.empty((len(keys), 2), dtype=">u8")
    seeded = hashlib.blake2b(f"{seed}\0{purpose}\0".encode(), digest_size=16)
    each = iter(keys)
    for first in range(0, len(keys), _PIECE_ROWS):
        digests = []
        for key in itertools.islice(each, _PIECE_ROWS):
            digest = seeded.copy()
            digest.update(key.encode())
            digests.append(digest.digest())
        halves[first : first + len(digests)] = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
    return halves[:, 1].astype(np.uint64), halves[:, 0].astype(np.uint64)


def is_url(root: str | None) -> bool:
    """Whether shards lie at a URL (s3://, gs://, http://, https://, file://, ...) rather than in a folder."""
    return root is not None and "://" in root


def fetch_description(url: str, folder: Path) -> Path:
    """Everything of the packed data set at ``url`` but its shards, brought into a folder below ``folder``; the folder.

    What is there already and has not changed is kept. Errors: DataError, also for shards in a folder outside of ``url``.
    """
    source = Source(url)
    text = source.read(MANIFEST_FILE)
    if text is None:
        raise DataError(f"{url} has no {MANIFEST_FILE}; packing writes it last, so this is no (whole) packed data set")
    try:
        values = json.loads(text)
        manifest = Manifest.model_validate(values)
    except (ValueError, ValidationError) as error:
        raise DataError(
            f"{url}/{MANIFEST_FILE} is damaged ({str(error).splitlines()[0]}); restore it or pack again"
        ) from None
    root = manifest.root
    if root is not None and not is_url(root) and (root.startswith("/") or ".." in root.split("/")):
        raise DataError(
            f"{url} has its shards at {root!r}, a folder of the machine that indexed them; must be below it, or a URL. Upload the "
            f'tars, and write where they are as "root" into {url.rstrip("/")}/{MANIFEST_FILE} (its fingerprint leaves that out)'
        )
    if not is_url(root):
        root = url.rstrip("/") if root in (None, "", ".") else f"{url.rstrip('/')}/{root}"
    name = hashlib.sha256(f"{url.rstrip('/')} {manifest.fingerprint}".encode()).hexdigest()[:16]
    out = folder / f"remote-{name}"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST_FILE).exists():
        wanted = {INDEX_FILE: manifest.index_sha256, IDENTITIES_FILE: manifest.identities_sha256}
        wanted |= {NAMES_FILE: manifest.names_sha256} if manifest.names_sha256 is not None else {}
        for file, sha256 in wanted.items():
            source.fetch(file, out / file, source.size(file), sha256)
        partial = out / f"{MANIFEST_FILE}.partial"
        partial.write_text(json.dumps({**values, "root": root}, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(out / MANIFEST_FILE)
    quarantine = source.read(QUARANTINE_FILE)
    if quarantine is None:
        (out / QUARANTINE_FILE).unlink(missing_ok=True)
    else:
        partial = out / f"{QUARANTINE_FILE}.partial"
        partial.write_bytes(quarantine)
        partial.replace(out / QUARANTINE_FILE)
    return out


@dataclass(frozen=True)
class Quarantined:
    """A sample that is not used: its number, its tar member, and what is wrong with it."""

    sample: int
    key: str
    reason: str


def read_quarantine(directory: Path, num_samples: int) -> list[Quarantined]:
    """What quarantine.json lists; nothing where there is no such file. Errors: DataError for a damaged or foreign one."""
    path = directory / QUARANTINE_FILE
    if not path.exists():
        return []
    try:
        listed = [Quarantined(**one) for one in json.loads(path.read_text(encoding="utf-8"))["samples"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and run lce data verify again") from None
    for one in listed:
        if type(one.sample) is not int or not 0 <= one.sample < num_samples:
            raise DataError(f"{path} names sample {one.sample!r} of {num_samples}; remove it and verify again")
    return listed


def write_quarantine(directory: Path, samples: Sequence[Quarantined]) -> None:
    """Replace quarantine.json; an empty list removes it."""
    path = directory / QUARANTINE_FILE
    if not samples:
        path.unlink(missing_ok=True)
        return
    ordered = sorted(samples, key=lambda one: one.sample)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"samples": [asdict(one) for one in ordered]}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def verify_checksums(dataset: PackedDataset, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every shard and compare it with its hash; ``progress`` gets (shards done, shards).

    Errors: DataError naming the first shard that differs.
    """
    for number, shard in enumerate(dataset.manifest.shards):
        path = dataset.shard_path(number)
        _check_shard_size(path.parent, shard.model_copy(update={"file": path.name}))
        _check_hash(path, shard.sha256)
        if progress is not None:
            progress(number + 1, len(dataset.manifest.shards))


def write_description(
    directory: Path,
    name: str,
    shards: Sequence[ShardRecord],
    index: npt.NDArray[np.void],
    identities: Sequence[str],
    source: str,
    name_hash_N2: npt.NDArray[np.uint64],
    root: str | None = None,
    shuffled: bool | None = None,
) -> Manifest:
    """Write index, identities, names and, last and atomically, the manifest of shards that already lie in ``directory``,
    or in ``root``.
    """
    np.save(directory / INDEX_FILE, index, allow_pickle=False)
    np.save(directory / NAMES_FILE, name_hash_N2, allow_pickle=False)
    (directory / IDENTITIES_FILE).write_text("".join(f"{key}\n" for key in identities), encoding="utf-8", newline="")
    return write_manifest(directory, name, shards, len(index), len(identities), source, root, shuffled)


def write_manifest(
    directory: Path,
    name: str,
    shards: Sequence[ShardRecord],
    num_samples: int,
    num_identities: int,
    source: str,
    root: str | None = None,
    shuffled: bool | None = None,
) -> Manifest:
    """The last step of packing: the manifest of an index, identities and names, or none, that lie in ``directory``."""
    names = directory / NAMES_FILE
    unsigned = Manifest(
        format=FORMAT,
        version=VERSION,
        name=name,
        num_samples=num_samples,
        num_identities=num_identities,
        shards=list(shards),
        index_sha256=file_sha256(directory / INDEX_FILE),
        identities_sha256=file_sha256(directory / IDENTITIES_FILE),
        names_sha256=file_sha256(names) if names.exists() else None,
        root=root,
        shuffled=shuffled,
        source=source,
        fingerprint="0" * 64,
    )
    manifest = unsigned.model_copy(update={"fingerprint": unsigned.content_fingerprint()})
    unfinished = directory / (MANIFEST_FILE + ".partial")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps(manifest.model_dump(exclude_none=True), indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(directory / MANIFEST_FILE)
    return manifest


def file_sha256(path: Path) -> str:
    """64 hex digits over the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise DataError(f"packed data set {directory} does not exist or is no folder; pack one there or name another")
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{directory} has no {MANIFEST_FILE}; packing writes it last, so the data set is incomplete or "
            "this is no packed data set. Pack it again"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); pack the data set again or restore the file") from None
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {found[0]!r} version {found[1]!r}; this release reads {FORMAT!r} version {VERSION}. "
            "Pack the data set again with this release"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DataError(f"{path} is damaged: {where}: {problem['msg']}; pack the data set again") from None
    if manifest.fingerprint != manifest.content_fingerprint():
        raise DataError(f"{path} was edited: its fingerprint does not match its contents; restore it or pack again")
    return manifest


def _check_shard_size(directory: Path, shard: ShardRecord) -> None:
    path = directory / shard.file
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"shard {path} is missing; the manifest lists it. Restore it or pack again") from None
    if size_bytes != shard.size_bytes:
        raise DataError(
            f"shard {path} is {size_bytes} bytes; the manifest says {shard.size_bytes}, so it was truncated or "
            "rewritten. Restore it or pack again"
        )


def _check_hash(path: Path, expected: str) -> None:
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; restore it or pack the data set again") from None
    if found != expected:
        raise DataError(
            f"{path} has sha256 {found[:16]}...; the manifest says {expected[:16]}..., so its contents changed. "
            "Restore it or pack again"
        )


def _map_index(path: Path) -> npt.NDArray[np.void]:
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is no index ({error}); pack the data set again") from None
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise DataError(
            f"{path} has dtype {index.dtype}, shape {index.shape}; must be one row of {INDEX_DTYPE} a sample"
        )
    mapped: npt.NDArray[np.void] = index
    return mapped


def _map_names(path: Path, manifest: Manifest) -> npt.NDArray[np.uint64] | None:
    if manifest.names_sha256 is None:
        return None
    try:
        names_N2: npt.NDArray[np.uint64] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{path} is no list of hashes ({error}); pack the data set again") from None
    if names_N2.dtype != np.uint64 or names_N2.shape != (manifest.num_samples, 2):
        raise DataError(
            f"{path} has dtype {names_N2.dtype}, shape {names_N2.shape}; must be uint64 of shape "
            f"({manifest.num_samples}, 2). Pack the data set again"
        )
    return names_N2


def _check_identities(path: Path, identities: Identities) -> None:
    try:
        place = first_unsorted(identities)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 ({error.reason}); pack the data set again") from None
    if place is not None:
        raise DataError(
            f"{path}: line {place + 1} is not above line {place}; identity keys must be sorted and unique. Pack the data set "
            "again"
        )


def _check_rows(path: Path, shards: Sequence[ShardRecord], identities: Sequence[str]) -> None:
    shard_bytes = np.array([shard.size_bytes for shard in shards], dtype=np.int64)
    images_per_label = np.zeros(len(identities), dtype=np.int64)
    for first, rows in index_pieces(path):
        _refuse_first(path, first, rows["label"], (0, len(identities) - 1), "label")
        _refuse_first(path, first, rows["shard"], (0, len(shards) - 1), "shard")
        _refuse_first(path, first, rows["size"], (1, 2**31 - 1), "size")
        _refuse_first(path, first, rows["offset"], (_TAR_BLOCK_BYTES, 2**62), "offset")
        ends = rows["offset"] + rows["size"]
        beyond = np.flatnonzero(ends > shard_bytes[rows["shard"]])
        if beyond.size:
            sample_id = first + int(beyond[0])
            shard = shards[int(rows["shard"][beyond[0]])]
            raise DataError(
                f"{path}: sample {sample_id} ends at byte {int(ends[beyond[0]])} of {shard.file}, which has "
                f"{shard.size_bytes}. Pack the data set again"
            )
        images_per_label += np.bincount(rows["label"], minlength=len(identities))
    empty = np.flatnonzero(images_per_label == 0)
    if empty.size:
        raise DataError(
            f"{path}: identity {identities[int(empty[0])]!r} has no images ({empty.size} empty of {len(identities)}); "
            "each needs at least 1. Remove it from the source and pack again"
        )


def _refuse_first(path: Path, first: int, values: Any, allowed: tuple[int, int], name: str) -> None:
    wrong = np.flatnonzero((values < allowed[0]) | (values > allowed[1]))
    if wrong.size:
        raise DataError(
            f"{path}: sample {first + int(wrong[0])} has {name} {int(values[wrong[0]])}; "
            f"must be {allowed[0]} to {allowed[1]}. Pack the data set again"
        )
