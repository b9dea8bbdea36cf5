"""Train one network to its last step: resume, step, report, checkpoint, and leave its weights behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lce_dist.batch import Batch
from lce_dist.collectives import all_reduce_sum, gather_rows
from lce_dist.config import Config
from lce_dist.errors import Interrupted
from lce_dist.head.build import build_head
from lce_dist.head.classifier import known_rows
from lce_dist.head.identity import identity_tensor
from lce_dist.head.layer import ShardedHead
from lce_dist.head.rows import initial_rows, local_classes
from lce_dist.training.checkpoint import Checkpoints
from lce_dist.training.engine import Engine
from lce_dist.training.flight import FlightRecord
from lce_dist.training.lost import LostSteps
from lce_dist.training.profile import StepProfile
from lce_dist.training.ranks import RankTimes, rank_metrics
from lce_dist.training.requests import Asked, Requests
from lce_dist.training.schedules import lr_at
from lce_dist.training.step import Compatibility, LossTerms, train_step
from lce_dist.training.step_log import IdsLog, PointsLog, points_after
from lce_dist.world import World

Report = Callable[[dict[str, Any]], None]
POINTS_FILE = "points.jsonl"  # in a stage's directory
BatchSource = Callable[[int], AbstractContextManager[Iterator[Batch]]]


@dataclass(frozen=True)
class Stage:
    """One network to train: its name ("old", "new", "independent"), classes, steps and directory.

    identities: the keys of this rank's classes, in their order. start_from: a classifier that gives rows to
    the identities that it knows. requests_in: where files ask to save, to end with Interrupted, to record a profile.
    told_step: up to which step the driver has heard this stage's metrics; what was measured since is told again.
    may_commit: asked immediately before a checkpoint is committed; its error prevents it. code: goes into checkpoints.
    """

    name: str
    num_classes: int
    embedding_dim: int
    total_steps: int
    seed: int
    directory: Path
    fingerprint: str
    mlflow_run_id: str | None
    identities: tuple[str, ...]
    start_from: Path | None
    requests_in: Path | None = None
    told_step: int = 0
    may_commit: Callable[[], None] = lambda: None
    code: str = ""


@dataclass(frozen=True)
class Trained:
    """What a stage leaves beside its network: its head with settled rows, and whose they are.

    images_per_s: of this call; 0 when nothing was left to do.
    """

    images_per_s: float
    head: ShardedHead
    identity_SL: torch.Tensor


def train_stage(
    stage: Stage,
    net: nn.Module,
    config: Config,
    compat: Compatibility | None,
    batches_from: BatchSource,
    hash_ids: Callable[[np.ndarray], str],
    world: World,
    report: Report,
) -> Trained:
    """Train ``net`` in place; its head comes back with its rows settled.

    ``batches_from(step)`` yields the batches of steps ``step``, ``step + 1``, ... of the run.
    Errors: RunError when the loss or the gradient is not finite and ``faults.non_finite`` stops there; nothing is saved
    from then on. CheckpointError for checkpoints or a classifier that do not fit. What ends it leaves ``flight-RANK.json``
    beside the checkpoints. Interrupted, on every rank in the same step, when it was asked to stop.
    """
    optim = config.optim
    identity_SL = identity_tensor(stage.identities, local_classes(stage.num_classes, world)[0], world)
    rows_from_old = config.compat.rows_from_old
    weight_SD = _first_rows(stage, compat if rows_from_old else None, identity_SL, world, report)

    def head_lr(step: int) -> float:
        return lr_at(step, stage.total_steps, optim.head_lr or optim.lr, optim.warmup_fraction)

    head = build_head(
        config.head,
        optim,
        stage.num_classes,
        stage.embedding_dim,
        stage.seed,
        world,
        head_lr,
        compat.method.anchor() if compat is not None else None,
        weight_SD,
    )
    method = compat.method.to(world.device) if compat is not None else None
    engine = Engine(net, optim, world, method)
    directory, keep = stage.directory / "checkpoints", config.checkpoint.keep
    checkpoints = Checkpoints(directory, keep, engine, head, identity_SL, world, stage.may_commit)

    def warn(text: str) -> None:
        report({"type": "warning", "text": text})

    state = checkpoints.resume(stage.fingerprint, warn)
    first_step = 0 if state is None else int(state["step"])
    lost_before = 0 if state is None else int(state.get("steps_lost", 0))
    lost = LostSteps(stage.name, config.faults, lost_before, engine, checkpoints, stage.fingerprint, warn)
    report(
        {
            "type": "stage_start",
            "stage": stage.name,
            "total_steps": stage.total_steps,
            "first_step": first_step,
            "num_classes": stage.num_classes,
        }
    )
    if state is not None and state.get("code", stage.code) != stage.code:
        text = f"{stage.name} model, step {first_step}: the checkpoint is of code {state['code']}, this is {stage.code}"
        report({"type": "code_changed", "stage": stage.name, "text": text})
    ids_log = points_log = None
    if world.is_first:
        again = points_after(stage.directory / POINTS_FILE, stage.told_step)
        report({"type": "points", "stage": stage.name, "points": [one for one in again if one["step"] <= first_step]})
        ids_log = IdsLog(stage.directory / "batch_ids.tsv", first_step, hash_ids)
        points_log = PointsLog(stage.directory / POINTS_FILE, first_step)
    engine.net.train()
    meter = _Meter()
    requests, profile = Requests(stage.requests_in, world), StepProfile(stage.directory / "profiles", world)
    times = RankTimes(world)
    flight = FlightRecord(stage.directory / f"flight-{world.rank}.json", world.rank)
    with _recorded(flight), checkpoints.kept(), batches_from(first_step) as batches:
        for step in range(first_step, stage.total_steps):
            # dropout is the only consumer; the same stream whether or not the run was interrupted
            torch.manual_seed(_step_seed(stage.seed, step, world.rank))
            meter.wait()
            batch = next(batches)
            meter.work()
            lr = lr_at(step, stage.total_steps, optim.lr, optim.warmup_fraction)
            lost.before_step()
            terms = train_step(engine, head, batch, step, head_lr(step), world, compat)
            net_norm = engine.step(lr)
            alignment = head.step()
            meter.images += batch.global_rows
            ids = gather_rows(batch.sample_ids.to(world.device), batch.rows_per_rank, world)
            hashed = None if ids_log is None else ids_log.write(step, ids.cpu().numpy())
            flight.note(step + 1, meter.last_wait_s, batch.global_rows, lr, net_norm, terms, hashed)

            done, asked = step + 1, Asked()
            times.step(meter.last_wait_s)
            if (recorded := profile.step(done)) is not None:
                report(
                    {"type": "profile", "stage": stage.name, "step": done, "files": [str(path) for path in recorded]}
                )
            is_lost = lost.after_step(done, terms, net_norm)
            rolled_back = is_lost and lost.rolls_back
            if done % config.tracking.every_steps == 0 or done == stage.total_steps or done == first_step + 1:
                metrics = _metrics(terms, lr, net_norm, meter)
                if head.anchor is not None:
                    metrics["loss/alignment"] = float(all_reduce_sum(alignment, world))
                    metrics["loss/boundary"] = float(terms.boundary)
                    metrics["loss/total"] += head.anchor.align_weight * metrics["loss/alignment"]
                if compat is not None and float(terms.method) != 0.0:
                    metrics["loss/method"] = float(terms.method)
                if lost.count:
                    metrics["faults/steps_lost"] = float(lost.count)
                if is_lost:
                    metrics = {
                        name: value for name, value in metrics.items() if not name.startswith(("loss/", "optim/"))
                    }
                own, ranks = times.take()
                metrics |= rank_metrics(ranks)
                if (slow := times.straggler(ranks)) is not None:
                    warn(slow)
                asked = requests.read()
                if asked.profile_steps:
                    profile.start(asked.profile_steps)
                if points_log is not None:
                    points_log.write(done, time.time_ns() // 1_000_000, metrics)
                remaining_s = (stage.total_steps - done) / max(1e-9, meter.steps_per_s(done - first_step))
                report(
                    {
                        "type": "metrics",
                        "stage": stage.name,
                        "step": done,
                        "total_steps": stage.total_steps,
                        "metrics": metrics,
                        "own": own,
                        "eta_s": remaining_s,
                    }
                )
            ends = done == stage.total_steps or asked.stop
            if done % config.checkpoint.every_steps == 0 or ends or asked.save or rolled_back:
                checkpoints.save(
                    done,
                    {
                        "stage": stage.name,
                        "fingerprint": stage.fingerprint,
                        "random": {"seed": stage.seed, "next_step": done},
                        "samples_read": {"next_step": done},
                        "num_ranks": world.size,
                        "code": stage.code,
                        "steps_lost": lost.count,
                        "mlflow_run_id": stage.mlflow_run_id,
                    },
                )
                if ends or asked.save:
                    checkpoints.finish()
            for committed in checkpoints.committed():
                report({"type": "checkpoint", "stage": stage.name, "step": committed})
            if asked.stop:
                raise Interrupted(
                    f"stopped as asked after step {done} of {stage.total_steps} of the {stage.name} model, which is saved; the "
                    "same command goes on from there"
                )
    engine.average_buffers()
    for log in (ids_log, points_log):
        if log is not None:
            log.close()
    head.settle(stage.total_steps)
    return Trained(meter.images_per_s, head, identity_SL)


@contextmanager
def _recorded(flight: FlightRecord) -> Iterator[None]:
    """Leave the flight record where a stage fails; one that was asked to stop has not failed."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        flight.write(error)
        raise


