"""Closed forms of a map between two spaces, from sums over pairs that may be streamed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lce_dist.errors import RunError


@dataclass(frozen=True)
class PairSums:
    """X^T X (D, D), X^T Y (D, E) and the number of pairs, in float64; sums of parts add up."""

    xx_DD: torch.Tensor
    xy_DE: torch.Tensor
    count: int

    @classmethod
    def of(cls, x_ND: torch.Tensor, y_NE: torch.Tensor) -> PairSums:
        """Of paired unit rows."""
        x, y = x_ND.double(), y_NE.double()
        return cls(x.T @ x, x.T @ y, x.shape[0])

    def __add__(self, other: PairSums) -> PairSums:
        return PairSums(self.xx_DD + other.xx_DD, self.xy_DE + other.xy_DE, self.count + other.count)


def procrustes(sums: PairSums) -> torch.Tensor:
    """The (E, D) matrix with orthonormal rows or columns that brings x closest to y.

    **Source**: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """
    _check(sums)
    left, _, right = torch.linalg.svd(sums.xy_DE.T, full_matrices=False)
    return left @ right


def least_squares(sums: PairSums, ridge: float) -> torch.Tensor:
    """The (E, D) matrix of least squared error, with ``ridge`` times the mean of X^T X's diagonal added to it."""
    _check(sums)
    dim = sums.xx_DD.shape[0]
    added = ridge * sums.xx_DD.diagonal().mean()
    return torch.linalg.solve(sums.xx_DD + added * torch.eye(dim, dtype=torch.float64), sums.xy_DE).T


def _check(sums: PairSums) -> None:
    if sums.count == 0 or not torch.isfinite(sums.xy_DE).all() or not torch.isfinite(sums.xx_DD).all():
        raise RunError(f"{sums.count} pairs with finite vectors are given; a map between spaces needs at least 1")
