"""How fast JPEGs become batches, from a disk and from a store, and what a data set costs by its size.

    python -m benchmarks.data [--quick] [--out DIR]

Readers (benchmarks/data_readers.py) run in turns over the same 112 x 112 images; the clock starts at the first batch, whose own
time is told beside. The floor is DALI's decoder over bytes that lie in memory: what no reader of these images can be
faster than. The store is an HTTP server of this process with a limit of bytes a second; its own speed is a plain download, file after
file. Sizes (benchmarks/data_scale.py): start-up and memory of a process from 1 to 100 million samples.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import matplotlib
import numpy as np
import torch

from benchmarks import data_scale
from benchmarks.data_readers import (
    AUGMENTED,
    BATCH_ROWS,
    IMAGE_SIZE,
    NUM_WORKERS,
    Contestant,
    contestants,
    ours,
    pack_noise,
    write_dali_indices,
    write_folder,
    write_records,
)
from benchmarks.data_store import store
from benchmarks.record import Mark, file_stem, write_record
from lce_dist.models.catalog import build_net
from pipelines.cache import CacheSettings
from pipelines.manifest import PackedDataset, View, fetch_description, shard_edges
from pipelines.order import BlockOrder

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LANES, WINDOW = 8, 4  # the defaults of data.shuffle_lanes and shuffle_window


def pass_over(contestant: Contestant) -> tuple[float, float]:
    """Images a second after the first batch, and seconds to the first batch."""
    num_images, asked = 0, time.perf_counter()
    started = 0.0
    for images in contestant():
        if started:
            num_images += len(images)
        else:
            started = time.perf_counter()
    return num_images / (time.perf_counter() - started), started - asked


def image_means(contestant: Contestant) -> np.ndarray:
    """The sorted mean of every image: the same for the same pixels, whatever the order and the flips."""
    return np.sort(np.concatenate([images.double().mean(dim=(1, 2, 3)).numpy() for images in contestant()]))


def download_mib_per_s(url: str, names: list[str]) -> float:
    """The store's own speed: one file after the other, one connection."""
    started, count = time.perf_counter(), 0
    for name in names:
        with urllib.request.urlopen(f"{url}/{name}") as answer:
            while piece := answer.read(1 << 20):
                count += len(piece)
    return count / 2**20 / (time.perf_counter() - started)


def from_a_store(view: View, scratch: Path, mib_per_s: float, rounds: int) -> dict[str, list[float]]:
    """Cold: share of the store's own speed at which an epoch takes its shards. Warm and local: images a second."""
    found: dict[str, list[float]] = {"cold_share": [], "warm": [], "local": []}
    folder = view.dataset.shard_path(0).parent
    names = [shard.file for shard in view.dataset.manifest.shards]
    for _ in range(rounds):
        with store(folder, mib_per_s * 2**20) as url:
            own = download_mib_per_s(url, names)
            cache = scratch / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            described = fetch_description(url, scratch / "described")
            there = PackedDataset.open(described, CacheSettings(cache, 10.0))
            remote = there.select(there.identities)
            order = BlockOrder(shard_edges(remote), BATCH_ROWS, 1, LANES, WINDOW)
            started = time.perf_counter()
            for _images in ours(remote, order):
                pass
            seconds = time.perf_counter() - started
            fetched = sum(shard.size_bytes for shard in there.manifest.shards) / 2**20
            found["cold_share"].append(fetched / seconds / own)
            for _ in range(3):
                for name, where in (("warm", remote), ("local", view)):
                    found[name].append(pass_over(lambda where=where, order=order: ours(where, order))[0])  # type: ignore[misc]
            there.cache.forget()
    return found


def ratio(samples: dict[str, list[float]], name: str, other: str) -> float:
    """The median of the ratios within a round, so that a busy moment of the machine weighs on both sides."""
    return statistics.median(mine / theirs for mine, theirs in zip(samples[name], samples[other], strict=True))


def judge(samples: dict[str, list[float]], from_store: dict[str, list[float]], pixels_equal: bool) -> list[Mark]:
    over_dali, over_pillow = ratio(samples, "ours", "DALI tar reader"), ratio(samples, "ours", "WebDataset + Pillow")
    cold, warm = statistics.median(from_store["cold_share"]), ratio(from_store, "warm", "local")
    return [
        Mark("all give the same pixels", pixels_equal, "True", pixels_equal),
        Mark("ours / DALI tar reader", over_dali, ">= 1.0", over_dali >= 1.0),
        Mark("ours / WebDataset + Pillow", over_pillow, ">= 3", over_pillow >= 3.0),
        Mark("a store, cold cache: share of the store's own speed", cold, ">= 0.9", cold >= 0.9),
        Mark("a store, warm cache / local", warm, ">= 0.95", warm >= 0.95),
    ]


