"""The embedded faces: the same bytes however they are drawn, identities that can be told apart, honest shapes."""

from __future__ import annotations

import io
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image

from lce_dist.config import SyntheticConfig
from lce_dist.errors import ConfigError, DataError
from pipelines.contact_sheet import contact_sheet
from pipelines.synthetic import FaceIdentity, draw_photo, identity_key, identity_of, photos

SMALL = SyntheticConfig(identities=9, photos_per_identity=3, photo_size=32, difficulty=0.5, seed=7)


def _nearest_is_same_person(difficulty: float) -> float:
    """Share of photos whose nearest other photo, by pixels, shows the same one of 20 people."""
    people, shots = 20, 3
    rows = [draw_photo(3, i, p, 48, difficulty).ravel() for i in range(people) for p in range(shots)]
    pixels = np.stack(rows).astype(np.float64)
    person = np.repeat(np.arange(people), shots)
    square = (pixels**2).sum(axis=1)
    distance = square[:, None] + square[None, :] - 2.0 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    return float((person[distance.argmin(axis=1)] == person).mean())


def test_photo_is_the_same_alone_and_in_any_order() -> None:
    wanted = [(i, p) for i in range(4) for p in range(3)]
    forward = {key: draw_photo(5, *key, 40, 0.8) for key in wanted}
    backward = {key: draw_photo(5, *key, 40, 0.8) for key in reversed(wanted)}
    for key in wanted:
        assert np.array_equal(forward[key], backward[key])


def test_every_part_of_the_key_changes_the_photo() -> None:
    first = draw_photo(1, 0, 0, 48, 0.5)
    for other in (draw_photo(2, 0, 0, 48, 0.5), draw_photo(1, 1, 0, 48, 0.5), draw_photo(1, 0, 1, 48, 0.5)):
        assert np.abs(first.astype(int) - other).mean() > 5.0
    assert not np.array_equal(first, draw_photo(1, 0, 0, 48, 0.6))


def test_order_and_bytes_do_not_depend_on_the_number_of_processes() -> None:
    inline = list(photos(SMALL, 1))
    pooled = list(photos(SMALL, 2))
    assert inline == pooled
    assert [(key, name) for key, name, _ in inline] == [
        (f"face-{i:06d}", f"{p:04d}.jpg") for i in range(9) for p in range(3)
    ]


def test_leaving_the_iterator_early_ends_the_pool() -> None:
    stream = photos(SMALL, 2)
    first = next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert first == next(photos(SMALL, 1))


def test_jpegs_decode_to_the_size_and_to_the_drawing() -> None:
    for number, (key, _, jpeg) in enumerate(photos(SMALL, 1)):
        identity, photo = divmod(number, 3)
        assert key == identity_key(identity)
        with Image.open(io.BytesIO(jpeg)) as picture:
            assert picture.format == "JPEG"
            assert picture.mode == "RGB"
            assert picture.size == (32, 32)
            decoded = np.asarray(picture).astype(int)
        drawn = draw_photo(7, identity, photo, 32, 0.5)
        assert np.abs(decoded - drawn).mean() < 20.0


@pytest.mark.parametrize("size", [32, 65, 160])
@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_shape_type_and_range(size: int, difficulty: float) -> None:
    photo = draw_photo(1, 3, 1, size, difficulty)
    assert photo.shape == (size, size, 3)
    assert photo.dtype == np.uint8
    assert photo.std() > 10.0


def test_a_photo_shows_the_same_scene_at_every_size() -> None:
    # The grain is drawn per pixel, so both are compared after averaging it away.
    small = np.asarray(Image.fromarray(draw_photo(1, 2, 5, 64, 0.5)).reduce(8), dtype=float)
    large = np.asarray(Image.fromarray(draw_photo(1, 2, 5, 256, 0.5)).reduce(32), dtype=float)
    assert np.abs(small - large).mean() < 4.0


def test_identity_traits_are_continuous_and_differ() -> None:
    people = [identity_of(1, n) for n in range(200)]
    assert identity_of(1, 17) == people[17]
    assert identity_of(2, 17) != people[17]
    for trait in fields(FaceIdentity):
        if "spread" not in trait.metadata:
            continue
        values = np.array([getattr(person, trait.name) for person in people])
        centre, spread = trait.metadata["centre"], trait.metadata["spread"]
        assert len(np.unique(values)) == 200
        assert abs(values.mean() - centre) < 5.0 * spread / np.sqrt(200)
        assert 0.8 * spread < values.std() < 1.2 * spread
        assert np.abs(values - centre).max() <= 2.0 * np.sqrt(3.0) * spread


def test_easy_photos_of_one_person_are_nearest_to_each_other() -> None:
    assert _nearest_is_same_person(0.0) > 0.9
    assert _nearest_is_same_person(0.7) < 0.5  # and pixels alone must not do for hard ones


def test_difficulty_moves_photos_of_one_person_apart() -> None:
    def spread(difficulty: float) -> float:
        shots = np.stack([draw_photo(1, 4, p, 48, difficulty) for p in range(6)]).astype(np.float64)
        return float(shots.std(axis=0).mean())

    spreads = [spread(difficulty) for difficulty in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert spreads == sorted(spreads)
    assert spreads[0] < 5.0 < 30.0 < spreads[-1]


def test_difficulty_zero_photos_differ_only_by_grain() -> None:
    first, second = (draw_photo(1, 0, p, 64, 0.0).astype(int) for p in (0, 1))
    assert not np.array_equal(first, second)
    assert abs((first - second).mean()) < 0.5
    assert np.abs(first - second).max() < 40


def test_no_process_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="num_processes is 0; must be 1"):
        photos(SMALL, 0)


def test_contact_sheet_shows_every_photo_in_its_place() -> None:
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    flat = {name: np.full((10, 10, 3), colour, np.uint8) for name, colour in colours.items()}
    sheet = np.asarray(contact_sheet([("a", [flat["red"], flat["green"]]), ("b", [flat["blue"]])], 20, "title"))
    where = {name: np.argwhere((sheet == colour).all(axis=2)) for name, colour in colours.items()}
    for pixels in where.values():
        assert len(pixels) == 400
        assert (pixels.max(axis=0) - pixels.min(axis=0)).tolist() == [19, 19]
    assert where["red"][0][0] == where["green"][0][0] < where["blue"][0][0]
    assert where["red"][0][1] == where["blue"][0][1] < where["green"][0][1]


def test_contact_sheet_keeps_the_shape_of_a_photo() -> None:
    wide = np.full((10, 40, 3), (255, 0, 0), np.uint8)
    sheet = np.asarray(contact_sheet([("a", [wide])], 40, None))
    pixels = np.argwhere((sheet == (255, 0, 0)).all(axis=2))
    assert (pixels.max(axis=0) - pixels.min(axis=0) + 1).tolist() == [10, 40]


def test_contact_sheet_names_what_is_wrong() -> None:
    with pytest.raises(DataError, match="no photo"):
        contact_sheet([("a", [])], 20, None)
    with pytest.raises(DataError, match=r"a photo of a has shape \(4, 4\) and type uint8; must be RGB uint8"):
        contact_sheet([("a", [np.zeros((4, 4), np.uint8)])], 20, None)


def test_names_sort_as_numbers_do() -> None:
    numbers = [0, 9, 10, 999_999, 1_000_000, 1_000_001, 20_000_000]
    keys = [identity_key(number) for number in numbers]
    assert keys == sorted(set(keys))
