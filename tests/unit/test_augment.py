"""Augmentation parameters: a function of the sample alone, spread as announced, unrelated to each other."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_dist.config import AugmentConfig
from pipelines.augment import AugmentTable, augment_table, identity_table, uniforms

MANY = np.arange(40_000, dtype=np.int64)
STRONG = AugmentConfig(crop_min_area=0.5, blur_probability=0.3, blur_sigma_max_px=2.0, grey_probability=0.2)
STILL = AugmentConfig(
    flip=False,
    crop_min_area=1.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue_deg=0.0,
    blur_probability=0.0,
    grey_probability=0.0,
)


def columns(table: AugmentTable) -> dict[str, np.ndarray]:
    return {field.name: getattr(table, field.name) for field in fields(table)}


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, epoch: int, ids: list[int]) -> None:
    together = columns(augment_table(STRONG, seed, epoch, np.array(ids, dtype=np.int64)))
    for row, sample_id in enumerate(ids):
        alone = columns(augment_table(STRONG, seed, np.array([epoch]), np.array([sample_id], dtype=np.int64)))
        for name, values in alone.items():
            assert np.array_equal(together[name][row], values[0]), name


def test_seed_epoch_and_sample_each_change_the_draw() -> None:
    base = augment_table(STRONG, 1, 0, MANY).brightness
    assert np.array_equal(base, augment_table(STRONG, 1, 0, MANY).brightness)
    for other in (augment_table(STRONG, 2, 0, MANY), augment_table(STRONG, 1, 1, MANY)):
        assert abs(np.corrcoef(base, other.brightness)[0, 1]) < 0.025  # five standard errors
    assert abs(np.corrcoef(base[1:], base[:-1])[0, 1]) < 0.025


def test_columns_are_independent() -> None:
    draws = np.stack([uniforms(1, column, np.zeros_like(MANY), MANY) for column in range(22)])
    correlation = np.corrcoef(draws) - np.eye(22)
    assert np.abs(correlation).max() < 0.03
    assert np.abs(draws.mean(axis=1) - 0.5).max() < 5 * (1 / 12) ** 0.5 / len(MANY) ** 0.5
    assert draws.min() >= 0.0 and draws.max() < 1.0


def test_one_amplitude_leaves_the_other_columns_alone() -> None:
    plain, other = augment_table(STRONG, 3, 5, MANY[:100]), None
    other = augment_table(STRONG.model_copy(update={"brightness": 0.9}), 3, 5, MANY[:100])
    changed = [name for name, values in columns(plain).items() if not np.array_equal(values, columns(other)[name])]
    assert changed == ["brightness"]


def test_parameters_are_spread_as_announced() -> None:
    table = augment_table(STRONG, 7, 0, MANY)
    width, height = table.crop_size_wh.T.astype(np.float64)
    area = width * height
    assert area.min() >= 0.5 - 1e-6 and area.max() <= 1.0 + 1e-6
    assert abs(area.mean() - 0.75) < 0.005  # uniform in [0.5, 1]
    aspect = width / height
    assert aspect.min() >= 0.9 - 1e-5 and aspect.max() <= 1.1 + 1e-5
    assert (table.crop_anchor_xy >= 0).all()
    assert (table.crop_anchor_xy.astype(np.float64) + table.crop_size_wh <= 1.0 + 1e-6).all()
    assert 0.8 <= table.brightness.min() < 0.801 and 1.199 < table.brightness.max() <= 1.2
    assert abs(table.mirror.mean() - 0.5) < 0.0125
    assert abs((table.blur_sigma_px > 0).mean() - 0.3) < 0.0125
    assert 1.99 < table.blur_sigma_px.max() <= 2.0
    assert abs((table.saturation == 0).mean() - 0.2) < 0.01
    assert np.abs(table.hue_deg).max() <= 6.0 and table.hue_deg.min() < -5.99


def test_parameters_of_low_resolution_occlusion_and_jpeg() -> None:
    hard = STRONG.model_copy(
        update={
            "low_resolution_probability": 0.3,
            "occlusion_probability": 0.4,
            "occlusion_max_area": 0.2,
            "jpeg_probability": 0.5,
        }
    )
    table, before = augment_table(hard, 7, 0, MANY), columns(augment_table(STRONG, 7, 0, MANY))
    changed = [name for name, values in columns(table).items() if not np.array_equal(values, before[name])]
    assert changed == ["low_scale", "cover_anchor_xy", "cover_size_wh", "cover_grey", "jpeg_quality"]
    assert abs((table.low_scale < 1).mean() - 0.3) < 0.0125 and 0.25 <= table.low_scale.min() < 0.26
    area = table.cover_size_wh.astype(np.float64).prod(axis=1)
    assert abs((area > 0).mean() - 0.4) < 0.0125 and 0.199 < area.max() <= 0.2 + 1e-6
    assert (table.cover_anchor_xy.astype(np.float64) + table.cover_size_wh <= 1.0 + 1e-6).all()
    assert set(np.unique(table.jpeg_quality).tolist()) == {*range(30, 96), 100}
    assert abs((table.jpeg_quality < 100).mean() - 0.5) < 0.0125


def test_amplitudes_of_zero_change_nothing() -> None:
    still, identity = columns(augment_table(STILL, 1, 2, MANY[:50])), columns(identity_table(50))
    for name, values in identity.items():
        assert np.array_equal(still[name], values) and still[name].dtype == values.dtype, name


@pytest.mark.parametrize("area", [0.8, 0.95, 1.0])
def test_the_crop_fits_whatever_the_aspect(area: float) -> None:
    table = augment_table(STRONG.model_copy(update={"crop_min_area": area}), 1, 0, MANY)
    assert table.crop_size_wh.max() <= 1.0
    assert table.crop_size_wh.prod(axis=1).min() >= area - 1e-6


def test_no_rows() -> None:
    table = augment_table(STRONG, 1, 0, np.zeros(0, dtype=np.int64))
    assert table.crop_anchor_xy.shape == (0, 2) and table.mirror.shape == (0,)
