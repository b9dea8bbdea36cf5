"""How fast 112 x 112 JPEGs become normalised tensors: our stream against DALI's tar reader and WebDataset with Pillow.

    python -m benchmarks.reading [--quick] [--out DIR]

All three read the same shards, decode, flip half of the images, normalise to [-1, 1], and hand out (256, 3, 112, 112)
float32 batches with 2 worker threads or processes. The runs are interleaved; the clock starts at the first batch.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import webdataset
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from benchmarks.record import Mark, file_stem, write_record
from lce_dist.config import AugmentConfig
from pipelines.manifest import PackedDataset, View
from pipelines.order import EpochOrder
from pipelines.pack import pack_images
from pipelines.stream import ImageStream, training_plan

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGE_SIZE, BATCH_ROWS, NUM_WORKERS = 112, 256, 2
FLIP_ONLY = AugmentConfig(
    crop_min_area=1.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue_deg=0.0,
    blur_probability=0.0,
    grey_probability=0.0,
)

Contestant = Callable[[], Iterator[torch.Tensor]]


def pack_noise(directory: Path, num_images: int) -> View:
    """Smooth noise with a grain, JPEGs of 4 to 6 KB; a quarter are distinct, which no contestant can exploit."""
    generator = np.random.default_rng(1)
    payloads = []
    for _ in range(num_images // 4):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), dtype=np.float64)
        grainy = smooth + generator.normal(0, 5, smooth.shape)
        encoded = io.BytesIO()
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(encoded, "JPEG", quality=88)
        payloads.append(encoded.getvalue())
    images = ((f"id{n % 50:02d}", f"{n}.jpg", payloads[n % len(payloads)]) for n in range(num_images))
    identities = [f"id{n:02d}" for n in range(50)]
    dataset = pack_images(images, identities, num_images, directory / "noise", "noise", "noise", 8 * 2**20)
    return dataset.select(identities)


def ours(view: View) -> Iterator[torch.Tensor]:
    """Shuffled over the whole set, flips drawn per sample."""
    order = EpochOrder(view.num_samples, BATCH_ROWS, seed=1)
    plan = training_plan(order, 0, 1, 0, order.steps_per_epoch)
    with ImageStream(view, plan, IMAGE_SIZE, FLIP_ONLY, 1, torch.device("cpu"), num_threads=NUM_WORKERS) as batches:
        for batch in batches:
            yield batch.images


def write_dali_indices(dataset: PackedDataset, directory: Path) -> list[str]:
    """One text index a shard, in the format that fn.readers.webdataset expects."""
    paths = []
    for number, shard in enumerate(dataset.manifest.shards):
        lines = [f"v1.2 {shard.num_samples}"]
        for sample_id in np.flatnonzero(dataset.index["shard"] == number).tolist():
            row = dataset.index[sample_id]
            key, label = dataset.sample_key(sample_id).removesuffix(".jpg"), str(int(row["label"]))
            label_offset = int(row["offset"]) - 1024  # its block and the header of the .jpg lie between
            lines.append(
                f"jpg {int(row['offset'])} {int(row['size'])} {key}.jpg cls {label_offset} {len(label)} {key}.cls"
            )
        path = directory / f"{number}.idx"
        path.write_text("\n".join(lines) + "\n")
        paths.append(str(path))
    return paths


@pipeline_def
def tar_reader_graph(shards: list[str], indices: list[str]) -> Any:
    components: Any = fn.readers.webdataset(
        paths=shards, index_paths=indices, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1024, name="reader"
    )
    images = fn.decoders.image(components[0], device="cpu", output_type=types.DALIImageType.RGB)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[127.5] * 3,
        std=[127.5] * 3,
        mirror=fn.random.coin_flip(),
    )


def dali_tar_reader(view: View, indices: list[str]) -> Iterator[torch.Tensor]:
    """DALI's own reader, shuffled through its buffer of 1,024."""
    shards = [str(view.dataset.shard_path(number)) for number in range(len(indices))]
    pipeline = tar_reader_graph(
        shards, indices, batch_size=BATCH_ROWS, num_threads=NUM_WORKERS, device_id=None, prefetch_queue_depth=2, seed=1
    )
    pipeline.build()
    for first in range(0, view.num_samples, BATCH_ROWS):
        (output,) = pipeline.run()
        yield torch.from_dlpack(output.as_tensor())[: view.num_samples - first]


