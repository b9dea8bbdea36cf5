"""Intervals of groups' gains against loops over pairs, and what they find and do not find."""

from __future__ import annotations

import numpy as np
import pytest

from lce_dist.evaluation.bootstrap import count_by_identity, resample
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.group_gains import Draw, group_gains
from lce_dist.evaluation.metrics import compare

FAR, SAMPLES = 0.05, 40
Cells = dict[str, tuple[EmbeddingSet, EmbeddingSet]]


def model(name: str, seed: int, noise: np.ndarray, per: int = 4) -> EmbeddingSet:
    labels = np.arange(len(noise)) // per
    likes = np.random.default_rng(3).normal(size=(len(noise), 8))[labels]
    rows = likes + noise[:, None] * np.random.default_rng(seed).normal(size=likes.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet(name, rows.astype(np.float32), labels.astype(np.int64), np.arange(len(noise)) + 100)


def two_models(num: int, hurt: np.ndarray | None = None) -> tuple[Cells, dict[str, float]]:
    noise = np.full(num, 0.8)
    old = model("old", 1, noise)
    new = model("new", 3, noise if hurt is None else noise * np.where(hurt, 1.8, 1.0))
    cells = {"old_old": (old, old), "new_old": (new, old)}
    return cells, {key: compare(*pair, [FAR]).threshold_at_far[repr(FAR)] for key, pair in cells.items()}


def slow(
    cells: Cells, value_N: np.ndarray, value: str, weight_BI: np.ndarray, level_B: dict[str, np.ndarray]
) -> np.ndarray:
    """The group's gain in every sample, by loops over genuine pairs."""
    score = {key: query.vectors_ND @ gallery.vectors_ND.T for key, (query, gallery) in cells.items()}
    label_N = cells["old_old"][0].labels_N
    pairs = [
        (i, j)
        for i in np.flatnonzero(value_N == value)
        for j in range(len(label_N))
        if i != j and label_N[i] == label_N[j]
    ]
    gains = []
    for sample, weight_I in enumerate(weight_BI):
        sums = {
            key: sum(weight_I[label_N[i]] * (score[key][i, j] * 2**20 >= level_B[key][sample] - 0.5) for i, j in pairs)
            for key in cells
        }
        gains.append((sums["new_old"] - sums["old_old"]) / sum(weight_I[label_N[i]] for i, _ in pairs))
    return np.array(gains)


@pytest.mark.parametrize("redrawn", [True, False])
def test_intervals_are_those_of_a_loop_over_pairs_and_samples(redrawn: bool) -> None:
    cells, thresholds = two_models(120)
    cover = np.random.default_rng(7).choice(["none", "mask"], 120, p=[0.6, 0.4])
    rare = np.where(np.arange(120) < 9 * 4, "few", "rest")  # of nine identities
    if redrawn:
        counts = {key: count_by_identity(*pair, FAR) for key, pair in cells.items()}
        resampled = resample(list(counts.values()), SAMPLES, 5)
        draw = Draw(resampled, counts, dict(zip(cells, resampled.chosen_CB, strict=True)))
        weight_BI = resampled.weight_BI
        level_B = {key: counts[key].threshold_K[draw.chosen_B[key]] for key in cells}
    else:
        draw = None
        weight_BI = np.random.default_rng(5).poisson(1.0, (SAMPLES, 30))
        level_B = {key: np.full(SAMPLES, round(thresholds[key] * 2**20)) for key in cells}
    found = group_gains(cells, thresholds, {"cover": cover, "rare": rare}, draw, SAMPLES, 5)
    assert list(found) == [("cover", "mask"), ("cover", "none"), ("rare", "rest")]
    at = {key: np.full(1, round(thresholds[key] * 2**20)) for key in cells}
    off, error = [], []
    for column, value in found:
        value_N = cover if column == "cover" else rare
        gain = slow(cells, value_N, value, np.ones((1, 30)), at)[0]
        assert found[column, value].value == pytest.approx(gain, abs=1e-12)
        off.append(slow(cells, value_N, value, weight_BI, level_B) - gain)
        members = len(np.unique(cells["old_old"][0].labels_N[value_N == value]))
        error.append(np.sqrt(np.mean(off[-1] ** 2) * members / (members - 1)))
    times = np.quantile(np.max(np.abs(off) / np.array(error)[:, None], axis=0), 0.95)
    for one, expected in zip(found.values(), error, strict=True):
        assert one.high - one.value == pytest.approx(times * expected, rel=1e-5)
        assert one.value - one.low == pytest.approx(times * expected, rel=1e-5)


def test_a_group_that_is_hurt_is_found_and_none_by_chance() -> None:
    num = 1200
    columns = {f"drawn {n}": np.random.default_rng(n).choice(["a", "b", "c"], num, p=[0.7, 0.2, 0.1]) for n in range(4)}
    hurt = columns["drawn 0"] == "c"
    for hit in (None, hurt):
        cells, thresholds = two_models(num, hit)
        found = group_gains(cells, thresholds, columns, None, 300, 1)
        assert len(found) == 12
        assert min(one.value for one in found.values()) < -0.005  # what the worst of twelve is by chance
        losing = [name for name, one in found.items() if one.high < 0.0]
        assert losing == ([] if hit is None else [("drawn 0", "c")])


def test_without_columns_nothing_is_said() -> None:
    cells, thresholds = two_models(40)
    assert group_gains(cells, thresholds, {}, None, 10, 1) == {}
