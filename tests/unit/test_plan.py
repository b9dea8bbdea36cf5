"""Derived numbers and the learning-rate policy, worked by hand."""

import pytest

from lce_dist.config import load_config
from lce_dist.errors import ConfigError
from lce_dist.training.plan import plan_stage
from lce_dist.training.schedules import lr_at
from tests.unit.test_config import QUICKSTART


def plan(num_samples: int, num_ranks: int, *overrides: str, epochs: float = 2.0):
    return plan_stage(load_config(QUICKSTART, list(overrides)), num_samples, 10, epochs, num_ranks)


def test_steps_worked_by_hand() -> None:
    made = plan(1000, 4, "optim.global_batch=96", epochs=2.5)
    assert (made.steps_per_epoch, made.total_steps) == (11, 28)  # ceil(1000 / 96) = 11; round(27.5) = 28
    assert plan(96, 4, "optim.global_batch=96").steps_per_epoch == 1
    assert plan(97, 4, "optim.global_batch=96").steps_per_epoch == 2


@pytest.mark.parametrize(
    ("num_samples", "num_ranks", "overrides", "words"),
    [
        (
            1000,
            5,
            ["optim.global_batch=96"],
            "global_batch is 96; must be a multiple of ranks * accumulation (5 * 1 = 5). Use 95",
        ),
        (1000, 4, ["optim.global_batch=96", "optim.accumulation=5"], "(4 * 5 = 20). Use 80"),
        (1000, 64, ["optim.global_batch=32"], "(64 * 1 = 64). Use 64"),
        (97, 32, ["optim.global_batch=96"], "leaves 1 images a micro-batch, must be at least 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(num_samples, num_ranks, overrides, words) -> None:
    with pytest.raises(ConfigError, match=r"optim\.global_batch") as caught:
        plan(num_samples, num_ranks, *overrides)
    assert words in str(caught.value)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [lr_at(step, 100, 0.4, 0.1) for step in range(101)]
    assert rates[:3] == pytest.approx([0.04, 0.08, 0.12])
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert lr_at(0, 1, 0.4, 0.0) == 0.4
