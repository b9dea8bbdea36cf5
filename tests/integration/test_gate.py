"""``lce gate`` over a run's directory and a real MLflow store: exit codes, files, tags, the alias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch

from launch.cli import main
from launch.report import RunFacts, write_report
from launch.run_tracking import CANDIDATE, RunTracking
from lce_dist.compat.artefact import map_rows, read_bridge, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.config import Config, load_config
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.matrix import build_matrix, cells_of
from lce_dist.evaluation.upgrade import examine
from lce_dist.tracking import Tracker

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.toml"


def model(name: str, seed: int, noise: float, num: int = 400) -> EmbeddingSet:
    labels = np.arange(num) % 50
    likes = np.random.default_rng(3).normal(size=(50, 16))[labels]
    rows = likes + noise * np.random.default_rng(seed).normal(size=likes.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet(name, rows.astype(np.float32), labels.astype(np.int64), np.arange(num))


def finished_run(
    folder: Path,
    name: str,
    new_noise: float,
    seed: int = 2,
    spaces: tuple[str, str] = ("new space", "old space"),
    overrides: tuple[str, ...] = (),
    card: dict[str, Any] | None = None,
) -> tuple[Path, Config]:
    """A run's directory as training leaves it, its model among the files; card: of its map."""
    run_dir = folder / name
    (run_dir / "new").mkdir(parents=True)
    config = load_config(QUICKSTART, [f"run.name={name}", "tracking.model=faces", *overrides])
    if config.new.weights is None:
        (run_dir / "new" / "model.safetensors").write_bytes(b"weights of " + name.encode())
    if card is not None:
        save_bridge(run_dir / "bridge", build_bridge("linear", 16, 16, seed=3), card)
    (run_dir / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
    cells = cells_of(model("old", 1, 0.75), model("new", seed, new_noise), None)
    cover = {"cover": np.random.default_rng(7).choice(["none", "mask"], 400)}
    upgrade = examine(build_matrix(cells, (0.01, 0.001)), cells, 0.01, cover)
    write_report(run_dir, config, RunFacts("f", "e", *spaces, {"new": 10.0}, 4, 2, card), upgrade, {}, {})
    return run_dir, config


def tracked(run_dir: Path, config: Config) -> None:
    """What training tells MLflow of it."""
    tracking = RunTracking(Tracker(config.tracking, run_dir, config.run.name, run_dir.parent), run_dir)
    tracking.tracker.start_run("parent", config.run.name)
    for stage in ("new", "bridge"):
        if (run_dir / stage).exists() and any((run_dir / stage).iterdir()):
            tracking.follow({"type": "stage_start", "stage": stage})
            tracking.follow({"type": "stage_done", "stage": stage})
    tracking.results(config, json.loads((run_dir / "gate.json").read_text()))
    assert tracking.close("FINISHED")


def test_the_alias_moves_to_a_run_that_passes_and_to_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    good, config = finished_run(tmp_path, "good", 0.4)
    assert main(["gate", str(good), "--no-mlflow"]) == 0
    told = capsys.readouterr().out
    assert "passed" in told and "not passed" not in told
    assert "not asked: FAR with the old threshold kept (gate.max_far_ratio)" in told
    tracked(good, config)
    assert main(["gate", str(good)]) == 0
    assert "faces@champion is now version 1" in capsys.readouterr().out

    weak, weak_config = finished_run(tmp_path, "weak", 1.1)
    assert main(["gate", str(weak), "--no-mlflow"]) == 1
    capsys.readouterr()
    tracked(weak, weak_config)
    assert main(["gate", str(weak)]) == 1
    caught = capsys.readouterr()
    assert "the alias stays where it is" in caught.out
    assert f"{weak} may not be shipped: " in caught.err and caught.err.count("\n") == 1

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert str(client.get_model_version_by_alias("faces", "champion").version) == "1"
    assert str(client.get_model_version_by_alias("faces", CANDIDATE).version) == "2"
    version = client.get_model_version("faces", "1")
    assert (version.tags["space"], version.tags["parent_space"]) == ("new space", "old space")
    assert float(version.tags["threshold_new_old"]) > 0.0
    for run_dir, word in ((good, "passed"), (weak, "not passed")):
        run_id = json.loads((run_dir / "tracking.json").read_text())["runs"]["parent"]
        run = client.get_run(run_id)
        assert run.data.tags["lce.gate"] == word
        assert {"report.html", "gate.json", "report.json"} <= {entry.path for entry in client.list_artifacts(run_id)}
        assert "Is it safe to ship?" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["lce.gate.reasons"]
    # a verdict by other bounds is told everywhere, and that it is one
    assert main(["gate", str(weak), *(f"--set=gate.{key}=off" for key in ("confidence", "max_negative_flips"))]) == 1
    assert main(["gate", str(good), "--set", "gate.min_self_gain=0.9"]) == 1
    capsys.readouterr()
    good_id = json.loads((good / "tracking.json").read_text())["runs"]["parent"]
    tags = client.get_run(good_id).data.tags
    assert tags["lce.gate"] == "not passed" and "Do not ship" in tags["mlflow.note.content"]
    assert "**Do not ship**, by rules set by hand" in tags["mlflow.note.content"]
    assert r"gate.min\_self\_gain=0.9 instead" in tags["mlflow.note.content"]
    assert "No: 1 of 4 checks failed" in client.get_model_version("faces", "1").description

    # a second good one was measured against the same old model, which is not the one deployed any more
    better, better_config = finished_run(tmp_path, "better", 0.3, seed=5, spaces=("better space", "old space"))
    assert main(["gate", str(better), "--no-mlflow"]) == 0
    tracked(better, better_config)
    assert main(["gate", str(better)]) == 2
    caught = capsys.readouterr().err
    assert (
        "faces@champion is version 1, of space new space; version 3 was measured against an old model of space old"
        in caught
    )
    assert "--replace" in caught and caught.count("\n") == 1
    third, third_config = finished_run(tmp_path, "third", 0.3, seed=6, spaces=("third space", "better space"))
    assert main(["gate", str(third), "--no-mlflow"]) == 0
    tracked(third, third_config)
    steps = ((better, ["--replace"], "3"), (better, [], "3"), (third, [], "4"), (good, ["--replace"], "1"))
    for run_dir, flags, number in steps:
        assert main(["gate", str(run_dir), *flags]) == 0
        assert str(client.get_model_version_by_alias("faces", "champion").version) == number


def test_a_version_holds_its_map_and_a_map_between_two_given_models_is_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = tmp_path / "theirs.safetensors"
    given.write_bytes(b"weights of theirs")
    card = {"kind": "linear", "dim_in": 16, "dim_out": 16, "direction": "new_to_old"}
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = (
        ("trained", ("compat.mode=training-backward",), "model.safetensors", "new"),
        ("mapped", ("compat.mode=mapping-backward", f'new.weights="{given}"'), "theirs.safetensors", "bridge"),
    )
    for number, (name, overrides, weights, key) in enumerate(runs, 1):
        run_dir, config = finished_run(tmp_path, name, 0.4, overrides=overrides, card=card)
        assert main(["gate", str(run_dir), "--no-mlflow"]) == 0
        tracked(run_dir, config)
        assert main(["gate", str(run_dir), "--replace"]) == 0
        version = client.get_model_version_by_alias("faces", "champion")
        assert int(version.version) == number
        assert version.run_id == json.loads((run_dir / "tracking.json").read_text())["runs"][key]
        folder = Path(client.download_artifacts(version.run_id, "model", str(tmp_path / name)))
        assert folder.name == "model"
        assert (folder / weights).read_bytes() == b"weights of " + (b"theirs" if key == "bridge" else name.encode())
        told = json.loads((folder / "card.json").read_text())
        assert (told["weights"], told["bridge"]) == (weights, "linear")
        assert told["apply"].startswith("to compare with old vectors, this model's: unit vectors through bridge/")
        rows = torch.nn.functional.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
        wanted = map_rows(read_bridge(run_dir / "bridge"), rows)
        assert torch.equal(map_rows(read_bridge(folder / "bridge"), rows), wanted)
    capsys.readouterr()


def test_other_bounds_json_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, _ = finished_run(tmp_path, "run", 0.4)
    asked = ["gate", str(run_dir), "--no-mlflow", "--json", "-"]

    def verdict(*more: str) -> tuple[int, dict[str, Any]]:
        code = main([*asked, *more])
        return code, json.loads(capsys.readouterr().out)

    code, entry = verdict()
    assert code == 0 and entry["passed"] and len(entry["checks"]) == 4
    code, entry = verdict("--set", "gate.max_negative_flips=0.0001")
    assert code == 1 and [check["passed"] for check in entry["checks"]].count(False) == 1
    assert json.loads((run_dir / "gate.json").read_text())["passed"] is False
    page = (run_dir / "report.html").read_text()
    assert "do not ship" in page and "gate.max_negative_flips=0.0001 instead of what the run" in page
    assert entry["overridden"] == ["gate.max_negative_flips=0.0001"]
    code, entry = verdict("--set", "gate.max_negative_flips=off", "--set", "gate.min_slice_gain=off")
    assert code == 0 and len(entry["checks"]) == 2

    for arguments, what in (
        ([str(tmp_path)], "report.json is not there"),
        ([str(run_dir), "--set", "optim.lr=1"], "must be gate.KEY=VALUE"),
        ([str(run_dir), "--set", "gate.confidence=2"], "gate.confidence"),
        ([str(run_dir), "--set", "gate.confidense=0.9"], "did you mean 'confidence'"),
        ([str(run_dir), "--json", str(tmp_path / "no" / "where.json")], "is not a folder"),
    ):
        assert main(["gate", *arguments, "--no-mlflow"]) == 2
        caught = capsys.readouterr().err
        assert what in caught and caught.count("\n") == 1, caught
    report = run_dir / "report.json"
    (tmp_path / "kept.json").write_bytes(report.read_bytes())
    held = json.loads(report.read_text())
    report.write_text(json.dumps({**held, "slices": []}))
    assert verdict()[0] == 0
    code, entry = verdict("--set", "gate.min_slice_gain=0.5", "--set", "gate.min_self_ratio=0.99")
    assert code == 1 and [check["reached"] for check in entry["checks"]].count("not measured") == 2
    no_tar = {**held, "new_old": {**held["new_old"], "tar_at_far": {}}}
    for content, what in (
        (json.dumps({key: held[key] for key in held if key != "new_new"}).encode(), "has no 'new_new'"),
        (json.dumps({key: held[key] for key in held if key != "slices"}).encode(), "has no 'slices'"),
        (json.dumps(no_tar).encode(), "is damaged (KeyError: '0.01')"),
        (json.dumps({**held, "slices": [7]}).encode(), "is damaged (TypeError"),
        (b'{"version": 1}', "is of version 1"),
        (b"{}", "is of version None"),
        (b"\xff\xfe", "is damaged"),
        (b"[1]", "is damaged"),
    ):
        report.write_bytes(content)
        assert main(["gate", str(run_dir), "--no-mlflow"]) == 2
        caught = capsys.readouterr().err
        assert what in caught and caught.count("\n") == 1, caught
    report.write_bytes((tmp_path / "kept.json").read_bytes())
    assert main(["gate", str(run_dir)]) == 0  # MLflow has not heard of it
    assert "does not know this run" in capsys.readouterr().out


def test_a_gate_that_cannot_reach_mlflow_says_so_with_another_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, config = finished_run(tmp_path, "run", 0.4)
    assert main(["gate", str(run_dir), "--no-mlflow"]) == 0
    tracked(run_dir, config)
    (tmp_path / "mlflow.db").rename(tmp_path / "elsewhere.db")
    assert main(["gate", str(run_dir)]) == 4
    assert "passed, but the alias did not move: no MLflow store" in capsys.readouterr().err
    assert main(["gate", str(run_dir), "--set", "gate.max_negative_flips=0"]) == 1


def test_a_verdict_is_not_overtaken_by_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir, config = finished_run(tmp_path, "run", 0.4)
    assert main(["gate", str(run_dir), "--no-mlflow"]) == 0
    tracked(run_dir, config)
    cursor, spool = run_dir / "tracking.json", run_dir / "tracking.jsonl"
    known, lines = json.loads(cursor.read_text()), spool.read_bytes().splitlines(keepends=True)
    first = next(n for n, line in enumerate(lines) if b'"lce.gate"' in line)
    model_at = next(n for n, line in enumerate(lines) if json.loads(line).get("kind") == "model")
    starts = [sum(map(len, lines[:n])) for n in (first, model_at)]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    other = ["gate", str(run_dir), "--set", "gate.min_self_gain=0.9"]
    for state in ({"offset": starts[0]}, {"deferred": [starts[1], 10**9]}):
        cursor.write_text(json.dumps(known | state))
        assert main(other) == 1
        caught = " ".join(capsys.readouterr().out.split())
        assert f"has not taken and that would be sent after this one; run lce sync {run_dir}, then" in caught
        assert client.get_run(known["runs"]["parent"]).data.tags["lce.gate"] == "passed"
    assert main(["gate", str(run_dir)]) == 4
    assert f"passed, but the alias did not move: {spool}" in capsys.readouterr().err
    assert main(["sync", str(run_dir)]) == 0
    assert main(other) == 1
    assert main(["sync", str(run_dir)]) == 0
    assert client.get_run(known["runs"]["parent"]).data.tags["lce.gate"] == "not passed"
    # numbers alone may wait: they tell nobody of a verdict
    with spool.open("a") as file:
        file.write('{"kind":"metrics","key":"new","time_ms":1,"step":1,"metrics":{"loss/total":1.0}}\n')
    assert main(["gate", str(run_dir)]) == 0
