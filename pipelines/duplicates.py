"""The same image twice: exactly, by a hash of its bytes, and nearly, by a 64-bit hash of what it looks like.

Near duplicates are found by parts of the hash that agree, not by comparing all pairs, and confirmed by their pixels:
aligned faces look alike, so that a hash alone would accuse too many.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.order import Int64Array, UInt64Array

# Of 300 drawn faces, 95 % of copies at JPEG quality 20, half the size or 15 % brighter stay within both; of all pairs of
# 2,000 faces that are no copies, 52 were within the distance and none correlated above 0.94.
MAX_DISTANCE = 4  # bits of 64 in which near duplicates may differ
MIN_CORRELATION = 0.975  # of their thumbnails
THUMBNAIL = 32  # pixels a side

_AGREEING_PARTS = 3  # of a hash, by which many rows are sorted; few are by one
_SMALL = 1 << 14
_LONGEST_RUN = 4096  # of equal hashes (flat images) in which each is compared with all that follow
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Hashes:
    """(N, 2) exact hashes, (N,) looks, and (N,) whether the image could be decoded, in which case it has looks."""

    exact_N2: UInt64Array
    looks_N: UInt64Array
    decoded_N: npt.NDArray[np.bool_]

    @classmethod
    def empty(cls, num: int) -> Hashes:
        return cls(np.zeros((num, 2), dtype=np.uint64), np.zeros(num, dtype=np.uint64), np.zeros(num, dtype=bool))

    def put(
        self, samples: Int64Array, exact_n2: UInt64Array, looks_n: UInt64Array, decoded_n: npt.NDArray[np.bool_]
    ) -> None:
        """Write the hashes of some samples into their places."""
        self.exact_N2[samples], self.looks_N[samples], self.decoded_N[samples] = exact_n2, looks_n, decoded_n


def exact_hash(payload: bytes) -> tuple[int, int]:
    """Two halves of 128 bits over the image's bytes."""
    digest = hashlib.blake2b(payload, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def grey(image: Image.Image) -> Image.Image:
    """The image as 8-bit grey of at least 64 pixels a side; a JPEG is decoded at a fraction of its size."""
    image.draft("L", (2 * THUMBNAIL, 2 * THUMBNAIL))
    return image.convert("L")


def looks_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than its right neighbour (dHash).

    **Source**: N. Krawetz, "Kind of like that", hackerfactor.com, 2013.
    """
    pixels = np.asarray(grey(image).resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(payload: bytes) -> npt.NDArray[np.float32]:
    """(THUMBNAIL**2,) grey values with mean 0 and length 1 (all 0 for a flat image). Errors: OSError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(payload)) as image:
            small = grey(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small).astype(np.float32).ravel()
    values -= values.mean()
    length = float(np.linalg.norm(values))
    return values / np.float32(length) if length > 1e-3 else np.zeros_like(values)


def same_groups(exact_N2: UInt64Array) -> list[Int64Array]:
    """Groups, of two or more and rising, of rows that are equal; ordered by their first."""
    if len(exact_N2) < 2:
        return []
    order = np.lexsort((np.arange(len(exact_N2)), exact_N2[:, 1], exact_N2[:, 0]))
    rows = exact_N2[order]
    starts = np.flatnonzero(np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1))))
    ends = np.append(starts[1:], len(rows))
    groups = [order[start:end].astype(np.int64) for start, end in zip(starts, ends, strict=True) if end - start > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def num_bits(values: UInt64Array) -> npt.NDArray[np.uint8]:
    """How many bits of each value are set."""
    pairs = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + ((pairs >> np.uint64(2)) & np.uint64(0x3333333333333333))
    bytes_of = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((bytes_of * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def near_pairs(
    looks_N: UInt64Array, max_distance: int = MAX_DISTANCE, progress: Callable[[int, int], None] | None = None
) -> Int64Array:
    """(P, 2) pairs i < j, in order, whose hashes differ in at most ``max_distance`` bits.

    The same as of trying all pairs, but for runs of more than 4,096 rows whose parts agree.

    The 64 bits are cut into parts; of ``max_distance + m`` parts, m agree. Rows are sorted by every choice of m parts and
    compared within runs of equals. **Memory**: 150 bytes a row, and the pairs.
    **Source**: Manku, Jain, Das Sarma, "Detecting near-duplicates for web crawling", WWW 2007, section 3.
    """
    num = len(looks_N)
    agreeing = 1 if num < _SMALL else _AGREEING_PARTS
    cuts = np.linspace(0, 64, max_distance + agreeing + 1).astype(int)
    masks = [((1 << int(high)) - 1) ^ ((1 << int(low)) - 1) for low, high in itertools.pairwise(cuts)]
    choices = list(itertools.combinations(masks, agreeing))
    found = [np.zeros((0, 2), dtype=np.int64)]
    for done, choice in enumerate(choices):
        keys = looks_N & np.uint64(sum(choice))
        order = np.argsort(keys, kind="stable")
        for left, right in _pairs_of_equals(keys[order]):
            i, j = order[left], order[right]
            near = num_bits(looks_N[i] ^ looks_N[j]) <= max_distance
            found.append(np.stack((i[near], j[near]), axis=1))
        found = [np.unique(np.sort(np.concatenate(found), axis=1), axis=0)]
        if progress is not None:
            progress(done + 1, len(choices))
    return found[0]


def alike_pairs(looks_N: UInt64Array, progress: Callable[[int, int], None] | None = None) -> Int64Array:
    """(P, 2) pairs i < j, in order, that are worth looking at: rows that are near, and of many equal ones each with the first.

    Equal hashes, as of flat images, would otherwise make as many pairs as there are pairs of them.
    """
    values, first, place_N = np.unique(looks_N, return_index=True, return_inverse=True)
    near = first[near_pairs(values, progress=progress)].reshape(-1, 2)
    later = np.flatnonzero(first[place_N] != np.arange(len(looks_N)))
    equal = np.stack((first[place_N[later]], later), axis=1)
    return np.unique(np.sort(np.concatenate((near, equal)), axis=1), axis=0).astype(np.int64)


def _pairs_of_equals(sorted_keys: UInt64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Positions of all pairs of equal keys, a bounded number at a time: neighbours, then those two apart, and so on."""
    left = np.arange(len(sorted_keys) - 1, dtype=np.int64) if len(sorted_keys) else np.zeros(0, dtype=np.int64)
    for apart in range(1, _LONGEST_RUN):
        left = left[left + apart < len(sorted_keys)]
        left = left[sorted_keys[left] == sorted_keys[left + apart]]
        if not left.size:
            return
        for first in range(0, len(left), _PAIRS_AT_ONCE):
            part = left[first : first + _PAIRS_AT_ONCE]
            yield part, part + apart


def confirmed(
    pairs_P2: Int64Array,
    read: Callable[[int], bytes],
    min_correlation: float = MIN_CORRELATION,
    progress: Callable[[int, int], None] | None = None,
) -> Int64Array:
    """The pairs whose thumbnails correlate at least so much; two flat images count as alike."""
    kept = np.zeros(len(pairs_P2), dtype=bool)
    known: dict[int, npt.NDArray[np.float32]] = {}
    for number, (one, other) in enumerate(pairs_P2.tolist()):
        if len(known) > _SMALL:
            known.clear()
        for sample in (one, other):
            if sample not in known:
                known[sample] = thumbnail(read(sample))
        left, right = known[one], known[other]
        flat = not left.any(), not right.any()
        kept[number] = all(flat) if any(flat) else float(left @ right) >= min_correlation
        if progress is not None:
            progress(number + 1, len(pairs_P2))
    return pairs_P2[kept]
