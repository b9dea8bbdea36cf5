"""What one micro-batch computes: embeddings, the head's loss and, for a compatible model, the two LCE terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lce_dist.batch import Batch
from lce_dist.collectives import gather_rows
from lce_dist.compat.lce import alignment_loss, boundary_loss
from lce_dist.compat.old_space import OldSpace
from lce_dist.config import CompatConfig
from lce_dist.head.layer import ShardedHead
from lce_dist.training.engine import Engine
from lce_dist.world import World


@dataclass(frozen=True)
class LossTerms:
    """Global losses of one step, the same on every rank; ``total`` is what was differentiated."""

    total: torch.Tensor
    classification: torch.Tensor
    alignment: torch.Tensor
    boundary: torch.Tensor


@dataclass(frozen=True)
class Compatibility:
    """The old space that a new model is tied to, and how strongly."""

    config: CompatConfig
    old_space: OldSpace


def train_step(
    engine: Engine, head: ShardedHead, compat: Compatibility | None, batch: Batch, world: World
) -> LossTerms:
    """Forward and backward of one global batch, in ``engine.accumulation`` micro-batches; no update.

    Each row weighs 1 / global rows whatever micro-batch and rank it is in, so the sum of the parts is the
    mean over the global batch. **Collectives**: a micro-batch gathers its embeddings and reduces 2B floats.
    """
    parts = engine.accumulation
    sums = torch.zeros(4, dtype=torch.float64)
    for part in range(parts):
        rows_per_rank = tuple(_part(rows, part, parts)[1] - _part(rows, part, parts)[0] for rows in batch.rows_per_rank)
        low, high = _part(batch.images.shape[0], part, parts)
        unit_bD = F.normalize(engine.embed(batch.images[low:high]))
        emb_GD = gather_rows(unit_bD, rows_per_rank, world)
        labels_G = gather_rows(batch.labels[low:high], rows_per_rank, world)
        row_weight_G = emb_GD.new_full((emb_GD.shape[0],), 1.0 / batch.global_rows)

        classification = head(emb_GD, labels_G, row_weight_G)
        total, alignment, boundary = classification, classification.new_zeros(()), classification.new_zeros(())
        if compat is not None:
            old, config = compat.old_space, compat.config
            boundary = boundary_loss(
                emb_GD,
                labels_G,
                row_weight_G,
                old.centre_SD,
                old.cos_boundary_S,
                head.first_class,
                config.boundary,
                world,
            )
            total = total + config.boundary_weight * boundary
            if part == parts - 1:  # the alignment does not depend on the batch: once a step
                alignment = alignment_loss(head.weight, old.centre_SD, head.num_classes, world)
                total = total + config.align_weight * alignment
        engine.backward(total)
        if part < parts - 1:
            engine.micro_step_done()
        sums += torch.stack([total, classification, alignment, boundary]).detach().double().cpu()
    return LossTerms(sums[0], sums[1], sums[2], sums[3])


def _part(rows: int, part: int, parts: int) -> tuple[int, int]:
    return part * rows // parts, (part + 1) * rows // parts
