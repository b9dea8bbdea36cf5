"""Orders by blocks, balanced, and P x K: what they promise, on any number of ranks and from any step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_dist.config import load_config
from lce_dist.errors import ConfigError
from lce_dist.training.plan import plan_stage
from pipelines.order import BlockOrder, EpochOrder, Order, permute, permute_each, rank_slice
from pipelines.sampling import BalancedOrder, ImagesOfClasses, PKOrder
from pipelines.stream import training_plan
from tests.unit.test_config import QUICKSTART


@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 2**63)), min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=40)
def test_permute_each_is_permute(pairs, data):
    sizes, keys, positions, truth = [], [], [], []
    for size, key in pairs:
        asked = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
        sizes += [size] * len(asked)
        keys += [key] * len(asked)
        positions += asked
        truth += permute(np.array(asked, dtype=np.int64), size, key).tolist()
    found = permute_each(np.array(positions), np.array(sizes), np.array(keys, dtype=np.uint64))
    assert found.tolist() == truth


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch=st.integers(1, 50),
    lanes=st.integers(1, 5),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=120)
def test_blocks_cover_every_epoch_exactly(sizes, batch, lanes, window, seed):
    edges = np.concatenate([[0], np.cumsum(sizes)])
    order, whole = BlockOrder(edges, batch, seed, lanes, window), EpochOrder(sum(sizes), batch, seed)
    assert order.steps_per_epoch == whole.steps_per_epoch and order.num_samples == sum(sizes)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert [len(b) for b in batches] == [len(whole.batch(step)) for step in steps]
        assert sorted(np.concatenate(batches).tolist()) == list(range(sum(sizes)))
        assert {order.epoch_of(step) for step in steps} == {epoch}


@pytest.mark.parametrize("batch", [256, 250])
def test_a_rank_reads_its_own_shards_once_an_epoch_few_at_a_time(batch: int) -> None:
    """Shards of one size (but for the last), eight lanes, windows of four: what every rank holds, and fetches."""
    shard, lanes, window = 200, 8, 4
    edges = np.append(np.arange(0, 40_000, shard), 40_003)
    order = BlockOrder(edges, batch, 5, lanes, window)
    batches = [(order.batch(step) // shard).clip(max=len(edges) - 2) for step in range(order.steps_per_epoch)]
    for ranks in (1, 2, 4, 8):
        check_locality(batches, ranks, lanes, window * shard * lanes // batch, len(edges) - 1)


def check_locality(batches: list[np.ndarray], ranks: int, lanes: int, window_steps: int, num_shards: int) -> None:
    readers: dict[int, set[int]] = {}
    for rank in range(ranks):
        seen = [set(shards[rank_slice(len(shards), rank, ranks)].tolist()) for shards in batches]
        twice = 0
        for one in set().union(*seen):
            readers.setdefault(one, set()).add(rank)
            steps = [number for number, shards in enumerate(seen) if one in shards]
            # used within two windows that follow each other, then never again; but for one that two lanes share
            twice += steps[-1] - steps[0] > 2.5 * window_steps
        assert twice <= lanes // ranks
        assert max(map(len, seen)) <= lanes // ranks * 2 * 5  # two windows of four, and what lies across their edges
        assert len(seen[0]) <= lanes // ranks * 2, "the first batch waits for a shard or two a lane"
    assert len(readers) == num_shards
    # a shard that two lanes share has two readers at most
    shared = sum(len(who) > 1 for who in readers.values())
    assert shared <= lanes and max(map(len, readers.values())) <= 2


def test_blocks_mix() -> None:
    edges = np.arange(0, 10_001, 100)
    order = BlockOrder(edges, 100, 3, 2, 4)
    first, again = order.batch(0), order.batch(order.steps_per_epoch)
    late = order.batch(50)
    assert len(set((late // 100).tolist())) >= 7 and sorted(first.tolist()) != sorted(again.tolist())
    assert BlockOrder(edges, 100, 4, 2, 4).batch(0).tolist() != first.tolist()
    assert np.array_equal(order.batch(37), BlockOrder(edges, 100, 3, 2, 4).batch(37))


CLASSES = st.lists(st.integers(1, 9), min_size=4, max_size=30)


def images_of(sizes) -> tuple[ImagesOfClasses, np.ndarray]:
    label_N = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    return ImagesOfClasses.of(label_N, len(sizes)), label_N


@given(sizes=CLASSES, batch=st.integers(2, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_balanced_takes_classes_in_turn_and_every_image_before_one_again(sizes, batch, seed):
    images, label_N = images_of(sizes)
    order = BalancedOrder(images, batch, seed)
    rounds = 2 * max(sizes) + 1
    steps = -(-rounds * len(sizes) // batch)
    drawn = np.concatenate([order.batch(step) for step in range(steps)])[: rounds * len(sizes)]
    assert all(len(order.batch(step)) == batch for step in range(2))
    for number in range(rounds):
        assert sorted(label_N[drawn[number * len(sizes) : (number + 1) * len(sizes)]]) == list(range(len(sizes)))
    for label, size in enumerate(sizes):
        of_class = drawn[label_N[drawn] == label].tolist()
        for first in range(0, len(of_class) - size + 1, size):
            assert len(set(of_class[first : first + size])) == size


@given(sizes=CLASSES, identities=st.integers(1, 4), per_identity=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_p_identities_with_k_images(sizes, identities, per_identity, seed):
    images, label_N = images_of(sizes)
    order = PKOrder(images, identities * per_identity, seed, per_identity)
    seen = [0] * len(sizes)
    for step in range(40):
        batch = order.batch(step).reshape(identities, per_identity)
        labels = label_N[batch]
        assert (labels == labels[:, :1]).all() and len(set(labels[:, 0].tolist())) == identities
        for label, row in zip(labels[:, 0].tolist(), batch.tolist(), strict=True):
            seen[label] += 1
            counts = np.unique(row, return_counts=True)[1]
            assert len(counts) == min(per_identity, sizes[label]) and counts.max() - counts.min() <= 1
    if 40 * identities >= 6 * len(sizes):
        assert min(seen) >= 1


@pytest.mark.parametrize("kind", ["blocks", "balanced", "pk"])
def test_any_number_of_ranks_from_any_step(kind):
    images, _ = images_of([3, 5, 9, 4, 7, 8, 6, 5] * 5)
    samples = len(images.position_N)
    order = {
        "blocks": BlockOrder(np.append(np.arange(0, samples, 10), samples), 24, 7, 3, 3),
        "balanced": BalancedOrder(images, 24, 7),
        "pk": PKOrder(images, 24, 7, 4),
    }[kind]
    steps = 2 * order.steps_per_epoch + 3
    whole = [order.batch(step).tolist() for step in range(steps)]
    for ranks, first in itertools.product((1, 2, 3), (0, 5)):
        plans = [list(training_plan(order, rank, ranks, first, steps)) for rank in range(ranks)]
        assert {len(plan) for plan in plans} == {steps - first}
        for number, step in enumerate(range(first, steps)):
            parts = [plan[number].positions for plan in plans]
            assert np.concatenate(parts).tolist() == whole[step]
            assert [len(part) for part in parts] == list(plans[0][number].rows_per_rank)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert rank_slice(24, 0, 3) == slice(0, 8)


KINDS = ("epoch", "blocks", "balanced", "pk")


@st.composite
def orders(draw, kind: str) -> tuple[Order, np.ndarray, int]:
    """An order of that kind over a few classes, each sample's class, and its global batch."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=12))
    images, label_N = images_of(sizes)
    batch, seed, samples = draw(st.integers(1, 64)), draw(st.integers(0, 2**31)), len(label_N)
    if kind == "epoch":
        return EpochOrder(samples, batch, seed), label_N, batch
    if kind == "blocks":
        inner = draw(st.sets(st.integers(1, samples - 1), max_size=8))
        edges = np.array([0, *sorted(inner), samples])
        return BlockOrder(edges, batch, seed, draw(st.integers(1, 9)), draw(st.integers(1, 5))), label_N, batch
    if kind == "balanced":
        return BalancedOrder(images, batch, seed), label_N, batch
    per_identity = draw(st.integers(1, 5))
    batch = per_identity * draw(st.integers(1, len(sizes)))
    return PKOrder(images, batch, seed, per_identity), label_N, batch


