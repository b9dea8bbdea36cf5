"""A packed data set is refused, in one line that names the file, for each way in which it can be broken."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lce_dist.errors import DataError
from pipelines.manifest import (
    INDEX_DTYPE,
    Manifest,
    PackedDataset,
    Quarantined,
    read_quarantine,
    split_identities,
    verify_checksums,
    write_description,
    write_quarantine,
)
from pipelines.pack import pack_images

KEYS = ("ann", "bob", "cai", "dee")


def small_jpeg(shade: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 128, 255 - shade)).save(encoded, "JPEG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "faces"
    images = [(KEYS[number % 4], f"{number}.jpg", small_jpeg(number * 10)) for number in range(12)]
    pack_images(images, KEYS, 12, out, "faces", "source", shard_size_bytes=8000)
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "faces"))


def edit_manifest(directory: Path, change: Callable[[dict], None]) -> None:
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def rewrite_index(directory: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the index and sign it again, so that only the check of its contents can notice."""
    dataset = PackedDataset.open(directory)
    index = np.array(dataset.index)
    change(index)
    names = dataset.name_hash_N2
    write_description(directory, "faces", dataset.manifest.shards, index, dataset.identities, "source", names)


def set_row(field: str, value: int) -> Callable[[np.ndarray], None]:
    def change(index: np.ndarray) -> None:
        index[5][field] = value

    return change


