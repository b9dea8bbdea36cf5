"""Existing WebDataset tars, indexed where they lie: nothing is copied, and nothing is written beside them.

A sample is a run of members with the same path up to the first dot of the last part; what follows the dot is the kind. Tars may be
of any dialect that tar, Python and webdataset write (pipelines/members.py).
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lce_dist.errors import ConfigError, DataError
from lce_dist.keys import hash_keys
from pipelines.images import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, NOT_IN_TRAINING
from pipelines.importable import Texts, digest, file_stamp, is_identity, label_coded, look_sorted, number_key
from pipelines.importing import (
    Imported,
    ImportSettings,
    Progress,
    count_skipped,
    find_packed,
    publish,
    write_atomically,
    write_skipped,
    writing,
)
from pipelines.jpeg import MAX_IMAGE_BYTES
from pipelines.manifest import INDEX_DTYPE, PackedDataset, ShardRecord, write_description
from pipelines.members import BrokenTarError, Member, read_members
from pipelines.units import Told, run_units

_ALL_KINDS = tuple(ending[1:] for ending in (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES))
IMAGE_KINDS = tuple(ending[1:] for ending in IMAGE_SUFFIXES if ending[1:].upper() not in NOT_IN_TRAINING)
DEFAULT_LABEL_KEY = "label"

_RULES = 2
_HASHED_AT_ONCE = 8 << 20
_TELL_EVERY = 256
_OTHER_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_LONGEST_TEXT = 1 << 20  # of a label or a .json


@dataclass(frozen=True)
class LabelRule:
    """Where a sample's identity is found: in a member of ``kind`` (id, cls or json), or, with None, in the folder of its key."""

    kind: str | None
    key: str = DEFAULT_LABEL_KEY
    why: str = "the first one does, and it names the identity"


def index_tars(
    tars: Sequence[Path],
    root: Path,
    out: Path,
    settings: ImportSettings,
    num_workers: int,
    label_key: str | None = None,
    progress: Progress | None = None,
) -> Imported:
    """Describe tars below ``root`` in a new folder ``out``; an interrupted run goes on, a finished one is opened.

    Identities are the text of ``.id``, the text or number of ``.cls``, ``label_key`` of ``.json``, or the folder of the key:
    the first of these that the first sample has, and then every one must. ``progress`` gets (bytes done, bytes, bytes done in this run).
    Samples without one image that can be decoded and one identity stop it or, with ``skip_bad``, are left out and listed.
    Errors: DataError for those, and for a tar that is cut off or damaged, naming the byte. **Memory**: 100 bytes an image.
    """
    assert settings.images is not None, "images are looked at"
    if settings.images.size is not None or settings.images.quality is not None:
        raise ConfigError("--size and --quality change images; tars are only indexed. Leave them out")
    files = [path.relative_to(root).as_posix() for path in tars]
    stamps = [part for path, file in zip(tars, files, strict=True) for part in (file, file_stamp(path))]
    facts = [_RULES, "webdataset", settings.name, settings.images.check, label_key]
    fingerprint = digest(json.dumps(facts), *stamps)
    packed = find_packed(out, fingerprint)
    if packed is not None:
        return packed
    rule = find_label_rule(tars, label_key)
    work = out.with_name(out.name + ".importing")
    with writing(work, out, fingerprint) as is_ours:
        if not is_ours:
            return index_tars(tars, root, out, settings, num_workers, label_key, progress)
        records = work / "records-0"
        records.mkdir(exist_ok=True)
        (work / "data").mkdir(exist_ok=True)
        job = IndexJob(tuple(str(path) for path in tars), tuple(files), records, rule, settings)
        sizes = [path.stat().st_size for path in tars]
        units = [number for number in range(len(tars)) if not job.record_path(number).exists()]
        already = sum(sizes) - sum(sizes[number] for number in units)

        def watched(images: int, size: int) -> None:
            if progress is not None:
                progress(already + size, sum(sizes), size)

        run_units(job, units, num_workers, watched)
        _finish(job, out, root, fingerprint, settings, len(tars))
        publish(work, out)
    return Imported(PackedDataset.open(out), count_skipped(out), (), len(tars) - len(units))


