"""MixBCT: a share of the batch reaches the classifier as old vectors, so one softmax ties both spaces.

A row is replaced by the old vector of the same image with probability share / trusted, if its old vector is trusted:
among the ceil(0.9 n) of its class's n images that lie nearest to the class's old centre. No further loss.
**Source**: Liang et al., "MixBCT: Towards Self-Adapting Backward-Compatible Training", 2023 (arXiv 2308.06948), and its
code, github.com/yuleung/MixBCT (train.py; tools/denoising/denoise_credible.py). Differences: rows are drawn one by one
(there exactly 30 % of each rank's rows), so that any cut over ranks mixes the same rows; distances are taken between
unit vectors (the code scales each column over the data set to unit length first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from lce_dist.collectives import all_reduce_sum, gather_rows
from lce_dist.compat.method import Card, Method
from lce_dist.compat.old_space import OldSpace
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import ConfigError
from lce_dist.head.sampling import _GOLDEN, _mix, _shift, _signed
from lce_dist.world import World

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs

_STREAM = 0x6D6978  # keeps the draws of images apart from the head's draws of classes


class MixBct(Method):
    """``distrusted``: rising sample ids whose old vectors are never used; ``trusted``: the share of the others."""

    WEIGHT = 0.3  # the paper's alpha, the share of rows; ``method_weight`` replaces it
    TRUST = 0.9  # the paper's T

    card = Card(
        "MixBCT: 30 % of the batch classified as old vectors",
        "Liang et al., MixBCT: Towards Self-Adapting Backward-Compatible Training, 2023, arXiv 2308.06948",
        frozenset({"centres", "batch", "all"}),
        frozenset({"direct"}),
        "n identities: old centres, 4 n E bytes over all ranks, before training. m images: the old model on the batch in each step; before training one pass over all old "
        "vectors, 48 m bytes over all ranks during it (sorting included), 0.8 m bytes on each rank after it",
    )

    def __init__(self, distrusted: torch.Tensor, trusted: float, share: float, seed: int) -> None:
        super().__init__()
        self._distrusted = distrusted
        self._rate = share / trusted
        self._seed = seed

    @classmethod
    def build(cls, inputs: MethodInputs) -> MixBct:
        """One pass over all old vectors. Errors: ConfigError for a share of more than is trusted."""
        assert inputs.old_vectors is not None, "needs all old vectors"
        distrusted, trusted = find_distrusted(inputs.old_vectors, inputs.space, cls.TRUST, inputs.world)
        share = inputs.config.method_weight
        share = cls.WEIGHT if share is None else share
        if share > trusted:
            raise ConfigError(
                f"compat.method_weight is {share}; for mixbct it is the share of rows that are replaced, at most the "
                f"share of trusted old vectors ({trusted:.3f}). Use {cls.WEIGHT}"
            )
        return cls(distrusted, trusted, share, inputs.seed)

    def head_input(
        self, new_bD: torch.Tensor, old_bE: torch.Tensor | None, sample_ids_b: torch.Tensor, step: int
    ) -> torch.Tensor:
        assert old_bE is not None
        replaced_b = self.replaced(sample_ids_b, step).to(new_bD.device)
        return torch.where(replaced_b[:, None], old_bE.to(new_bD.dtype), new_bD)

    def replaced(self, sample_ids_b: torch.Tensor, step: int) -> torch.Tensor:
        """Which rows (b,) are replaced in ``step``: a function of (seed, step, sample id) alone."""
        id_b = sample_ids_b.cpu()
        drawn_b = image_bits(self._seed, step, id_b).double() * 2.0**-53 < self._rate
        if self._distrusted.numel() == 0:
            return drawn_b
        place_b = torch.searchsorted(self._distrusted, id_b).clamp_max(self._distrusted.numel() - 1)
        return drawn_b & (self._distrusted[place_b] != id_b)


def find_distrusted(
    rounds: Callable[[], Iterable[EmbeddedRows]], space: OldSpace, trust: float, world: World
) -> tuple[torch.Tensor, float]:
    """All sample ids, rising, beyond the ceil(trust * n) images nearest to their class's centre; the share of the rest.

    Of two images equally near, the smaller id is trusted. The same on every rank and on any number of them.
    **Collectives**: each round gathers W * b * E floats; at the end (1 - trust) m ids.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    num_local = space.count_S.shape[0]
    for rows in rounds():
        unit_GE = gather_rows(rows.unit_bD, rows.rows_per_rank, world)
        local_G = gather_rows(rows.labels_b, rows.rows_per_rank, world) - space.first_class
        id_G = gather_rows(rows.sample_ids_b.to(rows.labels_b.device), rows.rows_per_rank, world)
        owned = (local_G >= 0) & (local_G < num_local)
        local_O = local_G[owned]
        cos_O = (unit_GE[owned].double() * space.centre_SD[local_O].double()).sum(1)
        parts.append((local_O.cpu(), id_G[owned].cpu(), cos_O.cpu()))
    local_O, id_O, cos_O = (torch.cat(column) for column in zip(*parts, strict=True))
    order_O = torch.argsort(id_O)
    for key_O in (-cos_O, local_O):  # the last key sorts first
        order_O = order_O[torch.argsort(key_O[order_O], stable=True)]
    local_O, id_O = local_O[order_O], id_O[order_O]
    count_S = torch.bincount(local_O, minlength=num_local)
    rank_O = torch.arange(local_O.shape[0]) - (count_S.cumsum(0) - count_S)[local_O]
    far_N = id_O[rank_O >= (trust * count_S.double()).ceil().long()[local_O]]

    sizes = torch.zeros(world.size + 1, dtype=torch.float64, device=world.device)
    sizes[world.rank], sizes[-1] = far_N.shape[0], id_O.shape[0]
    all_reduce_sum(sizes, world)
    numbers = [int(size) for size in sizes.tolist()]
    if sum(numbers[:-1]) > 0:
        far_N = gather_rows(far_N.to(world.device), tuple(numbers[:-1]), world).cpu()
    return far_N.sort().values, 1.0 - far_N.shape[0] / max(numbers[-1], 1)


def image_bits(seed: int, step: int, id_b: torch.Tensor) -> torch.Tensor:
    """53 random bits (int64) for each sample id: a function of (seed, step, id)."""
    key = int(_mix(_mix(torch.tensor([_signed(seed ^ (_STREAM << 32))])) + step))
    return _shift(_mix(id_b * _signed(_GOLDEN) + key), 11)
