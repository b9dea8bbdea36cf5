"""The direct manner over two frozen models: the new model turned once into the old space, as part of the model itself.

A rotation changes no comparison of new with new, and asks nothing of whoever deploys the model. It is all that can be
done there: with both models frozen and no vector mapped, nothing else is left to fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.compat.closed_form import PairSums, procrustes
from lce_dist.errors import ConfigError


class RotatedNet(nn.Module):
    """``net`` and a rotation (D, D) of its vectors: (B, 3, S, S) -> (B, D). One state dict, stored as any network's."""

    def __init__(self, net: nn.Module, rotation_DD: torch.Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("rotation_DD", rotation_DD.float())
        self.rotation_DD: torch.Tensor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self.net(images)
        return F.linear(vectors, self.rotation_DD.to(vectors.dtype))


def rotate_to_old(net: nn.Module, sums: PairSums) -> RotatedNet:
    """``net`` turned by the rotation (or reflection) that brings its vectors closest to the old ones.

    sums: of pairs (new vector, old vector) of the same images. Errors: ConfigError where their lengths differ.
    **Source**: Procrustes; see ``closed_form.procrustes``.
    """
    dim_new, dim_old = sums.xy_DE.shape
    if dim_new != dim_old:
        raise ConfigError(
            f"the new model has {dim_new} dimensions and the old one {dim_old}; the direct manner compares their vectors "
            "as they are, and a rotation keeps the number of dimensions. Set compat.mode to 'mapping-backward' or "
            "'mapping-forward'"
        )
    return RotatedNet(net, procrustes(sums))
