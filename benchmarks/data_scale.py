"""What a data set costs by its number of samples: memory and start-up of a process, up to a hundred million.

Each size is an index over the same few bytes (``lce data repeat``). A first process checks, splits and lists; then a second one,
as every rank is, opens all of it, and reads batches as one rank of eight. Its memory is told beside what the same program takes for
a data set of a few images.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_readers import FLIP_ONLY, IMAGE_SIZE, pack_noise
from benchmarks.record import Mark
from launch.parts import open_parts
from lce_dist.config import DataConfig
from pipelines.manifest import PackedDataset
from pipelines.order import EpochOrder
from pipelines.repeated import repeat_dataset
from pipelines.stream import ImageStream, training_plan

PHOTOS = 10
_BATCHES, _GLOBAL_BATCH, _RANKS = 20, 512, 8
_LARGEST = 100_000_000  # what the marks are for


def memory_mib() -> dict[str, float]:
    """Resident and anonymous memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.partition(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"resident": values["Rss"], "anonymous": values["Anonymous"]}


def read_some(dataset: PackedDataset, cache: Path) -> dict[str, float]:
    """Seconds of the steps on the way to batches, and of the first batch, as one rank of several."""
    times = {}
    started = time.perf_counter()
    config = DataConfig(shards="x", heldout_identities=2, old_identities=0.5)
    parts = open_parts(config, Path(), dataset, cache)
    views = {part: parts.view(part) for part in ("train", "old", "heldout")}
    times["views_s"] = time.perf_counter() - started
    view = views["train"]
    order = EpochOrder(view.num_samples, _GLOBAL_BATCH, seed=1)
    plan = training_plan(order, 0, _RANKS, 0, order.steps_per_epoch)
    started = time.perf_counter()
    with ImageStream(view, plan, IMAGE_SIZE, FLIP_ONLY, 1, torch.device("cpu")) as batches:
        for number, _batch in zip(range(_BATCHES), batches, strict=False):
            if number == 0:
                times["first_batch_s"] = time.perf_counter() - started
    return times


def one_process(small: Path, large: Path, cache: Path) -> dict[str, float]:
    """Runs in a process of its own: the small data set first, then the large one; what the second adds."""
    read_some(PackedDataset.open(small, checked=cache), cache)
    read_some(PackedDataset.open(small, checked=cache), cache)
    before = memory_mib()
    started = time.perf_counter()
    dataset = PackedDataset.open(large, checked=cache)
    opened_s = time.perf_counter() - started
    times = read_some(dataset, cache)
    after = memory_mib()
    return {"open_s": opened_s, **times, **{f"{name}_mib": after[name] - before[name] for name in after}}


def measure(folder: Path, quick: bool) -> tuple[list[Mark], dict[str, Any]]:
    """Sizes by sizes; marks only where the largest is measured."""
    sizes = (100_000, 300_000, 1_000_000) if quick else (1_000_000, 3_000_000, 10_000_000, 30_000_000, _LARGEST)
    small = pack_noise(folder / "few", 4_000).dataset
    raw: dict[str, Any] = {}
    for size in sizes:
        cache, out = folder / "scale-cache", folder / "large"
        started = time.perf_counter()
        repeat_dataset(small, out, size // PHOTOS, PHOTOS)
        made_s = time.perf_counter() - started
        words = [sys.executable, "-m", "benchmarks.data_scale", str(small.directory), str(out), str(cache)]
        found = [json.loads(subprocess.run(words, check=True, capture_output=True).stdout) for _ in range(2)]
        raw[str(size)] = {"made_s": made_s, "first_process": found[0], "later_process": found[1]}
        print(f"{size:>11,} samples: {json.dumps(raw[str(size)])}", flush=True)
        shutil.rmtree(out)
        shutil.rmtree(cache)
    later = {size: raw[str(size)]["later_process"] for size in sizes}
    raw["resident_bytes_per_sample"] = slope({size: one["resident_mib"] * 2**20 for size, one in later.items()})
    raw["first_process_s_per_million"] = 1e6 * slope(
        {size: raw[str(size)]["first_process"]["open_s"] + raw[str(size)]["first_process"]["views_s"] for size in sizes}
    )
    if sizes[-1] != _LARGEST:
        return [], raw
    most = later[_LARGEST]
    return [
        Mark("100 M samples: opened, s", most["open_s"], "< 2", most["open_s"] < 2.0),
        Mark("100 M samples: resident a rank, MiB", most["resident_mib"], "< 100", most["resident_mib"] < 100.0),
        Mark(
            "100 M samples: from nothing to the first batch, s",
            most["open_s"] + most["views_s"] + most["first_batch_s"],
            "< 5",
            most["open_s"] + most["views_s"] + most["first_batch_s"] < 5.0,
        ),
    ], raw


def slope(values: dict[int, float]) -> float:
    """By least squares."""
    return float(np.polyfit(list(values), list(values.values()), 1)[0])


if __name__ == "__main__":
    print(json.dumps(one_process(*map(Path, sys.argv[1:4]))))
