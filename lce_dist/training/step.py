"""What one global batch computes: embeddings, the head's loss, and what a method adds to tie them to an old space."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lce_dist.batch import Batch
from lce_dist.collectives import gather_rows
from lce_dist.compat.method import Method, MethodBatch
from lce_dist.compat.old_space import OldSpace
from lce_dist.errors import NotFiniteError
from lce_dist.head.layer import ShardedHead
from lce_dist.training.engine import Engine
from lce_dist.world import World

_SHORTEST = 1e-12  # an embedding below this length has no direction

OldVectors = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossTerms:
    """Global losses of one step, the same on every rank.

    ``total`` is what was differentiated but for the alignment of rows, which the head adds in its update.
    ``method`` is what the method added outside the head. ``why``: what made them not finite, in words.
    """

    total: torch.Tensor
    classification: torch.Tensor
    boundary: torch.Tensor
    method: torch.Tensor
    why: str | None = None


@dataclass(frozen=True)
class Compatibility:
    """How a new model is tied to an old one: its method, and the old space that it is tied to.

    old_vectors: (b, 3, H, W) images and their sample ids (b,) to the old model's vectors (b, E); None where
    the method asks for none.
    """

    method: Method
    old_space: OldSpace
    old_vectors: OldVectors | None = None


def train_step(
    engine: Engine,
    head: ShardedHead,
    batch: Batch,
    step: int,
    head_lr: float,
    world: World,
    compat: Compatibility | None = None,
) -> LossTerms:
    """Forward and backward of one global batch, in ``engine.accumulation`` micro-batches; the network is not updated.

    The head's rows may be: while the embeddings' gradient travels. By a loss that is not finite nothing moves: the terms are
    NaN then and say why, the rows stay, and the network's gradient is NaN, by which ``Engine.step`` updates nothing under ZeRO.
    Each row weighs 1 / global rows whatever micro-batch and rank it is in, so the sum of the parts is the
    mean over the global batch. **Collectives**: labels are gathered once; a micro-batch gathers its
    embeddings, in 16 bits where the head multiplies 16-bit operands, and reduces 3B floats; a method may add its own.
    """
    parts = engine.accumulation
    labels_G = gather_rows(batch.labels, batch.rows_per_rank, world)
    head.begin_step(step, labels_G, head_lr)
    wire = torch.float16 if head.settings.operand.itemsize == 2 else None
    row_terms = compat.method.row_terms(head, step) if compat is not None else None
    sums = torch.zeros(4, dtype=torch.float64)
    why = None
    for part in range(parts):
        rows_per_rank = tuple(_part(rows, part, parts)[1] - _part(rows, part, parts)[0] for rows in batch.rows_per_rank)
        low, high = _part(batch.images.shape[0], part, parts)
        raw_bD = engine.embed(batch.images[low:high])
        norm_b = torch.linalg.vector_norm(raw_bD, dim=1)
        unit_bD = raw_bD / norm_b.clamp_min(_SHORTEST)[:, None]
        old_bE = None
        sample_ids_b = batch.sample_ids[low:high]
        if compat is not None and compat.old_vectors is not None:
            with torch.no_grad():
                old_bE = F.normalize(compat.old_vectors(batch.images[low:high], sample_ids_b).float())
        # rows whose gradient is complete with this backward move while the embeddings' gradient travels
        early = head.update_early if part == parts - 1 and row_terms is None else None
        seen_bD = unit_bD if compat is None else compat.method.head_input(unit_bD, old_bE, sample_ids_b, step)
        seen_GD = gather_rows(seen_bD, rows_per_rank, world, wire, early)
        norm_G = gather_rows(norm_b, rows_per_rank, world) if head.margin.uses_norms else None
        part_G = _labels_of_part(labels_G, batch.rows_per_rank, part, parts)
        row_weight_G = seen_GD.new_full((seen_GD.shape[0],), 1.0 / batch.global_rows)
        try:
            terms = head(seen_GD, part_G, row_weight_G, norm_G, only_micro_batch=parts == 1 and row_terms is None)
            total = terms.total
            added = total.new_zeros(())
            if compat is not None:
                new_GD = seen_GD if seen_bD is unit_bD else gather_rows(unit_bD, rows_per_rank, world, wire)
                of_all = old_bE if "batch" in compat.method.card.needs else None
                old_GE = gather_rows(of_all, rows_per_rank, world) if of_all is not None else None
                first = sum(rows_per_rank[: world.rank])
                own = slice(first, first + rows_per_rank[world.rank])
                seen = MethodBatch(
                    unit_bD,
                    new_GD,
                    old_bE,
                    old_GE,
                    part_G,
                    row_weight_G,
                    own,
                    rows_per_rank,
                    sample_ids_b,
                    step,
                    world,
                    head,
                )
                loss = compat.method.loss(seen)
                if loss is not None:
                    added = added + loss
                if row_terms is not None and part == 0:
                    added = added + row_terms.loss
                total = total + added
            _check_finite(total)
            of_part = torch.stack([total, terms.classification, terms.boundary, added]).detach()
        except NotFiniteError as error:  # on every rank alike: each sum is global
            head.leave_out()
            why = why or str(error)
            total = raw_bD.sum() * math.nan
            of_part = torch.full((4,), math.nan)
        engine.backward(total)
        if part < parts - 1:
            engine.micro_step_done()
        sums += of_part.double().cpu()
    if row_terms is not None and row_terms.weight_ND.grad is not None:  # of no account where rows are left out
        head.add_row_gradient(row_terms.local_N, row_terms.weight_ND.grad)
    return LossTerms(sums[0], sums[1], sums[2], sums[3], why)


def _check_finite(total: torch.Tensor) -> None:
    value = float(total.detach())  # the head has waited for the device already
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss is {value}")


def _labels_of_part(labels_G: torch.Tensor, rows_per_rank: tuple[int, ...], part: int, parts: int) -> torch.Tensor:
    pieces = []
    for own in labels_G.split(list(rows_per_rank)):
        low, high = _part(own.shape[0], part, parts)
        pieces.append(own[low:high])
    return torch.cat(pieces)


def _part(rows: int, part: int, parts: int) -> tuple[int, int]:
    return part * rows // parts, (part + 1) * rows // parts
