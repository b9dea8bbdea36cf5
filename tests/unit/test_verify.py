"""Verification: each way in which a data set can be wrong is found where it is, and a good one gives nothing."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from lce_dist.errors import DataError
from pipelines.edit import remove
from pipelines.images import ImageRules
from pipelines.importing import ImportSettings
from pipelines.manifest import PackedDataset, file_sha256, read_quarantine, write_description
from pipelines.members import read_members
from pipelines.pack import pack_images
from pipelines.tars import index_tars
from pipelines.verify import Report, to_quarantine, verify

KEYS = ("ann", "bob", "cai", "dee")


def jpeg(seed: int) -> bytes:
    """Soft noise: no two look alike."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC).save(out, "JPEG", quality=92)
    return out.getvalue()


def pack(out: Path, images: list[tuple[str, bytes]]) -> Path:
    named = [(key, f"{key}/{number}.jpg", payload) for number, (key, payload) in enumerate(images)]
    keys = sorted({key for key, _ in images})
    pack_images(named, keys, len(named), out, "faces", "source", shard_size_bytes=12_000)
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("packed") / "faces", [(KEYS[n % 4], jpeg(n)) for n in range(16)])


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "faces"))


def sign_again(directory: Path, change: Callable[[np.ndarray, list[str]], None]) -> None:
    """Change index or keys, and describe the data set anew, hashes of the shards as they are."""
    dataset = PackedDataset.open(directory)
    index, keys = np.array(dataset.index), list(dataset.identities)
    names = np.array(dataset.name_hash_N2)
    change(index, keys)
    records = [
        record.model_copy(
            update={
                "sha256": file_sha256(directory / record.file),
                "size_bytes": (directory / record.file).stat().st_size,
            }
        )
        for record in dataset.manifest.shards
    ]
    write_description(directory, "faces", records, index, keys, "source", names)


def overwrite(directory: Path, member: str, payload: bytes) -> None:
    """Put other bytes of at most the same number into a member."""
    for path in sorted(directory.glob("*.tar")):
        content = bytearray(path.read_bytes())
        for one in read_members(bytes(content)):
            if one.name == member:
                content[one.offset : one.offset + one.size] = payload.ljust(one.size, b"\0")
                path.write_bytes(content)
                return
    raise AssertionError(member)


def found(report: Report) -> list[tuple[str, int | None]]:
    return [(one.kind, one.sample) for one in report.findings]


def test_a_good_one_gives_nothing(packed: Path) -> None:
    report = verify(packed, decode=True, duplicates=True, num_workers=1)
    assert report.findings == () and report.counts == {}
    assert (report.num_samples, report.num_shards) == (16, len(list(packed.glob("*.tar"))))
    assert report.num_shards > 1


def test_processes_find_the_same(copy: Path) -> None:
    overwrite(copy, "000000003.jpg", b"junk")
    overwrite(copy, "000000012.jpg", b"junk")
    alone, together = (verify(copy, True, True, num_workers=number) for number in (1, 2))
    assert alone == together and len(alone.findings) == 4  # two shards with another checksum, two images


def test_a_flipped_bit_is_a_checksum_of_its_shard(copy: Path) -> None:
    row = PackedDataset.open(copy).index[5]
    path = PackedDataset.open(copy).shard_path(int(row["shard"]))
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) + 400] ^= 1
    path.write_bytes(content)
    (one,) = verify(copy, num_workers=1).findings
    assert (one.kind, one.shard, one.key) == ("shard", path.name, None) and "sha256" in one.detail


def test_a_truncated_tar_names_the_byte_and_the_samples_behind_it(copy: Path) -> None:
    dataset = PackedDataset.open(copy)
    behind = [sample for sample in range(16) if dataset.index[sample]["shard"] == 1]
    cut = int(dataset.index[behind[-1]]["offset"]) - 512
    path = dataset.shard_path(1)
    path.write_bytes(path.read_bytes()[:cut])
    report = verify(copy, num_workers=1)
    kinds = [one.kind for one in report.findings]
    assert kinds == ["data-set", "shard", "tar", "index"]
    assert f"at byte {cut}" in report.findings[2].detail
    assert report.findings[3].sample == behind[-1] and report.findings[3].shard == path.name


def test_a_missing_and_an_empty_shard(copy: Path) -> None:
    dataset = PackedDataset.open(copy)
    dataset.shard_path(0).unlink()
    dataset.shard_path(1).write_bytes(b"")
    report = verify(copy, num_workers=1)
    shards = {one.shard for one in report.findings if one.kind in ("shard", "tar")}
    assert shards == {dataset.manifest.shards[0].file, dataset.manifest.shards[1].file}


