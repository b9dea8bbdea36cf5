"""The old model's space over the new training set: a centre and a boundary for every class, sharded by class.

**Source**: method.md section 2 of the project, after Meng et al., ICCV 2021. Centres are means of unit vectors,
normalised; a boundary is the cosine of an angle from the centre, by a policy (compat/boundaries.py).
Every sum is one of integers, which do not depend on their order: the result is bit for bit the same on any number
of ranks, and after any interruption.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lce_dist import storage
from lce_dist.blocks import open_rows
from lce_dist.collectives import all_reduce_max, all_reduce_sum, gather_rows
from lce_dist.compat.boundaries import BoundaryPolicy, angles_of, boundary_angles, boundary_cosines
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import CheckpointError, RunError
from lce_dist.head.identity import KEY, refuse_other_keys
from lce_dist.world import World, shard_bounds

# Components of unit vectors in sums are integers of 2^-40: 2^23 images a class fit before 63 bits overflow.
_SUM_UNIT = 2.0**40
# In cosines they are integers of 2^-30: by Cauchy and Schwarz no partial sum of products of theirs passes 2^61.
_COS_UNIT = 2.0**30
_NONE_YET = 2**62  # above every cosine
_CHUNK_CLASSES = 16384
_CHUNK_IMAGES = 1 << 20

# ``rounds()`` is a pass over all images; where it is to be taken up again, ``rounds(first_image)`` is what follows the
# first ``first_image`` images of the pass, all ranks together. Every rank has as many rounds.
Rounds = Callable[..., Iterable[EmbeddedRows]]


@dataclass(frozen=True)
class OldSpace:
    """This rank's rows [first_class, last_class) of the artefact.

    centre_SD: float32 unit rows (float16 where a run asks for it, see ``to``). cos_boundary_S: float32, -1 (never
    crossed) for classes without a boundary. count_S: int64 images a class. align_weight_S: float32 weight of each
    class in the alignment, 0 or the same for all, with mean 1 over all classes of all ranks; None: all 1.
    """

    centre_SD: torch.Tensor
    cos_boundary_S: torch.Tensor
    count_S: torch.Tensor
    num_classes: int
    first_class: int
    align_weight_S: torch.Tensor | None = None

    def to(self, device: torch.device, centres: torch.dtype = torch.float32) -> OldSpace:
        weight_S = self.align_weight_S
        return replace(
            self,
            centre_SD=self.centre_SD.to(centres).to(device),
            cos_boundary_S=self.cos_boundary_S.to(device),
            count_S=self.count_S.to(device),
            align_weight_S=None if weight_S is None else weight_S.to(device),
        )


@dataclass(frozen=True)
class Partial:
    """Where an unfinished computation is kept, and after how many rounds each time.

    directory: that of the artefact will do: ``save_old_space`` puts the finished one in its place. state: what the
    result depends on (fingerprints); what was kept under another is not gone on with.
    """

    directory: Path
    every_rounds: int
    state: dict[str, Any] = field(default_factory=dict)


def compute_old_space(
    rounds: Rounds,
    num_classes: int,
    embedding_dim: int,
    world: World,
    policy: BoundaryPolicy | None = None,
    seen_S: torch.Tensor | None = None,
    partial: Partial | None = None,
) -> OldSpace:
    """Centres in a first pass over ``rounds()``, boundaries in a second; every rank has as many rounds.

    seen_S: bool (S,), which classes of this shard take part in alignment and boundary (None: all).
    Errors: RunError, on every rank, when a class has no image, none is seen, or the passes differ.
    **Collectives**: each round gathers W * b * D floats, twice. **Memory**: 8 * D bytes per local class in the first
    pass (12 at its end), 4 * D in the second, and 8 bytes per image of local classes unless the policy is "max".
    """
    policy = policy or BoundaryPolicy()
    first, last = shard_bounds(num_classes, world.rank, world.size)
    align_weight_S = None if seen_S is None else _align_weights(seen_S.to(world.device), num_classes, world)
    keeper = _Keeper(partial, num_classes, world)
    centre_SD, count_S = _centres(rounds, (first, last), embedding_dim, keeper, world)
    cosines: _Cosines = _Farthest(count_S) if policy.kind == "max" else _All(count_S)
    _fill(cosines, rounds, (first, last), centre_SD, policy.kind, keeper, world)
    storage.together(lambda: cosines.check(first), world, RunError)
    count: npt.NDArray[np.int64] = count_S.cpu().numpy()
    seen = None if seen_S is None else seen_S.cpu().numpy()
    cos_S = boundary_cosines(cosines.angles(policy), count, policy, seen)
    boundary_S = torch.from_numpy(cos_S).to(world.device)
    return OldSpace(centre_SD, boundary_S, count_S, num_classes, first, align_weight_S)


def save_old_space(
    space: OldSpace, directory: Path, state: dict[str, Any], world: World, identity_SL: torch.Tensor | None = None
) -> None:
    """Commit the artefact with the identity keys of its classes (head/identity.py).

    state: fingerprints of the old model and the data, and ``BoundaryPolicy.describe()``; ``load_old_space`` compares it.
    """
    tensors = _tensors(space, world)
    if space.align_weight_S is not None:
        tensors["align_weight"] = storage.class_rows(space.align_weight_S, space.num_classes, world)
    if identity_SL is not None:
        tensors[KEY] = storage.class_rows(identity_SL, space.num_classes, world)
    storage.save(directory, tensors, state, world)


def load_old_space(
    directory: Path,
    num_classes: int,
    embedding_dim: int,
    world: World,
    identity_SL: torch.Tensor | None = None,
    state: dict[str, Any] | None = None,
) -> OldSpace | None:
    """The artefact in ``directory`` on any number of ranks; None when it is absent or damaged.

    Errors: CheckpointError, on every rank, when it was computed under another ``state``, or for classes whose identity
    keys are not ``identity_SL``.
    """
    if storage.damage(directory, world) is not None:
        return None
    stored = storage.read_manifest(directory, world)
    if state is not None:
        _refuse_other_state(directory, stored.state, state)
    first, last = shard_bounds(num_classes, world.rank, world.size)
    if identity_SL is not None:
        refuse_other_keys(directory, KEY, identity_SL, num_classes, first, world)
    space = OldSpace(
        torch.zeros(last - first, embedding_dim, device=world.device),
        torch.zeros(last - first, device=world.device),
        torch.zeros(last - first, dtype=torch.int64, device=world.device),
        num_classes,
        first,
    )
    tensors = _tensors(space, world)
    if "align_weight" in stored.shapes:
        space = replace(space, align_weight_S=torch.zeros(last - first, device=world.device))
        assert space.align_weight_S is not None
        tensors["align_weight"] = storage.class_rows(space.align_weight_S, num_classes, world)
    storage.load(directory, tensors, world)
    return space


class _Cosines(Protocol):
    """What the second pass keeps of the images' cosines, int64 in units of 2^-60."""

    def add(self, local_O: torch.Tensor, cos_O: torch.Tensor) -> None: ...

    def check(self, first_class: int) -> None: ...

    def angles(self, policy: BoundaryPolicy) -> npt.NDArray[np.float64]: ...

    def tensors(self, num_classes: int, world: World) -> dict[str, torch.Tensor]: ...

    def restore(self, directory: Path, num_classes: int, world: World) -> None: ...


