"""An old model of which only vectors are left: it stands where a frozen network stands, and reads no image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import ConfigError, DataError
from lce_dist.keys import hash_keys
from lce_dist.models.agreement import check_against_stored
from lce_dist.models.old_model import FrozenModel
from lce_dist.models.stored_vectors import StoredVectors
from lce_dist.world import World
from pipelines.manifest import PackedDataset, View
from pipelines.splits import select_samples
from pipelines.stream import ImageStream, PlannedBatch, block_plan

Int64Array = npt.NDArray[np.int64]
_BLOCK_ROWS = 128  # as other passes over images
_CHECKED_ROWS = 1 << 20  # looked up at a time, when a run is prepared
_CHECKED_IMAGES = 32  # on which a model and stored vectors must agree


@dataclass(frozen=True, eq=False)
class StoredOld:
    """Vectors for every training image of ``dataset`` (by "image"), or one for each identity (by "identity")."""

    vectors: StoredVectors
    dataset: PackedDataset
    by: Literal["image", "identity"]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over keys and vectors, and what the keys name."""
        return f"{self.vectors.fingerprint}-{self.by}"

    @property
    def embedding_dim(self) -> int:
        return self.vectors.embedding_dim

    def of_images(self, sample_ids: Int64Array) -> torch.Tensor:
        """(n, D) float32 unit vectors of images, or of their identities where vectors are kept by those."""
        if self.by == "identity":
            labels = self.dataset.rows[sample_ids]["label"]
            return self.of_identities([self.dataset.identities[label] for label in labels])
        assert self.dataset.name_hash_N2 is not None, "checked when it was opened"
        return torch.from_numpy(self.vectors.take(self.vectors.look_up(self.dataset.name_hash_N2[sample_ids])))

    def of_identities(self, keys: list[str]) -> torch.Tensor:
        """(n, D) float32 unit vectors."""
        return torch.from_numpy(self.vectors.rows(keys))

    def covered(self, heldout: View) -> View:
        """The held-out images that old vectors exist for: the report is of these. Errors: DataError where they say nothing."""
        if self.by == "identity":
            has_C = self.vectors.look_up(hash_keys(heldout.identities)) >= 0
            has_N = has_C[np.asarray(heldout.labels)]
        else:
            assert self.dataset.name_hash_N2 is not None, "checked when it was opened"
            has_N = self.vectors.look_up(self.dataset.name_hash_N2[np.asarray(heldout.sample_ids)]) >= 0
        if bool(has_N.all()):
            return heldout
        found = select_samples(self.dataset, np.asarray(heldout.sample_ids)[has_N]) if has_N.any() else None
        if found is None or found.num_classes < 2 or int(found.count_C.max()) < 2:
            raise DataError(
                f"stored vectors {self.vectors.path} hold {int(has_N.sum())} of the {heldout.num_samples} held-out images; the report "
                "compares new vectors with old ones of held-out people, at least 2 of them, one with 2 images. Store vectors of "
                "some, or name a split (data.split) whose held-out people have them"
            )
        return found

    def image_rounds(self, view: View, world: World) -> Callable[..., Iterator[EmbeddedRows]]:
        """A pass over the images of ``view`` that can be repeated, also from the middle."""

        def rounds(first_image: int = 0) -> Iterator[EmbeddedRows]:
            for planned in block_plan(view.num_samples, world.rank, world.size, _BLOCK_ROWS, first_image):
                ids = view.sample_ids[planned.positions]
                label_n = view.labels[planned.positions]
                yield _rows(self.of_images(ids), label_n, ids, planned.rows_per_rank, world)

        return rounds

    def identity_rounds(self, view: View, world: World) -> Callable[..., Iterator[EmbeddedRows]]:
        """As ``image_rounds``, with one row an identity, whose sample ids, -1, -2, ..., are those of no image."""

        def rounds(first_row: int = 0) -> Iterator[EmbeddedRows]:
            for planned in block_plan(view.num_classes, world.rank, world.size, _BLOCK_ROWS, first_row):
                label_n = planned.positions
                unit_nD = self.of_identities([view.identities[label] for label in label_n])
                yield _rows(unit_nD, label_n, -1 - label_n, planned.rows_per_rank, world)

        return rounds


def _rows(
    unit_nD: torch.Tensor, label_n: Int64Array, id_n: Int64Array, rows_per_rank: tuple[int, ...], world: World
) -> EmbeddedRows:
    columns = (column.to(world.device) for column in (unit_nD, torch.from_numpy(label_n), torch.from_numpy(id_n)))
    unit, label, ids = columns
    return EmbeddedRows(unit, label, ids, rows_per_rank)


def open_stored(path: Path, trained: View, embedding_dim: int, cache_dir: Path) -> StoredOld:
    """Open stored vectors and find out what their keys name: all images that the new model is ``trained`` on, or all identities.

    Errors: DataError, also where some of either have no vector; ConfigError for another dimension.
    """
    vectors, dataset = StoredVectors.open(path, cache_dir), trained.dataset
    if vectors.embedding_dim != embedding_dim:
        raise ConfigError(
            f"old.embedding_dim is {embedding_dim}; stored vectors {path} have {vectors.embedding_dim}. Set it to "
            f"{vectors.embedding_dim}"
        )
    identities = int((vectors.look_up(hash_keys(trained.identities)) >= 0).sum())
    if identities == trained.num_classes:
        return StoredOld(vectors, dataset, "identity")
    names, images = dataset.name_hash_N2, 0
    if names is not None:
        for first in range(0, trained.num_samples, _CHECKED_ROWS):
            images += int((vectors.look_up(names[trained.sample_ids[first : first + _CHECKED_ROWS]]) >= 0).sum())
        if images == trained.num_samples:
            return StoredOld(vectors, dataset, "image")
    old_pack = " (the data set was packed before images' names were kept: pack it again)" if names is None else ""
    raise DataError(
        f"stored vectors {path} hold {images} of the {trained.num_samples} training images{old_pack} and {identities} of the "
        f"{trained.num_classes} training identities; must hold all of either. Key each vector by its image's path "
        "in the folder or archive that was packed, as IDENTITY/FILE, or by identity"
    )


def check_against_vectors(
    model: FrozenModel, path: Path, dataset: PackedDataset, image_size: int, cache_dir: Path
) -> float:
    """The least cosine between the model's vectors of a few images and the stored ones.

    Errors: DataError where they disagree, naming the preprocessing that would mend it, or no image has a stored vector.
    """
    vectors = StoredVectors.open(path, cache_dir)
    found, row = np.zeros(0, np.int64), np.zeros(0, np.int64)
    names = dataset.name_hash_N2
    for first in range(0, 0 if names is None else len(names), _CHECKED_ROWS):
        assert names is not None
        row_n = vectors.look_up(names[first : first + _CHECKED_ROWS])
        found = np.flatnonzero(row_n >= 0)[:_CHECKED_IMAGES]
        if len(found):
            found, row = found + first, row_n[found]
            break
    if not len(found):
        raise DataError(
            f"stored vectors {path} hold none of the {dataset.num_samples} images of the data, so old.weights cannot be "
            "checked against them. Key each vector by its image's path in the folder or archive that was packed"
        )
    view = dataset.select(dataset.identities)
    planned = PlannedBatch(0, found, (len(found),))
    with ImageStream(view, iter([planned]), image_size, None, 0, torch.device("cpu")) as stream:
        (batch,) = list(stream)
    return check_against_stored(model, vectors, batch.images, row)
