"""The files beside shards are those that DALI's own tool makes, and DALI reads the shards by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import wds2idx
from nvidia.dali import fn, pipeline_def

from launch.cli import main
from lce_dist.errors import DataError
from pipelines.manifest import PackedDataset
from pipelines.sidecars import write_sidecars
from pipelines.tars import index_tars
from tests.unit.test_import import SMALL, encoded


def test_they_are_those_of_dalis_tool(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "photos" / f"p{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    out = tmp_path / "out"
    assert main(["data", "import", str(tmp_path / "photos"), str(out), "--idx", "--workers", "1"]) == 0
    dataset = PackedDataset.open(out)
    shard = dataset.shard_path(0)
    index = shard.with_suffix(".idx")
    with wds2idx.IndexCreator(str(shard), str(tmp_path / "theirs.idx"), verbose=False) as creator:
        creator.create_index()
    assert index.read_text() == (tmp_path / "theirs.idx").read_text()
    values = json.loads((out / "shards.json").read_text())
    assert values["shardlist"] == [
        {
            "url": shard.name,
            "nsamples": 12,
            "filesize": shard.stat().st_size,
            "sha256": dataset.manifest.shards[0].sha256,
        }
    ]

    @pipeline_def(batch_size=12, num_threads=1, device_id=None)
    def reader():  # type: ignore[no-untyped-def]
        return fn.readers.webdataset(
            paths=[str(shard)], index_paths=[str(index)], ext=["cls"], missing_component_behavior="error"
        )

    pipe = reader()
    pipe.build()
    (labels,) = pipe.run()
    found = [int(bytes(np.asarray(labels.at(number)))) for number in range(12)]
    assert found == dataset.index["label"].tolist()


def test_nothing_is_written_beside_shards_of_others(tmp_path: Path) -> None:
    from tests.unit.test_import_formats import tar_of

    tar_of(tmp_path / "tars" / "a.tar", [("a.cls", b"1"), ("a.jpg", encoded(1))])
    dataset = index_tars([tmp_path / "tars" / "a.tar"], tmp_path / "tars", tmp_path / "out", SMALL, 1).dataset
    with pytest.raises(DataError, match="where nothing is written"):
        write_sidecars(dataset)
