"""The stream against Pillow and numpy as decoders; the same pixels on any number of ranks; every fault named."""

from __future__ import annotations

import io
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lce_dist.batch import Batch
from lce_dist.config import AugmentConfig
from lce_dist.errors import DataError
from pipelines import reading
from pipelines.augment import AugmentTable, identity_table
from pipelines.dali import Decoder, EncodedBatch, header_problem
from pipelines.manifest import PackedDataset, View
from pipelines.order import EpochOrder, rank_rows
from pipelines.pack import pack_images
from pipelines.stream import BadImages, ImageStream, PlannedBatch, block_plan, training_plan

CPU = torch.device("cpu")
SIZE = 32
NUM_IMAGES = 90
STRONG = AugmentConfig(crop_min_area=0.5, blur_probability=0.5, grey_probability=0.2)


STILL = AugmentConfig(
    flip=False,
    crop_min_area=1.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue_deg=0.0,
    blur_probability=0.0,
    grey_probability=0.0,
)


def photo(number: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=92, **options)
    return encoded.getvalue()


def pack(out: Path, payloads: list[bytes], shard_size_bytes: int = 30_000) -> View:
    keys = [f"id{number % 9}" for number in range(len(payloads))]
    images = [(key, f"{number}.jpg", payload) for number, (key, payload) in enumerate(zip(keys, payloads, strict=True))]
    identities = sorted(set(keys))
    dataset = pack_images(images, identities, len(images), out, "faces", "s", shard_size_bytes)
    return dataset.select(identities)


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    payloads = [jpeg(photo(number)) for number in range(NUM_IMAGES)]
    return pack(tmp_path_factory.mktemp("stream") / "faces", payloads)


def read(
    view: View, plan: Iterator[PlannedBatch] | list[PlannedBatch], augment: AugmentConfig | None, **options: int
) -> list[Batch]:
    with ImageStream(view, plan, SIZE, augment, 1, CPU, **options) as batches:
        return list(batches)


def pillow(payload: bytes) -> np.ndarray:
    """Upright RGB pixels, normalised: (3, H, W) float64."""
    with Image.open(io.BytesIO(payload)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float64)
    return (upright / 127.5 - 1.0).transpose(2, 0, 1)


def payload_of(dataset: PackedDataset, sample_id: int) -> bytes:
    row = dataset.index[sample_id]
    return dataset.shard_path(row["shard"]).read_bytes()[row["offset"] :][: row["size"]]


def test_plain_pixels_labels_and_ids_are_those_of_the_files(view: View) -> None:
    part = view.dataset.select(["id2", "id5"])
    (batch,) = read(part, block_plan(part.num_samples, 0, 1, 100), None)
    assert batch.sample_ids.tolist() == [n for n in range(NUM_IMAGES) if n % 9 in (2, 5)]
    assert batch.labels.tolist() == [0 if n % 9 == 2 else 1 for n in batch.sample_ids.tolist()]
    assert batch.images.shape == (20, 3, SIZE, SIZE) and batch.images.dtype == torch.float32
    assert batch.images.is_contiguous() and batch.rows_per_rank == (20,)
    for image, sample_id in zip(batch.images, batch.sample_ids.tolist(), strict=True):
        np.testing.assert_allclose(image.numpy(), pillow(payload_of(view.dataset, sample_id)), atol=1e-6)


def by_sample(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {i: image for batch in batches for i, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)}


