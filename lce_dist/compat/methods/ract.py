"""RACT (hot-refresh): a new vector is closer to its image's old vector than to other classes' old and new vectors.

loss_i = -log( e^(n_i o_i / T) / (e^(n_i o_i / T) + sum_k e^(n_i o_k / T) + sum_k e^(n_i n_k / T)) ), k over the rows of the
global batch that are of another class; the mean over i. The last sum is what alleviates negative flips.
**Source**: Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval",
ICLR 2022 (arXiv 2201.09724); github.com/binjiezhang/RACT_ICLR2022 (model/loss.py, ``contra_ract``; config.json).
Differences: all negatives of the batch count (their command keeps the 10 nearest of each space, next to which the others
hardly weigh at their T); the gradient runs through both vectors of a new pair (there through the first alone).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lce_dist.collectives import sum_over_ranks
from lce_dist.compat.method import Card, Method, MethodBatch

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs


class Ract(Method):
    """No parameters."""

    WEIGHT = 1.0  # the authors' config.json
    TEMPERATURE = 0.01  # the authors' config.json

    card = Card(
        "RACT: old vectors of the same image against old and new vectors of other classes in the batch",
        "Zhang et al., Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval, "
        "ICLR 2022, arXiv 2201.09724",
        frozenset({"batch"}),
        frozenset({"direct"}),
        "n identities: nothing. m images: the old model on the batch in each step, all ranks' old vectors gathered (4 G E "
        "bytes), and 2 G cosines for each of a rank's b rows of a global batch of G: 8 b G bytes, a few times over",
    )

    def __init__(self, weight: float) -> None:
        super().__init__()
        self._weight = weight

    @classmethod
    def build(cls, inputs: MethodInputs) -> Ract:
        """The config's weight, or the default."""
        weight = inputs.config.method_weight
        return cls(cls.WEIGHT if weight is None else weight)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        """**Memory**: b * 2 G values, and as many for the gradient."""
        if self._weight == 0.0:
            return None
        assert batch.old_bE is not None and batch.old_GE is not None
        labels_b = batch.labels_G[batch.own]
        same_bG = labels_b[:, None] == batch.labels_G[None, :]
        positive_b = (batch.new_bD * batch.old_bE).sum(1)
        to_old_bG = (batch.new_bD @ batch.old_GE.T).masked_fill(same_bG, -torch.inf)
        to_new_bG = (batch.new_bD @ batch.new_GD.T).masked_fill(same_bG, -torch.inf)
        logits_bN = torch.cat([positive_b[:, None], to_old_bG, to_new_bG], dim=1) / self.TEMPERATURE
        loss_b = torch.logsumexp(logits_bN, dim=1) - logits_bN[:, 0]
        return self._weight * sum_over_ranks((loss_b * batch.weight_G[batch.own]).sum(), batch.world)
