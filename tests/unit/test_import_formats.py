"""RecordIO, WebDataset tars, Parquet, CSV and pair files: against slow twins, other libraries, and damaged files."""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from launch.cli import main
from launch.protocol_files import Known, read_pairs
from lce_dist.errors import ConfigError, DataError
from lce_dist.keys import hash_keys
from pipelines.formats import SourceOptions, find_format, open_source
from pipelines.importing import Imported, ImportSettings, import_images
from pipelines.manifest import PackedDataset, verify_checksums
from pipelines.reading import ShardReader
from pipelines.recordio import MAGIC, RecordSource, join_parts, open_records
from pipelines.tars import index_tars
from pipelines.verify import verify
from tests.unit.test_import import encoded

SMALL = ImportSettings(shard_bytes=20_000)
SKIP = ImportSettings(shard_bytes=20_000, skip_bad=True)


def contents(dataset: PackedDataset) -> dict[bytes, str]:
    payloads = ShardReader(dataset).read(np.arange(dataset.num_samples))
    return {
        bytes(one): dataset.identities[row] for one, row in zip(payloads, dataset.index["label"].tolist(), strict=True)
    }


# RecordIO


def framed(payload: bytes) -> bytes:
    """dmlc's writer, as slowly as can be: cut where the magic stands at a multiple of four."""
    magic = struct.pack("<I", MAGIC)
    cuts = [at for at in range(0, len(payload) - 3, 4) if payload[at : at + 4] == magic]
    parts = [
        payload[first:end] for first, end in zip([0, *(at + 4 for at in cuts)], [*cuts, len(payload)], strict=True)
    ]
    kinds = [0] if len(parts) == 1 else [1] + [2] * (len(parts) - 2) + [3]
    return b"".join(
        magic + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4)
        for kind, part in zip(kinds, parts, strict=True)
    )


def image_record(label: float, image: bytes, more: Sequence[float] = ()) -> bytes:
    return struct.pack("<IfQQ", len(more), label, 7, 0) + struct.pack(f"<{len(more)}f", *more) + image


def written(path: Path, records: Sequence[bytes], index: bool = True) -> Path:
    lines, file = [], bytearray()
    for number, record in enumerate(records):
        lines.append(f"{number}\t{len(file)}\n")
        file += framed(record)
    path.write_bytes(file)
    if index:
        path.with_suffix(".idx").write_text("".join(reversed(lines)))
    return path


def arcface(images: Sequence[bytes], labels: Sequence[int]) -> list[bytes]:
    """As arcface_torch packs: a first record and one for each identity without an image."""
    count, ids = len(images), sorted(set(labels))
    ranges = [(labels.index(one) + 1, len(labels) - list(labels)[::-1].index(one) + 1) for one in ids]
    head = image_record(0, b"", (count + 1, count + 1 + len(ids)))
    return [
        head,
        *(image_record(label, image) for label, image in zip(labels, images, strict=True)),
        *(image_record(0, b"", one) for one in ranges),
    ]


MAGIC_BYTES = struct.pack("<I", MAGIC)
IMAGES = [encoded(number) for number in range(9)]
LABELS = [0, 0, 1, 1, 1, 4, 4, 5, 12]


@pytest.mark.parametrize("index", [True, False])
def test_records_of_arcface_torch(tmp_path: Path, index: bool) -> None:
    path = written(tmp_path / "train.rec", arcface(IMAGES, LABELS), index)
    source, notes = open_records(path)
    dataset = import_images(source, tmp_path / "out", SMALL, 1).dataset
    assert contents(dataset) == {image: f"{label:09d}" for image, label in zip(IMAGES, LABELS, strict=True)}
    assert "6 records without an image were passed over" in notes and (len(notes) == 1) is index
    assert [source.name(number) for number in range(9)] == [str(number) for number in range(1, 10)]
    assert find_format(tmp_path) == "recordio"


def test_records_of_im2rec_with_labels_behind_the_header_and_in_parts(tmp_path: Path) -> None:
    spiked = [image + b"\0" * (-len(image) % 4) + MAGIC_BYTES * 2 + b"tail" + MAGIC_BYTES for image in IMAGES]
    records = [image_record(99, image, (label, 1.5)) for image, label in zip(spiked, LABELS, strict=True)]
    records[3] = image_record(1, spiked[3])
    path = written(tmp_path / "train.rec", records)
    assert path.read_bytes()[4:8][-1] >> 5 == 1  # in parts
    dataset = import_images(open_records(path)[0], tmp_path / "out", SMALL, 1).dataset
    assert contents(dataset) == {image: f"{label:09d}" for image, label in zip(spiked, LABELS, strict=True)}