def test_pixels_do_not_depend_on_ranks_batches_or_threads(view: View) -> None:
    """Bitwise: 1 rank, 3 ranks, another batch size, another number of threads."""
    order = EpochOrder(NUM_IMAGES, 25, seed=3)
    alone = read(view, training_plan(order, 0, 1, 4, 8), STRONG)  # the second epoch
    images = by_sample(alone)
    assert len(images) == NUM_IMAGES and sum(len(batch.labels) for batch in alone) == NUM_IMAGES
    ranks = [read(view, training_plan(order, rank, 3, 4, 8), STRONG, num_threads=2) for rank in range(3)]
    for step, whole in enumerate(alone):
        joined = torch.cat([batches[step].sample_ids for batches in ranks])
        assert joined.tolist() == whole.sample_ids.tolist()
        assert {batches[step].rows_per_rank for batches in ranks} == {rank_rows(len(joined), 3)}
    others = [by_sample([batch for batches in ranks for batch in batches])]
    other_order = EpochOrder(NUM_IMAGES, 7, seed=9)
    steps = other_order.steps_per_epoch
    others.append(by_sample(read(view, training_plan(other_order, 0, 1, steps, 2 * steps), STRONG)))
    for other in others:
        assert other.keys() == images.keys()
        assert all(torch.equal(other[i], images[i]) for i in images)
    first_epoch = by_sample(read(view, training_plan(order, 0, 1, 0, 4), STRONG))
    assert not any(torch.equal(first_epoch[i], images[i]) for i in images)


def test_resuming_in_the_middle_gives_the_same_batches(view: View) -> None:
    order = EpochOrder(NUM_IMAGES, 16, seed=3)
    whole = read(view, training_plan(order, 0, 1, 0, 14), STRONG)
    resumed = read(view, training_plan(order, 0, 1, 9, 14), STRONG, prefetch=3)
    assert len(whole) == 14 and len(resumed) == 5
    for expected, got in zip(whole[9:], resumed, strict=True):
        assert torch.equal(expected.images, got.images) and torch.equal(expected.labels, got.labels)


@pytest.mark.parametrize(("num_samples", "num_ranks", "batch_rows"), [(10, 3, 2), (3, 4, 2), (0, 2, 5), (8, 1, 8)])
def test_block_plan_covers_everything_once_in_blocks_that_no_number_of_ranks_changes(
    num_samples: int, num_ranks: int, batch_rows: int
) -> None:
    plans = [list(block_plan(num_samples, rank, num_ranks, batch_rows)) for rank in range(num_ranks)]
    assert len({len(plan) for plan in plans}) == 1
    blocks = [rounds[rank] for rounds in zip(*plans, strict=True) for rank in range(num_ranks)]
    filled = [block.positions.tolist() for block in blocks if len(block.positions)]
    assert filled == [batch.positions.tolist() for batch in block_plan(num_samples, 0, 1, batch_rows)]
    assert [position for block in filled for position in block] == list(range(num_samples))
    for rounds in zip(*plans, strict=True):
        counts = tuple(len(batch.positions) for batch in rounds)
        assert all(batch.rows_per_rank == counts for batch in rounds)


def planned(*rows: int) -> list[PlannedBatch]:
    return [PlannedBatch(0, np.arange(count, dtype=np.int64), (count,)) for count in rows]


@pytest.mark.parametrize("rows", [(0,), (0, 0, 3), (3, 0, 2, 0), (2, 9, 4, 30, 1), (), (5, 0, 0, 40)])
@pytest.mark.parametrize("augment", [None, STRONG])
def test_batches_of_any_size_come_in_order(view: View, rows: tuple[int, ...], augment: AugmentConfig | None) -> None:
    batches = read(view, planned(*rows), augment)
    assert [len(batch.labels) for batch in batches] == list(rows)
    for batch in batches:
        assert batch.images.shape == (batch.global_rows, 3, SIZE, SIZE)
        assert batch.sample_ids.tolist() == list(range(batch.global_rows))


def test_batches_handed_out_stay_as_they_were(view: View) -> None:
    """DALI reuses its buffers; ours must not change under a consumer that keeps them."""
    order = EpochOrder(NUM_IMAGES, 9, seed=1)
    kept, copies = [], []
    with ImageStream(view, training_plan(order, 0, 1, 0, 30), SIZE, STRONG, 1, CPU) as batches:
        for batch in batches:
            kept.append(batch.images)
            copies.append(batch.images.clone())
    assert len(kept) == 30
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


