"""Files of a stage with a line a step, kept by the worker itself: what of them a driver has not heard is told again.

A driver that dies leaves workers that train on for a moment; what they report goes nowhere. A checkpoint that they commit then is
gone on from, so the numbers before it must not be gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np


class IdsLog:
    """``step<TAB>rows<TAB>hash of the global batch's sample ids``: equal for every number of ranks."""

    def __init__(self, path: Path, first_step: int, hash_ids: Callable[[np.ndarray], str]) -> None:
        self._hash_ids = hash_ids
        self._file = _reopened(path, lambda line: int(line.split("\t")[0]) < first_step)

    def write(self, step: int, ids: np.ndarray) -> str:
        """Add the batch of ``step`` and return its hash."""
        hashed = self._hash_ids(ids)
        self._file.write(f"{step}\t{len(ids)}\t{hashed}\n")
        return hashed

    def close(self) -> None:
        self._file.close()


class PointsLog:
    """Metrics by the number of steps done: JSON lines of ``{"step", "time_ms", "metrics"}``."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        self._file = _reopened(path, lambda line: int(json.loads(line)["step"]) <= first_step)

    def write(self, step: int, time_ms: int, metrics: dict[str, float]) -> None:
        """Add what was measured after ``step`` steps."""
        self._file.write(json.dumps({"step": step, "time_ms": time_ms, "metrics": metrics}) + "\n")

    def close(self) -> None:
        self._file.close()


def points_after(path: Path, told_step: int) -> list[dict[str, Any]]:
    """What a :class:`PointsLog` holds beyond ``told_step``; nothing where there is no file."""
    points = (json.loads(line) for line in _whole_lines(path))
    return [point for point in points if point["step"] > told_step]


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]


def _reopened(path: Path, keep: Callable[[str], bool]) -> TextIO:
    """``path`` with the lines that are kept, open for more; killed at any moment, the kept ones are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(line for line in _whole_lines(path) if keep(line))
    beside.replace(path)
    return path.open("a", buffering=1, encoding="utf-8")
