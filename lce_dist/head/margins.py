"""Margins: what is done to the cosine of the right class before the softmax, with the exact derivative."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from lce_dist.config import HeadConfig


class Margin(Protocol):
    """Maps target cosines (any shape, any float dtype) to (value, d value / d cosine)."""

    def __call__(self, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class PlainSoftmax:
    """No margin. **Source**: Wang et al., NormFace, ACM MM 2017."""

    def __call__(self, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos, torch.ones_like(cos)


@dataclass(frozen=True)
class CosFace:
    """cos - m. **Source**: Wang et al., CosFace, CVPR 2018."""

    margin_cos: float

    def __call__(self, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos - self.margin_cos, torch.ones_like(cos)


@dataclass(frozen=True)
class ArcFace:
    """cos(theta + m); where theta + m passes pi, the line cos - m sin(m), which keeps falling.

    The derivative sin(theta + m) / sin(theta) has a pole at theta = 0 that the sphere's own tangent
    cancels; sin(theta) is held above the rounding of cos so that no NaN can arise.
    **Source**: Deng et al., ArcFace, CVPR 2019.
    """

    margin_rad: float

    def __call__(self, cos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos = cos.clamp(-1.0, 1.0)
        cos_m, sin_m = math.cos(self.margin_rad), math.sin(self.margin_rad)
        sin = (1.0 - cos * cos).clamp_min(4.0 * torch.finfo(cos.dtype).eps).sqrt()
        inside = cos > -cos_m  # theta < pi - m
        value = torch.where(
            inside, cos * cos_m - (1.0 - cos * cos).clamp_min(0.0).sqrt() * sin_m, cos - sin_m * self.margin_rad
        )
        slope = torch.where(inside, cos_m + cos / sin * sin_m, torch.ones_like(cos))
        return value, slope


def margin_of(config: HeadConfig) -> Margin:
    """The margin that the config names."""
    if config.loss == "arcface":
        assert config.margin_rad is not None
        return ArcFace(config.margin_rad)
    if config.loss == "cosface":
        assert config.margin_cos is not None
        return CosFace(config.margin_cos)
    return PlainSoftmax()
