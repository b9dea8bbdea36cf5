"""L2: each new vector is drawn to the old vector of its image.

loss = weight * mean |new - old|^2 = weight * mean 2 (1 - cos), on unit vectors.
**Source**: feature regression, a baseline of Shen et al., CVPR 2020 (arXiv 2003.11942) and of re-runs since. The re-run
in github.com/yuleung/MixBCT (L2_weakenedL2/train.py) has the distance itself, whose slope stays 1 down to the old vector;
squared, as in github.com/binjiezhang/RACT_ICLR2022 (model/loss.py), it has no kink there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lce_dist.collectives import sum_over_ranks
from lce_dist.compat.method import Card, Method, MethodBatch

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs


class L2(Method):
    """No parameters."""

    WEIGHT = 10.0  # the MixBCT re-run's; both distances have the same slope at 0.5

    card = Card(
        "L2: every new vector drawn to the old vector of its image",
        "Baseline of Shen et al., Towards Backward-Compatible Representation Learning, CVPR 2020, arXiv 2003.11942",
        frozenset({"batch"}),
        frozenset({"direct"}),
        "n identities: nothing. m images: the old model on the batch in each step, whose vectors take 4 b E bytes on a rank "
        "of b rows; nothing is kept",
    )

    def __init__(self, weight: float) -> None:
        super().__init__()
        self._weight = weight

    @classmethod
    def build(cls, inputs: MethodInputs) -> L2:
        """The config's weight, or the default."""
        weight = inputs.config.method_weight
        return cls(cls.WEIGHT if weight is None else weight)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        if self._weight == 0.0:
            return None
        assert batch.old_bE is not None
        far_b = (batch.new_bD - batch.old_bE).square().sum(1)
        return self._weight * sum_over_ranks((far_b * batch.weight_G[batch.own]).sum(), batch.world)
