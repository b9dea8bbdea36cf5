"""The direct manner over two frozen models: the new model turned once into the old space, as part of the model itself.

A rotation changes no comparison of new with new, and asks nothing of whoever deploys the model. It is all that can be
done there: with both models frozen and no vector mapped, nothing else is left to fit. Our networks end in a linear layer
and a batch norm, which is affine once it is trained: the rotation becomes part of their numbers, and the network stays
the one that its name says.
"""

from __future__ import annotations

import torch
from torch import nn

from lce_dist.errors import ConfigError


def last_layers(net: nn.Module) -> tuple[nn.Linear, nn.BatchNorm1d]:
    """The linear layer and the batch norm that ``net`` ends in. Errors: ConfigError where it ends in something else."""
    leaves = [module for module in net.modules() if next(module.children(), None) is None]
    linear, norm = leaves[-2:]
    if not isinstance(linear, nn.Linear) or not isinstance(norm, nn.BatchNorm1d) or norm.running_mean is None:
        raise ConfigError(
            f"compat.mode is 'mapping-direct', whose rotation becomes part of the new model; {type(net).__name__} ends in "
            f"{type(linear).__name__} and {type(norm).__name__}, must end in Linear and BatchNorm1d to take it up. Use another "
            "new.net, or compat.mode = 'mapping-backward'"
        )
    return linear, norm


@torch.no_grad()
def fold_rotation(net: nn.Module, rotation_DD: torch.Tensor) -> None:
    """Change ``net``, in place, so that in eval mode it gives ``rotation_DD`` times the vectors that it gave.

    y = g (W x + b - m) / sqrt(v + eps) + h becomes one with W' = A W, b' = A b, m' = A m, h' = R h, and v' + eps = g' = 1,
    where A = R diag(g / sqrt(v + eps)); computed in float64. Errors: as ``last_layers``.
    """
    linear, norm = last_layers(net)
    assert norm.running_mean is not None and norm.running_var is not None, "they were looked for"
    turn_DD = rotation_DD.double().to(norm.running_mean.device)
    scale_D = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale_D = scale_D * norm.weight.double()
        norm.weight.fill_(1.0)
    mix_DD = turn_DD * scale_D
    for values in (linear.weight, linear.bias, norm.running_mean):
        if values is not None:
            values.copy_(mix_DD @ values.double())
    if norm.bias is not None:
        norm.bias.copy_(turn_DD @ norm.bias.double())
    norm.running_var.fill_(1.0 - norm.eps)
