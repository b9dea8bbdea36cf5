"""The joint score and the warning of a falling cross-test, by hand; the whole is in tests/integration/test_run.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.beside import _warning, joint_score, read_ranking
from lce_dist import storage
from lce_dist.errors import CheckpointError
from lce_dist.models.catalog import build_net
from lce_dist.training.checkpoint import load_network
from lce_dist.world import World


def test_joint_score() -> None:
    assert joint_score(0.5, 0.5) == pytest.approx(0.5)
    assert joint_score(0.0, 0.9) == 0.0 == joint_score(0.0, 0.0)
    assert joint_score(0.6, 0.9) == pytest.approx(0.72)


def test_a_fall_of_a_twentieth_is_told() -> None:
    before = [{"step": 10, "new_old": 0.4}, {"step": 20, "new_old": 0.6}, {"step": 30, "new_old": 0.59}]
    assert _warning([], 10, 0.1) is None
    assert _warning(before, 40, 0.571) is None
    told = _warning(before, 40, 0.569)
    assert told is not None and "fell to 0.5690 at step 40 from 0.6000 at step 20" in told


def test_no_ranking_is_empty(tmp_path: Path) -> None:
    assert read_ranking(tmp_path) == []


@pytest.mark.parametrize("inside", ["", "net."])
def test_a_network_is_read_from_a_checkpoint_with_or_without_something_beside_it(tmp_path: Path, inside: str) -> None:
    net = build_net("tiny8", 16, 32, seed=3)
    tensors = {f"net.weight.{inside}{name}": value.detach() + 1 for name, value in net.named_parameters()}
    tensors |= {f"net.buffer.{inside}{name}": value.detach() + 2 for name, value in net.named_buffers()}
    tensors |= {"net.weight.beside.map": torch.ones(3), "head.weight": torch.ones(5, 16)}
    storage.save(tmp_path / "c", tensors, {"step": 1}, World())
    other = build_net("tiny8", 16, 32, seed=4)
    load_network(tmp_path / "c", other)
    for (_, one), (_, two) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(two, one + 1, rtol=0, atol=0)
    for (_, one), (_, two) in zip(net.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(two, one + 2, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="needs"):
        load_network(tmp_path / "c", build_net("tiny8", 8, 32, seed=4))
    with pytest.raises(CheckpointError, match="never finished"):
        load_network(tmp_path / "none", other)
