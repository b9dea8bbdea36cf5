"""Templates against numbers worked by hand and a loop over the published rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lce_dist.errors import DataError
from lce_dist.evaluation.templates import pool_templates


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_by_hand():
    rows = np.array([[3.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]], dtype=np.float32)
    # template 5: a photo (3, 0), and a video of (0, 1) and (0, 3), mean (0, 2); template 2: the last image
    found = pool_templates("m", rows, ints(0, 1, 3, 2), ints(5, 5, 2, 5), ints(1, 9, 9, 9))
    assert found.sample_ids_N.tolist() == found.labels_N.tolist() == [2, 5]
    np.testing.assert_allclose(found.vectors_ND, [[1, 0], [3 / math.sqrt(13), 2 / math.sqrt(13)]], atol=1e-7)
    # weights multiply vectors; the mean is by count: ((0, 1) * 0.5 + (0, 3) * 0.5) / 2 = (0, 1)
    weights = np.array([1.0, 0.5, 0.1, 0.5])
    found = pool_templates("m", rows, ints(0, 1, 3, 2), ints(5, 5, 2, 5), ints(1, 9, 9, 9), weights)
    np.testing.assert_allclose(found.vectors_ND, [[1, 0], [3 / math.sqrt(10), 1 / math.sqrt(10)]], atol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_as_a_loop(monkeypatch, weighted, block):
    monkeypatch.setattr("lce_dist.evaluation.templates._BLOCK_ROWS", block)
    rng = np.random.default_rng(block)
    rows = rng.normal(size=(40, 5)).astype(np.float32)
    row_R = rng.integers(0, 40, 90)  # an image may be in several templates
    template_R, media_R = rng.integers(0, 12, 90) * 3, rng.integers(0, 4, 90)
    weight_R = rng.random(90) if weighted else None
    truth = []
    for template in sorted(set(template_R.tolist())):
        total = [0.0] * 5
        for media in range(4):
            entries = [r for r in range(90) if template_R[r] == template and media_R[r] == media]
            for r in entries:
                weight = 1.0 if weight_R is None else float(weight_R[r])
                for d in range(5):
                    total[d] += weight * float(rows[row_R[r], d]) / len(entries)
        length = math.sqrt(sum(value * value for value in total))
        truth.append([value / length for value in total])
    found = pool_templates("m", rows, row_R, template_R, media_R, weight_R)
    assert found.sample_ids_N.tolist() == sorted(set(template_R.tolist()))
    np.testing.assert_allclose(found.vectors_ND, truth, atol=1e-6)


def test_weights_count_beside_each_other_whatever_their_size():
    rows = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    parts = ints(0, 1, 2, 3, 4, 5), ints(3, 3, 3, 8, 8, 8), ints(0, 0, 1, 0, 1, 2)
    weights = np.array([0.9, 0.2, 0.7, 0.4, 0.0, 0.8])
    truth = pool_templates("m", rows, *parts, weights).vectors_ND
    for power in (-600, -40, 600, 1020):
        found = pool_templates("m", rows, *parts, np.ldexp(weights, power)).vectors_ND
        np.testing.assert_array_equal(found, truth)


def test_a_template_that_adds_up_to_nothing_is_refused():
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32)
    with pytest.raises(DataError, match=r"the template of line 2 .* adds up to nothing \(1 such"):
        pool_templates("m", rows, ints(0, 0, 1), ints(1, 7, 7), ints(0, 0, 1))
    with pytest.raises(DataError, match="line 41"):
        pool_templates("m", rows, ints(0), ints(1), ints(0), np.zeros(1), ints(41))
