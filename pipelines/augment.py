"""A sample's augmentation is a function of (seed, epoch, sample id): the same on any rank, in any batch.

Nothing is drawn from a generator with state; each number is a hash of its coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.config import AugmentConfig
from pipelines.order import Int64Array, derive_key, mix64

Float32Array = npt.NDArray[np.float32]

_BEST_QUALITY = 95
ASPECT_RANGE = (0.9, 1.1)  # width over height of the crop before it is fitted into the image

# One column of random numbers per parameter. Numbers are never reused, so that a new parameter
# leaves the draws of the others, and with them all trained weights, as they were.
_MIRROR, _AREA, _ASPECT, _ANCHOR_X, _ANCHOR_Y, _BRIGHTNESS = range(6)
_CONTRAST, _SATURATION, _HUE, _BLUR, _SIGMA, _GREY = range(6, 12)
_LOW, _SCALE, _COVERED, _COVER_AREA, _COVER_ASPECT, _COVER_X, _COVER_Y, _COVER_GREY = range(12, 20)
_JPEG, _QUALITY = range(20, 22)


@dataclass(frozen=True, eq=False)
class AugmentTable:
    """One row of parameters per image; lengths are fractions of the image, x to the right, y down.

    mirror (B,) int32 0 or 1; crop_anchor_xy, crop_size_wh (B, 2); brightness, contrast, saturation (B,) factors
    (1 changes nothing, saturation 0 is grey); hue_deg (B,); blur_sigma_px (B,) in output pixels, 0 for no blur;
    low_scale (B,) of the side, 1 for none; cover_anchor_xy, cover_size_wh (B, 2), size 0 for none; cover_grey (B,) 0 to 255;
    jpeg_quality (B,) int32, 100 for none.
    """

    mirror: npt.NDArray[np.int32]
    crop_anchor_xy: Float32Array
    crop_size_wh: Float32Array
    brightness: Float32Array
    contrast: Float32Array
    saturation: Float32Array
    hue_deg: Float32Array
    blur_sigma_px: Float32Array
    low_scale: Float32Array
    cover_anchor_xy: Float32Array
    cover_size_wh: Float32Array
    cover_grey: Float32Array
    jpeg_quality: npt.NDArray[np.int32]


def uniforms(seed: int, column: int, epochs: Int64Array, sample_ids: Int64Array) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), one per (epoch, sample id); columns are independent of each other."""
    keyed_epochs = mix64(epochs.astype(np.uint64) ^ np.uint64(derive_key(seed, column)))
    bits = mix64(mix64(sample_ids.astype(np.uint64)) ^ keyed_epochs)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augment_table(config: AugmentConfig, seed: int, epochs: Int64Array | int, sample_ids: Int64Array) -> AugmentTable:
    """Draw the parameters of (B,) samples, each in its own epoch (or all in one).

    The crop's area is uniform in [crop_min_area, 1], its place uniform; factors are uniform in 1 +- amplitude.
    """
    per_row_epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), sample_ids.shape)

    def draw(column: int) -> npt.NDArray[np.float64]:
        return uniforms(seed, column, per_row_epochs, sample_ids)

    def factor(column: int, amplitude: float) -> Float32Array:
        return (1.0 + amplitude * (2.0 * draw(column) - 1.0)).astype(np.float32)

    area = 1.0 - (1.0 - config.crop_min_area) * draw(_AREA)
    low, high = ASPECT_RANGE
    # An aspect outside [area, 1 / area] would need a side longer than the image.
    aspect = np.clip(low + (high - low) * draw(_ASPECT), area, 1.0 / area)
    size_wh = np.minimum(np.sqrt(np.stack([area * aspect, area / aspect], axis=1)), 1.0)
    anchor_xy = np.stack([draw(_ANCHOR_X), draw(_ANCHOR_Y)], axis=1) * (1.0 - size_wh)

    blurred = draw(_BLUR) < config.blur_probability
    sigma_px = np.where(blurred, config.blur_sigma_max_px * (1.0 - draw(_SIGMA)), 0.0)
    grey = draw(_GREY) < config.grey_probability

    is_low = draw(_LOW) < config.low_resolution_probability
    low_scale = np.where(is_low, 1.0 - (1.0 - config.low_resolution_min_scale) * draw(_SCALE), 1.0)
    covered = draw(_COVERED) < config.occlusion_probability
    cover_area = np.where(covered, config.occlusion_max_area * (1.0 - draw(_COVER_AREA)), 0.0)
    cover_aspect = np.exp2(2.0 * draw(_COVER_ASPECT) - 1.0)  # 1 : 2 to 2 : 1
    cover_wh = np.minimum(np.sqrt(np.stack([cover_area * cover_aspect, cover_area / cover_aspect], axis=1)), 1.0)
    cover_xy = np.stack([draw(_COVER_X), draw(_COVER_Y)], axis=1) * (1.0 - cover_wh) * covered[:, None]
    compressed = draw(_JPEG) < config.jpeg_probability
    best = max(config.jpeg_min_quality, _BEST_QUALITY)
    quality = np.where(
        compressed, np.floor(config.jpeg_min_quality + (best + 1 - config.jpeg_min_quality) * draw(_QUALITY)), 100
    )
    return AugmentTable(
        mirror=(draw(_MIRROR) < 0.5).astype(np.int32) * np.int32(config.flip),
        crop_anchor_xy=anchor_xy.astype(np.float32),
        crop_size_wh=size_wh.astype(np.float32),
        brightness=factor(_BRIGHTNESS, config.brightness),
        contrast=factor(_CONTRAST, config.contrast),
        saturation=np.where(grey, np.float32(0.0), factor(_SATURATION, config.saturation)),
        hue_deg=(config.hue_deg * (2.0 * draw(_HUE) - 1.0)).astype(np.float32),
        blur_sigma_px=sigma_px.astype(np.float32),
        low_scale=low_scale.astype(np.float32),
        cover_anchor_xy=cover_xy.astype(np.float32),
        cover_size_wh=cover_wh.astype(np.float32),
        cover_grey=(np.floor(256.0 * draw(_COVER_GREY)) * covered).astype(np.float32),
        jpeg_quality=quality.astype(np.int32),
    )


def identity_table(num_rows: int) -> AugmentTable:
    """Parameters that change nothing, for evaluation and for the old model's centres."""
    ones = np.ones(num_rows, dtype=np.float32)
    zeros = np.zeros(num_rows, dtype=np.float32)
    return AugmentTable(
        mirror=np.zeros(num_rows, dtype=np.int32),
        crop_anchor_xy=np.zeros((num_rows, 2), dtype=np.float32),
        crop_size_wh=np.ones((num_rows, 2), dtype=np.float32),
        brightness=ones,
        contrast=ones,
        saturation=ones,
        hue_deg=zeros,
        blur_sigma_px=zeros,
        low_scale=ones,
        cover_anchor_xy=np.zeros((num_rows, 2), dtype=np.float32),
        cover_size_wh=np.zeros((num_rows, 2), dtype=np.float32),
        cover_grey=zeros,
        jpeg_quality=np.full(num_rows, 100, dtype=np.int32),
    )