def _first_rows(
    stage: Stage, from_old: Compatibility | None, identity_SL: torch.Tensor, world: World, report: Report
) -> torch.Tensor | None:
    """Rows (S, D) to start with: a classifier's where it knows the identity, else old centres or seeded rows.

    None means seeded rows alone.
    """
    if stage.start_from is None and from_old is None:
        return None
    first, last = local_classes(stage.num_classes, world)
    weight_SD = initial_rows(first, last, stage.embedding_dim, stage.seed).to(world.device)
    if from_old is not None:
        weight_SD = from_old.old_space.centre_SD * weight_SD.norm(dim=1, keepdim=True)
    if stage.start_from is not None:
        local_N, rows_ND = known_rows(stage.start_from, identity_SL, stage.embedding_dim, world)
        weight_SD[local_N.to(world.device)] = rows_ND.to(world.device)
        known = int(all_reduce_sum(torch.tensor([len(local_N)], device=world.device), world).item())
        report(
            {
                "type": "rows_started",
                "stage": stage.name,
                "known_classes": known,
                "other_classes": stage.num_classes - known,
            }
        )
    return weight_SD


class _Meter:
    """Images per second and the share of time spent waiting for data, over the whole call."""

    def __init__(self) -> None:
        self.images = 0
        self._start = self._mark = time.perf_counter()
        self._waited_s = self.last_wait_s = 0.0

    def wait(self) -> None:
        self._mark = time.perf_counter()

    def work(self) -> None:
        self.last_wait_s = time.perf_counter() - self._mark
        self._waited_s += self.last_wait_s

    @property
    def images_per_s(self) -> float:
        return self.images / (time.perf_counter() - self._start)

    @property
    def wait_fraction(self) -> float:
        return self._waited_s / (time.perf_counter() - self._start)

    def steps_per_s(self, steps: int) -> float:
        return steps / (time.perf_counter() - self._start)


def _metrics(terms: LossTerms, lr: float, net_norm: float, meter: _Meter) -> dict[str, float]:
    metrics = {
        "loss/total": float(terms.total),
        "loss/classification": float(terms.classification),
        "optim/lr": lr,
        "optim/net_gradient_norm": net_norm,
        "speed/images_per_s": meter.images_per_s,
        "speed/data_wait_fraction": meter.wait_fraction,
    }
    return metrics


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) & (2**63 - 1)
