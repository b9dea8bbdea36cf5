"""The old model stays what it was: hashed before and after the new one is trained, and for as long as a run has its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from launch.job import _weights_of, refuse_changed
from launch.prepare import claim_run_dir, prepare
from lce_dist.config import parse_config
from lce_dist.errors import ConfigError, RunError
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import freeze_net
from lce_dist.models.preprocess import InputSpec
from lce_dist.models.weights import save_weights

SETTINGS = {
    "run": {"name": "one"},
    "data": {
        "image_size": 32,
        "heldout_identities": 4,
        "synthetic": {"identities": 12, "photos_per_identity": 4, "photo_size": 48},
    },
    "old": {"net": "tiny8", "embedding_dim": 8},
    "new": {"net": "tiny8", "embedding_dim": 8, "epochs": 1.0},
    "head": {"loss": "cosface", "scale": 16.0, "margin_cos": 0.1},
    "optim": {"global_batch": 8},
}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_bit_of_a_weight_or_of_a_statistic_is_told(frozen: bool) -> None:
    net: nn.Module = build_net("tiny8", 8, 32, seed=1)
    old = freeze_net(net, "tiny8", 8, InputSpec(32)) if frozen else net
    before = _weights_of(old)
    old.train()
    if frozen:  # nothing moves, whatever it is asked
        old(torch.zeros(2, 3, 32, 32))
        refuse_changed(old, before)
    value = next(value for name, value in net.state_dict().items() if "running_mean" in name)
    with torch.no_grad():
        value.add_(1e-3)
    with pytest.raises(RunError, match=f"the old model's weights changed .*{before}"):
        refuse_changed(old, before)


def test_other_weights_of_the_old_model_under_the_same_name_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "old.safetensors"
    values = {**SETTINGS, "old": {**SETTINGS["old"], "weights": str(weights)}}
    config = parse_config(values, "test", json_mode=True)
    run = tmp_path / "run"

    def claim(seed: int) -> bool:
        save_weights(build_net("tiny8", 8, 32, seed), weights, {})
        prepared = prepare(config, 1, False, tmp_path / "cache", lambda what, done, total: None)
        return claim_run_dir(prepared.identity(config), run)

    assert claim(1) is False
    assert claim(1) is True, "the same weights written again"
    with pytest.raises(ConfigError, match="old_weights"):
        claim(2)
