"""From a source of images to shards: planned up front, packed in parallel, the same bytes after any interruption.

OUT.importing/lock       held while an import runs
OUT.importing/settings   what is imported and how; another import is refused until it is removed
OUT.importing/plan/      arrays of the source and of the plan, mapped by every worker
OUT.importing/records-K/ 000003.npz: index rows of a shard that is finished; written after the shard
OUT.importing/data/      the packed data set; becomes OUT when all of it is there
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lce_dist.errors import ConfigError, DataError, SetupError
from lce_dist.keys import hash_keys
from pipelines.images import ImageRules
from pipelines.importable import KeepsNames, Source, SourceDamagedError, already_packed, digest, look_sorted
from pipelines.manifest import INDEX_DTYPE, PackedDataset, ShardRecord, write_description
from pipelines.members import image_ending
from pipelines.order import Int64Array, UInt64Array, derive_key, permute
from pipelines.units import Told, locked, on_disk, run_units

SKIPPED_FILE = "skipped.csv"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
SHARD_BYTES = 256 * 2**20

_RULES = 1  # raised when the same source would give other bytes
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 156)  # of a tar header
_MEMBERS_BYTES = 5 * _BLOCK  # header and text of .cls and .id, header of .jpg
_KEY_DIGITS = 9
_BATCH_IMAGES, _BATCH_BYTES = 512, 8 << 20  # written together

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class ImportSettings:
    """name: of the shards; shard_bytes: about how large they become; seed: of the shuffle; skip_bad: or stop at the first."""

    name: str = "images"
    shard_bytes: int = SHARD_BYTES
    seed: int = 0
    images: ImageRules | None = field(default_factory=ImageRules)  # None: bytes stay as they are, whatever they are
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_PATTERN, self.name):
            raise ConfigError(f"--name is {self.name!r}; must match {NAME_PATTERN}: shards are called after it")
        if self.shard_bytes < 1:
            raise ConfigError(f"--shard-mb is {self.shard_bytes >> 20}; must be at least 1")
        if self.images is None:
            return
        if self.images.size is not None and self.images.size < 1:
            raise ConfigError(f"--size is {self.images.size}; must be at least 1 pixel")
        if self.images.quality is not None and not 1 <= self.images.quality <= 100:
            raise ConfigError(f"--quality is {self.images.quality}; must be 1 to 100")


@dataclass(frozen=True)
class Imported:
    """The packed data set, how many images were left out, the identities that lost all of theirs, and the shards found done."""

    dataset: PackedDataset
    num_skipped: int
    dropped_identities: tuple[str, ...]
    num_shards_found: int


@dataclass(frozen=True, eq=False)
class Plan:
    """order_M: the source's numbers in packing order; first_S1: where each shard begins in it, and the end; unit_U1: where each
    unit of work begins among the shards, and the end; label_C: the new label of each old one, -1 for who is left out.
    """

    order_M: Int64Array
    first_S1: Int64Array
    unit_U1: Int64Array
    label_C: Int64Array

    @property
    def num_shards(self) -> int:
        return len(self.first_S1) - 1


def import_images(
    source: Source, out: Path, settings: ImportSettings, num_workers: int, progress: Progress | None = None
) -> Imported:
    """Pack ``source`` into ``out``; an interrupted import goes on, a finished one is opened.

    ``progress`` gets (images done, images, bytes done). Labels are places in the sorted identity keys, whatever the order of
    the source. With ``skip_bad`` images that cannot be read or decoded are listed in ``skipped.csv``, and an identity
    without any other image is left out.
    Errors: DataError for a bad image, a foreign ``out`` or an unfinished import of something else; SetupError when the disk
    refuses. **Memory**: about 150 bytes an image at the end, and a batch of images or the row groups of a shard a worker.
    """
    images = None if settings.images is None else vars(settings.images)
    fingerprint = digest(
        json.dumps([_RULES, source.kind, settings.name, settings.shard_bytes, settings.seed, images]),
        source.stamp,
    )
    packed = find_packed(out, fingerprint)
    if packed is not None:
        return packed
    work = out.with_name(out.name + ".importing")
    with writing(work, out, fingerprint) as is_ours:
        if not is_ours:
            return import_images(source, out, settings, num_workers, progress)
        (work / "plan").mkdir(exist_ok=True)
        source = on_disk(source, work / "plan", "source")
        found = 0
        while True:
            dropped = _read_dropped(work)
            job = _pack_job(source, settings, work, dropped)
            done = [number for number in range(job.plan.num_shards) if job.is_done(number)]
            found = found or len(done)
            _pack_all(job, set(done), num_workers, progress)
            records = [job.load_record(number) for number in range(job.plan.num_shards)]
            empty = _without_images(source, job.plan, records)
            if not empty:
                break
            # Their labels are gone, so those of others move: everything is packed once more without them.
            write_atomically(work / "dropped.json", json.dumps(sorted({*dropped, *empty})).encode())
        _finish(source, settings, job, records, fingerprint)
        publish(work, out)
    return Imported(
        PackedDataset.open(out), count_skipped(out), tuple(source.identities[label] for label in dropped), found
    )


def find_packed(out: Path, fingerprint: str) -> Imported | None:
    """What a finished import left in ``out``. Errors: DataError for anything else in there."""
    packed = already_packed(out, fingerprint)
    if packed is None:
        return None
    shutil.rmtree(out.with_name(out.name + ".importing"), ignore_errors=True)  # killed between the last two steps
    return Imported(packed, count_skipped(out), (), len(packed.manifest.shards))


def make_plan(source: Source, shard_bytes: int, seed: int, dropped: tuple[int, ...] = ()) -> Plan:
    """Which image goes where. Shards of a source differ by little in size; none is much above ``shard_bytes``.

    Images that are read one by one are shuffled over the whole data set. Where groups are read as a whole, random groups
    that fill a shard together are shuffled among themselves.
    """
    num_images = len(source.label_N)
    label_C = np.full(len(source.identities), -1, dtype=np.int64)
    kept_C = np.setdiff1d(np.arange(len(label_C)), np.array(dropped, dtype=np.int64))
    label_C[kept_C] = np.arange(len(kept_C))
    blocks: Iterator[Int64Array]
    if source.in_order:
        blocks = iter([np.arange(num_images, dtype=np.int64)])
    elif source.group_N is None:
        blocks = iter([permute(np.arange(num_images, dtype=np.int64), num_images, derive_key(seed, num_images))])
    else:
        blocks = _blocks_of_groups(source.group_N, _in_tar(source.bytes_N), shard_bytes, seed)
    orders, firsts, units, position, shards = [], [0], [0], 0, 0
    for numbers in blocks:
        if dropped:
            numbers = numbers[label_C[source.label_N[numbers]] >= 0]
        if not len(numbers):
            continue
        ends = np.cumsum(_in_tar(source.bytes_N[numbers]))
        num_shards = max(1, -(-int(ends[-1]) // shard_bytes))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, num_shards + 1) / num_shards - 0.5) + 1
        cuts = np.unique(np.minimum(cuts, len(numbers)))
        orders.append(numbers)
        firsts += (position + cuts).tolist()
        position += len(numbers)
        units += [shards + len(cuts)] if source.group_N is not None else range(shards + 1, shards + len(cuts) + 1)
        shards += len(cuts)
    if not orders:
        raise DataError("no image is left to import; each was left out as damaged. Look at the source")
    return Plan(np.concatenate(orders), np.array(firsts, dtype=np.int64), np.array(units, dtype=np.int64), label_C)


def _blocks_of_groups(group_N: Int64Array, tar_N: Int64Array, shard_bytes: int, seed: int) -> Iterator[Int64Array]:
    first_G = np.flatnonzero(np.diff(group_N, prepend=-1))
    end_G = np.append(first_G[1:], len(group_N))
    bytes_G = np.add.reduceat(tar_N, first_G)
    num_groups = len(first_G)
    together: list[int] = []
    size = 0

    def block() -> Int64Array:
        numbers = np.concatenate([np.arange(first_G[group], end_G[group], dtype=np.int64) for group in together])
        count = len(numbers)
        return numbers[permute(np.arange(count, dtype=np.int64), count, derive_key(seed, len(group_N), together[0]))]

    for group in permute(np.arange(num_groups, dtype=np.int64), num_groups, derive_key(seed, num_groups)).tolist():
        if together and size + bytes_G[group] > shard_bytes:
            yield block()
            together, size = [], 0
        together.append(group)
        size += int(bytes_G[group])
    if together:
        yield block()


def _in_tar(bytes_N: Int64Array) -> Int64Array:
    sizes: Int64Array = _MEMBERS_BYTES + -(-bytes_N // _BLOCK) * _BLOCK
    return sizes


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What is known of a finished shard: its record, index rows, hashes of names, and (name, identity, reason, number) left out."""

    shard: ShardRecord | None
    rows_M: npt.NDArray[np.void]
    name_hash_M2: npt.NDArray[np.uint64]
    skipped: list[tuple[str, str, str, int]]


