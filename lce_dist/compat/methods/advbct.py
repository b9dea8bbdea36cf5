"""AdvBCT: a discriminator tells new vectors from old ones and the network is trained to fool it; elastic boundaries.

Adversarial: -mean log D(new | new) - mean log D(old | old), times the share of the run that is left; its gradient is
reversed (times alpha, which grows with the share that is done) where it enters new vectors. Boundary: how far |new - old centre| exceeds r_y = R_y + (T - R_y) sigmoid(w_y), averaged over the rows where it
does; R_y the chord to the class's old boundary, w_y learned. Both times the weight.
**Source**: Pan et al., "Boundary-aware Backward-Compatible Representation via Adversarial Learning in Image Retrieval",
CVPR 2023 (arXiv 2305.02610), and its code, github.com/Ashespt/AdvBCT (models/base_model.py, trainer/trainer.py).
Differences: unit vectors and unit centres throughout; the term fades out step by step (there epoch by epoch); batch
statistics of the discriminator are those of the whole global micro-batch; the paper's 1.5 IQR radii are
``boundary_policy = "iqr"``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.collectives import all_reduce_sum, sum_over_ranks
from lce_dist.compat.method import Card, Method, MethodBatch
from lce_dist.compat.old_space import OldSpace

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs


class AdvBct(Method):
    """``elastic``: w of every class, on every rank."""

    WEIGHT = 4.0  # on MS1Mv3 with ArcFace (github.com/yuleung/MixBCT, AdvBCT/train.py); 1 on landmarks (the authors)
    RADIUS = 0.4  # T, a chord between unit vectors, on MS1Mv3 (same place); 1 on landmarks (the authors)
    HIDDEN = 100  # the authors' discriminator

    card = Card(
        "AdvBCT: new vectors indistinguishable from old ones, inside elastic boundaries",
        "Pan et al., Boundary-aware Backward-Compatible Representation via Adversarial Learning in Image Retrieval, "
        "CVPR 2023, arXiv 2305.02610",
        frozenset({"centres", "batch"}),
        frozenset({"direct"}),
        "n identities: old centres, 4 n E bytes over all ranks; one learned radius a class, with gradient and momentum 12 n "
        "bytes on every rank, and an all-reduce of 4 n bytes a step. m images: the old model on the batch in each step, "
        "and 100 E multiplications for every row of the global batch on each rank",
    )

    def __init__(self, space: OldSpace, dim: int, weight: float, seed: int, steps: int) -> None:
        super().__init__()
        self._space = space
        self._steps = steps
        self._weight = weight
        generator = torch.Generator().manual_seed(seed)
        self.elastic = nn.Parameter(torch.rand(space.num_classes, generator=generator) * 2.0 - 1.0)
        self.enter = _linear(dim, self.HIDDEN, generator)
        self.gain = nn.Parameter(torch.ones(self.HIDDEN))
        self.shift = nn.Parameter(torch.zeros(self.HIDDEN))
        self.leave = _linear(self.HIDDEN, 2, generator)

    @classmethod
    def build(cls, inputs: MethodInputs) -> AdvBct:
        """The same parameters on every rank."""
        weight = inputs.config.method_weight
        weight = cls.WEIGHT if weight is None else weight
        return cls(inputs.space, inputs.new_dim, weight, inputs.seed, inputs.steps)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        if self._weight == 0.0 or batch.new_GD.shape[0] == 0:
            return None
        return self._weight * (self.adversarial(batch) + self.boundary(batch))

    def adversarial(self, batch: MethodBatch) -> torch.Tensor:
        """The discriminator's loss; batch statistics need all rows, so each rank computes all and counts its own."""
        assert batch.old_GE is not None
        own, weight_b = batch.own, batch.weight_G[batch.own]
        done = batch.step / self._steps
        from_new_b = self.discriminate(_Reverse.apply(batch.new_GD, alpha_of(done)))[own, 0]
        from_old_b = self.discriminate(batch.old_GE)[own, 1]
        return (1.0 - done) * sum_over_ranks(-((from_new_b + from_old_b) * weight_b).sum(), batch.world)

    def boundary(self, batch: MethodBatch) -> torch.Tensor:
        """The mean excess over rows outside, times the micro-batch's share of the global batch; 0 when none is."""
        space = self._space
        local_G = batch.labels_G - space.first_class
        owned_O = torch.nonzero((local_G >= 0) & (local_G < space.cos_boundary_S.shape[0])).squeeze(1)
        target_O, new_OD = local_G[owned_O], batch.new_GD[owned_O]
        bound_O = space.cos_boundary_S[target_O].to(new_OD.dtype)
        chord_O = (2.0 - 2.0 * bound_O).clamp_min(0.0).sqrt()
        radius_O = chord_O + (self.RADIUS - chord_O) * torch.sigmoid(self.elastic[batch.labels_G[owned_O]])
        excess_O = torch.linalg.vector_norm(new_OD - space.centre_SD[target_O].to(new_OD.dtype), dim=1) - radius_O
        outside_O = (excess_O > 0.0) & (bound_O > -1.0)  # -1: a class without a boundary
        weight_O = torch.where(outside_O, batch.weight_G[owned_O], 0.0)
        count = all_reduce_sum(weight_O.sum(), batch.world)
        share = batch.weight_G.sum() / count.clamp_min(torch.finfo(count.dtype).tiny)
        local = (torch.where(outside_O, excess_O, 0.0) * weight_O).sum()
        return sum_over_ranks(local * share, batch.world)

    def discriminate(self, unit_GD: torch.Tensor) -> torch.Tensor:
        """(G, 2) log-probabilities of being new and of being old."""
        hidden_GH = self.enter(unit_GD)
        centred_GH = hidden_GH - hidden_GH.mean(0)
        normal_GH = centred_GH * torch.rsqrt(centred_GH.square().mean(0) + 1e-5)
        return F.log_softmax(self.leave(F.relu(normal_GH * self.gain + self.shift)), dim=1)


def alpha_of(done: float) -> float:
    """The reversal's strength when a share ``done`` of the run is: 2 / (1 + exp(-10 done)) - 1, the authors'."""
    return math.tanh(5.0 * done)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, alpha: float) -> torch.Tensor:
        ctx.alpha = alpha
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.alpha * grads[0], None


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """PyTorch's own initial values, U(+-1 / sqrt(inputs)), from ``generator``."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2.0 - 1.0) / math.sqrt(inputs))
    return layer
