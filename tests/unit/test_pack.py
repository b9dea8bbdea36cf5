"""Packing against tarfile, webdataset and Pillow as readers, and every refusal before anything is published."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from lce_dist.errors import DataError, SetupError
from pipelines.manifest import verify_checksums
from pipelines.pack import as_jpeg, pack_folder, pack_images

Encode = Callable[..., bytes]


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def photo(shade: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    ramp = np.linspace(0, 120, size[0] * size[1] * 3).reshape(size[1], size[0], 3) + shade
    return Image.fromarray(ramp.astype(np.uint8))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    source = tmp_path / "photos"
    for number, folder in enumerate(["Greek/alpha", "Greek/beta", "solo", "späte"]):
        (source / folder).mkdir(parents=True)
        for shot in range(3 + number):
            (source / folder / f"{shot}.jpg").write_bytes(encode(photo(number * 20 + shot)))
    (source / "solo" / "drawn.PNG").write_bytes(encode(photo(9), "PNG"))
    (source / "README.txt").write_text("not an image")
    (source / ".git").mkdir()
    (source / "solo" / "._0.jpg").write_bytes(b"left by a file manager")
    return source


def zipped(tree: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("."), b"")  # as some programs begin an archive
        for file in sorted(tree.rglob("*")):
            archive.write(file, file.relative_to(tree).as_posix())
    return path


@pytest.mark.parametrize("shard_size_bytes", [10**9, 5000])
def test_the_index_points_at_the_payloads_that_tarfile_finds(tree: Path, tmp_path: Path, shard_size_bytes: int) -> None:
    dataset = pack_folder(tree, tmp_path / "out", "faces", shard_size_bytes=shard_size_bytes)
    assert dataset.identities == ("Greek/alpha", "Greek/beta", "solo", "späte")
    assert dataset.num_samples == 3 + 4 + 5 + 6 + 1
    assert (len(dataset.manifest.shards) > 2) == (shard_size_bytes == 5000)
    found = []
    for number, shard in enumerate(dataset.manifest.shards):
        with tarfile.open(dataset.directory / shard.file) as tar:
            members = tar.getmembers()
            labels = [int(tar.extractfile(m).read()) for m in members if m.name.endswith(".cls")]  # type: ignore[union-attr]
        images = [member for member in members if member.name.endswith(".jpg")]
        assert len(images) == len(labels) == shard.num_samples
        found += [(number, m.offset_data, m.size, label) for m, label in zip(images, labels, strict=True)]
    assert dataset.index.tolist() == found
    verify_checksums(dataset)


def test_webdataset_reads_the_shards_and_jpegs_pass_untouched(tree: Path, tmp_path: Path) -> None:
    dataset = pack_folder(tree, tmp_path / "out", "faces", shard_size_bytes=5000)
    shards = [str(dataset.shard_path(number)) for number in range(len(dataset.manifest.shards))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    originals: dict[str, set[bytes]] = {}
    for file in tree.rglob("[0-9].jpg"):
        originals.setdefault(file.parent.relative_to(tree).as_posix(), set()).add(file.read_bytes())
    seen: dict[str, set[bytes]] = {}
    for sample in samples:
        seen.setdefault(dataset.identities[int(sample["cls"])], set()).add(sample["jpg"])
    drawn = seen["solo"] - originals["solo"]
    seen["solo"] -= drawn
    assert seen == originals
    assert len(drawn) == 1
    with Image.open(io.BytesIO(drawn.pop())) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(image).astype(int) - np.asarray(photo(9)).astype(int)).max() < 12


def test_a_zip_gives_the_same_shards_as_its_folder(tree: Path, tmp_path: Path) -> None:
    from_folder = pack_folder(tree, tmp_path / "a", "faces", seed=5, shard_size_bytes=5000)
    from_zip = pack_folder(zipped(tree, tmp_path / "t.zip"), tmp_path / "b", "faces", seed=5, shard_size_bytes=5000)
    assert from_folder.fingerprint == from_zip.fingerprint
    for shard in from_folder.manifest.shards:
        assert (tmp_path / "a" / shard.file).read_bytes() == (tmp_path / "b" / shard.file).read_bytes()
    other_seed = pack_folder(tree, tmp_path / "c", "faces", seed=6, shard_size_bytes=5000)
    assert other_seed.fingerprint != from_folder.fingerprint
    assert sorted(other_seed.index["label"].tolist()) == sorted(from_folder.index["label"].tolist())


def test_a_second_run_reuses_and_other_arguments_are_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    calls: list[tuple[int, int]] = []
    pack_folder(tree, out, "faces", progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (1, 19) and calls[-1] == (19, 19) and len(calls) == 19
    before = (out / "manifest.json").stat().st_mtime_ns
    again = pack_folder(tree, out, "faces", progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 19 and again.num_samples == 19
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="already holds a data set 'faces' from another source"):
        pack_folder(tree, out, "faces", seed=1)
    (tree / "solo" / "new.jpg").write_bytes(encode(photo(3)))
    with pytest.raises(DataError, match=r"already holds .* \(19 images of 4 identities\)"):
        pack_folder(tree, out, "faces")


def test_a_foreign_folder_is_never_overwritten(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is no packed data set"):
        pack_folder(tree, tmp_path / "mine", "faces")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert pack_folder(tree, tmp_path / "empty", "faces").num_samples == 19


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_one_finishes(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom pipelines.pack import pack_images\n"
        "def images():\n"
        "    for number in range(100):\n"
        "        yield 'a', str(number), b'x' * 600\n"
        "        if number == 50:\n"
        "            print('half', flush=True)\n"
        "            time.sleep(60)\n"
        "pack_images(images(), ['a'], 100, Path(sys.argv[1]), 'faces', 's', shard_size_bytes=4000)\n"
    )
    out = tmp_path / "out"
    worker = subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, cwd=Path.cwd())
    assert worker.stdout is not None and worker.stdout.readline() == b"half\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    images = [("a", str(number), b"x" * 600) for number in range(100)]
    dataset = pack_images(images, ["a"], 100, out, "faces", "s", shard_size_bytes=4000)
    fresh = pack_images(images, ["a"], 100, tmp_path / "fresh", "faces", "s", shard_size_bytes=4000)
    assert dataset.fingerprint == fresh.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def broken_tree(tree: Path, fault: str) -> Path:
    if fault == "missing":
        return tree / "nowhere"
    if fault == "not an archive":
        return tree / "README.txt"
    if fault == "no images":
        shutil.rmtree(tree)
        tree.mkdir()
    if fault == "empty class":
        (tree / "Greek" / "gamma").mkdir()
        (tree / "Greek" / "gamma" / "notes.txt").write_text("x")
    if fault == "image at the top":
        (tree / "stray.jpg").write_bytes(encode(photo(0)))
    if fault == "truncated":
        (tree / "solo" / "1.jpg").write_bytes((tree / "solo" / "1.jpg").read_bytes()[:-60])
    if fault == "junk":
        (tree / "solo" / "1.jpg").write_bytes(b"this is no image")
    if fault == "empty file":
        (tree / "solo" / "1.jpg").write_bytes(b"")
    if fault == "key with a line break":
        (tree / "two\nlines").mkdir()
        (tree / "two\nlines" / "0.jpg").write_bytes(encode(photo(0)))
    return tree


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("missing", "nowhere does not exist"),
        ("not an archive", "is no folder and no .zip"),
        ("no images", "holds no images"),
        ("empty class", "Greek/gamma holds no images (an empty class)"),
        ("image at the top", "stray.jpg lies in no sub-folder"),
        ("truncated", "solo/1.jpg cannot be decoded (Truncated File Read)"),
        ("junk", "solo/1.jpg cannot be decoded (cannot identify image file)"),
        ("empty file", "solo/1.jpg cannot be decoded"),
        ("key with a line break", "'two\\nlines' must be UTF-8 text without control characters"),
    ],
)
def test_each_bad_source_is_named_and_nothing_is_published(
    tree: Path, tmp_path: Path, fault: str, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        pack_folder(broken_tree(tree, fault), tmp_path / "out", "faces")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def archive_with(path: Path, member: str, payload: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ok/0.jpg", encode(photo(0)))
        archive.writestr(member, payload)
    return path


@pytest.mark.parametrize("member", ["../evil.jpg", "/etc/evil.jpg", "ok/../../evil.jpg", "ok\\..\\evil.jpg"])
def test_a_zip_member_that_leaves_its_folder_is_refused(tmp_path: Path, member: str) -> None:
    with pytest.raises(DataError, match="leaves its folder"):
        pack_folder(archive_with(tmp_path / "t.zip", member), tmp_path / "out", "faces")


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.jpg", bytes(65 * 2**20))
    with pytest.raises(DataError, match=r"t\.zip/a/0\.jpg is 68157440 bytes; must be at most 67108864"):
        pack_folder(path, tmp_path / "out", "faces")


def test_an_empty_folder_in_a_zip_is_an_empty_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hollow holds no images"):
        pack_folder(archive_with(tmp_path / "t.zip", "hollow/", b""), tmp_path / "out", "faces")


def test_a_damaged_zip_member_is_named(tmp_path: Path) -> None:
    path = archive_with(tmp_path / "t.zip", "ok/1.jpg", encode(photo(1)))
    contents = bytearray(path.read_bytes())
    contents[200] ^= 0xFF  # inside the first member's payload
    path.write_bytes(bytes(contents))
    with pytest.raises(DataError, match=r"cannot give ok/0\.jpg \(Bad CRC-32"):
        pack_folder(path, tmp_path / "out", "faces")


def test_a_huge_image_is_refused_by_its_header() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="is 9000 x 9000 pixels; must be at most"):
        as_jpeg(encode(Image.new("1", (9000, 9000)), "PNG"), "big.png")
    assert time.monotonic() - started < 20


def grey16() -> Image.Image:
    return Image.fromarray(np.full((8, 8), 0x8042, dtype=np.uint16))


def palette() -> Image.Image:
    return Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)


def half_transparent() -> Image.Image:
    return Image.new("RGBA", (8, 8), (255, 0, 0, 128))


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (encode(palette(), "PNG"), (10, 200, 30)),
        (encode(palette(), "GIF"), (10, 200, 30)),
        (encode(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
        (encode(Image.new("1", (8, 8), 0), "BMP"), (0, 0, 0)),
        (encode(half_transparent(), "PNG"), (255, 127, 127)),
        (encode(Image.new("LA", (8, 8), (0, 0)), "PNG"), (255, 255, 255)),
        (encode(grey16(), "PNG"), (128, 128, 128)),
        (encode(Image.new("RGB", (8, 8), (1, 2, 250)), "WEBP", lossless=True), (1, 2, 250)),
        (encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0))), (254, 0, 0)),
    ],
    ids=["palette", "gif", "1-bit white", "1-bit black", "alpha", "grey alpha", "16-bit", "webp", "cmyk"],
)
def test_other_formats_become_rgb_jpegs(payload: bytes, expected: tuple[int, int, int]) -> None:
    with Image.open(io.BytesIO(as_jpeg(payload, "x"))) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    "payload",
    [encode(photo(1)), encode(photo(1).convert("L")), encode(photo(1), progressive=True)],
    ids=["rgb", "grey", "progressive"],
)
def test_jpegs_keep_their_bytes(payload: bytes) -> None:
    assert as_jpeg(payload, "x") is payload


def test_a_turned_png_is_stored_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    with Image.open(io.BytesIO(as_jpeg(encode(photo(1, (24, 20)), "PNG", exif=exif), "x"))) as image:
        assert image.size == (20, 24)


def images_of(*keys: str) -> Iterator[tuple[str, str, bytes]]:
    for number, key in enumerate(keys):
        yield key, f"{number}.jpg", encode(photo(number))


@pytest.mark.parametrize(
    ("keys", "identities", "count", "expected"),
    [
        ("ab", ["a", "b"], 3, "got 2 images of the 3 announced"),
        ("abb", ["a", "b"], 2, "one more than the 2 announced"),
        ("aba", ["a"], 3, "identity 'b', which is not in the list"),
        ("aa", ["a", "b"], 2, "identity 'b' has no images"),
        ("ab", ["b", "a"], 2, "must be sorted and unique"),
        ("aa", ["a", "a"], 2, "must be sorted and unique"),
        ("", [], 0, "no identity to pack"),
    ],
)
def test_pack_images_checks_what_it_was_promised(
    tmp_path: Path, keys: str, identities: list[str], count: int, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        pack_images(images_of(*keys), identities, count, tmp_path / "out", "faces", "s")
    assert list(tmp_path.iterdir()) == []


def test_the_name_must_make_file_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.\./x' must match"):
        pack_images(images_of("a"), ["a"], 1, tmp_path / "out", "../x", "s")


def test_a_place_that_cannot_be_written_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder would have to be")
    with pytest.raises(SetupError, match=r"packing into .*file/out failed"):
        pack_images(images_of("a"), ["a"], 1, tmp_path / "file" / "out", "faces", "s")
