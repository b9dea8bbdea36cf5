"""MobileFaceNet: depthwise face network for phones, tensor for tensor arcface_torch's ``get_mbf``.

A bottleneck widens with a 1x1, filters each channel on its own, and narrows with a 1x1 that has no
activation. One filter per channel over the whole last map replaces pooling: each position has its weight.

**Source**: https://github.com/deepinsight/insightface (recognition/arcface_torch/backbones/mobilefacenet.py,
blocks (1, 4, 6, 2), scale 2); Chen et al., "MobileFaceNets", 2018, https://arxiv.org/abs/1804.07573.
"""

from __future__ import annotations

import torch
from torch import nn


class MobileFaceNet(nn.Module):
    """(B, 3, image_size, image_size) -> (B, embedding_dim), not normalised, in the dtype of the weights.

    ``image_size``: a multiple of 16; the last filter is image_size / 16 pixels wide (7 at 112).
    """

    def __init__(self, embedding_dim: int, image_size: int) -> None:
        super().__init__()
        last = image_size // 16
        self.layers = nn.ModuleList(
            [
                _convolution(3, 128, kernel=3, stride=2),
                _convolution(128, 128, kernel=3, groups=64),
                _bottleneck(128, 128, hidden=128, stride=2),
                _Stack(*(_bottleneck(128, 128, hidden=128) for _ in range(4))),
                _bottleneck(128, 256, hidden=256, stride=2),
                _Stack(*(_bottleneck(256, 256, hidden=256) for _ in range(6))),
                _bottleneck(256, 256, hidden=512, stride=2),
                _Stack(*(_bottleneck(256, 256, hidden=256) for _ in range(2))),
            ]
        )
        self.conv_sep = _convolution(256, 512)
        self.features = _Stack(
            _convolution(512, 512, kernel=last, padding=0, groups=512, prelu=False),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = images.to(next(self.parameters()).dtype)
        for layer in self.layers:
            maps = layer(maps)
        embedding: torch.Tensor = self.features(self.conv_sep(maps))
        return embedding


class _Stack(nn.Module):
    """Layers in a row under the name ``layers``, as the public names need; ``residual`` adds the input."""

    def __init__(self, *layers: nn.Module, residual: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(maps)
        return maps + out if self.residual else out


def _convolution(
    width_in: int,
    width: int,
    kernel: int = 1,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    prelu: bool = True,
) -> _Stack:
    pad = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(width_in, width, kernel, stride, pad, groups=groups, bias=False)
    return _Stack(conv, nn.BatchNorm2d(width), *([nn.PReLU(width)] if prelu else []))


def _bottleneck(width_in: int, width: int, hidden: int, stride: int = 1) -> _Stack:
    return _Stack(
        _convolution(width_in, hidden),
        _convolution(hidden, hidden, kernel=3, stride=stride, groups=hidden),
        _convolution(hidden, width, prelu=False),
        residual=stride == 1,
    )
