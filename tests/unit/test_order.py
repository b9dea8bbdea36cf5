"""The order against a permutation in plain Python integers, and the promises that elastic training rests on."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import EpochOrder, derive_key, hash_ids, mix64, permute, rank_rows, rank_slice

WORD = 2**64


def slow_mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % WORD
    return value ^ (value >> 31)


def slow_permute(position: int, num_samples: int, key: int) -> int:
    half_bits = 1
    while 4**half_bits < num_samples:
        half_bits += 1
    half = 2**half_bits
    while True:
        left, right = divmod(position, half)
        for number in range(8):
            left, right = right, left ^ (slow_mix(right ^ slow_mix(key ^ number)) % half)
        position = left * half + right
        if position < num_samples:
            return position


def test_mix64_is_splitmix64() -> None:
    # The first outputs of splitmix64 from seed 1234567, as published with the reference C code.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = [(1234567 + index * 0x9E3779B97F4A7C15) % WORD for index in range(4)]
    assert mix64(np.array(states, dtype=np.uint64)).tolist() == published


@settings(deadline=None)
@given(st.integers(1, 2**40), st.integers(0, WORD - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_permute_equals_its_twin_in_python_integers(num_samples: int, key: int, raw: list[int]) -> None:
    positions = [value % num_samples for value in raw]
    got = permute(np.array(positions, dtype=np.int64), num_samples, key).tolist()
    assert got == [slow_permute(position, num_samples, key) for position in positions]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, WORD - 1))
def test_permute_is_a_bijection(num_samples: int, key: int) -> None:
    image = permute(np.arange(num_samples, dtype=np.int64), num_samples, key)
    assert sorted(image.tolist()) == list(range(num_samples))


def test_permute_is_even_over_keys() -> None:
    """Each of 6 positions lands on each of 6 places about equally often (chi-square, 25 degrees of freedom)."""
    num_keys = 4000
    counts = np.zeros((6, 6))
    for key in range(num_keys):
        counts[np.arange(6), permute(np.arange(6, dtype=np.int64), 6, derive_key(key))] += 1
    chi_square = float((np.square(counts - num_keys / 6) / (num_keys / 6)).sum())
    assert chi_square < 60.1  # the 99.99 % point


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 90), st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_every_epoch_covers_every_sample_once(num_samples: int, global_batch: int, seed: int, epoch: int) -> None:
    order = EpochOrder(num_samples, global_batch, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.batch(step) for step in steps]
    assert {order.epoch_of(step) for step in steps} == {epoch}
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_samples))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1 and max(sizes) <= global_batch
    assert len(batches) == (num_samples + global_batch - 1) // global_batch


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 70))
def test_ranks_together_are_the_global_batch(num_rows: int, num_ranks: int) -> None:
    rows = np.arange(num_rows)
    parts = [rows[rank_slice(num_rows, rank, num_ranks)] for rank in range(num_ranks)]
    assert np.concatenate(parts).tolist() == rows.tolist()
    counts = rank_rows(num_rows, num_ranks)
    assert counts == tuple(len(part) for part in parts)
    assert max(counts) - min(counts) <= 1


def test_epochs_seeds_and_sizes_give_different_orders() -> None:
    base = EpochOrder(1000, 1000, seed=1)
    others = [base.batch(1), EpochOrder(1000, 1000, seed=2).batch(0), permute(base.batch(0), 1000, 5)]
    for other in others:
        assert (base.batch(0) == other).mean() < 0.02  # about one fixed point is chance
    assert base.batch(0).tolist() == EpochOrder(1000, 1000, seed=1).batch(0).tolist()


def test_the_order_never_changes() -> None:
    """Golden: an order that moved would silently break every resume across versions."""
    assert EpochOrder(10, 4, seed=7).batch(0).tolist() == GOLDEN_FIRST_BATCH
    assert hash_ids(EpochOrder(100_003, 512, seed=1).batch(1234)) == GOLDEN_HASH


def test_hash_ids_by_hand() -> None:
    ids = [3, 2**40, 0]
    expected = hashlib.blake2b(struct.pack("<3q", *ids), digest_size=8).hexdigest()
    assert hash_ids(np.array(ids)) == expected
    assert len(expected) == 16
    assert hash_ids(np.array(ids[::-1])) != expected
    assert hash_ids(np.array(ids * 2)[::2]) == hash_ids(np.array([3, 0, 2**40]))


@pytest.mark.parametrize("num_samples", [2**40 - 1, 2**40])
def test_large_sets_need_no_large_memory(num_samples: int) -> None:
    batch = EpochOrder(num_samples, 512, seed=3).batch(12345)
    assert len(set(batch.tolist())) == len(batch) == 512
    assert batch.min() >= 0 and batch.max() < num_samples


GOLDEN_FIRST_BATCH = [4, 2, 7]
GOLDEN_HASH = "fe235b60a27ba364"