def test_a_stale_index_points_beside_images(copy: Path) -> None:
    def change(index: np.ndarray, keys: list[str]) -> None:
        index["offset"][3] += 512
        index["size"][6] -= 1

    sign_again(copy, change)
    report = verify(copy, decode=True, num_workers=1)
    assert found(report) == [("index", 3), ("index", 6), ("unindexed", None)]
    assert report.findings[2].key == "000000003.jpg"


def test_a_foreign_index_is_about_every_sample(copy: Path, tmp_path: Path) -> None:
    other = pack(tmp_path / "other", [(KEYS[n % 4], jpeg(100 + n)) for n in range(16)])
    shutil.copy(other / "index.npy", copy / "index.npy")
    report = verify(copy, num_workers=1)
    assert report.findings[0].kind == "data-set" and "index.npy" in report.findings[0].detail
    assert sum(kind == "index" for kind, _ in found(report)) > 8


def test_labels_are_held_against_cls_and_id(copy: Path) -> None:
    def change(index: np.ndarray, keys: list[str]) -> None:
        index["label"][2] = 3

    sign_again(copy, change)
    report = verify(copy, num_workers=1)
    (one,) = [one for one in report.findings if one.sample is not None]
    assert (one.kind, one.sample, one.key) == ("label", 2, "000000002.jpg")
    assert "'dee'" in one.detail and "'cai'" in one.detail


def test_one_number_in_cls_is_of_one_label(copy: Path) -> None:
    """.id agrees everywhere; one .cls is of someone else."""
    overwrite(copy, "000000004.cls", b"2")
    sign_again(copy, lambda index, keys: None)
    details = [one.detail for one in verify(copy, num_workers=1).findings]
    assert details == ["label 0 has more than one number in .cls", "number 2 in .cls is of more than one label"]


def test_a_label_out_of_range_is_told_with_its_row(copy: Path) -> None:
    index = np.array(np.load(copy / "index.npy"))
    index["label"][7] = 9
    np.save(copy / "index.npy", index)
    kinds = found(verify(copy, num_workers=1))
    assert kinds[0] == ("data-set", None) and ("label", 7) in kinds


def test_rows_out_of_range_are_told_whatever_the_shards_say(copy: Path) -> None:
    PackedDataset.open(copy).shard_path(0).unlink()
    index = np.array(np.load(copy / "index.npy"))
    index["label"][[0, 15]], index["shard"][7] = (-1, 4), 99
    np.save(copy / "index.npy", index)
    report = verify(copy, num_workers=1)
    rows = [(one.kind, one.sample, one.detail) for one in report.findings if one.sample is not None]
    assert ("label", 0, "sample 0 has label -1; must be 0 to 3") in rows
    assert ("label", 15, "sample 15 has label 4; must be 0 to 3") in rows
    assert [one[1] for one in rows if one[0] == "index" and "has shard 99" in one[2]] == [7]


def test_a_tar_that_the_manifest_does_not_know_is_found(copy: Path) -> None:
    shutil.copy(copy / "faces-000000.tar", copy / "more-000000.tar")
    (one,) = verify(copy, num_workers=1).findings
    assert (one.kind, one.shard) == ("shard", "more-000000.tar") and "not in the manifest" in one.detail


def test_a_key_that_comes_twice_is_found_and_costs_no_sample(packed: Path, copy: Path) -> None:
    """Two samples of two people under one key: nobody is held against what lies beside the other."""
    path, name = copy / "faces-000000.tar", b"000000001"
    content = bytearray(path.read_bytes())
    for one in read_members(bytes(content)):
        if one.sample == "000000000":
            header = content[one.offset - 512 : one.offset]
            header[:9], header[148:156] = name, b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            content[one.offset - 512 : one.offset] = header
    path.write_bytes(content)
    sign_again(copy, lambda index, keys: None)
    report = verify(copy, decode=True, num_workers=1)
    assert [(one.kind, one.sample) for one in report.findings] == [("key", None)]
    assert "key '000000001' at byte" in report.findings[0].detail
    assert to_quarantine(report, copy) == []
    remove(copy, ["ann"], [])  # the first of the two; the other one stays
    left = PackedDataset.open(copy)
    assert left.num_samples == 12 and verify(copy, decode=True, num_workers=1).findings == ()


def test_what_cannot_be_decoded_is_found_when_asked(copy: Path) -> None:
    overwrite(copy, "000000009.jpg", jpeg(9)[:300])
    overwrite(copy, "000000010.jpg", b"no image")
    sign_again(copy, lambda index, keys: None)
    assert found(verify(copy, num_workers=1)) == []
    assert found(verify(copy, decode=True, num_workers=1)) == [("undecodable", 9), ("undecodable", 10)]