def _finish(job: IndexJob, out: Path, root: Path, fingerprint: str, settings: ImportSettings, num_tars: int) -> None:
    rows, names, codes = [], [], []
    code_of: dict[str, int] = {}
    shards: list[ShardRecord] = []
    skipped: list[tuple[str, str, str]] = []
    for number in range(num_tars):
        with np.load(job.record_path(number), allow_pickle=False) as stored:
            facts = json.loads(stored["facts"].tobytes())
            skipped += [tuple(one) for one in facts["skipped"]]
            if not facts["shard"]["num_samples"]:
                continue
            part = stored["rows"]
            part["shard"] = len(shards)
            rows.append(part)
            names.append(stored["names"])
            texts = Texts(stored["key_blob"], stored["key_ends"])
            of_all = np.array([code_of.setdefault(texts[code], len(code_of)) for code in range(len(texts))])
            codes.append(of_all[stored["codes"]])
            shards.append(ShardRecord.model_validate(facts["shard"]))
    if not rows:
        raise DataError(
            f"the {num_tars} tars in {root} hold no image that can be used ({', '.join(IMAGE_KINDS)}); "
            + (f"{len(skipped)} samples are bad, the first: {skipped[0][2]}" if skipped else "name others")
        )
    identities, label_N = label_coded(list(code_of), np.concatenate(codes))
    index = np.concatenate(rows)
    index["label"] = label_N
    data = job.records.parent / "data"
    if skipped:
        write_skipped(data, skipped)
    place, folder = root.absolute(), out.absolute().parent
    near = place.is_relative_to(folder) or folder.is_relative_to(place)
    write_description(
        data,
        settings.name,
        shards,
        index,
        [identities[label] for label in range(len(identities))],
        fingerprint,
        np.concatenate(names),
        root=Path(os.path.relpath(place, out.absolute())).as_posix() if near else str(place),
        shuffled=False if look_sorted(label_N, len(identities)) else None,
    )


@dataclass(frozen=True, eq=False)
class IndexJob:
    """Tars as units of work: each is read once, for its hash, its members and its images."""

    tars: tuple[str, ...]
    files: tuple[str, ...]
    records: Path
    rule: LabelRule
    settings: ImportSettings

    def record_path(self, number: int) -> Path:
        return self.records / f"{number:06d}.npz"

    def run(self, unit: int, told: Told) -> None:
        path = self.tars[unit]
        rows: list[tuple[int, int, int, int]] = []
        names: list[str] = []
        code_of: dict[str, int] = {}
        codes: list[int] = []
        skipped: list[tuple[str, str, str]] = []
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if not size_bytes:
                raise DataError(f"tar {path} became empty; restore it")
            # no "with": an error's traceback would still hold slices when it closes
            contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                contents.madvise(mmap.MADV_SEQUENTIAL)
            hashed = hashlib.sha256()
            end, read, images = 0, 0, 0
            for sample in samples_of(path, contents):
                key = _key(sample[0])
                name, identity = f"{self.files[unit]}:{key}", ""
                try:
                    image = _image(f"{path}:{key}", sample)
                    name = f"{self.files[unit]}/{image.name}"
                    identity = _identity(f"{path}:{key}", contents, sample, self.rule)
                    self._inspect(contents, image, name)
                except DataError as error:
                    if not self.settings.skip_bad:
                        raise DataError(f"{error}. With --bad skip such images are left out and listed") from None
                    skipped.append((name, identity, str(error)))
                else:
                    rows.append((0, image.offset, image.size, 0))
                    names.append(name)
                    codes.append(code_of.setdefault(identity, len(code_of)))
                images += 1
                end = sample[-1].offset + sample[-1].size
                if end - read >= _HASHED_AT_ONCE or images == _TELL_EVERY:
                    _hash(hashed, contents, read, end)
                    told(images, end - read)
                    read, images = end, 0
            _hash(hashed, contents, read, size_bytes)
            told(images, size_bytes - read)
        keys = Texts.of(code_of)
        record = {"file": self.files[unit], "size_bytes": size_bytes, "num_samples": len(rows)}
        facts = json.dumps({"shard": {**record, "sha256": hashed.hexdigest()}, "skipped": skipped}).encode()
        stored = io.BytesIO()
        np.savez(
            stored,
            facts=np.frombuffer(facts, dtype=np.uint8),
            rows=np.array(rows, dtype=INDEX_DTYPE),
            names=hash_keys(names),
            codes=np.array(codes, dtype=np.int64),
            key_blob=keys.blob_B,
            key_ends=keys.end_N,
        )
        write_atomically(self.record_path(unit), stored.getvalue())

    def _inspect(self, contents: mmap.mmap, image: Member, name: str) -> None:
        if not 0 < image.size <= MAX_IMAGE_BYTES:
            raise DataError(f"image {name} is {image.size} bytes; must be 1 to {MAX_IMAGE_BYTES}")
        if self.settings.images is not None:
            self.settings.images.inspect(contents[image.offset : image.offset + image.size], name)


