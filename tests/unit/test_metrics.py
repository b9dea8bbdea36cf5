"""TAR at FAR, rank-1, ROC and histograms against numbers worked by hand, a float64 loop and scikit-learn."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_dist.errors import DataError, RunError
from lce_dist.evaluation.metrics import HISTOGRAM_EDGES, EmbeddingSet, compare, far_key

Vectors = npt.NDArray[np.floating] | list[list[float]]
Numbers = npt.NDArray[np.integer] | list[int]
FARS = (0.5, 0.1, 0.01, 0.001)
# One step of the score grid, and the float32 rounding of a product of unit vectors.
SCORE_TOLERANCE = 2.0**-20 + 2.0**-21


def embedding_set(vectors: Vectors, labels: Numbers, ids: Numbers | None = None, name: str = "m") -> EmbeddingSet:
    numbers = np.arange(len(labels)) if ids is None else np.asarray(ids)
    return EmbeddingSet(name, np.asarray(vectors, np.float32), np.asarray(labels, np.int64), numbers.astype(np.int64))


def from_cosines(cosines: list[float], labels: list[int]) -> EmbeddingSet:
    """Queries with the given cosines to the first axis, numbered from 0."""
    return embedding_set([[cos, (1.0 - cos * cos) ** 0.5] for cos in cosines], labels)


FIRST_AXIS = embedding_set([[1.0, 0.0]], [0], [1000])


def random_set(seed: int, num: int, num_labels: int, dim: int, noise: float, first_id: int = 0) -> EmbeddingSet:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, num)
    vectors = np.random.default_rng(99).normal(size=(num_labels, dim))[labels] + noise * rng.normal(size=(num, dim))
    return embedding_set(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), labels, np.arange(num) + first_id)


def slow_scores(query: EmbeddingSet, gallery: EmbeddingSet) -> tuple[list[float], list[float], list[bool]]:
    """Genuine and impostor cosines, and for each query with a mate whether a mate alone came first; plain loops."""
    genuine: list[float] = []
    impostor: list[float] = []
    first: list[bool] = []
    gallery_vectors = gallery.vectors_ND.astype(np.float64)
    for vector, label, image in zip(
        query.vectors_ND.astype(np.float64), query.labels_N, query.sample_ids_N, strict=True
    ):
        mates: list[float] = []
        others = [-2.0]
        for cos, other_label, other_image in zip(
            (gallery_vectors @ vector).tolist(), gallery.labels_N, gallery.sample_ids_N, strict=True
        ):
            if image != other_image:
                (mates if label == other_label else others).append(cos)
        genuine += mates
        impostor += others[1:]
        if mates:
            first.append(max(mates) > max(others))
    return genuine, impostor, first


def slow_tar(genuine: list[float], impostor: list[float], far: float) -> tuple[float, float]:
    """TAR and threshold: every score is tried as a threshold, from the lowest up."""
    for threshold in sorted({*genuine, *impostor}):
        if sum(score >= threshold for score in impostor) / len(impostor) <= far:
            return sum(score >= threshold for score in genuine) / len(genuine), threshold
    return 0.0, np.nextafter(max(impostor), 2.0)


def fast_tar(genuine: npt.NDArray[np.float64], impostor: npt.NDArray[np.float64], far: float) -> float:
    """The same rule for sets that are too large for the loop: above the first impostor that is not allowed."""
    first_rejected = len(impostor) - 1 - int(far * len(impostor))
    return float(np.mean(genuine > np.partition(impostor, first_rejected)[first_rejected]))


class TestByHand:
    queries = from_cosines(
        [*(0.9, 0.8, 0.5, 0.2), *(0.85, 0.6, 0.6, 0.4, 0.1, 0.0, -0.1, -0.2, -0.3, -0.4)], [0] * 4 + list(range(1, 11))
    )

    @pytest.mark.parametrize(
        ("far", "tar", "threshold"),
        [
            (0.05, 0.25, 0.9),  # below 1 / 10 impostors: no false accept, so above 0.85
            (0.1, 0.5, 0.8),  # one false accept, 0.85; 0.8 is the smallest score above the tie at 0.6
            (0.2, 0.5, 0.8),  # two would be allowed, but both at 0.6 come together
            (0.3, 0.75, 0.5),  # 0.85, 0.6, 0.6
            (0.4, 1.0, 0.2),  # 0.4 too
            (0.5, 1.0, 0.1),  # the threshold may be an impostor's score
        ],
    )
    def test_tar_and_threshold(self, far: float, tar: float, threshold: float) -> None:
        result = compare(self.queries, FIRST_AXIS, [far])
        assert (result.num_genuine, result.num_impostor) == (4, 10)
        assert result.tar_at_far == {far_key(far): tar}
        assert result.threshold_at_far[far_key(far)] == pytest.approx(threshold, abs=SCORE_TOLERANCE)

    def test_nothing_is_accepted_when_an_impostor_is_on_top(self) -> None:
        result = compare(from_cosines([0.5, 1.0], [0, 1]), FIRST_AXIS, [0.01])
        assert result.tar_at_far["0.01"] == 0.0
        assert 1.0 < result.threshold_at_far["0.01"] < 1.0 + SCORE_TOLERANCE

    def test_the_rule_is_on_the_quotient(self) -> None:
        # 0.29 * 100 is below 29 in floating point, 29 / 100 is not above 0.29
        impostors = [0.9] * 29 + [0.1] * 71
        result = compare(from_cosines([0.5, *impostors], [0] + [1] * 100), FIRST_AXIS, [0.29, 0.28])
        assert result.tar_at_far == {"0.29": 1.0, "0.28": 0.0}

    def test_an_image_never_meets_itself(self) -> None:
        # Four axes, two identities: every image but itself is at cosine 0, genuine or not.
        axes = embedding_set(np.eye(4), [0, 0, 1, 1])
        for gallery in (axes, embedding_set(np.eye(4), [0, 0, 1, 1], name="other model")):
            result = compare(axes, gallery, [0.1])
            assert (result.num_genuine, result.num_impostor) == (4, 8)
            assert (result.tar_at_far["0.1"], result.rank1) == (0.0, 0.0)
        elsewhere = embedding_set(np.eye(4), [0, 0, 1, 1], [4, 5, 6, 7])
        result = compare(axes, elsewhere, [0.1])
        assert (result.num_genuine, result.num_impostor) == (8, 8)
        assert (result.tar_at_far["0.1"], result.rank1) == (0.5, 1.0)

    def test_rank1_leaves_out_queries_without_a_mate_and_counts_a_tie_as_a_miss(self) -> None:
        gallery = embedding_set([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], [0, 1, 2, 3], [10, 11, 12, 13])
        query = embedding_set([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], [0, 1, 2, 9])
        result = compare(query, gallery, [0.5])
        # label 0: right; label 1: ties with label 2; label 2: label 3 is nearer; label 9: no mate
        assert (result.rank1, result.num_ranked) == (pytest.approx(1 / 3), 3)

    def test_keys_are_the_shortest_text(self) -> None:
        assert [far_key(far) for far in (1e-2, 1e-3, 1e-5, 1)] == ["0.01", "0.001", "1e-05", "1.0"]


@st.composite
def sets_with_ties(draw: st.DrawFn) -> tuple[EmbeddingSet, EmbeddingSet]:
    """Vectors of +-1/2 in four dimensions: cosines are -1, -1/2, 0, 1/2 or 1, exact in float32."""
    corner = st.lists(st.sampled_from([-0.5, 0.5]), min_size=4, max_size=4)
    labels = draw(st.lists(st.integers(0, 3), min_size=12, max_size=12))

    def one(name: str) -> EmbeddingSet:
        ids = draw(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
        vectors = draw(st.lists(corner, min_size=len(ids), max_size=len(ids)))
        return embedding_set(vectors, [labels[image] for image in ids], ids, name)

    return one("query"), one("gallery")


@settings(max_examples=60, deadline=None)
@given(sets_with_ties())
def test_ties_agree_exactly_with_the_loop(sets: tuple[EmbeddingSet, EmbeddingSet]) -> None:
    genuine, impostor, first = slow_scores(*sets)
    if not genuine or not impostor:
        with pytest.raises(DataError, match=f"0 {'impostor' if genuine else 'genuine'} pairs"):
            compare(*sets, FARS)
        return
    result = compare(*sets, FARS)
    assert (result.num_genuine, result.num_impostor, result.num_ranked) == (len(genuine), len(impostor), len(first))
    assert result.rank1 == sum(first) / len(first)
    for far in FARS:
        tar, threshold = slow_tar(genuine, impostor, far)
        assert result.tar_at_far[far_key(far)] == tar
        assert result.threshold_at_far[far_key(far)] == pytest.approx(threshold, abs=2.0**-20)
    for histogram, scores in ((result.genuine_histogram, genuine), (result.impostor_histogram, impostor)):
        np.testing.assert_array_equal(histogram, np.histogram(scores, HISTOGRAM_EDGES)[0])


@pytest.mark.parametrize("first_id", [0, 40, 1000], ids=["same", "some", "none"])
def test_random_vectors_agree_with_the_loop(first_id: int) -> None:
    query = random_set(1, 60, 8, 16, 1.0)
    gallery = random_set(1, 60, 8, 16, 1.2) if first_id == 0 else random_set(2, 50, 8, 16, 1.2, first_id)
    if first_id == 40:
        # images 40 to 59 are in both sets and must have one label each
        labels = gallery.labels_N.copy()
        labels[:20] = query.labels_N[40:]
        gallery = EmbeddingSet("gallery", gallery.vectors_ND, labels, gallery.sample_ids_N)
    genuine, impostor, first = slow_scores(query, gallery)
    result = compare(query, gallery, FARS)
    assert (result.num_genuine, result.num_impostor) == (len(genuine), len(impostor))
    assert result.rank1 == sum(first) / len(first)
    for far in FARS:
        tar, threshold = slow_tar(genuine, impostor, far)
        assert result.tar_at_far[far_key(far)] == tar
        assert result.threshold_at_far[far_key(far)] == pytest.approx(threshold, abs=SCORE_TOLERANCE)
    for histogram, scores in ((result.genuine_histogram, genuine), (result.impostor_histogram, impostor)):
        # the grid may carry one score over the edge of a bin: out of one, into the next
        assert np.abs(histogram - np.histogram(scores, HISTOGRAM_EDGES)[0]).sum() <= 2


def test_several_blocks_agree_with_one_sort() -> None:
    # 3000 * 2900 scores do not fit one block of 2^22; the last block is an uneven one
    query, gallery = random_set(3, 3000, 300, 8, 0.7), random_set(4, 2900, 300, 8, 0.7, first_id=10_000)
    cos = query.vectors_ND.astype(np.float64) @ gallery.vectors_ND.T.astype(np.float64)
    same = query.labels_N[:, None] == gallery.labels_N
    genuine, impostor = cos[same], cos[~same]
    result = compare(query, gallery, (0.1, 0.01, 1e-4))
    for far in (0.1, 0.01, 1e-4):
        # scores nearer than the grid are ties for us: at most a few pairs of 29,000 stand on the threshold
        assert result.tar_at_far[far_key(far)] == pytest.approx(fast_tar(genuine, impostor, far), abs=3 / len(genuine))
    assert (result.num_genuine, result.num_impostor) == (len(genuine), len(impostor))
    best = gallery.labels_N[cos.argmax(axis=1)] == query.labels_N
    assert result.rank1 == pytest.approx(best[same.any(axis=1)].mean(), abs=1e-3)
    assert result.impostor_histogram.sum() == result.num_impostor


def test_roc_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    query = random_set(5, 300, 40, 8, 1.0)
    genuine, impostor, _ = slow_scores(query, query)
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    false_rate, true_rate, _ = metrics.roc_curve(truth, genuine + impostor, drop_intermediate=False)
    result = compare(query, query, FARS)
    far_P, tar_P = result.roc
    assert far_P[0] == pytest.approx(1e-4)
    assert far_P[-1] == pytest.approx(1.0)
    assert tar_P[-1] == 1.0
    np.testing.assert_allclose(np.diff(np.log(far_P)), np.log(far_P[1] / far_P[0]))
    expected = [true_rate[false_rate <= far].max() for far in far_P]
    np.testing.assert_allclose(tar_P, expected, atol=2.5 / len(genuine))
    assert np.mean(tar_P == expected) > 0.95
    for far in FARS:
        assert result.tar_at_far[far_key(far)] == true_rate[false_rate <= far].max()


def test_roc_starts_at_the_smallest_far_that_the_pairs_can_tell() -> None:
    few = compare(random_set(6, 20, 5, 8, 1.0), random_set(7, 20, 5, 8, 1.0, first_id=100), [0.01])
    assert few.roc[0][0] == pytest.approx(1 / few.num_impostor)


def test_memory_stays_within_its_law() -> None:
    query, gallery = random_set(8, 5000, 500, 32, 1.0), random_set(9, 5000, 500, 32, 1.0, first_id=10_000)
    tracemalloc.start()
    compare(query, gallery, FARS)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    all_scores_bytes = 4 * 5000 * 5000
    assert all_scores_bytes * 2 > peak_bytes, "not even two float32 copies of all scores"
    assert peak_bytes < 14 * 2**22 + 120e6


class TestBorder:
    def test_types_and_shapes(self) -> None:
        unit = np.eye(3, dtype=np.float32)
        labels = np.arange(3)
        with pytest.raises(RunError, match="float64"):
            EmbeddingSet("m", unit.astype(np.float64), labels, labels)
        with pytest.raises(RunError, match=r"shape \(0, 3\)"):
            EmbeddingSet("m", unit[:0], labels[:0], labels[:0])
        with pytest.raises(RunError, match=r"labels of model 'm' are int64 of shape \(2,\)"):
            EmbeddingSet("m", unit, labels[:2], labels)
        with pytest.raises(RunError, match="sample ids of model 'm' are int32"):
            EmbeddingSet("m", unit, labels, labels.astype(np.int32))

    @pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (1.002, "1.002"), (0.0, "0")])
    def test_vectors_that_are_not_unit(self, value: float, shown: str) -> None:
        vectors = np.eye(3, dtype=np.float32)
        vectors[1, 1] = value
        with pytest.raises(RunError, match=rf"image 8 of model 'm' has norm {shown} \(1 of 3"):
            embedding_set(vectors, [0, 1, 2], [7, 8, 9])

    def test_norms_within_tolerance_pass(self) -> None:
        near = embedding_set(np.eye(2) * 1.0009, [0, 0])
        assert compare(near, embedding_set(np.eye(2), [0, 1], [5, 6]), [0.5]).num_genuine == 2

    def test_an_image_twice(self) -> None:
        with pytest.raises(RunError, match="image 4 occurs 2 times among the 3 vectors"):
            embedding_set(np.eye(3), [0, 1, 1], [3, 4, 4])

    def test_sets_that_cannot_be_compared(self) -> None:
        small, large = embedding_set(np.eye(2), [0, 1]), embedding_set(np.eye(3), [0, 1, 1])
        with pytest.raises(RunError, match="2 dimensions and gallery model 'm' has 3"):
            compare(small, large, FARS)
        with pytest.raises(RunError, match="image 1 has label 1 in 'm' and 0 in 'm'"):
            compare(small, embedding_set(np.eye(2), [0, 0]), FARS)

    def test_one_image_an_identity_has_no_genuine_pair(self) -> None:
        singles = embedding_set(np.eye(4), [0, 1, 2, 3])
        with pytest.raises(DataError, match="0 genuine pairs"):
            compare(singles, singles, FARS)
        with pytest.raises(DataError, match="0 impostor pairs"):
            compare(embedding_set(np.eye(2), [0, 0]), embedding_set(np.eye(2), [0, 0]), FARS)