def table_with(**changes: np.ndarray) -> AugmentTable:
    values = vars(identity_table(1)) | changes
    return AugmentTable(**values)


def decode(payload: bytes, table: AugmentTable | None, augment: AugmentConfig = STRONG, size: int = SIZE) -> np.ndarray:
    batches = iter([EncodedBatch([np.frombuffer(payload, dtype=np.uint8)], table)])
    decoder = Decoder(lambda: next(batches, None), 1, size, augment if table else None, CPU, num_threads=1, prefetch=1)
    images = decoder.next()
    assert images is not None and decoder.next() is None
    decoder.close()
    return images[0].numpy().astype(np.float64)


ONE = np.ones(1, dtype=np.float32)
LEVEL = 2 / 255  # one of 256 grey levels, in normalised units


def test_identity_parameters_change_nothing() -> None:
    payload = jpeg(photo(1))
    np.testing.assert_allclose(decode(payload, identity_table(1)), pillow(payload), atol=0.51 * LEVEL)


@pytest.mark.parametrize(
    "active", [{"flip": True}, {"blur_probability": 0.5}, {"hue_deg": 9.0}, {"crop_min_area": 0.5}, {}]
)
def test_a_part_that_is_switched_off_ignores_its_parameters(active: dict[str, float]) -> None:
    """The graph holds only the parts that can act; each acts as it does in the full graph."""
    payload = jpeg(photo(9))
    changes: dict[str, dict[str, np.ndarray]] = {
        "flip": {"mirror": np.ones(1, dtype=np.int32)},
        "blur_probability": {"blur_sigma_px": 1.2 * ONE},
        "hue_deg": {"hue_deg": 80.0 * ONE},
        "crop_min_area": {"crop_size_wh": np.full((1, 2), 0.6, dtype=np.float32)},
    }
    everything = table_with(**{name: values for change in changes.values() for name, values in change.items()})
    only = table_with(**{name: values for key in active for name, values in changes[key].items()})
    got = decode(payload, everything, STILL.model_copy(update=active))
    np.testing.assert_allclose(got, decode(payload, only), atol=0.51 * LEVEL)
    assert (np.abs(got - pillow(payload)).mean() > LEVEL) == bool(active)


def test_mirror_turns_left_into_right() -> None:
    payload = jpeg(photo(2))
    got = decode(payload, table_with(mirror=np.ones(1, dtype=np.int32)))
    np.testing.assert_allclose(got, pillow(payload)[:, :, ::-1], atol=0.51 * LEVEL)


def test_crop_takes_the_named_part() -> None:
    """A crop that lies on whole pixels, at the output's size, needs no interpolation."""
    payload = jpeg(photo(3, (64, 64)))
    anchor, size = np.array([[0.25, 0.125]], dtype=np.float32), np.array([[0.5, 0.5]], dtype=np.float32)
    got = decode(payload, table_with(crop_anchor_xy=anchor, crop_size_wh=size))
    np.testing.assert_allclose(got, pillow(payload)[:, 8:40, 16:48], atol=0.51 * LEVEL)


def test_brightness_and_contrast_by_hand() -> None:
    """y = brightness * (128 + contrast * (x - 128)) on 0..255, cut at the ends."""
    payload = jpeg(photo(4))
    got = decode(payload, table_with(brightness=1.2 * ONE, contrast=0.7 * ONE))
    pixels = (pillow(payload) + 1.0) * 127.5
    expected = np.clip(1.2 * (128 + 0.7 * (pixels - 128)) / 127.5 - 1.0, -1.0, 1.0)
    np.testing.assert_allclose(got, expected, atol=1.5 * LEVEL)
    assert (got == 1.0).any() == (expected == 1.0).any()


