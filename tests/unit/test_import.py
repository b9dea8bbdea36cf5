"""Importing folders and archives: against a slow twin, webdataset and tarfile; killed at any moment; bad images; settings."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from launch.cli import main
from lce_dist.errors import DataError
from lce_dist.keys import hash_keys
from pipelines.folders import FileSource, open_folder
from pipelines.images import ImageRules, as_jpeg, check_decodes
from pipelines.importable import Texts
from pipelines.importing import Batch, ImportSettings, TarStream, import_images, make_plan
from pipelines.jpeg import is_plain_jpeg
from pipelines.manifest import PackedDataset, verify_checksums
from pipelines.order import derive_key, permute
from pipelines.reading import ShardReader
from pipelines.units import locked


def encoded(
    shade: int, kind: str = "JPEG", size: tuple[int, int] = (24, 20), mode: str = "RGB", **options: object
) -> bytes:
    ramp = np.linspace(0, 120, size[0] * size[1] * 3).reshape(size[1], size[0], 3) + shade % 130
    file = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    source = tmp_path / "photos"
    for number, folder in enumerate(["Greek/alpha", "Greek/beta", "solo", "späte"]):
        (source / folder).mkdir(parents=True)
        for shot in range(5 + number):
            (source / folder / f"{shot}.jpg").write_bytes(encoded(number * 20 + shot))
    (source / "solo" / "drawn.png").write_bytes(encoded(9, "PNG"))
    return source


def zipped(tree: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(tree.rglob("*")):
            archive.write(file, file.relative_to(tree).as_posix())
    return path


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


SMALL = ImportSettings(shard_bytes=20_000)


def test_what_is_packed_is_what_a_plain_loop_packs(tree: Path, tmp_path: Path) -> None:
    dataset = import_images(open_folder(tree), tmp_path / "out", SMALL, 1).dataset
    files = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*.*"))
    files.sort(key=lambda file: (file.rpartition("/")[0], file))
    order = permute(np.arange(len(files)), len(files), derive_key(0, len(files))).tolist()
    identities = sorted({file.rpartition("/")[0] for file in files})
    assert dataset.identities == tuple(identities)
    expected = [(files[place], identities.index(files[place].rpartition("/")[0])) for place in order]
    payloads = ShardReader(dataset).read(np.arange(len(files)))
    assert [bytes(one) for one in payloads] == [as_jpeg((tree / file).read_bytes(), file) for file, _ in expected]
    assert dataset.index["label"].tolist() == [label for _, label in expected]
    assert dataset.name_hash_N2 is not None
    assert np.array_equal(dataset.name_hash_N2, hash_keys([file for file, _ in expected]))
    assert len(dataset.manifest.shards) > 3
    assert all(shard.size_bytes <= 20_000 + 2 * 10240 for shard in dataset.manifest.shards)
    verify_checksums(dataset)


def test_folders_come_in_the_order_of_their_whole_paths(tmp_path: Path) -> None:
    """The walk meets a/x before "a b"; sorted, a space comes before the slash."""
    for number, folder in enumerate(["a/x", "a b", "a", "b"]):
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        for shot in range(2):
            (tmp_path / "in" / folder / f"{shot}.jpg").write_bytes(encoded(10 * number + shot))
    found = open_folder(tmp_path / "in")
    keys = [found.identities[label] for label in range(4)]
    assert keys == sorted(keys) == ["a", "a b", "a/x", "b"]
    paths = [found.paths[number] for number in range(8)]
    assert paths == [f"{key}/{shot}.jpg" for key in keys for shot in range(2)]
    assert found.label_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for number, path in enumerate(paths):
        assert found.read(number) == (tmp_path / "in" / path).read_bytes()
        assert found.bytes_N[number] == len(found.read(number))
    archive = open_folder(zipped(tmp_path / "in", tmp_path / "t.zip"))
    assert [archive.paths[number] for number in range(8)] == paths


def test_webdataset_and_tarfile_read_the_shards(tree: Path, tmp_path: Path) -> None:
    dataset = import_images(open_folder(tree), tmp_path / "out", SMALL, 1).dataset
    shards = [str(dataset.shard_path(number)) for number in range(len(dataset.manifest.shards))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["jpg"] for sample in samples] == [
        bytes(one) for one in ShardReader(dataset).read(np.arange(dataset.num_samples))
    ]
    assert [int(sample["cls"]) for sample in samples] == dataset.index["label"].tolist()
    assert [sample["id"].decode() for sample in samples] == [dataset.identities[row] for row in dataset.index["label"]]
    found = []
    for number, shard in enumerate(shards):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
        assert {(member.mode, member.mtime, member.uid, member.type) for member in members} == {(0o444, 0, 0, b"0")}
        found += [(number, one.offset_data, one.size) for one in members if one.name.endswith(".jpg")]
    assert dataset.index[["shard", "offset", "size"]].tolist() == found


def test_many_headers_at_once_are_those_of_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    batch = Batch(
        [0, 7, 123456789, 999999999],
        [0, 10**9, 5, 2**40],
        ["a", "späte/" * 50, "x" * 512, "b"],
        [rng.bytes(size) for size in (1, 512, 513, 70_000)],
    )
    fast, slow = (tmp_path / "fast.tar").open("wb", buffering=0), (tmp_path / "slow.tar").open("wb", buffering=0)
    with fast, slow:
        one, other = TarStream(fast), TarStream(slow)
        for _ in range(2):
            assert one.add_samples(batch).tolist() == other.add_samples_one_by_one(batch).tolist()
        assert one.close() == other.close()
    assert (tmp_path / "fast.tar").read_bytes() == (tmp_path / "slow.tar").read_bytes()


def test_a_key_longer_than_a_block(tmp_path: Path) -> None:
    key = "/".join(["k" * 100] * 7)
    (tmp_path / "in" / key).mkdir(parents=True)
    (tmp_path / "in" / key / "1.jpg").write_bytes(encoded(1))
    dataset = import_images(open_folder(tmp_path / "in"), tmp_path / "out", SMALL, 1).dataset
    [sample] = webdataset.WebDataset([str(dataset.shard_path(0))], shardshuffle=False)
    assert sample["id"].decode() == key and sample["jpg"] == encoded(1)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_gives_the_bytes_of_its_folder_on_any_number_of_workers(
    tree: Path, tmp_path: Path, method: int
) -> None:
    import_images(open_folder(tree), tmp_path / "a", SMALL, 1)
    archive = zipped(tree, tmp_path / "t.zip", method)
    import_images(open_folder(archive), tmp_path / "b", SMALL, 1 if method else 2)
    one, other = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert one.pop("manifest.json") != other.pop("manifest.json")  # it names the source
    assert one == other
    assert not list(tmp_path.glob("*.importing"))


def test_a_damaged_member_of_an_archive_is_named(tree: Path, tmp_path: Path) -> None:
    archive = zipped(tree, tmp_path / "t.zip", zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    place = content.index((tree / "solo" / "1.jpg").read_bytes())
    content[place + 300] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot give solo/1.jpg \(its checksum differs\).*--bad skip"):
        import_images(open_folder(archive), tmp_path / "out", SMALL, 1)


_RUN = """
import sys
from pathlib import Path
from typing import Any
from pipelines.folders import open_folder
from pipelines.importing import ImportSettings, import_images
print("begins", flush=True)
import_images(open_folder(Path(sys.argv[1])), Path(sys.argv[2]), ImportSettings(shard_bytes=300_000), int(sys.argv[3]))
"""


def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes_and_repeats_no_finished_shard(tmp_path: Path) -> None:
    source, out, work = tmp_path / "photos", tmp_path / "out", tmp_path / "out.importing"
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (160, 160, 3), dtype=np.uint8)
    for number in range(900):
        (source / f"{number // 9:03d}").mkdir(parents=True, exist_ok=True)
        image = io.BytesIO()
        Image.fromarray(np.roll(noise, number, axis=1)).save(image, "JPEG", quality=70)
        (source / f"{number // 9:03d}" / f"{number}.jpg").write_bytes(image.getvalue())
    undisturbed = import_images(open_folder(source), tmp_path / "calm", ImportSettings(shard_bytes=300_000), 1)
    assert len(undisturbed.dataset.manifest.shards) > 20
    moments, kills, seen = random.Random(5), 0, []
    finished: dict[str, int] = {}
    while kills < 10:
        workers = "2" if kills % 5 == 4 else "1"
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(source), str(out), workers], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        before, more = len(list(work.glob("records-0/*.npz"))), moments.randrange(4)
        while process.poll() is None and len(list(work.glob("records-0/*.npz"))) < before + more:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.communicate()
        if out.exists():  # it was quicker than the kill: once more from the start
            assert hashes(out) == hashes(tmp_path / "calm")
            shutil.rmtree(out)
            shutil.rmtree(work, ignore_errors=True)
            finished = {}
            continue
        kills += 1
        assert process.returncode == -signal.SIGKILL
        records = {path.stem for path in work.glob("records-0/*.npz")}
        assert finished.keys() <= records
        finished.update({stem: (work / "data" / f"images-{stem}.tar").stat().st_ino for stem in records})
        seen.append(len(records))
    assert len(set(seen)) > 3, f"the kills came too early or too late to matter: {seen} shards were done"
    subprocess.run([sys.executable, "-c", _RUN, str(source), str(out), "1"], check=True)
    assert hashes(out) == hashes(tmp_path / "calm")
    assert {stem: (out / f"images-{stem}.tar").stat().st_ino for stem in finished} == finished
    assert not work.exists()


def test_a_shard_that_shrank_is_done_again_and_an_unfinished_import_is_of_one_source(
    tree: Path, tmp_path: Path
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.importing"
    broken = tree / "späte" / "0.jpg"
    broken.write_bytes(encoded(1)[:300])
    with pytest.raises(DataError, match=r"späte/0.jpg cannot be decoded"):
        import_images(open_folder(tree), out, SMALL, 1)
    done = sorted(work.glob("data/*.tar"))
    assert done and not out.exists()
    done[0].write_bytes(done[0].read_bytes()[:-512])
    with pytest.raises(DataError, match=r"out.importing holds an unfinished import of another source"):
        import_images(open_folder(tree), out, ImportSettings(shard_bytes=20_000, seed=1), 1)
    imported = import_images(open_folder(tree), out, ImportSettings(shard_bytes=20_000, skip_bad=True), 1)
    assert imported.num_shards_found == len(done) - 1
    verify_checksums(imported.dataset)
    again = import_images(open_folder(tree), out, ImportSettings(shard_bytes=20_000, skip_bad=True), 1)
    assert again.num_skipped == 1 and again.dataset.fingerprint == imported.dataset.fingerprint
    with pytest.raises(DataError, match="already holds a data set 'images' from another source"):
        import_images(open_folder(tree), out, ImportSettings(seed=3), 1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_images_are_left_out_and_listed_and_so_is_who_has_no_other(
    tree: Path, tmp_path: Path, num_workers: int
) -> None:
    for shot in range(5):
        (tree / "Greek" / "alpha" / f"{shot}.jpg").write_bytes(b"no image")
    (tree / "solo" / "1.jpg").write_bytes(encoded(1)[:300])
    skipping = ImportSettings(shard_bytes=20_000, skip_bad=True)
    imported = import_images(open_folder(tree), tmp_path / "out", skipping, num_workers)
    assert imported.dropped_identities == ("Greek/alpha",) and imported.num_skipped == 6
    assert imported.dataset.identities == ("Greek/beta", "solo", "späte")
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "identity", "reason"]
    assert [row[:2] for row in rows[1:]] == [[f"Greek/alpha/{n}.jpg", "Greek/alpha"] for n in range(5)] + [
        ["solo/1.jpg", "solo"]
    ]
    dataset = PackedDataset.open(tmp_path / "out")
    shards = [str(dataset.shard_path(number)) for number in range(len(dataset.manifest.shards))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [dataset.identities[int(one["cls"])] for one in samples] == [one["id"].decode() for one in samples]
    assert len(samples) == dataset.num_samples == 26 + 1 - 6


def test_a_folder_that_cannot_be_listed_is_not_passed_over(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.scandir

    def refused(path: str) -> Any:
        if Path(path).name == "solo":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refused)
    assert main(["data", "import", str(tree), str(tmp_path / "out"), "--workers", "1", "--bad", "skip"]) == 2
    assert "solo cannot be listed (Permission denied); make it readable" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_links_to_nothing_and_empty_folders_follow_the_policy(
    tree: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, broken = tree, kind == "folder"
    (tree / "nobody" / "inside").mkdir(parents=True)
    if broken:
        (tree / "solo" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    else:
        source = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", tree))
    arguments = ["data", "import", str(source), str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 2
    expected = "gone.jpg cannot be read" if broken else "nobody holds no images (an empty class)"
    assert expected in capsys.readouterr().err
    assert main([*arguments, "--bad", "skip"]) == 0
    told = capsys.readouterr().out
    assert (
        "27 images of 4 identities" in told
        and "2 folders without images were passed over: nobody, nobody/inside" in told
    )
    assert ("1 left out" in told) is broken
    if broken:
        with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
            ((name, identity, reason),) = list(csv.reader(file))[1:]
        assert (name, identity) == ("solo/gone.jpg", "solo") and "No such file" in reason


def test_another_process_with_the_same_output_is_told(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.units._LOCK_PATIENCE_S", 0.1)
    (tmp_path / "out.importing").mkdir()
    with locked(tmp_path / "out.importing" / "lock", "x"), pytest.raises(DataError, match="written by another process"):
        import_images(open_folder(tree), tmp_path / "out", SMALL, 1)


def test_a_full_disk_says_so_and_loses_nothing(tree: Path, tmp_path: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12_000,) * 2); " + _RUN
    full = subprocess.run(
        [sys.executable, "-c", code, str(tree), str(tmp_path / "out"), "1"], capture_output=True, text=True
    )
    assert "SetupError: importing into" in full.stderr and "run again: finished shards are kept" in full.stderr
    import_images(open_folder(tree), tmp_path / "out", ImportSettings(shard_bytes=300_000), 1)


def test_a_killed_worker_is_reported(tree: Path, tmp_path: Path) -> None:
    code = (
        _RUN.replace("import sys\n", "import sys, os\n")
        .replace(
            "import_images(open",
            "class Deadly(type(open_folder(Path(sys.argv[1])))):\n"
            "    def read(self, number): os.kill(os.getpid(), 9)\n"
            "import dataclasses, __main__\n"
            "source = open_folder(Path(sys.argv[1]))\n"
            "source = Deadly(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source)})\n"
            "if __name__ == '__main__': import_images(open",
            1,
        )
        .replace("open_folder(Path(sys.argv[1])), Path", "source, Path")
        .replace("300_000", "9_000")
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    ended = subprocess.run(
        [sys.executable, str(script), str(tree), str(tmp_path / "out"), "2"],
        capture_output=True, text=True, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert "a worker process ended by signal SIGKILL" in ended.stderr, ended.stderr


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60),
    shard_bytes=st.integers(1, 40_000),
    seed=st.integers(0, 9),
    groups=st.none() | st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_holds_every_image_once(sizes: list[int], shard_bytes: int, seed: int, groups: int | None) -> None:
    count = len(sizes)
    group_N = None if groups is None else np.sort(np.arange(count) % groups)
    zeros = np.zeros(count, dtype=np.int64)
    source = FileSource("x", "x", Texts.of(["a"]), zeros, np.array(sizes), ".", Texts.of("a" * count), group_N)  # type: ignore[arg-type]
    plan = make_plan(source, shard_bytes, seed)
    assert sorted(plan.order_M.tolist()) == list(range(count))
    assert plan.first_S1[0] == 0 and plan.first_S1[-1] == count and (np.diff(plan.first_S1) > 0).all()
    assert plan.unit_U1[0] == 0 and plan.unit_U1[-1] == plan.num_shards and (np.diff(plan.unit_U1) > 0).all()
    in_tar = 2560 + -(-np.array(sizes) // 512) * 512
    for first, end in zip(plan.first_S1, plan.first_S1[1:], strict=False):
        assert in_tar[plan.order_M[first:end]].sum() <= shard_bytes + in_tar.max()
    if group_N is not None:  # a group is read by one unit of work
        unit_of = np.searchsorted(plan.first_S1[plan.unit_U1], np.arange(count), side="right")
        for group in np.unique(group_N):
            assert len(set(unit_of[np.isin(plan.order_M, np.flatnonzero(group_N == group))].tolist())) == 1


def test_every_image_file_is_an_image_and_others_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "photos"
    for person in ("ann", "bob"):
        (source / person).mkdir(parents=True)
    kinds = {"a.tiff": "TIFF", "b.jp2": "JPEG2000", "c.jfif": "JPEG", "d.ppm": "PPM", "e.gif": "GIF", "f.avif": "AVIF"}
    for name, kind in kinds.items():
        (source / "ann" / name).write_bytes(encoded(7, kind))
    (source / "bob" / "g.jpg").write_bytes(encoded(8))
    (source / "bob" / "h.HEIC").write_bytes(b"ftypheic" * 9)
    for name in ("notes.txt", "more.txt", ".DS_Store", "Thumbs.db"):
        (source / "bob" / name).write_bytes(b"x")
    for images, place in ((source, "a"), (zipped(source, tmp_path / "t.zip"), "b")):
        out = tmp_path / place
        assert main(["data", "import", str(images), str(out), "--workers", "1"]) == 2
        assert "h.HEIC cannot be decoded" in capsys.readouterr().err
        assert main(["data", "import", str(images), str(out), "--workers", "1", "--bad", "skip", "--json", "-"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert (values["samples"], values["identities"], values["skipped"]) == (7, 2, 1)
        assert values["notes"] == ["3 files that are no images were passed over: .txt (2), .db (1)"]
        assert "bob/h.HEIC,bob," in (out / "skipped.csv").read_text()
        assert main(["data", "import", str(images), str(out), "--workers", "1", "--bad", "skip"]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert "7 images of 2 identities in 1 shards; 1 left out, see " in last and last.endswith(".txt (2), .db (1)")
    assert all(bytes(one).startswith(b"\xff\xd8") for one in ShardReader(PackedDataset.open(out)).read(np.arange(7)))


def test_who_waited_for_another_import_opens_what_it_made(tree: Path, tmp_path: Path) -> None:
    import_images(open_folder(tree), tmp_path / "made", SMALL, 1)
    work = tmp_path / "out.importing"
    work.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with locked(work / "lock", "x"):
            second = pool.submit(import_images, open_folder(tree), tmp_path / "out", SMALL, 1)
            time.sleep(0.5)
            assert not second.done()
            (tmp_path / "made").rename(tmp_path / "out")
            shutil.rmtree(work)
        found = second.result()
    assert found.dataset.num_samples == 27 and found.num_shards_found == len(found.dataset.manifest.shards)


def test_size_and_quality(tmp_path: Path) -> None:
    large, grey = encoded(3, size=(300, 200)), encoded(3, size=(40, 60), mode="L")
    shrunk = Image.open(io.BytesIO(as_jpeg(large, "x", size=100)))
    assert (shrunk.size, shrunk.format, shrunk.mode) == ((150, 100), "JPEG", "RGB")
    assert as_jpeg(large, "x", size=200) is large and as_jpeg(grey, "x", size=112) is grey
    again = Image.open(io.BytesIO(as_jpeg(grey, "x", quality=30)))
    assert (
        again.mode == "L"
        and again.size == (40, 60)
        and len(as_jpeg(grey, "x", quality=10)) < len(as_jpeg(grey, "x", quality=90))
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    turned = encoded(3, size=(60, 40), exif=exif)
    assert as_jpeg(turned, "x") is turned
    assert Image.open(io.BytesIO(as_jpeg(turned, "x", size=30))).size == (30, 45)


def test_headers_tell_what_passes_untouched(tree: Path) -> None:
    plain = [encoded(1), encoded(1, mode="L"), encoded(1, progressive=True), encoded(1, exif=b"Exif\0\0" + bytes(40))]
    assert all(is_plain_jpeg(one) for one in plain)
    others = [
        encoded(1, mode="CMYK"),
        encoded(1, "PNG"),
        b"",
        b"\xff\xd8",
        encoded(1)[:20],
        b"\xff\xd8\xff\xd9" + bytes(20),
    ]
    assert not any(is_plain_jpeg(one) for one in others)
    trusting = ImageRules(check="none")
    assert trusting.apply(encoded(1)[:-200], "x") == encoded(1)[:-200]
    for one in (encoded(1, mode="CMYK"), encoded(1, "PNG")):
        assert is_plain_jpeg(trusting.apply(one, "x"))
    with pytest.raises(DataError, match="image x cannot be decoded"):
        trusting.apply(b"", "x")


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_quick_check_finds_what_full_decoding_finds(seed: int, progressive: bool, cut: bool) -> None:
    rng = np.random.default_rng(seed)
    payload = bytearray(encoded(seed, size=(64, 48), progressive=progressive))
    if cut:
        del payload[rng.integers(0, len(payload)) :]
    else:
        payload[rng.integers(0, len(payload))] ^= 1 << rng.integers(0, 8)

    def fails(check: object) -> bool:
        try:
            check(bytes(payload))  # type: ignore[operator]
        except Exception:  # noqa: BLE001
            return True
        return False

    full = fails(lambda raw: Image.open(io.BytesIO(raw)).load())
    assert fails(lambda raw: check_decodes(raw, "x")) == full
    assert fails(lambda raw: as_jpeg(raw, "x")) == full


def test_texts() -> None:
    words = ["", "a", "späte", "\udc80broken", "x" * 1000]
    texts = Texts.of(words)
    assert [texts[number] for number in range(len(texts))] == words


def test_the_command(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "import", str(tree), str(out), "--workers", "1", "--name", "faces"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == f"{out}: 27 images of 4 identities in 1 shards"
    assert "importing: 27/27" in told.err
    assert PackedDataset.open(out).manifest.shards[0].file == "faces-000000.tar"
    for flags, error in (
        (["--workers", "0"], "--workers is 0; must be at least 1"),
        (["--shard-mb", "0"], "--shard-mb is 0; must be at least 1"),
        (["--quality", "101"], "--quality is 101; must be 1 to 100"),
        (["--size", "0"], "--size is 0; must be at least 1 pixel"),
        (["--name", "../x"], "--name is '../x'; must match"),
        (["--label-key", "x"], "--label-key is 'x'; it is for webdataset, and this is folder"),
    ):
        assert main(["data", "import", str(tree), str(tmp_path / "b"), *flags]) == 2
        assert error in capsys.readouterr().err
    assert main(["data", "import", str(tmp_path / "gone"), str(tmp_path / "b")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
