"""Checkpoints of one stage: every part of the training state under one committed name, the newest whole one first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lce_dist import storage
from lce_dist.collectives import barrier
from lce_dist.errors import CheckpointError
from lce_dist.head.layer import ShardedHead
from lce_dist.training.engine import Engine
from lce_dist.world import World


class Checkpoints:
    """``directory``/step-00000120/...: network, head rows, both momenta, and a small JSON state.

    The order of samples, augmentation, schedules and random numbers are functions of (seed, step), so the
    step is all that they need.
    """

    def __init__(self, directory: Path, keep: int, engine: Engine, head: ShardedHead, world: World) -> None:
        self.directory = directory
        self.keep = keep
        self.engine = engine
        self.head = head
        self.world = world

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Commit the state after ``step`` updates; called by every rank."""
        self.engine.average_buffers()
        storage.save(self._path(step), self._tensors(self.engine.tensors()), {"step": step, **state}, self.world)
        if self.world.is_first:
            for old in self._steps()[self.keep :]:
                shutil.rmtree(self._path(old), ignore_errors=True)

    def resume(self, fingerprint: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint and return its state; None when there is none.

        Errors: CheckpointError when the newest one belongs to another config.
        """
        barrier(self.world)
        for step in self._steps():
            path = self._path(step)
            reason = storage.damage(path, self.world)
            if reason is not None:
                warn(f"checkpoint skipped: {reason}; going on from the one before it")
                continue
            state = storage.read_state(path)
            if state["fingerprint"] != fingerprint:
                raise CheckpointError(
                    f"{path} was written with config fingerprint {state['fingerprint']}; this run has {fingerprint}. "
                    "Choose another run.name, or go back to the settings that it was started with"
                )
            network = self.engine.tensors()
            tensors = self._tensors(network)
            storage.load(path, tensors, self.world)
            self.engine.load_tensors(network)
            return state
        return None

    def _tensors(self, network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head, classes = self.head, self.head.rows.num_classes
        cut = {f"head.{name}": storage.class_rows(t, classes, self.world) for name, t in head.tensors().items()}
        running = {f"margin.{name}": value.view(1) for name, value in head.margin.state().items()}
        return {f"net.{name}": tensor for name, tensor in network.items()} | cut | running

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        """Committed steps, newest first."""
        names = (path.name for path in self.directory.glob("step-*"))
        return sorted((int(name[5:]) for name in names if name[5:].isdigit()), reverse=True)
