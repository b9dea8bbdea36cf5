"""Odd environments: a folder with a space and an accent, the C locale, a narrow umask, a home that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import CHECKOUT, CONFIG

ODD = {"LC_ALL": "C", "HOME": "/proc/self"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    place = tmp_path / "un été à Łódź"
    place.mkdir()
    (place / "gn.toml").write_text(CONFIG.replace("NET", "tiny8-gn").replace('"tiny8"', '"tiny8-gn"'))
    return place


def lce(place: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    left_out = ("RAY_", "MLFLOW_", "LC_", "LANG", "PYTHONUTF8", "XDG_", "MPLCONFIGDIR")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=place,
        env={**kept, "PYTHONPATH": str(CHECKOUT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        umask=0o077,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace")


def test_commands_work_and_say_nothing_else(place: Path) -> None:
    code, output = lce(place, "train", "--config", "gn.toml", "--nodes", "2", "--check", **ODD)
    assert code == 0 and output.splitlines()[-1].startswith("checked: nothing was trained"), output
    assert lce(place, "status", **ODD) == (0, "no runs below runs\n")
    assert any((place / "runs" / ".cache").glob("faces-*/manifest.json"))


def test_a_run_in_an_odd_place(place: Path) -> None:
    settings = ("--set", "old.epochs=2.0", "--set", "new.epochs=2.0")
    code, output = lce(place, "train", "--config", "gn.toml", *settings, **ODD)
    assert code == 0 and "M(new, old)" in output and "Traceback" not in output, output
    assert lce(place, "status", **ODD)[1].startswith("small: finished, ")
    code, log = lce(place, "logs", "small", **ODD)
    assert code == 0 and "new model: done" in log and log.splitlines()[-1].startswith("finished, ")
    run = place / "runs" / "small"
    assert [path for path in run.rglob("*") if path.is_file() and path.stat().st_mode & 0o077] == []


def test_letters_that_the_process_cannot_name_are_one_line(place: Path) -> None:
    code, output = lce(place, "train", "--config", "gn.toml", "--check", PYTHONUTF8="0", **ODD)
    assert code == 2 and "file names are ascii here. Set PYTHONUTF8=1" in output, output
    assert len(output.splitlines()) == 1
