"""Margins: what is done to the cosine of the right class before the softmax, with the exact derivative.

A margin works in float64 inside and answers in the precision of its input, float32 at least. A cosine outside [-1, 1]
counts as the border. Many slopes contain 1 / sin(theta), a pole at theta = 0 that the sphere's own tangent cancels but
that rounding would turn into infinity: within 2 eps of cos = +-1 (eps as in the input, at most float32's) the slope is
held at its value 2 eps from there. Values are not touched. In float32 that holds for the four largest numbers up to 1;
ArcFace with m = 0.5 gives 695 there, half the true slope one step below 1, where the cosine itself is all rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch


@dataclass(frozen=True)
class TargetTerm:
    """psi of the target cosines, d psi / d cos, and d psi / d norm where psi depends on the embedding's length."""

    value_O: torch.Tensor
    slope_O: torch.Tensor
    norm_slope_O: torch.Tensor | None


@dataclass(frozen=True)
class HardNegatives:
    """A negative cosine above its row's threshold becomes cos * (shift + cos), with slope shift + 2 cos."""

    threshold_B: torch.Tensor
    shift: float


@dataclass(frozen=True, eq=False)
class Margin:
    """What every margin answers; the answers of this class are those of a margin that does nothing.

    straight_through: report a slope of 1 (and none along the norm) whatever the value, as arcface_torch does by
    applying its margins under no_grad; to repeat old runs.
    """

    straight_through: bool = field(default=False, kw_only=True)

    uses_norms: ClassVar[bool] = False
    acts_on_negatives: ClassVar[bool] = False
    top: ClassVar[float] = 1.0  # the largest value that a target or a negative can take

    def observe(
        self, norm_B: torch.Tensor | None, target_cos_B: torch.Tensor | None, row_weight_B: torch.Tensor
    ) -> None:
        """Take in a micro-batch's global values, before ``target``; rows of weight 0 are not counted."""

    @torch.no_grad()
    def target(self, cos_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        """psi and its slopes at target cosines (O,); ``norm_O``: lengths of the embeddings before normalisation."""
        dtype = torch.promote_types(cos_O.dtype, torch.float32)
        near = 2.0 * torch.finfo(dtype).eps
        wide_O = cos_O.double().clamp(-1.0, 1.0)
        term = self._psi(wide_O, wide_O.clamp(near - 1.0, 1.0 - near), norm_O.double() if norm_O is not None else None)
        if self.straight_through:
            term = TargetTerm(term.value_O, torch.ones_like(term.value_O), None)
        norm_slope_O = term.norm_slope_O.to(dtype) if term.norm_slope_O is not None else None
        return TargetTerm(term.value_O.to(dtype), term.slope_O.to(dtype), norm_slope_O)

    def negatives(self, target_cos_B: torch.Tensor) -> HardNegatives | None:
        """What is done to negatives, given every row's target cosine; None: nothing."""
        return None

    def regulariser(self, norm_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A penalty on embedding lengths, weighted, and its derivative, each (B,); None: no penalty."""
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """Running statistics by name: 0-dim float64 tensors on the CPU, to be read and written in place."""
        return {}

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        """In float64: the value at ``cos_O``, the slopes at ``held_O``, which keeps off +-1."""
        return TargetTerm(cos_O, torch.ones_like(cos_O), None)


@dataclass(frozen=True, eq=False)
class PlainSoftmax(Margin):
    """No margin. **Source**: Wang et al., NormFace, ACM MM 2017."""


@dataclass(frozen=True, eq=False)
class CosFace(Margin):
    """cos - m. **Source**: Wang et al., CosFace, CVPR 2018."""

    margin_cos: float

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        return TargetTerm(cos_O - self.margin_cos, torch.ones_like(cos_O), None)


@dataclass(frozen=True, eq=False)
class ArcFace(Margin):
    """cos(theta + m); where theta + m passes pi, the line cos - m sin(m), which keeps falling with theta.

    For m > 2.33 that line would start above -1; it is then lowered to start at -1.
    **Source**: Deng et al., ArcFace, CVPR 2019; the line: insightface, recognition/arcface_torch/losses.py (``sinmm``).
    """

    margin_rad: float

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        value_O, slope_O, _ = _rotated(cos_O, held_O, 1.0, torch.full_like(cos_O, self.margin_rad))
        return TargetTerm(value_O, slope_O, None)


@dataclass(frozen=True, eq=False)
class Combined(Margin):
    """cos(m1 theta + m2) - m3, all three at once; m1 and m2 as angles, m3 as a cosine.

    Where m1 theta + m2 passes pi, at theta0 = (pi - m2) / m1, it goes on as the line cos(theta) - u sin(u) - m3 with
    u = pi - theta0, the margin's angle there: for m1 = 1 ArcFace's line. For u > 2.33 the line starts at -1 - m3.
    **Source**: Deng et al., ArcFace, CVPR 2019, equation 4. (arcface_torch drops m1 and m2 when m3 > 0.)
    """

    m1: float
    m2: float
    m3: float

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        value_O, slope_O, _ = _rotated(cos_O, held_O, self.m1, torch.full_like(cos_O, self.m2))
        return TargetTerm(value_O - self.m3, slope_O, None)


@dataclass(frozen=True, eq=False)
class AdaFace(Margin):
    """cos(theta - m z) - (m + m z): z in [-1, 1] says how long the embedding is among those seen lately.

    z = h * (norm - mean) / (std + 0.001), norms clipped to [0.001, 100]; no gradient through the norm. ``theta - m z``
    is clipped to [0, pi], where psi is flat (slope 0), as published. ``decay`` is the share of the old mean and std
    (start: 20 and 100) that one micro-batch leaves. Not kept: the authors' clamp of all cosines to +-0.999.
    **Source**: Kim et al., AdaFace, CVPR 2022, equations 16 to 19; github.com/mk-minchul/AdaFace, head.py.
    """

    margin: float
    h: float = 0.333
    decay: float = 0.99
    _mean: torch.Tensor = field(init=False, repr=False, default_factory=lambda: _statistic(20.0))
    _std: torch.Tensor = field(init=False, repr=False, default_factory=lambda: _statistic(100.0))

    uses_norms: ClassVar[bool] = True

    @torch.no_grad()
    def observe(
        self, norm_B: torch.Tensor | None, target_cos_B: torch.Tensor | None, row_weight_B: torch.Tensor
    ) -> None:
        """Take in the norms' mean and unbiased deviation; a single counted row has none and moves the mean only."""
        assert norm_B is not None
        norm_N = _clip_norms(_counted(norm_B, row_weight_B))
        if norm_N.numel() > 0:
            self._mean.lerp_(norm_N.mean(), 1.0 - self.decay)
        if norm_N.numel() > 1:
            self._std.lerp_(norm_N.std(), 1.0 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        """The running mean and standard deviation of the norms."""
        return {"norm_mean": self._mean, "norm_std": self._std}

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        assert norm_O is not None
        z_O = self.h * (_clip_norms(norm_O) - float(self._mean)) / (float(self._std) + 1e-3)
        share_O = self.margin * z_O.clamp(-1.0, 1.0)
        angle_O = torch.acos(cos_O) - share_O
        value_O = torch.cos(angle_O.clamp(0.0, math.pi)) - (self.margin + share_O)
        held_angle_O = torch.acos(held_O)
        slope_O = torch.sin(held_angle_O - share_O) / torch.sin(held_angle_O)
        return TargetTerm(value_O, slope_O.clamp_min(0.0), None)  # the sine is negative just where the angle is clipped


@dataclass(frozen=True, eq=False)
class MagFace(Margin):
    """cos(theta + m(a)), m linear in the norm a: lower_margin (radians) at lower_norm, upper_margin at upper_norm.

    Norms are clamped to these bounds; the gradient runs through them, and is zero where clamped. Past pi
    as :class:`ArcFace` (the authors' ``easy_margin=False``). ``regulariser``: weight * (a / upper_norm^2 + 1 / a).
    **Source**: Meng et al., MagFace, CVPR 2021 (norms 10 to 110, margins 0.45 to 0.8, weight 35);
    github.com/IrvingMeng/MagFace, models/magface.py.
    """

    lower_norm: float
    upper_norm: float
    lower_margin: float
    upper_margin: float
    regulariser_weight: float

    uses_norms: ClassVar[bool] = True

    @torch.no_grad()
    def regulariser(self, norm_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weight * g(norm), least at ``upper_norm``, and its derivative."""
        dtype = torch.promote_types(norm_B.dtype, torch.float32)
        clamped_B, free_B = self._clamp(norm_B.double())
        value_B = clamped_B / self.upper_norm**2 + 1.0 / clamped_B
        slope_B = (1.0 / self.upper_norm**2 - clamped_B**-2) * free_B
        return (self.regulariser_weight * value_B).to(dtype), (self.regulariser_weight * slope_B).to(dtype)

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        assert norm_O is not None
        clamped_O, free_O = self._clamp(norm_O)
        rise = (self.upper_margin - self.lower_margin) / (self.upper_norm - self.lower_norm)
        margin_O = self.lower_margin + rise * (clamped_O - self.lower_norm)
        value_O, slope_O, by_margin_O = _rotated(cos_O, held_O, 1.0, margin_O)
        return TargetTerm(value_O, slope_O, by_margin_O * rise * free_O)

    def _clamp(self, norm_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms between the bounds, and which of them were there already."""
        clamped_B = norm_B.clamp(self.lower_norm, self.upper_norm)
        return clamped_B, clamped_B == norm_B


@dataclass(frozen=True, eq=False)
class CurricularFace(Margin):
    """ArcFace whose hard negatives, those above their row's psi, become cos * (t + cos).

    t is the running mean of target cosines, from 0; ``decay`` is its share that one micro-batch leaves. The threshold
    is psi with its continuation past pi; the authors' code takes bare cos(theta + m), which rises again there.
    **Source**: Huang et al., CurricularFace, CVPR 2020; github.com/HuangYG123/CurricularFace, head/metrics.py.
    """

    margin_rad: float
    decay: float = 0.99
    _t: torch.Tensor = field(init=False, repr=False, default_factory=lambda: _statistic(0.0))

    acts_on_negatives: ClassVar[bool] = True
    top: ClassVar[float] = 2.0  # cos * (t + cos) with both at 1

    @torch.no_grad()
    def observe(
        self, norm_B: torch.Tensor | None, target_cos_B: torch.Tensor | None, row_weight_B: torch.Tensor
    ) -> None:
        """Take in the mean of the target cosines."""
        assert target_cos_B is not None
        cos_N = _counted(target_cos_B, row_weight_B).clamp(-1.0, 1.0)
        if cos_N.numel() > 0:
            self._t.lerp_(cos_N.mean(), 1.0 - self.decay)

    def negatives(self, target_cos_B: torch.Tensor) -> HardNegatives:
        """Each row's psi as its threshold, and t."""
        return HardNegatives(self.target(target_cos_B, None).value_O, float(self._t))

    def state(self) -> dict[str, torch.Tensor]:
        """The running mean of target cosines."""
        return {"t": self._t}

    def _psi(self, cos_O: torch.Tensor, held_O: torch.Tensor, norm_O: torch.Tensor | None) -> TargetTerm:
        value_O, slope_O, _ = _rotated(cos_O, held_O, 1.0, torch.full_like(cos_O, self.margin_rad))
        return TargetTerm(value_O, slope_O, None)


def _rotated(
    cos_O: torch.Tensor, held_O: torch.Tensor, factor: float, added_O: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos(factor * theta + added), past pi a falling line; its derivatives by cos (at ``held_O``) and by ``added``."""
    angle_O = factor * torch.acos(cos_O) + added_O
    held_angle_O = torch.acos(held_O)
    inside_O = angle_O <= math.pi
    slope_O = factor * torch.sin(factor * held_angle_O + added_O) / torch.sin(held_angle_O)
    # what the margin has added to theta when the sum reaches pi
    gap_O = math.pi - (math.pi - added_O) / factor
    published_O, lowest_O = gap_O * torch.sin(gap_O), 1.0 - torch.cos(gap_O)
    drop_O = torch.maximum(published_O, lowest_O)
    drop_slope_O = torch.sin(gap_O) + torch.where(published_O >= lowest_O, gap_O * torch.cos(gap_O), 0.0)
    return (
        torch.where(inside_O, torch.cos(angle_O), cos_O - drop_O),
        torch.where(inside_O, slope_O.clamp_min(0.0), 1.0),
        -torch.where(inside_O, torch.sin(angle_O), drop_slope_O / factor),
    )


def _clip_norms(norm_B: torch.Tensor) -> torch.Tensor:
    return norm_B.clamp(0.001, 100.0)


def _counted(value_B: torch.Tensor, row_weight_B: torch.Tensor) -> torch.Tensor:
    """The values of rows whose weight is not 0, in float64 on the CPU, so that all ranks compute the same bits."""
    return value_B[row_weight_B != 0].to("cpu", torch.float64)


def _statistic(start: float) -> torch.Tensor:
    return torch.tensor(start, dtype=torch.float64)
