"""The head on CUDA: PyTorch and Triton forms equal the CPU's float64, and 16-bit operands are as good as claimed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lce_dist.compat.lce import OldAnchor
from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.head.build import build_head
from lce_dist.head.rows import initial_rows
from lce_dist.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CLASSES, DIM, BATCH, STEPS = 5003, 130, 96, 4
HEADS = {
    "cosface": {"loss": "cosface", "margin_cos": 0.35, "scale": 64.0},
    "curricularface": {"loss": "curricularface", "margin_rad": 0.5, "scale": 32.0},
    "conflicts": {"loss": "arcface", "margin_rad": 0.5, "scale": 32.0, "conflict_cos": 0.3},
    "sampled": {"loss": "arcface", "margin_rad": 0.5, "scale": 32.0, "sample_rate": 0.4},
    "adamw": {"loss": "arcface", "margin_rad": 0.5, "scale": 32.0, "optimizer": "adamw"},
}


def train(device: str, keys: dict[str, object], operand: torch.dtype, kept: torch.dtype | None) -> list[torch.Tensor]:
    """Losses, last gradient of the embeddings, rows and momentum after a few steps, float64 on the CPU."""
    world = World(device=torch.device(device))
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if operand == torch.float64 else torch.float32
    centre = F.normalize(torch.randn(CLASSES, DIM, generator=generator)).to(device, dtype)
    anchor = OldAnchor(centre, torch.full((CLASSES,), 0.9, device=device, dtype=dtype), 3.0, 2.0, "cos")
    rows = initial_rows(0, CLASSES, DIM, 1).to(device, dtype)
    config = HeadConfig.model_validate({"chunk_classes": 1000} | keys)
    head = build_head(config, OptimConfig(), CLASSES, DIM, 1, world, lambda step: 0.1, anchor, rows)
    head.settings = replace(head.settings, operand=operand, kept=kept)
    losses, grad = [], torch.zeros(0)
    for step in range(STEPS):
        emb = torch.randn(BATCH, DIM, generator=generator).to(device, dtype).requires_grad_()
        labels = torch.randint(CLASSES, (BATCH,), generator=generator).to(device)
        head.begin_step(step, labels, 0.1)
        weight = torch.full((BATCH,), 1 / BATCH, device=device, dtype=dtype)
        terms = head(F.normalize(emb), labels, weight, emb.norm(dim=1), only_micro_batch=True)
        terms.total.backward()
        head.step()
        losses.append(terms.total.detach())
        assert emb.grad is not None
        grad = emb.grad
    head.settle(STEPS)
    whole = slice(0, CLASSES)
    state = [table.load(whole) for table in head.rows.state.values()]
    return [value.double().cpu() for value in (torch.stack(losses), grad, head.rows.weight.load(whole), *state)]


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("kept", [torch.float32, None])
@pytest.mark.parametrize("name", HEADS)
def test_float32_on_cuda_equals_float64(name: str, kept: torch.dtype | None, implementation: str) -> None:
    truth = train("cpu", HEADS[name], torch.float64, None)
    found = train("cuda", HEADS[name] | {"implementation": implementation}, torch.float32, kept)
    for got, want in zip(found, truth, strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("kept", [torch.bfloat16, None])
@pytest.mark.parametrize("rows", ["fp32", "split"])
def test_16_bit_operands_on_cuda_are_near_float64(rows: str, kept: torch.dtype | None, implementation: str) -> None:
    truth = train("cpu", HEADS["cosface"], torch.float64, None)
    operand = torch.bfloat16 if rows == "split" else torch.float16
    keys = HEADS["cosface"] | {"implementation": implementation, "rows": rows}
    found = train("cuda", keys, operand, kept)
    for got, want in zip(found, truth, strict=True):
        assert error(got, want) < 2e-2
    bf16 = train("cuda", keys | {"state": "bf16"}, operand, kept)
    assert error(bf16[2], truth[2]) < 2e-2
