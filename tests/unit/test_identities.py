"""Keys that stay on the disk, and the lists of views and splits that do."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelines.manifest
from lce_dist.errors import DataError
from pipelines.identities import Chosen, Identities, first_unsorted, line_starts
from pipelines.manifest import (
    IDENTITIES_FILE,
    INDEX_FILE,
    Manifest,
    PackedDataset,
    file_sha256,
    split_identities,
    write_description,
)
from pipelines.pack import pack_images
from pipelines.reading import ShardReader
from pipelines.repeated import repeat_dataset
from pipelines.rows import Rows
from pipelines.views import stored_split, stored_view

KEYS = st.lists(
    st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), min_size=1, max_size=9),
    min_size=1,
    max_size=200,
    unique=True,
).map(sorted)


def _written(path: Path, keys: list[str]) -> Identities:
    path.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8", newline="")
    assert first_unsorted(keys) is None
    return Identities(path, line_starts(path))


@given(keys=KEYS, seed=st.integers(0, 99))
def test_keys_on_disk_are_a_sequence_like_any(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], seed: int
) -> None:
    draw = random.Random(seed)
    found = _written(tmp_path_factory.mktemp("keys") / "identities.txt", keys)
    assert found == keys and tuple(keys) == found and [*found] == keys and len(found) == len(keys)
    assert found[0] == keys[0] and found[-1] == keys[-1] and found[1:3] == tuple(keys[1:3])
    assert found[::2] == tuple(keys[::2]) and found[5:2] == ()
    with pytest.raises(IndexError):
        found[len(keys)]
    asked = [*draw.sample(keys, draw.randint(1, len(keys))), "never\x01there"]
    places = [keys.index(key) for key in asked[:-1]]
    assert found.labels_of(asked).tolist() == [*places, -1]
    assert [found._search(key) for key in asked] == [*places, -1]
    assert first_unsorted([*keys, keys[-1]]) == len(keys)
    some = Chosen(found, np.array(places))
    assert (
        [*some] == asked[:-1] and some[0] == asked[0] and some[1:] == tuple(asked[1:-1]) and some == tuple(asked[:-1])
    )
    assert not any(key in repr(one) for one in (found, some) for key in keys if len(key) > 5)


@given(keys=KEYS.filter(lambda keys: len(keys) >= 5), seed=st.integers(0, 99))
def test_a_split_of_keys_on_disk_is_that_of_the_same_keys(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], seed: int
) -> None:
    found = _written(tmp_path_factory.mktemp("keys") / "identities.txt", keys)
    of_list, of_file = split_identities(keys, 2, 0.8, seed), split_identities(found, 2, 0.8, seed)
    assert of_file == of_list and [*of_list.train] == sorted(of_list.train)
    assert sorted([*of_file.train, *of_file.heldout]) == sorted(keys) and set(of_file.old) <= set(of_file.train)
    assert [keys[place] for place in of_file.old.place_C] == [*of_file.old]


@pytest.fixture
def packed(tmp_path: Path, jpeg: bytes) -> PackedDataset:
    keys = [f"id{number}" for number in (1, 2, 3, 4, 5, 6, 9)]
    images = [(keys[number * 3 % 7], f"{number}.jpg", jpeg) for number in range(40)]
    return pack_images(iter(images), keys, 40, tmp_path / "packed", "packed", "s")


@pytest.fixture
def jpeg() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 200)).save(out, "JPEG")
    return out.getvalue()


def test_a_data_set_that_was_found_whole_is_not_hashed_again(
    packed: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipelines.manifest, "_LARGE_SAMPLES", 1)
    where, cache = packed.directory, tmp_path / "cache"

    def opened() -> PackedDataset:
        return PackedDataset.open(where, checked=cache)

    assert opened().identities == packed.identities
    (stamp,) = cache.glob("checked-*/stamp.json")
    before = stamp.read_bytes()
    assert opened().identities == packed.identities and stamp.read_bytes() == before

    # another content: hashed, and refused; of the same size and time, too
    index = (where / INDEX_FILE).read_bytes()
    (where / INDEX_FILE).write_bytes(index[:-1] + bytes([index[-1] ^ 1]))
    with pytest.raises(DataError, match="sha256"):
        opened()
    (where / INDEX_FILE).write_bytes(index)
    assert opened().identities == packed.identities and stamp.read_bytes() != before

    # a stamp that is damaged, foreign, or cannot be written costs time, no more
    for harm in (b"", b"{", json.dumps({"version": 1}).encode()):
        stamp.write_bytes(harm)
        assert opened().identities == packed.identities
    (stamp.parent / "starts.npy").write_bytes(b"cut")
    assert opened().identities == packed.identities
    shutil.rmtree(cache)
    cache.write_text("in the way")
    assert opened().identities == packed.identities


def test_identities_that_are_there_twice_or_no_text_are_refused(packed: PackedDataset, tmp_path: Path) -> None:
    names = packed.name_hash_N2
    assert names is not None
    index, shards = np.array(packed.index), packed.manifest.shards
    write_description(packed.directory, "x", shards, index, ["a", "b", "b", "c", "d", "e", "f"], "s", names)
    with pytest.raises(DataError, match="line 3 is not above line 2"):
        PackedDataset.open(packed.directory)
    write_description(packed.directory, "x", shards, index, ["a", "b", "c", "d", "e", "f", "é"], "s", names)
    path = packed.directory / IDENTITIES_FILE
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    manifest = json.loads((packed.directory / "manifest.json").read_text())
    sealed = Manifest.model_validate({**manifest, "identities_sha256": file_sha256(path)})
    values = {**sealed.model_dump(exclude_none=True), "fingerprint": sealed.content_fingerprint()}
    (packed.directory / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="no UTF-8"):
        PackedDataset.open(packed.directory)


def test_lists_are_made_once_and_made_anew_when_damaged(packed: PackedDataset, tmp_path: Path) -> None:
    made = []

    def draw():  # type: ignore[no-untyped-def]
        made.append("split")
        return split_identities(packed.identities, 2, 0.6, 1)

    def choose():  # type: ignore[no-untyped-def]
        made.append("view")
        return packed.choose(draw().train.place_C)  # type: ignore[attr-defined]

    cache = tmp_path / "cache"
    for _ in range(2):
        people = stored_split(cache, ("a", 1), packed, draw)
        view = stored_view(cache, ("a", 1), packed, choose)
    assert made == ["split", "view", "split"]
    plain = packed.select(draw().train)
    assert people == draw() and view.fingerprint == plain.fingerprint and view.identities == plain.identities
    for one, other in ((view.sample_ids, plain.sample_ids), (view.labels, plain.labels), (view.count_C, plain.count_C)):
        np.testing.assert_array_equal(one, other)
    assert np.bincount(view.labels).tolist() == view.count_C.tolist()

    made.clear()
    stored_view(cache, ("a", 2), packed, choose)  # of another name
    next(cache.glob("view-*/samples.npy")).write_bytes(b"cut")
    for name in (("a", 1), ("a", 2)):
        again = stored_view(cache, name, packed, choose)
        np.testing.assert_array_equal(again.sample_ids, plain.sample_ids)
    assert made.count("view") == 2 and not [*cache.glob("*.partial*")]


@given(data=st.data(), size=st.integers(0, 40))
def test_rows_of_a_file_are_those_of_the_array(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.npy"
    array = np.arange(size, dtype=np.int64) ** 2
    np.save(path, array)
    rows = Rows(path, np.dtype(np.int64))
    assert len(rows) == size and np.array_equal(np.asarray(rows), array)
    places = st.integers(-size, size - 1) if size else st.nothing()
    asked = np.array(data.draw(st.lists(places, max_size=50) if size else st.just([])), dtype=np.int64)
    found = rows[asked]
    assert np.array_equal(found, array[asked])
    found += 1  # one's own, as of an array
    cut = slice(*data.draw(st.tuples(st.integers(-50, 50), st.integers(-50, 50), st.sampled_from([None, 1, 2, -1]))))
    assert np.array_equal(rows[cut], array[cut]) and np.array_equal(np.asarray(rows), array)
    for beyond in (size, -size - 1):
        with pytest.raises(IndexError, match=f"row {beyond} of {size}"):
            rows[np.array([beyond])]
    with pytest.raises(ValueError, match="dtype"):
        Rows(path, np.dtype(np.float64))
    if size:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="shorter"):
            Rows(path, np.dtype(np.int64))


def test_an_index_of_any_size_over_the_bytes_of_a_small_one(packed: PackedDataset, tmp_path: Path) -> None:
    made = repeat_dataset(packed, tmp_path / "large", 300, 7)
    assert (made.num_samples, len(made.identities)) == (2100, 300)
    view = made.select(made.identities)
    assert view.count_C.tolist() == [7] * 300 and [*view.identities] == sorted(view.identities)
    assert not np.array_equal(view.labels, np.sort(view.labels))  # mixed
    reader = ShardReader(made)
    payloads = [payload.tobytes() for payload in reader.read(np.array([0, 39, 40, 2099]))]
    assert payloads == [ShardReader(packed).read(np.array([n % 40]))[0].tobytes() for n in (0, 39, 40, 2099)]
    reader.close()
    again = repeat_dataset(packed, tmp_path / "large", 300, 7)
    assert again.fingerprint == made.fingerprint
    with pytest.raises(DataError, match="1 identities of 7 images"):
        repeat_dataset(packed, tmp_path / "other", 1, 7)
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.move(packed.directory, tmp_path / "a" / "packed")
    shutil.move(tmp_path / "large", tmp_path / "a" / "large")  # moved together, they find each other
    assert PackedDataset.open(tmp_path / "a" / "large").num_samples == 2100
