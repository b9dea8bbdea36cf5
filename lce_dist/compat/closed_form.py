"""Closed forms of a map between two spaces, from sums over pairs that are streamed, and cut over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lce_dist.collectives import all_reduce_sum
from lce_dist.errors import RunError
from lce_dist.world import World

_BLOCK_ROWS = 1 << 15  # rows that are in float64 at a time


@dataclass(frozen=True)
class PairSums:
    """X^T X (D, D), X^T Y (D, E) and the number of pairs, in float64; sums of parts add up."""

    xx_DD: torch.Tensor
    xy_DE: torch.Tensor
    count: int

    @classmethod
    def of(cls, x_ND: torch.Tensor, y_NE: torch.Tensor) -> PairSums:
        """Of paired rows; a block of them is in float64 at a time."""
        blocks = zip(x_ND.split(_BLOCK_ROWS), y_NE.split(_BLOCK_ROWS), strict=True)
        return cls.over(blocks, x_ND.shape[1], y_NE.shape[1], World(device=x_ND.device))

    @classmethod
    def over(
        cls, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], dim_in: int, dim_out: int, world: World
    ) -> PairSums:
        """Of all ranks' batches of paired rows ((b, D), (b, E)); the same sums on every rank.

        **Collectives**: one all-reduce of D * (D + E) + 1 doubles, after the last batch. **Memory**: that much.
        """
        count, square = 1, dim_in * dim_in
        flat = torch.zeros(count + square + dim_in * dim_out, dtype=torch.float64, device=world.device)
        xx_DD = flat[count : count + square].view(dim_in, dim_in)
        xy_DE = flat[count + square :].view(dim_in, dim_out)
        for x_bD, y_bE in batches:
            x, y = x_bD.double(), y_bE.double()
            xx_DD.addmm_(x.T, x)
            xy_DE.addmm_(x.T, y)
            flat[0] += x.shape[0]
        all_reduce_sum(flat, world)
        return cls(xx_DD.cpu(), xy_DE.cpu(), int(flat[0]))

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(self.xx_DD + other.xx_DD, self.xy_DE + other.xy_DE, self.count + other.count)


def procrustes(sums: PairSums) -> torch.Tensor:
    """The (E, D) matrix with orthonormal rows or columns for which y and the mapped x have the largest inner products.

    With D <= E it is also the one that brings x closest to y; with D > E, where lengths change, not in general.
    Errors: RunError without pairs. **Source**: Schönemann, "A generalized solution of the orthogonal Procrustes
    problem", Psychometrika 1966.
    """
    _check(sums)
    left, _, right = torch.linalg.svd(sums.xy_DE.T, full_matrices=False)
    return left @ right


def least_squares(sums: PairSums, ridge: float) -> torch.Tensor:
    """The (E, D) matrix of least squared error, with ``ridge`` times the mean of X^T X's diagonal added to it.

    With the centres of the images' identities for y it finds what of x tells identities apart, and drops the rest.
    Errors: RunError without pairs, or where X^T X has no inverse (ridge 0, fewer than D independent rows).
    """
    _check(sums)
    dim = sums.xx_DD.shape[0]
    added = ridge * sums.xx_DD.diagonal().mean()
    try:
        return torch.linalg.solve(sums.xx_DD + added * torch.eye(dim, dtype=torch.float64), sums.xy_DE).T
    except torch.linalg.LinAlgError:
        raise RunError(
            f"{sums.count} pairs do not span {dim} dimensions; least squares without a ridge needs that. Give a ridge"
        ) from None


def class_centres(rows_ND: torch.Tensor, place_N: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(C, D) unit means of the rows of each class; ``place_N`` numbers them. **Memory**: 12 * C * D bytes."""
    sums_CD = torch.zeros(num_classes, rows_ND.shape[1], dtype=torch.float64)
    for rows, place in zip(rows_ND.split(_BLOCK_ROWS), place_N.split(_BLOCK_ROWS), strict=True):
        sums_CD.index_add_(0, place, rows.double())
    return torch.nn.functional.normalize(sums_CD).to(rows_ND.dtype)


def _check(sums: PairSums) -> None:
    if sums.count == 0 or not torch.isfinite(sums.xy_DE).all() or not torch.isfinite(sums.xx_DD).all():
        raise RunError(f"{sums.count} pairs with finite vectors are given; a map between spaces needs at least 1")
