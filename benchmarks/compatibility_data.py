"""The study's pictures, decoded once and kept in memory: who is tested, which part a model is trained on, its batches.

Everything is a function of (data, seed): parts, orders and augmentation are the same in every cell of the study.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from launch.prepare import prepare_data
from lce_dist.batch import Batch
from lce_dist.config import AugmentConfig, DataConfig, SyntheticConfig
from lce_dist.embedding import EmbeddedRows
from lce_dist.training.loop import BatchSource
from pipelines.augment import AugmentTable, augment_table
from pipelines.order import EpochOrder, derive_key
from pipelines.stream import ImageStream, block_plan

Int64Array = npt.NDArray[np.int64]
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Source:
    """One data set of the study: where it comes from, its size, how many identities nobody trains on.

    tuning_share: with more than 0 that share of the training identities is tested on, and not trained on, in place of
    the test identities, which are then in no use at all.
    """

    name: str
    data: DataConfig
    augment: AugmentConfig
    tuning_share: float = 0.0


def faces(identities: int, photos: int, image_size: int, tested: int, difficulty: float) -> Source:
    """The embedded faces, drawn at the size at which they are used."""
    synthetic = SyntheticConfig(
        identities=identities, photos_per_identity=photos, photo_size=image_size, difficulty=difficulty
    )
    data = DataConfig(synthetic=synthetic, image_size=image_size, heldout_identities=tested)
    return Source("faces", data, _plain(flip=True, crop_min_area=0.7, recolour=0.2))


def omniglot(path: Path, image_size: int, tested: int) -> Source:
    """Handwritten characters: the public archive images_background_small1.zip, or another of the same form."""
    data = DataConfig(images=str(path), image_size=image_size, heldout_identities=tested)
    return Source("omniglot", data, _plain(flip=False, crop_min_area=0.4, recolour=0.0))


def _plain(flip: bool, crop_min_area: float, recolour: float) -> AugmentConfig:
    """Crop, flip, brightness and contrast; what costs more than it teaches at this size is off."""
    return AugmentConfig(
        flip=flip,
        crop_min_area=crop_min_area,
        brightness=recolour,
        contrast=recolour,
        saturation=0.0,
        hue_deg=0.0,
        blur_probability=0.0,
        grey_probability=0.0,
    )


@dataclass(frozen=True, eq=False)
class Pictures:
    """All pictures of a data set, (N, 3, S, S) uint8, and the number of each one's identity.

    tested: the positions of the test identities' pictures; trained: those of all others.
    """

    source: Source
    pixels_NCHW: torch.Tensor
    identity_N: Int64Array
    keys: tuple[str, ...]
    fingerprint: str
    tested: Int64Array
    trained: Int64Array

    @property
    def image_size(self) -> int:
        return self.pixels_NCHW.shape[-1]


def decode_once(source: Source, directory: Path) -> Path:
    """Pack, decode and store the pictures of ``source`` below ``directory``; returns their folder.

    A second call finds them. Errors: DataError, as in preparing a run.
    """
    dataset = prepare_data(source.data, directory / "packed", lambda what, done, of: None)
    size = source.data.image_size
    folder = directory / f"pixels-{source.name}-{dataset.fingerprint[:16]}-{size}"
    if (folder / "identities.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    view = dataset.select(dataset.identities)
    pixels = np.empty((view.num_samples, 3, size, size), dtype=np.uint8)
    plan = block_plan(view.num_samples, 0, 1, _BLOCK_ROWS)
    with ImageStream(view, plan, size, None, 0, torch.device("cpu"), num_threads=1) as stream:
        for batch in stream:
            pixels[batch.sample_ids.numpy()] = ((batch.images + 1.0) * 127.5).round().to(torch.uint8).numpy()
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "labels.npy", view.labels)
    partial = folder / "identities.partial"
    partial.write_text(json.dumps({"keys": list(view.identities), "fingerprint": dataset.fingerprint}))
    partial.replace(folder / "identities.json")
    return folder


def load_pictures(source: Source, folder: Path) -> Pictures:
    """What :func:`decode_once` stored; pixels are mapped, so that processes share them."""
    about = json.loads((folder / "identities.json").read_text())
    pixels = np.load(folder / "pixels.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    return pictures_of(source, torch.from_numpy(pixels), labels, tuple(about["keys"]), about["fingerprint"])


def pictures_of(
    source: Source, pixels_NCHW: torch.Tensor, identity_N: Int64Array, keys: tuple[str, ...], fingerprint: str
) -> Pictures:
    """Set the test identities aside: the same in every cell and seed."""
    chance = np.random.default_rng(derive_key(source.data.split_seed, len(keys)))
    is_tested_C = np.zeros(len(keys), dtype=bool)
    is_tested_C[chance.permutation(len(keys))[: source.data.heldout_identities]] = True
    is_trained_C = ~is_tested_C
    if source.tuning_share > 0.0:
        held_C = chance.permutation(np.flatnonzero(is_trained_C))
        held_C = held_C[: round(source.tuning_share * len(held_C))]
        is_tested_C[:] = False
        is_tested_C[held_C], is_trained_C[held_C] = True, False
    tested, trained = (np.flatnonzero(flag[identity_N]).astype(np.int64) for flag in (is_tested_C, is_trained_C))
    return Pictures(source, pixels_NCHW, identity_N, keys, fingerprint, tested, trained)


@dataclass(frozen=True)
class Share:
    """The part of the training pictures from ``low`` to ``high`` in a random order: of identities, or of each's images."""

    of: str  # "identities" or "images"
    low: float = 0.0
    high: float = 1.0

    def __str__(self) -> str:
        if (self.low, self.high) == (0.0, 1.0):
            return "all images"
        return f"{self.of} {self.low:.2f}-{self.high:.2f}"


