"""Small gloo worlds of 1 to 4 ranks, each started once and kept: imports and groups are paid once a size."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lce_dist.world import World

RunDistributed = Callable[..., list[Any]]


class GlooWorld:
    """``run(function, *args)`` calls ``function(world, *args)`` on every rank and returns each rank's value."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, size, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(180):
                raise TimeoutError(f"rank {rank} of {len(self._pipes)} did not answer within 180 s")
            answers.append(pipe.recv())
        for rank, (good, value) in enumerate(answers):
            if not good:
                raise AssertionError(f"rank {rank} of {len(self._pipes)} failed:\n{value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(World(rank, size), *args)))
        except BaseException:  # noqa: BLE001 - reported to the test with its traceback
            pipe.send((False, traceback.format_exc()))


@pytest.fixture(scope="session")
def run_distributed() -> Iterator[RunDistributed]:
    worlds: dict[int, GlooWorld] = {}

    def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        if size not in worlds:
            worlds[size] = GlooWorld(size)
        return worlds[size].run(function, *args)

    yield run
    for world in worlds.values():
        world.close()
