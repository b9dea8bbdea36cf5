"""What a foreign network expects to see: from our images in [-1, 1] to its size, channel order and pixel scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class InputSpec:
    """How one network wants its images; the default is what our own networks get.

    size: pixels a side, None for images as they come. mean, std: of pixel values 0..255, per channel in the order
    that the network sees (``channels``). flip_average: the vector is the mean of the unit vectors of image and mirror.
    """

    size: int | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: Triple = (127.5, 127.5, 127.5)
    std: Triple = (127.5, 127.5, 127.5)
    flip_average: bool = False


OUR_INPUT = InputSpec()


def prepare_images(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """(b, 3, S, S) RGB in [-1, 1] -> (b, 3, size, size) as ``spec`` says; with the default ``images`` itself.

    Resizing is bilinear with antialias, as Pillow's; an image that fits is not touched.
    """
    if spec.size is not None and images.shape[-2:] != (spec.size, spec.size):
        images = F.interpolate(images, (spec.size, spec.size), mode="bilinear", antialias=True, align_corners=False)
    if spec.channels == "bgr":
        images = images.flip(1)
    if spec.mean == OUR_INPUT.mean and spec.std == OUR_INPUT.std:
        return images
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return (images * 127.5 + 127.5 - mean) / std
