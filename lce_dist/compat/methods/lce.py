"""LCE as a method: directly through the head's own passes, or through learned maps between the spaces.

Direct: class rows are drawn to old centres, new vectors stay inside the old classes' boundaries (compat/lce.py). With
maps: rows and centres are aligned through T12 and T21, half each; backward keeps T21(new vector) inside the old boundary;
forward keeps T12(old vector) as near to its new class row as the new vector of the same image is. Ours, not the paper's: directly,
new vectors tell their class's old centre from those of the batch (``contrast_weight``); with few classes, in every manner, the
(mapped) vector is drawn to the other model's vector of the same image (``pair_weight``).
**Source**: Meng et al., "Learning Compatible Embeddings", ICCV 2021 (arXiv 2108.01958).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.collectives import gather_rows, sum_over_ranks
from lce_dist.compat.bridges import build_bridge, mapped
from lce_dist.compat.contrast import contrast_loss
from lce_dist.compat.frozen_rows import steady_margin
from lce_dist.compat.lce import OldAnchor, boundary_loss, outside
from lce_dist.compat.method import BOUNDARY_KEYS, Card, Method, MethodBatch, RowTerms
from lce_dist.compat.old_space import OldSpace
from lce_dist.compat.transformed import rotating_subset, transformed_alignment
from lce_dist.compat.vector_weights import VectorWeights, vector_weights_for
from lce_dist.config import CompatConfig, Manner
from lce_dist.head.layer import ShardedHead
from lce_dist.head.margins import Margin
from lce_dist.head.sampling import drawn_flags

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs


class Lce(Method):
    """Learning Compatible Embeddings; ``forth`` is T12 (old to new), ``back`` is T21 (new to old)."""

    card = Card(
        "LCE: class centres aligned, new classes inside the old classes' boundaries",
        "Meng et al., Learning Compatible Embeddings, ICCV 2021, arXiv 2108.01958",
        frozenset({"centres"}),
        frozenset({"direct", "backward", "forward"}),
        "n identities: old centres, 4 n E bytes (2 in fp16) over all ranks. Direct: inside the head's own passes, and G cosines for "
        "each of a rank's b rows of a global batch of G. With maps: two maps of at most 128 classes a step, and one map of the "
        "batch. m images: nothing; forward, or with a pair term (by default where classes are fewer than dimensions), the old "
        "model on the batch in each step",
        BOUNDARY_KEYS
        | {"align_weight", "boundary_weight", "boundary", "contrast_weight", "pair_weight", "seen_only", "align_share"},
    )

    def __init__(
        self,
        manner: Manner,
        config: CompatConfig,
        space: OldSpace,
        forth: nn.Module | None,
        back: nn.Module | None,
        seed: int,
        weights: VectorWeights,
        scale: float,
        margin: Margin,
    ) -> None:
        super().__init__()
        self.manner = manner
        self.forth, self.back = forth, back
        self._config = config
        self._weights = weights
        self._scale, self._margin = scale, margin
        self._space = space
        self._seed = seed
        self._period = config.align_period(space.num_classes)

    @classmethod
    def build(cls, inputs: MethodInputs) -> Lce:
        """From the config's section; maps only where the manner has them."""
        config, manner = inputs.config, inputs.config.manner
        forth = back = None
        if manner != "direct":
            forth = build_bridge(config.joint_bridge, inputs.old_dim, inputs.new_dim, inputs.seed)
            back = build_bridge(config.joint_bridge, inputs.new_dim, inputs.old_dim, inputs.seed + 1)
        dim = max(inputs.new_dim, inputs.old_dim)
        weights = vector_weights_for(config, inputs.head.scale, inputs.space.num_classes, dim)
        head = inputs.head
        return cls(manner, config, inputs.space, forth, back, inputs.seed, weights, head.scale, steady_margin(head))

    @property
    def uses_old_vectors(self) -> bool:
        return self._weights.pair > 0.0 or (self.manner == "forward" and self._config.boundary_weight > 0.0)

    def anchor(self) -> OldAnchor | None:
        if self.manner != "direct":
            return None
        config, space = self._config, self._space
        return OldAnchor(
            space.centre_SD,
            space.cos_boundary_S,
            config.align_weight,
            config.boundary_weight,
            config.boundary,
            space.align_weight_S,
        )

    def row_terms(self, head: ShardedHead, step: int) -> RowTerms | None:
        if self.forth is None or self.back is None or self._config.align_weight == 0.0:
            return None
        rows, space, period = head.rows, self._space, self._period
        device = rows.inv_norm_S.device
        local_N = rotating_subset(self._seed, step, period, rows.first_class, rows.last_class, device)
        share = 1.0
        if head.sampling is not None:  # drawn rows alone move, for all that were not
            share = head.sampling.rate
            drawn_S = drawn_flags(head.sampling.seed, step, share, rows.first_class, rows.last_class, device)
            local_N = local_N[drawn_S[local_N]]
        weight_ND = rows.weight.load(local_N).detach().clone().requires_grad_()
        old_ND = space.centre_SD[local_N].to(weight_ND.dtype)
        forth, back = self.forth, self.back
        aligned = transformed_alignment(
            weight_ND,
            old_ND,
            lambda old: mapped(forth, old),
            lambda new: mapped(back, new),
            space.num_classes,
            period,
            None if space.align_weight_S is None else space.align_weight_S[local_N],
        )
        weight = self._config.align_weight / share
        return RowTerms(sum_over_ranks(weight * aligned, head.world), local_N, weight_ND)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        config, space = self._config, self._space
        if self.manner == "direct":  # the boundary is a part of the head's passes
            return self._of_vectors(batch)
        if config.boundary_weight == 0.0 and self._weights.pair == 0.0:
            return None
        if self.manner == "backward" and self.back is not None:
            seen_bE = F.normalize(mapped(self.back, batch.new_bD))
            loss = self._apart(seen_bE, batch.old_bE, batch)
            if config.boundary_weight > 0.0:
                seen_GE = gather_rows(seen_bE, batch.rows_per_rank, batch.world)
                centre_SE = space.centre_SD.to(seen_GE.dtype)
                terms = (seen_GE, batch.labels_G, batch.weight_G, centre_SE, space.cos_boundary_S, space.first_class)
                loss = loss + config.boundary_weight * boundary_loss(*terms, config.boundary, batch.world)
            return loss
        if self.manner == "forward" and self.forth is not None and batch.old_bE is not None:
            seen_bD = F.normalize(mapped(self.forth, batch.old_bE))
            loss = self._apart(seen_bD, batch.new_bD, batch)
            if config.boundary_weight > 0.0:
                seen_GD = gather_rows(seen_bD, batch.rows_per_rank, batch.world)
                loss = loss + config.boundary_weight * self._outside_new_cones(seen_GD, batch)
            return loss
        return None

    def maps(self) -> dict[Literal["new_to_old", "old_to_new"], nn.Module]:
        if self.forth is None or self.back is None:
            return {}
        return {"new_to_old": self.back, "old_to_new": self.forth}

    def _of_vectors(self, batch: MethodBatch) -> torch.Tensor | None:
        loss = None
        if self._weights.pair > 0.0:
            loss = self._apart(batch.new_bD, batch.old_bE, batch)
        if self._weights.contrast > 0.0:
            rows = (batch.new_bD, batch.labels_G, batch.weight_G, batch.own)
            told = contrast_loss(*rows, self._space, self._scale, self._margin, batch.world)
            loss = self._weights.contrast * told if loss is None else loss + self._weights.contrast * told
        return loss

    def _apart(self, seen_bE: torch.Tensor, other_bE: torch.Tensor | None, batch: MethodBatch) -> torch.Tensor:
        """The pair term: weighted mean of 1 - cos between (mapped) vectors and the other model's of the same images."""
        if self._weights.pair == 0.0 or other_bE is None:
            return seen_bE.new_zeros(())
        far_b = 1.0 - (seen_bE * other_bE.to(seen_bE.dtype)).sum(1)
        return self._weights.pair * sum_over_ranks((far_b * batch.weight_G[batch.own]).sum(), batch.world)

    def _outside_new_cones(self, seen_GD: torch.Tensor, batch: MethodBatch) -> torch.Tensor:
        """How much farther than the new vector of its image a mapped old vector is from the new class row."""
        rows = batch.head.rows
        local_G = batch.labels_G - rows.first_class
        owned_O = torch.nonzero((local_G >= 0) & (local_G < rows.num_local)).squeeze(1)
        row_OD = rows.unit(local_G[owned_O]).to(seen_GD.dtype)
        bound_O = (batch.new_GD[owned_O].detach() * row_OD).sum(1)
        outside_O = outside(bound_O, (seen_GD[owned_O] * row_OD).sum(1), self._config.boundary)
        return sum_over_ranks((outside_O * batch.weight_G[owned_O]).sum(), batch.world)
