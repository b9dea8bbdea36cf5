"""Pairs counted by several ranks are those that one counts."""

from __future__ import annotations

import numpy as np
import pytest

from lce_dist.evaluation import counting
from lce_dist.evaluation.counting import count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.world import World


def exact_rows(seed: int, num: int) -> EmbeddingSet:
    """Rows of +-1/8 in 64 dimensions: the order of a sum does not matter."""
    labels = np.arange(num) % 40
    likes = np.random.default_rng(5).choice([-1, 1], (40, 64))[labels]
    flip = np.random.default_rng(seed).random((num, 64)) < 0.25
    return EmbeddingSet("m", (np.where(flip, -likes, likes) / 8.0).astype(np.float32), labels, np.arange(num))


def counted(world: World, num: int, mirrored: bool, all_levels: bool) -> tuple[np.ndarray, np.ndarray, int, int, int]:
    counting.MOST_PAIRS_AT_ALL_LEVELS = 1 << 30 if all_levels else 0
    counting._SIDE = {"cpu": 50}
    counting._SAMPLE_PAIRS, counting._SAMPLE_ABOVE = 1 << 12, 50
    one = exact_rows(1, num)
    counts = count_pairs(one, one if mirrored else exact_rows(2, num), [0.01], world)
    return counts.genuine_L, counts.impostor_L, counts.num_ranked, counts.num_correct, counts.exact_from


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("num", "mirrored"), [(333, True), (333, False), (45, False)])
def test_every_rank_has_the_counts_of_all(run_distributed, size, num, mirrored):
    genuine_L, impostor_L, ranked, correct, _ = run_distributed(counted, 1, num, mirrored, True)[0]
    for answer in run_distributed(counted, size, num, mirrored, False):
        cut = answer[4]
        assert cut > 0
        np.testing.assert_array_equal(answer[0], genuine_L)
        np.testing.assert_array_equal(answer[1][cut:], impostor_L[cut:])
        assert answer[1].sum() == pytest.approx(impostor_L.sum())
        assert answer[2:4] == (ranked, correct)
