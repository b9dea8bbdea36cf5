"""Everything that can be wrong with a packed data set, found shard by shard and listed with shard and key.

    data-set     it does not open: a missing, damaged or foreign manifest, index, list of identities or names
    shard        a tar is missing, has another size, another checksum or another number of samples, or is not in the manifest
    tar          its structure breaks, at a byte that is named
    key          a key occurs twice in a tar: readers that go by keys mix two samples up, or lose one
    index        a row points at no image, or one of another size
    unindexed    an image of a tar that no row points at
    label        a row's label is out of range, or .cls or .id beside the image say another
    undecodable  an image that cannot be decoded
    duplicate    the same bytes as an earlier image of one identity, or as one of another identity
    look-alike   nearly the same picture as an earlier one

What concerns one sample, but for look-alikes, can be put into the quarantine, which training honours.
"""

from __future__ import annotations

import io
import json
import mmap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lce_dist.errors import DataError
from pipelines import manifest as packed
from pipelines.duplicates import Hashes, alike_pairs, confirmed, exact_hash, looks_hash, same_groups
from pipelines.identities import Chosen
from pipelines.images import check_decodes
from pipelines.importable import Texts, number_key
from pipelines.manifest import Manifest, PackedDataset, Quarantined, ShardRecord, file_sha256, is_url, read_quarantine
from pipelines.members import BrokenTarError, Member, in_samples, read_members
from pipelines.order import Int64Array
from pipelines.parallel import over_parts

Progress = Callable[[str, int, int], None]

KINDS = ("data-set", "shard", "tar", "key", "index", "unindexed", "label", "undecodable", "duplicate", "look-alike")
NOT_QUARANTINED = frozenset(("key", "look-alike"))
_PIECE_ROWS = 1 << 20
MOST_LISTED = 10_000  # of a kind in a shard; more means that the shard or the index is another one


@dataclass(frozen=True)
class Finding:
    """What is wrong, where: ``shard`` is a file, ``key`` a tar member, ``sample`` a row of the index."""

    kind: str
    detail: str
    shard: str | None = None
    key: str | None = None
    sample: int | None = None
    quarantined: bool = False

    def __str__(self) -> str:
        place = ":".join(part for part in (self.shard, self.key) if part is not None)
        return f"{self.kind}: {place + ': ' if place else ''}{self.detail}"


@dataclass(frozen=True)
class Report:
    """All findings of one pass, and what was looked at. ``unlisted`` counts those of each kind beyond MOST_LISTED a shard."""

    findings: tuple[Finding, ...]
    num_samples: int
    num_shards: int
    decoded: bool
    compared: bool
    unlisted: dict[str, int]

    @property
    def open_findings(self) -> tuple[Finding, ...]:
        """Those that the quarantine does not already answer."""
        return tuple(one for one in self.findings if not one.quarantined)

    @property
    def counts(self) -> dict[str, int]:
        listed = Counter(one.kind for one in self.findings)
        return {
            kind: listed[kind] + self.unlisted.get(kind, 0) for kind in KINDS if listed[kind] or kind in self.unlisted
        }