class _Farthest:
    """The lowest cosine of each class."""

    def __init__(self, count_S: torch.Tensor) -> None:
        self._count_S = count_S
        self._filled_S = torch.zeros_like(count_S)
        self._lowest_S = torch.full_like(count_S, _NONE_YET)

    def add(self, local_O: torch.Tensor, cos_O: torch.Tensor) -> None:
        self._lowest_S.scatter_reduce_(0, local_O, cos_O, "amin")
        self._filled_S.index_add_(0, local_O, torch.ones_like(local_O))

    def check(self, first_class: int) -> None:
        _refuse_other_counts(self._filled_S, self._count_S, first_class)

    def angles(self, policy: BoundaryPolicy) -> npt.NDArray[np.float64]:
        return angles_of(_as_float(self._lowest_S))

    def tensors(self, num_classes: int, world: World) -> dict[str, torch.Tensor]:
        named = {"filled": self._filled_S, "lowest": self._lowest_S}
        return {name: storage.class_rows(tensor, num_classes, world) for name, tensor in named.items()}

    def restore(self, directory: Path, num_classes: int, world: World) -> None:
        storage.load(directory, self.tensors(num_classes, world), world)


class _All:
    """The cosine of every image, class after class; each class has as many slots as images, filled from its first."""

    def __init__(self, count_S: torch.Tensor) -> None:
        self._count_S = count_S
        self._slot_S = torch.cumsum(count_S, 0) - count_S
        self._filled_S = torch.zeros_like(count_S)
        self._cos_P = torch.zeros(int(count_S.sum()), dtype=torch.int64, device=count_S.device)

    def add(self, local_O: torch.Tensor, cos_O: torch.Tensor) -> None:
        sorted_O, order_O = torch.sort(local_O)
        classes, sizes = torch.unique_consecutive(sorted_O, return_counts=True)
        begins_O = torch.repeat_interleave(torch.cumsum(sizes, 0) - sizes, sizes)
        place_O = self._filled_S[sorted_O] + torch.arange(len(sorted_O), device=sorted_O.device) - begins_O
        fits_O = place_O < self._count_S[sorted_O]  # what does not fit is told by ``check``, on every rank
        self._cos_P[(self._slot_S[sorted_O] + place_O)[fits_O]] = cos_O[order_O][fits_O]
        self._filled_S.index_add_(0, classes, sizes)

    def check(self, first_class: int) -> None:
        _refuse_other_counts(self._filled_S, self._count_S, first_class)

    def angles(self, policy: BoundaryPolicy) -> npt.NDArray[np.float64]:
        return boundary_angles(_as_float(self._cos_P), self._count_S.cpu().numpy(), policy)

    def tensors(self, num_classes: int, world: World) -> dict[str, torch.Tensor]:
        """Slots are stored in as long a row for every rank, as ``shard_bounds`` cuts; ``slot`` says where a class's begin."""
        longest = int(all_reduce_max(torch.tensor([len(self._cos_P)], device=world.device), world).item())
        padded_P = torch.nn.functional.pad(self._cos_P, (0, longest - len(self._cos_P)))
        return {
            "filled": storage.class_rows(self._filled_S, num_classes, world),
            "slot": storage.class_rows(self._slot_S + world.rank * longest, num_classes, world),
            "cosine": storage.class_rows(padded_P, world.size * longest, world),
        }

    def restore(self, directory: Path, num_classes: int, world: World) -> None:
        stored_S = torch.zeros_like(self._slot_S)
        tensors = {"filled": self._filled_S, "slot": stored_S}
        cut = {name: storage.class_rows(tensor, num_classes, world) for name, tensor in tensors.items()}
        storage.load(directory, cut, world)
        storage.together(lambda: self._read(directory, stored_S.cpu()), world)

    def _read(self, directory: Path, stored_S: torch.Tensor) -> None:
        cosines = open_rows(directory, storage.read_manifest(directory, World()))["cosine"]
        slot_S, count_S = self._slot_S.cpu(), self._count_S.cpu()
        if not len(slot_S):
            return
        # classes that one rank held lie side by side there: a run for each of those ranks, not one for each class
        follows_S = stored_S[1:] == stored_S[:-1] + count_S[:-1]
        starts = [0, *(torch.nonzero(~follows_S).squeeze(1) + 1).tolist(), len(slot_S)]
        for begin, end in itertools.pairwise(starts):
            there, here = int(stored_S[begin]), int(slot_S[begin])
            images = int(count_S[begin:end].sum())
            for low in range(0, images, _CHUNK_IMAGES):
                high = min(low + _CHUNK_IMAGES, images)
                found = torch.from_numpy(cosines.take(np.arange(there + low, there + high, dtype=np.int64)))
                self._cos_P[here + low : here + high] = found.to(self._cos_P.device)


