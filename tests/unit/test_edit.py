"""Merging copies every image once under the right person; what is removed is gone, whenever the removal is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import pipelines.edit as edit
from launch.cli import main
from lce_dist.errors import DataError, RunError
from lce_dist.keys import hash_keys
from pipelines.edit import remove
from pipelines.importing import ImportSettings
from pipelines.manifest import PackedDataset, Quarantined, read_quarantine, write_quarantine
from pipelines.members import in_samples, member_bytes, read_members
from pipelines.merging import merge, read_identity_map
from pipelines.pack import pack_images
from pipelines.reading import ShardReader
from pipelines.sidecars import write_sidecars
from pipelines.verify import verify
from tests.unit.test_verify import jpeg, sign_again

SHARD_BYTES = 22_000  # three or four images
SETTINGS = ImportSettings("both", SHARD_BYTES, images=None)


def pack(out: Path, people: dict[str, int], seed: int = 0) -> Path:
    """``people``: how many images each has; images of one take turns with those of the others."""
    left, images = dict(people), []
    while any(left.values()):
        for key in people:
            if left[key]:
                left[key] -= 1
                images.append((key, f"{key}/{left[key]}.jpg", jpeg(seed + len(images))))
    pack_images(images, sorted(people), len(images), out, "faces", "source", shard_size_bytes=SHARD_BYTES)
    return out


def contents(directory: Path) -> Counter[tuple[str, bytes, int]]:
    """Identity, image and name of every sample: what a data set says, whatever its order."""
    dataset = PackedDataset.open(directory)
    reader = ShardReader(dataset)
    payloads = reader.read(np.arange(dataset.num_samples))
    reader.close()
    keys = (dataset.identities[int(label)] for label in dataset.index["label"])
    assert dataset.name_hash_N2 is not None
    names = dataset.name_hash_N2[:, 0].tolist()
    return Counter(zip(keys, (payload.tobytes() for payload in payloads), names, strict=True))


def holds(place: Path, text: str) -> list[str]:
    """Files below a folder whose bytes hold a text."""
    files = (Path(folder) / file for folder, _, names in os.walk(place) for file in names)
    return [str(file) for file in files if text.encode() in file.read_bytes()]


def listed(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return pack(tmp_path / "a", {"ann": 5, "bob": 3}), pack(tmp_path / "b", {"bob": 2, "cai": 4}, seed=100)


# Merge


def test_merge_joins_equal_keys_and_keeps_every_byte(two: tuple[Path, Path], tmp_path: Path) -> None:
    merged = merge(two, tmp_path / "both", SETTINGS, {}, False, 1)
    assert merged.dataset.identities == ("ann", "bob", "cai")
    assert (merged.shared_identities, merged.shared_names) == (1, 2)
    assert contents(tmp_path / "both") == contents(two[0]) + contents(two[1])
    assert len(merged.dataset.manifest.shards) > 2
    assert verify(tmp_path / "both", decode=True, num_workers=1).findings == ()


def test_a_map_says_who_is_one_person(two: tuple[Path, Path], tmp_path: Path) -> None:
    table = tmp_path / "same.csv"
    table.write_text(f"set,key,identity\na,ann,person 1\n{two[1]},cai,person 1\nb,bob,robert\n")
    merged = merge(two, tmp_path / "both", SETTINGS, read_identity_map(table, two), False, 1)
    dataset = merged.dataset
    assert dataset.identities == ("bob", "person 1", "robert")
    assert np.bincount(dataset.index["label"]).tolist() == [3, 9, 2]
    assert verify(tmp_path / "both", num_workers=1).findings == ()


def test_prefix_keeps_people_of_two_sets_apart(two: tuple[Path, Path], tmp_path: Path) -> None:
    merged = merge(two, tmp_path / "both", SETTINGS, {(1, "cai"): "a/ann"}, True, 1)
    assert merged.dataset.identities == ("a/ann", "a/bob", "b/bob") and merged.shared_identities == 1


def test_merge_keeps_the_quarantine(two: tuple[Path, Path], tmp_path: Path) -> None:
    write_quarantine(two[1], [Quarantined(4, "000000004.jpg", "blurred")])
    before = PackedDataset.open(two[1]).name_hash_N2
    merged = merge(two, tmp_path / "both", SETTINGS, {}, False, 1).dataset
    (one,) = read_quarantine(tmp_path / "both", merged.num_samples)
    assert one.reason == "blurred" and merged.sample_key(one.sample) == one.key
    assert before is not None and merged.name_hash_N2 is not None
    assert merged.name_hash_N2[one.sample].tolist() == before[4].tolist()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("set,key\na,ann\n", "lacks the column 'identity'"),
        ("set,key,identity\nc,ann,x\n", "line 2: set 'c' is none of"),
        ("set,key,identity\na,ann,\n", "line 2: a value is empty"),
        ("set,key,identity\na,ann,x\na,ann,y\n", "line 3: 'ann' of a is 'x' and 'y'"),
        ("set,key,identity\na,zoe,x\n", "names 'zoe'"),
    ],
)
def test_a_wrong_map_is_one_line(two: tuple[Path, Path], tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(DataError, match=word):
        merge(two, tmp_path / "both", SETTINGS, read_identity_map(tmp_path / "map.csv", two), False, 1)
    assert not (tmp_path / "both").exists()


def test_merge_does_not_write_over(two: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="already holds a data set 'faces' from another source"):
        merge(two, two[0], SETTINGS, {}, False, 1)


# Removal


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Zoe is in two of five shards, and is one of the middle labels."""
    out = pack(tmp_path / "store" / "faces", {"ann": 6, "zoe-private": 2, "zz": 8})
    write_quarantine(
        out, [Quarantined(1, "000000001.jpg", "hers"), Quarantined(9, PackedDataset.open(out).sample_key(9), "ours")]
    )
    (out / "notes.txt").write_text("of the archive")
    return out


