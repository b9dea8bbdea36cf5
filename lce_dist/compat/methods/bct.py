"""BCT: new vectors are classified by the old classifier too, whose rows here are the old centres.

The head's margin softmax, with its scale, margin, formats and chunks, over all classes' old centres, which stay as they
are: loss = weight * (mean of -log softmax). For classes that the old model never saw, mean old vectors are what the paper
proposes in place of rows; here they are the rows of all classes, since the old classifier need not be at hand.
**Source**: Shen, Xiong, Xia, Soatto, "Towards Backward-Compatible Representation Learning", CVPR 2020
(arXiv 2003.11942): the influence loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lce_dist.compat.frozen_rows import frozen_rows, softmax_over_frozen, steady_margin
from lce_dist.compat.method import Card, Method, MethodBatch
from lce_dist.compat.old_space import OldSpace
from lce_dist.head.margins import Margin

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs


class Bct(Method):
    """No parameters; float32 centres are not copied."""

    WEIGHT = 1.0  # lambda of the paper, and of re-runs (github.com/yuleung/MixBCT, BCT/train.py)

    card = Card(
        "BCT: new vectors also classified by the old centres",
        "Shen et al., Towards Backward-Compatible Representation Learning, CVPR 2020, arXiv 2003.11942",
        frozenset({"centres"}),
        frozenset({"direct"}),
        "n identities: old centres, 4 n E bytes over all ranks, and a second softmax over n classes in each step, three "
        "products of batch and centres, as much as the head's own; at a time it holds one chunk of its cosines. m images: "
        "nothing, the old model does not run",
    )

    def __init__(self, space: OldSpace, margin: Margin, weight: float) -> None:
        super().__init__()
        self._rows = frozen_rows(space.centre_SD, space)
        self._margin = margin
        self._weight = weight

    @classmethod
    def build(cls, inputs: MethodInputs) -> Bct:
        """The head's margin over the old centres."""
        weight = inputs.config.method_weight
        return cls(inputs.space, steady_margin(inputs.head), cls.WEIGHT if weight is None else weight)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        if self._weight == 0.0 or batch.new_GD.shape[0] == 0:
            return None
        return self._weight * softmax_over_frozen(
            batch.new_GD, batch.labels_G, batch.weight_G, self._rows, self._margin, batch.head, batch.world
        )
