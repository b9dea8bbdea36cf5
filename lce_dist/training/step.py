"""What one global batch computes: embeddings, and the head's loss with the terms that tie it to an old space."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lce_dist.batch import Batch
from lce_dist.collectives import gather_rows
from lce_dist.compat.lce import OldAnchor
from lce_dist.compat.old_space import OldSpace
from lce_dist.config import CompatConfig
from lce_dist.head.layer import ShardedHead
from lce_dist.training.engine import Engine
from lce_dist.world import World

_SHORTEST = 1e-12  # an embedding below this length has no direction


@dataclass(frozen=True)
class LossTerms:
    """Global losses of one step, the same on every rank.

    ``total`` is what was differentiated but for the alignment, which the head adds in its update.
    """

    total: torch.Tensor
    classification: torch.Tensor
    boundary: torch.Tensor


@dataclass(frozen=True)
class Compatibility:
    """The old space that a new model is tied to, and how strongly."""

    config: CompatConfig
    old_space: OldSpace

    def anchor(self) -> OldAnchor:
        """The old space as the head uses it; nothing is copied."""
        config, space = self.config, self.old_space
        return OldAnchor(
            space.centre_SD, space.cos_boundary_S, config.align_weight, config.boundary_weight, config.boundary
        )


def train_step(engine: Engine, head: ShardedHead, batch: Batch, step: int, head_lr: float, world: World) -> LossTerms:
    """Forward and backward of one global batch, in ``engine.accumulation`` micro-batches; the network is not updated.

    The head's rows may be: while the embeddings' gradient travels.

    Each row weighs 1 / global rows whatever micro-batch and rank it is in, so the sum of the parts is the
    mean over the global batch. **Collectives**: labels are gathered once; a micro-batch gathers its
    embeddings, in 16 bits where the head multiplies 16-bit operands, and reduces 3B floats.
    """
    parts = engine.accumulation
    labels_G = gather_rows(batch.labels, batch.rows_per_rank, world)
    head.begin_step(step, labels_G, head_lr)
    wire = torch.float16 if head.settings.operand.itemsize == 2 else None
    sums = torch.zeros(3, dtype=torch.float64)
    for part in range(parts):
        rows_per_rank = tuple(_part(rows, part, parts)[1] - _part(rows, part, parts)[0] for rows in batch.rows_per_rank)
        low, high = _part(batch.images.shape[0], part, parts)
        raw_bD = engine.embed(batch.images[low:high])
        norm_b = torch.linalg.vector_norm(raw_bD, dim=1)
        unit_bD = raw_bD / norm_b.clamp_min(_SHORTEST)[:, None]
        meanwhile = head.update_early if part == parts - 1 else None
        emb_GD = gather_rows(unit_bD, rows_per_rank, world, wire, meanwhile)
        norm_G = gather_rows(norm_b, rows_per_rank, world) if head.margin.uses_norms else None
        part_G = _labels_of_part(labels_G, batch.rows_per_rank, part, parts)
        row_weight_G = emb_GD.new_full((emb_GD.shape[0],), 1.0 / batch.global_rows)
        terms = head(emb_GD, part_G, row_weight_G, norm_G, only_micro_batch=parts == 1)
        engine.backward(terms.total)
        if part < parts - 1:
            engine.micro_step_done()
        sums += torch.stack([terms.total, terms.classification, terms.boundary]).detach().double().cpu()
    return LossTerms(sums[0], sums[1], sums[2])


def _labels_of_part(labels_G: torch.Tensor, rows_per_rank: tuple[int, ...], part: int, parts: int) -> torch.Tensor:
    pieces = []
    for own in labels_G.split(list(rows_per_rank)):
        low, high = _part(own.shape[0], part, parts)
        pieces.append(own[low:high])
    return torch.cat(pieces)


def _part(rows: int, part: int, parts: int) -> tuple[int, int]:
    return part * rows // parts, (part + 1) * rows // parts
