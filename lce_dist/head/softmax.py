"""One micro-batch through the sharded margin softmax: loss, the embeddings' gradient, the rows' gradients by chunk.

Logits are bounded, so no maximum is looked for; one all-reduce of 3B floats makes the row sums, the
target logits and the boundary terms global; everything else is local to the class shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lce_dist.collectives import all_reduce_max, all_reduce_sum
from lce_dist.errors import DataError, NotFiniteError
from lce_dist.head.chunked import exp_cosines, offset_of, product
from lce_dist.head.margins import HardNegatives, Margin
from lce_dist.head.rows import ClassRows
from lce_dist.head.tables import Rows
from lce_dist.head.update import update_rows
from lce_dist.world import World

ExpCosines = Callable[..., torch.Tensor]
UpdateRows = Callable[..., torch.Tensor | None]


class Anchor(Protocol):
    """What ties class rows and embeddings to an old space; every tensor is this shard's."""

    @property
    def align_weight(self) -> float:
        """Of the mean over all classes of 1 - cos(class row, old row)."""
        ...

    @property
    def boundary_weight(self) -> float:
        """Of the weighted sum of ``outside`` over the batch."""
        ...

    def outside(self, emb_OD: torch.Tensor, local_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Penalty (O,) of unit vectors of classes ``local_O``, and its gradient (O, D)."""
        ...

    def old_rows(self, rows: Rows) -> torch.Tensor:
        """(K, D) unit rows that the class rows are drawn to."""
        ...

    def class_weight(self, rows: Rows) -> torch.Tensor | None:
        """(K,) weights of classes in the alignment, 0 for those that take no part; None where all are 1."""
        ...


@dataclass(frozen=True)
class Settings:
    """How the softmax is computed, the same on every rank.

    operand: format of the matrix operands. kept: format of the stored exponentials; None computes them again.
    """

    scale: float
    conflict_cos: float | None
    operand: torch.dtype
    kept: torch.dtype | None
    exp_cosines: ExpCosines = exp_cosines
    update_rows: UpdateRows = update_rows

    @property
    def product(self) -> torch.dtype:
        """Format of the gradients' operands: exponentials reach e^64, which bfloat16 holds and float16 does not."""
        return torch.bfloat16 if self.operand.itemsize == 2 else self.operand


@dataclass(frozen=True)
class Chunk:
    """Classes that are handled together: local numbers, and their places among the step's active classes."""

    rows: Rows
    low: int
    high: int


@dataclass(frozen=True)
class HeadTerms:
    """Global scalars; ``total`` carries the gradient."""

    total: torch.Tensor
    classification: torch.Tensor
    boundary: torch.Tensor


@dataclass(frozen=True)
class _Targets:
    """The O rows of the batch whose class is in this shard, by class; a chunk's are ``ends[c]:ends[c + 1]``."""

    owned_O: torch.Tensor
    local_O: torch.Tensor
    place_O: torch.Tensor
    unit_OD: torch.Tensor
    ends: list[int]


@dataclass(frozen=True)
class _Results:
    """What the backward pass needs of the forward pass."""

    log_sum_B: torch.Tensor
    row_weight_B: torch.Tensor
    rise_O: torch.Tensor  # d loss / d psi: scale * (probability of the target - 1)
    slope_O: torch.Tensor
    norm_slope_O: torch.Tensor | None
    outside_grad_OD: torch.Tensor | None
    regulariser_slope_B: torch.Tensor | None


class MicroBatch:
    """The state of one micro-batch between its forward pass and the update of the rows."""

    def __init__(
        self,
        rows: ClassRows,
        chunks: list[Chunk],
        active_N: torch.Tensor | None,
        margin: Margin,
        settings: Settings,
        anchor: Anchor | None,
        kept: list[torch.Tensor] | None,
        world: World,
        emb_BD: torch.Tensor,
        labels_B: torch.Tensor,
        row_weight_B: torch.Tensor,
    ) -> None:
        check_labels(labels_B, rows.num_classes)
        self.rows = rows
        self.chunks = chunks
        self.margin = margin
        self.settings = settings
        self.anchor = anchor
        self.kept = kept
        self.world = world
        self.emb_BD = emb_BD.detach()
        self.row_weight_B = row_weight_B
        self.operand_BD = self.emb_BD.to(settings.operand)
        self.offset = offset_of(settings.scale, margin.top)
        self.targets = self._find_targets(labels_B, active_N)
        self.hard: HardNegatives | None = None
        self.weight_B = row_weight_B  # times the upstream gradient, from backward on
        self.scaled_BD: torch.Tensor | None = None
        self._results: _Results | None = None
        self._scratch: torch.Tensor | None = None

    def forward(self, norm_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss sum_i row_weight_i * (logsumexp_j z_ij - z_iy) + penalties; then its first part; then the boundary's.

        Errors: NotFiniteError for a loss that is not finite, on every rank.
        """
        settings, t, world = self.settings, self.targets, self.world
        emb_OD = self.emb_BD[t.owned_O]
        cos_O = (emb_OD * t.unit_OD).sum(1)
        target_cos_B = None
        if self.margin.acts_on_negatives:
            target_cos_B = torch.zeros_like(self.row_weight_B).index_copy_(0, t.owned_O, cos_O)
            all_reduce_sum(target_cos_B, world)
        self.margin.observe(norm_B, target_cos_B, self.row_weight_B)
        term = self.margin.target(cos_O, norm_B[t.owned_O] if norm_B is not None else None)
        self.hard = self.margin.negatives(target_cos_B) if target_cos_B is not None else None

        sums = self.emb_BD.new_zeros((3, self.emb_BD.shape[0]))
        for number, chunk in enumerate(self.chunks):
            sums[0] += self._exponentials(number, chunk)[1]
        sums[1, t.owned_O] = settings.scale * term.value_O.to(sums.dtype)
        outside_grad_OD = None
        if self.anchor is not None:
            outside_O, outside_grad_OD = self.anchor.outside(emb_OD, t.local_O)
            sums[2, t.owned_O] = outside_O
        all_reduce_sum(sums, world)

        target_logit_B = sums[1]
        # logsumexp - z_target without forming it: both are near s, and their small difference is the loss
        excess_B = self.offset + sums[0].log() - target_logit_B
        loss_B = torch.logaddexp(excess_B, torch.zeros_like(excess_B))
        classification, boundary = (loss_B * self.row_weight_B).sum(), (sums[2] * self.row_weight_B).sum()
        regulariser = self.margin.regulariser(norm_B) if norm_B is not None else None
        if regulariser is not None:
            classification = classification + (regulariser[0] * self.row_weight_B).sum()
        if not bool(torch.isfinite(classification + boundary)):
            self._explain(loss_B)
        self._results = _Results(
            target_logit_B + loss_B,
            self.row_weight_B,
            settings.scale * torch.expm1(-loss_B[t.owned_O]),  # expm1(-loss) is the target's probability less one
            term.slope_O,
            term.norm_slope_O,
            outside_grad_OD,
            regulariser[1] if regulariser is not None else None,
        )
        boundary_weight = self.anchor.boundary_weight if self.anchor is not None else 0.0
        return classification + boundary_weight * boundary, classification, boundary

    def backward(
        self, upstream: torch.Tensor, on_chunk: Callable[[Chunk, torch.Tensor], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This shard's part of the gradients of the embeddings (B, D) and, if used, of their norms (B,).

        With ``on_chunk`` each chunk's row gradient is handed over as well, once its rows are not needed any more.
        """
        results, t = self._forward_results(), self.targets
        self.weight_B = upstream * results.row_weight_B
        factor_B = self.weight_B * self.settings.scale * torch.exp(self.offset - results.log_sum_B)
        self.scaled_BD = (self.emb_BD * factor_B[:, None]).to(self.settings.product)
        grad_BD = torch.zeros_like(self.emb_BD)
        for number, chunk in enumerate(self.chunks):
            exp_BK = self._again(number, chunk)
            grad_BD += product(exp_BK, self.rows.operand(chunk.rows, self.settings.product))
            if on_chunk is not None:
                on_chunk(chunk, self._row_gradient(exp_BK, number, chunk))
        grad_BD *= factor_B[:, None]
        weight_O = self.weight_B[t.owned_O]
        grad_OD = (weight_O * results.rise_O * results.slope_O)[:, None] * t.unit_OD
        if self.anchor is not None and results.outside_grad_OD is not None:
            grad_OD += (weight_O * self.anchor.boundary_weight)[:, None] * results.outside_grad_OD
        grad_BD.index_add_(0, t.owned_O, grad_OD.to(grad_BD.dtype))
        return grad_BD, self._norm_gradient(results)

    def row_gradient(self, number: int, chunk: Chunk) -> torch.Tensor:
        """(K, D) sum over the batch of dL/dcos_ij * e_i times the operand's column factor; after ``backward``."""
        return self._row_gradient(self._again(number, chunk), number, chunk)

    def _find_targets(self, labels_B: torch.Tensor, active_N: torch.Tensor | None) -> _Targets:
        local_B = labels_B - self.rows.first_class
        owned_O = torch.nonzero((local_B >= 0) & (local_B < self.rows.num_local)).squeeze(1)
        owned_O = owned_O[torch.argsort(local_B[owned_O], stable=True)]
        local_O = local_B[owned_O]
        place_O = local_O if active_N is None else torch.searchsorted(active_N, local_O)
        highs = torch.tensor([chunk.high for chunk in self.chunks], dtype=torch.int64, device=place_O.device)
        ends = [0, *torch.searchsorted(place_O, highs).tolist()]
        return _Targets(owned_O, local_O, place_O, self.rows.unit(local_O), ends)

    def _forward_results(self) -> _Results:
        if self._results is None:
            raise AssertionError("backward before forward")
        return self._results

    def _row_gradient(self, exp_BK: torch.Tensor, number: int, chunk: Chunk) -> torch.Tensor:
        results, t = self._forward_results(), self.targets
        if self.scaled_BD is None:
            raise AssertionError("row_gradient before backward")
        grad_KD = product(exp_BK.T, self.scaled_BD)
        inside = slice(t.ends[number], t.ends[number + 1])
        row_P, column_P = t.owned_O[inside], t.place_O[inside] - chunk.low
        value_P = self.weight_B[row_P] * results.rise_O[inside] * results.slope_O[inside]
        column_K = self.rows.column_factor(chunk.rows, self.settings.product)
        if column_K is not None:
            value_P = value_P * column_K[column_P]
        grad_KD.index_add_(0, column_P, value_P[:, None].to(grad_KD.dtype) * self.emb_BD[row_P])
        return grad_KD

    def _exponentials(self, number: int, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """The chunk's (B, K) exponentials, ready for products, and their row sums (B,)."""
        t, settings = self.targets, self.settings
        inside = slice(t.ends[number], t.ends[number + 1])
        out_BK = self._out(number, chunk)
        sum_B = settings.exp_cosines(
            self.operand_BD,
            self.rows.operand(chunk.rows, settings.operand),
            self.rows.column_factor(chunk.rows, settings.operand),
            settings.scale,
            self.offset,
            self.hard,
            settings.conflict_cos,
            t.owned_O[inside],
            t.place_O[inside] - chunk.low,
            out_BK,
        )
        return out_BK, sum_B

    def _out(self, number: int, chunk: Chunk) -> torch.Tensor:
        if self.kept is not None:
            return self.kept[number]
        shape = (self.emb_BD.shape[0], chunk.high - chunk.low)
        if self._scratch is None or self._scratch.shape != shape:
            self._scratch = self.emb_BD.new_empty(shape, dtype=self.settings.product)
        return self._scratch

    def _again(self, number: int, chunk: Chunk) -> torch.Tensor:
        return self.kept[number] if self.kept is not None else self._exponentials(number, chunk)[0]

    def _norm_gradient(self, results: _Results) -> torch.Tensor | None:
        if results.norm_slope_O is None and results.regulariser_slope_B is None:
            return None
        grad_B, owned_O = torch.zeros_like(self.weight_B), self.targets.owned_O
        if results.norm_slope_O is not None:
            grad_B.index_add_(0, owned_O, self.weight_B[owned_O] * results.rise_O * results.norm_slope_O)
        if results.regulariser_slope_B is not None and self.world.is_first:  # the parts of all ranks are summed
            grad_B += self.weight_B * results.regulariser_slope_B
        return grad_B

    def _explain(self, loss_B: torch.Tensor) -> None:
        bad_rows = torch.nonzero(~torch.isfinite(self.emb_BD).all(1)).squeeze(1)
        if bad_rows.numel():
            raise NotFiniteError(
                f"{bad_rows.numel()} of {self.emb_BD.shape[0]} embeddings are not finite (the first is row "
                f"{int(bad_rows[0])} of the global batch); they must be. Lower optim.lr"
            )
        flag = torch.zeros(1, device=loss_B.device)
        for chunk in self.chunks:
            flag += (~torch.isfinite(self.rows.weight.load(chunk.rows))).sum()
        bad_classes = float(all_reduce_max(flag, self.world)) > 0
        cause = "class rows are not finite" if bad_classes else "the margin or its statistics overflow"
        raise NotFiniteError(
            f"the loss is not finite in {int((~torch.isfinite(loss_B)).sum())} of {loss_B.shape[0]} rows: {cause}. "
            "Lower optim.head_lr or head.scale"
        )


def check_labels(labels_B: torch.Tensor, num_classes: int) -> None:
    """DataError, the same on every rank, when a label of the gathered batch is no class."""
    bad = (labels_B < 0) | (labels_B >= num_classes)
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0])
        raise DataError(
            f"label {int(labels_B[row])} (row {row} of the global batch) is no class; labels must be in [0, {num_classes}). "
            "The data set does not belong to this classifier: pack it again, or grow the head"
        )


class HeadLoss(torch.autograd.Function):
    """``MicroBatch`` as a node of the autograd graph: the gradient goes to embeddings and norms only."""

    @staticmethod
    def forward(
        ctx: Any,
        emb_BD: torch.Tensor,
        norm_B: torch.Tensor | None,
        micro: MicroBatch,
        on_chunk: Callable[[Chunk, torch.Tensor], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.micro, ctx.on_chunk = micro, on_chunk
        total, classification, boundary = micro.forward(norm_B)
        ctx.mark_non_differentiable(classification, boundary)
        return total, classification, boundary

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BD, norm_grad_B = ctx.micro.backward(grads[0], ctx.on_chunk)
        return grad_BD, norm_grad_B, None, None
