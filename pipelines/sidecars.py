"""Files beside the shards by which other readers of WebDataset tars find their samples: DALI's .idx, and wids' shards.json.

NAME-000000.idx  wds2idx format v1.2: a line with version and number of samples, then a line a sample: ending, byte, size
                 and name of each of its members
shards.json      wids version 1: URL, number of samples, size and hash of each shard
**Source**: NVIDIA DALI, tools/wds2idx.py and operators/reader/loader/webdataset; webdataset, wids/wids_specs.py.
"""

from __future__ import annotations

import json
import mmap

from lce_dist.errors import DataError
from pipelines.manifest import PackedDataset
from pipelines.members import BrokenTarError, in_samples, read_members

DESCRIPTOR_FILE = "shards.json"


def write_sidecars(dataset: PackedDataset) -> None:
    """Write them for every shard. Errors: DataError where the shards are not beside the index: nothing is written elsewhere."""
    if dataset.manifest.root is not None:
        raise DataError(
            f"{dataset.directory} has its shards at {dataset.manifest.root}, where nothing is written; --idx is for shards that are made"
        )
    for number in range(len(dataset.manifest.shards)):
        path = dataset.shard_path(number)
        lines = []
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            try:
                for sample in in_samples(read_members(tar)):
                    lines.append(" ".join(f"{one.ending} {one.offset} {one.size} {one.name}" for one in sample))
            except BrokenTarError as error:
                raise DataError(f"shard {path} is no whole tar ({error}); import again") from None
        index = path.with_suffix(".idx")
        partial = index.with_name(index.name + ".partial")
        partial.write_text(f"v1.2 {len(lines)}\n" + "".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.replace(index)
    shards = [
        {"url": one.file, "nsamples": one.num_samples, "filesize": one.size_bytes, "sha256": one.sha256}
        for one in dataset.manifest.shards
    ]
    descriptor = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": dataset.manifest.name,
        "base_path": "",
        "shardlist": shards,
    }
    path = dataset.directory / DESCRIPTOR_FILE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(descriptor, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
