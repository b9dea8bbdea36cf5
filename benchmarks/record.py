"""What every benchmark leaves behind: the machine, every raw sample, and a list of marks, as one JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "deepspeed", "ray", "nvidia-dali-cuda130", "webdataset", "mlflow", "pillow", "numpy")


@dataclass(frozen=True)
class Mark:
    """A claim, its measured value, its bound in words, and whether it is met."""

    name: str
    value: float | bool
    bound: str
    met: bool


def write_record(benchmark: str, out: Path, marks: list[Mark], raw: dict[str, Any], stem: str | None = None) -> int:
    """Print the marks, write OUT/``stem``.json, and return the exit code: 0 when all marks are met."""
    for mark in marks:
        value = mark.value if isinstance(mark.value, bool) else f"{mark.value:.4g}"
        print(f"{mark.name:60}{value!s:>10}  {mark.bound:>10}  {'met' if mark.met else 'NOT met'}")
    out.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": benchmark, "machine": machine(), "marks": [asdict(mark) for mark in marks], "raw": raw}
    path = out / f"{stem or file_stem(benchmark)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    met = sum(mark.met for mark in marks)
    print(f"marks met: {met} of {len(marks)}")
    return 0 if met == len(marks) else 1


def file_stem(benchmark: str) -> str:
    """NAME-<cpu>-<date>."""
    about = machine()
    cpu = "-".join(about["cpu"].split()[:4]).replace("(R)", "").replace("/", "_")
    return f"{benchmark}-{cpu}-{about['date'][:10]}"


def machine() -> dict[str, Any]:
    """Processor, cores, GPU, versions, commit and date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