def test_what_is_removed_is_gone_and_the_rest_is_as_it_was(faces: Path) -> None:
    before, old = contents(faces), PackedDataset.open(faces)
    kept_key, kept_name = old.sample_key(9), hash_keys(["ann/0.jpg"])[0]
    stamps = {path.name: (path.stat().st_ino, path.read_bytes()) for path in faces.glob("*.tar")}
    done = remove(faces, ["zoe-private"], [])
    assert (done.num_samples, done.identities, done.num_rewritten) == (2, ("zoe-private",), 2)
    assert done.others == ("notes.txt",) and not done.finished
    assert contents(faces) == Counter({row: n for row, n in before.items() if row[0] != "zoe-private"})
    assert holds(faces.parent, "zoe-private") == []
    new = PackedDataset.open(faces)
    assert new.identities == ("ann", "zz") and new.fingerprint != old.fingerprint
    assert verify(faces, decode=True, num_workers=1).findings == ()
    (left,) = read_quarantine(faces, new.num_samples)
    assert (left.reason, new.sample_key(left.sample)) == ("ours", kept_key)
    assert kept_name.tolist() in np.asarray(new.name_hash_N2).tolist()
    kept = {path.name for path in faces.glob("*.tar")} & stamps.keys()
    assert len(kept) == len(stamps) - 2  # the others are the same files; the rewritten ones have other names
    assert all((faces / name).stat().st_ino == stamps[name][0] for name in kept)
    assert listed(faces.parent) == ["faces"]


