"""Duplicates: groups and near pairs equal the slow way; copies of a face are found and other faces are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

import pipelines.duplicates as duplicates
from lce_dist.config import SyntheticConfig
from pipelines.duplicates import (
    alike_pairs,
    confirmed,
    exact_hash,
    looks_hash,
    near_pairs,
    num_bits,
    same_groups,
    thumbnail,
)
from pipelines.synthetic import photos

HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=0, max_size=12)


def slow_pairs(values: list[int], bound: int) -> list[list[int]]:
    pairs = ([i, j] for i in range(len(values)) for j in range(i + 1, len(values)))
    return [pair for pair in pairs if (values[pair[0]] ^ values[pair[1]]).bit_count() <= bound]


@settings(max_examples=80, deadline=None)
@given(HASHES, st.lists(st.lists(st.integers(0, 63), max_size=6), max_size=12), st.integers(0, 6), st.booleans())
def test_near_pairs_are_those_of_all_pairs(values: list[int], flips: list[list[int]], bound: int, many: bool) -> None:
    """Some values come again with bits turned, so that there are pairs to find."""
    for value, bits in zip(list(values), flips, strict=False):
        for bit in bits:
            value ^= 1 << bit
        values.append(value)
    before = duplicates._SMALL
    duplicates._SMALL = 0 if many else before  # the way of large sets
    try:
        found = near_pairs(np.array(values, dtype=np.uint64), bound)
    finally:
        duplicates._SMALL = before
    assert found.tolist() == slow_pairs(values, bound)


@given(st.lists(st.sampled_from((0, 1, 3, 2**40, 2**40 + 1, 2**64 - 1)), max_size=14))
def test_alike_pairs_are_near_pairs_and_reach_every_row_that_has_one(values: list[int]) -> None:
    near = slow_pairs(values, duplicates.MAX_DISTANCE)
    found = alike_pairs(np.array(values, dtype=np.uint64)).tolist()
    assert found == sorted(found) and all(pair in near for pair in found)
    assert {row for pair in found for row in pair} == {row for pair in near for row in pair}
    assert len(found) <= len(values) + 15  # not all pairs of equals


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_num_bits(values: list[int]) -> None:
    assert num_bits(np.array(values, dtype=np.uint64)).tolist() == [value.bit_count() for value in values]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=20))
def test_same_groups(rows: list[tuple[int, int]]) -> None:
    exact = np.array(rows, dtype=np.uint64).reshape(-1, 2)
    slow: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        slow.setdefault(row, []).append(number)
    assert [group.tolist() for group in same_groups(exact)] == [one for one in slow.values() if len(one) > 1]


def test_exact_hashes_differ() -> None:
    assert exact_hash(b"a") == exact_hash(b"a") != exact_hash(b"b")


@pytest.fixture(scope="module")
def faces() -> list[bytes]:
    config = SyntheticConfig(identities=20, photos_per_identity=4, photo_size=96)
    return [jpeg for _, _, jpeg in photos(config, num_processes=1)]


def again(image: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def looks(payloads: list[bytes]) -> np.ndarray:
    return np.array([looks_hash(Image.open(io.BytesIO(payload))) for payload in payloads], dtype=np.uint64)


def test_copies_of_faces_are_found_and_others_are_not(faces: list[bytes]) -> None:
    copies = []
    for number, payload in enumerate(faces):
        image = Image.open(io.BytesIO(payload)).convert("RGB")
        changed = (
            lambda image: again(image, 40),
            lambda image: again(image.resize((64, 64), Image.Resampling.BICUBIC), 90),
            lambda image: again(ImageEnhance.Brightness(image).enhance(1.1), 90),
            lambda image: again(image.convert("L"), 90),
        )
        copies.append(changed[number % 4](image))
    payloads = faces + copies
    pairs = near_pairs(looks(payloads))
    sure = confirmed(pairs, lambda sample: payloads[sample])
    found = {tuple(pair) for pair in sure.tolist()}
    wanted = {(number, number + len(faces)) for number in range(len(faces))}
    assert found <= wanted  # nobody is accused
    assert len(found) >= 0.9 * len(wanted)


def test_flat_images_are_alike_and_like_nothing_else(faces: list[bytes]) -> None:
    flat = [again(Image.new("RGB", (96, 96), (shade, shade, shade)), 90) for shade in (20, 200)]
    assert not thumbnail(flat[0]).any()
    payloads = [*flat, faces[0]]
    pairs = np.array([[0, 1], [0, 2]])
    assert confirmed(pairs, lambda sample: payloads[sample]).tolist() == [[0, 1]]
