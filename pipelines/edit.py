"""People or images leave a packed data set for good; the bytes of the others stay as they are."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError, RunError
from lce_dist.keys import hash_keys
from pipelines import manifest as packed
from pipelines.importing import SKIPPED_FILE
from pipelines.manifest import (
    PackedDataset,
    Quarantined,
    ShardRecord,
    read_quarantine,
    write_description,
    write_quarantine,
)
from pipelines.members import END_OF_TAR, BrokenTarError, Member, in_samples, read_members
from pipelines.order import Int64Array
from pipelines.pairs import PAIRS_FILE
from pipelines.sidecars import DESCRIPTOR_FILE
from pipelines.verify import samples_by_shard

Progress = Callable[[str, int, int], None]

_QUOTED_LETTERS = 40  # of a text that a finding quotes


class _NewShard:
    """A tar that is being written, and its hash."""

    def __init__(self, path: Path) -> None:
        self.path, self.size_bytes, self.num_samples = path, 0, 0
        self._file = open(path, "wb")  # noqa: SIM115 (closed by finish)
        self._hash = hashlib.sha256()

    def append(self, blocks: bytes) -> None:
        self._file.write(blocks)
        self._hash.update(blocks)
        self.size_bytes += len(blocks)

    def finish(self) -> ShardRecord:
        self.append(END_OF_TAR)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardRecord(
            file=self.path.name,
            size_bytes=self.size_bytes,
            num_samples=self.num_samples,
            sha256=self._hash.hexdigest(),
        )


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            yield tar
    except (OSError, ValueError) as error:
        raise DataError(f"shard {path} cannot be read ({error}); restore it or pack again") from None


@dataclass(frozen=True, eq=False)
class Removed:
    """What went: images, identities, shards written anew; ``others`` are files beside the data set that nobody looked into.

    finished: what an earlier, killed removal had left was cleared away. unknown: asked for, and not there any more.
    """

    num_samples: int
    identities: tuple[str, ...]
    num_rewritten: int
    others: tuple[str, ...]
    finished: bool
    unknown: tuple[str, ...]


def remove(
    directory: Path, identities: Sequence[str], images: Sequence[str], progress: Progress | None = None
) -> Removed:
    """Take identities, and images by name (as packed, IDENTITY/FILE, or as tar member), out of a data set, for good.

    With an identity go the images whose .id names it, whoever has them by the index.

    Shards that hold none of them are kept as they are. A new data set is built beside ``directory`` and takes its place
    in one step of the file system; killed before, nothing has happened; killed after, only the old files are still to be
    deleted, which the same command does. Sample numbers change; class numbers in .cls members do not.
    Errors: DataError for what the data set does not have, and shards elsewhere; RunError when the file system refuses.
    """
    directory = directory.resolve()
    count = progress or (lambda what, done, total: None)
    new, old = _places_of(directory)
    with _alone(directory):
        finished = _recover(directory)
        dataset = PackedDataset.open(directory)
        if dataset.manifest.root is not None:
            raise DataError(
                f"{directory} has its shards at {dataset.manifest.root}, where other data sets may use them. Merge it into "
                "one of its own (lce data merge), remove there, and remove the originals by hand"
            )
        is_gone, named, unknown = _asked(dataset, identities, images, count)
        if unknown and not finished:
            raise DataError(
                f"{directory} has no {unknown[0]!r} ({len(unknown)} of {len(identities) + len(images)} are unknown); must be "
                f"one of its {len(dataset.identities)} identity keys, or an image's name as packed or tar member. Nothing was "
                "removed"
            )
        if not is_gone.any() and not named:
            return Removed(0, (), 0, (), finished, unknown)
        try:
            removed = _build(dataset, is_gone, named, frozenset(identities), frozenset(images), new, count)
            PackedDataset.open(new)
            _sync((*(place for place in new.iterdir() if place.is_file()), new))
            _take_place(new, directory, old)
            _sync((directory.parent,))
            for place in (new, old):
                if place.exists():
                    shutil.rmtree(place)
        except OSError as error:
            raise RunError(
                f"{directory} cannot be rewritten: {error}. Mend that and give the same command again; the data set is "
                "whole, but until the command ends without an error what was to go may still be on the disk"
            ) from None
    return Removed(int(is_gone.sum()), *removed, finished, unknown)


def _places_of(directory: Path) -> tuple[Path, Path]:
    return directory.with_name(f".{directory.name}.removal"), directory.with_name(f".{directory.name}.removed")


def _recover(directory: Path) -> bool:
    """After a kill: either the new data set never took its place and goes, or it did and the old one goes."""
    new, old = _places_of(directory)
    if not directory.exists() and old.exists() and new.exists():
        new.rename(directory)  # a file system that cannot exchange: the second of two renamings
    found = [place for place in (new, old) if place.exists()]
    for place in found:
        shutil.rmtree(place)
    return bool(found)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    try:
        descriptor = os.open(directory.parent, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{directory.parent} cannot be read ({error.strerror}); name a packed data set") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another removal is at work in {directory.parent}; wait for it to end") from None
        yield
    finally:
        os.close(descriptor)


def _asked(
    dataset: PackedDataset, identities: Sequence[str], images: Sequence[str], count: Progress
) -> tuple[npt.NDArray[np.bool_], frozenset[int], tuple[str, ...]]:
    """(N,) which samples are to go, the shards that name an identity to go, and what was asked for and is not there."""
    label_of = {key: label for label, key in enumerate(dataset.identities)}
    goes_C = np.zeros(len(label_of), dtype=bool)
    for key in identities:
        if key in label_of:
            goes_C[label_of[key]] = True
    is_gone: npt.NDArray[np.bool_] = goes_C[dataset.index["label"]]
    missing = list(images)
    if images and dataset.name_hash_N2 is not None:
        missing = []
        names = np.ascontiguousarray(dataset.name_hash_N2).view([("a", "<u8"), ("b", "<u8")]).ravel()
        for image, row in zip(images, hash_keys(images), strict=True):
            samples = np.flatnonzero((names["a"] == row[0]) & (names["b"] == row[1]))
            if len(np.unique(dataset.index["label"][samples])) > 1:
                raise DataError(
                    f"{dataset.directory} has {len(samples)} images of several identities by the name {image!r}; name the tar "
                    "members (000000123.jpg) instead. Nothing was removed"
                )
            is_gone[samples] = True
            if not samples.size:
                missing.append(image)
    if missing:
        missing = _by_member(dataset, missing, is_gone, count)
    named, found = _by_id(dataset, frozenset(identities), is_gone, count) if identities else (frozenset(), set())
    if is_gone.all():
        raise DataError(f"nothing of {dataset.directory} would be left; delete the folder instead")
    return is_gone, named, (*(key for key in identities if key not in label_of and key not in found), *missing)


def _by_id(
    dataset: PackedDataset, identities: frozenset[str], is_gone: npt.NDArray[np.bool_], count: Progress
) -> tuple[frozenset[int], set[str]]:
    """Mark the samples whose .id names one of these, whoever has them by the index; the shards and the identities named."""
    owners = {key.encode(): key for key in identities}
    named, found = set(), set()
    num_shards = len(dataset.manifest.shards)
    for shard, samples in enumerate(samples_by_shard(dataset.index, num_shards)):
        sample_at = dict(zip(dataset.index["offset"][samples].tolist(), samples.tolist(), strict=True))
        with _mapped(dataset.shard_path(shard)) as tar:
            for members in in_samples(_members(dataset, shard)):
                said = {key for one in members if (key := _said(tar, one, owners)) is not None}
                if said:
                    named.add(shard)
                    found |= said
                    is_gone[[sample_at[one.offset] for one in members if one.offset in sample_at]] = True
        count("looking for names", shard + 1, num_shards)
    return frozenset(named), found


def _said(tar: mmap.mmap, member: Member, owners: Mapping[bytes, str]) -> str | None:
    return owners.get(tar[member.offset : member.offset + member.size]) if member.ending == "id" else None


def _by_member(
    dataset: PackedDataset, names: Sequence[str], is_gone: npt.NDArray[np.bool_], count: Progress
) -> list[str]:
    """Mark the samples whose tar members are named, with or without ending; returns the names not found."""
    left = set(names)
    num_shards = len(dataset.manifest.shards)
    for shard, samples in enumerate(samples_by_shard(dataset.index, num_shards)):
        sample_at = dict(zip(dataset.index["offset"][samples].tolist(), samples.tolist(), strict=True))
        for member in _members(dataset, shard):
            hit = {member.name, member.sample} & set(names) if member.offset in sample_at else set()
            if hit:
                is_gone[sample_at[member.offset]] = True
                left -= hit
        count("looking for members", shard + 1, num_shards)
    return sorted(left)


def _members(dataset: PackedDataset, shard: int) -> Iterator[Member]:
    path = dataset.shard_path(shard)
    with _mapped(path) as tar:
        try:
            yield from read_members(tar)
        except BrokenTarError as error:
            raise DataError(f"shard {path} is no whole tar ({error}); restore it, or see lce data verify") from None


def _build(
    dataset: PackedDataset,
    is_gone: npt.NDArray[np.bool_],
    named: frozenset[int],
    identities: frozenset[str],
    images: frozenset[str],
    new: Path,
    count: Progress,
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """Write the data set without some samples into ``new``; what does not change is linked."""
    new.mkdir()
    labels = np.asarray(dataset.index["label"])
    stays_C = np.bincount(labels[~is_gone], minlength=len(dataset.identities)) > 0
    left = tuple(key for key, stays in zip(dataset.identities, stays_C, strict=True) if not stays)
    new_label_C = np.cumsum(stays_C) - 1
    index = np.array(dataset.index)
    records: list[ShardRecord] = []
    num_rewritten = 0
    stale: set[str] = set()
    num_shards = len(dataset.manifest.shards)
    for shard, samples in enumerate(samples_by_shard(dataset.index, num_shards)):
        record = dataset.manifest.shards[shard]
        gone = is_gone[samples]
        if not gone.any() and shard not in named:
            _link(dataset.shard_path(shard), new / record.file)
            index["shard"][samples] = len(records)
            records.append(record)
        else:
            stale.update((record.file, record.file.removesuffix(".tar") + ".idx"))
            num_rewritten += 1
            if not gone.all():
                index["shard"][samples] = len(records)
                records.append(_rewritten(dataset, shard, samples, gone, identities, new, index))
        count("rewriting shards", shard + 1, num_shards)
    stale.add(DESCRIPTOR_FILE)  # names the shards that were there
    index = index[~is_gone]
    index["label"] = new_label_C[index["label"]]
    names = dataset.name_hash_N2
    kept = [key for key, stays in zip(dataset.identities, stays_C, strict=True) if stays]
    if names is None:
        names_N2 = hash_keys([f"{dataset.fingerprint}:{sample}" for sample in np.flatnonzero(~is_gone).tolist()])
    else:
        names_N2 = np.asarray(names[~is_gone])
    new_sample = np.cumsum(~is_gone) - 1
    listed = [one for one in read_quarantine(dataset.directory, dataset.num_samples) if not is_gone[one.sample]]
    without = _redactor((*left, *identities, *images))
    write_quarantine(new, [Quarantined(int(new_sample[one.sample]), one.key, without(one.reason)) for one in listed])
    write_description(
        new,
        dataset.manifest.name,
        records,
        index,
        kept,
        dataset.manifest.source,
        names_N2,
        shuffled=dataset.manifest.shuffled,
    )
    gone_names = set() if names is None else {row.tobytes() for row in np.asarray(names[is_gone])}
    others = _carry(dataset, new, stale, _Gone(frozenset((*left, *identities)) | images, gone_names))
    return left, num_rewritten, others


def _rewritten(
    dataset: PackedDataset,
    shard: int,
    samples: Int64Array,
    gone: npt.NDArray[np.bool_],
    identities: frozenset[str],
    new: Path,
    index: npt.NDArray[np.void],
) -> ShardRecord:
    """Copy the members of those who stay, byte for byte, into a shard of another name; ``index`` gets their new places.

    Another name, so that a run that has the old index open stops instead of reading other people's bytes.
    """
    offsets = dataset.index["offset"][samples].tolist()
    gone_at = {offset for offset, goes in zip(offsets, gone.tolist(), strict=True) if goes}
    owners = {key.encode(): key for key in identities}
    path = dataset.shard_path(shard)
    with _mapped(path) as tar:
        written = _NewShard(new / _next_name(dataset.manifest.shards[shard].file))
        moved: dict[int, int] = {}
        for members in in_samples(_members(dataset, shard)):
            theirs = any(_said(tar, one, owners) is not None for one in members)
            if theirs or any(one.offset in gone_at for one in members):
                continue
            for one in members:
                moved[one.offset] = written.size_bytes + one.offset - one.first_byte
                written.append(tar[one.first_byte : one.end])
    for sample, offset, goes in zip(samples.tolist(), offsets, gone.tolist(), strict=True):
        if not goes:
            if offset not in moved:
                raise DataError(
                    f"shard {path} has no member at byte {offset}, where sample {sample} should be; verify it"
                )
            index[sample]["offset"] = moved[offset]
            written.num_samples += 1
    return written.finish()


def _redactor(names: Iterable[str]) -> Callable[[str], str]:
    """Takes names out of a text, also as Python or verify's 40 letters write them."""
    forms = {form for name in names if name for form in (name, name[:_QUOTED_LETTERS], repr(name)[1:-1])}
    if not forms:
        return lambda text: text
    longest_first = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")
    return lambda text: pattern.sub("(removed)", text)


