"""The config: strict, one-line errors, a fingerprint that covers what can change results and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from lce_dist.config import Config, load_config, parse_config
from lce_dist.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.toml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_committed_configs_load_and_survive_json(path: Path) -> None:
    config = load_config(path)
    assert parse_config(config.model_dump(mode="json"), "json", json_mode=True) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", ["'optim.lrr'", "did you mean 'lr'"]),
        ("optimm.lr=1", ["'optimm'", "did you mean 'optim'"]),
        ("optim.lr=fast", ["optim.lr is 'fast'", "valid number"]),
        ("optim.global_batch=1.5", ["optim.global_batch is 1.5", "integer"]),
        ("optim.global_batch=true", ["optim.global_batch is True"]),
        ("head.scale=81.0", ["head.scale is 81.0", "80"]),
        ("head.loss=arcface", ["margin_rad is not set", "'arcface'"]),
        ("head.margin_rad=0.5", ["margin_rad is 0.5", "Remove it"]),
        ("data.images=photos", ["names 2 sources", "exactly one"]),
        ("data.synthetic=none", ["names 0 sources"]),
        ("new.embedding_dim=64", ["64", "old.embedding_dim (128)"]),
        ("new.weights=a.pt", ["new.weights"]),
        ("evaluation.criterion_far=0.5", ["criterion_far is 0.5"]),
        ("run.name=../up", ["run.name"]),
        ("novalue", ["'novalue' is not KEY=VALUE"]),
        ("run.name.x=1", ["run.name.x", "not a section"]),
        ("gate.max_negative_flips=nan", [": gate.max_negative_flips is nan;", "or equal to 1 or 'off'."]),
        ("gate.min_slice_gain=true", [": gate.min_slice_gain is True;", "valid number or 'off' or 'auto'."]),
    ],
)
def test_a_wrong_setting_is_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def changed(*overrides: str) -> Config:
    return load_config(QUICKSTART, list(overrides))


@pytest.mark.parametrize(
    "override",
    ["optim.lr=0.2", "run.seed=9", "data.synthetic.seed=2", "compat.align_weight=1.0", "head.margin_cos=0.3"],
)
def test_the_fingerprint_sees_what_can_change_a_result(override: str) -> None:
    assert changed(override).fingerprint() != changed().fingerprint()


@pytest.mark.parametrize(
    "override",
    ["run.name=other", "run.dir=/elsewhere", "tracking.every_steps=1", "cluster.max_failures=9", "checkpoint.keep=5"],
)
def test_the_fingerprint_does_not_see_the_rest(override: str) -> None:
    assert changed(override).fingerprint() == changed().fingerprint()


def test_every_place_is_made_absolute_and_none_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def values(base: str) -> dict[str, Any]:
        given: dict[str, Any] = {
            "data": {"images": base + "photos"},
            "old": {"weights": base + "old.pt", "vectors": base + "v.npy"},
            "new": {"net": "tiny8", "weights": base + "new.safetensors"},
            "head": {"loss": "softmax", "start_from": base + "rows"},
            "compat": {"mode": "mapping-backward"},
            "evaluation": {"attributes": base + "who.csv", "pairs": [base + "lfw.bin", base + "cfp.bin"]},
            "run": {"dir": base + "runs"},
        }
        return given

    monkeypatch.chdir(tmp_path)
    near = parse_config(values(""), "test")
    assert near.with_absolute_places() == parse_config(values(f"{tmp_path.resolve()}/"), "test")
    assert near.with_absolute_places().fingerprint() == near.fingerprint()
    unset = load_config(QUICKSTART)
    assert unset.with_absolute_places().data == unset.data


def test_later_keys_win_and_none_removes() -> None:
    assert changed("optim.lr=0.2", "optim.lr=0.3").optim.lr == 0.3
    config = changed("head.loss=softmax", "head.margin_cos=none")
    assert config.head.loss == "softmax" and config.head.margin_cos is None


@pytest.mark.parametrize("url", ["s3://key:canary@bucket/faces", "https://canary@host/faces"])
def test_a_url_with_a_credential_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="holds a user or a password") as caught:
        load_config(QUICKSTART, ["data.synthetic=none", f"data.shards={url}"])
    assert "canary" not in str(caught.value)


def test_shards_at_a_url_stay_where_they_are() -> None:
    config = load_config(QUICKSTART, ["data.synthetic=none", "data.shards=s3://bucket/faces"])
    assert config.with_absolute_places().data.shards == "s3://bucket/faces"


def test_reading_by_blocks_is_uniform() -> None:
    with pytest.raises(ConfigError, match="only 'uniform' reads by blocks"):
        load_config(QUICKSTART, ["data.shuffle=blocks", "data.sampling=pk"])
