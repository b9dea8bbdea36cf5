"""A whole run over a data set in which images cannot be decoded, of training and held-out identities alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.job import BAD_IMAGES_FILE, Job, embedded, run_job
from launch.parts import open_parts
from launch.prepare import draw_faces, open_old_model
from lce_dist.compat.boundaries import BoundaryPolicy
from lce_dist.compat.old_space import OldSpace, compute_old_space
from lce_dist.config import DataConfig, SyntheticConfig, parse_config
from lce_dist.errors import DataError
from lce_dist.models.catalog import build_net
from lce_dist.models.weights import save_weights
from lce_dist.world import World
from pipelines.manifest import PackedDataset, Quarantined, write_quarantine

SIZE, DIM = 32, 16


def job_of(folder: Path, name: str, policy: str) -> Job:
    values = {
        "data": {
            "shards": "faces",
            "image_size": SIZE,
            "heldout_identities": 8,
            "bad_images": policy,
            "bad_images_limit": 0.2,
        },
        "old": {"net": "tiny8", "embedding_dim": DIM, "weights": "old.safetensors"},
        "new": {"net": "tiny16", "embedding_dim": DIM, "weights": "new.safetensors"},
        "head": {"loss": "softmax"},
        "compat": {"mode": "mapping-forward", "bridge": "least_squares"},
        "evaluation": {"fars": [0.1], "criterion_far": 0.1},
    }
    run_dir = folder / name
    run_dir.mkdir()
    config = parse_config(values, "test", json_mode=True)
    paths = (folder / "faces", run_dir, folder / "cache")
    return Job(config, *paths, "f" * 16, "e" * 16, folder, False, {}, {})


def run(folder: Path, name: str, policy: str) -> dict:
    job = job_of(folder, name, policy)
    run_job(job, World(), lambda event: None)
    report: dict = json.loads((job.run_dir / "report.json").read_text())
    return report


def space_of(job: Job) -> OldSpace:
    """Centres of the training set under the job's old model."""
    dataset = PackedDataset.open(job.data_dir)
    view = open_parts(job.config.data, job.base_dir, dataset, None).view("train")
    old = open_old_model(job.config, job.base_dir, torch.device("cpu"))
    return compute_old_space(embedded(job, old, DIM, view, World()), view.num_classes, DIM, World(), BoundaryPolicy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, net in (("old", "tiny8"), ("new", "tiny16")):
        card = {"net": net, "embedding_dim": str(DIM), "image_size": str(SIZE)}
        save_weights(build_net(net, DIM, SIZE, seed=1), folder / f"{name}.safetensors", card)
    settings = SyntheticConfig(identities=32, photos_per_identity=6, photo_size=40, difficulty=0.3, seed=1)
    draw_faces(settings, folder / "faces", lambda what, done, total: None)
    return folder


def test_bad_images_cost_themselves_and_nothing_else(folder: Path) -> None:
    dataset = PackedDataset.open(folder / "faces")
    parts = open_parts(DataConfig(shards="faces", heldout_identities=8), folder, dataset, None)
    bad = [int(parts.view("train").sample_ids[4]), int(parts.view("heldout").sample_ids[9])]
    for sample, body_only in zip(bad, (False, True), strict=True):
        row = dataset.index[sample]
        first, size = int(row["offset"]), int(row["size"])
        with dataset.shard_path(int(row["shard"])).open("r+b") as shard:
            shard.seek(first + (size // 2 if body_only else 0))
            shard.write(bytes(size - size // 2 if body_only else size))
    with pytest.raises(DataError, match="cannot be decoded"):
        run(folder, "stopped", "stop")

    report = run(folder, "skipped", "skip")
    listed = [line.split("\t") for line in (folder / "skipped" / BAD_IMAGES_FILE).read_text().splitlines()]
    assert {key for _, _, key, _ in listed} == {dataset.sample_key(sample) for sample in bad}
    heldout = parts.view("heldout")
    without = heldout.count_C - np.bincount(heldout.labels[heldout.sample_ids == bad[1]], minlength=8)
    assert report["new_old"]["num_genuine"] == int((without * (without - 1)).sum())

    skipping = space_of(job_of(folder, "space-skipped", "skip"))
    assert int(skipping.count_S.sum()) == parts.view("train").num_samples - 1

    # the same as leaving them out before
    write_quarantine(folder / "faces", [Quarantined(sample, "", "bad") for sample in bad])
    known = run(folder, "quarantined", "stop")
    assert known["new_old"]["num_genuine"] == report["new_old"]["num_genuine"]
    quarantined = space_of(job_of(folder, "space-quarantined", "stop"))
    assert torch.equal(skipping.centre_SD, quarantined.centre_SD) and torch.equal(
        skipping.cos_boundary_S, quarantined.cos_boundary_S
    )
    assert known["new_old"] == report["new_old"]
    (folder / "faces" / "quarantine.json").unlink()
