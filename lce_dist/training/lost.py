"""Steps that are not finite: every rank finds them in the same step, and the policy says what becomes of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lce_dist.config import FaultsConfig
from lce_dist.errors import RunError
from lce_dist.training.checkpoint import Checkpoints
from lce_dist.training.engine import Engine
from lce_dist.training.step import LossTerms


class LostSteps:
    """Counts them over a stage; ``count`` goes on where a checkpoint left it.

    ``before_step``, a step, ``after_step``: with "skip" the step has changed nothing, with "roll_back" everything is as in the last checkpoint. The steps' batches are left out either way; numbers of steps go on.
    """

    def __init__(
        self,
        stage: str,
        faults: FaultsConfig,
        count: int,
        engine: Engine,
        checkpoints: Checkpoints,
        fingerprint: str,
        warn: Callable[[str], None],
    ) -> None:
        self.count = count
        self.rolls_back = faults.non_finite == "roll_back"
        self._stage, self._faults, self._fingerprint = stage, faults, fingerprint
        self._engine, self._checkpoints, self._warn = engine, checkpoints, warn
        self._buffers: list[torch.Tensor] = []

    def before_step(self) -> None:
        """Keep what the forward pass may spoil."""
        self._buffers = self._engine.buffers() if self._faults.non_finite == "skip" else []

    def after_step(self, done: int, terms: LossTerms, net_norm: float) -> bool:
        """Whether step number ``done`` was lost; then the policy has been followed.

        Errors: RunError, on every rank, where the policy or its limit ends the run.
        **Collectives**: those of ``Checkpoints.resume``, of a lost step only.
        """
        what = _not_finite(terms, net_norm)
        if what is None:
            return False
        where = f"{self._stage} model, step {done}: {what}"
        if self._faults.non_finite == "stop":
            raise RunError(
                f"{where}. Nothing was updated by it and checkpoints are intact; to leave such batches out, "
                'set faults.non_finite = "skip" or "roll_back"'
            )
        if self.count == self._faults.non_finite_limit:
            raise RunError(f"{where}. It is number {self.count + 1}, and faults.non_finite_limit is {self.count}")
        self.count += 1
        if self.rolls_back:
            before = self._checkpoints.resume(self._fingerprint, self._warn)
            if before is None:
                raise RunError(f"{where}. No checkpoint is there to go back to")
            answer = f"everything is as after step {before['step']} again, and the batches since then are left out"
        else:
            self._engine.put_back(self._buffers)
            answer = "its batch is left out"
        self._warn(f"{where}; {answer}")
        return True


def _not_finite(terms: LossTerms, net_norm: float) -> str | None:
    if not math.isfinite(float(terms.total)):
        return terms.why or f"the loss is {float(terms.total)}"
    if not math.isfinite(net_norm):
        return (
            f"the network's gradient has the norm {net_norm}; it must be finite. Lower optim.lr or set optim.clip_norm"
        )
    return None