def verify(
    directory: Path,
    decode: bool = False,
    duplicates: bool = False,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a packed data set whose shards are on a disk; a damaged one gives findings, not errors.

    Errors: DataError where there is no data set at all, or its shards are at a URL.
    **Memory**: 8 bytes a sample, with ``duplicates`` 200 more.
    """
    count = progress or (lambda what, done, total: None)
    parts = _opened(directory, count)
    findings, manifest = list(parts.findings), parts.manifest
    if manifest is None:
        return Report(tuple(findings), 0, 0, decode, duplicates, {})
    if manifest.root is None:  # in a folder of somebody else there may be other tars
        findings += _extra_shards(directory, manifest)
    hashes = Hashes.empty(len(parts.index)) if duplicates else None
    unlisted: Counter[str] = Counter()
    numbering: list[npt.NDArray[np.int64]] = []
    works = _works(directory, parts, manifest, decode, duplicates)
    for done, found in enumerate(over_parts(check_shard, works, len(manifest.shards), num_workers)):
        findings += found.findings
        unlisted += found.unlisted
        numbering.append(found.class_of_label)
        if hashes is not None:
            hashes.put(found.samples, found.exact_n2, found.looks_n, found.state_n >= _DECODED)
        count("verifying shards", done + 1, len(manifest.shards))
    findings += _two_numbers(numbering)
    findings += _out_of_range(parts, manifest, unlisted)
    if hashes is not None and parts.dataset is not None:
        findings += duplicate_findings(parts.dataset, hashes, count)
    known = frozenset(one.sample for one in parts.quarantined)
    marked = tuple(replace(one, quarantined=one.sample in known) if one.sample is not None else one for one in findings)
    order = {kind: place for place, kind in enumerate(KINDS)}
    marked = tuple(sorted(marked, key=lambda one: (order[one.kind], one.shard or "", one.sample or 0)))
    return Report(marked, len(parts.index), len(manifest.shards), decode, duplicates, dict(unlisted))


def to_quarantine(report: Report, directory: Path) -> list[Quarantined]:
    """What quarantine.json should list: what it lists already, and every sample that has a finding of its own.

    Errors: DataError when so many samples of a shard are wrong that not all are listed: then it is not the samples.
    """
    beyond = {kind: number for kind, number in report.unlisted.items() if kind not in (*NOT_QUARANTINED, "unindexed")}
    if beyond:
        kind, number = next(iter(beyond.items()))
        raise DataError(
            f"{directory} has more than {MOST_LISTED} findings {kind!r} in one shard ({number} are not listed); that is no "
            "matter of single samples, so nothing was put into the quarantine. Restore the shard or the index"
        )
    listed = {one.sample: one for one in read_quarantine(directory, report.num_samples)}
    for one in report.findings:
        if one.sample is not None and one.kind not in NOT_QUARANTINED and one.sample not in listed:
            listed[one.sample] = Quarantined(one.sample, one.key or "", f"{one.kind}: {one.detail}")
    return list(listed.values())


def hash_images(dataset: PackedDataset, num_workers: int | None = None, progress: Progress | None = None) -> Hashes:
    """Hashes of every image that is where the index says. **Memory**: 25 bytes a sample."""
    hashes = Hashes.empty(dataset.num_samples)
    num_shards = len(dataset.manifest.shards)
    parts = _Parts((), dataset.manifest, dataset.index, dataset.identities, dataset, ())
    works = _works(dataset.directory, parts, dataset.manifest, decode=False, duplicates=True)
    for done, found in enumerate(over_parts(check_shard, works, num_shards, num_workers)):
        hashes.put(found.samples, found.exact_n2, found.looks_n, found.state_n >= _DECODED)
        if progress is not None:
            progress(f"hashing {dataset.directory.name}", done + 1, num_shards)
    return hashes


# The data set as far as it can be read


@dataclass(frozen=True, eq=False)
class _Parts:
    findings: tuple[Finding, ...]
    manifest: Manifest | None
    index: npt.NDArray[np.void]
    identities: Sequence[str]
    dataset: PackedDataset | None
    quarantined: Sequence[Quarantined]


def _opened(directory: Path, count: Progress) -> _Parts:
    findings: list[Finding] = []
    no_rows = np.zeros(0, dtype=packed.INDEX_DTYPE)
    path = directory / packed.MANIFEST_FILE
    if not path.is_file():
        PackedDataset.open(directory)  # says what is missing
    dataset = None
    try:
        dataset = PackedDataset.open(directory)
        manifest = dataset.manifest
    except DataError as error:
        findings.append(Finding("data-set", str(error)))
        try:
            manifest = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            return _Parts(tuple(findings), None, no_rows, (), None, ())
    if is_url(manifest.root):
        raise DataError(f"{directory} has its shards at {manifest.root}; verify needs them on a disk")
    sealed = {
        packed.INDEX_FILE: manifest.index_sha256,
        packed.IDENTITIES_FILE: manifest.identities_sha256,
        packed.NAMES_FILE: manifest.names_sha256,
    }
    for done, (file, expected) in enumerate(sealed.items()):
        count("verifying lists", done, len(sealed))
        if expected is not None and dataset is not None and file_sha256(directory / file) != expected:
            findings.append(Finding("data-set", f"{file} does not have the checksum of the manifest; restore it"))
    count("verifying lists", len(sealed), len(sealed))
    if dataset is not None:
        listed = read_quarantine(directory, dataset.num_samples)
        return _Parts(tuple(findings), manifest, dataset.index, dataset.identities, dataset, listed)
    try:
        index = np.load(directory / packed.INDEX_FILE, mmap_mode="r", allow_pickle=False)
        identities = (directory / packed.IDENTITIES_FILE).read_bytes().decode("utf-8").split("\n")[:-1]
    except (OSError, ValueError):
        index, identities = no_rows, []
    if index.dtype != packed.INDEX_DTYPE or index.ndim != 1:
        index = no_rows
    return _Parts(tuple(findings), manifest, index, identities, None, ())


def _extra_shards(directory: Path, manifest: Manifest) -> list[Finding]:
    """Tars beside the data set that are none of it: left by something, or the manifest is of another state."""
    known = {shard.file for shard in manifest.shards}
    extra = sorted(path.name for path in directory.glob("*.tar") if path.name not in known)
    return [
        Finding("shard", "is not in the manifest; nothing reads it. Remove it, or import it", name) for name in extra
    ]


def _out_of_range(parts: _Parts, manifest: Manifest, unlisted: Counter[str]) -> list[Finding]:
    """Rows whose label is nobody's, or whose shard is none; whatever the shards say."""
    findings: list[Finding] = []
    num_labels, num_shards = len(parts.identities), len(manifest.shards)
    for first in range(0, len(parts.index), _PIECE_ROWS):
        rows = parts.index[first : first + _PIECE_ROWS]
        for kind, name, limit in (("label", "label", num_labels), ("index", "shard", num_shards)):
            wrong = np.flatnonzero((rows[name] < 0) | (rows[name] >= limit))
            room = max(0, MOST_LISTED - sum(one.kind == kind for one in findings)) if wrong.size else 0
            for place in wrong[:room].tolist():
                shard = int(rows["shard"][place])
                file = manifest.shards[shard].file if 0 <= shard < num_shards else None
                detail = f"sample {first + place} has {name} {rows[name][place]}; must be 0 to {limit - 1}"
                findings.append(Finding(kind, detail, file, None, first + place))
            if wrong.size > room:
                unlisted[kind] += int(wrong.size) - room
    return findings


# One shard

_MISSING, _READ, _DECODED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class ShardWork:
    """What is needed to check one shard in a process of its own: its n rows, and the labels (K, rising) in them with their keys."""

    path: Path
    record: ShardRecord
    samples: Int64Array
    rows: npt.NDArray[np.void]
    known_K: Int64Array
    keys: Texts
    owned: bool  # packed here, so that every image in it has a row
    decode: bool
    hashes: bool


@dataclass(eq=False)
class ShardFound:
    """Findings, hashes of the n samples, and (m, 2) pairs (label, number in .cls) that occur."""

    samples: Int64Array
    exact_n2: npt.NDArray[np.uint64]
    looks_n: npt.NDArray[np.uint64]
    state_n: npt.NDArray[np.int8]
    findings: list[Finding] = field(default_factory=list)
    unlisted: Counter[str] = field(default_factory=Counter)
    class_of_label: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    listed: Counter[str] = field(default_factory=Counter)

    def add(self, finding: Finding) -> None:
        self.listed[finding.kind] += 1
        if self.listed[finding.kind] <= MOST_LISTED:
            self.findings.append(finding)
        else:
            self.unlisted[finding.kind] += 1


def samples_by_shard(index: npt.NDArray[np.void], num_shards: int) -> Iterator[Int64Array]:
    """The rows of each shard, in order of their place in it. **Memory**: 8 bytes a row, unless they are in that order."""
    shard_N = index["shard"]
    order = None if len(index) == 0 or bool(np.all(shard_N[1:] >= shard_N[:-1])) else np.argsort(shard_N, kind="stable")
    in_order = shard_N if order is None else shard_N[order]
    for shard in range(num_shards):
        first, end = np.searchsorted(in_order, [shard, shard + 1])
        samples = np.arange(first, end) if order is None else order[first:end]
        yield samples[np.argsort(index["offset"][samples], kind="stable")].astype(np.int64)


def _works(directory: Path, parts: _Parts, manifest: Manifest, decode: bool, duplicates: bool) -> Iterator[ShardWork]:
    root = directory / (manifest.root or "")
    for record, samples in zip(manifest.shards, samples_by_shard(parts.index, len(manifest.shards)), strict=True):
        rows = parts.index[samples]
        known = np.unique(rows["label"])
        known = known[(known >= 0) & (known < len(parts.identities))].astype(np.int64)
        keys = Texts.of(Chosen(parts.identities, known))
        owned = manifest.root is None
        yield ShardWork(root / record.file, record, samples, rows, known, keys, owned, decode, duplicates)


def check_shard(work: ShardWork) -> ShardFound:
    """Everything that one shard and its rows can show."""
    num = len(work.samples)
    found = ShardFound(
        work.samples, np.zeros((num, 2), dtype=np.uint64), np.zeros(num, dtype=np.uint64), np.zeros(num, dtype=np.int8)
    )
    name = work.record.file
    try:
        size = work.path.stat().st_size
        digest = file_sha256(work.path)
    except OSError as error:
        found.add(Finding("shard", f"cannot be read ({error.strerror}); restore it", name))
        return found
    if size != work.record.size_bytes:
        found.add(Finding("shard", f"is {size} bytes; the manifest says {work.record.size_bytes}", name))
    elif digest != work.record.sha256:
        said = work.record.sha256[:16]
        found.add(Finding("shard", f"has sha256 {digest[:16]}...; the manifest says {said}...", name))
    if num != work.record.num_samples:
        found.add(Finding("shard", f"has {num} rows in the index; the manifest says {work.record.num_samples}", name))
    if size == 0:
        found.add(Finding("tar", "is empty", name))
        return found
    with open(work.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        _check_members(work, found, tar)
    return found


def _check_members(work: ShardWork, found: ShardFound, tar: mmap.mmap) -> None:
    name = work.record.file
    images: dict[int, Member] = {}
    said: dict[int, dict[str, bytes]] = {}  # beside the image at a byte
    begins: dict[str, int] = {}
    try:
        for sample in in_samples(read_members(tar)):
            first = begins.setdefault(sample[0].sample, sample[0].first_byte)
            if first != sample[0].first_byte:
                detail = (
                    f"key {sample[0].sample!r} at byte {sample[0].first_byte} is a sample's at byte {first} already"
                )
                found.add(Finding("key", detail, name, sample[0].name))
            beside = {
                member.ending: tar[member.offset : member.offset + member.size]
                for member in sample
                if member.ending in ("cls", "id")
            }
            for member in sample:
                if member.is_image:
                    images[member.offset], said[member.offset] = member, beside
    except BrokenTarError as error:
        found.add(Finding("tar", str(error), name))
    pointed = set()
    labels: list[Finding] = []
    num_labels = num_found = 0
    numbering: set[tuple[int, int]] = set()
    check = _label_problem if work.owned else _foreign_problem
    places = np.searchsorted(work.known_K, work.rows["label"])
    fields = zip(
        work.samples.tolist(),
        work.rows["offset"].tolist(),
        work.rows["size"].tolist(),
        work.rows["label"].tolist(),
        places.tolist(),
        strict=True,
    )
    for place, (sample, offset, row_size, label, key_place) in enumerate(fields):
        image = images.get(offset)
        if image is None:
            found.add(
                Finding("index", f"sample {sample} points at byte {offset}, where no image begins", name, None, sample)
            )
            continue
        pointed.add(offset)
        num_found += 1
        if image.size != row_size:
            detail = f"sample {sample} has {row_size} bytes in the index and {image.size} in the tar"
            found.add(Finding("index", detail, name, image.name, sample))
            continue
        if key_place < len(work.known_K) and work.known_K[key_place] == label:  # others are told by _out_of_range
            problem = check(work.keys[key_place], label, said[offset], numbering)
            if problem is not None:
                num_labels += 1
                if num_labels <= MOST_LISTED:
                    labels.append(Finding("label", problem, name, image.name, sample))
        if work.decode or work.hashes:
            _check_image(work, found, place, image, sample, tar[offset : offset + row_size])
    if work.owned or 2 * num_labels <= num_found:  # otherwise what lies beside images there is not whose they are
        for finding in labels:
            found.add(finding)
        if num_labels > len(labels):
            found.unlisted["label"] += num_labels - len(labels)
    if work.owned:
        for offset, image in images.items():
            if offset not in pointed:
                found.add(Finding("unindexed", "no row of the index points at it", name, image.name))
    found.class_of_label = np.array(sorted(numbering), dtype=np.int64).reshape(-1, 2)


def _label_problem(key: str, label: int, said: dict[str, bytes], numbering: set[tuple[int, int]]) -> str | None:
    """.id must be the identity's key. Without one .cls must be the key or the label.

    Beside an .id the number of .cls may be another than the label, as after a removal, if it is one a label everywhere.
    """
    number = said["cls"].strip() if "cls" in said else None
    if "id" in said:
        if said["id"] != key.encode():
            return f"the index says {key!r} (label {label}); .id says {said['id'].decode('utf-8', 'replace')!r}"
        if number is not None:
            if not number.isdigit() or len(number) > 18:
                return f".cls is {number[:40]!r}; must be a number"
            numbering.add((label, int(number)))
    elif number is not None and number not in (key.encode(), b"%d" % label):
        return f"the index says {key!r} (label {label}); .cls says {number[:40].decode('utf-8', 'replace')!r}"
    return None


def _foreign_problem(key: str, label: int, said: dict[str, bytes], numbering: set[tuple[int, int]]) -> str | None:
    """Beside an image of tars that were only indexed, .id or else .cls should be the key, or the number of which the key was made."""
    kind = "id" if "id" in said else "cls"
    text = said.get(kind, b"").decode("utf-8", "replace").strip()
    made = number_key(int(text)) if text.isdecimal() and len(text) <= 18 else text
    if text and key not in (text, made):
        return f"the index says {key!r} (label {label}); .{kind} says {text[:40]!r}"
    return None


def _check_image(work: ShardWork, found: ShardFound, place: int, image: Member, sample: int, payload: bytes) -> None:
    found.state_n[place] = _READ
    if work.hashes:
        found.exact_n2[place] = exact_hash(payload)
    try:
        if work.decode:
            check_decodes(payload, f"{work.record.file}:{image.name}")
        if work.hashes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(payload)) as picture:
                    found.looks_n[place] = looks_hash(picture)
            found.state_n[place] = _DECODED
    except DataError as error:
        found.add(Finding("undecodable", str(error), work.record.file, image.name, sample))
    except Exception as error:  # noqa: BLE001 (Pillow raises whatever its decoders meet first)
        reason = str(error).split("\n", 1)[0].split(" <_io", 1)[0] or type(error).__name__
        found.add(Finding("undecodable", reason, work.record.file, image.name, sample))


def _two_numbers(numbering: Sequence[npt.NDArray[np.int64]]) -> list[Finding]:
    """Labels with two numbers in .cls, and numbers of two labels."""
    pairs = np.unique(np.concatenate([np.zeros((0, 2), dtype=np.int64), *numbering]), axis=0)
    findings = []
    for column, text in (
        (0, "label {} has more than one number in .cls"),
        (1, "number {} in .cls is of more than one label"),
    ):
        values, counts = np.unique(pairs[:, column], return_counts=True)
        findings += [Finding("label", text.format(value)) for value in values[counts > 1][:MOST_LISTED].tolist()]
    return findings


# The same image twice


def duplicate_findings(dataset: PackedDataset, hashes: Hashes, count: Progress) -> list[Finding]:
    """Of each group of equal images: all where they are of several identities, else all but the first. Look-alikes: the later."""
    findings = []
    labels, is_first = dataset.index["label"], np.ones(dataset.num_samples, dtype=bool)
    is_read = hashes.exact_N2.any(axis=1)
    read = np.flatnonzero(is_read)
    for group in same_groups(hashes.exact_N2[read]):
        samples = read[group]
        is_first[samples[1:]] = False
        owners = np.unique(labels[samples])
        for sample in samples.tolist() if len(owners) > 1 else samples[1:].tolist():
            other = int(samples[0] if sample != samples[0] else samples[1])
            whose = f"one image of {len(owners)} identities; " if len(owners) > 1 else ""
            findings.append(_about(dataset, "duplicate", sample, f"{whose}the same bytes as {_named(dataset, other)}"))
    candidates = np.flatnonzero(hashes.decoded_N & is_first)
    found = alike_pairs(hashes.looks_N[candidates], progress=lambda done, of: count("comparing looks", done, of))
    pairs = candidates[found] if len(found) else found
    sure = confirmed(pairs, reader_of(dataset), progress=lambda done, of: count("comparing pixels", done, of))
    for one, other in sure.tolist():
        whose = "another identity's " if labels[one] != labels[other] else ""
        findings.append(_about(dataset, "look-alike", other, f"looks like {whose}{_named(dataset, one)}"))
    return findings


def reader_of(dataset: PackedDataset) -> Callable[[int], bytes]:
    """Reads the bytes of one sample at a time."""

    def read(sample: int) -> bytes:
        row = dataset.index[sample]
        with open(dataset.shard_path(int(row["shard"])), "rb") as file:
            file.seek(int(row["offset"]))
            return file.read(int(row["size"]))

    return read


def _named(dataset: PackedDataset, sample: int) -> str:
    shard = dataset.manifest.shards[int(dataset.index[sample]["shard"])].file
    return f"{shard}:{dataset.sample_key(sample)}"


def _about(dataset: PackedDataset, kind: str, sample: int, detail: str) -> Finding:
    shard, _, key = _named(dataset, sample).partition(":")
    return Finding(kind, detail, shard, key, sample)


def as_json(report: Report, directory: Path) -> dict[str, Any]:
    """The report as plain values."""
    listed = [{k: v for k, v in vars(one).items() if v is not None} for one in report.findings]
    return {
        "data_set": str(directory),
        "samples": report.num_samples,
        "shards": report.num_shards,
        "decoded": report.decoded,
        "compared": report.compared,
        "counts": report.counts,
        "open": len(report.open_findings) + sum(report.unlisted.values()),
        "unlisted": report.unlisted,
        "findings": listed,
    }
