"""1:N identification against numbers worked by hand and a plain loop over probes and identities."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.identification import identify, mean_of_identities, spans

FPIRS = (1.0, 0.5, 0.2, 0.1, 0.01)


def embedding_set(vectors, labels, first_id: int = 0, name: str = "m") -> EmbeddingSet:
    vectors = np.asarray(vectors, dtype=np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingSet(
        name, unit.astype(np.float32), np.asarray(labels, np.int64), np.arange(first_id, first_id + len(labels))
    )


def at_angles(degrees: list[float], labels: list[int], first_id: int = 0) -> EmbeddingSet:
    angles = np.deg2rad(degrees)
    return embedding_set(np.stack([np.cos(angles), np.sin(angles)], axis=1), labels, first_id)


def random_set(seed: int, num: int, labels: np.ndarray, dim: int = 6, first_id: int = 0) -> EmbeddingSet:
    rng = np.random.default_rng(seed)
    label_N = rng.choice(labels, num)
    centres = np.random.default_rng(42).normal(size=(200, dim))
    return embedding_set(centres[label_N] + 0.8 * rng.normal(size=(num, dim)), label_N, first_id)


def slow(probe: EmbeddingSet, gallery: EmbeddingSet) -> tuple[list[int], list[float], list[float]]:
    """Rank and score of each mated probe's mate, and the best score of each non-mated probe."""
    ranks, mates, strangers = [], [], []
    for vector, label in zip(probe.vectors_ND.astype(np.float64), probe.labels_N.tolist(), strict=True):
        score_of: dict[int, float] = {}
        for other, identity in zip(gallery.vectors_ND.astype(np.float64), gallery.labels_N.tolist(), strict=True):
            score_of[identity] = max(score_of.get(identity, -2.0), float(vector @ other))
        if label in score_of:
            mate = score_of.pop(label)
            ranks.append(1 + sum(score >= mate - 1e-12 for score in score_of.values()))
            mates.append(mate)
        else:
            strangers.append(max(score_of.values()))
    return ranks, mates, strangers


def slow_tpir(ranks: list[int], mates: list[float], strangers: list[float], fpir: float) -> tuple[float, float]:
    accepted = [mate for rank, mate in zip(ranks, mates, strict=True) if rank == 1]
    for threshold in sorted({*accepted, *strangers}):
        if sum(score >= threshold for score in strangers) / len(strangers) <= fpir:
            return sum(score >= threshold for score in accepted) / len(ranks), threshold
    return 0.0, float(np.nextafter(max([*accepted, *strangers]), np.inf))


class TestByHand:
    # enrolled: identity 1 at 0 and 20 degrees, identity 2 at 90
    GALLERY = at_angles([0, 90, 20], [1, 2, 1], 100)

    def test_ranks_and_rates(self):
        # mated: 1 at 30 (mate 10 away, first), 1 at 80 (10 from identity 2, second), 2 at 100 (first);
        # non-mated: 5 away from identity 2, and 40 away from identity 1
        probe = at_angles([30, 80, 100, 95, 320], [1, 1, 2, 7, 8])
        found = identify(probe, self.GALLERY)
        assert found.rank_M.tolist() == [1, 2, 1]
        assert (found.num_nonmated, found.num_identities) == (2, 2)
        assert [found.rank_rate(k) for k in (1, 2)] == [2 / 3, 1.0]
        tpir_F, threshold_F = found.tpir_at([0.4, 0.5, 1.0])
        # 5 degrees beat both mates; then both mates, at 10, are above the other stranger, at 40
        assert tpir_F.tolist() == [0.0, 2 / 3, 2 / 3]
        np.testing.assert_allclose(
            threshold_F, [np.cos(np.deg2rad(5)), np.cos(np.deg2rad(10)), np.cos(np.deg2rad(40))], atol=1e-7
        )

    def test_a_mate_that_is_not_first_is_never_returned(self):
        found = identify(at_angles([80, 270], [1, 9]), self.GALLERY)
        assert found.tpir_at([1.0])[0].tolist() == [0.0]

    def test_a_tie_counts_against(self):
        twins = embedding_set([[1, 0, 0], [1, 0, 0], [0, 1, 0]], [1, 2, 3], 100)
        probe = embedding_set([[1, 0, 0], [0, 0, 1]], [1, 9])
        assert identify(probe, twins).rank_M.tolist() == [2]

    def test_mean_enrolment(self):
        # the mean of 0 and 20 is at 10: a probe at 25 is 15 away, and 5 with the best
        probe = at_angles([25, 270], [1, 9])
        for enrolment, degrees in (("best", 5), ("mean", 15)):
            accepted = identify(probe, self.GALLERY, enrolment).curve.threshold_P[1]
            assert accepted == pytest.approx(np.cos(np.deg2rad(degrees)), abs=1e-7)


