"""Where a command will write, looked at before it works: a place that cannot take the file is found out at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lce_dist.errors import ConfigError, RunError


def check_destination(flag: str, given: str | Path) -> None:
    """Errors: ConfigError where ``given`` names a folder, or lies in none that files can be written to."""
    path = Path(given)
    if str(given).endswith("/") or path.is_dir():
        raise ConfigError(f"{flag} {given} names a folder; must name a file. Add the file's name")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {given}: {path.parent} is not a folder; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {given}: nothing can be written in {path.parent} ({error.strerror}); name another place"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all. Errors: RunError where the file system refuses."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror}. Free space or choose another place") from None
