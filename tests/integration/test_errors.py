"""What people get wrong: one line that names the thing and the fix, exit code 2, and nothing has been started."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from pipelines.pack import pack_folder
from tests.integration.conftest import CONFIG


def photo(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for identity in range(14):
        folder = tmp_path / "images" / f"person {identity}"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.jpg").write_bytes(photo(100 * identity + number))
    return tmp_path / "images"


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run ``lce train`` with some settings, expect exit code 2, return the one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: str, config: str = CONFIG) -> str:
        (tmp_path / "c.toml").write_text(config.replace("NET", "tiny8"))
        code = main(["train", "--config", "c.toml", *arguments])
        error = capsys.readouterr().err
        assert code == 2, error
        lines = error.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("lce: "), error
        assert not (tmp_path / "runs" / "small" / "old").exists()
        return lines[0]

    return run


def on_images(path: Path) -> str:
    table = CONFIG[CONFIG.index("[data.synthetic]") : CONFIG.index("[old]")]
    return CONFIG.replace(table, "").replace("[data]\n", f'[data]\nimages = "{path}"\n')


def on_shards(path: Path) -> str:
    return on_images(path).replace("images = ", "shards = ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "optim.lrr=1"], ["'optim.lrr'", "did you mean 'lr'"]),
        (["--set", "optim.lr=fast"], ["optim.lr", "'fast'", "number"]),
        (["--set", "new.net=tiny9"], ["'tiny9'", "did you mean"]),
        (["--set", "data.image_size=33"], ["image_size", "33", "multiple of 16"]),
        (["--set", "old.weights=nowhere.pt"], ["nowhere.pt"]),
        (["--nodes", "0"], ["--nodes is 0", "at least 1"]),
        (["--nodes", "-2"], ["--nodes is -2"]),
        (["--workers-per-node", "0"], ["--workers-per-node is 0"]),
        (["--nodes", "5"], ["optim.global_batch is 24", "5 * 1 = 5", "Use 20"]),
        (["--set", "optim.global_batch=2", "--nodes", "2"], ["leaves 1 images", "at least 2"]),
        (["--set", "data.heldout_identities=23"], ["heldout_identities", "23"]),
        (["--set", "head.scale=90.0"], ["head.scale", "90"]),
        (["--name", "No Such Name"], ["run.name", "No Such Name"]),
        (["--config", "missing.toml"], ["missing.toml", "does not exist"]),
    ],
)
def test_settings(refused: Callable[..., str], arguments: list[str], words: list[str]) -> None:
    line = refused(*arguments)
    assert all(word in line for word in words), line


def test_not_toml(refused: Callable[..., str]) -> None:
    assert "not valid TOML" in refused(config="[run\nname=")


def test_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere" in refused(config=on_images(tmp_path / "nowhere"))


def test_empty_class(refused: Callable[..., str], images: Path) -> None:
    (images / "nobody").mkdir()
    assert "nobody" in refused(config=on_images(images))


def test_undecodable_image(refused: Callable[..., str], images: Path) -> None:
    broken = images / "person 3" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert "person 3/1.jpg" in refused(config=on_images(images))


def packed(images: Path, out: Path) -> Path:
    pack_folder(images, out, "images")
    return out


def test_truncated_tar(refused: Callable[..., str], images: Path, tmp_path: Path) -> None:
    shard = packed(images, tmp_path / "packed") / "images-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])
    line = refused(config=on_shards(tmp_path / "packed"))
    assert "images-000000.tar" in line and "truncated" in line


def test_missing_shard(refused: Callable[..., str], images: Path, tmp_path: Path) -> None:
    (packed(images, tmp_path / "packed") / "images-000000.tar").unlink()
    assert "images-000000.tar" in refused(config=on_shards(tmp_path / "packed"))


def test_label_out_of_range(refused: Callable[..., str], images: Path, tmp_path: Path) -> None:
    out = packed(images, tmp_path / "packed")
    index = np.load(out / "index.npy")
    index["label"][5] = 99
    np.save(out / "index.npy", index)
    line = refused(config=on_shards(out))
    assert "index.npy" in line


def test_an_image_that_breaks_after_packing_is_named_at_run_time(workplace, images: Path, tmp_path: Path) -> None:
    # same size and header, so nothing shows before it is decoded; the workers must not be retried for it
    out = packed(images, tmp_path / "packed")
    index = np.load(out / "index.npy")
    shard = bytearray((out / "images-000000.tar").read_bytes())
    row = index[7]
    shard[int(row["offset"]) : int(row["offset"]) + int(row["size"])] = b"\x00" * int(row["size"])
    (out / "images-000000.tar").write_bytes(shard)
    (tmp_path / "c.toml").write_text(on_shards(out).replace("NET", "tiny8"))
    code, output = workplace.run("train", "--config", str(tmp_path / "c.toml"), "--name", "broken-image")
    assert code == 2, output
    assert "images-000000.tar" in output.splitlines()[-1] and "Traceback" not in output


def test_heldout_identities_of_one_image(refused: Callable[..., str], images: Path) -> None:
    for folder in images.iterdir():
        for name in ("1.jpg", "2.jpg"):
            (folder / name).unlink()
    assert "none of the 8 held-out identities has 2 images" in refused(config=on_images(images))
