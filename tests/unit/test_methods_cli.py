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
        ({"method": "l2", "seen_only": True}, "compat.seen_only is True; compat.method 'l2' does not use it"),
        ({"method": "bct", "align_weight": 3.0}, "compat.align_weight is 3.0; compat.method 'bct' does not use it"),
        ({"method": "bct", "boundary": "angle"}, "compat.boundary is angle; compat.method 'bct' does not use it"),
        ({"method": "l2", "slack_rad": 0.1}, "compat.slack_rad is 0.1; compat.method 'l2' does not use it"),
        ({"method": "lce", "method_weight": 1.0}, "compat.method_weight is 1.0; compat.method 'lce' does not use it"),
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
    assert (paper.boundary, paper.joint_bridge, paper.align_weight) == ("angle", "paper", 10.0)
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
    assert (
        compat.contrast_weight is None
        and compat.pair_weight is None
        and config_of({"pair_weight": 3.0}).compat.pair_weight == 3.0
    )
    for mode in ("training-direct", "training-backward"):
        paper = config_of({"mode": mode, "preset": "paper"}).compat
        assert paper.pair_weight == 0.0 == paper.contrast_weight
    assert config_of({"boundary_weight": 7.0}, head={"loss": "softmax", "scale": 32.0}).compat.boundary_weight == 7.0
    assert config_of({}, head={"loss": "softmax"}).compat == CompatConfig()  # whose defaults stand for the head's own
    with pytest.raises(ConfigError, match="scale") as refused:
        config_of({}, head={"loss": "softmax", "scale": -1.0})
    assert "weight" not in str(refused.value)
    with pytest.raises(ConfigError, match="preset"):
        config_of({"preset": ["paper"]})


@pytest.mark.parametrize(
    ("compat", "key"),
    [
        ({"mode": "mapping-forward", "align_weight": 2.0}, "align_weight"),
        ({"mode": "mapping-forward", "boundary_weight": 2.0}, "boundary_weight"),
        ({"mode": "mapping-forward", "pair_weight": 2.0}, "pair_weight"),
        ({"mode": "mapping-backward", "boundary": "angle"}, "boundary"),
        ({"mode": "mapping-backward", "boundary_policy": "iqr"}, "boundary_policy"),
        ({"mode": "mapping-backward", "bridge": "paper", "boundary_policy": "iqr"}, "boundary_policy"),
        ({"mode": "mapping-backward", "slack_rad": 0.1}, "slack_rad"),
        ({"mode": "mapping-backward", "rows_from_old": True}, "rows_from_old"),
        ({"mode": "mapping-backward", "seen_only": True}, "seen_only"),
        ({"mode": "mapping-direct", "bridge": "mlp"}, "bridge"),
        ({"mode": "training-direct", "bridge": "linear"}, "bridge"),
        ({"mode": "training-backward", "contrast_weight": 2.0}, "contrast_weight"),
        ({"mode": "mapping-direct", "contrast_weight": 2.0}, "contrast_weight"),
        ({"mode": "training-direct", "bridge_heldout": 0.3}, "bridge_heldout"),
        ({"boundary_percentile": 80.0}, "boundary_percentile"),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(compat: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"compat\.{key} is .*\. Remove it"):
        config_of(compat)


def test_keys_of_the_papers_map_reach_its_fitting() -> None:
    given = config_of({"mode": "mapping-forward", "bridge": "paper", "align_weight": 3.0, "boundary": "angle"}).compat
    assert (given.align_weight, given.boundary_weight, given.boundary) == (3.0, 1.0, "angle")
    paper = config_of({"mode": "mapping-backward", "preset": "paper"}).compat
    assert (paper.bridge, paper.align_weight, paper.boundary_weight, paper.boundary) == ("paper", 10.0, 10.0, "angle")
    code = config_of({"mode": "mapping-backward", "preset": "reference-code"}).compat
    assert (code.align_weight, code.boundary_weight) == (200.0 / 64, 1.0)
    with pytest.raises(ConfigError, match="trained by these terms alone"):
        config_of({"mode": "mapping-forward", "bridge": "paper", "align_weight": 0.0, "boundary_weight": 0.0})


def test_whom_a_given_old_model_has_seen_is_said_or_not_asked() -> None:
    foreign = {"net": "tiny8", "embedding_dim": 64, "weights": "old.pt"}
    with pytest.raises(ConfigError, match=r"Set old\.identities"):
        config_of({"seen_only": True}, old=foreign)
    with pytest.raises(ConfigError, match=r"Set old\.identities"):
        config_of({"seen_only": True}, old={"embedding_dim": 64, "vectors": "old.npz"})
    assert config_of({"seen_only": True}, old={**foreign, "identities": "seen.txt"}).compat.seen_only
    by_split = {"shards": "packed", "split": "split.json"}
    assert config_of({"seen_only": True}, old=foreign, data=by_split).compat.seen_only
    assert config_of({"seen_only": True}).compat.seen_only  # trained here: the run knows
    with pytest.raises(ConfigError, match="seen_only alone looks at it"):
        config_of({}, old={**foreign, "identities": "seen.txt"})
    with pytest.raises(ConfigError, match="identities is set; it is for a model from a file"):
        config_of({"seen_only": True}, old={"net": "tiny8", "embedding_dim": 64, "identities": "seen.txt"})
