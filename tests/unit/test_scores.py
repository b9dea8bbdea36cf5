"""Scores of an upgrade against numbers worked by hand and plain loops; intervals against simulated truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from lce_dist.errors import DataError, RunError
from lce_dist.evaluation import scores
from lce_dist.evaluation.bootstrap import count_by_identity, interval, resampled_tars, tar_interval
from lce_dist.evaluation.generations import Generations, compare_generations
from lce_dist.evaluation.metrics import EmbeddingSet, compare, far_key
from lce_dist.evaluation.scores import Cells, flips, keep_threshold, p_scores, reached_at, score_blocks

FAR = 0.05


def embedding_set(
    vectors: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], name: str = "m", first_id: int = 0
) -> EmbeddingSet:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.arange(first_id, first_id + len(labels))
    return EmbeddingSet(name, unit.astype(np.float32), labels.astype(np.int64), ids.astype(np.int64))


def people(
    seed: int, num_people: int, photos: int, noise: tuple[float, float] = (0.2, 1.2), dim: int = 16, name: str = "m"
) -> EmbeddingSet:
    """Identities at random places; each has a noise of its own, so that some are easy and some are hard."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_people), photos)
    noise_N = random.uniform(*noise, num_people)[labels]
    return embedding_set(
        random.normal(size=(num_people, dim))[labels] + noise_N[:, None] * random.normal(size=(len(labels), dim)),
        labels,
        name,
    )


def blurred(seen: EmbeddingSet, noise: float, seed: int, name: str) -> EmbeddingSet:
    random = np.random.default_rng(seed)
    return embedding_set(seen.vectors_ND + noise * random.normal(size=seen.vectors_ND.shape), seen.labels_N, name)


def level(query: npt.NDArray[np.float32], gallery: npt.NDArray[np.float32]) -> int:
    return round(float(query.astype(np.float64) @ gallery.astype(np.float64)) * 2**20)


def slow_pairs(query: EmbeddingSet, gallery: EmbeddingSet) -> list[tuple[int, bool, int, int]]:
    """(score in 2^-20, genuine, query identity, gallery identity) of every pair of different images."""
    return [
        (level(q, g), bool(ql == gl), int(ql), int(gl))
        for q, ql, qi in zip(query.vectors_ND, query.labels_N, query.sample_ids_N, strict=True)
        for g, gl, gi in zip(gallery.vectors_ND, gallery.labels_N, gallery.sample_ids_N, strict=True)
        if qi != gi
    ]


def test_p_scores_by_hand() -> None:
    good = Cells(old_old=0.5, new_old=0.6, new_new=0.72, independent=0.8)
    assert good.update_gain == pytest.approx(1.0 / 3.0)
    assert good.relative_change == pytest.approx(-0.1)
    worse = Cells(old_old=0.5, new_old=0.4, new_new=0.88, independent=0.8)
    found = p_scores({"a": good, "b": worse})
    p_comp = (1.0 / (1.0 + math.exp(-1.0 / 3.0)) + 1.0 / (1.0 + math.exp(1.0 / 3.0))) / 2.0  # 0.5 by symmetry
    assert found.p_comp == pytest.approx(p_comp) == pytest.approx(0.5)
    assert found.p_up == pytest.approx(0.5)
    assert found.p_1 == pytest.approx(0.5)
    alone = p_scores({"a": good})
    up, comp = 1.0 / (1.0 + math.exp(0.1)), 1.0 / (1.0 + math.exp(-1.0 / 3.0))
    assert alone.p_1 == pytest.approx(2.0 * up * comp / (up + comp))


