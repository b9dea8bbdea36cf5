"""The head benchmark's own parts: its reference is right, and its memory count counts."""

from __future__ import annotations

import torch

from benchmarks.head import LiveBytes, check_work, law_of, worst
from benchmarks.head_peers import OURS, REFERENCE, Problem
from lce_dist.world import World


def test_reference_and_ours_solve_the_same_problem() -> None:
    errors = check_work(World(), (*OURS, REFERENCE), Problem(300, 32))
    assert worst(errors[REFERENCE]) < 1e-5
    assert worst(errors["ours, keep fp32"]) < 1e-5
    assert worst(errors["ours, recompute"]) < 1e-5
    assert worst(errors["naive e4m3 (x 256), bf16 gradient"]) > 1e-3  # the check can fail


def test_live_bytes_follow_storages() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as tracker:
        first = outside + 1.0
        second = first.view(10, 100).mul(2.0)
        second.add_(1.0)
        outside.mul_(2.0)
        assert (tracker.live, tracker.peak) == (8000, 8000)
        del first
        third = torch.empty(100, dtype=torch.bfloat16)
        assert (tracker.live, tracker.peak) == (4200, 8000)
        del second, third
        assert (tracker.live, tracker.peak) == (0, 8000)


def test_law_is_fitted_by_logits() -> None:
    found = [
        {"name": "n", "problem": {"num_classes": c, "batch": 10, "ranks": 1}, "peak_bytes": 7.0 + 40.0 * c}
        for c in (10, 20, 50)
    ]
    law = law_of(found, "n")
    assert law is not None and abs(law.per_logit - 4.0) < 1e-9 and abs(law.base - 7.0) < 1e-6
    assert law_of(found[:2], "n") is None
