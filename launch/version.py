"""Which code this is: the package's version and, in a checkout, its commit."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
_LONGEST_S = 10.0


@functools.cache
def code_version() -> str:
    """As ``0.1.0+1a2b3c4``, with ``-dirty`` where files differ from that commit."""
    try:
        version = importlib.metadata.version("lce-dist")
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        version = "0"
    words = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=_LONGEST_S, check=True).stdout.strip()  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):  # an image without git
        return version
    return f"{version}+{found}"
