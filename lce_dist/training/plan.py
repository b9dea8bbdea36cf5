"""Numbers derived from a config, a data set and a number of ranks; the rules that tie them are checked here."""

from __future__ import annotations

from dataclasses import dataclass

from lce_dist.config import Config
from lce_dist.errors import ConfigError


@dataclass(frozen=True)
class StagePlan:
    """How long one network trains: ``steps_per_epoch`` batches of ``global_batch`` rows or one fewer."""

    num_samples: int
    num_classes: int
    steps_per_epoch: int
    total_steps: int


def plan_stage(config: Config, num_samples: int, num_classes: int, epochs: float, num_ranks: int) -> StagePlan:
    """The plan of one network's training on ``num_ranks`` ranks.

    Errors: ConfigError when the batch does not divide, or leaves a rank fewer than two rows.
    """
    batch, parts = config.optim.global_batch, config.optim.accumulation
    unit = num_ranks * parts
    if batch % unit:
        raise ConfigError(
            f"optim.global_batch is {batch}; must be a multiple of ranks * accumulation ({num_ranks} * {parts} = {unit}). "
            f"Use {max(unit, batch // unit * unit)}"
        )
    steps_per_epoch = -(-num_samples // batch)
    smallest = num_samples // steps_per_epoch // num_ranks // parts
    if smallest < 2:
        raise ConfigError(
            f"optim.global_batch is {batch} and the training set has {num_samples} images; a batch of "
            f"{num_samples // steps_per_epoch} over {num_ranks} ranks * {parts} accumulation leaves {smallest} images a "
            "micro-batch, must be at least 2. Use a larger batch, fewer ranks, or more images"
        )
    return StagePlan(num_samples, num_classes, steps_per_epoch, max(1, round(epochs * steps_per_epoch)))
