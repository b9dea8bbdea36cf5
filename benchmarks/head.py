"""What a step of the classification layer costs: ours, in each mode, against the materialising head and its kin.

    python -m benchmarks.head [--quick] [--accuracy] [--out DIR]

A step is forward, backward and optimizer for B embeddings of 512 dimensions under CosFace. Times: contestants take
turns in one process (one a rank), a round each, over the same memory. Memory: each in a process of its own. Equal
work: loss, embedding gradient and row gradient (from the change of the rows) against float64. With a GPU all of it
runs there. ``--accuracy`` measures only the table of number formats. Ctrl-C ends the timing early and writes what there
is; on two quiet cores all of it takes about 25 minutes.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.head_peers import (
    CUT,
    DATA_PARALLEL,
    DIM,
    FLOOR,
    FLOOR_AGAIN,
    LESS_WORK,
    LIGER,
    MARGIN_COS,
    OURS,
    OURS_CUDA,
    REFERENCE,
    REFERENCE_TF32,
    SCALE,
    SPLIT,
    TORCH_FUSED,
    Contestant,
    OurHead,
    Problem,
    Rule,
    make,
    needed_bytes,
    rows_of,
    why_absent,
)
from benchmarks.record import Mark, file_stem, write_record
from lce_dist.collectives import all_reduce_max, barrier
from lce_dist.world import World

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CPU_BYTES = 14 * 2**30  # of a 24 GiB machine that has other things to do
MOST_CLASSES_FP32 = 20_000_000  # beyond, the float32 table that contestants share leaves no room for split rows
CHECK_LR = 256.0  # so large that the change of a row is not lost in the row's own rounding
FP32_MODES = ("ours, keep fp32", "ours, recompute")
PAIR = re.compile(r"^Vm(HWM|RSS):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """What is measured: ``times`` and ``memory`` with every contestant in ``names``, marks at ``judged``."""

    device: str
    names: tuple[str, ...]
    memory_names: tuple[str, ...]
    times: tuple[Problem, ...]
    memory: tuple[Problem, ...]
    judged: Problem
    rounds: int
    block_s: float  # a sample is the mean of as many steps as fit into this, at least one
    most_logits_fused: int  # beyond, torch's fused loss takes a row or a few at a time: minutes a step
    accuracy_classes: int

    def rounds_of(self, problem: Problem) -> int:
        """Three where a CPU needs half a minute a round."""
        slow = self.device == "cpu" and problem.num_classes * problem.batch > 2e8
        return 3 if slow else self.rounds


def plan_of(quick: bool, on_cuda: bool) -> Plan:
    if on_cuda:
        alone = ("ours, keep fp32", *OURS_CUDA, SPLIT, REFERENCE, REFERENCE_TF32, DATA_PARALLEL)
        large = () if quick else (Problem(1_000_000, 4096), Problem(10_000_000, 1024), Problem(29_000_000, 1024))
        sizes = tuple(Problem(c, 4096) for c in (10_000, 30_000, 100_000, 257_000))
        return Plan(
            device="cuda",
            names=(FLOOR, FLOOR_AGAIN, *alone, TORCH_FUSED, CUT, LIGER),
            memory_names=alone,
            times=(*sizes, *large),
            memory=sizes[1:],
            judged=sizes[-1],
            rounds=5 if quick else 9,
            block_s=0.2,
            most_logits_fused=100_000 * 4096,
            accuracy_classes=200_000,
        )
    names = (FLOOR, FLOOR_AGAIN, *OURS, REFERENCE, DATA_PARALLEL, TORCH_FUSED)
    if quick:
        sizes = tuple(Problem(c, 256) for c in (2_000, 4_000, 8_000, 16_000))
        return Plan(
            device="cpu",
            names=names,
            memory_names=(*OURS, REFERENCE),
            times=(*sizes, Problem(4_000, 256, 2)),
            memory=sizes[1:],
            judged=sizes[-1],
            rounds=5,
            block_s=0.05,
            most_logits_fused=2_000 * 256,
            accuracy_classes=20_000,
        )
    sizes = tuple(Problem(c, 256) for c in (10_000, 30_000, 100_000, 300_000, 1_000_000))
    batches = tuple(Problem(10_000, b) for b in (1024, 4096, 8192))
    shared = tuple(Problem(c, 256, r) for r in (2, 4) for c in (10_000, 100_000) if r <= max(2, cores() // 2))
    return Plan(
        device="cpu",
        names=names,
        memory_names=(*OURS, REFERENCE, DATA_PARALLEL),
        times=(*sizes[:-1], *shared, *batches, sizes[-1]),
        memory=sizes[:4],
        judged=sizes[2],
        rounds=7,
        block_s=0.3,
        most_logits_fused=30_000 * 256,
        accuracy_classes=200_000,
    )


def cores() -> int:
    return len(os.sched_getaffinity(0))


# What runs in child processes


def run_world(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` on every rank of a fresh world; each rank's answer.

    Errors: RuntimeError with the child's traceback, or when it was ended from outside (as for want of memory).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.head_peers", "benchmarks.record", "matplotlib.pyplot"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            store = str(Path(folder) / "store")
            process = context.Process(target=_serve, args=(rank, ranks, store, there, function, arguments))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        answers = []
        for pipe in pipes:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, "the process was ended from outside; most likely memory ran out"))
            except KeyboardInterrupt:
                for process in processes:
                    process.kill()
                raise
        for process in processes:
            process.join(timeout=30)
            process.kill()
    for good, answer in answers:
        if not good:
            raise RuntimeError(answer)
    return [answer for _, answer in answers]


def _serve(
    rank: int, ranks: int, store: str, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # torch renames its collectives, one line a rank and call
    on_cuda = torch.cuda.is_available()
    torch.set_num_threads(max(1, cores() // ranks))
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        pipe.send((True, function(World(rank, ranks, device=torch.device("cuda" if on_cuda else "cpu")), *arguments)))
    except BaseException:  # noqa: BLE001 - reported to the parent with its traceback
        pipe.send((False, traceback.format_exc()))
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def inputs_of(problem: Problem, world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole table, the rank's embeddings and labels: half of the batch near its class, half anywhere."""
    generator = torch.Generator(world.device).manual_seed(problem.num_classes)
    weight_CD = torch.randn((problem.num_classes, DIM), generator=generator, device=world.device).mul_(0.01)
    return weight_CD, *_batch_of(problem, weight_CD, generator, world)


