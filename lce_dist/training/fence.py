"""Which attempt a run is at: workers that outlived their driver, or their group, commit nothing once another has begun."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from lce_dist.errors import RunError

ATTEMPT_FILE = "attempt"  # in a run's directory: the driver's id, and that of the workers that write


def begin_attempt(run_dir: Path) -> str:
    """Leave a new driver's id in the run's directory and return it."""
    attempt = uuid.uuid4().hex
    _write(run_dir, attempt)
    return attempt


def take_over(run_dir: Path, attempt: str) -> Callable[[], None]:
    """Become the one writer of ``attempt``; returns a check that fails once another has.

    Errors: RunError, here and from the check, when another attempt has begun.
    """
    if _read(run_dir).partition(".")[0] != attempt:
        raise _begun(run_dir, attempt)
    own = f"{attempt}.{uuid.uuid4().hex}"
    _write(run_dir, own)

    def check() -> None:
        if _read(run_dir) != own:
            raise _begun(run_dir, own)

    return check


def _begun(run_dir: Path, own: str) -> RunError:
    return RunError(
        f"another attempt of run {run_dir} has begun ({_read(run_dir)[:12]}; this worker belongs to {own[:12]}): "
        "nothing more is written by this one. End it"
    )


def _read(run_dir: Path) -> str:
    try:
        return (run_dir / ATTEMPT_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return "none"


def _write(run_dir: Path, value: str) -> None:
    partial = run_dir / f"{ATTEMPT_FILE}.{uuid.uuid4().hex[:8]}"
    partial.write_text(value + "\n", encoding="utf-8")
    partial.replace(run_dir / ATTEMPT_FILE)
