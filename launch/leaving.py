"""Before a pod goes: ask the run that it works for to save, and wait until that is done or there is no more time.

Kubernetes runs it (preStop) while training goes on and before it sends SIGTERM. Its imports are light: it has seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

_SAVE_FILE = "save"  # lce_dist.training.requests names it too, behind torch
_POLL_S = 0.2


def main(argv: Sequence[str]) -> int:
    """``RUN SECONDS``, or ``RUNS SECONDS`` for all runs below a directory; 0 always: nobody could act on anything else."""
    place, grace_s = Path(argv[0]), float(argv[1])
    runs = [place] if (place / "config.json").exists() else [path.parent for path in place.glob("*/config.json")]
    for line in save(runs, grace_s):
        sys.stdout.write(f"{line}\n")
    return 0


def save(runs: Sequence[Path], grace_s: float) -> list[str]:
    """Ask those of ``runs`` that are at work for a checkpoint, and wait for all of them; one line each of what came of it."""
    before = {run: _checkpoints(run) for run in runs if _is_at_work(run)}
    for run in before:
        (run / _SAVE_FILE).touch()
    waiting, deadline_s, said = set(before), time.monotonic() + grace_s, []
    while waiting and time.monotonic() < deadline_s:
        for run in sorted(waiting):
            new = _checkpoints(run) - before[run]
            if new or not _is_at_work(run):
                waiting.remove(run)
                said.append(f"{run}: " + (f"saved as {max(new)}" if new else "ended"))
        time.sleep(_POLL_S)
    return said + [f"{run}: not saved within {grace_s:g} s" for run in sorted(waiting)]


def _checkpoints(run: Path) -> set[str]:
    """Committed ones. The step in a name may come again, the moment of its manifest does not."""
    found = set()
    for manifest in run.glob("*/checkpoints/step-*/manifest.json"):
        name = manifest.parent.name
        if name[5:].isdigit():
            try:
                found.add(f"{manifest.parent.parent.parent.name}/{name} ({manifest.stat().st_mtime_ns})")
            except FileNotFoundError:  # a newer one has taken its place
                continue
    return found


def _is_at_work(run: Path) -> bool:
    """Whether its driver has begun and not said an end since; a lock would not be seen from another machine."""
    try:
        begun = (run / "launch.json").stat().st_mtime_ns
    except OSError:
        return False
    ends = (run / name for name in ("report.json", "failure.log"))
    return not any(end.exists() and end.stat().st_mtime_ns >= begun for end in ends)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
