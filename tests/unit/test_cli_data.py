"""The data commands as typed: synth, show, verify, pack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import main
from pipelines.manifest import PackedDataset


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "faces"
    assert main(["data", "synth", str(out), "--identities", "4", "--photos", "3", "--size", "64"]) == 0
    return out


def test_synth_writes_a_packed_data_set(faces: Path) -> None:
    packed = PackedDataset.open(faces)
    assert (packed.num_samples, len(packed.identities)) == (12, 4)


def test_show_draws_a_sheet(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "new folder" / "sheet.png"
    assert main(["data", "show", str(faces), str(png), "--identities", "4", "--photos", "3", "--tile", "64"]) == 0
    sheet = Image.open(png)
    assert sheet.width > 3 * 64 and sheet.height > 4 * 64
    assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 1000  # photos, not a blank page
    assert str(png) in capsys.readouterr().out


def test_pack_reads_back_what_was_there(faces: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    for number, name in enumerate(("anna", "bob")):
        (source / name).mkdir(parents=True)
        for photo in range(2):
            Image.new("RGB", (40, 30), (90 * number, 60 * photo, 20)).save(source / name / f"{photo}.png")
    assert main(["data", "pack", str(source), str(tmp_path / "out"), "--name", "mine"]) == 0
    packed = PackedDataset.open(tmp_path / "out")
    assert tuple(packed.identities) == ("anna", "bob") and packed.num_samples == 4
    assert (tmp_path / "out" / "mine-000000.tar").exists()


def test_verify_finds_a_flipped_bit(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(faces)]) == 0
    shard = next(faces.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    try:
        shard.write_bytes(content)
        capsys.readouterr()
        assert main(["data", "verify", str(faces)]) == 3
        assert shard.name in capsys.readouterr().out
    finally:
        content[2000] ^= 1
        shard.write_bytes(content)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["data", "pack", "nowhere", "out"], "nowhere"),
        (["data", "show", "nowhere", "a.png"], "nowhere"),
        (["data", "synth", "out", "--identities", "1"], "identities is 1"),
        (["data", "synth", "out", "--difficulty", "2"], "difficulty is 2"),
        (["data", "pack", "nowhere", "out", "--name", "a/b"], "--name is 'a/b'"),
        (["data", "pack", "nowhere", "out", "--shard-mb", "0"], "--shard-mb is 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and word in error


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["show", "FACES", "sheet.xyz"], 2, "PNG is 'sheet.xyz'"),
        (["show", "FACES", "file/sheet.png"], 1, "file/sheet.png cannot be written"),
        (["stats", "FACES", "--png", "plots.foo"], 2, "--png is 'plots.foo'"),
        (["stats", "FACES", "--png", "file/plots.png", "--workers", "1"], 1, "file/plots.png cannot be written"),
        (
            ["split", "FACES", "file/split", "--scenario", "open-data", "--heldout", "2"],
            1,
            "file/split cannot be written",
        ),
        (
            ["split", "FACES", "split", "--scenario", "open-data", "--heldout", "2", "--json", "."],
            2,
            "--json . is a folder",
        ),
    ],
)
def test_what_cannot_be_written_is_one_line(
    faces: Path,
    arguments: list[str],
    code: int,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["data", *(str(faces) if one == "FACES" else one for one in arguments)]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lce: ") and word in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["data", "pack", "--help"]])
def test_help_has_examples_and_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes" in text or "example" in text


@pytest.mark.parametrize("action", ["pack", "import"])
def test_a_pipe_among_images_is_no_image(tmp_path: Path, action: str) -> None:
    for name in ("anna", "bob"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "photos" / name / "1.jpg")
    os.mkfifo(tmp_path / "photos" / "anna" / "2.jpg")  # nobody writes into it: a reader would wait
    words = [sys.executable, "-m", "launch.cli", "data", action, str(tmp_path / "photos"), str(tmp_path / "out")]
    assert subprocess.run(words, timeout=120, cwd=Path(__file__).parents[2]).returncode == 0
    assert PackedDataset.open(tmp_path / "out").num_samples == 2
