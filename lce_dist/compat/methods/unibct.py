"""UniBCT: new vectors are classified by old prototypes that a graph over each class's old vectors has refined.

A walk over the images of a class, drawn to similar ones, stays longest where most of the class is; an image's share of
its time is its share of the prototype, so mislabelled and odd images count for less than in a mean. With P the softmax
over an image's cosines to the others / T (itself left out, rows sum to one) and n images, the shares are
a = (1 - L) / n * (I - L P^T)^-1 1, the prototype normalise(sum_i a_i old_i).
**Source**: Zhang et al., "Towards Universal Backward-Compatible Representation Learning", IJCAI 2022 (arXiv 2203.01583),
whose full text could not be read; the diffusion as re-run in github.com/yuleung/MixBCT. Differences: edges from the old
model's vectors, once before training (there: the new model's, after epochs 10 and 20, without this term before epoch
10); rows of P sum to one (there columns do, and the mean of the refined vectors is then exactly the plain mean).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lce_dist.collectives import all_reduce_max, gather_rows
from lce_dist.compat.frozen_rows import frozen_rows, softmax_over_frozen, steady_margin
from lce_dist.compat.method import Card, Method, MethodBatch
from lce_dist.compat.old_space import OldSpace
from lce_dist.embedding import EmbeddedRows
from lce_dist.head import margins
from lce_dist.world import World

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs

_BUDGET_BYTES = 2 << 30  # of old vectors that one rank holds at a time; more classes take more passes
_SOLVED_AT_ONCE = 2048  # images of a class: a system of 32 MiB; larger classes are iterated
_CELLS = 1 << 24  # of P at a time, 128 MiB, when iterated
_CHANGE = 1e-12  # of the shares' sum of 1: where iteration stops; it shrinks by L = 0.9 a round at least


class UniBct(Method):
    """Margin softmax of new vectors over ``prototype_SE``, frozen; the head's scale and margin."""

    WEIGHT = 1.0  # the re-run's, from epoch 10 on
    DAMPING = 0.9  # the re-run's lamb
    TEMPERATURE = 0.05  # the re-run's temper

    card = Card(
        "UniBCT: new vectors also classified by old prototypes, refined by graph diffusion",
        "Zhang et al., Towards Universal Backward-Compatible Representation Learning, IJCAI 2022, arXiv 2203.01583",
        frozenset({"centres", "all"}),
        frozenset({"direct"}),
        "n identities: prototypes, 4 n E bytes over all ranks, and a second softmax over n classes in each step, which "
        "doubles the head's arithmetic. m images, before training: a pass over them a 2 GiB of old vectors (4 m E bytes) "
        "a rank, and (images of a class)^3 operations a class",
    )

    def __init__(self, prototype_SE: torch.Tensor, space: OldSpace, margin: margins.Margin, weight: float) -> None:
        super().__init__()
        self._rows = frozen_rows(prototype_SE, space)
        self._margin = margin
        self._weight = weight

    @classmethod
    def build(cls, inputs: MethodInputs) -> UniBct:
        """Prototypes from passes over all old vectors."""
        assert inputs.old_vectors is not None, "needs all old vectors"
        prototype_SE = refined_prototypes(
            inputs.old_vectors, inputs.space, cls.DAMPING, cls.TEMPERATURE, inputs.world, _BUDGET_BYTES
        )
        weight = inputs.config.method_weight
        return cls(prototype_SE, inputs.space, steady_margin(inputs.head), cls.WEIGHT if weight is None else weight)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        if self._weight == 0.0 or batch.new_GD.shape[0] == 0:
            return None
        return self._weight * softmax_over_frozen(
            batch.new_GD, batch.labels_G, batch.weight_G, self._rows, self._margin, batch.head, batch.world
        )


