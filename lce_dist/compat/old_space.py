"""The old model's space over the new training set: a centre and a boundary for every class, sharded by class.

**Source**: method.md section 2 of the project, after Meng et al., ICCV 2021. Centres are means of unit
vectors, normalised; a boundary is the cosine of the farthest image's angle from its centre.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lce_dist import storage
from lce_dist.collectives import gather_rows
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import RunError
from lce_dist.world import World, shard_bounds

# Sums of unit-vector components are kept as integers of 2^-40: integer sums do not depend on their order,
# so centres are bit for bit the same on any number of ranks. 2^23 images a class fit before 63 bits overflow.
_FIXED_POINT = 2.0**40
_NEVER_CROSSED = -1.0


@dataclass(frozen=True)
class OldSpace:
    """This rank's rows [first_class, last_class) of the artefact.

    centre_SD: float32 unit rows (float16 where a run asks for it, see ``to``). cos_boundary_S: float32, -1 (never crossed) for classes of one image.
    count_S: int64 images a class.
    """

    centre_SD: torch.Tensor
    cos_boundary_S: torch.Tensor
    count_S: torch.Tensor
    num_classes: int
    first_class: int

    def to(self, device: torch.device, centres: torch.dtype = torch.float32) -> OldSpace:
        return OldSpace(
            self.centre_SD.to(centres).to(device),
            self.cos_boundary_S.to(device),
            self.count_S.to(device),
            self.num_classes,
            self.first_class,
        )


def compute_old_space(
    rounds: Callable[[], Iterable[EmbeddedRows]], num_classes: int, embedding_dim: int, world: World
) -> OldSpace:
    """Centres in a first pass over ``rounds()``, boundaries in a second; every rank has as many rounds.

    **Collectives**: each round gathers W * b * D floats, twice. **Memory**: 8 * D bytes per local class.
    Errors: RunError when a class has no image.
    """
    first, last = shard_bounds(num_classes, world.rank, world.size)
    sum_SD = torch.zeros(last - first, embedding_dim, dtype=torch.int64, device=world.device)
    count_S = torch.zeros(last - first, dtype=torch.int64, device=world.device)
    for rows in rounds():
        unit_OD, local_O = _owned(rows, first, last, world)
        sum_SD.index_add_(0, local_O, (unit_OD.double() * _FIXED_POINT).round().long())
        count_S.index_add_(0, local_O, torch.ones_like(local_O))
    if count_S.numel() and int(count_S.min()) == 0:
        empty = first + int((count_S == 0).nonzero()[0])
        raise RunError(f"class {empty} has no image in the training set; every class needs one to have an old centre")
    mean_SD = sum_SD.double() / _FIXED_POINT / count_S[:, None].clamp_min(1)
    centre_SD = torch.nn.functional.normalize(mean_SD)

    cos_S = torch.full((last - first,), 2.0, dtype=torch.float64, device=world.device)
    for rows in rounds():
        unit_OD, local_O = _owned(rows, first, last, world)
        cos_O = (unit_OD.double() * centre_SD[local_O]).sum(1)
        cos_S.scatter_reduce_(0, local_O, cos_O, "amin")
    cos_S = torch.where(count_S > 1, cos_S, torch.full_like(cos_S, _NEVER_CROSSED))
    return OldSpace(centre_SD.float(), cos_S.float(), count_S, num_classes, first)


def save_old_space(space: OldSpace, directory: Path, state: dict[str, Any], world: World) -> None:
    """Commit the artefact; ``state`` holds fingerprints and the identity keys' hash."""
    storage.save(directory, _tensors(space, world), state, world)


def load_old_space(directory: Path, num_classes: int, embedding_dim: int, world: World) -> OldSpace | None:
    """The artefact in ``directory`` on any number of ranks; None when it is absent or damaged."""
    if storage.damage(directory, world) is not None:
        return None
    first, last = shard_bounds(num_classes, world.rank, world.size)
    space = OldSpace(
        torch.zeros(last - first, embedding_dim, device=world.device),
        torch.zeros(last - first, device=world.device),
        torch.zeros(last - first, dtype=torch.int64, device=world.device),
        num_classes,
        first,
    )
    storage.load(directory, _tensors(space, world), world)
    return space


def _owned(rows: EmbeddedRows, first: int, last: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    unit_GD = gather_rows(rows.unit_bD, rows.rows_per_rank, world)
    labels_G = gather_rows(rows.labels_b, rows.rows_per_rank, world)
    owned = (labels_G >= first) & (labels_G < last)
    return unit_GD[owned], labels_G[owned] - first


def _tensors(space: OldSpace, world: World) -> dict[str, torch.Tensor]:
    values = {"centre": space.centre_SD, "cos_boundary": space.cos_boundary_S, "count": space.count_S}
    return {name: storage.class_rows(value, space.num_classes, world) for name, value in values.items()}
