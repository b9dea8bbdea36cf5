"""Steps that are not finite: the same verdict on every rank in the same step, and what each policy leaves behind."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from lce_dist import storage
from lce_dist.batch import Batch
from lce_dist.config import Config, OptimConfig, parse_config
from lce_dist.errors import ConfigError, RunError
from lce_dist.head.rows import local_classes
from lce_dist.training.loop import Stage, train_stage
from lce_dist.training.step import train_step
from lce_dist.world import World
from tests.distributed.test_engine import HEAD, parts_of

CLASSES, DIM, STEPS, ROWS = 6, 4, 12, 16


def settings(policy: str, **others: object) -> dict[str, object]:
    return {
        "data": {"shards": "unused"},
        "old": {"net": "unused"},
        "new": {"net": "unused"},
        "head": {"loss": "adaface", "margin_rad": 0.2, "scale": 8.0, **others.pop("head", {})},
        "optim": {"lr": 0.05, "precision": "fp32", "global_batch": ROWS, **others.pop("optim", {})},
        "tracking": {"every_steps": 1},
        "checkpoint": {"every_steps": 5},
        "faults": {"non_finite": policy, **others},
    }


def train(
    world: World, folder: str, values: dict[str, object], breaks_at: tuple[int, ...], end: int = STEPS, code: str = ""
):
    """Weights, rows, buffers, events or the error's words; a NaN comes in through one image of the last rank."""
    config = Config.model_validate(values)
    keys = tuple(f"id{number}" for number in range(CLASSES))[slice(*local_classes(CLASSES, world))]
    stage = Stage("new", CLASSES, DIM, STEPS, 7, Path(folder), "print", None, keys, None, code=code)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12, affine=False), nn.Linear(12, DIM))
    rows = tuple((r + 1) * ROWS // world.size - r * ROWS // world.size for r in range(world.size))
    low = sum(rows[: world.rank])
    events = []

    @contextmanager
    def batches_from(first: int):
        def batches():
            for step in range(first, end):
                generator = torch.Generator().manual_seed(step)
                images = torch.randn(ROWS, 3, 2, 2, generator=generator)
                if step in breaks_at:
                    images[-1, 0, 0, 0] = float("nan")
                labels = torch.arange(step, step + ROWS) % CLASSES
                own = slice(low, low + rows[world.rank])
                yield Batch(images[own], labels[own], torch.arange(ROWS)[own], rows)

        yield batches()

    try:
        trained = train_stage(stage, net, config, None, batches_from, lambda ids: "ids", world, events.append)
    except (RunError, StopIteration) as error:
        return f"{type(error).__name__}: {error}", events
    state = {f"net.{name}": value.detach().clone() for name, value in net.state_dict().items()}
    state |= {f"head.{name}": value.clone() for name, value in trained.head.tensors().items()}
    state |= {f"margin.{name}": value.clone() for name, value in trained.head.margin.state().items()}
    return state, events


CASES = [
    (1, {}),
    (2, {}),
    (3, {"optim": {"accumulation": 2, "global_batch": ROWS}}),
    (2, {"optim": {"zero_stage": 2}}),
    (2, {"head": {"implementation": "dense"}}),
    (2, {"head": {"exponentials": "recompute"}}),
    (2, {"head": {"sample_rate": 0.5}}),
]


@pytest.mark.parametrize(("size", "others"), CASES)
def test_a_skipped_step_changes_nothing(run_distributed, tmp_path, size, others):
    values = settings("skip", **others)
    ends = run_distributed(train, size, str(tmp_path / "a"), values, (6,))
    for rank, (state, events) in enumerate(ends):
        assert not isinstance(state, str), state
        assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
        notes = [event["text"] for event in events if event["type"] == "warning"]
        assert len(notes) == 1 and notes[0].startswith("new model, step 7: "), rank
        assert "nan" in notes[0] or "not finite" in notes[0]
        assert notes[0].endswith("; its batch is left out")
        points = {event["step"]: event["metrics"] for event in events if event["type"] == "metrics"}
        assert "loss/total" not in points[7] and points[8]["faults/steps_lost"] == 1.0
        assert "loss/total" in points[8] and "faults/steps_lost" not in points[6]


@pytest.mark.parametrize(("size", "others"), [case for case in CASES if "sample_rate" not in case[1].get("head", {})])
def test_skipping_is_the_state_before(run_distributed, tmp_path, size, others):
    """A stage whose last step is lost ends as it was before it."""
    values = settings("skip", **others)
    values["checkpoint"] = {"every_steps": STEPS - 1}
    states = run_distributed(train, size, str(tmp_path), values, (STEPS - 1,))
    values["checkpoint"] = {"every_steps": 1000}
    saved = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ["step-00000011", "step-00000012"]
    shapes = storage.read_manifest(saved[0], World()).shapes
    assert shapes == storage.read_manifest(saved[1], World()).shapes
    one, two = ({name: torch.zeros(shape, dtype=_kind(name)) for name, shape in shapes.items()} for _ in range(2))
    storage.load(saved[0], one, World())
    storage.load(saved[1], two, World())
    for name in shapes:
        assert torch.equal(one[name], two[name]), name
    assert not isinstance(states[0][0], str)


def _kind(name: str) -> torch.dtype:
    if "identity" in name:
        return torch.uint8
    if "num_batches" in name or "touched" in name or "row_version" in name:
        return torch.int64
    return torch.float32


@pytest.mark.parametrize("size", [1, 2])
def test_rolled_back_and_killed_is_rolled_back(run_distributed, tmp_path, size):
    values = settings("roll_back")
    whole = run_distributed(train, size, str(tmp_path / "whole"), values, (7,))
    notes = [event["text"] for event in whole[0][1] if event["type"] == "warning"]
    assert len(notes) == 1 and notes[0].startswith("new model, step 8: ")
    assert notes[0].endswith("; everything is as after step 5 again, and the batches since then are left out")
    saves = [event["step"] for event in whole[0][1] if event["type"] == "checkpoint"]
    assert saves == [5, 8, 10, 12]
    # broken off after the roll, and gone on
    ended = run_distributed(train, size, str(tmp_path / "parts"), values, (7,), 9)
    assert all(state.startswith("StopIteration") for state, _ in ended)
    again = run_distributed(train, size, str(tmp_path / "parts"), values, (7,))
    for (state, _), (truth, _) in zip(again, whole, strict=True):
        assert state.keys() == truth.keys()
        assert all(torch.equal(state[name], truth[name]) for name in truth)


def test_going_on_with_other_code_is_told_and_not_refused(run_distributed, tmp_path):
    values = settings("stop")
    for code, end in (("1+a", 7), ("1+a", 8), ("1+b", STEPS)):
        ((state, events),) = run_distributed(train, 1, str(tmp_path), values, (), end, code)
        told = [event["text"] for event in events if event["type"] == "code_changed"]
        wrong = ["new model, step 5: the checkpoint is of code 1+a, this is 1+b"]
        assert told == (wrong if code == "1+b" else [])
    assert not isinstance(state, str)


@pytest.mark.parametrize("size", [1, 3])
def test_what_ends_a_run(run_distributed, tmp_path, size):
    ends = run_distributed(train, size, str(tmp_path / "stop"), settings("stop"), (6,))
    assert len({text for text, _ in ends}) == 1
    assert ends[0][0].startswith("RunError: new model, step 7: ")
    assert "of 16 embeddings are not finite" in ends[0][0] and "Lower optim.lr. Nothing was updated by it" in ends[0][0]
    assert [path.name for path in (tmp_path / "stop" / "checkpoints").glob("step-*")] == ["step-00000005"]
    ends = run_distributed(train, size, str(tmp_path / "most"), settings("skip", non_finite_limit=2), (1, 2, 6))
    assert "It is number 3, and faults.non_finite_limit is 2" in ends[-1][0]
    ends = run_distributed(train, size, str(tmp_path / "none"), settings("roll_back"), (1,))
    assert "No checkpoint is there to go back to" in ends[0][0]


def test_skipping_without_zero_is_refused():
    with pytest.raises(ConfigError, match=r"faults.non_finite is 'skip'; without ZeRO .* Set optim.zero_stage to 1"):
        parse_config(settings("skip", optim={"zero_stage": 0}), "test")


def norm_of(world: World, zero_stage: int) -> list[float]:
    engine, head, batch = parts_of(world, OptimConfig(global_batch=12, zero_stage=zero_stage, precision="fp32"), HEAD)
    norms = []
    for step in range(3):
        train_step(engine, head, batch, step, 0.2, world)
        norms.append(engine.step(0.1))
        head.step()
    return norms


def test_every_zero_stage_tells_the_same_gradient_norm(run_distributed):
    truth = run_distributed(norm_of, 1, 1)[0]
    for size, stage in ((1, 0), (2, 0), (2, 1), (3, 2)):
        for norms in run_distributed(norm_of, size, stage):
            assert norms == pytest.approx(truth, rel=1e-4)
