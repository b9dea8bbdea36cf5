"""Whether a model and stored vectors belong together: a few images decide, and usual mistakes are named."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lce_dist.errors import DataError
from lce_dist.models.old_model import FrozenModel
from lce_dist.models.preprocess import OUR_INPUT, InputSpec, Triple
from lce_dist.models.stored_vectors import StoredVectors

LEAST_COS = 0.99  # JPEG decoders and resizers move a vector by less; a wrong channel order moves it by more

_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_SCALES: dict[str, tuple[Triple, Triple]] = {
    "values from -1 to 1": (OUR_INPUT.mean, OUR_INPUT.std),
    "values from 0 to 1": ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "values from 0 to 255": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "ImageNet's mean and std": _IMAGENET,
}


def check_against_stored(
    model: FrozenModel, stored: StoredVectors, images: torch.Tensor, row_b: npt.NDArray[np.int64]
) -> float:
    """The least cosine between vectors of ``images`` (b, 3, S, S) and the stored ones in rows ``row_b``.

    Errors: DataError below 0.99, naming the preprocessing under which they agree, if one does; for other dimensions.
    """
    if stored.embedding_dim != model.embedding_dim:
        raise DataError(
            f"stored vectors {stored.path} have {stored.embedding_dim} dimensions, the model gives "
            f"{model.embedding_dim}; they are of different models"
        )
    stored_bD = torch.from_numpy(stored.take(row_b)).to(images.device)
    cos_b = _cosines(model, images, stored_bD)
    least = float(cos_b.min())
    if least >= LEAST_COS:
        return least
    told = (
        f"the model and stored vectors {stored.path} disagree: cosine {least:.3f} at least and "
        f"{float(cos_b.mean()):.3f} on average over {len(row_b)} images; must be {LEAST_COS} or more. "
    )
    for changes, spec in _other_inputs(model.input):
        if float(_cosines(model.with_input(spec), images, stored_bD).min()) >= LEAST_COS:
            raise DataError(f"{told}They agree with {' and '.join(changes)}: change the input settings to that")
    raise DataError(
        f"{told}Neither another channel order, nor another scale of values, nor flip_average on or off mends it. "
        "Likely: other weights, another crop or alignment of the images, another input.size, or keys of other images"
    )


def _cosines(model: FrozenModel, images: torch.Tensor, stored_bD: torch.Tensor) -> torch.Tensor:
    cos_b = (F.normalize(model(images)) * stored_bD).sum(1)
    return torch.nan_to_num(cos_b, nan=-1.0)


def _other_inputs(declared: InputSpec) -> Iterator[tuple[list[str], InputSpec]]:
    """Usual mistakes and their combinations, fewest first, with what each changes in words."""
    other_order: Literal["rgb", "bgr"] = "rgb" if declared.channels == "bgr" else "bgr"
    scales = {name: values for name, values in _SCALES.items() if values != (declared.mean, declared.std)}
    found = []
    for swap, scale, flip in itertools.product((False, True), (None, *scales), (False, True)):
        changes, spec = [], declared
        if swap:
            changes.append(f'channels = "{other_order}"')
            spec = dataclasses.replace(spec, channels=other_order)
        if scale is not None:
            mean, std = scales[scale]
            changes.append(f"{scale} (mean = {list(mean)}, std = {list(std)})")
            spec = dataclasses.replace(spec, mean=mean, std=std)
        if flip:
            changes.append(f"flip_average = {str(not declared.flip_average).lower()}")
            spec = dataclasses.replace(spec, flip_average=not declared.flip_average)
        if changes:
            found.append((changes, spec))
    yield from sorted(found, key=lambda item: len(item[0]))
