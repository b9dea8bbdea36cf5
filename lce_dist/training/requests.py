"""What people and the driver ask of a stage while it trains: files in the run's directory, seen by all ranks in the same step."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from lce_dist.collectives import all_reduce_max
from lce_dist.world import World

STOP_FILE = "stop"  # save and end
SAVE_FILE = "save"  # save and go on
PROFILE_FILE = "profile"  # record the next steps, as many as it says
MOST_PROFILED = 1000


@dataclass(frozen=True)
class Asked:
    """What is asked for. profile_steps: 0 where no profile is."""

    stop: bool = False
    save: bool = False
    profile_steps: int = 0


class Requests:
    """Reads them from ``directory``; None: nothing is ever asked for."""

    def __init__(self, directory: Path | None, world: World) -> None:
        self._directory, self._world = directory, world

    def read(self) -> Asked:
        """What any rank sees; a file of saving or profiling is taken away by that. **Collectives**: one small all-reduce."""
        if self._directory is None:
            return Asked()
        stop, save, profile = (self._directory / name for name in (STOP_FILE, SAVE_FILE, PROFILE_FILE))
        seen = torch.tensor([float(stop.exists()), float(save.exists()), float(_steps_in(profile))])
        asked = all_reduce_max(seen.to(self._world.device), self._world).tolist()
        if self._world.is_first:
            for path, value in ((save, asked[1]), (profile, asked[2])):
                if value:
                    path.unlink(missing_ok=True)
        return Asked(bool(asked[0]), bool(asked[1]), int(asked[2]))


def _steps_in(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return min(MOST_PROFILED, max(0, int(path.read_text())))
    return 0
