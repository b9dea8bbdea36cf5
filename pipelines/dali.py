"""The only door to nvidia.dali: JPEG bytes and their parameters go in, normalised float images come out.

One graph for every machine: without a GPU it decodes on the CPU, with one ``mixed`` and augments there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia import nvimgcodec  # type: ignore[attr-defined]
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from lce_dist.config import AugmentConfig
from pipelines.augment import AugmentTable
from pipelines.jpeg import MAX_IMAGE_PIXELS


@dataclass(frozen=True, eq=False)
class EncodedBatch:
    """At least one JPEG (uint8 arrays of any length) and, for a decoder that augments, a row of parameters for each."""

    jpegs: list[npt.NDArray[np.uint8]]
    table: AugmentTable | None


def header_problem(encoded: npt.NDArray[np.uint8]) -> str | None:
    """Why DALI's parser does not get as far as an image's size, or what is wrong with that; None for nothing. Two microseconds.

    What it refuses must not get into a pipeline: with nvImageCodec 0.9 such an image in a batch of 32 or more ends the process.
    Nor must what importing refuses for its size: DALI takes three bytes a pixel that a header claims.
    """
    if len(encoded) == 0:
        return "it has no bytes"
    try:
        parsed = nvimgcodec.CodeStream(encoded)
        height, width = parsed.height, parsed.width
    except (RuntimeError, ValueError) as error:
        return f"its header cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if height <= 0 or width <= 0:
        return f"its header says {width} x {height} pixels"
    if height * width > MAX_IMAGE_PIXELS:
        return f"its header says {width} x {height} pixels; must be at most {MAX_IMAGE_PIXELS} in all"
    return None


class DecodeFailureError(Exception):
    """DALI refused a batch; it often cannot say which image. The decoder is of no further use."""


class Decoder:
    """Turns what ``source`` returns into (B, 3, S, S) float32 images in [-1, 1], decoding ahead of the consumer.

    ``source`` is called ``prefetch`` times before the first batch is due and then once a batch, in the
    consumer's thread; None ends the stream. No batch may exceed ``max_rows``. Parts of ``augment`` whose
    amplitude is zero cost nothing.
    """

    def __init__(
        self,
        source: Callable[[], EncodedBatch | None],
        max_rows: int,
        image_size: int,
        augment: AugmentConfig | None,
        device: torch.device,
        num_threads: int,
        prefetch: int,
    ) -> None:
        inputs = _inputs(augment)

        def feed() -> tuple[Any, ...]:
            batch = source()
            if batch is None:
                raise StopIteration
            if batch.table is None:
                return (batch.jpegs,)
            columns = _columns(batch.table)
            return (batch.jpegs, *(columns[name] for name in inputs[1:]))

        self._device = device
        self._recolours = "hue" in inputs
        self._pipeline: Any = _graph(
            feed,
            inputs,
            image_size,
            "mixed" if device.type == "cuda" else "cpu",
            batch_size=max_rows,
            num_threads=num_threads,
            device_id=_device_id(device),
            prefetch_queue_depth=prefetch,
            set_affinity=False,  # ranks share the machine; the scheduler knows better than each of them
        )
        self._pipeline.build()

    def next(self) -> torch.Tensor | None:
        """The images of the next batch, or None after the last.

        Errors: DecodeFailureError when an image of this batch cannot be decoded.
        """
        on_gpu = self._device.type == "cuda"
        try:
            (output,) = self._pipeline.run(torch.cuda.current_stream(self._device) if on_gpu else None)
        except StopIteration:
            return None
        except RuntimeError as error:
            raise DecodeFailureError(_reason(str(error))) from None
        images = torch.from_dlpack(output.as_tensor())
        if on_gpu:
            # DALI takes its buffer back in the order of the stream that it was handed out on; our copy is on it too.
            images = images.clone()
        # The colour twist leaves the float range of an image by a little; the contract is [-1, 1].
        return images.clamp_(-1.0, 1.0) if self._recolours else images

    def close(self) -> None:
        """Stop DALI's threads and free its buffers; images handed out stay valid."""
        self._pipeline = None


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _inputs(augment: AugmentConfig | None) -> tuple[str, ...]:
    """The graph's inputs: the JPEGs, and the parameters of those parts that can change anything."""
    if augment is None:
        return ("jpegs",)
    recolours = augment.brightness or augment.contrast or augment.saturation or augment.hue_deg
    parts: tuple[tuple[object, tuple[str, ...]], ...] = (
        (augment.crop_min_area < 1.0, ("start", "end")),
        (augment.occlusion_probability, ("cover_anchor", "cover_shape", "cover_grey")),
        (augment.low_resolution_probability, ("low_scale",)),
        (augment.blur_probability, ("sigma",)),
        (augment.jpeg_probability, ("quality",)),
        (recolours or augment.grey_probability, ("brightness", "contrast", "saturation", "hue")),
        (augment.flip, ("mirror",)),
    )
    return ("jpegs", *(name for active, names in parts if active for name in names))


