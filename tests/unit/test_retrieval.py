"""Retrieval against numbers worked by hand, a plain loop over sorted galleries, and scikit-learn."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.retrieval import JUNK, retrieve


def embedding_set(vectors, labels, ids=None, name: str = "m") -> EmbeddingSet:
    vectors = np.asarray(vectors, dtype=np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = np.arange(len(labels)) if ids is None else np.asarray(ids)
    return EmbeddingSet(name, unit.astype(np.float32), np.asarray(labels, np.int64), numbers.astype(np.int64))


def at_angles(degrees: list[float], labels: list[int], first_id: int = 100) -> EmbeddingSet:
    angles = np.deg2rad(degrees)
    ids = np.arange(first_id, first_id + len(labels))
    return embedding_set(np.stack([np.cos(angles), np.sin(angles)], axis=1), labels, ids)


def random_set(seed: int, num: int, num_labels: int, first_id: int, junk: float = 0.0) -> EmbeddingSet:
    rng = np.random.default_rng(seed)
    label_N = rng.integers(0, num_labels, num)
    vectors = np.random.default_rng(42).normal(size=(num_labels, 6))[label_N] + rng.normal(size=(num, 6))
    label_N[rng.random(num) < junk] = JUNK
    return embedding_set(vectors, label_N, np.arange(first_id, first_id + num))


def slow(query, gallery, query_camera=None, gallery_camera=None):
    """(AP, MAP@R term, rank of the first mate) of each query with a mate: the gallery sorted, other identities first."""
    found = []
    for q in range(len(query.labels_N)):
        line = []
        for g in range(len(gallery.labels_N)):
            if gallery.labels_N[g] == JUNK or query.sample_ids_N[q] == gallery.sample_ids_N[g]:
                continue
            mate = query.labels_N[q] == gallery.labels_N[g]
            if mate and query_camera is not None and query_camera[q] == gallery_camera[g]:
                continue
            score = float(query.vectors_ND[q].astype(np.float64) @ gallery.vectors_ND[g].astype(np.float64))
            line.append((-round(score, 11), bool(mate)))
        line.sort()  # False, another identity, before True
        places = [place for place, (_, mate) in enumerate(line, 1) if mate]
        if places:
            precision = [nth / place for nth, place in enumerate(places, 1)]
            at_r = sum(p for p, place in zip(precision, places, strict=True) if place <= len(places))
            found.append((sum(precision) / len(places), at_r / len(places), places[0]))
    return found


class TestByHand:
    QUERY = at_angles([0], [1], 0)

    def test_precision_and_rank(self):
        # order: mate, other, mate, other
        found = retrieve(self.QUERY, at_angles([10, 20, 30, 40], [1, 2, 1, 3]))
        assert found.average_precision_Q.tolist() == [(1 / 1 + 2 / 3) / 2]
        assert found.precision_at_r_Q.tolist() == [(1 / 1) / 2]
        assert found.first_rank_Q.tolist() == [1]

    def test_junk_and_the_same_camera_are_passed_over(self):
        gallery = at_angles([5, 10, 20, 30], [JUNK, 1, 2, 1])
        # nearest: junk; then a mate seen by the query's camera; an other of the query's camera counts; then the mate
        found = retrieve(self.QUERY, gallery, np.array([7]), np.array([1, 7, 7, 8]))
        assert found.average_precision_Q.tolist() == [1 / 2]
        assert found.first_rank_Q.tolist() == [2]
        assert retrieve(self.QUERY, gallery).average_precision_Q.tolist() == [(1 / 1 + 2 / 3) / 2]

    def test_a_tie_counts_against(self):
        found = retrieve(self.QUERY, at_angles([10, 10, 10, 50], [1, 2, 1, 1]))
        assert found.average_precision_Q[0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-15)
        assert found.first_rank_Q.tolist() == [2]

    def test_the_query_image_itself_is_passed_over(self):
        one = at_angles([0, 30, 10, 200], [1, 1, 2, 9])
        found = retrieve(one, one)
        assert found.query_Q.tolist() == [0, 1]
        assert found.num_queries == 4
        assert found.average_precision_Q.tolist() == [1 / 2, 1 / 2]
        assert (found.mean_average_precision, found.map_at_r) == (0.5, 0.0)
        assert [found.rank_rate(k) for k in (1, 2)] == [0.0, 1.0]


@pytest.mark.parametrize("block", [1, 4, 1000])
@pytest.mark.parametrize("cameras", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_as_a_loop(monkeypatch, block, cameras, seed):
    for name in ("_BLOCK_QUERIES", "_BLOCK_MATES", "_BLOCK_GALLERY"):
        monkeypatch.setattr(f"lce_dist.evaluation.retrieval.{name}", block)
    query, gallery = random_set(seed, 40, 12, 0), random_set(seed + 10, 90, 10, 30, junk=0.1)
    # images 30 to 39 are in both
    both = {i: query.labels_N[i] for i in range(30, 40)}
    label_N = np.array([both.get(i, label) for i, label in zip(gallery.sample_ids_N, gallery.labels_N, strict=True)])
    vectors = gallery.vectors_ND.copy()
    vectors[5:8] = vectors[20:23]  # ties
    gallery = EmbeddingSet("g", vectors, label_N, gallery.sample_ids_N)
    rng = np.random.default_rng(seed)
    seen = (rng.integers(0, 3, 40), rng.integers(0, 3, 90)) if cameras else (None, None)
    found = retrieve(query, gallery, *seen)
    truth = slow(query, gallery, *seen)
    assert len(truth) < 40  # two identities of queries have no mate
    np.testing.assert_allclose(found.average_precision_Q, [one[0] for one in truth], atol=1e-12)
    np.testing.assert_allclose(found.precision_at_r_Q, [one[1] for one in truth], atol=1e-12)
    assert found.first_rank_Q.tolist() == [one[2] for one in truth]
    for k in (1, 5, 10):
        assert found.rank_rate(k) == np.mean([one[2] <= k for one in truth])


def test_average_precision_is_that_of_scikit_learn():
    query, gallery = random_set(1, 50, 8, 0), random_set(2, 400, 8, 1000)
    found = retrieve(query, gallery)
    score_QG = query.vectors_ND.astype(np.float64) @ gallery.vectors_ND.astype(np.float64).T
    truth = [
        average_precision_score(gallery.labels_N == label, row)
        for label, row in zip(query.labels_N, score_QG, strict=True)
    ]
    np.testing.assert_allclose(found.average_precision_Q, truth, atol=1e-9)


def test_what_cannot_be_measured_is_refused():
    one = at_angles([0, 10], [1, 2])
    with pytest.raises(DataError, match="none of the 2 queries"):
        retrieve(one, one)
    with pytest.raises(DataError, match="of both, or of none"):
        retrieve(one, one, np.array([1, 2]))
    with pytest.raises(DataError, match="none of the 1 queries"):
        retrieve(at_angles([0], [JUNK], 0), at_angles([0, 1], [JUNK, 2]))
    with pytest.raises(DataError, match="dimensions"):
        retrieve(one, embedding_set([[1, 0, 0]], [1]))


def test_memory_is_bounded_by_blocks():
    # all scores at once would be 240 MB
    query, gallery = random_set(1, 1000, 2000, 0), random_set(2, 30_000, 2000, 10_000)
    tracemalloc.start()
    retrieve(query, gallery)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20
