"""What only a GPU shows of the pipeline: GPU decoding equals CPU decoding."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.pack import pack_images
from pipelines.stream import ImageStream, block_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_gpu_decoding_is_near_cpu_decoding(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    photos = []
    for number in range(12):
        small = generator.integers(0, 255, (14, 14, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((112, 112), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        photos.append((f"id-{number % 3}", f"{number}.jpg", buffer.getvalue()))
    packed = pack_images(photos, ["id-0", "id-1", "id-2"], 12, tmp_path / "packed", "photos", "test")
    view = packed.select(packed.identities)
    images = []
    for device in ("cpu", "cuda"):
        with ImageStream(view, block_plan(12, 0, 1, 5), 112, None, 0, torch.device(device)) as stream:
            images.append(torch.cat([batch.images.cpu() for batch in stream]))
    assert (images[0] - images[1]).abs().mean() < 0.01  # of a range of 2
