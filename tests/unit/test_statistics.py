"""Statistics: the numbers are those of a slow look at every image; the page of plots is drawn and shows them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from pipelines.manifest import PackedDataset
from pipelines.pack import pack_images
from pipelines.pixels import decode_sample
from pipelines.reading import ShardReader
from pipelines.statistics import measure
from tests.unit.test_verify import overwrite

SIZES = ((32, 40), (48, 48), (64, 48))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Person n has n + 1 grey or coloured images of three sizes."""
    chance, images = np.random.default_rng(1), []
    for person in range(9):
        for number in range(person + 1):
            width, height = SIZES[(person + number) % 3]
            pixels = chance.integers(0, 28 * (person + 1), (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            out = io.BytesIO()
            (image.convert("L") if number % 4 == 0 else image).save(out, "JPEG")
            images.append((f"p{person}", f"p{person}/{number}.jpg", out.getvalue()))
    keys = sorted({key for key, _, _ in images})
    directory = tmp_path_factory.mktemp("stats") / "faces"
    pack_images(images, keys, len(images), directory, "faces", "source", shard_size_bytes=60_000)
    return directory


def test_numbers_are_those_of_a_slow_look(faces: Path) -> None:
    dataset = PackedDataset.open(faces)
    found = measure(dataset, None, num_workers=1)
    reader = ShardReader(dataset)
    payloads = [payload.tobytes() for payload in reader.read(np.arange(dataset.num_samples))]
    reader.close()
    pictures = [Image.open(io.BytesIO(payload)) for payload in payloads]
    assert found.images_per_identity.tolist() == list(range(1, 10))
    assert found.num_bytes.tolist() == [len(payload) for payload in payloads]
    assert (found.width.tolist(), found.height.tolist()) == tuple(
        [picture.size[side] for picture in pictures] for side in (0, 1)
    )
    means = [np.asarray(picture.convert("L"), dtype=np.float64).mean() for picture in pictures]
    assert found.brightness == pytest.approx(means)
    values = found.as_json()
    assert values["images_per_identity"]["p50"] == 5 and values["images_per_identity"]["identities_with"]["9"] == 1
    assert values["bytes"]["sum"] == sum(len(payload) for payload in payloads)
    assert sum(one["number"] for one in values["sizes"]) == 45 and len(values["sizes"]) == 3
    assert values["kinds"] == {"JPEG RGB": 30, "JPEG L": 15}


def test_a_sample_is_a_part_that_the_seed_says(faces: Path) -> None:
    dataset = PackedDataset.open(faces)
    whole = measure(dataset, None, num_workers=1)
    one, same, other = (measure(dataset, 12, seed, num_workers=1) for seed in (1, 1, 2))
    assert one.looked_at == len(one.width) == 12
    assert one.brightness.tolist() == same.brightness.tolist() != other.brightness.tolist()
    assert set(one.brightness.tolist()) <= set(whole.brightness.tolist())
    assert measure(dataset, 12, 1, num_workers=2).brightness.tolist() == one.brightness.tolist()


def test_what_cannot_be_decoded_is_counted(faces: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(faces, tmp_path / "faces"))
    overwrite(copy, "000000007.jpg", b"junk")
    found = measure(PackedDataset.open(copy), None, num_workers=1)
    assert [sample for sample, _ in found.undecodable] == [7] and len(found.width) == 44
    assert found.as_json()["undecodable"]["share"] == pytest.approx(1 / 45)


def test_images_that_exif_turns_are_counted_and_shown_upright(tmp_path: Path) -> None:
    exif, images = Image.Exif(), []
    exif[0x0112] = 6
    for number in range(4):
        out = io.BytesIO()
        pixels = np.zeros((40, 60, 3), dtype=np.uint8)
        pixels[:20] = 250  # the upper half, and the right one when it is upright
        Image.fromarray(pixels).save(out, "JPEG", exif=exif)
        images.append((f"p{number % 2}", f"{number}.jpg", out.getvalue()))
    dataset = pack_images(images, ["p0", "p1"], 4, tmp_path / "faces", "faces", "source")
    found = measure(dataset, None, num_workers=1)
    assert (set(found.width.tolist()), set(found.height.tolist())) == ({40}, {60})
    shown = decode_sample(dataset, 0)
    assert shown.shape == (60, 40, 3) and shown[:, 25:].mean() > 230 and shown[:, :15].mean() < 20


def test_the_command_writes_numbers_and_a_page(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, file = tmp_path / "plots" / "faces.png", tmp_path / "faces.json"
    assert main(["data", "stats", str(faces), "--all", "--png", str(png), "--json", str(file), "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "45 images of 9 identities" in told and "median 5, mean 5.0, 1 to 9" in told and "48 x 48 (15)" in told
    assert json.loads(file.read_text())["identities"] == 9
    page = Image.open(png)
    assert page.width > 1000 and page.height > 700
    pixels = np.asarray(page.convert("RGB")).reshape(2, page.height // 2, 2, -1, 3).swapaxes(1, 2)
    blue = (np.abs(pixels.astype(int) - (0x4C, 0x78, 0xA8)).sum(-1) < 12).mean(axis=(2, 3))
    assert (blue > 0.02).all()  # bars in each of the four


def test_a_data_set_without_one_whole_image_has_a_page_too(tmp_path: Path, faces: Path) -> None:
    copy = Path(shutil.copytree(faces, tmp_path / "faces"))
    for number in range(45):
        overwrite(copy, f"{number:09d}.jpg", b"junk")
    assert main(["data", "stats", str(copy), "--png", str(tmp_path / "a.png"), "--workers", "1"]) == 0
    assert (tmp_path / "a.png").exists()


def test_mistakes_are_one_line(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, word in (
        ([str(faces), "--workers", "0"], "--workers is 0"),
        ([str(faces), "--json", str(tmp_path / "no" / "a.json")], "is not a folder"),
        ([str(tmp_path)], "no manifest.json"),
    ):
        assert main(["data", "stats", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert word in error and "\n" not in error
