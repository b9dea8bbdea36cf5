"""One image of a packed data set as pixels, by Pillow: for contact sheets, never for training."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from lce_dist.errors import DataError
from pipelines.images import to_rgb
from pipelines.manifest import PackedDataset


def decode_sample(dataset: PackedDataset, sample_id: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB, upright and on white as importing makes them. Errors: DataError naming shard and key when the image cannot be decoded."""
    row = dataset.index[sample_id]
    path = dataset.local_shard(int(row["shard"]))
    with path.open("rb") as file:
        file.seek(int(row["offset"]))
        payload = file.read(int(row["size"]))
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return np.asarray(to_rgb(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: image {dataset.sample_key(sample_id)} cannot be decoded: {error}") from None