@given(st.lists(st.sampled_from([MAGIC_BYTES, b"abcd", b"\xca", b"\x0a\x23\xd7\xce"]), max_size=12).map(b"".join))
@settings(max_examples=200, deadline=None)
def test_parts_are_joined_as_they_were_cut(payload: bytes) -> None:
    assert join_parts("x", 0, framed(payload)) == payload


def test_labels_that_float32_cannot_hold(tmp_path: Path) -> None:
    labels = [3, 2**24, 2**24 + 1]
    path = written(tmp_path / "train.rec", [image_record(one, IMAGES[n]) for n, one in enumerate(labels)])
    with pytest.raises(DataError, match=r"labels up to 16777216.*float32.*Give its list with --labels FILE.lst"):
        open_records(path)
    im2rec = tmp_path / "other.lst"
    im2rec.write_text("".join(f"{n}\t{one}.000000\tdir/{n}.jpg\n" for n, one in enumerate(labels)))
    source, notes = open_records(path, im2rec)
    assert [source.identities[n] for n in range(3)] == ["000000003", "016777216", "016777217"]
    assert notes == ["labels are those of other.lst"]
    im2rec.rename(tmp_path / "train.lst")
    assert open_records(path)[1] == ["labels are those of train.lst"]
    (tmp_path / "train.lst").write_text("0\t3\ta\n1\t4\tb\n2\t5\tc\n")
    with pytest.raises(DataError, match=r"train.lst says 4 of image 1, .*16777216; it belongs to another file"):
        open_records(path)
    (tmp_path / "train.lst").write_text("0\t3\ta\n")
    with pytest.raises(DataError, match="has no line for image 1"):
        open_records(path)


def test_a_list_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "train.rec", arcface(IMAGES, LABELS))
    assert main(["data", "import", str(path), str(tmp_path / "out"), "--labels", str(tmp_path / "no.lst")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("lce: list ") and "no.lst cannot be read" in error[-1]
    assert not (tmp_path / "out.importing").exists()


def test_a_list_of_arcface_torch_counts_its_lines_from_one(tmp_path: Path) -> None:
    path = written(tmp_path / "train.rec", arcface(IMAGES, LABELS))
    listed = tmp_path / "names.lst"
    listed.write_text("".join(f"1\t/faces/{n}.jpg\t{label}\n" for n, label in enumerate(LABELS)))
    assert np.array_equal(open_records(path, listed)[0].label_N, open_records(path)[0].label_N)


@pytest.mark.parametrize("index", [True, False])
def test_records_that_are_cut_off_or_foreign(tmp_path: Path, index: bool) -> None:
    path = written(tmp_path / "train.rec", arcface(IMAGES, LABELS), index)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train.(rec|idx).*(cut off|restore the pair)"):
        open_records(path)
    path.write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])
    with pytest.raises(DataError, match="byte 0"):
        open_records(path)
    moved = bytearray(whole)
    moved[60:64] = b"abcd"  # where the second record begins
    path.write_bytes(moved)
    assert whole[40:44] == MAGIC_BYTES
    path.write_bytes(whole[:40] + b"abcd" + whole[44:])
    with pytest.raises(DataError, match="no record begins at byte 40"):
        open_records(path)


@pytest.mark.parametrize("lost", [[4], [3, 4], [0], [2]])
def test_an_index_that_names_some_records_only_is_refused(tmp_path: Path, lost: list[int]) -> None:
    """Cut at the end of a line, or of a .rec that grew."""
    images = [image + MAGIC_BYTES[: number % 4] for number, image in enumerate(IMAGES[:5])]
    path = written(tmp_path / "train.rec", [image_record(number, one) for number, one in enumerate(images)])
    assert len(open_records(path)[0].label_N) == 5
    lines = path.with_suffix(".idx").read_text().splitlines(keepends=True)[::-1]
    offsets = [int(line.split()[1]) for line in lines] + [path.stat().st_size]
    path.with_suffix(".idx").write_text("".join(line for number, line in enumerate(lines) if number not in lost))
    words = f"names {5 - len(lost)} records and nothing from byte {offsets[lost[0]]} to {offsets[lost[-1] + 1]} of"
    with pytest.raises(DataError, match=rf"index .*train.idx {words}.*remove it to have the .rec gone through"):
        open_records(path)
    path.with_suffix(".idx").unlink()
    assert len(open_records(path)[0].label_N) == 5


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan")])
def test_labels_that_are_no_identities(tmp_path: Path, label: float) -> None:
    with pytest.raises(DataError, match="byte 0 has label"):
        open_records(written(tmp_path / "a.rec", [image_record(label, IMAGES[0])]))