@dataclass(frozen=True, eq=False)
class PackJob:
    """Shards of a plan as units of work."""

    source: Source
    settings: ImportSettings
    plan: Plan
    data: Path
    records: Path

    def run(self, unit: int, told: Told) -> None:
        for shard in range(int(self.plan.unit_U1[unit]), int(self.plan.unit_U1[unit + 1])):
            if not self.is_done(shard):
                self._write(shard, told)

    def is_done(self, shard: int) -> bool:
        """Whether the shard was finished, and still is what it was then by size."""
        if not self._record_path(shard).exists():
            return False
        record = self.load_record(shard).shard
        path = self._shard_path(shard)
        return record is None or (path.exists() and path.stat().st_size == record.size_bytes)

    def load_record(self, shard: int) -> ShardResult:
        with np.load(self._record_path(shard), allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            record = None if facts["shard"] is None else ShardRecord.model_validate(facts["shard"])
            return ShardResult(record, stored["rows"], stored["names"], [tuple(one) for one in facts["skipped"]])

    def _record_path(self, shard: int) -> Path:
        return self.records / f"{shard:06d}.npz"

    def _shard_path(self, shard: int) -> Path:
        return self.data / f"{self.settings.name}-{shard:06d}.tar"

    def _hashes(self, numbers: list[int], names: list[str]) -> UInt64Array:
        if isinstance(self.source, KeepsNames):
            return self.source.name_hashes(np.array(numbers, dtype=np.int64))
        return hash_keys(names)

    def _write(self, shard: int, told: Told) -> None:
        source, settings, plan = self.source, self.settings, self.plan
        first, end = int(plan.first_S1[shard]), int(plan.first_S1[shard + 1])
        numbers_M = plan.order_M[first:end]
        path = self._shard_path(shard)
        partial = path.with_name(path.name + ".partial")
        rows: list[npt.NDArray[np.void]] = []
        names: list[str] = []
        kept: list[int] = []
        skipped: list[tuple[str, str, str, int]] = []
        identity_of: dict[int, str] = {}
        batch = Batch([], [], [], [])
        old_labels = source.label_N[numbers_M]
        labels = plan.label_C[old_labels].tolist()
        samples = zip(range(first, end), numbers_M.tolist(), old_labels.tolist(), labels, strict=True)
        source.expect(numbers_M)
        with partial.open("wb", buffering=0) as file:
            tar = TarStream(file)

            def write_batch() -> None:
                offsets = tar.add_samples(batch)
                part = np.zeros(len(offsets), dtype=INDEX_DTYPE)
                part["shard"], part["offset"], part["label"] = shard, offsets, batch.labels
                part["size"] = [len(payload) for payload in batch.payloads]
                rows.append(part)
                told(len(offsets), int(part["size"].sum()))
                batch.clear()

            waiting = 0
            for position, number, old_label, label in samples:
                identity = identity_of.get(old_label) or identity_of.setdefault(old_label, source.identities[old_label])
                try:
                    payload = source.read(number)
                    name = source.name(number)
                    if settings.images is not None:
                        payload = settings.images.apply(payload, name)
                except SourceDamagedError:
                    raise
                except DataError as error:
                    if not settings.skip_bad:
                        raise DataError(f"{error}. With --bad skip such images are left out and listed") from None
                    skipped.append((source.name(number), identity, str(error), number))
                    told(1, 0)
                    continue
                batch.add(position, label, identity, payload)
                names.append(name)
                kept.append(number)
                waiting += len(payload)
                if len(batch.payloads) == _BATCH_IMAGES or waiting >= _BATCH_BYTES:
                    write_batch()
                    waiting = 0
            if batch.payloads:
                write_batch()
            size_bytes, sha256 = tar.close()
            os.fsync(file.fileno())
        record = None
        if names:
            partial.replace(path)
            record = {"file": path.name, "size_bytes": size_bytes, "num_samples": len(names), "sha256": sha256}
        else:
            partial.unlink()
        facts = json.dumps({"shard": record, "skipped": skipped}).encode()
        stored = io.BytesIO()
        np.savez(
            stored,
            facts=np.frombuffer(facts, dtype=np.uint8),
            rows=np.concatenate([np.zeros(0, dtype=INDEX_DTYPE), *rows]),
            names=self._hashes(kept, names),
        )
        write_atomically(self._record_path(shard), stored.getvalue())


@dataclass(frozen=True)
class Batch:
    """Samples on their way into a tar: position in packing order, label, identity key and JPEG of each."""

    positions: list[int]
    labels: list[int]
    identities: list[str]
    payloads: list[bytes]

    def add(self, position: int, label: int, identity: str, payload: bytes) -> None:
        self.positions.append(position)
        self.labels.append(label)
        self.identities.append(identity)
        self.payloads.append(payload)

    def clear(self) -> None:
        for part in (self.positions, self.labels, self.identities, self.payloads):
            part.clear()


class TarStream:
    """Members of a POSIX tar, hashed on their way to the file; webdataset's own writer takes ten times as long."""

    def __init__(self, file: io.RawIOBase | io.FileIO) -> None:
        self._file = file
        self._parts: list[bytes | bytearray | memoryview] = []
        self._offset = 0
        self._hash = hashlib.sha256()
        # A fixed time and owner: the same images must give the same bytes.
        member = tarfile.TarInfo("")
        member.mode, member.mtime = 0o444, 0
        self._blank = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
        self._blank[_CHECKSUM] = b" " * 8
        self._sum = sum(self._blank) - 11 * ord("0")

    def add(self, name: bytes, payload: bytes) -> int:
        """Append a file, whose name has at most 100 bytes; returns where its contents begin."""
        size = len(payload)
        digits = b"%011o" % size
        header = self._blank.copy()
        header[: len(name)] = name
        header[_SIZE] = digits
        header[_CHECKSUM] = b"%06o\0 " % (self._sum + sum(name) + sum(digits))
        padding = -size % _BLOCK
        self._parts += (header, payload, _ZEROS[:padding])
        begin = self._offset + _BLOCK
        self._offset = begin + size + padding
        return begin

    def add_samples(self, batch: Batch) -> Int64Array:
        """Append .cls, .id and the image of each sample; returns where the images begin."""
        keys = [identity.encode() for identity in batch.identities]
        others = any(image_ending(payload) != "jpg" for payload in batch.payloads)
        if others or batch.positions[-1] >= 10**_KEY_DIGITS or max(map(len, keys)) > _BLOCK:
            return self.add_samples_one_by_one(batch)
        sizes_B = np.array([len(payload) for payload in batch.payloads], dtype=np.int64)
        heads = self._heads(batch, keys, sizes_B).reshape(-1).data
        padding_B = -sizes_B % _BLOCK
        for place, (payload, padding) in enumerate(zip(batch.payloads, padding_B.tolist(), strict=True)):
            self._parts += (heads[place * _MEMBERS_BYTES : (place + 1) * _MEMBERS_BYTES], payload, _ZEROS[:padding])
        ends_B = self._offset + np.cumsum(_MEMBERS_BYTES + sizes_B + padding_B)
        self._offset = int(ends_B[-1])
        self._flush()
        begins: Int64Array = ends_B - sizes_B - padding_B
        return begins

    def add_samples_one_by_one(self, batch: Batch) -> Int64Array:
        """As :meth:`add_samples`, for keys of any length and images of any format."""
        begins = []
        for position, label, identity, payload in zip(
            batch.positions, batch.labels, batch.identities, batch.payloads, strict=True
        ):
            key = b"%09d" % position
            self.add(key + b".cls", b"%d" % label)
            self.add(key + b".id", identity.encode())
            begins.append(self.add(key + b"." + image_ending(payload).encode(), payload))
        self._flush()
        return np.array(begins, dtype=np.int64)

    def _heads(self, batch: Batch, keys: list[bytes], sizes_B: Int64Array) -> npt.NDArray[np.uint8]:
        """(B, 5, 512): header and text of .cls, header and text of .id, header of .jpg."""
        count = len(keys)
        positions_B = np.array(batch.positions, dtype=np.int64)
        digits_BK = positions_B[:, None] // 10 ** np.arange(_KEY_DIGITS - 1, -1, -1) % 10 + ord("0")
        texts = [b"%d" % label for label in batch.labels]
        heads = np.zeros((count, 5, _BLOCK), dtype=np.uint8)
        heads[:, 1, :20] = np.array(texts, dtype="S20").view(np.uint8).reshape(count, 20)
        heads[:, 3] = np.array(keys, dtype=f"S{_BLOCK}").view(np.uint8).reshape(count, _BLOCK)
        members = (
            (0, b".cls", np.array([len(one) for one in texts])),
            (2, b".id", np.array([len(one) for one in keys])),
        )
        for place, ending, sizes in (*members, (4, b".jpg", sizes_B)):
            header = heads[:, place]
            header[:] = np.frombuffer(self._blank, dtype=np.uint8)
            header[:, :_KEY_DIGITS] = digits_BK
            header[:, _KEY_DIGITS : _KEY_DIGITS + len(ending)] = np.frombuffer(ending, dtype=np.uint8)
            header[:, _SIZE] = _octal(sizes, 11)
            checksums = header.sum(axis=1, dtype=np.int64)
            header[:, _CHECKSUM] = np.frombuffer(b"000000\0 ", dtype=np.uint8)
            header[:, _CHECKSUM.start : _CHECKSUM.start + 6] = _octal(checksums, 6)
        return heads

    def close(self) -> tuple[int, str]:
        """End the archive; returns its size and SHA-256."""
        end = bytes(2 * _BLOCK)
        end += bytes(-(self._offset + len(end)) % tarfile.RECORDSIZE)
        self._parts.append(end)
        self._offset += len(end)
        self._flush()
        return self._offset, self._hash.hexdigest()

    def _flush(self) -> None:
        chunk = memoryview(b"".join(self._parts))
        self._parts = []
        self._hash.update(chunk)
        while chunk:
            chunk = chunk[self._file.write(chunk) or 0 :]


def _octal(values: npt.NDArray[np.int64], num_digits: int) -> npt.NDArray[np.int64]:
    """(B,) -> (B, num_digits) ASCII codes."""
    return (values[:, None] >> 3 * np.arange(num_digits - 1, -1, -1) & 7) + ord("0")


def _pack_job(source: Source, settings: ImportSettings, work: Path, dropped: tuple[int, ...]) -> PackJob:
    plan = on_disk(
        make_plan(source, settings.shard_bytes, settings.seed, dropped), work / "plan", f"plan-{len(dropped)}"
    )
    records = work / f"records-{len(dropped)}"
    records.mkdir(exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    return PackJob(source, settings, plan, work / "data", records)


def _pack_all(job: PackJob, done: set[int], num_workers: int, progress: Progress | None) -> None:
    plan, total = job.plan, int(job.plan.first_S1[-1])
    images_done = sum(int(plan.first_S1[shard + 1] - plan.first_S1[shard]) for shard in done)
    units = [
        unit
        for unit in range(len(plan.unit_U1) - 1)
        if not all(shard in done for shard in range(int(plan.unit_U1[unit]), int(plan.unit_U1[unit + 1])))
    ]

    def watched(images: int, size: int) -> None:
        if progress is not None:
            progress(images_done + images, total, size)

    watched(0, 0)
    run_units(job, units, num_workers, watched)


def _without_images(source: Source, plan: Plan, records: list[ShardResult]) -> list[int]:
    """Old labels of who lost every image."""
    expected = np.flatnonzero(plan.label_C >= 0)
    seen = np.zeros(len(expected), dtype=np.bool_)
    for record in records:
        seen[record.rows_M["label"]] = True
    empty: list[int] = expected[~seen].tolist()
    return empty


def _finish(
    source: Source, settings: ImportSettings, job: PackJob, records: list[ShardResult], fingerprint: str
) -> None:
    """Write the description of a whole set of shards, and lists of what is not in them."""
    kept = [record for record in records if record.shard is not None]
    shards = [record.shard for record in kept if record.shard is not None]
    for number, record in enumerate(kept):
        record.rows_M["shard"] = number
    index = np.concatenate([record.rows_M for record in kept])
    names_N2 = np.concatenate([record.name_hash_M2 for record in kept])
    identities = [source.identities[int(label)] for label in np.flatnonzero(job.plan.label_C >= 0)]
    skipped = [one for record in records for one in record.skipped]
    listed = {shard.file for shard in shards}
    for path in job.data.iterdir():
        if path.name not in listed:
            path.unlink()  # left by a killed run, or of a pass with more identities
    order_M = np.asarray(job.plan.order_M)
    if skipped:
        order_M = order_M[~np.isin(order_M, [number for _, _, _, number in skipped])]
    for name, text in source.companions(order_M).items():
        (job.data / name).write_text(text, encoding="utf-8")
    gone = _read_gone(source, job)
    if skipped or gone:
        write_skipped(job.data, [one[:3] for one in (*skipped, *gone)])
    # whole groups are mixed with a few others only: whether that is enough is seen
    sorted_still = source.group_N is not None and look_sorted(index["label"], len(identities))
    shuffled = not source.in_order and not sorted_still
    write_description(job.data, settings.name, shards, index, identities, fingerprint, names_N2, shuffled=shuffled)


def _read_gone(source: Source, job: PackJob) -> list[tuple[str, str, str, int]]:
    """What was left out of identities that are gone altogether: only earlier passes met it."""
    left = np.flatnonzero(job.plan.label_C < 0)
    if not left.size:
        return []
    first_pass = PackJob(source, job.settings, job.plan, job.data, job.records.with_name("records-0"))
    gone = {source.identities[int(label)] for label in left}
    num_shards = len(list(first_pass.records.glob("*.npz")))
    found = [one for shard in range(num_shards) for one in first_pass.load_record(shard).skipped]
    return [one for one in found if one[1] in gone]


@contextlib.contextmanager
def writing(work: Path, out: Path, fingerprint: str) -> Iterator[bool]:
    """The work folder of this import and of no other, for one process at a time. False: another process had it, and finished."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / "lock", f"{work}") as is_there:
            if not is_there:
                yield False
                return
            settings = work / "settings"
            if not settings.exists() or not any(work.glob("records-*/*.npz")):  # nothing is lost
                for folder in filter(Path.is_dir, work.iterdir()):
                    shutil.rmtree(folder)
                write_atomically(settings, fingerprint.encode())
            elif settings.read_text() != fingerprint:
                raise DataError(
                    f"{work} holds an unfinished import of another source, of this one before it changed, or with other "
                    "arguments; repeat that one, or remove the folder"
                )
            yield True
    except OSError as error:
        raise SetupError(
            f"importing into {out} failed ({error}); mend that and run again: finished shards are kept"
        ) from error


def write_skipped(directory: Path, skipped: Sequence[tuple[str, str, str]]) -> None:
    """List (name, identity, reason) of what was left out."""
    with (directory / SKIPPED_FILE).open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows([("name", "identity", "reason"), *sorted(set(skipped))])


def publish(work: Path, out: Path) -> None:
    """Let the finished data set take its place; what the work needed goes."""
    if out.exists():
        out.rmdir()  # empty, or it would have been refused
    (work / "data").replace(out)
    shutil.rmtree(work, ignore_errors=True)


def _read_dropped(work: Path) -> tuple[int, ...]:
    path = work / "dropped.json"
    return tuple(json.loads(path.read_text())) if path.exists() else ()


def count_skipped(out: Path) -> int:
    """How many images the list in a packed data set names."""
    path = out / SKIPPED_FILE
    if not path.exists():
        return 0
    with path.open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.reader(file)) - 1


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, and stays after a loss of power."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