def test_saturation_zero_is_grey_and_keeps_the_luma() -> None:
    payload = jpeg(photo(5))
    got = decode(payload, table_with(saturation=0.0 * ONE))
    luma = np.tensordot([0.299, 0.587, 0.114], pillow(payload), axes=1)
    np.testing.assert_allclose(got, np.broadcast_to(luma, got.shape), atol=2 * LEVEL)


def test_hue_turns_colours_and_leaves_greys() -> None:
    payload = jpeg(photo(6))
    turned = decode(payload, table_with(hue_deg=90.0 * ONE))
    assert np.abs(turned - pillow(payload)).mean() > 10 * LEVEL
    grey = jpeg(photo(6).convert("L"))
    np.testing.assert_allclose(decode(grey, table_with(hue_deg=90.0 * ONE)), pillow(grey), atol=2 * LEVEL)


def test_blur_is_a_gaussian_of_sigma_pixels() -> None:
    dot = np.zeros((SIZE, SIZE), dtype=np.uint8)
    dot[16, 16] = 255
    payload = jpeg(Image.fromarray(dot), subsampling=0)
    sigma = 1.5
    got = decode(payload, table_with(blur_sigma_px=sigma * ONE))[0]
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    expected = pillow(payload)[0]
    padded = np.pad(expected, radius, mode="reflect")
    rows = np.array([np.convolve(row, kernel, mode="valid") for row in padded])
    expected = np.array([np.convolve(column, kernel, mode="valid") for column in rows.T]).T
    np.testing.assert_allclose(got, expected, atol=1.1 * LEVEL)


def test_larger_photos_are_resized_with_antialiasing() -> None:
    payload = jpeg(photo(7, (96, 128)))
    got = decode(payload, None)
    with Image.open(io.BytesIO(payload)) as image:
        small = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)  # Pillow's filter is antialiased, too
    expected = np.asarray(small, dtype=np.float64).transpose(2, 0, 1) / 127.5 - 1.0
    np.testing.assert_allclose(got, expected, atol=2 * LEVEL)


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif)


@pytest.mark.parametrize(
    "payload",
    [
        jpeg(photo(8).convert("L")),
        jpeg(photo(8).convert("CMYK")),
        jpeg(photo(8), progressive=True),
        turned(photo(8)),
        jpeg(photo(8), subsampling=2),
    ],
    ids=["grey", "cmyk", "progressive", "exif", "4:2:0"],
)
def test_unusual_jpegs_decode_as_pillow_does(payload: bytes) -> None:
    np.testing.assert_allclose(decode(payload, None), pillow(payload), atol=1e-6)


def covered(x: float, y: float, width: float, height: float, grey: float) -> AugmentTable:
    return table_with(
        cover_anchor_xy=np.array([[x, y]], dtype=np.float32),
        cover_size_wh=np.array([[width, height]], dtype=np.float32),
        cover_grey=np.array([grey], dtype=np.float32),
    )


def test_occlusion_is_one_grey_rectangle() -> None:
    payload, augment = jpeg(photo(5)), STILL.model_copy(update={"occlusion_probability": 1.0})
    truth = pillow(payload)
    truth[:, 8:24, 4:12] = 100 / 127.5 - 1.0
    found = decode(payload, covered(4 / SIZE, 8 / SIZE, 8 / SIZE, 16 / SIZE, 100.0), augment)
    np.testing.assert_allclose(found, truth, atol=1e-6)
    np.testing.assert_allclose(decode(payload, identity_table(1), augment), pillow(payload), atol=1e-6)