def test_open_reads_back_what_was_packed(packed: Path) -> None:
    dataset = PackedDataset.open(packed)
    assert dataset.identities == KEYS
    assert dataset.num_samples == 12 and len(dataset.manifest.shards) > 1
    assert isinstance(dataset.index, np.memmap)
    assert dataset.index["label"].tolist() == [0, 1, 2, 3] * 3
    assert dataset.sample_key(7) == "000000007.jpg"
    verify_checksums(dataset)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder missing": (shutil.rmtree, "does not exist"),
    "manifest missing": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
    "manifest half": (
        lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text()[:200]),
        "manifest.json is damaged",
    ),
    "manifest no object": (lambda d: (d / "manifest.json").write_text("[]"), "has format None"),
    "manifest from the future": (
        lambda d: edit_manifest(d, lambda values: values.update(version=2)),
        "version 2; this release reads 'lce-dist-shards' version 1",
    ),
    "manifest without a key": (
        lambda d: edit_manifest(d, lambda values: values.pop("num_samples")),
        "manifest.json is damaged: num_samples",
    ),
    "manifest edited": (
        lambda d: edit_manifest(d, lambda values: values.update(num_samples=13)),
        "manifest.json was edited",
    ),
    "manifest points outside": (
        lambda d: edit_manifest(d, lambda values: values["shards"][0].update(file="../other.tar")),
        "manifest.json is damaged: shards.0.file",
    ),
    "shard missing": (lambda d: (d / "faces-000001.tar").unlink(), "faces-000001.tar is missing"),
    "shard truncated": (
        lambda d: (d / "faces-000000.tar").write_bytes((d / "faces-000000.tar").read_bytes()[:-512]),
        "truncated or rewritten",
    ),
    "index missing": (lambda d: (d / "index.npy").unlink(), "index.npy is missing"),
    "index changed": (
        lambda d: (d / "index.npy").write_bytes((d / "index.npy").read_bytes()[:-1] + b"\x01"),
        "index.npy has sha256",
    ),
    "identities changed": (
        lambda d: (d / "identities.txt").write_text("ann\nbob\ncai\nzed\n"),
        "identities.txt has sha256",
    ),
    "names missing": (lambda d: (d / "names.npy").unlink(), "names.npy is missing"),
    "names changed": (
        lambda d: (d / "names.npy").write_bytes((d / "names.npy").read_bytes()[:-1] + b"\x01"),
        "names.npy has sha256",
    ),
    "label too large": (lambda d: rewrite_index(d, set_row("label", 4)), "sample 5 has label 4; must be 0 to 3"),
    "label negative": (lambda d: rewrite_index(d, set_row("label", -1)), "sample 5 has label -1; must be 0 to 3"),
    "shard number too large": (lambda d: rewrite_index(d, set_row("shard", 99)), "sample 5 has shard 99"),
    "size zero": (lambda d: rewrite_index(d, set_row("size", 0)), "sample 5 has size 0"),
    "offset before the payload": (lambda d: rewrite_index(d, set_row("offset", 3)), "sample 5 has offset 3"),
    "offset outside": (lambda d: rewrite_index(d, set_row("offset", 10**9)), "sample 5 ends at byte"),
    "empty class": (
        lambda d: rewrite_index(d, lambda index: np.copyto(index["label"], np.minimum(index["label"], 2))),
        "identity 'dee' has no images (1 empty of 4)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(copy: Path, fault: str) -> None:
    break_it, expected = FAULTS[fault]
    break_it(copy)
    with pytest.raises(DataError) as caught:
        PackedDataset.open(copy)
    message = str(caught.value)
    assert expected in message and str(copy) in message and "\n" not in message


def test_a_flipped_bit_in_a_shard_is_found_by_the_checksums(copy: Path) -> None:
    path = copy / "faces-000001.tar"
    contents = bytearray(path.read_bytes())
    contents[700] ^= 1
    path.write_bytes(bytes(contents))
    dataset = PackedDataset.open(copy)
    seen: list[tuple[int, int]] = []
    with pytest.raises(DataError, match=r"faces-000001\.tar has sha256"):
        verify_checksums(dataset, lambda done, total: seen.append((done, total)))
    assert seen == [(1, len(dataset.manifest.shards))]


def test_an_index_with_python_objects_is_never_unpickled(copy: Path) -> None:
    dataset = PackedDataset.open(copy)
    np.save(copy / "index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    unsigned = Manifest(**{**dataset.manifest.model_dump(), "index_sha256": sha256(copy / "index.npy")})
    signed = unsigned.model_copy(update={"fingerprint": unsigned.content_fingerprint()})
    (copy / "manifest.json").write_text(json.dumps(signed.model_dump()))
    with pytest.raises(DataError, match="is no index"):
        PackedDataset.open(copy)


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_select_relabels_in_sorted_order(packed: Path) -> None:
    dataset = PackedDataset.open(packed)
    view = dataset.select(["dee", "bob"])
    assert view.identities == ("bob", "dee")
    assert view.sample_ids.tolist() == [1, 3, 5, 7, 9, 11]
    assert view.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert view.fingerprint == dataset.select(["bob", "dee"]).fingerprint
    assert view.fingerprint != dataset.select(["bob", "cai"]).fingerprint
    assert (view.num_samples, view.num_classes) == (6, 2)


@pytest.mark.parametrize(
    ("keys", "expected"), [(["eve"], "no identity 'eve'"), (["ann"] * 2, "twice"), ([], "at least 1")]
)
def test_select_refuses(packed: Path, keys: list[str], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        PackedDataset.open(packed).select(keys)


def test_odd_keys_survive_the_identity_list(tmp_path: Path) -> None:
    keys = sorted(["späte/märz", "two\u2028lines", "名前", "a b", "\u00a0x"])
    images = [(key, "x.jpg", small_jpeg(9)) for key in keys]
    assert pack_images(images, keys, 5, tmp_path / "ö d", "odd", "s").identities == tuple(keys)


@settings(deadline=None)
@given(st.permutations([f"id{number}" for number in range(30)]), st.integers(0, 2**40))
def test_split_does_not_depend_on_the_order_of_its_input(keys: list[str], seed: int) -> None:
    split = split_identities(keys, heldout=7, old_fraction=0.3, seed=seed)
    assert split == split_identities(sorted(keys), heldout=7, old_fraction=0.3, seed=seed)
    assert len(split.heldout) == 7 and len(split.train) == 23 and len(split.old) == 7  # round(6.9)
    assert not set(split.train) & set(split.heldout)
    assert set(split.old) <= set(split.train)
    assert set(split.train) | set(split.heldout) == set(keys)
    assert split.train == tuple(sorted(split.train))


def test_another_seed_splits_otherwise() -> None:
    keys = [f"id{number}" for number in range(1000)]
    first, second = (split_identities(keys, 500, 0.5, seed) for seed in (1, 2))
    shared = len(set(first.heldout) & set(second.heldout))
    assert 190 < shared < 310  # 250 expected by chance; 8 standard deviations
    old_and_low = len(set(first.old) & set(sorted(first.train)[:250]))
    assert 80 < old_and_low < 170  # the old half is no prefix of the sorted keys


@pytest.mark.parametrize(
    ("heldout", "old_fraction", "expected"),
    [
        (1, 0.5, "heldout_identities is 1"),
        (9, 0.5, "2 to 8"),
        (10, 0.5, "2 to 8"),
        (5, 0.2, "old_identities is 0.2 of 5"),
    ],
)
def test_split_refuses_too_few(heldout: int, old_fraction: float, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        split_identities([f"id{number}" for number in range(10)], heldout, old_fraction, 1)


def test_split_refuses_repeated_keys() -> None:
    with pytest.raises(DataError, match="'a' appears twice"):
        split_identities(["a", "b", "a", "c", "d"], 2, 1.0, 1)


def test_the_split_never_changes() -> None:
    """Golden: another split would let a resumed run train on its test identities."""
    split = split_identities([f"id{number}" for number in range(8)], 3, 0.5, 1)
    assert (split.heldout, split.old) == (GOLDEN_HELDOUT, GOLDEN_OLD)
    assert INDEX_DTYPE.itemsize == 24


GOLDEN_HELDOUT = ("id1", "id5", "id6")
GOLDEN_OLD = ("id0", "id4")


def resign(directory: Path, **changes: object) -> None:
    """A manifest with other contents and the fingerprint that goes with them."""
    manifest = PackedDataset.open(directory).manifest.model_copy(update=changes)
    signed = manifest.model_copy(update={"fingerprint": manifest.content_fingerprint()})
    (directory / "manifest.json").write_text(json.dumps(signed.model_dump(exclude_none=True)))


def test_shards_may_lie_elsewhere(copy: Path) -> None:
    before = PackedDataset.open(copy)
    elsewhere = copy.with_name("elsewhere")
    elsewhere.mkdir()
    for shard in before.manifest.shards:
        (copy / shard.file).rename(elsewhere / shard.file)
    rewritten_root = before.manifest.model_copy(update={"root": "../elsewhere"})
    (copy / "manifest.json").write_text(json.dumps(rewritten_root.model_dump(exclude_none=True)))
    moved = PackedDataset.open(copy)
    assert moved.fingerprint == before.fingerprint, "where data lie does not change what they are"
    assert moved.shard_path(0).read_bytes() and moved.sample_key(0) == "000000000.jpg"
    at_url = before.manifest.model_copy(update={"root": "s3://bucket/faces/"})
    (copy / "manifest.json").write_text(json.dumps(at_url.model_dump(exclude_none=True)))
    remote = PackedDataset.open(copy)
    assert remote.shard_location(0) == f"s3://bucket/faces/{before.manifest.shards[0].file}"
    with pytest.raises(DataError, match="has its shards at s3://bucket/faces/"):
        remote.shard_path(0)


@pytest.mark.parametrize("file", ["../a.tar", "/a.tar", "a/../b.tar", "", "a\\b.tar", "./a.tar"])
def test_a_shard_outside_of_its_root_is_refused(copy: Path, file: str) -> None:
    manifest = PackedDataset.open(copy).manifest
    resign(copy, shards=[manifest.shards[0].model_copy(update={"file": file}), *manifest.shards[1:]])
    with pytest.raises(DataError, match="no relative path"):
        PackedDataset.open(copy)


def test_quarantined_samples_are_in_no_view(copy: Path) -> None:
    before = PackedDataset.open(copy)
    whole = before.select(before.identities)
    write_quarantine(copy, [Quarantined(4, "000000004.jpg", "cannot be decoded"), Quarantined(1, "1", "twice")])
    after = PackedDataset.open(copy)
    view = after.select(after.identities)
    assert after.quarantined.tolist() == [1, 4]
    assert view.sample_ids.tolist() == [one for one in whole.sample_ids.tolist() if one not in (1, 4)]
    assert view.fingerprint != whole.fingerprint and after.fingerprint_in_use != before.fingerprint_in_use
    of_bob = np.flatnonzero(before.index["label"] == before.identities.index("bob")).tolist()
    write_quarantine(copy, [Quarantined(one, "", "") for one in of_bob])
    without = PackedDataset.open(copy).select(before.identities)
    assert without.identities == tuple(key for key in before.identities if key != "bob")
    assert set(without.labels.tolist()) == {0, 1, 2} and not set(of_bob) & set(without.sample_ids.tolist())
    for sample, label in zip(without.sample_ids.tolist(), without.labels.tolist(), strict=True):
        assert before.identities[before.index["label"][sample]] == without.identities[label]
    with pytest.raises(DataError, match="leaves no sample of those"):
        PackedDataset.open(copy).select(["bob"])
    write_quarantine(copy, [Quarantined(4, "000000004.jpg", "cannot be decoded"), Quarantined(1, "1", "twice")])
    assert [one.reason for one in read_quarantine(copy, after.num_samples)] == ["twice", "cannot be decoded"]
    write_quarantine(copy, [])
    assert PackedDataset.open(copy).select(before.identities).fingerprint == whole.fingerprint
    for content in ('{"samples": [{"sample": 99999, "key": "", "reason": ""}]}', "{}", "no json"):
        (copy / "quarantine.json").write_text(content)
        with pytest.raises(DataError, match=r"quarantine\.json"):
            PackedDataset.open(copy)
