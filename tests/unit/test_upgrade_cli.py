"""`lce evaluate upgrade` over real files: the numbers of the library, its gate, MLflow, and refusals of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launch.cli import main
from lce_dist.compat.artefact import map_rows, read_bridge, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.compat.closed_form import PairSums, procrustes
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.matrix import build_matrix, cells_of, report_entries
from lce_dist.evaluation.metrics import compare
from lce_dist.evaluation.upgrade import examine, upgrade_entries
from lce_dist.vector_files import Block, write_vectors

NUM, PEOPLE, DIM = 400, 50, 16
LABELS = np.arange(NUM, dtype=np.int64) % PEOPLE
WHO = [f"person {label:02}" for label in LABELS]
KEYS = [f"{who}/photo {n:03}.jpg" for n, who in enumerate(WHO)]
FARS = (0.01, 0.1)
COVER = np.random.default_rng(7).choice(["none", "mask"], NUM)


def rows(seed: int, noise: float, dim: int = DIM) -> np.ndarray:
    likes = np.random.default_rng(3).normal(size=(PEOPLE, dim))[LABELS]
    made = likes + noise * np.random.default_rng(seed).normal(size=likes.shape)
    for _ in range(10):  # until another division by the length, as when the file is read, changes no bit
        made = (made / np.linalg.norm(made.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    return made


OLD, NEW, ALONE = rows(1, 0.75), rows(2, 0.4), rows(4, 0.38)


def stored(path: Path, made: np.ndarray, order: Any = None, who: bool = True, space: str | None = None) -> Path:
    order = np.arange(len(made)) if order is None else order
    names = [WHO[n] for n in order] if who else None
    write_vectors(path, made.shape[1], len(order), [Block([KEYS[n] for n in order], made[order], names)], space)
    return path


def embedded(name: str, made: np.ndarray) -> EmbeddingSet:
    return EmbeddingSet(name, made, LABELS, np.arange(NUM, dtype=np.int64))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three formats, three orders; only one file says who is on an image."""
    draw = np.random.default_rng(0)
    return {
        "old": stored(tmp_path / "old.parquet", OLD, None, True, "old space"),
        "new": stored(tmp_path / "new.npz", NEW, draw.permutation(NUM), False, "new space"),
        "independent": stored(tmp_path / "alone.npy", ALONE, draw.permutation(NUM), False),
    }


def upgrade(files: dict[str, Path], out: Path, *words: object) -> dict[str, Any]:
    named = [str(word) for name, path in files.items() for word in (f"--{name}", path)]
    assert main(["evaluate", "upgrade", *named, "--far", "0.01", "0.1", "--out", str(out), *map(str, words)]) == 0
    return json.loads((out / "report.json").read_text())


