"""Checkpoints of one stage: every part of the training state under one committed name, the newest whole one first."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lce_dist import storage
from lce_dist.collectives import all_reduce_max
from lce_dist.errors import CheckpointError
from lce_dist.head.identity import KEY, refuse_other_keys
from lce_dist.head.layer import ShardedHead
from lce_dist.training.engine import Engine
from lce_dist.world import World


class Checkpoints:
    """``directory``/step-00000120/...: network, head rows and whose they are, both momenta, a small JSON state.

    The order of samples, augmentation, schedules and random numbers are functions of (seed, step), so the
    step is all that they need. identity_SL: the keys of this shard's rows (``identity_tensor``). allow: asked
    immediately before a commit; its error prevents it.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        engine: Engine,
        head: ShardedHead,
        identity_SL: torch.Tensor,
        world: World,
        allow: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.engine = engine
        self.head = head
        self.identity_SL = identity_SL
        self.world = world
        self._allow = allow
        self._writing: storage.Writing | None = None
        self._untold: list[tuple[int, storage.Writing]] = []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Take a copy of the state after ``step`` updates and write it beside the training; called by every rank.

        Waits for the one before. Errors: RunError, on every rank, where that one or the start of this one failed.
        """
        self.finish()
        self.engine.average_buffers()
        tensors = self._tensors(self.engine.tensors())
        self._writing = storage.Writing(
            self._path(step),
            tensors,
            {"step": step, **state},
            self.world,
            then=self._remove_old,
            allow=self._allow,
        )
        self._untold.append((step, self._writing))

    def finish(self) -> None:
        """Wait until what ``save`` began is committed; called by every rank. Errors: RunError, on every rank."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What ends the block early leaves time for what ``save`` began."""
        try:
            yield
        finally:
            if self._writing is not None:
                self._writing.leave()

    def committed(self) -> list[int]:
        """Steps whose checkpoint was committed since the last call, as this rank knows: the first one at once."""
        told = [step for step, writing in self._untold if writing.is_committed]
        self._untold = [(step, writing) for step, writing in self._untold if not writing.is_committed]
        return told

    def _remove_old(self) -> None:
        for old in committed_steps(self.directory)[self.keep :]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def resume(self, fingerprint: str, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint and return its state; None when there is none.

        Errors: CheckpointError, on every rank, when the newest one belongs to another config or to other
        identities; weights and rows are as they were.
        """
        self.finish()
        for step in self._agreed_steps():
            path = self._path(step)
            reason = storage.damage(path, self.world) or other_step(path, self.world)
            if reason is not None:
                warn(f"checkpoint skipped: {reason}; going on from the one before it")
                continue
            state = storage.read_manifest(path, self.world).state
            if state["fingerprint"] != fingerprint:
                raise CheckpointError(
                    f"{path} was written with config fingerprint {state['fingerprint']}; this run has {fingerprint}. "
                    "Choose another run.name, or go back to the settings that it was started with"
                )
            rows = self.head.rows
            refuse_other_keys(path, f"head.{KEY}", self.identity_SL, rows.num_classes, rows.first_class, self.world)
            network = self.engine.tensors()
            tensors = self._tensors(network)
            storage.load(path, tensors, self.world)
            self.engine.load_tensors(network)
            return state
        return None

    def _tensors(self, network: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        local = self.head.tensors() | {KEY: self.identity_SL}
        classes = self.head.rows.num_classes
        cut = {f"head.{name}": storage.class_rows(tensor, classes, self.world) for name, tensor in local.items()}
        running = {f"margin.{name}": value.view(1) for name, value in self.head.margin.state().items()}
        return {f"net.{name}": tensor for name, tensor in network.items()} | cut | running

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _agreed_steps(self) -> list[int]:
        """What the first rank sees: a shared file system may show it to others later."""
        steps = committed_steps(self.directory) if self.world.is_first else []
        count = all_reduce_max(torch.tensor([len(steps)], device=self.world.device), self.world)
        listed = torch.full((int(count.item()),), -1, dtype=torch.int64)
        listed[: len(steps)] = torch.tensor(steps, dtype=torch.int64)
        agreed: list[int] = all_reduce_max(listed.to(self.world.device), self.world).tolist()
        return agreed


def committed_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, newest first."""
    names = (path.name for path in directory.glob("step-*"))
    return sorted((int(name[5:]) for name in names if name[5:].isdigit()), reverse=True)


def other_step(path: Path, world: World) -> str | None:
    """Why a checkpoint that is whole is not that of its name, or None; the same on every rank."""
    step = storage.read_manifest(path, world).state.get("step")
    if step == int(path.name[5:]):
        return None
    return f"{path / storage.MANIFEST} says step {step}; the folder's name says {int(path.name[5:])}"


def load_network(directory: Path, net: nn.Module) -> None:
    """Fill a network, by itself, from a checkpoint of its training; whatever was trained beside it is left out.

    Errors: CheckpointError when it is not whole (another process may be removing it), or of another network.
    """
    alone = World()
    shapes = storage.read_manifest(directory, alone).shapes
    inside = "net." if any(name.startswith("net.weight.net.") for name in shapes) else ""
    tensors = {f"net.weight.{inside}{name}": value.detach().clone() for name, value in net.named_parameters()}
    tensors |= {f"net.buffer.{inside}{name}": value.detach().clone() for name, value in net.named_buffers()}
    storage.load(directory, tensors, alone)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(tensors[f"net.weight.{inside}{name}"])
        for name, buffer in net.named_buffers():
            buffer.copy_(tensors[f"net.buffer.{inside}{name}"])
