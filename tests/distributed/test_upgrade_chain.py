"""One upgrade after another: a model has one name for its space, whether a run trained it, was given it, or upgrades it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from launch.cli import main
from launch.job import Job, run_job
from launch.prepare import prepare_data
from lce_dist.compat.artefact import map_rows, read_bridge, read_card
from lce_dist.config import Config, parse_config
from lce_dist.head.classifier import export
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import ModelFile, open_model
from lce_dist.models.weights import save_weights
from lce_dist.vector_files import Block, open_vectors, write_vectors
from lce_dist.world import World

SIZE, CPU = 32, torch.device("cpu")


def on_this_rank(world: World, job: Job) -> None:
    torch.manual_seed(0)
    run_job(job, world, lambda event: None)


class Place:
    """A folder of runs over one data set, each on two ranks, or in this process where nothing is trained."""

    def __init__(self, folder: Path, run_distributed: Callable[..., Any] | None) -> None:
        self.folder = folder
        self._run_distributed = run_distributed

    def config(self, name: str, mode: str, old: dict[str, Any], new: dict[str, Any], **compat: Any) -> Config:
        values = {
            "run": {"name": name, "dir": str(self.folder)},
            "data": {
                "synthetic": {"identities": 30, "photos_per_identity": 4, "photo_size": 64},
                "image_size": SIZE,
                "heldout_identities": 8,
            },
            "old": old,
            "new": new,
            "head": {"loss": "softmax", "scale": 16.0},
            "compat": {"mode": mode, **compat},
            "optim": {"global_batch": 44},
            "evaluation": {"fars": [0.1], "criterion_far": 0.1},
        }
        return parse_config(values, "test", json_mode=True)

    def run(self, config: Config) -> dict[str, Any]:
        dataset = prepare_data(config.data, self.folder / ".cache", lambda what, done, of: None)
        run_dir = self.folder / config.run.name
        run_dir.mkdir(exist_ok=True)
        (run_dir / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
        directories = (dataset.directory, run_dir, self.folder / ".cache")
        job = Job(config, *directories, "f" * 16, "e" * 16, self.folder, False, {}, {})
        if self._run_distributed is None:
            run_job(job, World(), lambda event: None)
        else:
            self._run_distributed(on_this_rank, 2, job)
        report: dict[str, Any] = json.loads((run_dir / "report.json").read_text())
        return report


def two_runs(place: Place, mode: str) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = {"net": "tiny8", "embedding_dim": 16, "epochs": 1.0}
    new = {"net": "tiny16", "embedding_dim": 24, "epochs": 1.0}
    first = place.run(place.config("first", mode, trained, new, bridge="least_squares"))
    weights = {"net": "tiny16", "embedding_dim": 24, "weights": "first/new/model.safetensors"}
    third = {"net": "tiny8", "embedding_dim": 20, "epochs": 1.0}
    return first, place.run(place.config("second", mode, weights, third, bridge="least_squares"))


def test_a_gallery_is_mapped_forward_twice(
    tmp_path: Path, run_distributed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = two_runs(Place(tmp_path, run_distributed), "training-forward")
    assert (
        second["parent_space"] == first["space"] and len({first["parent_space"], first["space"], second["space"]}) == 3
    )
    cards = [read_card(tmp_path / name / "bridge") for name in ("first", "second")]
    assert [(card["from_space"], card["to_space"]) for card in cards] == [
        (first["parent_space"], first["space"]),
        (second["parent_space"], second["space"]),
    ]
    # by the door that the next run opens it by
    for name, net, dim, report in (("first", "tiny16", 24, first), ("second", "tiny8", 20, second)):
        file = ModelFile(tmp_path / name / "new" / "model.safetensors", net, dim)
        assert open_model(file, SIZE, CPU).fingerprint == report["space"]
    gallery_ND = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    keys = [f"{n}.jpg" for n in range(5)]
    write_vectors(tmp_path / "g.npz", 16, 5, [Block(keys, gallery_ND, None)], first["parent_space"])
    bridges = [str(tmp_path / name / "bridge") for name in ("first", "second")]
    places = [str(tmp_path / f"g{n}.npz") for n in ("", 1, 2)]
    assert main(["bridge", "apply", bridges[0], places[0], "--out", places[1]]) == 0
    assert main(["bridge", "apply", bridges[1], places[1], "--out", places[2]]) == 0
    assert open_vectors(Path(places[2])).space == second["space"]
    (block,) = open_vectors(Path(places[2])).blocks()
    expected = torch.from_numpy(gallery_ND)
    for bridge in bridges:
        expected = map_rows(read_bridge(Path(bridge)), F.normalize(expected))
    np.testing.assert_allclose(block.rows_bD, expected.numpy(), atol=1e-6)
    # and the comparison can fail: the second map does not begin where the gallery is
    assert main(["bridge", "apply", bridges[1], places[0], "--out", str(tmp_path / "no.npz")]) == 2
    assert "16 dimensions" in capsys.readouterr().err


def test_a_new_model_that_is_turned_is_the_one_that_is_shipped(
    tmp_path: Path, run_distributed: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path, run_distributed)
    trained = {"net": "tiny8", "embedding_dim": 16, "epochs": 1.0}
    config = place.config("turned", "mapping-direct", trained, {"net": "tiny16", "embedding_dim": 16, "epochs": 1.0})
    report = place.run(config)
    shipped = tmp_path / "turned" / "new" / "model.safetensors"
    model = open_model(ModelFile(shipped, "tiny16", 16), SIZE, CPU)
    before = open_model(ModelFile(shipped.with_name("before_rotation.safetensors"), "tiny16", 16), SIZE, CPU)
    assert model.fingerprint == report["space"] != before.fingerprint
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    turned = map_rows(read_bridge(tmp_path / "turned" / "bridge"), before(images))
    torch.testing.assert_close(F.normalize(model(images)), turned, atol=1e-4, rtol=0)
    # class rows are turned with it, so that it can be trained on
    rows = {}
    for name in ("classifier", "classifier_before_rotation"):
        export(shipped.with_name(name), None, tmp_path / f"{name}.safetensors")
        rows[name] = load_file(tmp_path / f"{name}.safetensors")["weight"]
    logits = model(images) @ rows["classifier"].T
    torch.testing.assert_close(logits, before(images) @ rows["classifier_before_rotation"].T, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(rows["classifier"], rows["classifier_before_rotation"], atol=1e-3)
    # the same command again: what was trained is not turned twice
    bytes_before, written = model.fingerprint, (shipped.with_name("classifier") / "manifest.json").stat().st_mtime_ns
    assert place.run(config)["space"] == bytes_before
    assert (shipped.with_name("classifier") / "manifest.json").stat().st_mtime_ns == written
    # and the next run upgrades the file as any
    given = {"net": "tiny16", "embedding_dim": 16, "weights": "turned/new/model.safetensors"}
    again = place.run(
        place.config("next", "mapping-direct", given, {"net": "tiny8", "embedding_dim": 16, "epochs": 1.0})
    )
    assert again["parent_space"] == report["space"]
    runs = [str(tmp_path / name) for name in ("turned", "next")]
    monkey = json.loads((tmp_path / "next" / "resolved.json").read_text())
    monkey["old"]["weights"] = str(shipped)  # as the driver writes it, absolute or from where it stands
    (tmp_path / "next" / "resolved.json").write_text(json.dumps(monkey))
    out = tmp_path / "matrix.json"
    assert main(["generations", *runs, "--far", "0.1", "--out", str(out)]) == 0, capsys.readouterr().err
    tar = json.loads(out.read_text())["tar"]
    for i, j, entry in ((0, 0, report["old_old"]), (1, 0, report["new_old"]), (1, 1, report["new_new"])):
        assert tar[i][j] == pytest.approx(entry["tar_at_far"]["0.1"], abs=0.03)


def test_a_new_model_may_be_any_file_that_an_old_one_may_be(tmp_path: Path) -> None:
    place = Place(tmp_path, None)
    save_weights(build_net("tiny8", 16, SIZE, seed=6), tmp_path / "old.safetensors", {})
    net = build_net("tiny16", 24, SIZE, seed=5).eval()
    save_weights(net, tmp_path / "new.safetensors", {})

    class OfBgrBytes(torch.nn.Module):
        """The same network behind another preprocessing."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self.net((images.flip(1) - 127.5) / 127.5)
            return vectors

    example = torch.zeros(1, 3, SIZE, SIZE)
    torch.jit.trace(OfBgrBytes().eval(), example).save(str(tmp_path / "new.pt"))
    torch.onnx.export(
        OfBgrBytes().eval(), (example,), str(tmp_path / "new.onnx"), dynamo=False, dynamic_axes={"images": {0: "b"}},
        input_names=["images"],
    )  # fmt: skip
    old = {"net": "tiny8", "embedding_dim": 16, "weights": "old.safetensors"}
    seen = {"channels": "bgr", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    news = {
        "tensors": {"net": "tiny16", "weights": "new.safetensors"},
        "script": {"weights": "new.pt", "input": seen},
        "onnx": {"weights": "new.onnx", "input": seen},
        "wrong": {"weights": "new.pt"},
    }
    found = {
        name: place.run(place.config(name, "mapping-backward", old, {"embedding_dim": 24, **new}, bridge="procrustes"))
        for name, new in news.items()
    }
    for cell in ("new_old", "new_new"):
        truth = found["tensors"][cell]["tar_at_far"]["0.1"]
        for name in ("script", "onnx"):
            assert found[name][cell]["tar_at_far"]["0.1"] == pytest.approx(truth, abs=0.01)
    assert found["wrong"]["new_new"]["tar_at_far"]["0.1"] != found["tensors"]["new_new"]["tar_at_far"]["0.1"]
    assert len({report["space"] for report in found.values()}) == 4
