"""RBT: a residual bottleneck transformation brings one model's vectors into the other's space, trained with the network.

Backward maps new vectors into the old space, where old centres classify them; forward maps old vectors into the new
space, where the head's rows classify them (one classifier for both models: a unified representation). Mapped and
unmapped vectors of the same image are drawn together: loss = softmax(mapped) + 10 * mean(1 - cos(mapped, other)).
**Source**: Wang et al., "Unified Representation Learning for Cross Model Compatibility", BMVC 2020 (arXiv 2008.04821),
which introduces the RBT module (figure 3 of LCE stacks four: compat/bridges.py, "stacked"). Its full text could not be
read. Differences: there both models are frozen and both are mapped into a third space; here the new network, being
trained, is its own map. There the number of blocks may differ, and a divergence between the two models' class
probabilities is added; here not. No map is needed in the direct manner, so there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.collectives import sum_over_ranks
from lce_dist.compat.bridges import build_bridge, mapped
from lce_dist.compat.frozen_rows import frozen_rows, softmax_over_frozen, steady_margin
from lce_dist.compat.method import Card, Method, MethodBatch
from lce_dist.compat.old_space import OldSpace
from lce_dist.config import HeadConfig, Manner

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs


class Rbt(Method):
    """``bridge``: T21 (new to old) in the backward manner, T12 (old to new) in the forward one."""

    WEIGHT = 1.0  # ours
    SIMILARITY = 10.0  # as MixBCT's authors set L2's "to match loss scale"

    card = Card(
        "RBT: a residual bottleneck transformation trained with the network",
        "Wang et al., Unified Representation Learning for Cross Model Compatibility, BMVC 2020, arXiv 2008.04821",
        frozenset({"centres", "batch"}),
        frozenset({"backward", "forward"}),
        "n identities: a second softmax over n classes in each step, which doubles the head's arithmetic; backward: old "
        "centres once more, 4 n E bytes over all ranks. m images: the old model on the batch in each step, and the map of "
        "every row of the global batch on each rank",
    )

    def __init__(self, manner: Manner, weight: float, bridge: nn.Module, space: OldSpace, head: HeadConfig) -> None:
        super().__init__()
        self.manner = manner
        self.bridge = bridge
        self._weight = weight
        self._margin = steady_margin(head)
        self._old_rows = frozen_rows(space.centre_SD, space) if manner == "backward" else None

    @classmethod
    def build(cls, inputs: MethodInputs) -> Rbt:
        """A fresh stack of blocks between the two dimensions."""
        config, manner = inputs.config, inputs.config.manner
        dims = (inputs.new_dim, inputs.old_dim) if manner == "backward" else (inputs.old_dim, inputs.new_dim)
        bridge = build_bridge("stacked", *dims, inputs.seed)
        weight = cls.WEIGHT if config.method_weight is None else config.method_weight
        return cls(manner, weight, bridge, inputs.space, inputs.head)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        if self._weight == 0.0 or batch.new_GD.shape[0] == 0:
            return None
        assert batch.old_GE is not None
        there = (batch.new_GD, batch.old_GE) if self._old_rows is not None else (batch.old_GE, batch.new_GD)
        # batch norms need all rows: each rank maps the whole global micro-batch, a few thousand products a row
        mapped_GE = F.normalize(mapped(self.bridge, there[0]))
        rows = self._old_rows if self._old_rows is not None else batch.head.rows
        classified = softmax_over_frozen(
            mapped_GE, batch.labels_G, batch.weight_G, rows, self._margin, batch.head, batch.world
        )
        own = batch.own
        far_b = 1.0 - (mapped_GE[own] * there[1][own]).sum(1)
        apart = sum_over_ranks((far_b * batch.weight_G[own]).sum(), batch.world)
        return self._weight * (classified + self.SIMILARITY * apart)

    def maps(self) -> dict[Literal["new_to_old", "old_to_new"], nn.Module]:
        return {"new_to_old": self.bridge} if self.manner == "backward" else {"old_to_new": self.bridge}