def test_a_rec_rewritten_behind_our_back_stops(tmp_path: Path) -> None:
    source, _ = open_records(written(tmp_path / "a.rec", [image_record(0, IMAGES[0])]))
    assert isinstance(source, RecordSource)
    (tmp_path / "a.rec").write_bytes(bytes(4000))
    with pytest.raises(DataError, match="no record at byte 0"):
        import_images(source, tmp_path / "out", SMALL, 1)


# WebDataset tars


def tar_of(path: Path, members: Sequence[tuple[str, bytes]], style: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=style) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def index(root: Path, out: Path, settings: ImportSettings = SMALL, **options: str) -> Imported:
    return index_tars(sorted(root.rglob("*.tar")), root, out, settings, 1, **options)


LONG = "an/" + "unusually-" * 15 + "long/späte-"


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("stem", ["", "sub/folder/", LONG])
def test_tars_are_indexed_where_they_lie_as_webdataset_reads_them(tmp_path: Path, style: int, stem: str) -> None:
    if stem == LONG and style == tarfile.USTAR_FORMAT:
        stem = "a" * 120 + "/" + "b" * 60  # the prefix field
    root, before = tmp_path / "shards", {}
    for shard in range(3):
        members: list[tuple[str, bytes]] = []
        for number in range(4):
            key = f"{stem}{shard}{number}"
            members += [
                (f"{key}.JPG", IMAGES[number + shard]),
                (f"{key}.cls", b"%d" % (number % 3)),
                (f"{key}.txt", b"?"),
            ]
        before[tar_of(root / f"part/{shard}.tar", members, style)] = None
    listing = sorted(path.relative_to(tmp_path) for path in root.rglob("*"))
    dataset = index(root, tmp_path / "out").dataset
    assert sorted(path.relative_to(tmp_path) for path in root.rglob("*")) == listing
    assert dataset.manifest.root == "../shards" and dataset.manifest.shards[1].file == "part/1.tar"
    assert dataset.identities == ("000000000", "000000001", "000000002")
    theirs = list(webdataset.WebDataset([str(path) for path in before], shardshuffle=False))
    assert [sample["jpg"] for sample in theirs] == [bytes(one) for one in ShardReader(dataset).read(np.arange(12))]
    assert [int(sample["cls"]) for sample in theirs] == dataset.index["label"].tolist()
    found = []
    for number, path in enumerate(before):
        with tarfile.open(path) as tar:
            found += [(number, one.offset_data, one.size) for one in tar.getmembers() if one.name.endswith(".JPG")]
    assert dataset.index[["shard", "offset", "size"]].tolist() == found
    verify_checksums(dataset)
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # beside the tars still
    assert contents(PackedDataset.open(tmp_path / "elsewhere"))


def test_identities_from_ids_json_text_and_folders(tmp_path: Path) -> None:
    def identities(members: Sequence[tuple[str, bytes]], **options: str) -> tuple[str, ...]:
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        tar_of(root / "a.tar", members)
        return index(root, tmp_path / f"{root.name}-out", **options).dataset.identities

    jpg = IMAGES[0]
    assert identities([("a.cls", b"7"), ("a.id", b"anna"), ("a.jpg", jpg)]) == ("anna",)
    assert identities([("a.cls", b" anna\n"), ("a.jpg", jpg)]) == ("anna",)
    assert identities([("a.json", b'{"label": 12}'), ("a.jpeg", jpg)]) == ("000000012",)
    who = json.dumps({"label": 1, "who": "späte"}).encode()
    assert identities([("a.cls", b"3"), ("a.json", who), ("a.jpg", jpg)], label_key="who") == ("späte",)
    assert identities([("./p/anna/1.png", encoded(1, "PNG")), ("p/ben/1.webp", encoded(1, "WEBP"))]) == (
        "p/anna",
        "p/ben",
    )
    for members, error in (
        ([("a.jpg", jpg)], "must have .id, .cls or .json"),
        ([("a.cls", b"1"), ("a.jpg", jpg), ("b.jpg", jpg)], r"a.tar:b at byte 3072 has no .cls; the first one does"),
        ([("a.cls", b"1"), ("a.jpg", jpg), ("a.png", jpg)], "has 2 images"),
        ([("a.cls", b"1"), ("a.txt", jpg)], "has 0 images"),
        ([("a.cls", b"1"), ("a.jpg", jpg), ("b.cls", b""), ("b.jpg", jpg)], "has the identity ''"),
        *(
            (
                [("a.cls", b"1"), ("a.jpg", jpg), ("b.cls", number), ("b.jpg", jpg)],
                rf"a.tar:b .* has the class {number.decode()}; must be",
            )
            for number in (b"-1", b"1.5", b"nan")
        ),
        ([("a.json", b"{}"), ("a.jpg", jpg)], "has no 'label' in its .json"),
        ([("a.json", b"{"), ("a.jpg", jpg)], "cannot be read"),
        ([("a.json", b'{"label": true}'), ("a.jpg", jpg)], "has the identity True"),
        ([("readme", b"")], "hold no sample"),
    ):
        with pytest.raises(DataError, match=error):
            identities(members)