def refined_prototypes(
    rounds: Callable[[], Iterable[EmbeddedRows]],
    space: OldSpace,
    damping: float,
    temperature: float,
    world: World,
    budget_bytes: int,
) -> torch.Tensor:
    """(S, E) float32 unit prototypes of this shard, the same on any number of ranks.

    **Memory**: ``budget_bytes``, or one class where that is more. **Collectives**: each pass gathers all old vectors.
    """
    windows = _windows(space.count_S.cpu(), 4 * space.centre_SD.shape[1], budget_bytes)
    num_passes = int(all_reduce_max(torch.tensor([float(len(windows))], device=world.device), world))
    prototype_SE = torch.zeros(space.centre_SD.shape, dtype=torch.float32)
    for number in range(num_passes):  # every rank reads in every pass
        low, high = windows[number] if number < len(windows) else (0, 0)
        vector_OE, local_O, id_O = _window_rows(rounds, space.first_class, low, high, world)
        # the order of a class's images, and so every sum, is the same whoever read them
        order_O = torch.argsort(id_O)
        order_O = order_O[torch.argsort(local_O[order_O], stable=True)]
        vector_OE, local_O = vector_OE[order_O], local_O[order_O]
        ends = torch.searchsorted(local_O, torch.arange(low, high + 1)).tolist()
        for place, local in enumerate(range(low, high)):
            member_NE = vector_OE[ends[place] : ends[place + 1]].double()
            share_N = diffusion_shares(member_NE, damping, temperature)
            prototype_SE[local] = F.normalize(share_N @ member_NE, dim=0).float()
    return prototype_SE.to(space.centre_SD.device)


def diffusion_shares(unit_NE: torch.Tensor, damping: float, temperature: float) -> torch.Tensor:
    """(N,) shares, sum 1, of a class's images in its prototype; unit_NE is float64.

    **Memory**: 3 matrices of N^2 float64 up to N = 2048, else bounded, for N^2 E operations in each round.
    """
    num = unit_NE.shape[0]
    if num < 3:  # one image, or two that point at each other
        return unit_NE.new_full((num,), 1.0 / max(num, 1))
    start_N = unit_NE.new_full((num,), 1.0 / num)
    if num <= _SOLVED_AT_ONCE:
        system_NN = torch.eye(num, dtype=unit_NE.dtype) - damping * _transition(unit_NE, 0, num, temperature).T
        share_N: torch.Tensor = torch.linalg.solve(system_NN, (1.0 - damping) * start_N)
        return share_N
    return iterated_shares(unit_NE, damping, temperature, max(1, _CELLS // num))


def iterated_shares(unit_NE: torch.Tensor, damping: float, temperature: float, block: int) -> torch.Tensor:
    """``diffusion_shares`` round by round, with ``block`` rows of P at a time."""
    num = unit_NE.shape[0]
    share_N = unit_NE.new_full((num,), 1.0 / num)
    while True:
        next_N = unit_NE.new_full((num,), (1.0 - damping) / num)
        for low in range(0, num, block):
            high = min(low + block, num)
            next_N += damping * (share_N[low:high] @ _transition(unit_NE, low, high, temperature))
        change = float((next_N - share_N).abs().sum())
        share_N = next_N
        if change < _CHANGE:
            return share_N


def _transition(unit_NE: torch.Tensor, low: int, high: int, temperature: float) -> torch.Tensor:
    """Rows [low, high) of P."""
    cos_KN = unit_NE[low:high] @ unit_NE.T
    own_K = torch.arange(high - low)
    cos_KN[own_K, own_K + low] = -torch.inf
    return torch.softmax(cos_KN / temperature, dim=1)


def _windows(count_S: torch.Tensor, bytes_per_image: int, budget_bytes: int) -> list[tuple[int, int]]:
    """Runs of local classes whose old vectors fit the budget; a class that does not fit is alone."""
    windows, low, used = [], 0, 0
    for local, count in enumerate(count_S.tolist()):
        size = count * bytes_per_image
        if local > low and used + size > budget_bytes:
            windows.append((low, local))
            low, used = local, 0
        used += size
    return [*windows, (low, len(count_S))] if low < len(count_S) else windows


def _window_rows(
    rounds: Callable[[], Iterable[EmbeddedRows]], first: int, low: int, high: int, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All images of local classes [low, high), on the CPU: vectors, local labels, sample ids."""
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for rows in rounds():
        unit_GE = gather_rows(rows.unit_bD, rows.rows_per_rank, world)
        local_G = gather_rows(rows.labels_b, rows.rows_per_rank, world) - first
        id_G = gather_rows(rows.sample_ids_b.to(rows.labels_b.device), rows.rows_per_rank, world)
        wanted = (local_G >= low) & (local_G < high)
        parts.append((unit_GE[wanted].cpu(), local_G[wanted].cpu(), id_G[wanted].cpu()))
    vectors, labels, ids = zip(*parts, strict=True)
    return torch.cat(vectors), torch.cat(labels), torch.cat(ids)