def of_ranks(order: Order, ranks: int, first: int, last: int) -> list[list[np.ndarray]]:
    """What each rank gets in each step: (steps, ranks)."""
    plans = [list(training_plan(order, rank, ranks, first, last)) for rank in range(ranks)]
    assert {len(plan) for plan in plans} == {last - first}, "all ranks take the same steps"
    for step in zip(*plans, strict=True):
        assert {(one.epoch, one.rows_per_rank) for one in step} == {(step[0].epoch, step[0].rows_per_rank)}
        assert tuple(len(one.positions) for one in step) == step[0].rows_per_rank
    return [[one.positions for one in step] for step in zip(*plans, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), ranks=st.integers(1, 16), others=st.integers(1, 16))
@settings(deadline=None, max_examples=40)
def test_ranks_of_any_number_share_each_epoch_exactly_and_any_other_number_goes_on(kind, data, ranks, others):
    order, label_N, batch = data.draw(orders(kind))
    epoch, samples = order.steps_per_epoch, len(label_N)
    cut = data.draw(st.integers(0, 2 * epoch))
    steps = [*of_ranks(order, ranks, 0, cut), *of_ranks(order, others, cut, 2 * epoch)]
    for step in steps:
        sizes = [len(part) for part in step]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) == sum(sizes) // len(sizes), "no rank waits for rows"
    whole = [np.concatenate(step) for step in steps]
    assert all(step.tolist() == order.batch(number).tolist() for number, step in enumerate(whole))
    drawn = [np.concatenate(whole[at : at + epoch]) for at in (0, epoch)]
    if kind in ("epoch", "blocks"):
        assert all(sorted(one.tolist()) == list(range(samples)) for one in drawn)
        return
    assert {len(step) for step in whole} == {batch}
    both = label_N[np.concatenate(drawn)]
    num_classes = int(label_N.max()) + 1
    if kind == "balanced":  # every class in its turn, and every image of it before one again
        counts = np.bincount(both, minlength=num_classes)
        assert counts.max() - counts.min() <= 1
        times = np.bincount(np.concatenate(drawn), minlength=samples)
        for label in range(num_classes):
            assert np.ptp(times[label_N == label]) <= 1
        return
    identities = batch // order.images_per_identity
    for first in range(0, len(whole), num_classes // identities):  # a round: nobody twice
        people = label_N[np.concatenate(whole[first : first + num_classes // identities])]
        assert set(np.unique(people, return_counts=True)[1].tolist()) == {order.images_per_identity}


QUICK = load_config(QUICKSTART)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), ranks=st.integers(1, 16))
@settings(deadline=None, max_examples=60)
def test_a_batch_that_would_starve_a_rank_is_refused_before_the_run(kind, data, ranks):
    """Fewer rows than ranks, rows that do not divide, fewer than two a rank in the smallest batch of an epoch."""
    order, label_N, batch = data.draw(orders(kind))
    config = QUICK.model_copy(update={"optim": QUICK.optim.model_copy(update={"global_batch": batch})})
    smallest = len(label_N) // order.steps_per_epoch
    try:
        plan = plan_stage(config, len(label_N), 2, 1.0, ranks)
    except ConfigError as error:
        if batch < ranks or batch % ranks:
            assert f"optim.global_batch is {batch}; must be a multiple of ranks" in str(error)
        else:
            assert smallest // ranks < 2 and f"leaves {smallest // ranks} images a micro-batch" in str(error)
        return
    assert batch >= 2 * ranks and plan.steps_per_epoch == order.steps_per_epoch
    for step in of_ranks(order, ranks, 0, order.steps_per_epoch):
        assert min(len(part) for part in step) >= 2


def test_a_billion_samples_take_no_memory():
    order = BlockOrder(np.arange(0, 10**9 + 1, 100_000), 4096, 1, 8, 4)
    batch = order.batch(123_456)
    assert len(batch) in (4095, 4096) and len(set((batch // 100_000).tolist())) <= 8 * 2 * 5
    assert len(np.unique(batch)) == len(batch)
