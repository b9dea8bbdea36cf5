"""What is stored of a head moves between 1, 2, 3 and 4 ranks bit for bit; what does not fit is one error everywhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader

from lce_dist import storage
from lce_dist.batch import Batch
from lce_dist.collectives import barrier
from lce_dist.config import Config, HeadConfig, OptimConfig
from lce_dist.errors import CheckpointError, DataError, LceError, RunError
from lce_dist.head.build import build_head
from lce_dist.head.classifier import OldRows, export, grow, keys_file, known_rows, read_card, save_classifier, shrink
from lce_dist.head.identity import identity_tensor
from lce_dist.head.layer import ShardedHead
from lce_dist.head.rows import initial_rows
from lce_dist.training.checkpoint import Checkpoints
from lce_dist.training.engine import Engine
from lce_dist.training.loop import Stage, train_stage
from lce_dist.world import World, shard_bounds

CLASSES, DIM, SECRET = 9, 4, "person"  # on 4 ranks: 3, 3, 3 and none
OPTIM = OptimConfig(precision="fp32")
HEADS = {
    "fp32": {},
    "split, bf16 momentum": {"rows": "split", "state": "bf16"},
    "adamw": {"optimizer": "adamw", "state": "bf16"},
    "touched": {"sample_rate": 0.4, "sample_policy": "lazy"},
    "statistics": {"loss": "adaface", "margin_cos": None, "margin_rad": 0.4},
}


def head_config(name: str) -> HeadConfig:
    values = {"loss": "cosface", "margin_cos": 0.2, "scale": 8.0, "chunk_classes": 2} | HEADS[name]
    return HeadConfig.model_validate(values)


def keys(count: int = CLASSES) -> list[str]:
    return [f"{SECRET} {number} {'é' * number}" for number in range(count)]


def bounds(world: World, count: int = CLASSES) -> tuple[int, int]:
    return shard_bounds(count, world.rank, world.size)


def own_identities(world: World, all_keys: list[str]) -> torch.Tensor:
    first, last = bounds(world, len(all_keys))
    return identity_tensor(all_keys[first:last], first, world)


def parts(world: World, folder: str, name: str, all_keys: list[str]) -> tuple[Checkpoints, ShardedHead]:
    torch.manual_seed(0)
    engine = Engine(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), OPTIM, world)
    head = build_head(head_config(name), OPTIM, len(all_keys), DIM, 7, world, lambda step: 0.1)
    return Checkpoints(Path(folder), 2, engine, head, own_identities(world, all_keys), world), head


def any_bits(tensor: torch.Tensor, first: int, count: int, seed: int) -> torch.Tensor:
    """Rows first ... of a table of random bits, NaNs among them, that does not depend on the cut."""
    width = tensor.element_size() * (tensor[:1].numel() if tensor.shape[0] else int(np.prod(tensor.shape[1:])))
    whole = np.random.default_rng(seed).integers(0, 256, (count, width), dtype=np.uint8)
    own = torch.from_numpy(whole[first : first + tensor.shape[0]].copy())
    return own.view(tensor.dtype).view(tensor.shape) if own.numel() else tensor.clone()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


def saved(world: World, folder: str, name: str) -> None:
    checkpoints, head = parts(world, folder, name, keys())
    for seed, tensor in enumerate(head.tensors().values()):
        tensor.copy_(any_bits(tensor, bounds(world)[0], CLASSES, seed))
    for seed, value in enumerate(head.margin.state().values()):
        value.fill_(0.1 + seed)
    checkpoints.save(3, {"fingerprint": "print"})
    checkpoints.finish()


def resumed(world: World, folder: str, name: str) -> dict[str, torch.Tensor]:
    checkpoints, head = parts(world, folder, name, keys())
    state = checkpoints.resume("print", lambda text: None)
    assert state is not None and state["step"] == 3
    statistics = {f"statistic {name}": bits(value) for name, value in head.margin.state().items()}
    return {name: bits(tensor) for name, tensor in head.tensors().items()} | statistics


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", HEADS)
def test_a_checkpoint_of_any_number_of_ranks_is_bitwise_the_same_on_any_other(run_distributed, tmp_path, size, name):
    run_distributed(saved, size, str(tmp_path), name)
    alone = World()
    head = build_head(head_config(name), OPTIM, CLASSES, DIM, 7, alone, lambda step: 0.1)
    truth = {key: bits(any_bits(t, 0, CLASSES, seed)) for seed, (key, t) in enumerate(head.tensors().items())}
    assert len(truth) == {"fp32": 3, "split, bf16 momentum": 4, "adamw": 4, "touched": 4, "statistics": 3}[name]
    for other in {1, 2, 3, 4} - {size}:
        found = run_distributed(resumed, other, str(tmp_path), name)
        for key, value in truth.items():
            assert torch.equal(torch.cat([part[key] for part in found]), value), key
        for number, key in enumerate(head.margin.state()):
            expected = bits(torch.tensor(0.1 + number, dtype=torch.float64))
            assert all(torch.equal(part[f"statistic {key}"], expected) for part in found)
        assert bool(head.margin.state()) is (name == "statistics")
        stored = run_distributed(loaded, other, str(tmp_path / "step-00000003"), "head.identity")
        whole = torch.cat(stored).numpy()
        assert [bytes(row).rstrip(b"\0").decode() for row in whole] == keys()


def loaded(world: World, folder: str, name: str) -> torch.Tensor:
    shape = storage.read_manifest(Path(folder), world).shapes[name]
    dtype = {"identity": torch.uint8, "old_count": torch.int64}.get(name.removeprefix("head."), torch.float32)
    first, last = bounds(world, shape[0])
    local = torch.zeros((last - first, *shape[1:]), dtype=dtype)
    storage.load(Path(folder), {name: storage.class_rows(local, shape[0], world)}, world)
    return local


class Caught:
    words = "no error"
    kind: type[BaseException] = object
    took_s = 0.0


@contextmanager
def caught():
    """The error of this rank, and how long it took."""
    answer, start = Caught(), time.monotonic()
    try:
        yield answer
    except LceError as error:
        answer.words, answer.kind = str(error), type(error)
    answer.took_s = time.monotonic() - start


def refused(world: World, folder: str, all_keys: list[str]) -> tuple[Caught, bool]:
    checkpoints, head = parts(world, folder, "fp32", all_keys)
    before = {key: tensor.clone() for key, tensor in head.tensors().items()}
    with caught() as answer:
        checkpoints.resume("print", lambda text: None)
    return answer, all(torch.equal(before[key], tensor) for key, tensor in head.tensors().items())


def one_answer(answers: list[Caught], kind: type[LceError]) -> str:
    assert {answer.kind for answer in answers} == {kind}
    assert len({answer.words for answer in answers}) == 1, {answer.words for answer in answers}
    assert max(answer.took_s for answer in answers) < 10.0
    assert SECRET not in answers[0].words and "\n" not in answers[0].words
    return answers[0].words


SWAPPED = [*keys()[:2], keys()[3], keys()[2], *keys()[4:]]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(
    ("all_keys", "says"),
    [
        (keys(10), "holds 9 classes; this run has 10"),
        (keys(8), "holds 9 classes; this run has 8"),
        ([*keys()[:7], "x", keys()[8]], "the first that differs is class 7 of 9"),
        ([*keys()[:8], keys()[8] + " and longer"], "the first that differs is class 8 of 9"),
        ([*keys()[1:], "z"], "the first that differs is class 0 of 9"),
        (SWAPPED, "the first that differs is class 2 of 9"),
    ],
    ids=["more classes", "fewer classes", "another key", "a longer key", "shifted", "another order"],
)
def test_other_classes_are_one_error_on_every_rank_and_change_nothing(run_distributed, tmp_path, size, all_keys, says):
    run_distributed(saved, 2, str(tmp_path), "fp32")
    content = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    answers = run_distributed(refused, size, str(tmp_path), all_keys)
    assert says in one_answer([answer for answer, _ in answers], CheckpointError)
    assert all(unchanged for _, unchanged in answers)
    assert content == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def deleted_after_the_check(world: World, folder: str, what: str) -> Caught:
    directory = Path(folder) / "step-00000003"
    assert storage.damage(directory, world) is None
    barrier(world)
    if world.is_first:
        (directory / what).unlink()
    barrier(world)
    with caught() as answer:
        loaded(world, str(directory), "head.weight")
    return answer


@pytest.mark.parametrize("what", ["shard-00001-of-00003.safetensors", "manifest.json"])
def test_a_file_that_goes_after_the_check_is_one_error_on_every_rank(run_distributed, tmp_path, what):
    run_distributed(saved, 3, str(tmp_path), "fp32")
    answers = run_distributed(deleted_after_the_check, 2, str(tmp_path), what)
    assert f"{what} is missing" in one_answer(answers, CheckpointError)


def deleted_during_the_load(world: World, folder: str) -> Caught:
    directory = Path(folder) / "step-00000003"

    class Late(HuggingFaceStorageReader):
        def read_metadata(self):
            (directory / "shard-00001-of-00003.safetensors").unlink(missing_ok=True)
            barrier(world)
            return super().read_metadata()

    storage.HuggingFaceStorageReader = Late
    try:
        with caught() as answer:
            loaded(world, str(directory), "head.weight")
    finally:
        storage.HuggingFaceStorageReader = HuggingFaceStorageReader
    return answer


def test_a_file_that_goes_while_it_is_read_is_an_error_and_not_rows_of_zeros(run_distributed, tmp_path):
    run_distributed(saved, 3, str(tmp_path), "fp32")
    answers = run_distributed(deleted_during_the_load, 2, str(tmp_path))
    assert "shard-00001-of-00003.safetensors is missing" in one_answer(answers, CheckpointError)


def trouble_of_one(world: World, folder: str, trouble: str) -> Caught:
    """Only the last rank has it."""
    directory, last = Path(folder) / "step-00000003", world.rank == world.size - 1
    with caught() as answer:
        if trouble == "no file":
            loaded(world, str(directory / "nowhere" if last else directory), "head.weight")
        elif trouble == "another shape":
            storage.load(directory, {"net.weight.0.bias": torch.zeros(3 if last else 2)}, world)
        elif trouble == "a bad key":
            identity_tensor(["a\0b"] if last else [SECRET], world.rank, world)
        elif trouble == "a full disk":
            if last:  # this rank cannot leave its hashes
                (directory.parent / "new.partial" / f"hashes-{world.rank:05d}.json").mkdir(parents=True)
            barrier(world)
            storage.save(directory.parent / "file" / "new", {"a": torch.zeros(2)}, {}, world)
    return answer


@pytest.mark.parametrize(
    ("trouble", "kind", "says"),
    [
        ("no file", CheckpointError, "nowhere/manifest.json is missing"),
        ("another shape", CheckpointError, "stored with shape [2]; this run needs [3]"),
        ("a bad key", DataError, "identity key of class 2 "),
        ("a full disk", RunError, "NotADirectoryError"),
    ],
)
def test_the_trouble_of_one_rank_is_an_error_on_all(run_distributed, tmp_path, trouble, kind, says):
    run_distributed(saved, 2, str(tmp_path), "fp32")
    (tmp_path / "file").touch()
    assert says in one_answer(run_distributed(trouble_of_one, 3, str(tmp_path), trouble), kind)


def classifier_values(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "weight": torch.randn(count, DIM, generator=generator),
        "old_centre": F.normalize(torch.randn(count, DIM, generator=generator)),
        "old_cos_boundary": torch.rand(count, generator=generator),
        "old_count": torch.randint(1, 9, (count,), generator=generator),
    }


def classifier_saved(world: World, folder: str, rows_format: str) -> None:
    first, last = bounds(world)
    values = {name: tensor[first:last] for name, tensor in classifier_values(CLASSES).items()}
    config = head_config("fp32").model_copy(update={"rows": rows_format})
    head = build_head(config, OPTIM, CLASSES, DIM, 7, world, lambda step: 0.1, None, values.pop("weight"))
    old = OldRows(*values.values())
    save_classifier(Path(folder), head.rows, own_identities(world, keys()), old, {"net": "n"}, world)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_classifier_is_bitwise_the_same_on_any_number_of_ranks(run_distributed, tmp_path, size):
    folder = tmp_path / "classifier"
    run_distributed(classifier_saved, size, str(folder), "split" if size % 2 else "fp32")
    card = read_card(folder)
    assert (card.num_classes, card.dim, card.has_old, card.model) == (CLASSES, DIM, True, {"net": "n"})
    for other in (1, 2, 3, 4):
        for name, value in classifier_values(CLASSES).items():
            assert torch.equal(torch.cat(run_distributed(loaded, other, str(folder), name)), value)


def matched(world: World, folder: str, all_keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    first, _ = bounds(world, len(all_keys))
    local, rows = known_rows(Path(folder), own_identities(world, all_keys), DIM, world)
    return local + first, rows


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_found_by_key_whatever_the_order_and_the_cut(run_distributed, tmp_path, size):
    folder = tmp_path / "classifier"
    run_distributed(classifier_saved, 3, str(folder), "fp32")
    wanted = [keys()[8], "stranger", keys()[0], f"{SECRET} 1", keys()[5], "z" * 100]
    found = run_distributed(matched, size, str(folder), wanted)
    assert torch.cat([numbers for numbers, _ in found]).tolist() == [0, 2, 4]
    weight = classifier_values(CLASSES)["weight"]
    assert torch.equal(torch.cat([rows for _, rows in found]), weight[[8, 0, 5]])


def test_what_three_ranks_wrote_is_exported_grown_and_shrunk_by_one_process(run_distributed, tmp_path):
    folder, weight = tmp_path / "classifier", classifier_values(CLASSES)["weight"]
    run_distributed(classifier_saved, 3, str(folder), "split")
    chosen = [keys()[7], keys()[0], keys()[4]]  # of three files
    assert export(folder, chosen, tmp_path / "rows.safetensors") == 3
    assert torch.equal(load_file(tmp_path / "rows.safetensors")["weight"], weight[[7, 0, 4]])
    assert keys_file(tmp_path / "rows.safetensors").read_text() == "".join(f"{key}\n" for key in chosen)
    assert shrink(folder, chosen, tmp_path / "small") == 3
    assert grow(tmp_path / "small", ["new"], torch.ones(1, DIM), tmp_path / "grown") == 4
    parts = run_distributed(loaded, 3, str(tmp_path / "grown"), "weight")
    assert torch.equal(torch.cat(parts)[:3], weight[[0, 4, 7]])
    centre = classifier_values(CLASSES)["old_centre"]
    parts = run_distributed(loaded, 2, str(tmp_path / "grown"), "old_centre")
    assert torch.equal(torch.cat(parts), torch.cat([centre[[0, 4, 7]], torch.zeros(1, DIM)]))


def matching_refused(world: World, folder: str, dim: int) -> Caught:
    with caught() as answer:
        known_rows(Path(folder), own_identities(world, keys()), dim, world)
    return answer


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("flip", "its hash differs"),
        ("missing", "is missing, truncated or changed"),
        ("manifest", "manifest.json is missing"),
        ("dim", "has rows of 4 values; this run has embedding_dim 5"),
        ("foreign", "is no classifier"),
    ],
)
@pytest.mark.parametrize("size", [1, 4])
def test_a_spoiled_classifier_is_one_error_on_every_rank(run_distributed, tmp_path, size, spoil, says):
    folder = tmp_path / "classifier"
    run_distributed(classifier_saved, 3, str(folder), "fp32")
    shard = folder / "shard-00003-of-00003.safetensors"
    if spoil == "flip":
        content = bytearray(shard.read_bytes())
        content[-2] ^= 16
        shard.write_bytes(content)
    elif spoil == "missing":
        shard.unlink()
    elif spoil == "manifest":
        (folder / "manifest.json").unlink()
    elif spoil == "foreign":
        run_distributed(saved, 1, str(tmp_path), "fp32")
        folder = tmp_path / "step-00000003"
    answers = run_distributed(matching_refused, size, str(folder), 5 if spoil == "dim" else DIM)
    assert says in one_answer(answers, CheckpointError)


def started(world: World, folder: str, start_from: str | None) -> tuple[torch.Tensor, list[dict[str, object]]]:
    """One step at a learning rate that moves no float32 number: the rows that come back are those it began with."""
    all_keys = ["stranger", *keys()[4:6], "z"]
    first, last = bounds(world, len(all_keys))
    config = Config.model_validate(
        {
            "data": {"shards": "unused"},
            "old": {"net": "unused"},
            "new": {"net": "unused"},
            "head": head_config("touched").model_dump(),
            "optim": {"lr": 1e-30, "weight_decay": 0.0, "precision": "fp32", "global_batch": 8},
        }
    )
    path = None if start_from is None else Path(start_from)
    stage = Stage(
        "new", len(all_keys), DIM, 1, 7, Path(folder) / "run", "print", None, tuple(all_keys[first:last]), path
    )
    rows = tuple(8 // world.size for _ in range(world.size))
    labels = torch.arange(8 // world.size) % 4
    batch = Batch(torch.randn(len(labels), 3, 2, 2), labels, labels, rows)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, DIM))

    @contextmanager
    def batches_from(step: int):
        yield iter([batch])

    events: list[dict[str, object]] = []
    trained = train_stage(stage, net, config, None, batches_from, lambda ids: "ids", world, events.append)
    told = [event for event in events if event["type"] == "rows_started"]
    return trained.head.rows.weight.load(slice(0, last - first)).clone(), told


@pytest.mark.parametrize("size", [1, 2])
def test_a_stage_starts_from_a_classifiers_rows_where_it_knows_the_identity(run_distributed, tmp_path, size):
    run_distributed(classifier_saved, 3, str(tmp_path / "classifier"), "fp32")
    answers = run_distributed(started, size, str(tmp_path / "a"), str(tmp_path / "classifier"))
    seeded, weight = initial_rows(0, 4, DIM, 7), classifier_values(CLASSES)["weight"]
    expected = torch.stack([seeded[0], weight[4], weight[5], seeded[3]])
    assert torch.equal(torch.cat([rows for rows, _ in answers]), expected)
    event = {"type": "rows_started", "stage": "new", "known_classes": 2, "other_classes": 2}
    assert all(told == [event] for _, told in answers)
    without = run_distributed(started, size, str(tmp_path / "b"), None)
    assert torch.equal(torch.cat([rows for rows, _ in without]), seeded) and not without[0][1]
