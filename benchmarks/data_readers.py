"""Who reads: our stream, DALI's own tar reader, and the loaders that people write, over the same images.

All decode, flip half of the images, normalise to [-1, 1], and hand out (256, 3, 112, 112) float32 batches with 2 worker threads or
processes; the augmented ones crop, resize and recolour as well, each with the operations of its own library.
"""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageEnhance

from lce_dist.config import AugmentConfig
from pipelines.manifest import PackedDataset, View
from pipelines.order import EpochOrder, Order
from pipelines.pack import pack_images
from pipelines.stream import ImageStream, training_plan

IMAGE_SIZE, BATCH_ROWS, NUM_WORKERS = 112, 256, 2
SHARD_BYTES = 4 * 2**20
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
    dataset = pack_images(images, identities, num_images, directory / "noise", "noise", "noise", SHARD_BYTES)
    return dataset.select(identities)


AUGMENTED = AugmentConfig()  # the defaults: flip, crop, colours, blur, grey


def ours(
    view: View, order: Order | None = None, augment: AugmentConfig = FLIP_ONLY, device: str = "cpu"
) -> Iterator[torch.Tensor]:
    """Shuffled over the whole set unless told otherwise, parameters drawn per sample."""
    order = order or EpochOrder(view.num_samples, BATCH_ROWS, seed=1)
    plan = training_plan(order, 0, 1, 0, order.steps_per_epoch)
    with ImageStream(view, plan, IMAGE_SIZE, augment, 1, torch.device(device), num_threads=NUM_WORKERS) as batches:
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


def augment_with_pillow(sample: dict[str, Any]) -> torch.Tensor:
    """What our defaults do to an image, with Pillow's operations (blur and grey, rare in both, left out)."""
    with Image.open(io.BytesIO(sample["jpg"])) as image:
        rgb = image.convert("RGB")
    side = AUGMENTED.crop_min_area + random.random() * (1.0 - AUGMENTED.crop_min_area)
    width, height = (max(1, round(length * side**0.5)) for length in rgb.size)
    left, top = random.randint(0, rgb.width - width), random.randint(0, rgb.height - height)
    rgb = rgb.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    for enhance, amount in (
        (ImageEnhance.Brightness, AUGMENTED.brightness),
        (ImageEnhance.Contrast, AUGMENTED.contrast),
        (ImageEnhance.Color, AUGMENTED.saturation),
    ):
        rgb = enhance(rgb).enhance(1.0 + random.uniform(-amount, amount))
    pixels = np.asarray(rgb)
    if random.random() < 0.5:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(127.5).sub_(1.0)


def webdataset_pillow(
    view: View, decode: Callable[[dict[str, Any]], torch.Tensor] = decode_with_pillow
) -> Iterator[torch.Tensor]:
    """A WebDataset in a torch DataLoader with 2 worker processes that batch for themselves."""
    shards = [str(view.dataset.shard_path(number)) for number in range(len(view.dataset.manifest.shards))]
    samples = webdataset.WebDataset(shards, shardshuffle=100, seed=1).shuffle(1024).map(decode)
    batches = samples.batched(BATCH_ROWS, collation_fn=torch.stack)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=NUM_WORKERS)
    yield from loader


