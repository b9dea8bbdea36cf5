"""The heads that ours is held against, and ours, each as one thing: a step of forward, backward and optimizer.

``MaterialisingHead`` is the model-parallel margin softmax as public trainers ship it, and solves the same
problem as ours. The others are heads of language models: no margin, no normalised rows, the whole table on
every rank; their work is less than ours, and is named so in the tables. ``PlainProducts`` is the floor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lce_dist.collectives import all_reduce_sum, gather_rows
from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.head.build import build_head
from lce_dist.head.rows import ClassRows, inverse_norm
from lce_dist.head.tables import HalfTable, SplitTable
from lce_dist.world import World, shard_bounds

SCALE, MARGIN_COS, DIM = 64.0, 0.4, 512


@dataclass(frozen=True)
class Problem:
    """Sizes of one measurement; ``batch`` is global, rank r has rows [r, r + 1) * batch / ranks."""

    num_classes: int
    batch: int
    ranks: int = 1

    def __str__(self) -> str:
        return f"C={self.num_classes:,} B={self.batch}" + (f" on {self.ranks} ranks" if self.ranks > 1 else "")

    @property
    def shard(self) -> int:
        """Classes of the largest shard."""
        return -(-self.num_classes // self.ranks)


@dataclass(frozen=True)
class Rule:
    """SGD's three numbers."""

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4