def _batch_of(
    problem: Problem, weight_CD: torch.Tensor | None, generator: torch.Generator, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    labels_B = torch.randint(problem.num_classes, (problem.batch,), generator=generator, device=world.device)
    emb_BD = F.normalize(torch.randn((problem.batch, DIM), generator=generator, device=world.device))
    if weight_CD is not None:
        emb_BD[::2] += 0.7 * F.normalize(weight_CD[labels_B[::2]])
    per_rank = problem.batch // world.size
    own = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    return F.normalize(emb_BD)[own], labels_B[own]


def measure_times(
    world: World, names: tuple[str, ...], problem: Problem, rounds: int, block_s: float, chunk_classes: int
) -> tuple[dict[str, list[float]], dict[str, str], float]:
    """Seconds a step, one sample a round and contestant; who failed, with the reason; bytes a second of a plain copy.

    In a world of one a contestant that fails is left out of the following rounds; with more, the world ends.
    """
    if names == (SPLIT,):  # larger than any float32 table
        generator = torch.Generator(world.device).manual_seed(1)
        weight_CD, (emb_bD, labels_b) = None, _batch_of(problem, None, generator, world)
    else:
        weight_CD, emb_bD, labels_b = inputs_of(problem, world)
    copies: list[float] = []
    samples: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    contestant: Contestant | None = None
    for _ in range(rounds):
        copies.append(copy_bytes_per_s(world))
        for name in [name for name in names if name not in failed]:
            try:
                contestant = make(name, problem, None if name == SPLIT else weight_CD, Rule(), world, chunk_classes)
                samples[name].append(seconds_a_step(contestant, emb_bD, labels_b, block_s, world))
            except Exception as error:
                if world.size > 1:
                    raise
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            contestant = None  # before the next one is made
            _release(world)
    return {name: samples[name] for name in names if name not in failed}, failed, statistics.median(copies)


def seconds_a_step(
    contestant: Contestant, emb_bD: torch.Tensor, labels_b: torch.Tensor, block_s: float, world: World
) -> float:
    """Mean of a block of steps, after warm-up; its length is agreed on by all ranks."""

    def block(steps: int) -> float:
        barrier(world)
        _wait(world)
        started = time.perf_counter()
        for _ in range(steps):
            contestant.step(emb_bD, labels_b)
        _wait(world)
        seconds = torch.tensor((time.perf_counter() - started) / steps, device=world.device)
        return float(all_reduce_max(seconds, world))

    if world.device.type == "cuda":
        block(3)  # compilation and the allocator's cache
    warm = block(1)
    return block(max(1, min(20, int(block_s / warm))))


def copy_bytes_per_s(world: World) -> float:
    source = torch.ones((2**30 if world.device.type == "cuda" else 2**25), device=world.device)
    target = torch.empty_like(source).copy_(source)
    _wait(world)
    started = time.perf_counter()
    target.copy_(source)
    _wait(world)
    return 2 * source.numel() * source.element_size() / (time.perf_counter() - started)


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _release(world: World) -> None:
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made under it and still live, and their highest sum.

    Exact for what the operators are given and give back; buffers inside one operator are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._see(storage, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._see(storage, storage.nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def forget(_: weakref.ref[torch.UntypedStorage]) -> None:
            self._known.pop(key, None)
            self.live -= num_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def measure_memory(world: World, name: str, problem: Problem) -> dict[str, float]:
    """Peak bytes above rows, state and inputs over two steps: of tensors, and of the process (of a GPU: allocated)."""
    weight_CD, emb_bD, labels_b = inputs_of(problem, world)
    # A step with a small table first: code and the libraries' own buffers are not counted.
    with LiveBytes():
        make(name, Problem(64, problem.batch), weight_CD[:64].clone(), Rule(), world, 64).step(emb_bD, labels_b % 64)
    contestant = make(name, problem, None if name == SPLIT else weight_CD, Rule(), world, 64)
    if name == SPLIT:
        del weight_CD
    for tensor in contestant.must_exist():
        tensor.add_(0)  # zeros are pages that do not exist until they are written to
    _release(world)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            contestant.step(emb_bD, labels_b)
        return {"peak_bytes": float(torch.cuda.max_memory_allocated() - before)}
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    resident = _resident_bytes()["RSS"]
    with LiveBytes() as tracker:
        for _ in range(2):
            contestant.step(emb_bD, labels_b)
    return {"peak_bytes": float(tracker.peak), "resident_peak_bytes": float(_resident_bytes()["HWM"] - resident)}


def _resident_bytes() -> dict[str, int]:
    return {name: 1024 * int(kilo) for name, kilo in PAIR.findall(Path("/proc/self/status").read_text())}


@dataclass(frozen=True)
class Truth:
    """float64 autograd through the whole logits."""

    logits_BC: torch.Tensor  # before the margin
    loss_B: torch.Tensor
    grad_BD: torch.Tensor
    grad_CD: torch.Tensor


def truth_of(emb_BD: torch.Tensor, weight_CD: torch.Tensor, labels_B: torch.Tensor) -> Truth:
    """**Memory**: five (C, D) and four (B, C) tensors of float64."""
    emb, weight = emb_BD.double().requires_grad_(), weight_CD.double().requires_grad_()
    logits_BC = SCALE * (F.normalize(emb) @ F.normalize(weight).T)
    margin_BC = torch.zeros_like(logits_BC).scatter_(1, labels_B[:, None], SCALE * MARGIN_COS)
    loss_B = F.cross_entropy(logits_BC - margin_BC, labels_B, reduction="none")
    loss_B.mean().backward()
    assert emb.grad is not None and weight.grad is not None
    return Truth(logits_BC.detach(), loss_B.detach(), emb.grad, weight.grad)


@dataclass(frozen=True)
class Naive:
    """16-bit training as autocast does it, at its best: every product sums in float32, the softmax is float32.

    operand: format of the logits' factors, scaled by ``stretch`` first; gradient: of the logits' gradient and its factors.
    """

    operand: torch.dtype
    gradient: torch.dtype
    stretch: float = 1.0
    loss_scale: float = 1.0

    def outcome(self, emb_BD: torch.Tensor, weight_CD: torch.Tensor, labels_B: torch.Tensor) -> Outcome:
        unit_BD, unit_CD = F.normalize(emb_BD), F.normalize(weight_CD)
        logits_BC = SCALE * (self._rounded(unit_BD) @ self._rounded(unit_CD).T)
        cell = (torch.arange(labels_B.shape[0], device=labels_B.device), labels_B)
        with_margin_BC = logits_BC.clone()
        with_margin_BC[cell] -= SCALE * MARGIN_COS
        log_p_BC = with_margin_BC.log_softmax(1)
        grad_BC = log_p_BC.exp()
        grad_BC[cell] -= 1.0
        grad_BC = (grad_BC * (SCALE * self.loss_scale / labels_B.shape[0])).to(self.gradient).float() / self.loss_scale
        grad_BD = grad_BC @ unit_CD.to(self.gradient).float()
        grad_CD = grad_BC.T @ unit_BD.to(self.gradient).float()
        return Outcome(
            logits_BC,
            -log_p_BC[cell],
            _through_normalise(grad_BD, emb_BD, unit_BD),
            _through_normalise(grad_CD, weight_CD, unit_CD),
        )

    def _rounded(self, values: torch.Tensor) -> torch.Tensor:
        return (values * self.stretch).to(self.operand).float() / self.stretch


def _through_normalise(grad: torch.Tensor, vector: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return (grad - (grad * unit).sum(1, keepdim=True) * unit) / vector.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class Outcome:
    """What one contestant made of a step; without logits where none are to be had."""

    logits_BC: torch.Tensor | None
    loss_B: torch.Tensor  # or its mean alone
    grad_BD: torch.Tensor
    grad_CD: torch.Tensor


NAIVE = {
    "naive bf16": Naive(torch.bfloat16, torch.bfloat16),
    "naive fp16, loss scale 1024": Naive(torch.float16, torch.float16, loss_scale=1024.0),
    "naive e4m3 (x 256), bf16 gradient": Naive(torch.float8_e4m3fn, torch.bfloat16, stretch=256.0),
}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||; 0 for nothing at all."""
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def errors_of(outcome: Outcome, truth: Truth, labels_B: torch.Tensor, own: slice) -> dict[str, float]:
    """Relative errors; rows with and without positives apart, for a norm over all hides the latter."""
    positive_C = torch.zeros(truth.grad_CD.shape[0], dtype=torch.bool, device=labels_B.device)
    positive_C[labels_B] = True
    positive_S, grad_SD = positive_C[own], truth.grad_CD[own]
    return {
        "loss": relative_error(outcome.loss_B.double().mean(), truth.loss_B.mean()),
        "dE": relative_error(outcome.grad_BD, truth.grad_BD),
        "dW": relative_error(outcome.grad_CD, grad_SD),
        "dW with positives": relative_error(outcome.grad_CD[positive_S], grad_SD[positive_S]),
        "dW without": relative_error(outcome.grad_CD[~positive_S], grad_SD[~positive_S]),
    }


def check_work(world: World, names: tuple[str, ...], problem: Problem) -> dict[str, dict[str, float]]:
    """Errors of every contestant that solves our problem, and of the naive 16-bit ones, against float64."""
    whole = World(device=world.device)
    weight_CD, emb_BD, labels_B = inputs_of(problem, whole)
    truth = truth_of(emb_BD, weight_CD, labels_B)
    per_rank = problem.batch // world.size
    mine = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    own = rows_of(problem, world)
    own_truth = Truth(truth.logits_BC, truth.loss_B, truth.grad_BD[mine], truth.grad_CD)
    errors = {}
    for name in names:
        contestant = make(name, problem, weight_CD.clone(), Rule(CHECK_LR, 0.0, 0.0), world, 1024)
        outcome = _one_step(contestant, emb_BD[mine], labels_B[mine], weight_CD[own])
        errors[name] = errors_of(outcome, own_truth, labels_B, own)
    if world.size == 1:
        for name, naive in NAIVE.items():
            errors[name] = errors_of(naive.outcome(emb_BD, weight_CD, labels_B), truth, labels_B, own)
    return errors


def _one_step(contestant: Contestant, emb_bD: torch.Tensor, labels_b: torch.Tensor, before_SD: torch.Tensor) -> Outcome:
    """The row gradient is what SGD without momentum and decay took from the rows."""
    loss, grad_bD = contestant.step(emb_bD, labels_b)
    return Outcome(None, loss[None], grad_bD, (before_SD.double() - contestant.rows().double()) / CHECK_LR)


def measure_formats(world: World, problem: Problem) -> dict[str, dict[str, float]]:
    """Errors by number format: logits (rms, largest), loss by row (rms), gradients. Targets' logits are left out."""
    weight_CD, emb_BD, labels_B = inputs_of(problem, world)
    truth = truth_of(emb_BD, weight_CD, labels_B)
    everything = rows_of(problem, world)
    others_BC = torch.ones_like(truth.logits_BC, dtype=torch.bool).scatter_(1, labels_B[:, None], False)

    def row(outcome: Outcome) -> dict[str, float]:
        assert outcome.logits_BC is not None
        error_N = (outcome.logits_BC.double() - truth.logits_BC)[others_BC]
        return {
            "logit rms": float(error_N.square().mean().sqrt()),
            "logit max": float(error_N.abs().max()),
            "loss rms": float((outcome.loss_B.double() - truth.loss_B).square().mean().sqrt()),
            **errors_of(outcome, truth, labels_B, everything),
        }

    table = {}
    ours = {"ours fp32": "ours, keep fp32", "ours bf16": "ours, keep bf16", "ours fp16": "ours, keep fp16, chunked"}
    for title, name in ours.items():
        head = make(name, problem, weight_CD.clone(), Rule(CHECK_LR, 0.0, 0.0), world, 1024)
        assert isinstance(head, OurHead)
        logits_BC, loss_B = our_logits(head, emb_BD, labels_B)
        outcome = _one_step(head, emb_BD, labels_B, weight_CD)
        table[title] = row(Outcome(logits_BC, loss_B, outcome.grad_BD, outcome.grad_CD))
        del head, outcome
    for title, naive in NAIVE.items():
        table[title] = row(naive.outcome(emb_BD, weight_CD, labels_B))
    return table


def our_logits(ours: OurHead, emb_BD: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and losses by row, from the head's own primitive: the logarithm of what it would store."""
    rows, settings = ours.head.rows, ours.head.settings
    unit_BD = F.normalize(emb_BD)
    parts, sum_B = [], torch.zeros_like(unit_BD[:, 0])
    for low in range(0, rows.num_local, ours.head.chunk_classes):
        local = slice(low, min(low + ours.head.chunk_classes, rows.num_local))
        inside_P = torch.nonzero((labels_B >= low) & (labels_B < local.stop)).squeeze(1)
        column_K = rows.column_factor(local, settings.operand)
        out_BK = unit_BD.new_empty((unit_BD.shape[0], local.stop - low))
        sum_B += settings.exp_cosines(
            unit_BD.to(settings.operand),
            rows.operand(local, settings.operand),
            column_K,
            SCALE,
            0.0,
            None,
            None,
            inside_P,
            labels_B[inside_P] - low,
            out_BK,
        )
        parts.append((out_BK if column_K is None else out_BK / column_K).log())
    target_B = SCALE * ((unit_BD * rows.unit(labels_B)).sum(1) - MARGIN_COS)
    return torch.cat(parts, 1), F.softplus(sum_B.log() - target_B)


# What the parent does with it


@dataclass(frozen=True)
class Timing:
    problem: Problem
    samples: dict[str, list[float]]
    skipped: dict[str, str]
    copy_bytes_per_s: float

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, over: str, under: str) -> float:
        """Median over rounds, so that a busy moment of the machine weighs on both sides."""
        pairs = zip(self.samples[over], self.samples[under], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def over_floor(self, name: str) -> float:
        """Time over the larger of the products alone and the bytes that must move.

        The bytes are rows and state in and out, and stored exponentials written once and read twice.
        """
        again = "recompute" in name
        values, logits = self.problem.shard * DIM, self.problem.batch * self.problem.shard
        kept = 0 if again else (12 if "fp32" in name else 6)
        moved = (12 if name == SPLIT else 16) * values + kept * logits
        over_bytes = self.median(name) * self.copy_bytes_per_s / moved
        return min(self.ratio(name, FLOOR_AGAIN if again else FLOOR), over_bytes)


def take_times(plan: Plan, problem: Problem, memory_bytes: float, chunk_classes: int) -> Timing:
    """Run those who are here and fit; every other one gets its reason."""
    present, skipped = [], {}
    for name in plan.names:
        reason = why_absent(name)
        if reason is None and name != SPLIT and problem.num_classes > MOST_CLASSES_FP32:
            reason = f"beyond {MOST_CLASSES_FP32:,} classes split rows are timed alone"
        need = problem.ranks * needed_bytes(name, problem)
        if reason is None and need > memory_bytes:
            reason = f"needs about {need / 1e9:.0f} GB, has {memory_bytes / 1e9:.0f}"
        if reason is None and name == TORCH_FUSED and problem.num_classes * problem.batch > plan.most_logits_fused:
            reason = f"not run beyond {plan.most_logits_fused:,} logits: it takes a row or a few at a time"
        if reason is None:
            present.append(name)
        else:
            skipped[name] = reason
    try:
        ((samples, failed, copy_rate), *_) = run_world(
            problem.ranks, measure_times, tuple(present), problem, plan.rounds_of(problem), plan.block_s, chunk_classes
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        return Timing(problem, {}, dict.fromkeys(present, reason) | skipped, math.nan)
    return Timing(problem, samples, failed | skipped, copy_rate)


def print_times(timing: Timing) -> None:
    print(f"\n{timing.problem}; copy {timing.copy_bytes_per_s / 1e9:.1f} GB/s")
    print(f"{'':32}{'median ms':>11}{'min':>9}{'max':>9}{'reference /':>13}{'/ floor':>9}")
    for name, samples in timing.samples.items():
        against = f"{timing.ratio(REFERENCE, name):13.2f}" if REFERENCE in timing.samples else f"{'':13}"
        ours = name.startswith("ours") and FLOOR in timing.samples and FLOOR_AGAIN in timing.samples
        floor = f"{timing.over_floor(name):9.2f}" if ours else ""
        low, middle, high = (1e3 * f(samples) for f in (min, statistics.median, max))
        note = "  less work: no margin, rows as they are" if name in LESS_WORK else ""
        print(f"{name:32}{middle:11.1f}{low:9.1f}{high:9.1f}{against}{floor}{note}")
    for name, reason in timing.skipped.items():
        print(f"{name:32}    skipped: {reason}")


@dataclass(frozen=True)
class Law:
    """bytes = base + per_logit * B * C."""

    base: float
    per_logit: float


def take_memory(plan: Plan, memory_bytes: float) -> list[dict[str, Any]]:
    """One child a contestant and size; on a CPU the mark is the tensors' peak, the process's stands beside it."""
    found = []
    print(f"\n{'peak MB above rows and state':32}{'size':>22}{'tensors':>10}{'process':>10}{'bytes/logit':>13}")
    for name in plan.memory_names:
        if why_absent(name) is not None:
            continue
        for problem in plan.memory:
            if needed_bytes(name, problem) > memory_bytes:
                continue
            (peak,) = run_world(1, measure_memory, name, problem)
            found.append({"name": name, "problem": asdict(problem), **peak})
            process = f"{peak['resident_peak_bytes'] / 1e6:10.1f}" if "resident_peak_bytes" in peak else f"{'':10}"
            per_logit = peak["peak_bytes"] / (problem.batch * problem.num_classes)
            print(f"{name:32}{problem!s:>22}{peak['peak_bytes'] / 1e6:10.1f}{process}{per_logit:13.2f}")
    return found


def law_of(found: list[dict[str, Any]], name: str) -> Law | None:
    points = [
        (p["problem"]["num_classes"] * p["problem"]["batch"], p["peak_bytes"]) for p in found if p["name"] == name
    ]
    if len(points) < 3:
        return None
    logits_N, bytes_N = np.array(points, dtype=np.float64).T
    per_logit, base = np.polyfit(logits_N, bytes_N, 1)
    return Law(float(base), float(per_logit))


def growth_of(timings: list[Timing], name: str) -> float | None:
    """Exponent of time against classes at the smallest batch in one process; None below four sizes."""
    batch = min(t.problem.batch for t in timings)
    line = [t for t in timings if t.problem.ranks == 1 and t.problem.batch == batch and name in t.samples]
    if len(line) < 4:
        return None
    logs = np.log([[t.problem.num_classes, t.median(name)] for t in line])
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def worst(errors: dict[str, float]) -> float:
    """Largest of the separate errors, the rows' without positives among them."""
    return max(errors[key] for key in ("loss", "dE", "dW with positives", "dW without"))


def judge_work(checks: dict[str, dict[str, dict[str, float]]]) -> list[Mark]:
    """float32 modes against 1e-5; 16-bit modes against the naive version, the largest ratio of their parts.

    A twentieth is allowed for chance: two roundings of the same width do not fall alike.
    """
    marks = []
    for title, by_name in checks.items():
        error = max(worst(errors) for name, errors in by_name.items() if name in FP32_MODES)
        marks.append(Mark(f"fp32 modes: largest error to float64 ({title})", error, "< 1e-5", error < 1e-5))
        naive = by_name.get("naive bf16")
        for name, errors in by_name.items():
            if naive is None or not name.startswith("ours") or name in FP32_MODES:
                continue
            over = max(errors[key] / naive[key] for key in ("dE", "dW with positives", "dW without"))
            marks.append(Mark(f"{name}: gradient error / naive bf16's ({title})", over, "<= 1.05", over <= 1.05))
    return marks


def judge_memory(plan: Plan, found: list[dict[str, Any]], fastest: str | None) -> list[Mark]:
    marks = []
    laws = {name: law for name in plan.memory_names if (law := law_of(found, name)) is not None}
    for name, law in laws.items():
        if name not in OURS and name not in OURS_CUDA and name != SPLIT:
            continue
        if "recompute" in name or name == SPLIT:
            flat = abs(law.per_logit) <= 0.01
            marks.append(Mark(f"{name}: bytes a logit, the peak's slope in C", law.per_logit, "|.| <= 0.01", flat))
        else:
            due = 4.0 if "fp32" in name else 2.0
            fits = abs(law.per_logit / due - 1.0) <= 0.1
            marks.append(Mark(f"{name}: bytes a logit", law.per_logit, f"{due:.0f} +- 10 %", fits))
    peaks = {p["name"]: p["peak_bytes"] for p in found if Problem(**p["problem"]) == plan.judged}
    share = 0.5 if plan.device == "cpu" else 0.2
    if fastest in peaks and REFERENCE in peaks:
        ratio = peaks[fastest] / peaks[REFERENCE]
        bound, met = (f"<= {share}", ratio <= share) if plan.device == "cpu" else (f"< {share}", ratio < share)
        marks.append(Mark(f"{fastest}: peak / reference's at {plan.judged}", ratio, bound, met))
    return marks


def fastest_of(timing: Timing, names: Iterable[str]) -> str | None:
    return min((name for name in names if name in timing.samples), key=timing.median, default=None)


def judge_times(plan: Plan, timings: list[Timing]) -> list[Mark]:
    by_problem = {timing.problem: timing for timing in timings}
    judged = by_problem[plan.judged]
    marks = []
    if plan.device == "cpu":
        best = fastest_of(judged, FP32_MODES)
        if best is not None and REFERENCE in judged.samples:
            gain = judged.ratio(REFERENCE, best)
            marks.append(Mark(f"reference / {best} at {plan.judged}", gain, ">= 1.8", gain >= 1.8))
            over = judged.over_floor(best)
            marks.append(Mark(f"{best} / floor at {plan.judged}", over, "<= 1.5", over <= 1.5))
        return marks
    best = fastest_of(judged, OURS_CUDA)
    if best is not None:
        ms = 1e3 * judged.median(best)
        marks.append(Mark(f"{best}: ms at {plan.judged}", ms, "<= 6.5", ms <= 6.5))
        for name, due in ((REFERENCE_TF32, 6.0), (REFERENCE, 12.0)):
            if name in judged.samples:
                gain = judged.ratio(name, best)
                marks.append(Mark(f"{name} / {best} at {plan.judged}", gain, f">= {due:.0f}", gain >= due))
    million = by_problem.get(Problem(1_000_000, 4096))
    best = fastest_of(million, OURS_CUDA) if million is not None else None
    if million is not None and best is not None:
        over = million.over_floor(best)
        marks.append(Mark(f"{best} / floor at {million.problem}", over, "<= 1.5", over <= 1.5))
    whole = by_problem.get(Problem(29_000_000, 1024))
    if whole is not None:
        runs = SPLIT in whole.samples
        value = 1e3 * whole.median(SPLIT) if runs else False
        marks.append(Mark("29M identities, full softmax on one GPU: ms a step", value, "runs", runs))
    return marks


def print_errors(title: str, table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    print(f"\n{title}")
    print(f"{'':36}" + "".join(f"{column:>19}" for column in columns))
    for name, errors in table.items():
        print(f"{name:36}" + "".join(f"{errors[column]:19.2e}" for column in columns))


def draw(timings: list[Timing], memory: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against classes, both axes by powers; the floor is the dashed line."""
    batch = min(t.problem.batch for t in timings) if timings[0].problem.batch < 4096 else 4096
    line = [t for t in timings if t.problem.ranks == 1 and t.problem.batch == batch]
    names = list(dict.fromkeys(name for timing in line for name in timing.samples))
    colour = {name: f"C{place}" for place, name in enumerate(n for n in names if n not in (FLOOR, FLOOR_AGAIN))}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in names:
        points = [(t.problem.num_classes, 1e3 * t.median(name), t.samples[name]) for t in line if name in t.samples]
        style = {"color": "0.4", "linestyle": "--" if name == FLOOR else ":"} if name not in colour else {}
        style |= {"color": colour[name], "marker": "."} if name in colour else {}
        left.plot([p[0] for p in points], [p[1] for p in points], label=name, **style)
        left.vlines([p[0] for p in points], [1e3 * min(p[2]) for p in points], [1e3 * max(p[2]) for p in points], "0.7")
    for name in dict.fromkeys(point["name"] for point in memory):
        peaks = [(p["problem"]["num_classes"], p["peak_bytes"] / 1e6) for p in memory if p["name"] == name]
        right.plot([p[0] for p in peaks], [p[1] for p in peaks], marker=".", color=colour.get(name, "0.7"), label=name)
    for axes, title in ((left, f"ms a step, B = {batch} (bar: min to max)"), (right, "peak MB above rows and state")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("classes")
        axes.set_title(title)
    left.legend(fontsize=7)
    figure.savefig(path)
    plt.close(figure)


def stem_of(name: str) -> str:
    """The file's name, after the GPU where there is one."""
    if not torch.cuda.is_available():
        return file_stem(name)
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    return f"{name}-{gpu}-{file_stem(name)[-10:]}"


def default_chunk(device: str) -> int:
    """The chunk that the heads choose themselves, which the floor copies."""
    world = World(device=torch.device(device))
    ours = make(FP32_MODES[0], Problem(1, 1), torch.ones((1, DIM), device=world.device), Rule(), world, 1)
    assert isinstance(ours, OurHead)
    return ours.head.chunk_classes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; ends within a minute on two cores")
    parser.add_argument("--accuracy", action="store_true", help="only the table of number formats")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    plan = plan_of(arguments.quick, on_cuda)
    memory_bytes = 0.93 * torch.cuda.get_device_properties(0).total_memory if on_cuda else CPU_BYTES
    chunk_classes = default_chunk(plan.device)
    raw: dict[str, Any] = {"quick": arguments.quick, "device": torch.cuda.get_device_name() if on_cuda else "cpu"}
    raw |= {"dim": DIM, "scale": SCALE, "margin_cos": MARGIN_COS, "floor_chunk_classes": chunk_classes}

    formats_at = Problem(plan.accuracy_classes, 64)
    (formats,) = run_world(1, measure_formats, formats_at)
    print_errors(f"Formats against float64, {formats_at}, CosFace {MARGIN_COS}, scale {SCALE:.0f}", formats)
    raw["formats"] = {"problem": asdict(formats_at), "errors": formats}
    marks = judge_work({f"C={plan.accuracy_classes:,}": _as_modes(formats)})
    if arguments.accuracy:
        return write_record("head-accuracy", arguments.out, marks, raw, stem_of("head-accuracy"))

    checks = {}
    for ranks in (1,) if on_cuda else (1, 2):
        problem = Problem(5_000, 256, ranks)
        solvers = [
            n for n in plan.names if n.startswith(("ours", "reference")) and why_absent(n) is None and n != SPLIT
        ]
        by_rank = run_world(ranks, check_work, tuple(solvers), problem)
        first = by_rank[0]
        checks[str(problem)] = {n: {k: max(r[n][k] for r in by_rank) for k in first[n]} for n in first}
        print_errors(f"Equal work: errors to float64, {problem}", checks[str(problem)])
    raw["equal_work"] = checks
    marks += judge_work(checks)

    memory = take_memory(plan, memory_bytes)
    timings = []
    try:
        for problem in plan.times:
            timings.append(take_times(plan, problem, memory_bytes, chunk_classes))
            print_times(timings[-1])
    except KeyboardInterrupt:
        print("stopped: what was measured is written")
    raw["left_out"] = [str(problem) for problem in plan.times[len(timings) :]]
    if plan.judged not in [timing.problem for timing in timings]:
        print(f"nothing is written: {plan.judged}, which is judged, was not measured")
        return 5
    growth = {name: slope for name in plan.names if (slope := growth_of(timings, name)) is not None}
    print("\ntime grows as C to the power of: " + ", ".join(f"{name} {slope:.2f}" for name, slope in growth.items()))
    laws = {name: law for name in plan.memory_names if (law := law_of(memory, name)) is not None}
    for name, law in laws.items():
        print(f"{name}: peak = {law.base / 1e6:.1f} MB + {law.per_logit:.3f} bytes a logit")
    print()

    judged = next(t for t in timings if t.problem == plan.judged)
    fastest = fastest_of(judged, OURS_CUDA if on_cuda else FP32_MODES)
    marks += judge_memory(plan, memory, fastest) + judge_times(plan, timings)
    raw |= {"memory": memory, "memory_laws": {name: asdict(law) for name, law in laws.items()}, "growth": growth}
    raw["times"] = [asdict(timing) for timing in timings]
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(timings, memory, arguments.out / f"{stem_of('head')}.png")
    return write_record("head", arguments.out, marks, raw, stem_of("head"))


def _as_modes(formats: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The table's fp32 row under the name that ``judge_work`` knows."""
    return {FP32_MODES[0] if title == "ours fp32" else title: errors for title, errors in formats.items()}


if __name__ == "__main__":
    sys.exit(main())