class _Keeper:
    """Commits what a pass has so far under ``Partial``, and finds it again; without one it does nothing."""

    def __init__(self, partial: Partial | None, num_classes: int, world: World) -> None:
        self._partial = partial
        self.num_classes = num_classes
        self._world = world

    def images_done(self, name: str, what: dict[str, Any]) -> int | None:
        """How many images are in what is kept as ``name``; None when nothing sound is, or it is of another ``what``."""
        if self._partial is None or storage.damage(self.path(name), self._world) is not None:
            return None
        state = storage.read_manifest(self.path(name), self._world).state
        images = state.pop("images", None)
        return images if isinstance(images, int) and state == self._state(what) else None

    def commit(self, name: str, what: dict[str, Any], tensors: dict[str, torch.Tensor], images: int) -> None:
        if self._partial is not None:
            storage.save(self.path(name), tensors, self._state(what) | {"images": images}, self._world)

    def is_due(self, rounds_done: int) -> bool:
        return self._partial is not None and rounds_done % self._partial.every_rounds == 0

    def drop(self, name: str) -> None:
        """Remove what a later commit stands for."""
        if self._partial is not None and self._world.is_first:
            shutil.rmtree(self.path(name), ignore_errors=True)

    def path(self, name: str) -> Path:
        assert self._partial is not None
        return self._partial.directory / name

    def _state(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._partial is not None
        return {"of": self._partial.state, "classes": self.num_classes, **what}


def _centres(
    rounds: Rounds, shard: tuple[int, int], embedding_dim: int, keeper: _Keeper, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit centres (S, D) float32 and images a class (S,)."""
    num_local, num_classes = shard[1] - shard[0], keeper.num_classes
    what = {"dim": embedding_dim}
    count_S = torch.zeros(num_local, dtype=torch.int64, device=world.device)

    def cut(name: str, rows_SD: torch.Tensor) -> dict[str, torch.Tensor]:
        named = {name: rows_SD, "count": count_S}
        return {key: storage.class_rows(tensor, num_classes, world) for key, tensor in named.items()}

    if keeper.images_done("centres", what) is not None:
        centre_SD = torch.zeros(num_local, embedding_dim, device=world.device)
        storage.load(keeper.path("centres"), cut("centre", centre_SD), world)
        return centre_SD, count_S
    sum_SD = torch.zeros(num_local, embedding_dim, dtype=torch.int64, device=world.device)
    images = keeper.images_done("sums", what)
    if images is not None:
        storage.load(keeper.path("sums"), cut("sum", sum_SD), world)
    images = images or 0
    for number, rows in enumerate(rounds(images) if images else rounds(), 1):
        unit_OD, local_O = _owned(rows, *shard, world)
        sum_SD.index_add_(0, local_O, (unit_OD.double() * _SUM_UNIT).round().long())
        count_S.index_add_(0, local_O, torch.ones_like(local_O))
        images += sum(rows.rows_per_rank)
        if keeper.is_due(number):
            keeper.commit("sums", what, cut("sum", sum_SD), images)
    storage.together(lambda: _refuse_empty(count_S, shard[0]), world, RunError)
    centre_SD = _directions(sum_SD)
    del sum_SD
    keeper.commit("centres", what, cut("centre", centre_SD), images)
    keeper.drop("sums")
    return centre_SD, count_S


def _fill(
    cosines: _Cosines,
    rounds: Rounds,
    shard: tuple[int, int],
    centre_SD: torch.Tensor,
    kind: str,
    keeper: _Keeper,
    world: World,
) -> None:
    """The second pass."""
    what = {"dim": centre_SD.shape[1], "kept": "lowest" if kind == "max" else "all"}
    images = keeper.images_done("cosines", what)
    if images is not None:
        cosines.restore(keeper.path("cosines"), keeper.num_classes, world)
    images = images or 0
    for number, rows in enumerate(rounds(images) if images else rounds(), 1):
        unit_OD, local_O = _owned(rows, *shard, world)
        centre_OD = (centre_SD[local_O].double() * _COS_UNIT).round().long()
        cosines.add(local_O, ((unit_OD.double() * _COS_UNIT).round().long() * centre_OD).sum(1))
        images += sum(rows.rows_per_rank)
        if keeper.is_due(number):
            keeper.commit("cosines", what, cosines.tensors(keeper.num_classes, world), images)


def _directions(sum_SD: torch.Tensor) -> torch.Tensor:
    """Unit rows (S, D) float32 of integer rows; also the length is from a sum of integers. A row of zeros stays."""
    # D squares of integers of at most 2^bits, and their sum, stay below 2^62
    unit = 2.0 ** int((62 - np.log2(sum_SD.shape[1])) // 2)
    centre_SD = torch.empty(sum_SD.shape, device=sum_SD.device)
    for low in range(0, sum_SD.shape[0], _CHUNK_CLASSES):
        part_KD = sum_SD[low : low + _CHUNK_CLASSES].double()
        part_KD /= part_KD.abs().amax(1, keepdim=True).clamp_min(1.0)
        square_K = (part_KD * unit).round().long().square().sum(1)
        length_K = square_K.double().sqrt() / unit
        centre_SD[low : low + _CHUNK_CLASSES] = part_KD / length_K.clamp_min(1e-12)[:, None]
    return centre_SD


def _owned(rows: EmbeddedRows, first: int, last: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    unit_GD = gather_rows(rows.unit_bD, rows.rows_per_rank, world)
    labels_G = gather_rows(rows.labels_b, rows.rows_per_rank, world)
    owned = (labels_G >= first) & (labels_G < last)
    return unit_GD[owned], labels_G[owned] - first


def _align_weights(seen_S: torch.Tensor, num_classes: int, world: World) -> torch.Tensor:
    num_seen = int(all_reduce_sum(seen_S.sum().reshape(1), world).item())
    if num_seen == 0:
        raise RunError(
            f"none of the {num_classes} classes of the new training set is of the old one, and seen_only limits "
            "alignment and boundaries to those. Set compat.seen_only to false"
        )
    return seen_S.float() * (num_classes / num_seen)


def _refuse_empty(count_S: torch.Tensor, first_class: int) -> None:
    if count_S.numel() and int(count_S.min()) == 0:
        empty = first_class + int((count_S == 0).nonzero()[0])
        raise RunError(f"class {empty} has no image in the training set; every class needs one to have an old centre")


def _refuse_other_counts(filled_S: torch.Tensor, count_S: torch.Tensor, first_class: int) -> None:
    differs = torch.nonzero(filled_S != count_S)
    if len(differs):
        local = int(differs[0])
        raise RunError(
            f"the second pass over the images saw {int(filled_S[local])} of class {first_class + local}, the first "
            f"{int(count_S[local])}; both must see the same. Leave the data as it is while a run reads it"
        )


def _refuse_other_state(directory: Path, stored: dict[str, Any], state: dict[str, Any]) -> None:
    differs = sorted(key for key in stored.keys() | state.keys() if stored.get(key) != state.get(key))
    if differs:
        key = differs[0]
        raise CheckpointError(
            f"{directory} was computed with {key} {stored.get(key)!r}; this run has {state.get(key)!r}. "
            "Name another directory, or remove it to compute it again"
        )


def _as_float(cos: torch.Tensor) -> npt.NDArray[np.float64]:
    value: npt.NDArray[np.float64] = cos.cpu().numpy() / (_COS_UNIT * _COS_UNIT)
    return value


def _tensors(space: OldSpace, world: World) -> dict[str, torch.Tensor]:
    values = {"centre": space.centre_SD, "cos_boundary": space.cos_boundary_S, "count": space.count_S}
    return {name: storage.class_rows(value, space.num_classes, world) for name, value in values.items()}