def _next_name(file: str) -> str:
    stem = file.removesuffix(".tar")
    earlier = re.fullmatch(r"(.*)-r(\d+)", stem)
    return f"{earlier[1]}-r{int(earlier[2]) + 1}.tar" if earlier else f"{stem}-r1.tar"


@dataclass(frozen=True)
class _Gone:
    """What lists beside the data set must not name any more: identity keys and image names, and hashes of such names."""

    texts: frozenset[str]
    name_hashes: set[bytes]

    def is_named(self, cells: Sequence[str]) -> bool:
        return any(cell in self.texts for cell in cells) or any(
            row.tobytes() in self.name_hashes for row in hash_keys(cells)
        )


def _carry(dataset: PackedDataset, new: Path, stale: set[str], gone: _Gone) -> tuple[str, ...]:
    """Files beside the data set come along: lists that importing left without who is gone, others, whose names are returned,
    as they are.
    """
    own = {
        packed.MANIFEST_FILE,
        packed.INDEX_FILE,
        packed.IDENTITIES_FILE,
        packed.NAMES_FILE,
        packed.QUARANTINE_FILE,
    }
    own |= {record.file for record in dataset.manifest.shards} | stale
    others = []
    for place in sorted(dataset.directory.iterdir()):
        if place.name in own or place.name.endswith(".partial") or (new / place.name).exists():
            continue
        if place.name in (SKIPPED_FILE, PAIRS_FILE):
            with open(place, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if not gone.is_named(row)]
            with open(new / place.name, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            continue
        if place.is_dir():
            shutil.copytree(place, new / place.name, symlinks=True, copy_function=_link)
        else:
            _link(place, new / place.name)
        others.append(place.name)
    return tuple(others)


def _link(source: Path | str, target: Path | str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK):
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # a file system without links


def _take_place(new: Path, directory: Path, old: Path) -> None:
    """Put ``new`` where ``directory`` is, and that at ``old``; where folders cannot be exchanged it is missing for a moment."""
    if _exchange(new, directory):
        new.rename(old)
    else:
        directory.rename(old)
        new.rename(directory)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change names in one step; False where system or file system cannot. **Source**: renameat2(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), str(other))
    return False


def _sync(places: Iterable[Path]) -> None:
    """These files and folders are on the disk."""
    for place in places:
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