def test_duplicates_of_one_and_of_two_identities_and_look_alikes(tmp_path: Path) -> None:
    again = io.BytesIO()
    Image.open(io.BytesIO(jpeg(4))).save(again, "JPEG", quality=60)
    images = [
        ("ann", jpeg(1)),
        ("ann", jpeg(2)),
        ("ann", jpeg(1)),
        ("bob", jpeg(3)),
        ("bob", jpeg(2)),
        ("cai", jpeg(4)),
    ]
    images += [("cai", again.getvalue()), ("dee", jpeg(5))]
    report = verify(pack(tmp_path / "faces", images), duplicates=True, num_workers=1)
    assert found(report) == [("duplicate", 1), ("duplicate", 2), ("duplicate", 4), ("look-alike", 6)]
    assert "of 2 identities" in report.findings[0].detail
    assert [one.sample for one in to_quarantine(report, tmp_path / "faces")] == [1, 2, 4]


def test_the_quarantine_answers_findings_and_no_view_holds_them(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(copy, "000000009.jpg", b"junk")
    sign_again(copy, lambda index, keys: None)
    assert main(["data", "verify", str(copy), "--decode", "--workers", "1", "--quarantine"]) == 3
    assert [(one.sample, one.key) for one in read_quarantine(copy, 16)] == [(9, "000000009.jpg")]
    dataset = PackedDataset.open(copy)
    view = dataset.select(dataset.identities)
    assert 9 not in view.sample_ids and view.num_samples == 15
    capsys.readouterr()
    assert main(["data", "verify", str(copy), "--decode", "--workers", "1"]) == 0
    assert "1 findings more are about samples in quarantine" in capsys.readouterr().out
    # what was found before stays in the list when a later pass looks at less
    assert main(["data", "verify", str(copy), "--workers", "1", "--quarantine"]) == 0
    assert [one.sample for one in read_quarantine(copy, 16)] == [9]


def test_json_lists_findings(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(copy, "000000009.jpg", b"junk")
    sign_again(copy, lambda index, keys: None)
    file = tmp_path / "findings.json"
    assert main(["data", "verify", str(copy), "--decode", "--workers", "1", "--json", str(file)]) == 3
    values = json.loads(file.read_text())
    assert values["open"] == 1 and values["counts"] == {"undecodable": 1}
    assert values["findings"][0]["key"] == "000000009.jpg" and values["findings"][0]["shard"].endswith(".tar")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lce: ") and "1 findings (1 undecodable)" in error


def test_a_damaged_manifest_is_a_finding_and_no_data_set_an_error(copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").write_text("{")
    assert [one.kind for one in verify(copy).findings] == ["data-set"]
    with pytest.raises(DataError, match="no manifest"):
        verify(tmp_path)


def test_shards_at_a_url_are_needed_on_a_disk(copy: Path) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(values | {"root": "s3://bucket/faces"}))
    with pytest.raises(DataError, match="on a disk"):
        verify(copy)


@pytest.mark.parametrize("kind", ["cls", "id", "json"])
def test_tars_that_were_only_indexed_have_their_own_labels(tmp_path: Path, kind: str) -> None:
    """Numbers of any origin are no findings; one of them beside the wrong image is, where they were what was indexed."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for number in range(9):
            text = json.dumps({"label": f"p{number % 3}"}) if kind == "json" else str(40 + number % 3)
            beside = [(kind, text.encode()), ("jpg", jpeg(number))]
            if kind == "json":
                beside.insert(0, ("cls", str(number).encode()))  # says nothing about the person
            for ending, payload in beside:
                header = tarfile.TarInfo(f"s{number}.{ending}")
                header.size = len(payload)
                tar.addfile(header, io.BytesIO(payload))
    settings = ImportSettings(name="tars", images=ImageRules(check="none"))
    label_key = "label" if kind == "json" else None
    out = tmp_path / "out"
    index_tars([tmp_path / "tars" / "0.tar"], tmp_path / "tars", out, settings, 1, label_key)
    assert verify(out, decode=True, num_workers=1).findings == ()
    index = np.array(np.load(out / "index.npy"))
    index["label"][4] = (index["label"][4] + 1) % 3
    np.save(out / "index.npy", index)
    wrong = [("label", 4)] if kind != "json" else []
    assert found(verify(out, num_workers=1)) == [("data-set", None), *wrong]


def test_too_many_are_no_matter_of_single_samples(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.verify.MOST_LISTED", 1)

    def change(index: np.ndarray, keys: list[str]) -> None:
        index["size"] -= 1

    sign_again(copy, change)
    report = verify(copy, num_workers=1)
    assert report.counts["index"] == 16 and sum(report.unlisted.values()) == 16 - report.num_shards > 0
    with pytest.raises(DataError, match="in one shard"):
        to_quarantine(report, copy)