def test_images_that_the_index_gives_to_another_go_with_who_is_in_their_id(faces: Path) -> None:
    """A label finding: .id says zoe-private, the index ann; in a shard of hers, and in one that holds nobody else's."""
    dataset = PackedDataset.open(faces)
    shards = dataset.index["shard"]
    hers = np.flatnonzero(dataset.index["label"] == 1).tolist()
    ann = np.flatnonzero(dataset.index["label"] == 0).tolist()
    beside = next(sample for sample in ann if shards[sample] in shards[hers])
    alone = next(sample for sample in ann[::-1] if shards[sample] not in shards[hers])
    unindexed = next(n for n in range(dataset.num_samples) if shards[n] not in [*shards[hers], shards[alone]])
    for sample in (beside, alone, unindexed):
        rename_id(dataset, sample, "zoe-private")
    kept = [n for n in range(dataset.num_samples) if n not in (*hers, beside, alone, unindexed)]
    sign_again(faces, lambda index, keys: None)
    assert {one.kind for one in verify(faces, num_workers=1).open_findings} == {"label"}
    payloads = [one.tobytes() for one in ShardReader(PackedDataset.open(faces)).read(np.array(kept))]
    done = remove(faces, ["zoe-private"], [])
    assert (done.num_samples, done.num_rewritten) == (5, len({*shards[hers], shards[alone], shards[unindexed]}))
    assert holds(faces.parent, "zoe-private") == []
    new = PackedDataset.open(faces)
    assert [one.tobytes() for one in ShardReader(new).read(np.arange(new.num_samples))] == payloads
    assert verify(faces, num_workers=1).findings == ()


def test_who_is_in_no_index_but_in_an_id_can_be_removed(faces: Path) -> None:
    rename_id(PackedDataset.open(faces), 0, "eve")
    sign_again(faces, lambda index, keys: None)
    assert remove(faces, ["eve"], []).num_samples == 1
    assert holds(faces.parent, "eve\0") == []


def test_reasons_of_those_who_stay_do_not_name_them_any_more(faces: Path) -> None:
    key = PackedDataset.open(faces).sample_key(9)
    reason = "label: the index says 'zz' (label 2); .cls says 'zoe-private', as in ann/0.jpg; not zoe-privately, zoe-private/1"
    write_quarantine(faces, [Quarantined(9, key, reason)])
    remove(faces, ["zoe-private"], ["ann/0.jpg"])
    (left,) = read_quarantine(faces, 16 - 3)
    expected = (
        "label: the index says 'zz' (label 2); .cls says '(removed)', as in (removed); not zoe-privately, (removed)/1"
    )
    assert left.reason == expected


def rename_id(dataset: PackedDataset, sample: int, identity: str) -> None:
    """Write another .id beside an image."""
    row = dataset.index[sample]
    path = dataset.shard_path(int(row["shard"]))
    tar = bytearray(path.read_bytes())
    (members,) = [one for one in in_samples(read_members(bytes(tar))) if row["offset"] in [two.offset for two in one]]
    (said,) = [one for one in members if one.ending == "id"]
    new = member_bytes(said.name, identity.encode())
    tar[said.offset - 512 : said.offset + 512] = new
    path.write_bytes(tar)


def test_files_for_other_readers_do_not_stay_behind(faces: Path) -> None:
    write_sidecars(PackedDataset.open(faces))
    remove(faces, ["zoe-private"], [])
    assert not (faces / "shards.json").exists()
    shards = {path.stem for path in faces.glob("*.tar")}
    assert {path.stem for path in faces.glob("*.idx")} <= shards


def test_lists_that_importing_left_do_not_name_them_any_more(faces: Path) -> None:
    (faces / "skipped.csv").write_text("name,identity,reason\nzoe-private/9.jpg,zoe-private,empty\nx/1.jpg,ann,empty\n")
    (faces / "pairs.csv").write_text("first,second,genuine\nann/0.jpg,zoe-private/1.jpg,0\nann/0.jpg,zz/0.jpg,0\n")
    assert remove(faces, ["zoe-private"], ["ann/5.jpg"]).others == ("notes.txt",)
    assert (faces / "skipped.csv").read_text() == "name,identity,reason\nx/1.jpg,ann,empty\n"
    assert (faces / "pairs.csv").read_text() == "first,second,genuine\nann/0.jpg,zz/0.jpg,0\n"
    assert holds(faces.parent, "zoe-private") == []


def test_images_go_by_name_and_by_member(faces: Path) -> None:
    dataset = PackedDataset.open(faces)
    before = contents(faces)
    done = remove(faces, [], ["ann/3.jpg", dataset.sample_key(15), "zoe-private/0.jpg", "zoe-private/1.jpg"])
    assert (done.num_samples, done.identities) == (4, ("zoe-private",))
    gone = before - contents(faces)
    assert {row[2] for row in gone} >= {int(hash_keys(["ann/3.jpg"])[0][0])} and gone.total() == 4
    again = remove(faces, [], ["000000000"])  # the ending may be left out
    assert again.num_samples == 1 and verify(faces, num_workers=1).findings == ()
    assert any(path.name.endswith("-r2.tar") for path in faces.glob("*.tar"))


