"""Groups' TAR, FAR and flips against plain loops over all pairs of images."""

from __future__ import annotations

import numpy as np
import pytest

from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.mates import Flips
from lce_dist.evaluation.metrics import compare, far_key
from lce_dist.evaluation.slices import Slice, slices

FAR = 0.05


def model(name: str, seed: int, noise: float, num: int = 60) -> EmbeddingSet:
    labels = np.arange(num) % 12
    likes = np.random.default_rng(3).normal(size=(12, 8))[labels]
    rows = likes + noise * np.random.default_rng(seed).normal(size=likes.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet(name, rows.astype(np.float32), labels.astype(np.int64), np.arange(num) + 100)


def test_groups_are_those_of_a_loop_over_pairs() -> None:
    old, new, alone = model("old", 1, 0.9), model("new", 2, 0.6), model("independent", 4, 0.5)
    cells = {"old_old": (old, old), "new_old": (new, old), "independent_new": (alone, alone)}
    thresholds = {name: compare(*pair, [FAR]).threshold_at_far[far_key(FAR)] for name, pair in cells.items()}
    cover = np.random.default_rng(7).choice(["none", "mask", "hat"], 60)
    hue = np.where(old.labels_N < 4, "dark", "light")  # one value an identity
    found = slices(cells, thresholds, {"cover": cover, "hue": hue}, {"upgrade": ("old_old", "new_old")})
    assert [(one.column, one.value) for one in found] == [
        *(("cover", value) for value in ("hat", "mask", "none")),
        *(("hue", value) for value in ("dark", "light")),
    ]
    for one in found:
        value_N = cover if one.column == "cover" else hue
        rows = [row for row in range(60) if value_N[row] == one.value]
        assert one.num_images == len(rows)
        assert one.num_identities == len({int(old.labels_N[row]) for row in rows})
        pairs = [(i, j) for i in rows for j in range(60) if i != j and old.labels_N[i] == old.labels_N[j]]
        impostors = [(i, j) for i in rows for j in rows if old.labels_N[i] != old.labels_N[j]]
        accepted = {}
        for name, (query, gallery) in cells.items():
            score = query.vectors_ND.astype(np.float64) @ gallery.vectors_ND.astype(np.float64).T
            accepted[name] = score >= thresholds[name] - 2.0**-21
            assert one.tar[name] == pytest.approx(np.mean([accepted[name][pair] for pair in pairs]), abs=1e-12)
            assert one.far[name] == pytest.approx(np.mean([accepted[name][pair] for pair in impostors]), abs=1e-12)
        lost = sum(accepted["old_old"][pair] and not accepted["new_old"][pair] for pair in pairs)
        won = sum(not accepted["old_old"][pair] and accepted["new_old"][pair] for pair in pairs)
        assert one.flips["upgrade"] == Flips(lost, won, len(pairs)) and one.num_genuine == len(pairs)
        way = one.tar["independent_new"] - one.tar["old_old"]
        assert one.update_gain == pytest.approx((one.tar["new_old"] - one.tar["old_old"]) / way)
    assert any(one.flips["upgrade"].negative for one in found)


def test_a_group_of_one_person_has_no_false_accepts_and_one_of_single_images_is_left_out() -> None:
    old = model("old", 1, 0.9)
    value_N = np.where(old.labels_N == 3, "alone", "rest")
    value_N[0], value_N[12] = "once", "alone"
    single = EmbeddingSet("s", old.vectors_ND[:13], np.array([*range(12), 3]), old.sample_ids_N[:13])
    found = slices({"old_old": (single, single)}, {"old_old": 0.5}, {"who": value_N[:13]}, {})
    assert [(one.value, one.far["old_old"]) for one in found] == [("alone", None)]
    assert found[0].num_genuine == 2 and found[0].update_gain is None


def test_update_gain_by_hand() -> None:
    def of(old: float, new: float, paragon: float) -> float | None:
        tar = {"old_old": old, "new_old": new, "independent_new": paragon}
        return Slice("c", "v", 1, 1, 1, tar, {}, {}).update_gain

    assert of(0.5, 0.75, 1.0) == 0.5
    assert of(0.5, 0.25, 1.0) == -0.5
    assert of(0.5, 0.75, 0.5) is None
