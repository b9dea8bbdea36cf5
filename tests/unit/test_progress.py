"""What the driver tells is kept in a file, with the time: lines, errors, and progress where the terminal has bars."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from launch.progress import RunProgress
from lce_dist.errors import RunError

STEP = {
    "type": "metrics",
    "stage": "new",
    "total_steps": 9,
    "metrics": {"loss/total": 1.5, "speed/images_per_s": 7.0},
    "eta_s": 1.0,
}


@pytest.mark.parametrize("terminal", [True, False])
def test_log(tmp_path: Path, terminal: bool) -> None:
    log = tmp_path / "log.txt"
    log.write_text("of an earlier driver\n")
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with pytest.raises(RunError), RunProgress(console) as progress:
        progress.note("before there was a directory")
        progress.keep_in(log)
        progress.show({"type": "warning", "text": "rank 1 is slow: é"})
        for step in (1, 2, 9):
            progress.show({**STEP, "step": step})
        raise RunError("the disk is full")
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "of an earlier driver"
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in lines[1:])
    told = [line[26:] for line in lines[1:]]
    assert told[:2] == ["before there was a directory", "warning: rank 1 is slow: é"]
    assert [line.partition(" ")[0] for line in told[2:4]] == ["new", "new"] and "1/9" in told[2] and "9/9" in told[3]
    assert told[4:] == ["RunError: the disk is full"], "the second step came within ten seconds of the first"
    assert "the disk" not in console.file.getvalue()  # type: ignore[attr-defined]
