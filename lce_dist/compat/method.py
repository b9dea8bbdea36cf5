"""What a method of compatibility is: what it needs of the old model, what it adds to a step, what it leaves behind.

A method is a module, so that its own parameters (maps, discriminators) are trained, sharded and stored with the
network. Its terms are differentiated on every rank: what a rank computes is its part of one global loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from lce_dist.config import Manner
from lce_dist.head.layer import ShardedHead
from lce_dist.head.softmax import Anchor
from lce_dist.world import World

BOUNDARY_KEYS = frozenset({"boundary_policy", "boundary_percentile", "slack_rad", "single_image"})


@dataclass(frozen=True)
class Card:
    """What a person reads before choosing: ``cost`` says in words what n identities and m images cost, and where.

    needs: ``centres`` (old space by class), ``batch`` (old vectors of the images in the batch), ``all`` (old
    vectors of all training images, before training). keys: of ``[compat]`` that it reads, beside those of every run.
    """

    title: str
    source: str
    needs: frozenset[Literal["centres", "batch", "all"]]
    manners: frozenset[Manner]
    cost: str
    keys: frozenset[str] = frozenset({"method_weight"})


@dataclass(frozen=True)
class MethodBatch:
    """One micro-batch: b rows of this rank, G of all ranks in rank order; vectors are unit rows.

    new_bD and new_GD carry gradients; the gradient of new_GD is summed over ranks. old_bE are the old model's vectors of
    the same images, given when ``uses_old_vectors``; old_GE those of all ranks, when ``Card.needs`` has "batch". weight_G: each row's share of the
    global mean. own: this rank's rows among G. head: for the class rows of this shard; they get no gradient here.
    """

    new_bD: torch.Tensor
    new_GD: torch.Tensor
    old_bE: torch.Tensor | None
    old_GE: torch.Tensor | None
    labels_G: torch.Tensor
    weight_G: torch.Tensor
    own: slice
    rows_per_rank: tuple[int, ...]
    sample_ids_b: torch.Tensor
    step: int
    world: World
    head: ShardedHead


@dataclass(frozen=True)
class RowTerms:
    """A global loss (as ``Method.loss``) on some class rows of this shard.

    local_N: unique local numbers of active classes. weight_ND: those rows, a leaf whose gradient is added to theirs.
    """

    loss: torch.Tensor
    local_N: torch.Tensor
    weight_ND: torch.Tensor


class Method(nn.Module):
    """Base: adds nothing. Subclasses state ``card`` and override what they use."""

    card: ClassVar[Card]

    @property
    def uses_old_vectors(self) -> bool:
        """Whether a step needs the old model's vectors of its images."""
        return "batch" in self.card.needs

    def anchor(self) -> Anchor | None:
        """Terms that the head computes in its own passes (see head/softmax.py); None for none."""
        return None

    def head_input(
        self, new_bD: torch.Tensor, old_bE: torch.Tensor | None, sample_ids_b: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The unit rows (b, D) that the classification sees in place of ``new_bD``."""
        return new_bD

    def row_terms(self, head: ShardedHead, step: int) -> RowTerms | None:
        """A loss on class rows; called once a step, after ``head.begin_step``."""
        return None

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        """The global loss (the same value on every rank) whose backward leaves this rank's part of the gradient.

        ``sum_over_ranks(local)`` of a term over this rank's rows, or over this shard's classes, is such a loss.
        """
        return None

    def maps(self) -> dict[Literal["new_to_old", "old_to_new"], nn.Module]:
        """The maps that deployment needs beside the network: {} in the direct manner."""
        return {}