def on_gpu(view: View, num_runs: int) -> dict[str, list[float]]:
    """Images a second of our stream on the GPU, and what two networks take, forward and backward; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    found: dict[str, list[float]] = {"ours": [], "ours, augmented": [], "iresnet50 trains": [], "iresnet100 trains": []}
    for _ in range(num_runs):
        found["ours"].append(pass_over(lambda: ours(view, device="cuda"))[0])
        found["ours, augmented"].append(pass_over(lambda: ours(view, augment=AUGMENTED, device="cuda"))[0])
    for name in ("iresnet50", "iresnet100"):
        net = build_net(name, 512, IMAGE_SIZE, seed=1).cuda()
        images = torch.randn(256, 3, IMAGE_SIZE, IMAGE_SIZE, device="cuda").to(memory_format=torch.channels_last)
        for _ in range(num_runs + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _step in range(5):
                with torch.autocast("cuda", torch.bfloat16):
                    net(images).float().square().mean().backward()
            torch.cuda.synchronize()
            found[f"{name} trains"].append(5 * len(images) / (time.perf_counter() - started))
        found[f"{name} trains"] = found[f"{name} trains"][2:]
    return found


def draw(samples: dict[str, list[float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for place, (name, values) in enumerate(samples.items()):
        axes.barh(place, statistics.median(values), color="0.92" if name == "floor" else "0.8")
        axes.plot(values, [place] * len(values), "k.", markersize=4)
        axes.text(0, place, f" {name}", va="center")
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("images/s (bar: median; dots: runs)")
    axes.set_title("JPEG 112 x 112 to normalised batches, 2 workers")
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and runs; ends within a minute on two cores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    num_images, num_runs, store_rounds = (4_000, 2, 1) if arguments.quick else (24_000, 7, 3)
    store_mib_per_s = 20.0

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        view = pack_noise(scratch, num_images)
        indices = write_dali_indices(view.dataset, scratch)
        write_folder(view, scratch / "folder")
        write_records(view, scratch / "train.rec")
        readers = contestants(view, indices, scratch / "folder", scratch / "train.rec")
        pixels_equal = same_pixels(
            {n: c for n, c in readers.items() if "augmented" not in n}, num_images
        )  # and warm-up
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        first_batch_s: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(num_runs):
            for name, contestant in readers.items():
                speed, seconds = pass_over(contestant)
                speeds[name].append(speed)
                first_batch_s[name].append(seconds)
        from_store = from_a_store(view, scratch, store_mib_per_s, store_rounds)
        gpu = on_gpu(view, num_runs)
        scale_marks, scale = data_scale.measure(scratch, arguments.quick)
        mean_bytes = float(view.dataset.index["size"].mean())

    marks = [*judge(speeds, from_store, pixels_equal), *scale_marks]
    print(f"{num_images} images of {mean_bytes / 1e3:.1f} KB, {num_runs} interleaved runs, {NUM_WORKERS} workers")
    print(f"{'':32}{'median':>10}{'min':>10}{'max':>10}  images/s   first batch, s")
    for name, values in speeds.items():
        line = f"{name:32}{statistics.median(values):10.0f}{min(values):10.0f}{max(values):10.0f}"
        print(f"{line}{statistics.median(first_batch_s[name]):22.2f}")
    for name, values in gpu.items():
        print(f"GPU: {name:27}{statistics.median(values):10.0f}{min(values):10.0f}{max(values):10.0f}")
    stem = file_stem("data-quick" if arguments.quick else "data")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(speeds, arguments.out / f"{stem}.png")
    raw = {
        "quick": arguments.quick,
        "num_images": num_images,
        "mean_jpeg_bytes": mean_bytes,
        "images_per_s": speeds,
        "first_batch_s": first_batch_s,
        "store_mib_per_s": store_mib_per_s,
        "from_a_store": from_store,
        "gpu_images_per_s": gpu,
        "scale": scale,
    }
    return write_record("data", arguments.out, marks, raw, stem)


def same_pixels(readers: dict[str, Contestant], num_images: int) -> bool:
    """Whether all hand out the same images."""
    means = {name: image_means(contestant) for name, contestant in readers.items()}
    for name, mean in means.items():
        # DALI's reader never ends and may repeat a sample in its last batch: each of its images must be one of ours.
        if name == "DALI tar reader":
            if not np.isin(np.round(mean, 5), np.round(means["ours"], 5)).all():
                return False
        elif len(mean) != num_images or not np.allclose(mean, means["ours"], atol=1e-6):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
