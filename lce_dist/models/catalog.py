"""The networks by name: one function turns (name, sizes, seed) into a network, the same one everywhere."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from lce_dist.errors import ConfigError
from lce_dist.models.iresnet import IRESNET_BLOCKS, IResNet
from lce_dist.models.mobilefacenet import MobileFaceNet
from lce_dist.models.tiny import TinyNet

_TINY_WIDTHS = {"tiny8": 8, "tiny16": 16, "tiny24": 24, "tiny32": 32}

NET_NAMES: tuple[str, ...] = (
    *IRESNET_BLOCKS,
    "mobilefacenet",
    *_TINY_WIDTHS,
    *(f"{name}-gn" for name in _TINY_WIDTHS),
)

# as arcface_torch calls them
NET_ALIASES = {f"r{name.removeprefix('iresnet')}": name for name in IRESNET_BLOCKS}


def net_name(name: str) -> str:
    """The name under which a network is known here: "iresnet50" of "r50"."""
    return NET_ALIASES.get(name, name)


def build_net(name: str, embedding_dim: int, image_size: int, seed: int) -> nn.Module:
    """A float32 network on the CPU: (B, 3, image_size, image_size) -> (B, embedding_dim), not normalised.

    Initial weights depend on the arguments alone; the global random state is neither read nor changed.
    Errors: ConfigError for an unknown name, or an ``image_size`` that is not a multiple of 16.
    """
    name = net_name(name)
    if name not in NET_NAMES:
        near = difflib.get_close_matches(name, NET_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NET_NAMES)}"
        raise ConfigError(f"net {name!r} is unknown; {hint}")
    if image_size < 16 or image_size % 16:
        fitting = max(16, round(image_size / 16) * 16)
        raise ConfigError(
            f"image_size is {image_size}; must be a multiple of 16, because {name} halves the picture four times. "
            f"Use {fitting}"
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the accelerators
        return _build(name, embedding_dim, image_size)


def num_parameters(net: nn.Module) -> int:
    """How many numbers training can change."""
    return sum(parameter.numel() for parameter in net.parameters())


def _build(name: str, embedding_dim: int, image_size: int) -> nn.Module:
    if name in IRESNET_BLOCKS:
        return IResNet(IRESNET_BLOCKS[name], embedding_dim, image_size)
    if name == "mobilefacenet":
        return MobileFaceNet(embedding_dim, image_size)
    width = _TINY_WIDTHS[name.removesuffix("-gn")]
    return TinyNet(width, name.endswith("-gn"), embedding_dim, image_size)