def decode_with_pillow(sample: dict[str, Any]) -> torch.Tensor:
    with Image.open(io.BytesIO(sample["jpg"])) as image:
        pixels = np.asarray(image.convert("RGB"))
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1.0)


def webdataset_pillow(view: View) -> Iterator[torch.Tensor]:
    """A WebDataset in a torch DataLoader with 2 worker processes that batch for themselves."""
    shards = [str(view.dataset.shard_path(number)) for number in range(len(view.dataset.manifest.shards))]
    samples = webdataset.WebDataset(shards, shardshuffle=100, seed=1).shuffle(1024).map(decode_with_pillow)
    batches = samples.batched(BATCH_ROWS, collation_fn=torch.stack)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=NUM_WORKERS)
    yield from loader


def images_per_s(contestant: Contestant) -> float:
    """One pass; the first batch starts the clock and is not counted."""
    num_images, started = 0, 0.0
    for images in contestant():
        if started:
            num_images += len(images)
        else:
            started = time.perf_counter()
    return num_images / (time.perf_counter() - started)


def image_means(contestant: Contestant) -> np.ndarray:
    """The sorted mean of every image: the same for the same pixels, whatever the order and the flips."""
    return np.sort(np.concatenate([images.double().mean(dim=(1, 2, 3)).numpy() for images in contestant()]))


def judge(samples: dict[str, list[float]], pixels_equal: bool) -> list[Mark]:
    """Medians of the ratios within a round, so that a busy moment of the machine weighs on both sides."""

    def ratio_to(other: str) -> float:
        return statistics.median(mine / theirs for mine, theirs in zip(samples["ours"], samples[other], strict=True))

    over_pillow, over_dali = ratio_to("WebDataset + Pillow"), ratio_to("DALI tar reader")
    return [
        Mark("all three give the same pixels", pixels_equal, "True", pixels_equal),
        Mark("ours / WebDataset + Pillow", over_pillow, ">= 2.5", over_pillow >= 2.5),
        Mark("ours / DALI tar reader", over_dali, ">= 0.9", over_dali >= 0.9),
    ]


def draw(samples: dict[str, list[float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for place, (name, values) in enumerate(samples.items()):
        axes.barh(place, statistics.median(values), color="0.8")
        axes.plot(values, [place] * len(values), "k.", markersize=4)
        axes.text(0, place, f" {name}", va="center")
    axes.set_yticks([])
    axes.set_xlabel("images/s (bar: median; dots: runs)")
    axes.set_title("JPEG 112 x 112: read, decode, flip, normalise")
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and runs; ends within a minute on two cores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    num_images, num_runs = (6_000, 5) if arguments.quick else (24_000, 9)

    with tempfile.TemporaryDirectory() as scratch:
        view = pack_noise(Path(scratch), num_images)
        indices = write_dali_indices(view.dataset, Path(scratch))
        contestants: dict[str, Contestant] = {
            "ours": lambda: ours(view),
            "DALI tar reader": lambda: dali_tar_reader(view, indices),
            "WebDataset + Pillow": lambda: webdataset_pillow(view),
        }
        means = {name: image_means(contestant) for name, contestant in contestants.items()}  # and the warm-up
        pixels_equal = means["ours"].shape == means["WebDataset + Pillow"].shape and np.allclose(
            means["ours"], means["WebDataset + Pillow"], atol=1e-6
        )
        # DALI's reader never ends and may repeat a sample in its last batch: each of its images must be one of ours.
        pixels_equal &= bool(np.isin(np.round(means["DALI tar reader"], 5), np.round(means["ours"], 5)).all())
        samples: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(num_runs):
            for name, contestant in contestants.items():
                samples[name].append(images_per_s(contestant))
        mean_bytes = float(view.dataset.index["size"].mean())

    marks = judge(samples, pixels_equal)
    print(f"{num_images} images of {mean_bytes / 1e3:.1f} KB, {num_runs} interleaved runs, {NUM_WORKERS} workers")
    print(f"{'':24}{'median':>10}{'min':>10}{'max':>10}  images/s")
    for name, values in samples.items():
        print(f"{name:24}{statistics.median(values):10.0f}{min(values):10.0f}{max(values):10.0f}")
    stem = file_stem("reading")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(samples, arguments.out / f"{stem}.png")
    raw = {"quick": arguments.quick, "num_images": num_images, "mean_jpeg_bytes": mean_bytes, "images_per_s": samples}
    return write_record("reading", arguments.out, marks, raw, stem)


if __name__ == "__main__":
    sys.exit(main())
