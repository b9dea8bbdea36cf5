"""Sums of pairs that are cut over ranks are those of one rank, whatever the cut."""

from __future__ import annotations

import pytest
import torch

from lce_dist.compat.closed_form import PairSums, least_squares
from lce_dist.world import World


def sums_of_part(world: World, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    # uneven: the first rank has most rows, the last may have none
    bounds = [*[0, 23, 31, 31][: world.size], 31]
    low, high = bounds[world.rank], bounds[world.rank + 1]
    batches = ((x[at : min(at + 5, high)], y[at : min(at + 5, high)]) for at in range(low, high, 5))
    sums = PairSums.over(batches, x.shape[1], y.shape[1], world)
    return sums.xx_DD, sums.xy_DE, sums.count


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_has_the_sums_of_all(run_distributed, size):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(31, 4, generator=draw), torch.randn(31, 3, generator=draw)
    for xx, xy, count in run_distributed(sums_of_part, size, x, y):
        assert count == 31
        torch.testing.assert_close(xx, x.double().T @ x.double())
        torch.testing.assert_close(xy, x.double().T @ y.double())
        torch.testing.assert_close(least_squares(PairSums(xx, xy, count), 0.1), least_squares(PairSums.of(x, y), 0.1))