def test_p_scores_say_where_the_update_gain_is_not_defined_and_survive_huge_ones() -> None:
    good = Cells(0.5, 0.6, 0.7, 0.8)
    found = p_scores({"a": good, "weaker": Cells(0.8, 0.7, 0.7, 0.8)})
    assert (found.p_comp, found.p_1, found.undefined) == (None, None, ("weaker",))
    assert found.p_up == pytest.approx((1 / (1 + math.exp(0.125))) * 1.0)
    for cross, expected in ((1.0, 1.0), (0.0, 0.0)):
        extreme = p_scores({"a": Cells(0.5, cross, 0.7, 0.5 + 1e-9)})
        assert extreme.p_comp == pytest.approx(expected)
    with pytest.raises(RunError, match="0 test sets"):
        p_scores({})
    with pytest.raises(RunError, match=r"'b' is 0\.0; must be above 0"):
        p_scores({"a": good, "b": Cells(0.0, 0.0, 0.1, 0.0)})


@pytest.mark.parametrize("block", [1 << 22, 100])
def test_what_a_kept_threshold_reaches(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(scores, "_BLOCK_SCORES", block)
    old = people(1, 12, 3, name="old")
    new = blurred(old, 0.1, 2, "new")
    same = keep_threshold((old, old), (old, old), FAR)
    truth = compare(old, old, [FAR])
    if block == 1 << 22:  # cut as ``compare`` cuts, the scores are the very same
        assert same.tar == truth.tar_at_far[far_key(FAR)] and same.far <= FAR
        assert same.threshold == truth.threshold_at_far[far_key(FAR)]
    found = keep_threshold((old, old), (new, old), FAR)
    pairs = slow_pairs(new, old)
    for genuine, share in ((True, found.tar), (False, found.far)):
        levels = [pair[0] for pair in pairs if pair[1] == genuine]
        low, high = (np.mean([level >= found.threshold * 2**20 + d for level in levels]) for d in (1, -1))
        assert low <= share <= high
    assert found.far != pytest.approx(FAR, abs=1e-3)  # an operating point that did move
    with pytest.raises(DataError, match="0 genuine"):
        reached_at((embedding_set(np.eye(2), np.arange(2)), embedding_set(np.eye(2), np.arange(2))), 0.5)


def test_flips_are_counted_pair_by_pair() -> None:
    old = people(3, 10, 4, name="old")
    new = blurred(old, 0.15, 4, "new")
    found = flips((old, old), (new, old), FAR)
    before, after = (compare(query, old, [FAR]) for query in (old, new))
    assert found.num_genuine == before.num_genuine == 10 * 4 * 3
    gained = after.tar_at_far[far_key(FAR)] - before.tar_at_far[far_key(FAR)]
    assert gained == pytest.approx((found.positive - found.negative) / found.num_genuine, abs=1e-12)
    thresholds = [round(result.threshold_at_far[far_key(FAR)] * 2**20) for result in (before, after)]
    negative = [0, 0, 0]
    for was, now in zip(slow_pairs(old, old), slow_pairs(new, old), strict=True):
        for slack in (-1, 0, 1) if was[1] else ():
            negative[slack + 1] += was[0] >= thresholds[0] - slack and now[0] < thresholds[1] + slack
    assert negative[0] <= found.negative <= negative[2] and found.negative > 0
    assert found.negative_rate == found.negative / found.num_genuine
    assert flips((old, old), (old, old), FAR).negative == 0
    shorter = EmbeddingSet("short", new.vectors_ND[1:], new.labels_N[1:], new.sample_ids_N[1:])
    with pytest.raises(RunError, match="the query images of 'old' and 'short' differ"):
        flips((old, old), (shorter, old), FAR)


def test_a_matrix_of_generations_by_hand() -> None:
    tar = np.array([[0.5, np.nan, np.nan], [0.6, 0.7, np.nan], [0.5, 0.75, 0.9]])
    found = Generations(("a", "b", "c"), tar)
    assert found.average_compatibility == pytest.approx(2 / 3)  # 0.6 > 0.5, 0.75 > 0.7; 0.5 is not above 0.5
    assert found.average_metric == pytest.approx((0.5 + 0.6 + 0.7 + 0.5 + 0.75 + 0.9) / 6)


def test_generations_are_compared_later_against_earlier() -> None:
    sets = [people(5, 12, 3, name="first")]
    sets += [blurred(sets[0], 0.05 * k, k, f"later {k}") for k in (1, 2)]
    found = compare_generations(sets, FAR)
    for i, j in itertools.product(range(3), range(3)):
        if i < j:
            assert np.isnan(found.tar_GG[i, j])
        else:
            assert found.tar_GG[i, j] == compare(sets[i], sets[j], [FAR]).tar_at_far[far_key(FAR)]
    assert found.names == ("first", "later 1", "later 2")


@pytest.mark.parametrize("manner", ["backward", "forward"])
def test_maps_are_composed_along_generations(manner: str) -> None:
    random = np.random.default_rng(6)
    first = people(7, 12, 3, dim=6, name="first")
    turns = [np.linalg.qr(random.normal(size=(6, 6)))[0] for _ in range(2)]
    second = embedding_set(first.vectors_ND @ turns[0], first.labels_N, "second")
    wider = ((0, 0), (0, 2))  # the third has 8 dimensions
    third = embedding_set(np.pad(second.vectors_ND @ turns[1], wider), first.labels_N, "third")
    up = [lambda v: 3.0 * (v @ turns[0]), lambda v: np.pad(v @ turns[1], wider)]
    down = [lambda v: v @ turns[0].T, lambda v: 0.2 * (v[:, :6] @ turns[1].T)]
    found = compare_generations([first, second, third], FAR, up if manner == "forward" else down, manner)  # type: ignore[arg-type]
    below = [(i, j) for i in range(3) for j in range(i + 1)]
    for cell in below:
        assert found.tar_GG[cell] == pytest.approx(found.tar_GG[0, 0], abs=0.03)  # but for roundings: one space
    swapped = [up[0], lambda v: np.pad(v, wider)] if manner == "forward" else [down[0], lambda v: v[:, :6]]
    wrong = compare_generations([first, second, third], FAR, swapped, manner)  # type: ignore[arg-type]
    assert wrong.tar_GG[2, 0] < found.tar_GG[2, 0] - 0.1


def test_generations_refuse_maps_that_do_not_fit() -> None:
    sets = [people(8, 4, 2), people(9, 4, 2)]
    with pytest.raises(RunError, match="1 generations were given"):
        compare_generations(sets[:1], FAR)
    with pytest.raises(RunError, match="0 maps were given; the backward manner of 2 generations needs 1"):
        compare_generations(sets, FAR, manner="backward")
    with pytest.raises(RunError, match="1 maps were given; the direct manner"):
        compare_generations(sets, FAR, [lambda v: v])


def slow_tar(pairs: list[tuple[int, bool, int, int]], weights: list[int], far: float) -> float:
    """Every pair as often as its identities were drawn; every score tried as a threshold."""
    genuine = [(score, weights[q]) for score, mate, q, _ in pairs if mate]
    impostor = [(score, weights[q] * weights[g]) for score, mate, q, g in pairs if not mate]
    total, best = sum(weight for _, weight in impostor), 0.0
    for threshold in [score for score, *_ in pairs]:
        if sum(weight for score, weight in impostor if score >= threshold) / total <= far:
            best = max(best, sum(weight for score, weight in genuine if score >= threshold))
    return best / sum(weight for _, weight in genuine)


@pytest.mark.parametrize("seed", range(10))
def test_tar_of_a_drawn_sample_is_that_of_the_pairs_it_holds(seed: int) -> None:
    query = people(seed, 7, 3, (0.5, 1.5), name="q")
    gallery = blurred(query, 0.1, seed + 1, "g")
    counts = count_by_identity(query, gallery, FAR)
    weights = np.bincount(np.random.default_rng(seed).integers(0, 7, 7), minlength=7).tolist()
    found = counts.tar(np.array(weights, dtype=np.float64))
    # the levels of the loop are of float64 sums, those of the product of float32 ones; so may one tie go another way
    expected = slow_tar(slow_pairs(query, gallery), weights, FAR)
    assert found == pytest.approx(expected, abs=1.01 * max(weights) / (6 * 7))
    assert counts.tar(np.ones(7)) == compare(query, gallery, [FAR]).tar_at_far[far_key(FAR)]


def test_looking_at_near_candidates_first_changes_nothing() -> None:
    seen = people(31, 12, 3)
    counts = count_by_identity(seen, seen, FAR)
    everything = replace(counts, near=0)
    assert counts.near > 0
    random, were_too_few = np.random.default_rng(1), 0
    for _ in range(300):
        weights = np.bincount(random.integers(0, 12, 12), minlength=12).astype(np.float64)
        assert counts.tar(weights) == everything.tar(weights)
        far_there = (counts._impostors_from(counts.near, weights) / weights.sum() ** 2 / 9)[counts.near]
        were_too_few += far_there <= FAR
    assert 0 < were_too_few < 150


def test_images_that_are_cut_into_blocks_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = people(11, 10, 3)
    only_one = np.eye(10)[3]
    assert math.isnan(count_by_identity(seen, seen, FAR).tar(only_one))  # no impostor is left
    whole = count_by_identity(seen, seen, FAR)
    monkeypatch.setattr("lce_dist.evaluation.bootstrap._MERGE_AT", 10)
    monkeypatch.setattr(scores, "_BLOCK_SCORES", 64)
    cut = count_by_identity(seen, seen, FAR)
    assert len(list(score_blocks(seen, seen))) == 15
    random = np.random.default_rng(0)
    for _ in range(20):
        weights = random.integers(0, 3, 10).astype(np.float64)
        assert cut.tar(weights) == pytest.approx(whole.tar(weights), abs=0.05)
    assert cut.count_E.sum() == pytest.approx(whole.count_E.sum(), abs=3)
    assert len(cut.count_E) == pytest.approx(len(whole.count_E), abs=3)
    assert (whole.first_E < whole.second_E).all()


def test_intervals_hold_the_truth_as_often_as_they_say_and_those_over_pairs_do_not() -> None:
    far, people_drawn, photos = 1e-2, 40, 4
    truth = float(
        np.mean([compare(*(people(900 + k, 1200, 2),) * 2, [far]).tar_at_far[far_key(far)] for k in range(6)])
    )
    held = naive = 0
    trials = 40
    for trial in range(trials):
        seen = people(trial, people_drawn, photos)
        found = tar_interval(seen, seen, far, num_samples=200)
        assert found.low <= found.value <= found.high
        held += found.low <= truth <= found.high
        num_pairs = people_drawn * photos * (photos - 1)
        naive += abs(found.value - truth) <= 1.96 * math.sqrt(found.value * (1.0 - found.value) / num_pairs)
    assert held >= 35  # of 40; an exact 95 % interval holds fewer in 1 of 70 such tests
    assert naive < 26  # pairs of one identity are taken for independent: far fewer than 38


def test_samples_are_shared_by_cells_so_that_differences_are_sharp() -> None:
    old = people(21, 40, 4, name="old")
    new = blurred(old, 0.02, 22, "new")
    counts = [count_by_identity(query, old, 1e-2) for query in (old, new)]
    tars = resampled_tars(counts, 200)
    np.testing.assert_array_equal(tars, resampled_tars(counts, 200))
    assert not np.array_equal(tars, resampled_tars(counts, 200, seed=1))
    apart = interval(0.0, tars[1] - tars[0])
    single = interval(0.0, tars[0])
    assert apart.high - apart.low < 0.6 * (single.high - single.low)
    with pytest.raises(RunError, match="cannot be drawn together"):
        resampled_tars([counts[0], count_by_identity(people(1, 20, 4), people(1, 20, 4), 1e-2)])
    with pytest.raises(RunError, match="no sample of identities"):
        interval(0.5, np.array([np.nan]))