def test_low_resolution_is_down_and_up_again() -> None:
    payload, augment = jpeg(photo(6)), STILL.model_copy(update={"low_resolution_probability": 1.0})
    image = Image.open(io.BytesIO(payload))
    side = 8
    truth = image.resize((side, side), Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    found = decode(payload, table_with(low_scale=np.array([0.25], dtype=np.float32)), augment)
    np.testing.assert_allclose(found, np.asarray(truth).transpose(2, 0, 1) / 127.5 - 1.0, atol=2 * LEVEL)
    np.testing.assert_allclose(decode(payload, identity_table(1), augment), pillow(payload), atol=1e-6)


def test_jpeg_compression_is_that_of_the_quality() -> None:
    payload, augment = jpeg(photo(7)), STILL.model_copy(update={"jpeg_probability": 1.0})
    again = io.BytesIO()
    Image.open(io.BytesIO(payload)).save(again, "JPEG", quality=30)
    found = decode(payload, table_with(jpeg_quality=np.array([30], dtype=np.int32)), augment)
    before = np.abs(pillow(payload) - pillow(again.getvalue())).mean()
    assert np.abs(found - pillow(again.getvalue())).mean() < 0.25 * before  # its 4:2:0 chroma is not libjpeg's
    np.testing.assert_allclose(decode(payload, identity_table(1), augment), pillow(payload), atol=1e-6)


def png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def webp(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", lossless=True)
    return encoded.getvalue()


@pytest.mark.parametrize(
    ("payload", "truth"),
    [
        (png(photo(8)), photo(8)),
        (png(photo(8).convert("L")), photo(8).convert("L").convert("RGB")),
        (png(photo(8).convert("RGBA")), photo(8)),
        (webp(photo(8)), photo(8)),
        (jpeg(photo(8, (1, 1))), photo(8, (1, 1))),
    ],
    ids=["png", "grey png", "png with alpha", "webp", "1 x 1"],
)
def test_what_indexed_data_sets_may_hold(payload: bytes, truth: Image.Image) -> None:
    expected = np.asarray(truth.resize((SIZE, SIZE))).transpose(2, 0, 1) / 127.5 - 1.0
    np.testing.assert_allclose(decode(payload, None), expected, atol=3 * LEVEL)


def test_sixteen_bits_and_the_very_wide_are_decoded() -> None:
    levels = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 64
    found = decode(png(Image.fromarray(levels)), None)
    np.testing.assert_allclose(found[0], levels / 32767.5 - 1.0, atol=1.01 * LEVEL)
    tall = photo(3, (20, 6000))
    truth = np.asarray(tall.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 127.5 - 1.0
    assert np.abs(decode(jpeg(tall), None) - truth).mean() < 4 * LEVEL


def overwrite(view: View, sample_id: int, change: Callable[[bytes], bytes]) -> None:
    """Damage a payload in place: the shard keeps its size, so that only decoding can notice."""
    row = view.dataset.index[sample_id]
    path = view.dataset.shard_path(row["shard"])
    contents = bytearray(path.read_bytes())
    first, end = int(row["offset"]), int(row["offset"]) + int(row["size"])
    contents[first:end] = change(bytes(contents[first:end]))
    path.write_bytes(bytes(contents))


@pytest.fixture
def own_view(view: View, tmp_path: Path) -> View:
    shutil.copytree(view.dataset.directory, tmp_path / "faces")
    dataset = PackedDataset.open(tmp_path / "faces")
    return dataset.select(dataset.identities)


@pytest.mark.parametrize(
    "change",
    [lambda b: b"no image at all, ".ljust(len(b), b"."), lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2)],
    ids=["junk", "second half zeros"],
)
@pytest.mark.parametrize("augment", [None, STRONG])
def test_a_broken_image_is_named_after_the_good_batches(
    own_view: View, change: Callable[[bytes], bytes], augment: AugmentConfig | None
) -> None:
    overwrite(own_view, 37, change)
    shard = own_view.dataset.shard_path(own_view.dataset.index[37]["shard"])
    seen = 0
    plan = block_plan(NUM_IMAGES, 0, 1, 10)
    with pytest.raises(DataError) as caught, ImageStream(own_view, plan, SIZE, augment, 1, CPU) as batches:
        for _ in batches:
            seen += 1
    assert seen == 3
    message = str(caught.value)
    assert f"shard {shard}: image 000000037.jpg (sample 37) cannot be decoded" in message and "\n" not in message


def spoiled(view: View, *sample_ids: int) -> None:
    for sample_id in sample_ids:
        overwrite(view, sample_id, lambda b: b"no image at all, ".ljust(len(b), b"."))


def skipping(view: View, ranks: int, told: list[tuple[int, str]], first: int = 0, most: int = 10) -> dict[int, Batch]:
    """Global batches by step, of a run that replaces bad images, put together from all ranks."""
    order = EpochOrder(NUM_IMAGES, 20, 3)
    parts = []
    for rank in range(ranks):
        plan = training_plan(order, rank, ranks, first, 10)
        policy = BadImages(most, lambda shard, key, reason, rank=rank: told.append((rank, key)))
        with ImageStream(view, plan, SIZE, STRONG, 5, CPU, bad_images=policy) as stream:
            parts.append(list(stream))
    together = {}
    for step, batches in enumerate(zip(*parts, strict=True), start=first):
        values = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels", "sample_ids"))
        together[step] = Batch(*values, batches[0].rows_per_rank)
    return together


@pytest.mark.parametrize("bad", [(37,), (5, 6, 7, 60), (0, 89)])
def test_others_take_the_places_of_bad_images(own_view: View, bad: tuple[int, ...]) -> None:
    told: list[tuple[int, str]] = []
    truth = skipping(own_view, 1, told)
    assert told == []
    spoiled(own_view, *bad)
    alone = skipping(own_view, 1, told)
    assert sorted(key for _, key in told) == [f"{sample_id:09}.jpg" for sample_id in bad]
    labels = own_view.labels
    assert alone.keys() == truth.keys()
    for step, batch in alone.items():
        ids, before = batch.sample_ids.numpy(), truth[step].sample_ids.numpy()
        assert not set(ids.tolist()) & set(bad) and len(ids) == len(before)
        kept = ~np.isin(before, bad)
        assert np.array_equal(ids[kept], before[kept]), "only bad images change"
        assert torch.equal(batch.images[torch.from_numpy(kept)], truth[step].images[torch.from_numpy(kept)])
        assert np.array_equal(batch.labels.numpy(), labels[ids]), "the label is that of the image that is shown"
    # the same on several ranks, and from the middle, whatever each of them has met before
    for ranks, first in ((2, 0), (3, 0), (1, 6)):
        for step, batch in skipping(own_view, ranks, [], first).items():
            assert torch.equal(batch.sample_ids, alone[step].sample_ids)
            assert torch.equal(batch.images, alone[step].images)


def test_too_many_bad_images_end_the_stream(own_view: View) -> None:
    spoiled(own_view, 1, 2, 3)
    with pytest.raises(DataError, match=r"images of .* cannot be decoded; data.bad_images_limit allows 2"):
        skipping(own_view, 1, [], most=2)
    spoiled(own_view, *range(NUM_IMAGES))
    with pytest.raises(DataError, match=r"cannot be decoded; data.bad_images_limit allows"):
        skipping(own_view, 1, [], most=1000)


def test_an_image_that_only_dali_refuses_is_replaced_too(own_view: View) -> None:
    gif = io.BytesIO()
    photo(1, (8, 8)).quantize(8).save(gif, "GIF")
    overwrite(own_view, 3, lambda b: gif.getvalue().ljust(len(b), b"\0"))
    told: list[tuple[int, str]] = []
    assert all(3 not in batch.sample_ids for batch in skipping(own_view, 1, told).values())
    assert told == [(0, "000000003.jpg")]


def test_an_image_that_only_dali_refuses_is_named(own_view: View) -> None:
    gif = io.BytesIO()
    photo(1, (8, 8)).quantize(8).save(gif, "GIF")
    overwrite(own_view, 3, lambda b: gif.getvalue().ljust(len(b), b"\0"))
    with pytest.raises(DataError, match=r"faces-000000\.tar: image 000000003\.jpg \(sample 3\) cannot be decoded"):
        read(own_view, planned(5), None)


def claiming(payload: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says another size."""
    at = payload.index(b"\xff\xc0") + 5
    return payload[:at] + struct.pack(">HH", height, width) + payload[at + 4 :]


HARMS: dict[str, Callable[[bytes], bytes]] = {
    "junk": lambda b: b"no image at all, ".ljust(len(b), b"."),
    "zeros": lambda b: bytes(len(b)),
    "html": lambda b: b"<html>404</html>".ljust(len(b)),
    "cut in its header": lambda b: b[:200] + bytes(len(b) - 200),
    "of too many pixels": lambda b: claiming(b, 30_000, 30_000),
    "cut in its body": lambda b: b[: len(b) // 2] + bytes(len(b) - len(b) // 2),
}


def test_what_importing_refuses_for_its_size_does_not_get_to_dali() -> None:
    payload = jpeg(photo(1))
    most = 64 * 2**20
    for width, height, problem in (
        (8192, 8192, None),
        (8193, 8192, f"its header says 8193 x 8192 pixels; must be at most {most} in all"),
        (30_000, 30_000, f"its header says 30000 x 30000 pixels; must be at most {most} in all"),
    ):
        assert header_problem(np.frombuffer(claiming(payload, width, height), dtype=np.uint8)) == problem


def in_a_large_batch(folder: Path, bad: list[int], skips: bool, ranks: int) -> list[list[int]]:
    """Sample ids of batches of 90 images, several times over the whole set; -1 is a hole."""
    dataset = PackedDataset.open(folder)
    view = dataset.select(dataset.identities)
    policy = BadImages(10, lambda *told: None, as_holes=True) if skips else None
    seen = []
    plan = [PlannedBatch(0, np.arange(NUM_IMAGES, dtype=np.int64), (NUM_IMAGES,))] * 3
    with ImageStream(view, iter(plan), SIZE, None, 1, CPU, num_threads=ranks, bad_images=policy) as stream:
        for batch in stream:
            assert torch.equal(batch.labels < 0, batch.sample_ids < 0)
            assert np.array_equal(batch.labels.numpy(), np.where(batch.sample_ids < 0, -1, view.labels))
            seen.append(batch.sample_ids.tolist())
    return seen


@pytest.mark.parametrize("harm", HARMS)
def test_a_bad_image_in_a_large_batch_does_not_end_the_process(
    own_view: View, harm: str, own_process: ProcessPoolExecutor
) -> None:
    """DALI's decoder itself is ended by a header that cannot be read, in batches of 32 or more."""
    bad = [0, 40, NUM_IMAGES - 1]
    for sample_id in bad:
        overwrite(own_view, sample_id, HARMS[harm])
    for threads in (1, 3):
        seen = own_process.submit(in_a_large_batch, own_view.dataset.directory, bad, True, threads).result(120)
        assert seen == [[-1 if n in bad else n for n in range(NUM_IMAGES)]] * 3
        stopped = own_process.submit(in_a_large_batch, own_view.dataset.directory, bad, False, threads)
        with pytest.raises(DataError, match=r"image 000000000\.jpg \(sample 0\) cannot be decoded"):
            stopped.result(120)


def test_a_shard_that_shrinks_or_vanishes_during_the_run_is_named(own_view: View) -> None:
    row = own_view.dataset.index[5]
    path = own_view.dataset.shard_path(row["shard"])
    os.truncate(path, int(row["offset"]) + 10)
    with pytest.raises(DataError, match=rf"{path.name} gave 10 bytes of sample 5 .* shrank after it was opened"):
        read(own_view, planned(9), None)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} cannot be opened \(No such file"):
        read(own_view, planned(9), None)


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def what_one_stream_leaves_behind(folder: Path, end: str) -> tuple[int, int, int]:
    """Threads, Python threads and open files after a stream less those before it."""
    dataset = PackedDataset.open(folder)
    view = dataset.select([f"id{number}" for number in range(9)])
    read(view, planned(3), STRONG)  # whatever a library keeps for good exists now
    threads, files, python_threads = num_threads(), num_open_files(), threading.active_count()
    batches = ImageStream(view, planned(*[5] * 50), SIZE, STRONG, 1, CPU)
    if end == "close":
        next(iter(batches))
        assert num_threads() > threads and num_open_files() > files
        batches.close()
    elif end == "error":
        with pytest.raises(KeyError), batches:
            for _ in batches:
                raise KeyError
    elif end == "exhausted":
        assert len(list(batches)) == 50
    else:
        batches.close()
        assert list(batches) == []
    deadline = time.monotonic() + 5  # the kernel lists a joined thread a little longer
    while num_threads() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    return num_threads() - threads, threading.active_count() - python_threads, num_open_files() - files


@pytest.fixture(scope="module")
def own_process() -> Iterator[ProcessPoolExecutor]:
    """A process in which nothing else opens files or starts threads, as other tests' libraries do in this one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("end", ["close", "error", "exhausted", "never started"])
def test_threads_and_files_are_gone_afterwards(view: View, own_process: ProcessPoolExecutor, end: str) -> None:
    leaks = own_process.submit(what_one_stream_leaves_behind, view.dataset.directory, end).result(120)
    assert max(leaks) <= 0, "threads, Python threads, files"


def test_at_most_a_few_shards_are_open(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(view.dataset.manifest.shards) > 3
    monkeypatch.setattr(reading, "MAX_OPEN_SHARDS", 2)
    files = num_open_files()
    reader = reading.ShardReader(view.dataset)
    ids = np.random.default_rng(0).permutation(NUM_IMAGES)
    for payload, sample_id in zip(reader.read(ids), ids.tolist(), strict=True):
        assert payload.tobytes() == payload_of(view.dataset, sample_id)
        assert num_open_files() <= files + 2
    assert num_open_files() == files + 2
    reader.close()
    assert num_open_files() == files


def test_decoding_goes_on_while_the_consumer_works(view: View) -> None:
    """With a consumer that only waits, as for a GPU, the stream hides behind it."""
    plan = [PlannedBatch(0, np.tile(np.arange(NUM_IMAGES), 3), (3 * NUM_IMAGES,)) for _ in range(8)]
    with ImageStream(view, plan, SIZE, STRONG, 1, CPU) as batches:
        iterator = iter(batches)
        next(iterator)
        started = time.perf_counter()
        for _ in range(3):
            next(iterator)
        decode_s = (time.perf_counter() - started) / 3
        waits = []
        for _ in range(4):
            time.sleep(3 * decode_s + 0.05)
            started = time.perf_counter()
            next(iterator)
            waits.append(time.perf_counter() - started)
    assert sorted(waits)[1] < 0.5 * decode_s, (decode_s, waits)


def test_slow_reads_are_made_side_by_side(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system: each read waits a millisecond."""
    pread, now, most = os.pread, 0, 0
    lock = threading.Lock()

    def slow(file: int, size: int, offset: int) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(1e-3)
        with lock:
            now -= 1
        return pread(file, size, offset)

    ids = np.random.default_rng(0).permutation(NUM_IMAGES)
    reader = reading.ShardReader(view.dataset)
    truth = [payload.tobytes() for payload in reader.read(ids)]
    monkeypatch.setattr(os, "pread", slow)
    for expected in (range(1, 2), range(9, 33)):
        most = 0
        assert [payload.tobytes() for payload in reader.read(ids)] == truth and most in expected
    threads = num_threads()
    reader.close()
    assert num_threads() < threads