def test_whole_shards_may_go(tmp_path: Path) -> None:
    images = [(key, f"{key}/{n}.jpg", jpeg(n)) for n, key in enumerate(["a"] * 8 + ["b"] * 4)]
    pack_images(images, ["a", "b"], 12, tmp_path / "faces", "faces", "source", shard_size_bytes=SHARD_BYTES)
    shards = len(PackedDataset.open(tmp_path / "faces").manifest.shards)
    remove(tmp_path / "faces", ["a"], [])
    left = PackedDataset.open(tmp_path / "faces")
    assert left.identities == ("b",) and len(left.manifest.shards) < shards - 1
    assert verify(tmp_path / "faces", num_workers=1).findings == ()


def test_refusals_change_nothing(faces: Path, two: tuple[Path, Path], tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in faces.iterdir()}
    with pytest.raises(DataError, match="has no 'nobody'"):
        remove(faces, ["zoe-private", "nobody"], [])
    with pytest.raises(DataError, match=r"has no 'ann/99\.jpg'"):
        remove(faces, [], ["ann/99.jpg"])
    with pytest.raises(DataError, match=r"nothing of .* would be left"):
        remove(faces, ["ann", "zoe-private", "zz"], [])
    assert {path.name: path.read_bytes() for path in faces.iterdir()} == before
    with edit._alone(faces), pytest.raises(RunError, match="another removal"):
        remove(faces, ["zz"], [])


