"""The order of the samples is arithmetic: a function of seed, epoch and data set size, never of the number of ranks.

Batch k of an epoch is the same set of samples on 1, 3 or 64 ranks, and resuming is a step number.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

NUM_ROUNDS = 8  # small domains mix slowly: a 2 x 2-bit Feistel network still looks skewed after 4 rounds


def mix64(values: UInt64Array) -> UInt64Array:
    """Spread 64-bit numbers over 64 bits: a bijection whose output bits each depend on all input bits.

    **Source**: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014; constants by D. Stafford, "Mix13").
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*numbers: int) -> int:
    """One 64-bit key from whole numbers in [-2**63, 2**63); another tuple gives an unrelated key."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def permute(positions: Int64Array, num_samples: int, key: int) -> Int64Array:
    """Map positions in [0, num_samples) through a keyed bijection of that range; same shape.

    A Feistel network on the smallest even number of bits that holds the range; what falls outside
    walks on until it is back inside (fewer than 4 passes on average). For num_samples up to 2**62.
    **Memory**: a few arrays of the size of ``positions``, whatever num_samples is.
    **Source**: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3.
    """
    half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    round_keys = mix64(np.uint64(key) ^ np.arange(NUM_ROUNDS, dtype=np.uint64))
    walked = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(walked >= num_samples)
    while outside.size:
        walked[outside] = _feistel(walked[outside], half_bits, round_keys)
        outside = outside[walked[outside] >= num_samples]
    return walked.astype(np.int64)


def permute_each(positions: Int64Array, sizes: Int64Array, keys: UInt64Array) -> Int64Array:
    """``permute`` of each position in a range and by a key of its own; all of one shape."""
    half_bits = np.maximum(1, (_bit_length(sizes - 1) + 1) // 2).astype(np.uint64)
    round_keys = [mix64(keys ^ np.uint64(number)) for number in range(NUM_ROUNDS)]
    walked = _feistel_each(positions.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(walked >= sizes.astype(np.uint64))
    while outside.size:
        again = [keys_of_round[outside] for keys_of_round in round_keys]
        walked[outside] = _feistel_each(walked[outside], half_bits[outside], again)
        outside = outside[walked[outside] >= sizes[outside].astype(np.uint64)]
    return walked.astype(np.int64)


def _bit_length(values: Int64Array) -> Int64Array:
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)  # exact below 2**53


def _feistel_each(values: UInt64Array, half_bits: UInt64Array, round_keys: list[UInt64Array]) -> UInt64Array:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right ^ round_key) & mask)
    return (left << half_bits) | right


def _feistel(values: UInt64Array, half_bits: int, round_keys: UInt64Array) -> UInt64Array:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (mix64(right ^ round_key) & mask)
    return (left << shift) | right


@dataclass(frozen=True)
class EpochOrder:
    """Which samples make global batch ``step``; steps are counted from 0 over the whole run.

    Every epoch holds every sample exactly once, in batches whose sizes differ by at most one row.
    """

    num_samples: int
    global_batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """The epoch that global batch ``step`` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Int64Array:
        """The (G,) sample positions of global batch ``step``, G at most ``global_batch``."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.num_samples // self.steps_per_epoch
        end = (index + 1) * self.num_samples // self.steps_per_epoch
        key = derive_key(self.seed, epoch, self.num_samples)
        return permute(np.arange(first, end, dtype=np.int64), self.num_samples, key)


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """An epoch whose reading is local: blocks (shards) in random order, dealt to lanes, ``window`` of them mixed at a time.

    The blocks in their order are one line of samples, cut into ``lanes`` parts; each lane gives every batch its share, a lane
    after the other, cut as ``rank_slice`` cuts: where the ranks divide the lanes, a rank reads its own lanes alone, and of as many
    machines each reads its own part of the data once an epoch. A lane mixes its samples within windows, the first of one
    block, each next one twice as long, up to ``window`` blocks: an epoch begins when a block a lane is there.
    edge_K (K + 1,): where blocks begin, and the end. Every epoch holds every sample exactly once, in the batches of
    :class:`EpochOrder`'s sizes, on any number of ranks. **Memory**: 40 bytes a block.
    """

    edge_K: Int64Array
    global_batch: int
    seed: int
    lanes: int
    window: int

    @property
    def num_samples(self) -> int:
        return int(self.edge_K[-1])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.global_batch)

    def epoch_of(self, step: int) -> int:
        """The epoch that global batch ``step`` belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Int64Array:
        """The (G,) sample positions of global batch ``step``, G at most ``global_batch``."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.num_samples // self.steps_per_epoch
        end = (index + 1) * self.num_samples // self.steps_per_epoch
        line = self._line(epoch)
        ends = self._lane_ends(index + 1)
        starts, sizes = self._lane_ends(index), self._lane_ends(self.steps_per_epoch)
        before = np.concatenate([[0], np.cumsum(sizes)])
        lanes = [lane for lane in range(self.lanes) if starts[lane] < ends[lane]]
        assert int((ends - starts).sum()) == end - first
        return np.concatenate(
            [
                self._of_lane(
                    epoch, lane, (int(starts[lane]), int(ends[lane])), int(sizes[lane]), int(before[lane]), line
                )
                for lane in lanes
            ]
        )

    def _lane_ends(self, num_batches: int) -> Int64Array:
        """How many samples each lane has given after the first batches of an epoch."""
        small = self.num_samples // self.steps_per_epoch
        given = num_batches * self.num_samples // self.steps_per_epoch
        num_large = given - num_batches * small  # batches of one row more
        cuts = np.arange(self.lanes + 1, dtype=np.int64)
        small_share, large_share = (np.diff(cuts * rows // self.lanes) for rows in (small, small + 1))
        shares: Int64Array = (num_batches - num_large) * small_share + num_large * large_share
        return shares

    def _of_lane(
        self, epoch: int, lane: int, part: tuple[int, int], size: int, start: int, line: tuple[Int64Array, Int64Array]
    ) -> Int64Array:
        """Samples of a lane in its own order; the lane has ``size`` of them from place ``start`` of the line on."""
        low, high = part
        edges = self._windows
        mixed = np.empty(high - low, dtype=np.int64)
        at = low
        while at < high:
            number = int(np.searchsorted(edges, at, side="right")) - 1
            opened = int(edges[number])
            closed = min(int(edges[number + 1]), size)
            turns = np.arange(at - opened, min(high, closed) - opened, dtype=np.int64)
            key = derive_key(self.seed, epoch, lane, opened, self.num_samples)
            mixed[at - low : at - low + len(turns)] = opened + permute(turns, closed - opened, key)
            at += len(turns)
        block_K, start_K = line
        place = np.searchsorted(start_K, start + mixed, side="right") - 1
        positions: Int64Array = self.edge_K[block_K[place]] + start + mixed - start_K[place]
        return positions

    @functools.cached_property
    def _windows(self) -> Int64Array:
        """Where the windows of a lane begin."""
        mean_block = max(1, self.num_samples // (len(self.edge_K) - 1))
        edges, blocks, longest = [0], 1, int(self._lane_ends(self.steps_per_epoch).max())
        while edges[-1] < longest:
            edges.append(edges[-1] + blocks * mean_block)
            blocks = min(2 * blocks, self.window)
        return np.array(edges, dtype=np.int64)

    def _line(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The blocks in their order, and where each begins on the line; one more for its end."""
        if self._lines.get("epoch") != epoch:
            num_blocks = len(self.edge_K) - 1
            key = derive_key(self.seed, epoch, -1, self.num_samples)
            block_K = permute(np.arange(num_blocks, dtype=np.int64), num_blocks, key)
            start_K = np.concatenate([[0], np.cumsum(np.diff(self.edge_K)[block_K])]).astype(np.int64)
            self._lines.update(epoch=epoch, line=(block_K, start_K))
        line: tuple[Int64Array, Int64Array] = self._lines["line"]
        return line

    @functools.cached_property
    def _lines(self) -> dict[str, Any]:
        return {}


class Order(Protocol):
    """Which samples make global batch ``step``, a function of the step alone."""

    @property
    def steps_per_epoch(self) -> int: ...
    def epoch_of(self, step: int) -> int: ...
    def batch(self, step: int) -> Int64Array: ...


def rank_slice(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows that ``rank`` takes of ``num_rows``; the slices of all ranks cover them once, in order."""
    return slice(rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks)


def rank_rows(num_rows: int, num_ranks: int) -> tuple[int, ...]:
    """How many of ``num_rows`` each rank takes; counts differ by at most one."""
    slices = (rank_slice(num_rows, rank, num_ranks) for rank in range(num_ranks))
    return tuple(part.stop - part.start for part in slices)


def hash_ids(ids: Int64Array) -> str:
    """16 hex digits over sample ids in their order, to compare what two runs consumed."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<i8").tobytes(), digest_size=8).hexdigest()
