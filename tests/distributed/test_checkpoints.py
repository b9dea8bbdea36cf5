"""Directories written beside the training: the values of the moment, whole or not there, and one answer for all ranks."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from lce_dist import storage
from lce_dist.collectives import barrier
from lce_dist.errors import RunError
from lce_dist.tensor_file import Column, write_file
from lce_dist.training.checkpoint import other_step
from lce_dist.training.fence import ATTEMPT_FILE, begin_attempt, take_over
from lce_dist.world import World, shard_bounds

CLASSES = 7


def tensors(world: World, value: float) -> dict[str, torch.Tensor]:
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    rows = torch.arange(first, last, dtype=torch.float32)[:, None] + value
    return {
        "net": torch.full((2, 3), value),
        "count": torch.tensor(int(value)),
        "rows": storage.class_rows(rows, CLASSES, world),
    }


def loaded(directory: Path, world: World) -> dict[str, torch.Tensor]:
    found = tensors(world, 0.0)
    storage.load(directory, found, world)
    return {name: getattr(value, "to_local", lambda value=value: value)() for name, value in found.items()}


def test_every_type_comes_back_bit_for_bit(tmp_path: Path) -> None:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    types += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16)
    given = {str(kind): torch.arange(-4, 8).to(kind).reshape(3, 4).t() for kind in types}
    given |= {"none": torch.zeros(0, 5), "scalar": torch.tensor(3.5)}
    described = write_file(tmp_path / "a", {name: Column.of_tensor(value) for name, value in given.items()})
    assert described == storage._describe(tmp_path / "a")
    found = load_file(tmp_path / "a")
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def changed_while_it_is_written(world: World, folder: str) -> None:
    directory, release = Path(folder) / "one", threading.Event()

    def slowly(path: Path, columns: dict[str, Column]) -> dict[str, object]:
        release.wait()
        return write_file(path, columns)

    given = tensors(world, 5.0)
    with mock.patch("lce_dist.storage.write_file", slowly):
        writing = storage.Writing(directory, given, {"step": 5}, world)
        for value in given.values():
            getattr(value, "to_local", lambda value=value: value)().fill_(-1)  # the training goes on
        assert not directory.exists() and not writing.is_committed
        barrier(world)
        release.set()
        writing.finish()
    assert writing.is_committed and storage.damage(directory, world) is None
    expected = tensors(world, 5.0)
    for name, value in loaded(directory, world).items():
        assert torch.equal(value, getattr(expected[name], "to_local", lambda name=name: expected[name])()), name


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_written_is_the_moment_it_was_asked_for(run_distributed, tmp_path, ranks):
    run_distributed(changed_while_it_is_written, ranks, str(tmp_path))


def committed_by_itself(world: World, folder: str) -> list[int]:
    removed: list[int] = []
    writing = storage.Writing(Path(folder) / "one", tensors(world, 2.0), {}, world, then=lambda: removed.append(1))
    deadline = time.monotonic() + 30
    while not (Path(folder) / "one").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    writing.finish()
    return removed


def test_it_is_committed_without_anybody_waiting_for_it(run_distributed, tmp_path):
    assert run_distributed(committed_by_itself, 2, str(tmp_path)) == [[1], []]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "manifest.json",
        "shard-00001-of-00002.safetensors",
        "shard-00002-of-00002.safetensors",
    ]


def full_for_one(world: World, folder: str, bad_rank: int) -> str:
    directory = Path(folder) / "one"
    storage.save(directory, tensors(world, 1.0), {"step": 1}, world)

    def full(path: Path, columns: dict[str, Column]) -> dict[str, object]:
        if world.rank == bad_rank:
            raise OSError(28, "No space left on device", str(path))
        return write_file(path, columns)

    with mock.patch("lce_dist.storage.write_file", full):
        writing = storage.Writing(directory, tensors(world, 2.0), {"step": 2}, world)
        try:
            writing.finish()
        except RunError as error:
            answer = str(error)
    assert not writing.is_committed
    assert storage.read_manifest(directory, world).state == {"step": 1} and storage.damage(directory, world) is None
    storage.save(directory, tensors(world, 3.0), {"step": 3}, world)  # what was left lying is no hindrance
    assert storage.read_manifest(directory, world).state == {"step": 3}
    return answer


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_a_disk_that_is_full_for_one_is_told_by_all_and_the_one_before_stays(run_distributed, tmp_path, bad_rank):
    answers = run_distributed(full_for_one, 3, str(tmp_path), bad_rank)
    assert len(set(answers)) == 1 and "No space left on device" in answers[0] and "Free space" in answers[0]


def test_a_manifest_that_says_something_else_is_refused_and_an_older_one_without_a_seal_is_read(tmp_path: Path) -> None:
    alone = World()
    storage.save(tmp_path / "step-00000001", tensors(alone, 1.0), {"step": 1}, alone)
    manifest = tmp_path / "step-00000001" / storage.MANIFEST
    written = manifest.read_text()
    assert storage.damage(manifest.parent, alone) is None and other_step(manifest.parent, alone) is None
    harms = {
        "digit": written.replace('"step": 1', '"step": 9'),
        "hash": written.replace('"sha256": "', '"sha256": "0', 1),
        "shape": written.replace("[2, 3]", "[3, 2]"),
        "name of the seal": written.replace('}, "sha256"', '}, "sha254"'),
    }
    for name, text in harms.items():
        assert text != written, name
        manifest.write_text(text)
        reason = storage.damage(manifest.parent, alone)
        assert reason is not None and str(manifest) in reason and "damaged" in reason, (name, reason)
    values = json.loads(written)
    del values["sha256"]
    manifest.write_text(json.dumps(values, indent=3))
    assert storage.damage(manifest.parent, alone) is None, "written before there were seals"
    values["state"]["step"] = 9
    manifest.write_text(json.dumps(values))
    assert storage.damage(manifest.parent, alone) is None
    assert other_step(manifest.parent, alone) == f"{manifest} says step 9; the folder's name says 1"


def outlived(world: World, folder: str) -> str:
    """A write that is under way when another attempt begins."""
    run, directory, release = Path(folder), Path(folder) / "step-00000005", threading.Event()
    check = take_over(run, (run / ATTEMPT_FILE).read_text().strip()) if world.is_first else lambda: None

    def slowly(path: Path, columns: dict[str, Column]) -> dict[str, object]:
        release.wait()
        return write_file(path, columns)

    storage.Writing(directory, tensors(world, 1.0), {"step": 5}, world, allow=check).finish()
    with mock.patch("lce_dist.storage.write_file", slowly):
        writing = storage.Writing(directory, tensors(world, 2.0), {"step": 5}, world, allow=check)
        barrier(world)
        if world.is_first:
            begin_attempt(run)
        barrier(world)
        release.set()
        with pytest.raises(RunError) as told:
            writing.finish()
    assert not writing.is_committed
    assert torch.equal(loaded(directory, world)["net"], torch.full((2, 3), 1.0)), "what was there is as it was"
    return str(told.value)


@pytest.mark.parametrize("ranks", [1, 2])
def test_who_outlived_its_attempt_commits_nothing(run_distributed, tmp_path, ranks):
    begin_attempt(tmp_path)
    answers = run_distributed(outlived, ranks, str(tmp_path))
    assert len(set(answers)) == 1 and "another attempt of run" in answers[0] and "Free space" not in answers[0]


def test_an_attempt_has_one_writer_and_an_older_driver_s_worker_does_not_become_it(tmp_path: Path) -> None:
    first = begin_attempt(tmp_path)
    lost, found = take_over(tmp_path, first), take_over(tmp_path, first)  # workers that were started again
    found()
    with pytest.raises(RunError, match="another attempt"):
        lost()
    second = begin_attempt(tmp_path)
    with pytest.raises(RunError, match="another attempt"):
        take_over(tmp_path, first)
    take_over(tmp_path, second)()
