"""What a run leaves of its classifier, and a run that starts from it after identities have left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lce_dist import storage
from lce_dist.head.classifier import export, keys_file, read_card, read_keys, shrink
from lce_dist.world import World
from tests.integration.conftest import Workplace

SHORT = ("--config", "small.toml", "--set", "old.epochs=1.0", "--set", "new.epochs=2.0")


@pytest.fixture(scope="module")
def first(workplace: Workplace) -> Path:
    code, output = workplace.run("train", *SHORT, "--nodes", "2", "--name", "first")
    assert code == 0, output
    return workplace.folder / "runs" / "first"


def test_each_stage_leaves_its_classifier(first: Path, tmp_path: Path) -> None:
    config = json.loads((first / "config.json").read_text())
    old, new = (read_card(first / stage / "classifier") for stage in ("old", "new"))
    assert (old.num_classes, new.num_classes, old.dim, new.dim) == (8, 16, 32, 32)
    assert (old.has_old, new.has_old) == (False, True)
    assert new.model["stage"] == "new" and new.model["net"] == "tiny16"
    assert new.model["head"] == {"loss": "cosface", "scale": config["head"]["scale"], "margin_cos": 0.1}
    export(first / "new" / "classifier", None, tmp_path / "rows.safetensors")
    keys = read_keys(keys_file(tmp_path / "rows.safetensors"))
    assert keys == sorted(set(keys)) and len(keys) == 16
    # it is what the last checkpoint holds, to the bit
    last = sorted((first / "new" / "checkpoints").glob("step-*"))[-1]
    rows = [torch.zeros(16, 32), torch.zeros(16, 32)]
    storage.load(first / "new" / "classifier", {"weight": rows[0]}, World())
    storage.load(last, {"head.weight": rows[1]}, World())
    assert rows[0].any() and torch.equal(rows[0], rows[1])


def test_a_run_starts_from_a_classifier_that_identities_have_left(
    workplace: Workplace, first: Path, tmp_path: Path
) -> None:
    export(first / "new" / "classifier", None, tmp_path / "rows.safetensors")
    staying = read_keys(keys_file(tmp_path / "rows.safetensors"))[:10]
    start = workplace.folder / "start"
    shrink(first / "new" / "classifier", staying, start)
    arguments = ("train", *SHORT, "--nodes", "1", "--name", "second")
    code, output = workplace.run(*arguments, "--set", "head.start_from=start")
    assert code == 0, output
    assert "new model: rows of 10 identities as given by head.start_from, 6 drawn" in output
    assert "old model: rows of" not in output
    assert workplace.losses("second", "new")[1] < workplace.losses("first", "new")[1]

    code, output = workplace.run(*arguments)
    assert code == 2 and "first_rows" in output and "head.start_from True then, False now" in output
    (shard,) = start.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, output = workplace.run(*arguments, "--set", "head.start_from=start")
    assert code == 2 and "model.safetensors is missing, truncated or changed" in output
    assert "Traceback" not in output
