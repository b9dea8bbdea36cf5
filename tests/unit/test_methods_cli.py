"""The table of methods in the docs is the one of the code, and choosing wrongly is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import main
from launch.prepare import check_method
from lce_dist.config import CompatConfig, Config, parse_config
from lce_dist.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def config_of(compat: dict[str, object], **more: object) -> Config:
    values: dict[str, object] = {
        "data": {"synthetic": {}},
        "old": {"net": "tiny8", "embedding_dim": 64},
        "new": {"net": "tiny16", "embedding_dim": 64},
        "head": {"loss": "softmax"},
        "compat": compat,
    }
    return parse_config(values | more, "test")


def test_the_docs_hold_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in DOCS.read_text()
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert "needs of the old model: its class centres" in told
    assert "procrustes: Procrustes" in told and "fct: FCT" in told


@pytest.mark.parametrize(
    ("compat", "words"),
    [
        ({"method": "bctt"}, "did you mean 'bct'"),
        ({"method": "bct", "mode": "training-backward"}, "compat.mode must be 'training-direct'"),
        ({"method": "bct", "mode": "mapping-forward"}, "in which no model is trained"),
        ({"method": "l2", "seen_only": True}, "seen_only is true"),
    ],
)
def test_a_method_that_does_not_fit_is_one_line(compat: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_method(config_of(compat))


def test_dimensions_and_given_models_fit_the_mode() -> None:
    other = {"new": {"net": "tiny16", "embedding_dim": 32}}
    with pytest.raises(ConfigError, match=r"set compat\.mode to 'training-backward'"):
        config_of({}, **other)
    with pytest.raises(ConfigError, match="so it must equal"):
        config_of({"mode": "mapping-direct"}, **other)
    assert config_of({"mode": "training-forward"}, **other).compat.manner == "forward"
    given = {"new": {"net": "tiny16", "embedding_dim": 64, "weights": "there.safetensors"}}
    with pytest.raises(ConfigError, match="which trains the new model"):
        config_of({}, **given)
    assert config_of({"mode": "mapping-backward"}, **given).compat.maps_only
    with pytest.raises(ConfigError, match="slack_rad is 0"):
        config_of({"single_image": "slack"})
    with pytest.raises(ConfigError, match="net and weights are missing"):
        config_of({}, old={"embedding_dim": 64})
    with pytest.raises(ConfigError, match="input is set"):
        config_of({}, old={"net": "tiny8", "embedding_dim": 64, "input": {"channels": "bgr"}})


def test_presets_fill_in_what_is_not_set() -> None:
    paper = config_of({"preset": "paper"}).compat
    assert (paper.boundary, paper.joint_bridge, paper.align_weight) == ("angle", "stacked", 10.0)
    code = config_of({"preset": "reference-code"}).compat
    assert (code.boundary_weight, code.align_weight) == (1.0, 200.0 / 64)
    assert config_of({"preset": "reference-code", "align_weight": 3.0}).compat.align_weight == 3.0
    again = parse_config(config_of({"preset": "reference-code"}).model_dump(mode="json"), "again", json_mode=True)
    assert again.compat == code


def test_weights_that_are_not_set_follow_the_scale_of_the_head() -> None:
    compat = config_of({}, head={"loss": "softmax", "scale": 32.0}).compat
    assert (compat.align_weight, compat.boundary_weight) == (64.0, 2.0)
    mapped = config_of({"mode": "training-forward"}, head={"loss": "softmax", "scale": 32.0}).compat
    assert (mapped.align_weight, mapped.boundary_weight) == (16.0, 2.0)
    assert config_of({"boundary_weight": 7.0}, head={"loss": "softmax", "scale": 32.0}).compat.boundary_weight == 7.0
    assert config_of({}, head={"loss": "softmax"}).compat == CompatConfig()  # whose defaults stand for the head's own
    with pytest.raises(ConfigError, match="scale") as refused:
        config_of({}, head={"loss": "softmax", "scale": -1.0})
    assert "weight" not in str(refused.value)
    with pytest.raises(ConfigError, match="preset"):
        config_of({"preset": ["paper"]})
