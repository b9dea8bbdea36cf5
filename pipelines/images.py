"""One image file on its way into a shard: let through as it is, or made a grey or RGB JPEG."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lce_dist.errors import DataError
from pipelines.jpeg import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, is_plain_jpeg, is_whole_jpeg

JPEG_QUALITY = 95  # of images that arrive in another format

# What files are called that hold images: those that can be decoded here, and others, which are refused by name, not passed over.
IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".avif"),
)
FOREIGN_SUFFIXES = (
    ".heic",
    ".heif",
    ".jxl",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raf",
    ".orf",
    ".rw2",
    ".psd",
    ".svg",
)
NOT_IN_TRAINING = ("GIF", "AVIF")  # Pillow decodes them, DALI does not: they are encoded anew, or left out

_FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "WEBP",
    "GIF",
    "TIFF",
    "JPEG2000",
    "PPM",
    "AVIF",
)  # no EPS, which would start Ghostscript

Check = Literal["quick", "full", "none"]


@dataclass(frozen=True)
class ImageRules:
    """What happens to images: shorter side brought down to ``size``, encoded at ``quality``, and how sure we want to be.

    check: ``quick`` decodes what the bytes alone do not show to be whole, ``full`` everything, ``none`` trusts headers.
    """

    size: int | None = None
    quality: int | None = None
    check: Check = "quick"

    def apply(self, payload: bytes, origin: str) -> bytes:
        """The bytes for the shard. Errors: DataError naming ``origin``."""
        if self.size is None and self.quality is None and self._passes(payload):
            return payload
        return as_jpeg(payload, origin, self.size, self.quality)

    def inspect(self, payload: bytes, origin: str) -> None:
        """The same check of an image that stays where it is. Errors: DataError also for what training cannot decode there."""
        if self.check != "none" and not self._passes(payload):
            with _opened(payload, origin) as image:
                if image.format in NOT_IN_TRAINING:
                    raise DataError(f"image {origin} is {image.format}, which training cannot read where it lies")
            check_decodes(payload, origin)

    def _passes(self, payload: bytes) -> bool:
        if self.check == "full":
            return False
        return is_whole_jpeg(payload) if self.check == "quick" else is_plain_jpeg(payload)


def as_jpeg(payload: bytes, origin: str, size: int | None = None, quality: int | None = None) -> bytes:
    """Decode an image fully; return its bytes if it is a grey or RGB JPEG, else an RGB JPEG of its first frame.

    Transparent parts become white; 16-bit greys keep their upper 8 bits. With ``size``, what has a longer shorter side
    is scaled down to it; with ``quality`` (1 to 100) everything is encoded anew, upright where EXIF turns it.
    Errors: DataError naming ``origin`` when the image cannot be decoded or is too large.
    """
    with _opened(payload, origin) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        factor = 1.0 if size is None else min(1.0, size / min(image.size))
        if plain and factor == 1.0 and quality is None:
            _decode_all(image, payload)
            return payload
        image.load()
        pixels = ImageOps.exif_transpose(image) if plain else to_rgb(image)
        if factor < 1.0:
            width, height = (max(1, round(side * factor)) for side in pixels.size)
            pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        pixels.save(encoded, "JPEG", quality=quality or JPEG_QUALITY, subsampling=0)
        return encoded.getvalue()


def grey_jpeg() -> bytes:
    """The smallest image there is to decode."""
    encoded = io.BytesIO()
    Image.new("L", (8, 8), 128).save(encoded, "JPEG")
    return encoded.getvalue()


def check_decodes(payload: bytes, origin: str) -> None:
    """Errors: DataError naming ``origin`` when the image cannot be decoded or is too large."""
    with _opened(payload, origin) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            _decode_all(image, payload)
        else:
            image.load()


@contextlib.contextmanager
def _opened(payload: bytes, origin: str) -> Iterator[Image.Image]:
    """An image within our limits; whatever goes wrong with it becomes a DataError that names it."""
    if len(payload) > MAX_IMAGE_BYTES:
        raise DataError(
            f"image {origin} is {len(payload)} bytes; must be at most {MAX_IMAGE_BYTES}. Scale it down or remove it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(io.BytesIO(payload), formats=_FORMATS) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise DataError(
                        f"image {origin} is {image.width} x {image.height} pixels; must be at most "
                        f"{MAX_IMAGE_PIXELS} in all. Scale it down or remove it"
                    )
                yield image
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 (Pillow raises whatever its decoders meet first)
        reason = str(error).split("\n", 1)[0].split(" <_io", 1)[0] or type(error).__name__
        raise DataError(f"image {origin} cannot be decoded ({reason}); replace or remove it") from None


def _decode_all(image: Image.Image, payload: bytes) -> None:
    """Read every coded block of a JPEG, but compute only one grey pixel of each 8 x 8: half the time, the same verdict."""
    image.draft("L", (1, 1))
    try:
        image.load()
    except Exception:  # noqa: BLE001 (whatever it is, the full decoder decides)
        with Image.open(io.BytesIO(payload)) as whole:
            whole.load()


def to_rgb(image: Image.Image) -> Image.Image:
    """As 8-bit RGB, upright where EXIF turns it; transparent parts become white, 16-bit greys keep their upper 8 bits."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        upper_bits = np.asarray(upright).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper_bits.astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")