def test_every_cut_of_a_tar_is_an_error_that_names_file_and_byte(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "shards" / "a.tar", [("a.cls", b"1"), ("a.jpg", IMAGES[0]), ("b.cls", b"1"), ("b.jpg", IMAGES[1])]
    )
    whole = path.read_bytes()
    end = whole.rstrip(b"\0")
    ended = -(-len(end) // 512) * 512
    for size in [*range(1, ended + 511, 97), *range(512, ended + 1, 512)]:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"a.tar is no whole tar: at byte \d+: .*at byte {size}(?!\d).*cut off"):
            index(path.parent, tmp_path / "out")
    path.write_bytes(whole[: ended + 512])
    assert index(path.parent, tmp_path / "out2").dataset.num_samples == 2
    damaged = bytearray(whole)
    damaged[1024 + 3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="at byte 1024: no tar header begins here"):
        index(path.parent, tmp_path / "out3")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"tar .*a.tar is empty"):
        index(path.parent, tmp_path / "out4")


def test_concatenated_tars_are_refused_by_import_and_found_by_verify(tmp_path: Path) -> None:
    """Readers stop at the first end mark: what was behind it was lost without a word."""
    root = tmp_path / "shards"
    first = tar_of(root / "a.tar", [("a.cls", b"1"), ("a.jpg", IMAGES[0])])
    second = tar_of(tmp_path / "b.tar", [("b.cls", b"2"), ("b.jpg", IMAGES[1])])
    assert index(root, tmp_path / "out").dataset.num_samples == 1
    end, size = 512 + 512 + 512 + -(-len(IMAGES[0]) // 512) * 512, first.stat().st_size
    first.write_bytes(first.read_bytes() + second.read_bytes())
    words = rf"at byte {size}: something follows the end mark at byte {end}, .*concatenated"
    for policy in (SMALL, SKIP):
        with pytest.raises(DataError, match=rf"a.tar is no whole tar: {words}"):
            index(root, tmp_path / f"out-{policy.skip_bad}", policy)
    kinds = {one.kind: one.detail for one in verify(tmp_path / "out", num_workers=1).findings}
    assert re.match(words, kinds["tar"]) and "index" not in kinds
    first.write_bytes(first.read_bytes()[:size] + bytes(5 << 20))
    assert index(root, tmp_path / "more-zeros").dataset.num_samples == 1


def test_one_rule_for_keys_and_images_whoever_reads_a_tar(tmp_path: Path) -> None:
    """The key ends at the first dot; an image whose kind has a dot counts where there is no plain one. As webdataset does."""
    root = tmp_path / "shards"
    members = [
        ("0001.face.jpg", IMAGES[0]),
        ("0001.cls", b"1"),
        ("0002.jpg", IMAGES[1]),
        ("0002.mask.png", encoded(2, "PNG")),
    ]
    path = tar_of(root / "a.tar", [*members, ("0002.cls", b"2")])
    theirs = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert [(one["__key__"], one.keys() & {"face.jpg", "jpg", "mask.png"}) for one in theirs] == [
        ("0001", {"face.jpg"}),
        ("0002", {"jpg", "mask.png"}),
    ]
    dataset = index(root, tmp_path / "out").dataset
    assert contents(dataset) == {IMAGES[0]: "000000001", IMAGES[1]: "000000002"}
    assert verify(tmp_path / "out", num_workers=1).findings == ()
    tar_of(root / "a.tar", [*members[:2], ("0001.mask.png", IMAGES[1])])
    with pytest.raises(DataError, match=r"a.tar:0001 .* has 2 images"):
        index(root, tmp_path / "two")


def test_names_that_are_no_text_stay_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "shards"
    names = [b"\xff".decode(errors="surrogateescape"), b"\xfe".decode(errors="surrogateescape")]
    members = [
        (f"{name}.{kind}", payload)
        for n, name in enumerate(names)
        for kind, payload in (("cls", b"%d" % n), ("jpg", IMAGES[n]))
    ]
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar_of(root / "a.tar", members, style)
        out = tmp_path / f"out-{style}"
        dataset = index(root, out).dataset
        assert dataset.num_samples == 2 and dataset.name_hash_N2 is not None
        assert dataset.name_hash_N2.tolist() == hash_keys([f"a.tar/{name}.jpg" for name in names]).tolist()
        assert verify(out, num_workers=1).findings == ()
        with (root / "a.tar").open("r+b") as file:
            file.seek(int(dataset.index["offset"][1]))
            file.write(bytes(100))
        assert main(["data", "verify", str(out), "--decode", "--quarantine", "--workers", "1"]) == 3
        assert "undecodable" in capsys.readouterr().out
        assert main(["data", "verify", str(out), "--decode", "--json", "-", "--workers", "1"]) == 3


def test_one_policy_for_what_is_wrong_with_a_sample_of_a_tar(tmp_path: Path) -> None:
    """No identity, no number, two images, a format that training cannot read there: each stops, or is left out and listed."""
    gif, bmp, tiff = (encoded(1, kind) for kind in ("GIF", "BMP", "TIFF"))
    bad: list[tuple[str, bytes]] = [
        ("b.cls", b"-1"),
        ("b.jpg", IMAGES[1]),
        ("c.jpg", IMAGES[2]),
        ("d.cls", b"1"),
        ("d.gif", gif),
    ]
    bad += [
        ("e.cls", b"1"),
        ("e.jpg", IMAGES[3]),
        ("e.png", IMAGES[3]),
        ("f.cls", b"1"),
        ("f.jpg", gif),
        ("g.cls", b"1"),
        ("g.heic", b"x"),
    ]
    good = [("a.cls", b"1"), ("a.jpg", IMAGES[0]), ("y.cls", b"2"), ("y.bmp", bmp), ("z.cls", b"2"), ("z.tif", tiff)]
    root = tmp_path / "shards"
    tar_of(root / "a.tar", [*good[:2], *bad, *good[2:]])
    imported = index(root, tmp_path / "out", SKIP)
    assert contents(imported.dataset) == {IMAGES[0]: "000000001", bmp: "000000002", tiff: "000000002"}
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    expected = {
        "a.tar/b.jpg": "has the class -1",
        "a.tar/c.jpg": "has no .cls",
        "a.tar:d": "has a .gif",
        "a.tar:e": "has 2 images",
        "a.tar/f.jpg": "is GIF",
        "a.tar:g": "has a .heic",
    }
    assert {row[0] for row in rows} == expected.keys()
    assert all(expected[row[0]] in row[2] for row in rows)
    assert imported.num_skipped == 6
    for sample in "bcdefg":
        tar_of(root / "a.tar", [*good[:2], *(one for one in bad if one[0][0] == sample)])
        with pytest.raises(DataError, match="--bad skip"):
            index(root, tmp_path / "stopped")


def test_beside_one_tar_that_is_named_there_may_be_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "tars" / "s.tar", [("a.cls", b"1"), ("a.jpg", IMAGES[0]), ("b.cls", b"2"), ("b.jpg", IMAGES[1])])
    monkeypatch.chdir(tmp_path / "tars")
    assert main(["data", "import", "s.tar", "packed/x", "--workers", "1"]) == 0
    told = capsys.readouterr()
    assert "indexing: 0.0/0.0 MB\n" in told.err or "indexing: 0.0/0.0 MB 0 MB/s\n" in told.err, told.err
    (tmp_path / "tars").rename(tmp_path / "moved")
    assert contents(PackedDataset.open(tmp_path / "moved" / "packed" / "x")).keys() == set(IMAGES[:2])
    with pytest.raises(DataError, match=r"s.tar:a .* has no .json; --label-key who asks for one"):
        index(tmp_path / "moved", tmp_path / "out", label_key="who")