def refusal(files: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    named = [str(word) for name, path in files.items() for word in (f"--{name}", path)]
    assert main(["evaluate", "upgrade", *named, "--out", str(out), *map(str, words)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lce: ")]
    assert len(lines) == 1 and "person" not in lines[0]
    return lines[0]


def test_the_report_is_what_a_run_says_of_the_same_vectors(tmp_path, files):
    attributes = tmp_path / "people.csv"
    attributes.write_text("key,cover\n" + "".join(f"{key},{word}\n" for key, word in zip(KEYS, COVER, strict=True)))
    out = tmp_path / "upgrade"
    found = upgrade(files, out, "--attributes", attributes, "--set", "run.seed=3")
    cells = cells_of(embedded("old", OLD), embedded("new", NEW), embedded("independent", ALONE))
    truth = examine(build_matrix(cells, FARS), cells, 0.01, {"cover": COVER}, seed=3)
    entries = json.loads(json.dumps(upgrade_entries(truth)))
    assert {key: found[key] for key in entries} == entries
    assert found["criterion_met"] and found["confidence"] == 1.0 and len(found["slices"]) == 2
    assert found["p_scores"] is not None and found["backfill"] is not None
    assert (found["mode"], found["space"], found["parent_space"]) == ("vectors-direct", "new space", "old space")
    assert {path.stem for path in (out / "figures").glob("*.png")} == {
        "matrix", "roc", "det", "similarities", "flips", "backfill", "groups"
    }  # fmt: skip
    page = (out / "report.html").read_text()
    assert "old.parquet" in page and found["procrustes_note"] in page and "Every group at the thresholds" in page
    # who gains does not depend on the order of the file
    assert upgrade(files, out, "--attributes", attributes, "--set", "run.seed=3")["revision"] == 1
    # a report without groups shows no picture of those of the report before
    (out / "figures" / "mine.png").write_bytes(b"png")
    upgrade(files, out)
    assert not (out / "figures" / "groups.png").exists() and (out / "figures" / "mine.png").exists()
    assert "Every group at the thresholds" not in (out / "report.html").read_text()


def test_the_rotation_is_fitted_to_one_half_and_measured_on_the_other(tmp_path, files):
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0].astype(np.float32)
    files["new"] = stored(tmp_path / "turned.npz", NEW @ turn)
    found = upgrade(files, tmp_path / "out", "--set", "run.seed=5")
    draw = np.random.default_rng(5)
    fitted = np.isin(LABELS, draw.permutation(PEOPLE)[: PEOPLE // 2])
    matrix = (
        procrustes(PairSums.of(torch.from_numpy((NEW @ turn)[fitted]), torch.from_numpy(OLD[fitted]))).float().numpy()
    )
    turned = (NEW @ turn) @ matrix.T
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    ids, other = np.arange(NUM, dtype=np.int64), ~fitted
    truth = compare(
        EmbeddingSet("t", turned[other].astype(np.float32), LABELS[other], ids[other]),
        EmbeddingSet("o", OLD[other], LABELS[other], ids[other]),
        FARS,
    )
    assert found["procrustes"]["new_old"]["tar_at_far"] == pytest.approx(truth.tar_at_far, abs=2e-3)
    assert not found["criterion_met"] and found["procrustes"]["new_old"]["tar_at_far"]["0.01"] > 0.5
    assert f"{fitted.sum()} images to fit, {other.sum()} to measure" in found["procrustes_note"]
    # others may be given to fit it to
    others = [stored_others(tmp_path / f"{name}.npz", made) for name, made in (("fo", OLD), ("fn", NEW @ turn))]
    again = upgrade(files, tmp_path / "out2", "--fit-on", *others)
    assert again["procrustes"]["new_old"]["num_genuine"] == again["new_old"]["num_genuine"]
    assert "on the vectors of --fit-on: 400 images to fit, 400 to measure" in again["procrustes_note"]


def stored_others(path: Path, made: np.ndarray) -> Path:
    block = Block([f"other {key}" for key in KEYS], made, [f"other {who}" for who in WHO])
    write_vectors(path, made.shape[1], NUM, [block])
    return path


@pytest.mark.parametrize("direction", ["new_to_old", "old_to_new"])
def test_a_map_stands_on_the_side_that_its_card_names(tmp_path, direction, capsys):
    old, new = rows(1, 0.75, 12), rows(2, 0.4)
    dims = (DIM, 12) if direction == "new_to_old" else (12, DIM)
    made = build_bridge("linear", *dims, seed=3).eval()
    ends = ("new space", "old space") if direction == "new_to_old" else ("old space", "new space")
    card = {"kind": "linear", "dim_in": dims[0], "dim_out": dims[1], "direction": direction}
    save_bridge(tmp_path / "bridge", made, {**card, "from_space": ends[0], "to_space": ends[1]})
    files = {
        "old": stored(tmp_path / "old.npz", old, space="old space"),
        "new": stored(tmp_path / "new.npz", new, space="new space"),
    }
    refused = refusal(files, tmp_path / "out", capsys)
    assert "have 16 dimensions" in refused and "12; must be equal" in refused and "--bridge" in refused
    found = upgrade(files, tmp_path / "out", "--bridge", tmp_path / "bridge")
    mapped = map_rows(read_bridge(tmp_path / "bridge"), torch.from_numpy(new if dims[0] == DIM else old)).numpy()
    crossing = (mapped, old) if direction == "new_to_old" else (new, mapped)
    pair = embedded("new", crossing[0]), embedded("old", crossing[1])
    cells = cells_of(embedded("old", old), embedded("new", new), None, pair)
    entries = json.loads(json.dumps(report_entries(build_matrix(cells, FARS))))
    assert {key: found[key] for key in entries} == entries
    assert found["mode"] == {"new_to_old": "vectors-backward", "old_to_new": "vectors-forward"}[direction]
    assert found["bridge"]["kind"] == "linear" and "spaces:" not in capsys.readouterr().err
    # of other models
    files["old"] = stored(tmp_path / "else.npz", old, space="another")
    assert "'another'" in refusal(files, tmp_path / "out3", capsys, "--bridge", tmp_path / "bridge")


def test_the_gate_judges_it_and_mlflow_has_it(tmp_path, files, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    del files["independent"]
    out = tmp_path / "Upgrade of May"
    upgrade(files, out, "--mlflow", "--set", "gate.max_negative_flips=0.5")
    assert json.loads((out / "gate.json").read_text())["passed"]
    assert main(["gate", str(out)]) == 0
    assert "is tagged" in capsys.readouterr().out
    assert main(["gate", str(out), "--set", "gate.min_self_gain=0.9"]) == 1
    assert "may not be shipped: 1 of" in capsys.readouterr().err
    assert main(["gate", str(out), "--set", "optim.lr=1"]) == 2
    assert main(["gate", str(out), "--set", "gate.min_self_gian=0.9"]) == 2
    assert "did you mean 'min_self_gain'?" in capsys.readouterr().err
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lce-dist").experiment_id])
    assert run.info.run_name == "upgrade-of-may" and run.data.tags["lce.gate"] == "not passed"
    report = json.loads((out / "report.json").read_text())
    assert run.data.metrics["tar_at_far_0.01/new_old"] == report["new_old"]["tar_at_far"]["0.01"]
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"old vectors", "new vectors"}
    assert {"report.html", "report.json", "gate.json", "figures", "config"} <= {
        one.path for one in client.list_artifacts(run.info.run_id)
    }
    assert "old.parquet" in run.data.tags["mlflow.note.content"]


@pytest.mark.parametrize("name", ["gate.json", "report.html"])
def test_a_verdict_that_cannot_be_written_is_no_verdict(tmp_path, files, capsys, name):
    """1 would say "do not ship"."""
    out = tmp_path / "up"
    upgrade(files, out)
    (out / name).unlink()
    (out / name).mkdir()
    capsys.readouterr()
    assert main(["gate", str(out), "--no-mlflow"]) == 4
    assert f"{name} cannot be written: Is a directory." in capsys.readouterr().err
    assert not list(out.glob("*.partial"))


def test_a_report_over_vectors_is_no_generation(tmp_path, files, capsys):
    out = tmp_path / "up"
    upgrade(files, out)
    capsys.readouterr()
    assert main(["generations", str(out), str(out)]) == 2
    assert f"{out} is a report over stored vectors; must be a run" in capsys.readouterr().err


def test_a_report_after_a_deleted_one_reaches_mlflow(tmp_path, files, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    del files["independent"]
    out = tmp_path / "upgrade"
    first = upgrade(files, out, "--mlflow")
    (out / "report.json").unlink()
    files["new"] = stored(tmp_path / "newer.npz", rows(5, 0.6))
    second = upgrade(files, out, "--mlflow")
    name, cell = "tar_at_far_0.01/new_old", ("new_old", "tar_at_far", "0.01")
    values = [one[cell[0]][cell[1]][cell[2]] for one in (first, second)]
    assert values[0] != values[1] and (first["revision"], second["revision"]) == (0, 1)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lce-dist").experiment_id])
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)] == [*enumerate(values)]
    # the spool may be gone as well, and a report that was never told to MLflow counts too
    (out / "tracking.jsonl").unlink()
    (out / "report.json").write_text("{")
    assert upgrade(files, out)["revision"] == 2 and upgrade(files, out)["revision"] == 3


def test_images_that_one_file_lacks(tmp_path, files, capsys):
    del files["independent"]
    some = np.delete(np.arange(NUM), [17, 40])
    files["new"] = stored(tmp_path / "some.npz", NEW, some, False)
    told = refusal(files, tmp_path / "out", capsys)
    assert "old.parquet: the key of row 18 is not in" in told and "2 of 400 keys" in told and "0 of 398 keys" in told
    assert "the 398 images that all have" in told
    found = upgrade(files, tmp_path / "out", "--common")
    assert found["num_heldout_images"] == 398 and found["vectors"]["old"]["left_out"] == 2
    pair = EmbeddingSet("n", NEW[some], LABELS[some], some.astype(np.int64))
    truth = compare(pair, EmbeddingSet("o", OLD[some], LABELS[some], some.astype(np.int64)), FARS)
    assert found["new_old"]["tar_at_far"] == truth.tar_at_far
    write_vectors(tmp_path / "none.npz", DIM, 2, [Block(["x", "y"], NEW[:2], None)])
    files["new"] = tmp_path / "none.npz"
    assert "look at the keys" in refusal(files, tmp_path / "out2", capsys, "--common")


def test_bad_files_are_one_line_each(tmp_path, files, capsys):
    del files["independent"]
    good = files["new"]

    def told(made: np.ndarray, keys: list[str], who: list[str] | None) -> str:
        path = tmp_path / "bad.npz"
        path.unlink(missing_ok=True)
        more = {} if who is None else {"identities": np.array(who)}
        np.savez(path, keys=np.array(keys), vectors=made, **more)
        files["new"] = path
        return refusal(files, tmp_path / "out", capsys)

    long, zero, nan = NEW.copy(), NEW.copy(), NEW.copy()
    long[6] *= 2.0
    zero[7], nan[8, 3] = 0.0, np.nan
    assert "bad.npz: row 7 has length 2; must be 1" in told(long, KEYS, None)
    assert "bad.npz: row 8 is zero or not finite" in told(zero, KEYS, None)
    assert "bad.npz: row 9 is zero or not finite" in told(nan, KEYS, None)
    assert "keep one row a key" in told(NEW, [*KEYS[:2], KEYS[0], *KEYS[3:]], None)
    swapped = [WHO[1], *WHO[1:]]
    line = told(NEW, KEYS, swapped)
    assert "old.parquet, row 1, and" in line and "name two identities" in line
    files["old"], files["new"] = good, good
    assert "says who is on an image" in refusal(files, tmp_path / "out", capsys)
    one_each = tmp_path / "singles.npz"
    write_vectors(one_each, DIM, PEOPLE, [Block(KEYS[:PEOPLE], NEW[:PEOPLE], WHO[:PEOPLE])])
    files["old"] = files["new"] = one_each
    assert "at most 1 of one identity" in refusal(files, tmp_path / "out", capsys)
    assert not (tmp_path / "out" / "report.json").exists()


def test_two_spaces_without_a_map_are_told(tmp_path, files, capsys):
    del files["independent"]
    upgrade(files, tmp_path / "out")
    told = " ".join(capsys.readouterr().err.split())
    assert "spaces: old old space, new new space; compared as they are" in told and "--bridge" in told
    files["new"] = stored(tmp_path / "same.npz", NEW, None, False, "old space")
    upgrade(files, tmp_path / "out")
    files["new"] = stored(tmp_path / "silent.npz", NEW, None, False)
    upgrade(files, tmp_path / "out")
    assert "spaces:" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "npz", "npy"])
@pytest.mark.parametrize("side", ["old", "new"])
def test_a_file_without_rows_is_one_line(tmp_path, files, capsys, kind, side):
    none = np.empty((0, DIM), dtype=np.float32)
    path = tmp_path / f"none.{kind}"
    if kind == "parquet":
        empty = {"key": pa.array([], pa.string()), "vector": pa.array([], pa.list_(pa.float32(), DIM))}
        pq.write_table(pa.table(empty), path)
    elif kind == "npz":
        np.savez(path, keys=np.array([], dtype=str), vectors=none)
    else:
        np.save(path, none)
        (tmp_path / "none.keys.txt").write_text("")
    files[side] = path
    line = refusal(files, tmp_path / "out", capsys)
    assert f"vectors {path} have the shape (0, " in line and "must have a row and a column" in line


def test_flags_and_folders(tmp_path, files, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "holds no report over vectors" in refusal(files, tmp_path / "mine", capsys)
    assert "must be above 0 and below 1" in refusal(files, tmp_path / "out", capsys, "--far", "1.5")
    assert "nothing is trained" in refusal(files, tmp_path / "out", capsys, "--set", "optim.lr=1")
    assert "did you mean 'confidence'" in refusal(files, tmp_path / "out", capsys, "--set", "gate.confidenze=1")
    fit = [files["old"], files["new"]]
    assert "is among those that are compared" in refusal(files, tmp_path / "out", capsys, "--fit-on", *fit)


def test_identities_of_one_image_are_impostors(tmp_path, capsys):
    who = [f"alone {n}" if n < 30 else word for n, word in enumerate(WHO)]
    files = {}
    for name, made in (("old", OLD), ("new", NEW)):
        files[name] = tmp_path / f"{name}.npz"
        write_vectors(files[name], DIM, NUM, [Block(KEYS, made, who)])
    found = upgrade(files, tmp_path / "out")
    assert found["num_identities_of_one_image"] == 30 and found["num_identities"] == PEOPLE + 30
    assert "30 identities have one image" in capsys.readouterr().err
    assert (
        found["old_old"]["num_genuine"]
        < build_matrix({"old_old": (embedded("o", OLD),) * 2}, FARS)["old_old"].num_genuine
    )
