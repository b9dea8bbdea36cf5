"""iResNet: the residual network of face recognition, tensor for tensor the public arcface_torch one.

A block is BN, conv, BN, PReLU, conv (with the stride), BN, plus its shortcut; nothing follows the sum. The
whole last feature map, not its mean, feeds the embedding: faces are aligned, so position carries meaning.

**Source**: https://github.com/deepinsight/insightface (recognition/arcface_torch/backbones/iresnet.py);
the block is that of Duta et al., "Improved Residual Networks", 2020, as ArcFace (Deng et al., 2019) uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

IRESNET_BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
_WIDTHS = (64, 128, 256, 512)


class IResNet(nn.Module):
    """(B, 3, image_size, image_size) -> (B, embedding_dim), not normalised, in the dtype of the weights.

    ``blocks``: how many blocks each of the four stages has. ``image_size``: a multiple of 16.
    The public net's dropout is 0 in all its recipes and has no weights; it is left out.
    """

    def __init__(self, blocks: Sequence[int], embedding_dim: int, image_size: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, _WIDTHS[0], 1)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.prelu = nn.PReLU(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks[0])
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks[1])
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks[2])
        self.layer4 = _stage(_WIDTHS[2], _WIDTHS[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(_WIDTHS[3])
        self.fc = nn.Linear(_WIDTHS[3] * (image_size // 16) ** 2, embedding_dim)
        self.features = _UnscaledBatchNorm1d(embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.prelu(self.bn1(self.conv1(images.to(self.conv1.weight.dtype))))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        embedding: torch.Tensor = self.features(self.fc(self.bn2(maps).flatten(1)))
        return embedding


class _UnscaledBatchNorm1d(nn.BatchNorm1d):
    """Batch norm whose ``weight`` stays 1: a free scale a coordinate would let some outweigh others in the cosine.

    The public net holds it as a parameter that needs no gradient. As a buffer it has the same name in a
    state dict, and no optimizer or ZeRO partition ever meets a parameter that it must skip.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        del self.weight
        self.register_buffer("weight", torch.ones(num_features))


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = _conv3x3(width_in, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride > 1:
            shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        shortcut = maps if self.downsample is None else self.downsample(maps)
        branch = self.prelu(self.bn2(self.conv1(self.bn1(maps))))
        branch = self.bn3(self.conv2(branch))
        total: torch.Tensor = branch + shortcut
        return total


def _stage(width_in: int, width: int, num_blocks: int) -> nn.Sequential:
    first = _Block(width_in, width, stride=2)
    return nn.Sequential(first, *(_Block(width, width, stride=1) for _ in range(1, num_blocks)))


def _conv3x3(width_in: int, width: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