@dataclass(frozen=True, eq=False)
class Part:
    """Training pictures of one model: positions (M,), class numbers 0 .. C-1 (M,), and the C identities."""

    positions: Int64Array
    labels: Int64Array
    identities: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.identities)


def part_of(pictures: Pictures, share: Share, seed: int) -> Part:
    """The pictures of ``share``; shares that meet without overlap in numbers do so in pictures, for one seed."""
    position = pictures.trained
    identity = pictures.identity_N[position]
    chance = np.random.default_rng(derive_key(seed, 1))
    place = np.empty(len(position))
    if share.of == "identities":
        rank_of = np.empty(len(pictures.keys))
        members = np.unique(identity)
        rank_of[members[chance.permutation(len(members))]] = (np.arange(len(members)) + 0.5) / len(members)
        place = rank_of[identity]
    else:
        for member in np.unique(identity):
            own = np.flatnonzero(identity == member)
            place[own[chance.permutation(len(own))]] = (np.arange(len(own)) + 0.5) / len(own)
    kept = (place >= share.low) & (place < share.high)
    members, labels = np.unique(identity[kept], return_inverse=True)
    return Part(position[kept], labels.astype(np.int64), tuple(pictures.keys[m] for m in members))


def batches(pictures: Pictures, part: Part, global_batch: int, total_steps: int, seed: int) -> BatchSource:
    """A source of training batches for ``train_stage``: augmented, from any step on."""
    order = EpochOrder(len(part.positions), global_batch, seed)

    @contextmanager
    def batches_from(step: int) -> Iterator[Iterator[Batch]]:
        yield (_batch(pictures, part, order, at, seed) for at in range(step, total_steps))

    return batches_from


def _batch(pictures: Pictures, part: Part, order: EpochOrder, step: int, seed: int) -> Batch:
    place = order.batch(step)
    position = part.positions[place]
    table = augment_table(pictures.source.augment, seed, order.epoch_of(step), position)
    images = augmented(pictures.pixels_NCHW[torch.from_numpy(position)], table)
    labels = torch.from_numpy(part.labels[place])
    return Batch(images, labels, torch.from_numpy(position), (len(place),))


def augmented(pixels_BCHW: torch.Tensor, table: AugmentTable) -> torch.Tensor:
    """Crop, mirror, brightness and contrast of ``table``, as float32 in [-1, 1]."""
    values = pixels_BCHW.float()
    anchor, size = torch.from_numpy(table.crop_anchor_xy), torch.from_numpy(table.crop_size_wh)
    sign = 1.0 - 2.0 * torch.from_numpy(table.mirror).float()
    theta = torch.zeros(len(sign), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = size[:, 0] * sign, size[:, 1]
    theta[:, :, 2] = 2.0 * anchor + size - 1.0
    grid = F.affine_grid(theta, list(values.shape), align_corners=False)
    values = F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # around mid-grey, then scaled, as the colour twist of the real reader
    contrast, brightness = (torch.from_numpy(v)[:, None, None, None] for v in (table.contrast, table.brightness))
    values = brightness * (127.5 + contrast * (values - 127.5))
    return (values / 127.5 - 1.0).clamp_(-1.0, 1.0)


@torch.no_grad()
def embed(net: torch.nn.Module, pictures: Pictures, positions: Int64Array) -> npt.NDArray[np.float32]:
    """Unit vectors (M, D) of pictures as they are; ``net`` comes back in the mode that it was in."""
    was_training = net.training
    net.eval()
    parts = []
    for first in range(0, len(positions), _BLOCK_ROWS):
        pixels = pictures.pixels_NCHW[torch.from_numpy(positions[first : first + _BLOCK_ROWS])]
        parts.append(F.normalize(net(pixels.float() / 127.5 - 1.0).float()))
    net.train(was_training)
    vectors: npt.NDArray[np.float32] = torch.cat(parts).numpy()
    return vectors


def rounds_of(vectors_ND: npt.NDArray[np.float32], part: Part) -> Callable[[], Iterator[EmbeddedRows]]:
    """Passes over stored vectors (one a picture of the data set), for ``part`` alone."""

    def rounds() -> Iterator[EmbeddedRows]:
        for first in range(0, len(part.positions), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            position = part.positions[block]
            unit_bD = torch.from_numpy(vectors_ND[position])
            yield EmbeddedRows(
                unit_bD, torch.from_numpy(part.labels[block]), torch.from_numpy(position), (len(position),)
            )

    return rounds
