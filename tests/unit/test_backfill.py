"""Backfill curves against galleries that are really mixed, and orders worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lce_dist.errors import RunError
from lce_dist.evaluation import backfill as module
from lce_dist.evaluation.backfill import ORDERS, backfill, backfill_order
from lce_dist.evaluation.embeddings import EmbeddingSet, whole_identities
from lce_dist.evaluation.metrics import compare, far_key


def model(name: str, seed: int, noise: float, num: int = 240, first_id: int = 0) -> EmbeddingSet:
    labels = np.arange(num) % 30
    likes = np.random.default_rng(3).normal(size=(30, 16))[labels]
    rows = likes + noise * np.random.default_rng(seed).normal(size=likes.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet(name, rows.astype(np.float32), labels.astype(np.int64), np.arange(num) + first_id)


def test_every_point_is_the_tar_of_a_gallery_that_was_mixed() -> None:
    old, new = model("old", 1, 0.9), model("new", 2, 0.4)
    curves = backfill((new, old), (new, new), old, 0.01, seed=5)
    assert curves.share_K.tolist() == pytest.approx([0.1 * k for k in range(11)])
    for order in ORDERS:
        parts = np.array_split(backfill_order(old, order, seed=5), 10)
        for done in range(11):
            mixed = old.vectors_ND.copy()
            for rows in parts[:done]:
                mixed[rows] = new.vectors_ND[rows]
            gallery = EmbeddingSet("mixed", mixed, old.labels_N, old.sample_ids_N)
            assert curves.tar_K[order][done] == compare(new, gallery, [0.01]).tar_at_far[far_key(0.01)], (order, done)
        assert curves.tar_K[order][10] > curves.tar_K[order][0]
        points = curves.tar_K[order]
        assert curves.area(order) == pytest.approx(sum((points[k] + points[k + 1]) / 20 for k in range(10)))


def test_through_a_map_old_images_are_met_by_mapped_queries() -> None:
    new, old = model("new", 2, 0.4), model("old", 1, 0.9)
    turned = EmbeddingSet("old", -old.vectors_ND, old.labels_N, old.sample_ids_N)  # another space
    mapped = EmbeddingSet("new mapped", -new.vectors_ND, new.labels_N, new.sample_ids_N)
    curves = backfill((mapped, turned), (new, new), turned, 0.01)
    plain = backfill((new, old), (new, new), old, 0.01)
    for order in ORDERS:
        np.testing.assert_array_equal(curves.tar_K[order], plain.tar_K[order])


def test_of_many_images_some_queries_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = model("old", 1, 0.9), model("new", 2, 0.4)
    monkeypatch.setattr(module, "MOST_PAIRS_AT_ALL_LEVELS", 240 * 60)
    some, every = backfill((new, old), (new, new), old, 0.01), compare(new, old, [0.01]).tar_at_far["0.01"]
    assert some.tar_K["random"][0] != every
    assert some.tar_K["random"][0] == pytest.approx(every, abs=0.15)


def test_of_a_large_gallery_whole_identities_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = model("old", 1, 0.9), model("new", 2, 0.4)
    every = backfill((new, old), (new, new), old, 0.01, seed=2)
    monkeypatch.setattr(module, "_MOST_GALLERY", 96)  # of 240: 12 identities of 8
    some = backfill((new, old), (new, new), old, 0.01, seed=2)
    kept = whole_identities(old, 96, 2)
    assert len(kept) == 96 and len(np.unique(old.labels_N[kept])) == 12
    part = [backfill_order(old, "farthest_from_centre_first", seed=2)]
    part = [row for row in part[0] if row in set(kept.tolist())]
    mixed = old.vectors_ND.copy()
    for rows in np.array_split(np.array(part), 10)[:3]:
        mixed[rows] = new.vectors_ND[rows]
    gallery = EmbeddingSet("mixed", mixed, old.labels_N, old.sample_ids_N).rows(kept)
    wanted = compare(new.rows(kept), gallery, [0.01]).tar_at_far[far_key(0.01)]
    assert some.tar_K["farthest_from_centre_first"][3] == wanted
    assert some.share_K[3] == pytest.approx(30 / 96) and some.tar_K["random"][10] == pytest.approx(
        every.tar_K["random"][10], abs=0.1
    )


def test_orders_by_hand() -> None:
    def at(degrees: list[float]) -> list[list[float]]:
        return [[np.cos(np.radians(angle)), np.sin(np.radians(angle)), 0.0] for angle in degrees]

    # identity 0: centre at 0, angles 10, 10, 0; identity 1: one image; identity 2: angles 30, 30
    rows = np.array([*at([10.0, -10.0, 0.0]), [0.0, 0.0, 1.0], *at([120.0, 60.0])], dtype=np.float32)
    gallery = EmbeddingSet("old", rows, np.array([0, 0, 0, 1, 2, 2]), np.arange(6))
    farthest = backfill_order(gallery, "farthest_from_centre_first").tolist()
    assert set(farthest[:2]) == {4, 5} and set(farthest[2:4]) == {0, 1} and set(farthest[4:]) == {2, 3}
    # excess: 0 for the pairs at equal angles, -10 for the middle image, none for the single one
    excess = backfill_order(gallery, "boundary_excess_first").tolist()
    assert set(excess[:4]) == {0, 1, 4, 5} and excess[4:] == [2, 3]
    far_out = np.array([*at([40.0, -10.0, -12.0, 0.0]), *at([120.0, 60.0])], dtype=np.float32)
    order = backfill_order(
        EmbeddingSet("old", far_out, np.array([0, 0, 0, 0, 2, 2]), np.arange(6)), "boundary_excess_first"
    )
    assert order[0] == 0  # far outside of what the identity's other images span
    assert sorted(backfill_order(gallery, "random", seed=1).tolist()) == list(range(6))
    assert backfill_order(gallery, "random", seed=1).tolist() != backfill_order(gallery, "random", seed=4).tolist()


def test_other_images_are_refused() -> None:
    old, new = model("old", 1, 0.9), model("new", 2, 0.4)
    with pytest.raises(RunError, match="same images in the same order"):
        backfill((new, old), (new, new), model("old", 1, 0.9, first_id=7), 0.01)