def find_label_rule(tars: Sequence[Path], label_key: str | None) -> LabelRule:
    """Where identities are found, told from the first sample. Errors: DataError when there is none in it."""
    for path in tars:
        if not path.stat().st_size:
            raise DataError(f"tar {path} is empty, not even ended; restore it or leave it out")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            sample = next(samples_of(str(path), contents), None)
        if sample is None:
            continue
        kinds = [member.ending for member in sample]
        if label_key is not None:
            return LabelRule("json", label_key, f"--label-key {label_key} asks for one")
        for kind in ("id", "cls", "json"):
            if kind in kinds:
                return LabelRule(kind)
        if "/" in _key(sample[0]):
            return LabelRule(None)
        raise DataError(
            f"tar {path}: the sample {_key(sample[0])!r} has {', '.join(kinds)}; must have .id, .cls or .json, or lie in a "
            "folder that names its identity"
        )
    raise DataError(f"the {len(tars)} tars hold no sample; name others")


def samples_of(path: str, contents: mmap.mmap) -> Iterator[list[Member]]:
    """Runs of members of one key, with at least an image or a label among them; hidden files are passed over."""
    sample: list[Member] = []
    for member in members_of(path, contents):
        if _base(member.name).startswith(".") or "." not in _base(member.name):
            continue
        if sample and _key(member) != _key(sample[0]):
            yield sample
            sample = []
        sample.append(member)
    if sample:
        yield sample


def members_of(path: str, contents: mmap.mmap) -> Iterator[Member]:
    """The files of a tar, in their order. Errors: DataError naming the byte where the tar is cut off, damaged or two in one."""
    try:
        yield from read_members(contents)
    except BrokenTarError as error:
        raise DataError(f"tar {path} is no whole tar: {error}. Restore it, or pack it again") from None


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _key(member: Member) -> str:
    return member.sample.removeprefix("./")


def _image(place: str, sample: Sequence[Member]) -> Member:
    # 1.jpg beside 1.mask.png is the image; 1.face.jpg alone is, too
    images = [member for member in sample if member.ending in _ALL_KINDS]
    images = images or [member for member in sample if _image_kind(member) in _ALL_KINDS]
    where = f"tar {place} at byte {sample[0].offset}"
    if len(images) != 1:
        raise DataError(f"{where} has {len(images)} images ({', '.join(IMAGE_KINDS)}); must have one")
    if _image_kind(images[0]) not in IMAGE_KINDS:
        raise DataError(
            f"{where} has a .{images[0].ending}, which training cannot read where it lies; must be {', '.join(IMAGE_KINDS)}"
        )
    return images[0]


def _image_kind(member: Member) -> str:
    return member.ending.rpartition(".")[2]


def _identity(place: str, contents: mmap.mmap, sample: Sequence[Member], rule: LabelRule) -> str:
    where = f"tar {place} at byte {sample[0].offset}"
    if rule.kind is None:
        folder = _key(sample[0]).rpartition("/")[0]
        if not folder:
            raise DataError(f"{where} lies in no folder; the first one does, and its folder names the identity")
        return _as_identity(where, folder)
    member = next((one for one in sample if one.ending == rule.kind), None)
    if member is None:
        raise DataError(f"{where} has no .{rule.kind}; {rule.why}")
    if member.size > _LONGEST_TEXT:
        raise DataError(f"{where} has a .{rule.kind} of {member.size} bytes; must be at most {_LONGEST_TEXT}")
    raw = contents[member.offset : member.offset + member.size]
    try:
        text = raw.decode("utf-8")
        value = json.loads(text) if rule.kind == "json" else text.strip()
    except ValueError as error:
        raise DataError(f"{where} has a .{rule.kind} that cannot be read ({error})") from None
    if rule.kind == "json":
        if not isinstance(value, dict) or rule.key not in value:
            raise DataError(
                f"{where} has no {rule.key!r} in its .json; name the one that says the identity with --label-key"
            )
        value = value[rule.key]
    if rule.kind != "id" and type(value) is int and value >= 0:
        return number_key(value)
    if rule.kind == "cls" and isinstance(value, str) and value.isascii() and value.isdigit():
        return number_key(int(value))
    if rule.kind == "cls" and isinstance(value, str) and _OTHER_NUMBER.fullmatch(value):
        raise DataError(
            f"{where} has the class {value}; must be a whole number from 0, or text. Samples without an identity cannot be used"
        )
    if not isinstance(value, str) or not value:
        raise DataError(f"{where} has the identity {value!r}; must be text or a whole number from 0")
    return _as_identity(where, value)


def _as_identity(where: str, key: str) -> str:
    if not is_identity(key):
        raise DataError(f"{where} has the identity {key!r}; must be UTF-8 text without control characters")
    return key


def _hash(hashed: hashlib._Hash, contents: mmap.mmap, first: int, end: int) -> None:
    for at in range(first, end, _HASHED_AT_ONCE):
        hashed.update(contents[at : min(at + _HASHED_AT_ONCE, end)])