def test_shards_elsewhere_are_left_to_their_owner(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = PackedDataset.open(faces)
    elsewhere = faces.parent / "shards"
    elsewhere.mkdir()
    for path in faces.glob("*.tar"):
        path.rename(elsewhere / path.name)
    text = (faces / "manifest.json").read_text().replace('"format"', '"root": "../shards",\n "format"', 1)
    (faces / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="lce data merge"):
        remove(faces, ["zoe-private"], [])
    assert dataset.num_samples == PackedDataset.open(faces).num_samples


def test_a_name_of_several_people_is_refused(tmp_path: Path) -> None:
    images = [(key, "0.jpg", jpeg(n)) for n, key in enumerate(("a", "b", "c"))]
    pack_images(images, ["a", "b", "c"], 3, tmp_path / "faces", "faces", "source")
    with pytest.raises(DataError, match="3 images of several identities"):
        remove(tmp_path / "faces", [], ["0.jpg"])


_AUDITED = ("open", "os.", "shutil.", "ctypes.dlsym", "fcntl.")


def child_removes(faces: Path, can_exchange: bool, killed_before: int | None, events: Path | None = None) -> bool:
    """Remove in a child that kills itself (SIGKILL) before a file operation of that number; returns whether it was killed.

    events: a file that gets the operations, one a line.
    """
    child = os.fork()
    if child == 0:
        if not can_exchange:
            edit._exchange = lambda one, other: False  # as on a file system without it
        seen: list[str] = []

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            if name.startswith(_AUDITED):
                seen.append(f"{name} {arguments}")
                if len(seen) - 1 == killed_before:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            remove(faces, ["zoe-private"], [])
            if events is not None:
                events.write_text("\n".join(seen))
        except BaseException:  # noqa: BLE001 (a child must not go on as a second pytest)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_killed_at_any_moment_it_finishes_and_nobody_comes_back(tmp_path: Path, can_exchange: bool) -> None:
    """Before every seventh file operation, and every one around the moment in which the folders change places."""
    if can_exchange and not edit._exchange(*_two_folders(tmp_path)):
        pytest.skip("this file system cannot exchange folders")
    faces = pack(tmp_path / "store" / "faces", {"ann": 2, "zoe-private": 2, "zz": 3})
    whole = contents(faces)
    without = Counter({row: n for row, n in whole.items() if row[0] != "zoe-private"})
    counted = Path(shutil.copytree(faces, tmp_path / "counted" / "faces"))
    child_removes(counted, can_exchange, None, tmp_path / "events.txt")
    assert contents(counted) == without
    events = (tmp_path / "events.txt").read_text().splitlines()
    switch = max(n for n, event in enumerate(events) if "os.rename" in event)
    assert "removal" in events[switch]
    moments = sorted({*range(0, len(events), 7), *range(switch - 3, switch + 4), len(events) - 2})
    states = []
    for moment in moments:
        copy = Path(shutil.copytree(faces, tmp_path / "now" / "faces"))
        assert child_removes(copy, can_exchange, moment)
        if not copy.exists():
            states.append("missing")
        else:
            states.append("whole" if contents(copy) == whole else "without" if contents(copy) == without else "broken")
        if holds(copy.parent, "zoe-private") or listed(copy.parent) != ["faces"]:
            assert remove(copy, ["zoe-private"], []).finished or states[-1] == "whole"
        assert contents(copy) == without and holds(copy.parent, "zoe-private") == []
        assert listed(copy.parent) == ["faces"]
        shutil.rmtree(copy.parent)
    turn = ["whole"] * states.count("whole") + ["missing"] * (not can_exchange)
    assert states == turn + ["without"] * (len(states) - len(turn))  # never back
    assert min(states.count("whole"), states.count("without")) > 2


def _two_folders(place: Path) -> tuple[Path, Path]:
    one, other = place / "one", place / "other"
    one.mkdir()
    other.mkdir()
    return one, other


def test_the_commands_say_what_they_did(
    faces: Path, two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["data", "merge", str(two[0]), str(two[1]), str(out), "--prefix", "--shard-mb", "1"]) == 0
    assert "14 images of 4 identities" in capsys.readouterr().out
    assert main(["data", "remove", str(faces), "--identity", "zoe-private"]) == 0
    told = capsys.readouterr().out
    assert "2 images and 1 identities removed" in told and "lce head shrink" in told and "snapshots, backups" in told
    assert "notes.txt" in told
    names = tmp_path / "images.txt"
    names.write_text("ann/0.jpg\n\nann/0.jpg\n")
    assert main(["data", "remove", str(faces), "--keys", str(names), "--json", "-"]) == 0
    assert '"num_samples": 1' in capsys.readouterr().out
    for arguments, word in (
        (["merge", str(two[0]), str(tmp_path / "x")], "needs two data sets"),
        (["merge", str(two[0]), str(two[0]), str(tmp_path / "x"), "--prefix"], "two folders are called 'a'"),
        (["merge", str(two[0]), str(two[1]), str(tmp_path / "x"), "--name", "a/b"], "--name is 'a/b'"),
        (["remove", str(faces)], "--identity KEY or --keys FILE"),
        (["remove", str(tmp_path / "nothing"), "--identity", "a"], "does not exist"),
    ):
        assert main(["data", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert word in error and "\n" not in error


def test_a_line_of_a_list_is_a_whole_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A blank at its ends is part of it: without, it may be the name of somebody else."""
    faces = pack(tmp_path / "faces", {" anna": 2, "anna": 2, "x\u2028y": 2})
    names = tmp_path / "names.txt"
    names.write_text(" anna/0.jpg\r\n\nx\u2028y/1.jpg\n", encoding="utf-8-sig")  # as an editor on Windows saves it
    assert main(["data", "remove", str(faces), "--keys", str(names)]) == 0
    left = {name for _, _, name in contents(faces)}
    assert left == set(hash_keys([" anna/1.jpg", "anna/0.jpg", "anna/1.jpg", "x\u2028y/0.jpg"])[:, 0].tolist())
    names.write_text("anna/0.jpg \n")
    assert main(["data", "remove", str(faces), "--keys", str(names)]) == 2
    assert "has no 'anna/0.jpg '" in capsys.readouterr().err


def test_a_map_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    table = tmp_path / "map.csv"
    table.write_text("set,key,identity\nfaces,a,zoe\n", encoding="utf-8-sig")
    assert read_identity_map(table, [tmp_path / "faces"]) == {(0, "a"): "zoe"}
