"""What only a GPU shows: the head on CUDA equals the head on the CPU, and GPU decoding equals CPU decoding."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lce_dist.head.chunked import chunked_margin_softmax
from lce_dist.head.margins import ArcFace
from lce_dist.world import World
from pipelines.pack import pack_images
from pipelines.stream import ImageStream, block_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def head_on(device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(64, 128, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    weight = torch.randn(5000, 128, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    labels = torch.randint(5000, (64,), generator=generator).to(device)
    row_weight = torch.full((64,), 1 / 64, dtype=torch.float64, device=device)
    world = World(device=torch.device(device))
    loss = chunked_margin_softmax(F.normalize(emb), weight, labels, row_weight, 0, ArcFace(0.5), 64.0, 700, world)
    loss.backward()
    assert emb.grad is not None and weight.grad is not None
    return loss.detach().cpu(), emb.grad.cpu(), weight.grad.cpu()


def test_head_on_cuda_equals_cpu() -> None:
    for on_gpu, on_cpu in zip(head_on("cuda"), head_on("cpu"), strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-9, atol=1e-11)


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