@pytest.mark.parametrize("in_order", [True, False])
def test_sorted_tars_are_known_as_such(tmp_path: Path, in_order: bool) -> None:
    people = [number // 6 for number in range(60)]
    if not in_order:
        people = np.random.default_rng(1).permutation(people).tolist()
    members = [
        member
        for number, person in enumerate(people)
        for member in ((f"{number}.cls", b"%d" % person), (f"{number}.jpg", IMAGES[number % 9]))
    ]
    tar_of(tmp_path / "shards" / "a.tar", members)
    assert index(tmp_path / "shards", tmp_path / "out").dataset.manifest.shuffled is (False if in_order else None)


def test_bad_images_in_tars_and_what_is_not_done_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "shards"
    tar_of(root / "a.tar", [("a.cls", b"1"), ("a.jpg", IMAGES[0][:300]), ("b.cls", b"2"), ("b.jpg", IMAGES[1])])
    with pytest.raises(DataError, match=r"image a.tar/a.jpg cannot be decoded.*--bad skip"):
        index(root, tmp_path / "out")
    imported = index(root, tmp_path / "out", SKIP)
    assert imported.num_skipped == 1 and imported.dataset.identities == ("000000002",)
    assert "a.tar/a.jpg,000000001," in (tmp_path / "out" / "skipped.csv").read_text()
    assert main(["data", "import", str(root), str(root / "out")]) == 2
    assert "nothing is written" in capsys.readouterr().err and not (root / "out").exists()
    assert main(["data", "import", str(root), str(tmp_path / "o"), "--size", "112"]) == 2
    assert main(["data", "import", str(root), str(tmp_path / "o"), "--workers", "1", "--bad", "skip"]) == 0


# Parquet and CSV


def table(path: Path, images: object, labels: object, group: int = 3, **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": images, "label": labels, **more}), path, row_group_size=group)
    return path


def opened(path: Path, **options: str) -> PackedDataset:
    kind = find_format(path)
    out = path.with_name(path.name + f"-{len(list(path.parent.iterdir()))}")
    return import_images(open_source(path, kind, SourceOptions(**options))[0], out, SMALL, 1).dataset


def test_parquet_of_every_shape_and_each_row_group_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int]] = []
    read = parquet.ParquetFile.read_row_group

    def counted(self: parquet.ParquetFile, group: int, **options: object) -> object:
        reads.append((str(self), group))
        return read(self, group, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    many = [encoded(number, size=(40, 30 + number)) for number in range(40)]
    for number, (images, kind) in enumerate(
        (
            (pyarrow.array(many), pyarrow.int64()),
            (pyarrow.array(many, pyarrow.large_binary()), pyarrow.int32()),
            (pyarrow.array([{"bytes": one, "path": "x.jpg"} for one in many]), pyarrow.int16()),
        )
    ):
        folder = tmp_path / str(number)
        for part in range(2):
            rows = slice(20 * part, 20 * part + 20)
            table(folder / f"{part}.parquet", images[rows], pyarrow.array(range(rows.start, rows.stop), kind))
        reads.clear()
        assert contents(opened(folder)) == {image: f"{row:09d}" for row, image in enumerate(many)}
        assert len(reads) == 2 * 7  # row groups of 3 of 20 rows
    large = table(tmp_path / "large.parquet", pyarrow.array(many), pyarrow.array(range(40)), group=40)
    reads.clear()
    dataset = opened(large)
    assert len(dataset.manifest.shards) > 3 and len(reads) == 1  # a group above the size of a shard becomes several


def test_labels_of_parquet(tmp_path: Path) -> None:
    images, text = pyarrow.array(IMAGES[:3]), pyarrow.array(["ben", "anna", "ben"])
    assert opened(table(tmp_path / "a.parquet", images, text)).identities == ("anna", "ben")
    assert opened(table(tmp_path / "b.parquet", images, text.dictionary_encode())).identities == ("anna", "ben")
    named = pyarrow.table({"image": images, "label": pyarrow.array([1, 0, 1])})
    info = {"info": {"features": {"label": {"names": ["anna", "ben", "eve"], "_type": "ClassLabel"}}}}
    parquet.write_table(named.replace_schema_metadata({"huggingface": json.dumps(info)}), tmp_path / "c.parquet")
    assert opened(tmp_path / "c.parquet").identities == ("anna", "ben")
    two = table(tmp_path / "d.parquet", images, text, other=images, who=text)
    with pytest.raises(ConfigError, match=r"2 columns that may hold images \(image, other\)"):
        opened(two)
    assert opened(two, image_column="other", label_column="who").num_samples == 3
    for labels, error in (
        (pyarrow.array([1, None, 2]), "1 rows have no label"),
        (pyarrow.array([1, -1, 2]), "holds -1"),
        (pyarrow.array([1, 2**63, 2], type=pyarrow.uint64()), r"holds 9223372036854775808; must be below 2\^63"),
        (pyarrow.array([1.0, 2.0, 2.5]), "must be whole numbers or text"),
    ):
        with pytest.raises((DataError, ConfigError), match=error):
            opened(table(tmp_path / "e.parquet", images, labels))
    with pytest.raises(DataError, match=r"image f.parquet:1 has no bytes"):
        opened(table(tmp_path / "f.parquet", pyarrow.array([IMAGES[0], None, IMAGES[1]]), text))
    with pytest.raises(ConfigError, match="no column 'who' but image, label"):
        opened(tmp_path / "a.parquet", label_column="who")
    (tmp_path / "g.parquet").write_bytes(two.read_bytes()[:-10])
    with pytest.raises(DataError, match="is no Parquet file"):
        opened(tmp_path / "g.parquet")


def test_a_table_of_paths(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, image in enumerate(IMAGES):
        (tmp_path / "in" / f"ü {number},.jpg").write_bytes(image)
    listed = tmp_path / "people.csv"
    rows = [f'"in/ü {number},.jpg",{label}\n' for number, label in enumerate("ccbbaaabc")]
    listed.write_text("path,identity\n" + "".join(rows))
    dataset = opened(listed)
    assert contents(dataset) == dict(zip(IMAGES, "ccbbaaabc", strict=True)) and dataset.identities == ("a", "b", "c")
    listed.write_text("path,identity\n" + "".join(reversed(rows)))  # the same labels whatever the order
    assert opened(listed).identities == dataset.identities
    for line, error in (
        ("../x.jpg,a", r"path '../x.jpg' of row 1 must lie below"),
        ("/etc/passwd,a", r"say where with --root FOLDER"),
        ("in/gone.jpg,a", r"row 1 cannot be read"),
        ("in/x.jpg,", "has no identity"),
    ):
        listed.write_text(f"path,identity\n{line}\n")
        with pytest.raises(DataError, match=error):
            opened(listed)
    listed.write_text(f'file,who\n"{tmp_path}/in/ü 0,.jpg",7\n')
    with pytest.raises(DataError, match="--image-column"):
        opened(listed)
    options = SourceOptions(image_column="file", label_column="who", root=tmp_path / "in")
    source, _ = open_source(listed, "csv", options)
    assert import_images(source, tmp_path / "out", SMALL, 1).dataset.identities == ("7",)


# Pair files and formats


def test_pair_files_and_their_list_for_evaluate(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps((IMAGES[:8], [True, False, True, False]), protocol=2))
    dataset = import_images(open_source(path, "pairs", SourceOptions())[0], tmp_path / "out", SMALL, 1).dataset
    assert list(contents(dataset)) == IMAGES[:8] and dataset.num_samples == 8
    assert dataset.index["label"].tolist() == list(range(8)) and dataset.identities[3] == "000000003"
    known = Known("out", {key: row for row, key in enumerate(dataset.identities)})
    listed = read_pairs(tmp_path / "out" / "pairs.csv", known, known)
    assert listed.first_P.tolist() == [0, 2, 4, 6] and listed.genuine_P.tolist() == [True, False, True, False]
    path.write_bytes(pickle.dumps(([*IMAGES[:7], b"bad"], [True, False, True, False]), protocol=2))
    again = import_images(open_source(path, "pairs", SourceOptions())[0], tmp_path / "out2", SKIP, 1)
    assert again.dataset.num_samples == 7 and again.dropped_identities == ("000000007",)
    assert (tmp_path / "out2" / "pairs.csv").read_text().splitlines()[1:] == [
        "000000000,000000001,1",
        "000000002,000000003,0",
        "000000004,000000005,1",
    ]


def test_a_file_of_a_table_that_is_gone_follows_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(IMAGES[number])
    listed = tmp_path / "list.csv"
    listed.write_text("path,identity\n0.jpg,a\n1.jpg,a\ngone.jpg,b\n2.jpg,c\nalso/gone.jpg,a\n")
    arguments = ["data", "import", str(listed), str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    assert "gone.jpg of row 3 cannot be read (No such file or directory). With --bad skip" in capsys.readouterr().err
    assert main([*arguments, "--bad", "skip"]) == 0
    assert contents(PackedDataset.open(tmp_path / "out")) == {IMAGES[0]: "a", IMAGES[1]: "a", IMAGES[2]: "c"}
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[:2] for row in rows] == [["also/gone.jpg", "a"], ["gone.jpg", "b"]]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("id", b"an\x07na"),
        ("id", b"an\nna"),
        ("cls", b"a\x7fb"),
        ("json", b'{"label": "\\ud800"}'),
        ("json", b'{"label": "a\\u0000"}'),
    ],
)
def test_identities_that_no_list_can_hold_follow_the_policy(
    tmp_path: Path, kind: str, said: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A control character was told when all tars were read; half of a surrogate pair ended the worker."""
    good = {"id": b"ben", "cls": b"ben", "json": b'{"label": "ben"}'}[kind]
    for number, text in enumerate((good, said)):
        members = [(f"{number}.{kind}", text), (f"{number}.jpg", IMAGES[number])]
        tar_of(tmp_path / "s" / f"{number}.tar", [*members, (f"x{number}.{kind}", good), (f"x{number}.jpg", IMAGES[5])])
    arguments = ["data", "import", str(tmp_path / "s"), str(tmp_path / "out"), "--workers", "2"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "1.tar:1 at byte" in error and "must be UTF-8 text without control characters. With --bad skip" in error
    assert main([*arguments, "--bad", "skip"]) == 0
    dataset = PackedDataset.open(tmp_path / "out")
    assert (dataset.num_samples, dataset.identities) == (3, ("ben",))
    assert (tmp_path / "out" / "skipped.csv").read_text().splitlines()[1].startswith("1.tar/1.jpg,,")


def test_formats_are_found_out(tmp_path: Path) -> None:
    for name, kind in (
        ("a.zip", "zip"),
        ("b.REC", "recordio"),
        ("c.tar", "webdataset"),
        ("d.csv", "csv"),
        ("e.bin", "pairs"),
    ):
        (tmp_path / name).touch()
        assert find_format(tmp_path / name) == kind
    with pytest.raises(ConfigError, match="holds files of recordio and webdataset; say which with --format"):
        find_format(tmp_path)
    (tmp_path / "x").mkdir()
    assert find_format(tmp_path / "x") == "folder"
    (tmp_path / "x" / "data").mkdir()
    (tmp_path / "x" / "data" / "a.parquet").touch()
    assert find_format(tmp_path / "x") == "parquet"
    (tmp_path / "y.mp4").touch()
    with pytest.raises(ConfigError, match=r"ends in '.mp4'"):
        find_format(tmp_path / "y.mp4")


def test_each_format_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [
        written(tmp_path / "train.rec", arcface(IMAGES, LABELS)),
        table(tmp_path / "a.parquet", pyarrow.array(IMAGES), pyarrow.array(LABELS)),
        tar_of(
            tmp_path / "s" / "a.tar",
            [(f"{n}.{kind}", b) for n in range(9) for kind, b in (("cls", b"1"), ("jpg", IMAGES[n]))],
        ),
    ]
    for source in sources:
        out = tmp_path / f"{source.name}-out"
        assert main(["data", "import", str(source), str(out), "--workers", "1", "--no-decode"]) == 0
        assert "9 images of " in capsys.readouterr().out
        verify_checksums(PackedDataset.open(out))


def test_training_batches_come_out_of_imported_records_and_of_indexed_tars(tmp_path: Path) -> None:
    from pipelines.stream import ImageStream, block_plan

    members = [
        (f"{n}.{kind}", payload)
        for n in range(8)
        for kind, payload in (
            ("cls", b"%d" % (n % 2)),
            (("jpg", "png")[n % 2], encoded(n, ("JPEG", "PNG")[n % 2], (32, 32))),
        )
    ]
    tar_of(tmp_path / "s" / "a.tar", members)
    records = [image_record(n % 2, encoded(n, size=(32, 32))) for n in range(8)]
    source, _ = open_records(written(tmp_path / "train.rec", records))
    packed = import_images(source, tmp_path / "r-out", SMALL, 1).dataset
    for dataset in (index(tmp_path / "s", tmp_path / "s-out").dataset, packed):
        view = dataset.select(dataset.identities)
        with ImageStream(view, block_plan(8, 0, 1, 8), 32, None, 1, torch.device("cpu")) as batches:
            (batch,) = list(batches)
        assert batch.labels.tolist() == dataset.index["label"].tolist()
        for image, payload in zip(batch.images, ShardReader(dataset).read(np.arange(8)), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(bytes(payload))), dtype=np.float64)
            np.testing.assert_allclose(image.numpy(), (pixels / 127.5 - 1).transpose(2, 0, 1), atol=1e-6)


def test_a_record_file_in_capitals_is_read_as_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "TRAIN.REC").write_bytes(b"no record" * 9)
    with pytest.raises(DataError, match=r"TRAIN\.REC: no record begins at byte 0"):
        open_source(tmp_path / "TRAIN.REC", "recordio", SourceOptions())