@pytest.mark.parametrize("block", [1, 5, 1000])
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("enrolment", ["best", "mean"])
def test_as_a_loop(monkeypatch, block, seed, enrolment):
    monkeypatch.setattr("lce_dist.evaluation.identification._BLOCK_PROBES", block)
    monkeypatch.setattr("lce_dist.evaluation.identification._BLOCK_GALLERY", block)
    probe = random_set(seed, 60, np.arange(30))
    gallery = random_set(seed + 10, 70, np.arange(0, 60, 2), first_id=1000)
    found = identify(probe, gallery, enrolment)
    ranks, mates, strangers = slow(probe, mean_of_identities(gallery) if enrolment == "mean" else gallery)
    assert found.rank_M.tolist() == ranks
    assert len(set(ranks)) > 1
    tpir_F, threshold_F = found.tpir_at(FPIRS)
    truth = [slow_tpir(ranks, mates, strangers, fpir) for fpir in FPIRS]
    assert tpir_F.tolist() == [tpir for tpir, _ in truth]
    np.testing.assert_allclose(threshold_F, [threshold for _, threshold in truth], atol=1e-14)
    for k in (1, 2, 5, 30):
        assert found.rank_rate(k) == sum(rank <= k for rank in ranks) / len(ranks)


def test_copies_of_a_vector_tie_wherever_they_stand():
    # enough columns that a matrix product treats the first and the last of them differently
    rng = np.random.default_rng(0)
    row = rng.normal(size=(1, 129))
    gallery = embedding_set(np.concatenate([row, rng.normal(size=(1001, 129)), row]), np.arange(1003), 5000)
    probe = embedding_set(
        np.concatenate([row + 0.1 * rng.normal(size=(3, 129)), rng.normal(size=(1, 129))]), [0, 0, 1002, -7]
    )
    assert identify(probe, gallery).rank_M.tolist() == [2, 2, 2]


def test_mean_is_of_unit_vectors():
    gallery = embedding_set([[1, 0], [0, 1], [3, 4]], [7, 7, 3], 10)
    found = mean_of_identities(gallery)
    assert found.labels_N.tolist() == [3, 7]
    np.testing.assert_allclose(found.vectors_ND, [[0.6, 0.8], [0.5**0.5, 0.5**0.5]], atol=1e-7)
    with pytest.raises(DataError, match="1 identities of 'm' cancel"):
        mean_of_identities(embedding_set([[1, 0], [-1, 0]], [1, 1]))


def test_spans():
    row_P, place_P = spans(np.array([2, 9, 5]), np.array([4, 9, 6]))
    assert (row_P.tolist(), place_P.tolist()) == ([0, 0, 2], [2, 3, 5])


@pytest.mark.parametrize(
    ("probe", "gallery", "words"),
    [
        (at_angles([1], [5]), at_angles([1], [6], 10), "none of the 1 probes is mated"),
        (at_angles([1, 2], [6, 6]), at_angles([1], [6], 10), "none of the 2 probes is non-mated"),
        (at_angles([1, 2], [6, 7]), at_angles([1, 2, 3], [6, 7, 8], 1), "1 images are both probes"),
        (at_angles([1], [5]), embedding_set([[1, 0, 0]], [6]), "2 dimensions"),
    ],
)
def test_sets_that_do_not_fit_are_refused(probe, gallery, words):
    with pytest.raises(DataError, match=words):
        identify(probe, gallery)


def test_memory_is_bounded_by_blocks():
    # all scores at once would be 240 MB
    probe = random_set(1, 1000, np.arange(150), 8)
    gallery = random_set(2, 30_000, np.arange(100), 8, first_id=100_000)
    tracemalloc.start()
    identify(probe, gallery)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20