class Folder(torch.utils.data.Dataset[torch.Tensor]):
    """As torchvision's ImageFolder: a list of files, opened one by one."""

    def __init__(self, root: Path) -> None:
        self._paths = sorted(str(path) for path in root.glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return decode_with_pillow({"jpg": Path(self._paths[number]).read_bytes()})


def write_folder(view: View, root: Path) -> None:
    """The images of a view, a file each, in one folder an identity."""
    for name, number, payload in payloads_of(view):
        path = root / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(payload)


def image_folder(root: Path) -> Iterator[torch.Tensor]:
    """Files in folders, a DataLoader that shuffles all of them, Pillow."""
    loader = torch.utils.data.DataLoader(Folder(root), BATCH_ROWS, shuffle=True, num_workers=NUM_WORKERS)
    yield from loader


def payloads_of(view: View) -> Iterator[tuple[str, int, bytes]]:
    """Each image's identity, number and bytes, in the order of the shards."""
    dataset = view.dataset
    for shard in range(len(dataset.manifest.shards)):
        with dataset.shard_path(shard).open("rb") as file:
            for number in np.flatnonzero(dataset.index["shard"] == shard).tolist():
                row = dataset.index[number]
                file.seek(int(row["offset"]))
                yield dataset.identities[int(row["label"])], number, file.read(int(row["size"]))


def write_records(view: View, path: Path) -> None:
    """One RecordIO file, as im2rec packs it."""
    with path.open("wb") as file:
        for _, number, payload in payloads_of(view):
            body = struct.pack("<IfQQ", 0, 0.0, number, 0) + payload
            file.write(struct.pack("<II", 0xCED7230A, len(body)) + body + b"\0" * (-len(body) % 4))


class Records(torch.utils.data.IterableDataset[torch.Tensor]):
    """As MXNet's sequential reader: front to back, each worker a part of the records, shuffled through a buffer of 1,024."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        buffer: list[bytes] = []
        with self._path.open("rb") as file:
            number = 0
            while head := file.read(8):
                length = struct.unpack("<II", head)[1] & (1 << 29) - 1
                body = file.read(length + -length % 4)
                number += 1
                if number % workers != worker:
                    continue
                if len(buffer) < 1024:
                    buffer.append(body[24:length])
                    continue
                place = random.randrange(len(buffer))
                out, buffer[place] = buffer[place], body[24:length]
                yield decode_with_pillow({"jpg": out})
        random.shuffle(buffer)
        for out in buffer:
            yield decode_with_pillow({"jpg": out})


def record_reader(path: Path) -> Iterator[torch.Tensor]:
    """RecordIO read front to back in a DataLoader, Pillow."""
    yield from torch.utils.data.DataLoader(Records(path), BATCH_ROWS, num_workers=NUM_WORKERS)


@pipeline_def
def memory_graph() -> Any:
    """The decoder of the other graphs without a reader."""
    encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True)
    images = fn.decoders.image(encoded, device="cpu", output_type=types.DALIImageType.RGB)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[127.5] * 3,
        std=[127.5] * 3,
        mirror=fn.random.coin_flip(),
    )


def floor(view: View) -> Iterator[torch.Tensor]:
    """What DALI decodes when every byte is in memory already."""
    payloads = [np.frombuffer(payload, dtype=np.uint8) for _, _, payload in payloads_of(view)]
    batches = [payloads[first : first + BATCH_ROWS] for first in range(0, len(payloads), BATCH_ROWS)]
    pipeline = memory_graph(
        batch_size=BATCH_ROWS, num_threads=NUM_WORKERS, device_id=None, prefetch_queue_depth=2, seed=1
    )
    pipeline.build()
    for batch in [*batches[:2]]:
        pipeline.feed_input("encoded", batch)
    for number in range(len(batches)):
        if number + 2 < len(batches):
            pipeline.feed_input("encoded", batches[number + 2])
        (output,) = pipeline.run()
        yield torch.from_dlpack(output.as_tensor())


def contestants(view: View, indices: list[str], folder: Path, records: Path) -> dict[str, Contestant]:
    """By name; the last two groups augment, the floor reads nothing."""
    return {
        "ours": partial(ours, view),
        "DALI tar reader": partial(dali_tar_reader, view, indices),
        "WebDataset + Pillow": partial(webdataset_pillow, view),
        "image folder + Pillow": partial(image_folder, folder),
        "RecordIO + Pillow": partial(record_reader, records),
        "floor": partial(floor, view),
        "ours, augmented": partial(ours, view, None, AUGMENTED),
        "WebDataset + Pillow, augmented": partial(webdataset_pillow, view, augment_with_pillow),
    }