class Contestant(Protocol):
    """One step for given embeddings; ``rows`` is this rank's part of the classifier as float32."""

    def step(self, emb_bD: torch.Tensor, labels_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Global loss, and the gradient (b, D) of it; the rows are updated."""
        ...

    def rows(self) -> torch.Tensor: ...

    def must_exist(self) -> list[torch.Tensor]:
        """Rows and optimizer state: what the memory figures leave out."""
        ...


def rows_of(problem: Problem, world: World) -> slice:
    """This rank's classes."""
    return slice(*shard_bounds(problem.num_classes, world.rank, world.size))


class OurHead:
    """lce_dist's head under ``config``.

    Split rows are filled in place: beside a 29-million-class table there is no room for its float32 source.
    """

    def __init__(
        self, config: HeadConfig, problem: Problem, weight_CD: torch.Tensor | None, rule: Rule, world: World
    ) -> None:
        optim = OptimConfig(global_batch=problem.batch, momentum=rule.momentum, weight_decay=rule.weight_decay)
        local = rows_of(problem, world)
        self.num_steps, self.rule, self.problem, self.world = 0, rule, problem, world
        weight_SD = torch.empty((0, DIM), device=world.device) if weight_CD is None else weight_CD[local]
        self.head = build_head(
            config, optim, problem.num_classes, DIM, 1, world, lambda step: rule.lr, weight_SD=weight_SD
        )
        if weight_CD is None:
            self.head.rows = _split_rows_in_place(problem.num_classes, local, world.device)

    def step(self, emb_bD: torch.Tensor, labels_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        emb_bD = emb_bD.detach().requires_grad_()
        per_rank = (self.problem.batch // self.world.size,) * self.world.size
        unit_BD = gather_rows(F.normalize(emb_bD), per_rank, self.world)
        labels_B = gather_rows(labels_b, per_rank, self.world)
        self.head.begin_step(self.num_steps, labels_B, self.rule.lr)
        row_weight_B = unit_BD.new_full((self.problem.batch,), 1.0 / self.problem.batch)
        total = self.head(unit_BD, labels_B, row_weight_B, only_micro_batch=True).total
        total.backward()
        self.head.step()
        self.num_steps += 1
        assert emb_bD.grad is not None
        return total.detach(), emb_bD.grad

    def rows(self) -> torch.Tensor:
        return self.head.rows.weight.load(slice(0, self.head.rows.num_local))

    def must_exist(self) -> list[torch.Tensor]:
        return list(self.head.tensors().values())


def _split_rows_in_place(num_classes: int, local: slice, device: torch.device) -> ClassRows:
    """Random split rows with bfloat16 momentum: 6 bytes a value, and never more."""
    shape = (local.stop - local.start, DIM)
    table = SplitTable(torch.empty((0, DIM), device=device))
    table.upper_SD = torch.empty(shape, dtype=torch.bfloat16, device=device)
    table.lower_SD = torch.empty(shape, dtype=torch.int16, device=device)
    inv_norm_S = torch.empty(shape[0], device=device)
    for low in range(0, shape[0], 1 << 18):
        block = slice(low, min(low + (1 << 18), shape[0]))
        values = torch.randn((block.stop - low, DIM), device=device).mul_(0.01)
        table.store(block, values, 0)
        inv_norm_S[block] = inverse_norm(values)
    momentum = HalfTable(torch.zeros(shape, dtype=torch.bfloat16, device=device), 7, local.start)
    return ClassRows(table, {"momentum": momentum}, inv_norm_S, None, num_classes, local.start)


class MaterialisingHead:
    """Whole float32 logits, three all-reduces for the softmax, a dense gradient by autograd, torch's SGD."""

    def __init__(self, problem: Problem, weight_CD: torch.Tensor, rule: Rule, world: World, tf32: bool = False) -> None:
        local = rows_of(problem, world)
        self.first_class, self.world, self.tf32 = local.start, world, tf32
        self.weight, self.optimizer = _parameter(weight_CD[local], rule)

    def step(self, emb_bD: torch.Tensor, labels_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        emb_bD = emb_bD.detach().requires_grad_()
        emb_BD: torch.Tensor = _GatherAll.apply(emb_bD, self.world)
        labels_B = _gather(labels_b, self.world)
        local_B = labels_B - self.first_class
        local_B[(local_B < 0) | (local_B >= self.weight.shape[0])] = -1
        owned_O = torch.nonzero(local_B >= 0).squeeze(1)
        logits_BS = F.linear(F.normalize(emb_BD), F.normalize(self.weight)).clamp(-1.0, 1.0)
        target_O = logits_BS[owned_O, local_B[owned_O]]
        logits_BS[owned_O, local_B[owned_O]] = target_O - MARGIN_COS
        loss: torch.Tensor = _DistributedSoftmax.apply(logits_BS * SCALE, local_B, self.world)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch.set_float32_matmul_precision("highest")
        assert emb_bD.grad is not None
        return loss.detach(), emb_bD.grad

    def rows(self) -> torch.Tensor:
        return self.weight.detach()

    def must_exist(self) -> list[torch.Tensor]:
        return [self.weight.detach(), self.optimizer.state[self.weight]["momentum_buffer"]]


class _DistributedSoftmax(torch.autograd.Function):
    """Mean cross-entropy of logits cut by class; overwrites them with the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits_BS: torch.Tensor, local_B: torch.Tensor, world: World) -> torch.Tensor:
        largest_B = logits_BS.amax(1)
        if world.size > 1:
            dist.all_reduce(largest_B, op=dist.ReduceOp.MAX)
        logits_BS.sub_(largest_B[:, None]).exp_()
        sum_B = all_reduce_sum(logits_BS.sum(1), world)
        logits_BS.div_(sum_B[:, None])
        owned_O = torch.nonzero(local_B >= 0).squeeze(1)
        target_B = torch.zeros_like(sum_B)
        target_B[owned_O] = logits_BS[owned_O, local_B[owned_O]]
        all_reduce_sum(target_B, world)
        ctx.save_for_backward(logits_BS, local_B, owned_O)
        return -target_B.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_BS, local_B, owned_O = ctx.saved_tensors
        grad_BS[owned_O, local_B[owned_O]] -= 1.0
        grad_BS.div_(grad_BS.shape[0])
        return grad_BS.mul_(grads[0]), None, None


class _GatherAll(torch.autograd.Function):
    """Rows of every rank in rank order; backward sums the gradients that the ranks hold."""

    @staticmethod
    def forward(ctx: Any, rows_bD: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        return _gather(rows_bD, world) if world.size > 1 else rows_bD.view_as(rows_bD)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_BD, world = grads[0].contiguous(), ctx.world
        if world.size == 1:
            return grad_BD, None
        own_bD = grad_BD.new_empty((grad_BD.shape[0] // world.size, grad_BD.shape[1]))
        dist.reduce_scatter_tensor(own_bD, grad_BD)
        return own_bD, None


def _gather(rows_b: torch.Tensor, world: World) -> torch.Tensor:
    if world.size == 1:
        return rows_b.clone()
    gathered = rows_b.new_empty((world.size * rows_b.shape[0], *rows_b.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows_b.contiguous())
    return gathered


def _parameter(weight: torch.Tensor, rule: Rule) -> tuple[torch.nn.Parameter, torch.optim.SGD]:
    """A parameter over ``weight``'s memory and its optimizer, whose momentum exists before the first step."""
    parameter = torch.nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], rule.lr, rule.momentum, weight_decay=rule.weight_decay)
    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(weight)
    return parameter, optimizer


FusedLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DataParallelHead:
    """Cross-entropy of ``emb @ weight.T`` with the whole table on every rank and its gradient all-reduced.

    Less work than ours: no margin, no scale, rows not normalised. operand: what autocast would make of both.
    """

    def __init__(
        self,
        loss_of: FusedLoss,
        operand: torch.dtype,
        weight_CD: torch.Tensor,
        rule: Rule,
        world: World,
    ) -> None:
        self.loss_of, self.operand, self.world = loss_of, operand, world
        self.weight, self.optimizer = _parameter(weight_CD, rule)

    def step(self, emb_bD: torch.Tensor, labels_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        emb_bD = emb_bD.detach().requires_grad_()
        loss = self.loss_of(F.normalize(emb_bD).to(self.operand), self.weight.to(self.operand), labels_b)
        loss.backward()
        assert emb_bD.grad is not None and self.weight.grad is not None
        if self.world.size > 1:
            all_reduce_sum(self.weight.grad, self.world).div_(self.world.size)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), emb_bD.grad

    def rows(self) -> torch.Tensor:
        return self.weight.detach()

    def must_exist(self) -> list[torch.Tensor]:
        return [self.weight.detach(), self.optimizer.state[self.weight]["momentum_buffer"]]


def linear_then_cross_entropy(emb: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(emb, weight).float(), labels)


def torch_linear_cross_entropy(emb: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """torch 2.13's, cut by batch rows: for C >> B a chunk is 1 to 8 rows, and every chunk reads the table."""
    loss: torch.Tensor = F.linear_cross_entropy(emb, weight, labels, options=torch.nn.LinearCrossEntropyOptions())
    return loss


def cut_cross_entropy(emb: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss: torch.Tensor = linear_cross_entropy(emb, weight, labels)
    return loss


def liger_linear_cross_entropy(emb: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: torch.Tensor = LigerFusedLinearCrossEntropyLoss()(weight, emb, labels)
    return loss


class PlainProducts:
    """The floor: the three products (6BCD), or four with one done twice (8BCD), in our chunks, and nothing else."""

    def __init__(
        self,
        again: bool,
        operand: torch.dtype,
        chunk_classes: int,
        problem: Problem,
        weight_CD: torch.Tensor,
        world: World,
    ) -> None:
        self.again, self.chunk_classes, self.world = again, chunk_classes, world
        self.batch = problem.batch
        self.weight_SD = weight_CD[rows_of(problem, world)].to(operand)

    def step(self, emb_bD: torch.Tensor, labels_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        emb_BD = _gather(emb_bD, self.world).to(self.weight_SD.dtype)
        grad_BD = torch.zeros_like(emb_BD)
        chunk = min(self.chunk_classes, self.weight_SD.shape[0])
        cos_BK, grad_KD = emb_BD.new_empty((self.batch, chunk)), emb_BD.new_empty((chunk, DIM))
        for weight_KD in self.weight_SD.split(chunk):
            if weight_KD.shape[0] < chunk:
                cos_BK, grad_KD = cos_BK.new_empty((self.batch, weight_KD.shape[0])), torch.empty_like(weight_KD)
            torch.mm(emb_BD, weight_KD.T, out=cos_BK)
            if self.again:
                torch.mm(emb_BD, weight_KD.T, out=cos_BK)
            torch.addmm(grad_BD, cos_BK, weight_KD, out=grad_BD)
            torch.mm(cos_BK.T, emb_BD, out=grad_KD)
        return grad_BD.new_zeros(()), grad_BD

    def rows(self) -> torch.Tensor:
        return self.weight_SD.float()

    def must_exist(self) -> list[torch.Tensor]:
        return [self.weight_SD]


def _cosface(**keys: object) -> HeadConfig:
    return HeadConfig.model_validate({"loss": "cosface", "margin_cos": MARGIN_COS, "scale": SCALE} | keys)


OURS: dict[str, HeadConfig] = {
    "ours, keep fp32": _cosface(operands="fp32", exponentials="keep", implementation="chunked"),
    "ours, recompute": _cosface(operands="fp32", exponentials="recompute", implementation="chunked"),
    "ours, keep bf16": _cosface(operands="bf16", exponentials="keep", implementation="chunked"),
}
OURS_CUDA: dict[str, HeadConfig] = {
    "ours, keep fp16, chunked": _cosface(operands="fp16", exponentials="keep", implementation="chunked"),
    "ours, keep fp16, triton": _cosface(operands="fp16", exponentials="keep", implementation="triton"),
    "ours, recompute fp16, chunked": _cosface(operands="fp16", exponentials="recompute", implementation="chunked"),
    "ours, recompute fp16, triton": _cosface(operands="fp16", exponentials="recompute", implementation="triton"),
}
SPLIT = "ours, split rows, recompute"
OURS_SPLIT = {SPLIT: _cosface(operands="bf16", rows="split", state="bf16", exponentials="recompute")}
_ALL_OURS = OURS | OURS_CUDA | OURS_SPLIT

REFERENCE, REFERENCE_TF32 = "reference", "reference, TF32"
FLOOR, FLOOR_AGAIN = "floor 6BCD", "floor 8BCD"
DATA_PARALLEL, TORCH_FUSED = "nn.Linear + CE", "torch linear_cross_entropy"
CUT, LIGER = "cut-cross-entropy", "liger-kernel"
_LESS_WORK: dict[str, FusedLoss] = {
    DATA_PARALLEL: linear_then_cross_entropy,
    TORCH_FUSED: torch_linear_cross_entropy,
    CUT: cut_cross_entropy,
    LIGER: liger_linear_cross_entropy,
}
LESS_WORK = tuple(_LESS_WORK)  # no margin, no normalised rows


def make(
    name: str, problem: Problem, weight_CD: torch.Tensor | None, rule: Rule, world: World, chunk_classes: int
) -> Contestant:
    """The contestant ``name``, over the memory of ``weight_CD`` where its format allows; chunk_classes: the floor's."""
    operand = torch.float16 if world.device.type == "cuda" else torch.float32
    if name in _ALL_OURS:
        return OurHead(_ALL_OURS[name], problem, weight_CD, rule, world)
    assert weight_CD is not None, f"{name} needs the float32 table"
    if name in (REFERENCE, REFERENCE_TF32):
        return MaterialisingHead(problem, weight_CD, rule, world, tf32=name == REFERENCE_TF32)
    if name in (FLOOR, FLOOR_AGAIN):
        return PlainProducts(name == FLOOR_AGAIN, operand, chunk_classes, problem, weight_CD, world)
    return DataParallelHead(_LESS_WORK[name], operand, weight_CD, rule, world)


def why_absent(name: str) -> str | None:
    """The reason why ``name`` cannot run here, if there is one."""
    package = {CUT: "cut_cross_entropy", LIGER: "liger_kernel"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if name == TORCH_FUSED and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none (2.13 has)"
    if name.endswith("triton") and importlib.util.find_spec("lce_dist.head.kernels") is None:
        return "lce_dist.head.kernels does not exist"
    if name.endswith("triton") and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def needed_bytes(name: str, problem: Problem) -> float:
    """About what ``name`` needs of one rank's memory: to skip what would not fit, nothing finer."""
    logits, values = problem.batch * problem.shard, problem.shard * DIM
    if name in (REFERENCE, REFERENCE_TF32):
        return 20.0 * values + 17.0 * logits  # row, its unit form, two gradients, momentum; 4.1 logits
    if name in LESS_WORK:
        fused = name != DATA_PARALLEL
        return 16.0 * problem.num_classes * DIM + (
            0.0 if fused else 12.0 * problem.batch / problem.ranks * problem.num_classes
        )
    if name in _ALL_OURS:
        config = _ALL_OURS[name]
        kept = 0 if config.exponentials == "recompute" else (4 if config.operands == "fp32" else 2)
        return (6.0 if config.rows == "split" else 8.0) * values + kept * logits + 1e9
    return 8.0 * values
