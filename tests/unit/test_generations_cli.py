"""``lce generations``: runs in a row become one matrix, or an error that says which run does not follow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from launch.cli import main
from launch.prepare import prepare_data
from lce_dist.compat.artefact import save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.config import parse_config
from lce_dist.embedding import embed_batches, gather_all
from lce_dist.evaluation.generations import compare_generations
from lce_dist.evaluation.metrics import EmbeddingSet
from lce_dist.models.catalog import build_net
from lce_dist.models.weights import load_weights, save_weights
from lce_dist.world import World
from pipelines.manifest import split_identities
from pipelines.stream import ImageStream, block_plan

DIM, SIZE, CPU = 16, 32, torch.device("cpu")


class Runs:
    """Folders as two finished runs leave them: networks that nobody trained are as good for the wiring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def values(self, mode: str, **old: object) -> dict:
        return {
            "run": {"dir": str(self.folder)},
            "data": {
                "synthetic": {"identities": 14, "photos_per_identity": 5, "photo_size": 64},
                "image_size": SIZE,
                "heldout_identities": 6,
            },
            "old": {"embedding_dim": DIM, **old},
            "new": {"net": "tiny8", "embedding_dim": DIM},
            "head": {"loss": "softmax"},
            "compat": {"mode": mode},
        }

    def add(self, name: str, seed: int, mode: str, **old: object) -> Path:
        directory = self.folder / name
        for stage, number in (("old", 1), ("new", seed)):
            (directory / stage).mkdir(parents=True)
            if stage == "new" or "weights" not in old:
                save_weights(build_net("tiny8", DIM, SIZE, seed=number), directory / stage / "model.safetensors", {})
        config = parse_config(self.values(mode, **old), "test", json_mode=True)
        (directory / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
        (directory / "report.json").write_text("{}")
        manner = mode.partition("-")[2]
        if manner != "direct":
            bridge = build_bridge("linear", DIM, DIM, seed + 10).eval()
            direction = "old_to_new" if manner == "forward" else "new_to_old"
            card = {"direction": direction, "chosen": "x", "kind": "linear", "dim_in": DIM, "dim_out": DIM}
            save_bridge(directory / "bridge", bridge, card)
        return directory


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def two(runs: Runs, mode: str) -> list[str]:
    first = runs.add("first", 2, mode, net="tiny8")
    weights = str(first / "new" / "model.safetensors")
    return [str(first), str(runs.add("second", 3, mode, net="tiny8", weights=weights))]


def linear(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    matrix_ED = build_bridge("linear", DIM, DIM, seed + 10).matrix.weight.detach().numpy()
    return lambda rows: rows @ matrix_ED.T


@pytest.mark.parametrize("manner", ["direct", "backward", "forward"])
def test_the_matrix_is_that_of_the_runs_models_and_maps(
    runs: Runs, manner: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = two(runs, f"training-{manner}")
    out = runs.folder / "generations.json"
    assert main(["generations", *chain, "--far", "0.1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["names"] == ["old", "first", "second"] and out.with_suffix(".png").stat().st_size > 10_000
    assert "AC " in told and "second" in told
    for cell in found["cells"]:
        row, column = (found["names"].index(cell[side]) for side in ("query", "gallery"))
        assert cell["tar_at_far"]["0.1"] == found["tar"][row][column]
        assert cell["low"] <= found["tar"][row][column] <= cell["high"] and set(cell["tar_at_far"]) == {
            "0.1",
            "0.01",
            "0.001",
        }
    assert len(found["cells"]) == 6
    if manner == "direct":
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert main(["generations", *chain, "--far", "0.1", "--mlflow"]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        client = mlflow.MlflowClient(f"sqlite:///{runs.folder}/mlflow.db")
        run = client.get_run(said.split()[2])
        assert run.info.run_name == "old > first > second" and run.info.status == "FINISHED"
        assert run.data.metrics["tar_at_far_0.1/second_in_old"] == pytest.approx(found["tar"][2][0])
        assert {"rank1/second_in_old", "generations/AC", "tar_at_far_0.001/first_in_first"} <= run.data.metrics.keys()
        names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        assert names == {"generations.json", "generations.png"}
    # by hand: the same images through each network
    config = parse_config(runs.values("training-direct", net="tiny8"), "test", json_mode=True)
    dataset = prepare_data(config.data, runs.folder / ".cache", lambda what, done, of: None)
    data = config.data
    heldout = split_identities(dataset.identities, 6, data.old_identities, data.split_seed).heldout
    view = dataset.select(heldout)
    sets = []
    for name, file in zip(found["names"], ("first/old", "first/new", "second/new"), strict=True):
        net = build_net("tiny8", DIM, SIZE, seed=0)
        load_weights(net, runs.folder / file / "model.safetensors")
        with ImageStream(view, block_plan(view.num_samples, 0, 1, 128), SIZE, None, 0, CPU) as stream:
            vectors, labels, ids = gather_all(embed_batches(net, stream, DIM), World())
        sets.append(EmbeddingSet(name, vectors.numpy(), labels.numpy(), ids.numpy()))
    maps = None if manner == "direct" else [linear(2), linear(3)]
    expected = compare_generations(sets, 0.1, maps, manner)  # type: ignore[arg-type]
    tar = np.array([[np.nan if cell is None else cell for cell in row] for row in found["tar"]])
    np.testing.assert_allclose(tar, expected.tar_GG, atol=0.02)
    assert np.isnan(tar[0, 1]) and len(set(tar[~np.isnan(tar)].tolist())) > 2
    assert found["average_metric"] == pytest.approx(expected.average_metric, abs=0.01)


def test_runs_that_do_not_follow_each_other_are_refused(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    chain = two(runs, "training-direct")

    def refusal(*arguments: str) -> str:
        assert main(["generations", *arguments]) == 2
        return capsys.readouterr().err

    assert "first does not upgrade the new model of" in refusal(chain[1], chain[0])
    third = str(runs.add("third", 4, "training-direct", net="tiny8", weights=f"{chain[1]}/new/model.safetensors"))
    assert "third does not upgrade the new model of" in refusal(chain[0], third)
    assert main(["generations", *chain, third]) == 0
    assert "third" in capsys.readouterr().out
    own = str(runs.add("own", 4, "training-direct", net="tiny8"))
    assert "trained an old model of its own" in refusal(chain[0], own)
    mapped = str(runs.add("mapped", 4, "training-forward", net="tiny8"))
    assert "the manners direct, forward" in refusal(chain[0], mapped)
    assert "is no finished run" in refusal(str(runs.folder / "nowhere"))
    assert "--far is 2.0" in refusal(chain[0], "--far", "2.0")
    assert "must end in .json, or be a folder" in refusal(chain[0], "--out", str(runs.folder / "gen.png"))
    (runs.folder / "file").write_text("")
    assert "is not a folder" in refusal(chain[0], "--out", str(runs.folder / "file" / "gen.json"))
    assert not (runs.folder / "gen.png").exists()
    (runs.folder / "first" / "resolved.json").write_text("{")
    assert "is damaged" in refusal(chain[0])
