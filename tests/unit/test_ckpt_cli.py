"""``lce ckpt``: what it lists, and that it finds what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli import main
from lce_dist import storage
from lce_dist.world import World


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    return run


def write(run: Path, stage: str, step: int) -> Path:
    path = run / stage / "checkpoints" / f"step-{step:08d}"
    storage.save(path, {"net": torch.ones(300)}, {"step": step, "num_ranks": 2}, World())
    return path


def test_list_and_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(run.name), "--run-dir", str(run.parent)]
    assert main(["ckpt", "ls", *asked]) == 2 and "no checkpoint" in capsys.readouterr().err
    paths = [write(run, "old", 10), write(run, "new", 5), write(run, "new", 10)]
    (run / "new" / "checkpoints" / "step-00000015.partial").mkdir()
    assert main(["ckpt", "ls", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["stage"], one["step"], one["ranks"]) for one in found] == [
        ("new", 5, 2),
        ("new", 10, 2),
        ("old", 10, 2),
    ]
    assert all(one["bytes"] > 1200 and one["damage"] is None and "T" in one["written"] for one in found)
    assert main(["ckpt", "verify", *asked]) == 0
    assert capsys.readouterr().out.count("every hash is right") == 3
    # a bit, which sizes do not show
    (file,) = paths[1].glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["ckpt", "ls", *asked]) == 0 and capsys.readouterr().out.count("whole by the sizes") == 3
    assert main(["ckpt", "verify", *asked]) == 3
    told = capsys.readouterr()
    assert f"{file} is missing, truncated or changed" in told.out and "1 of 3 checkpoints are damaged" in told.err
    # and a folder without a manifest
    (paths[0] / storage.MANIFEST).unlink()
    assert main(["ckpt", "verify", *asked]) == 3 and "2 of 3" in capsys.readouterr().err