def _columns(table: AugmentTable) -> dict[str, npt.NDArray[Any]]:
    start_hw = table.crop_anchor_xy[:, ::-1]
    return {
        "start": np.ascontiguousarray(start_hw),
        "end": np.ascontiguousarray(np.minimum(start_hw + table.crop_size_wh[:, ::-1], np.float32(1.0))),
        "cover_anchor": np.ascontiguousarray(table.cover_anchor_xy[:, ::-1]),
        "cover_shape": np.ascontiguousarray(table.cover_size_wh[:, ::-1]),
        "cover_grey": table.cover_grey,
        "low_scale": table.low_scale,
        "quality": table.jpeg_quality,
        "sigma": table.blur_sigma_px,
        "brightness": table.brightness,
        "contrast": table.contrast,
        "saturation": table.saturation,
        "hue": table.hue_deg,
        "mirror": table.mirror,
    }


@pipeline_def(enable_conditionals=True)
def _graph(feed: Callable[[], tuple[Any, ...]], inputs: tuple[str, ...], image_size: int, decode_device: str) -> Any:
    """A Python ``if`` chooses the parts of the graph; one on DALI's own values chooses image by image."""
    given = _receive(feed, inputs)
    size = [image_size, image_size]
    # Fancy upsampling is what libjpeg does: without it the chroma of GPU and CPU would differ.
    images: Any = fn.decoders.image(
        given["jpegs"], device=decode_device, output_type=types.DALIImageType.RGB, jpeg_fancy_upsampling=True
    )
    if "start" in given:
        images = fn.resize(images, size=size, roi_start=given["start"], roi_end=given["end"], roi_relative=True)
    else:
        shape: Any = fn.peek_image_shape(given["jpegs"])
        # A resize to the same size changes nothing but costs twice the decoding on a CPU.
        if shape[0] != image_size or shape[1] != image_size:
            images = fn.resize(images, size=size)
    if "cover_grey" in given:
        grey = given["cover_grey"]
        images = fn.erase(
            images,
            anchor=given["cover_anchor"],
            shape=given["cover_shape"],
            normalized=True,
            axis_names="HW",
            fill_value=fn.stack(grey, grey, grey),
        )
    if "low_scale" in given:
        low_scale = given["low_scale"]
        if low_scale < 1:
            side = fn.cast(math.ceil(low_scale * image_size), dtype=types.DALIDataType.FLOAT)
            small: Any = fn.resize(images, size=fn.stack(side, side))
            images = fn.resize(small, size=size)
    if "sigma" in given:
        sigma = given["sigma"]
        if sigma > 0:
            images = fn.gaussian_blur(images, sigma=sigma)
    if "quality" in given:
        quality = given["quality"]
        if quality < 100:
            images = fn.jpeg_compression_distortion(images, quality=quality)
    if "hue" in given:
        images = fn.color_twist(
            images,
            brightness=given["brightness"],
            contrast=given["contrast"],
            saturation=given["saturation"],
            hue=given["hue"],
            dtype=types.DALIDataType.FLOAT,  # rounding back to 8 bits would cost more than the twist
        )
    return fn.crop_mirror_normalize(
        images,
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[127.5] * 3,
        std=[127.5] * 3,
        mirror=given.get("mirror", 0),
    )


@do_not_convert
def _receive(feed: Callable[[], tuple[Any, ...]], inputs: tuple[str, ...]) -> dict[str, Any]:
    nodes: Any = fn.external_source(source=feed, num_outputs=len(inputs))
    return dict(zip(inputs, nodes, strict=True))


def _reason(message: str) -> str:
    """The line of DALI's long message that says what happened."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    after = [following for line, following in itertools.pairwise(lines) if line == "encountered:"]
    return after[0] if after else (lines[0] if lines else "no reason given")
