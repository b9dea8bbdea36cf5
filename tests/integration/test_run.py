"""The main job with every real part in it: Ray nodes, DeepSpeed, DALI, MLflow; undisturbed, killed, on other ranks."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors import safe_open
from safetensors.torch import load_file

from launch.beside import look
from launch.job import Job
from lce_dist.config import parse_config
from tests.integration.conftest import CANARY, Workplace, wait_for, workers_of

KEYS = ("old_old", "new_old", "new_new")


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> str:
    """The run that the others are compared with: two nodes, no trouble."""
    looks = ("--set", "checkpoint.evaluate=always", "--set", "checkpoint.evaluate_every=2")
    code, output = workplace.run("train", "--config", "small.toml", "--nodes", "2", "--with-independent", *looks)
    assert code == 0, output
    return output


def test_checkpoints_were_looked_at_beside_the_training(workplace: Workplace, undisturbed: str) -> None:
    run = workplace.folder / "runs" / "small"
    ranking = json.loads((run / "new" / "ranking.json").read_text())
    assert ranking and [row["joint"] for row in ranking] == sorted((row["joint"] for row in ranking), reverse=True)
    assert f"new model: at step {ranking[0]['step']} TAR old/old" in undisturbed
    client = MlflowClient(f"sqlite:///{workplace.folder}/runs/mlflow.db")
    told = json.loads((run / "tracking.json").read_text())["runs"]["new"]
    points = {point.step: point.value for point in client.get_metric_history(told, "beside/joint")}
    seen = {row["step"]: row["joint"] for row in ranking}
    assert points.items() <= seen.items() and points
    assert all(step % 20 == 10 for step in points), "every second checkpoint of every 10 steps, from the first"
    # the last checkpoint is the model that was evaluated at the end: the same numbers over the same images
    config = parse_config(json.loads((run / "resolved.json").read_text()), "resolved", json_mode=True)
    (data,) = (workplace.folder / "runs" / ".cache").glob("faces-*")
    job = Job(config, data, run, run.parent / ".cache", "f", "e", workplace.folder, True, {}, {})
    steps = sorted(int(path.name[5:]) for path in (run / "new" / "checkpoints").glob("step-*"))
    last, report = look(job, steps[-1]), workplace.report("small")
    assert last is not None and last.step == steps[-1]
    for key, value in (("old_old", last.old_old), ("new_old", last.new_old), ("new_new", last.new_new)):
        assert value == report[key]["tar_at_far"]["0.01"]
    best = max(json.loads((run / "new" / "ranking.json").read_text()), key=lambda row: row["joint"])
    with safe_open(run / "new" / "best.safetensors", "pt") as stored:
        assert float(stored.metadata()["joint"]) == pytest.approx(best["joint"], abs=1e-6)
    assert look(job, 7) is None, "no such checkpoint"


def test_report_table_and_files(workplace: Workplace, undisturbed: str) -> None:
    report = workplace.report("small")
    for key in (*KEYS, "independent_old", "independent_new"):
        assert set(report[key]["tar_at_far"]) == {"0.01", "0.001"}
        assert 0.0 <= report[key]["rank1"] <= 1.0
    assert (report["num_nodes"], report["num_ranks"]) == (2, 2)
    assert report["images_per_s"] > 0
    expected = report["new_old"]["tar_at_far"]["0.01"] > report["old_old"]["tar_at_far"]["0.01"]
    assert report["criterion_met"] is expected
    assert f"{report['new_new']['tar_at_far']['0.01']:.3f}" in undisturbed
    pairs = report["pairs"]["drawn"]
    assert set(pairs) == {"old_old", "new_old", "new_new", "independent_new"}
    assert all(0.4 <= cell["accuracy"] <= 1.0 and cell["num_pairs"] == 20 for cell in pairs.values())
    assert f"{pairs['new_old']['accuracy']:.4f} ±" in undisturbed
    assert set(report["procrustes"]) == {"new_old", "independent_old"}
    assert {group["column"] for group in report["slices"]} == {"cover", "light", "pose", "skin"}
    run = workplace.folder / "runs" / "small"
    for name in ("old/model.safetensors", "new/model.safetensors", "figures/matrix.png", "figures/losses_new.png"):
        assert (run / name).stat().st_size > 1000
    assert "Traceback" not in undisturbed and "Warning" not in undisturbed


def test_mlflow_holds_the_run(workplace: Workplace, undisturbed: str) -> None:
    client = MlflowClient(f"sqlite:///{workplace.folder}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "lce-dist"]
    all_runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in all_runs if run.info.run_name == "small"]
    children = [run for run in all_runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    runs = {run.info.run_name: run for run in children}
    assert set(runs) == {"old", "centres", "new", "independent", "evaluation"} and len(children) == len(runs)
    assert all(run.info.status == "FINISHED" for run in (parent, *children))
    report = workplace.report("small")
    assert parent.data.metrics["tar_at_far_0.01/new_old"] == pytest.approx(report["new_old"]["tar_at_far"]["0.01"])
    assert any(name.startswith("system/") for name in parent.data.metrics)
    assert parent.data.params["head.margin_cos"] == "0.1"
    history = client.get_metric_history(runs["new"].info.run_id, "loss/alignment")
    assert [point.step for point in history] == sorted({point.step for point in history})
    artifacts = {a.path for folder in ("figures", "config") for a in client.list_artifacts(parent.info.run_id, folder)}
    assert {"figures/matrix.png", "figures/roc.png", "figures/contact_sheet.png", "config/resolved.json"} <= artifacts
    stored = {a.path for a in client.list_artifacts(runs["new"].info.run_id, "model")}
    assert stored == {"model/model.safetensors", "model/card.json", "model/MLmodel"}
    (version,) = client.search_model_versions("name = 'small'")
    assert version.run_id == runs["new"].info.run_id and version.tags["space"] == report["space"]
    inputs = {one.dataset.name for one in parent.inputs.dataset_inputs}
    assert inputs == {"old model", "new model", "held out"}
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"report.html", "report.json", "gate.json"}


def test_a_secret_of_the_environment_is_left_nowhere(workplace: Workplace, undisturbed: str) -> None:
    assert CANARY not in undisturbed
    files = [path for path in (workplace.folder / "runs").rglob("*") if path.is_file()]
    assert len(files) > 50 and any(path.name == "mlflow.db" for path in files)
    told = [path.name for path in files if CANARY.encode() in path.read_bytes()]
    assert told == []


def test_the_same_command_again_shows_the_report(workplace: Workplace, undisturbed: str) -> None:
    code, output = workplace.run("train", "--config", "small.toml", "--nodes", "2")
    assert code == 0 and "finished before" in output and "M(new, old)" in output
    # another gate is judged without Ray and told to MLflow
    gate_file = workplace.folder / "runs" / "small" / "gate.json"
    client = MlflowClient(f"sqlite:///{workplace.folder}/runs/mlflow.db")
    parent = json.loads((gate_file.parent / "tracking.json").read_text())["runs"]["parent"]
    for asked, word in (("2.0", "not passed"), ("-2.0", "passed")):
        others = (
            "gate.confidence=off",
            "gate.min_self_ratio=off",
            "gate.max_negative_flips=off",
            "gate.min_slice_gain=off",
        )
        options = [part for one in (f"gate.min_self_gain={asked}", *others) for part in ("--set", one)]
        code, output = workplace.run("train", "--config", "small.toml", "--nodes", "2", *options)
        assert code == 0 and "starting" not in output
        assert json.loads(gate_file.read_text())["passed"] is (word == "passed")
        assert client.get_run(parent).data.tags["lce.gate"] == word
    code, output = workplace.run("train", "--config", "small.toml", "--nodes", "2")
    assert code == 0 and json.loads(gate_file.read_text())["gate"]["confidence"] == 0.95


def test_other_settings_under_the_same_name_are_refused(workplace: Workplace, undisturbed: str) -> None:
    code, output = workplace.run("train", "--config", "small.toml", "--nodes", "2", "--set", "optim.lr=0.05")
    assert code == 2 and "optim.lr 0.1 then, 0.05 now" in output


def test_killed_worker_then_killed_driver_ends_with_the_same_report(workplace: Workplace, undisturbed: str) -> None:
    arguments = ("train", "--config", "small.toml", "--nodes", "2", "--with-independent", "--name", "killed")
    new = workplace.folder / "runs" / "killed" / "new"
    process = workplace.start(*arguments)
    wait_for(lambda: (new / "checkpoints" / "step-00000020").exists(), process, 200)
    victims = workers_of(process)
    assert len(victims) == 2
    os.kill(victims[-1].pid, signal.SIGKILL)
    log = new / "batch_ids.tsv"
    wait_for(lambda: {w.pid for w in workers_of(process)}.isdisjoint({v.pid for v in victims}), process, 100)
    wait_for(lambda: (new / "checkpoints" / "step-00000060").exists(), process, 200)
    process.kill()
    process.communicate()
    assert not (new.parent / "report.json").exists(), "the driver was killed too late to show anything"
    kept = len(log.read_text().splitlines())

    code, output = workplace.run(*arguments)
    assert code == 0, output
    assert "going on with run" in output
    assert kept < len(workplace.batch_ids("small", "new"))
    clean, disturbed = workplace.report("small"), workplace.report("killed")
    for key in (*KEYS, "independent_old", "independent_new", "criterion_met", "fingerprint"):
        assert disturbed[key] == clean[key], key
    for stage in ("old", "new"):
        assert workplace.batch_ids("killed", stage) == workplace.batch_ids("small", stage)
        # nothing missing, nothing double; an attempt's first step is a point of its own
        told = {name: workplace.points(name, stage, every=10) for name in ("small", "killed")}
        assert told["killed"] == told["small"] and len(told["small"]) >= 2
    weights = [
        load_file(workplace.folder / "runs" / name / "new" / "model.safetensors") for name in ("small", "killed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    templates = [new / "classifier", *new.glob("checkpoints/step-*"), *(new.parents[1] / ".cache").glob("old-space-*")]
    assert len(templates) >= 4 and all(path.stat().st_mode & 0o077 == 0 for path in templates)

    # other questions about the same weights: evaluated anew, not trained
    trained = (new / "model.safetensors").stat().st_mtime_ns
    code, output = workplace.run(*arguments, "--set", "evaluation.fars=[0.1,0.01]", "--set", "gate.min_self_gain=0.99")
    assert code == 0, output
    assert (new / "model.safetensors").stat().st_mtime_ns == trained
    anew = workplace.report("killed")
    assert set(anew["new_old"]["tar_at_far"]) == {"0.1", "0.01"} and (clean["revision"], anew["revision"]) == (0, 1)
    assert anew["new_old"]["tar_at_far"]["0.01"] == clean["new_old"]["tar_at_far"]["0.01"]
    verdict = json.loads((new.parent / "gate.json").read_text())
    assert not verdict["passed"] and verdict["gate"]["min_self_gain"] == 0.99
    client = MlflowClient(f"sqlite:///{workplace.folder}/runs/mlflow.db")
    parent = json.loads((new.parent / "tracking.json").read_text())["runs"]["parent"]
    assert [point.step for point in client.get_metric_history(parent, "tar_at_far_0.01/new_old")] == [0, 1]
    assert client.get_run(parent).data.tags["lce.gate"] == "not passed"


def test_any_number_of_ranks_sees_the_same_batches_and_a_net_without_batch_statistics_the_same_losses(
    workplace: Workplace, undisturbed: str
) -> None:
    losses = {}
    for nodes in (1, 3):
        name = f"gn{nodes}"
        often = ("--set", "tracking.every_steps=1")
        code, output = workplace.run("train", "--config", "gn.toml", "--nodes", str(nodes), "--name", name, *often)
        assert code == 0, output
        losses[nodes] = workplace.losses(name, "old")
        # the order depends on seed, epoch and data alone: not on the ranks, and not on the network
        for stage in ("old", "new"):
            assert workplace.batch_ids(name, stage) == workplace.batch_ids("small", stage)
    assert losses[1].keys() == losses[3].keys()
    assert len(losses[1]) == 20
    for step, loss in losses[1].items():
        # rounding alone, until it carries an input of a ReLU over zero: from then on the paths part
        assert losses[3][step] == pytest.approx(loss, rel=1e-5 if step <= 3 else 5e-2)


def test_both_models_frozen_and_a_map_between_them(workplace: Workplace, undisturbed: str) -> None:
    arguments = ("train", "--config", "small.toml", "--nodes", "2", "--name", "forward")
    arguments += ("--set", "compat.mode=mapping-forward", "--set", "new.epochs=10.0")
    code, output = workplace.run(*arguments)
    assert code == 0, output
    assert "M(new, T12 old)" in output and "map chosen:" in output
    report = workplace.report("forward")
    card = report["bridge"]
    assert (report["mode"], card["direction"], card["dim_in"]) == ("mapping-forward", "old_to_new", 32)
    names = [candidate["name"] for candidate in card["candidates"]]
    assert {"procrustes", "trained mlp"} <= set(names) and card["chosen"] in names
    assert (workplace.folder / "runs" / "forward" / "bridge" / "bridge.safetensors").exists()


def test_asked_to_stop_a_run_saves_ends_with_5_and_goes_on_from_there(workplace: Workplace) -> None:
    arguments = ("train", "--config", "gn.toml", "--nodes", "1", "--set", "tracking.every_steps=1")
    code, output = workplace.run(*arguments, "--name", "gn1")
    assert code == 0, output
    arguments += ("--name", "asked", "--set", "checkpoint.every_steps=1000")
    run = workplace.folder / "runs" / "asked"
    log = run / "new" / "batch_ids.tsv"
    process = workplace.start(*arguments)
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 12, process, 200)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 5, output
    (saved,) = (run / "new" / "checkpoints").glob("step-*")
    assert f"after step {int(saved.name[5:])} of" in output and "SIGTERM: saving a checkpoint" in output, output
    assert not (run / "stop").exists()
    code, output = workplace.run("status", "asked")
    assert code == 0 and output.startswith("asked: interrupted, ") and f"new {saved.name}" in output
    code, output = workplace.run("resume", "asked")
    assert code == 0, output
    asked, clean = workplace.report("asked"), workplace.report("gn1")
    for key in (*KEYS, "criterion_met"):
        assert asked[key] == clean[key], key
    assert workplace.batch_ids("asked", "new") == workplace.batch_ids("gn1", "new")
    assert workplace.losses("asked", "new") == workplace.losses("gn1", "new")
