"""A trained classifier on disk: rows, identity keys and old space; exported, grown and shrunk in blocks of classes.

Tensors of the artefact: ``weight`` (C, D) float32, ``identity`` (C, L) uint8, and of a compatible stage
``old_centre`` (C, D), ``old_cos_boundary`` (C,) float32, ``old_count`` (C,) int64. The JSON state is its card.
**Memory** of ``export``, ``grow`` and ``shrink``: a few blocks of 32 MiB; 24 bytes a class in ``grow`` (lengths, for
their median); and what the caller gives: about 200 bytes a key, and four times the new rows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lce_dist import storage
from lce_dist.blocks import StoredRows, open_rows, refuse_existing, write_directory
from lce_dist.errors import CheckpointError, DataError, RunError
from lce_dist.head.identity import KEY, Keys, as_bytes, from_bytes, pack_keys
from lce_dist.head.rows import ClassRows
from lce_dist.head.tables import PlainTable
from lce_dist.tensor_file import Array, Column, Progress, write_file
from lce_dist.world import World

FORMAT = "lce-dist-classifier"
_CHUNK = 65536
_OLD = ("old_centre", "old_cos_boundary", "old_count")
# what an identity without an old centre has: no direction, a boundary that is never crossed, no image
_ABSENT = {"old_centre": 0.0, "old_cos_boundary": -1.0, "old_count": 0}


@dataclass(frozen=True)
class OldRows:
    """Old centres (N, D) float32 unit rows, cosines of boundaries (N,) float32 and numbers of images (N,) int64."""

    centre_ND: torch.Tensor
    cos_boundary_N: torch.Tensor
    count_N: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names under which they are stored."""
        return dict(zip(_OLD, (self.centre_ND, self.cos_boundary_N, self.count_N), strict=True))


@dataclass(frozen=True)
class Card:
    """What a classifier says of itself; ``model`` holds stage, net, fingerprint of the run, margin and scale."""

    num_classes: int
    dim: int
    num_bytes: int
    has_old: bool
    model: dict[str, Any]


def save_classifier(
    directory: Path,
    rows: ClassRows,
    identity_SL: torch.Tensor,
    old: OldRows | None,
    model: dict[str, Any],
    world: World,
) -> None:
    """Commit this rank's settled rows with those of the others; a classifier of that name is replaced.

    **Memory**: a float32 copy of rows that are stored otherwise. **Collectives**: those of ``storage.save``.
    """
    tensors = {"weight": _float32(rows), KEY: identity_SL} | (old.tensors() if old is not None else {})
    cut = {name: storage.class_rows(tensor, rows.num_classes, world) for name, tensor in tensors.items()}
    storage.save(directory, cut, {"format": FORMAT, "model": model}, world)


def read_card(directory: Path, world: World | None = None) -> Card:
    """What ``directory`` holds, from its manifest alone.

    Errors: CheckpointError, on every rank, when it is no classifier.
    """
    return _card(directory, storage.read_manifest(directory, world or World()))


def fingerprint(directory: Path, progress: Progress | None = None) -> str:
    """16 hex digits over rows and keys in the order of classes, however they are cut into files.

    Errors: CheckpointError when it is damaged. progress: gets (bytes done, bytes).
    """
    card, _, columns = _opened(directory, World())
    digest = hashlib.sha256(f"{card.num_classes} {card.dim}\n".encode())
    total, done = card.num_classes * card.dim * 4, 0
    for block in columns[KEY].blocks():
        digest.update(b"".join(key + b"\n" for key in from_bytes(block).tolist()))
    for block in columns["weight"].blocks():
        digest.update(block.data)
        done += block.nbytes
        if progress is not None:
            progress(done, total)
    return digest.hexdigest()[:16]


def known_rows(directory: Path, identity_SL: torch.Tensor, dim: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that a classifier has for some of the identities: their numbers (N,) in this shard, and (N, D) float32.

    Errors: CheckpointError, on every rank, when it is damaged or of another dimension. **Memory**: a block of
    keys, and the rows. **Collectives**: small all-reduces.
    """
    card, _, columns = _opened(directory, world)
    if card.dim != dim:
        raise CheckpointError(f"{directory} has rows of {card.dim} values; this run has embedding_dim {dim}")

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        places_S = _places(from_bytes(identity_SL.cpu().numpy()), columns[KEY])
        local_N = np.flatnonzero(places_S >= 0)
        return torch.from_numpy(local_N), torch.from_numpy(columns["weight"].take(places_S[local_N]))

    return storage.together(read, world)


def export(directory: Path, keys: Sequence[str] | None, out: Path, progress: Progress | None = None) -> int:
    """Write rows as ``weight`` to the safetensors file ``out``, their keys beside it, one a line (``keys_file``).

    keys: whose rows, in this order; None means all. Returns their number. Neither file is overwritten.
    Errors: CheckpointError for the artefact; DataError for keys that are unknown or named twice; RunError for ``out``.
    """
    if out.suffix != ".safetensors":
        raise DataError(f"{out} ends in {out.suffix!r}; must be .safetensors. Rename it")
    _, _, columns = _opened(directory, World())
    rows_N = None if keys is None else _rows_of(directory, keys, columns[KEY])
    count = columns[KEY].shape[0] if rows_N is None else len(rows_N)
    for path in (out, keys_file(out)):
        refuse_existing(path)
    part, keys_part = out.with_name(out.name + ".partial"), keys_file(out).with_name(keys_file(out).name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with keys_part.open("wb") as file:
            for block in columns[KEY].blocks(rows_N):
                file.write(b"".join(key + b"\n" for key in from_bytes(block).tolist()))
            file.flush()
            os.fsync(file.fileno())
        write_file(part, {"weight": _column(columns["weight"], rows_N)}, progress)
        for path in (out, keys_file(out)):
            refuse_existing(path)
        keys_part.rename(keys_file(out))
        part.rename(out)  # last: a file of rows always has its keys
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error}. Free space or choose another place") from None
    return count


def keys_file(out: Path) -> Path:
    """rows.safetensors -> rows.keys.txt."""
    return out.with_suffix(".keys.txt")


def shrink(directory: Path, keep_keys: Sequence[str], out: Path, progress: Progress | None = None) -> int:
    """Write the classifier ``out`` of some identities of ``directory``, in its order, not in theirs; returns how many.

    Errors: as :func:`export`; DataError for no keys at all.
    """
    if not keep_keys:
        raise DataError("no identity key was given; a classifier needs at least 1 class")
    _, stored, columns = _opened(directory, World())
    rows_N = np.sort(_rows_of(directory, keep_keys, columns[KEY]))
    kept = {name: _column(rows, rows_N) for name, rows in columns.items()}
    write_directory(out, kept, stored.state, progress)
    return len(rows_N)


def turn(directory: Path, rotation_DD: torch.Tensor, out: Path) -> None:
    """Write the classifier ``out`` whose rows are ``rotation_DD`` times those of ``directory``, for a network turned like that.

    One that is there already and was turned by the same numbers stays; another is replaced. Old centres are as they were.
    Errors: CheckpointError for the artefact; RunError for ``out``.
    """
    turn_DD = rotation_DD.detach().double().cpu().numpy()
    name = hashlib.sha256(np.ascontiguousarray(turn_DD).data).hexdigest()[:16]
    if out.exists():
        if read_card(out).model.get("rotation") == name:
            return
        shutil.rmtree(out)
    _, stored, columns = _opened(directory, World())
    rows = columns["weight"]

    def blocks() -> Iterator[Array]:
        for block in rows.blocks():
            yield (block.astype(np.float64) @ turn_DD.T).astype(block.dtype)

    turned = {key: _column(column, None) for key, column in columns.items()}
    turned["weight"] = Column.of_arrays(rows.dtype, rows.shape, blocks())
    write_directory(out, turned, {**stored.state, "model": {**stored.state["model"], "rotation": name}})


def grow(
    directory: Path,
    new_keys: Sequence[str],
    rows_ND: torch.Tensor,
    out: Path,
    old: OldRows | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the classifier ``out``: the classes of ``directory`` as they are, then the new ones in the order of their keys.

    rows_ND: a direction for each new key, such as its class mean, in the order of ``new_keys``; a new row gets
    it at the median length of the existing rows. old: their old space; without it theirs is marked absent
    (centre 0, boundary -1, count 0). Returns the number of classes. Errors: as :func:`export`.
    """
    _, stored, columns = _opened(directory, World())
    dim = columns["weight"].shape[1]
    if not new_keys or tuple(rows_ND.shape) != (len(new_keys), dim):
        raise DataError(
            f"{len(new_keys)} new identities have rows of shape {tuple(rows_ND.shape)}; must be at least 1 identity "
            f"and ({len(new_keys)}, {dim})"
        )
    packed_N = pack_keys(new_keys, "line", 1)
    _refuse_twice(packed_N)
    known = _places(packed_N, columns[KEY]) >= 0
    if known.any():
        raise DataError(
            f"{int(known.sum())} of {len(new_keys)} new identities are in {directory} already; the first is line "
            f"{int(np.flatnonzero(known)[0]) + 1}. Leave them out"
        )
    if old is not None and "old_centre" not in columns:
        raise DataError(f"{directory} has no old space; the new identities cannot have one. Leave it out")
    order_N = np.argsort(packed_N, kind="stable")
    added: dict[str, Array] = {"weight": _at_median_length(rows_ND, columns["weight"])}
    if old is not None:
        added |= {name: tensor.cpu().numpy() for name, tensor in old.tensors().items()}
    width = max(columns[KEY].shape[1], packed_N.dtype.itemsize)
    grown = {KEY: _appended(columns[KEY], width, as_bytes(packed_N[order_N], width))}
    for name, rows in columns.items():
        if name != KEY:
            absent = np.full((len(new_keys), *rows.shape[1:]), _ABSENT.get(name, 0.0), rows.dtype)
            new = added[name][order_N] if name in added else absent
            grown[name] = _appended(rows, None, new.astype(rows.dtype, copy=False))
    write_directory(out, grown, stored.state, progress)
    return columns[KEY].shape[0] + len(new_keys)


def unknown_keys(directory: Path, keys: Sequence[str]) -> list[str]:
    """Those of ``keys`` that the classifier has no row for, in their order. Errors: CheckpointError."""
    _, _, columns = _opened(directory, World())
    places_N = _places(pack_keys(keys, "line", 1), columns[KEY])
    return [key for key, place in zip(keys, places_N.tolist(), strict=True) if place < 0]


def read_keys(path: Path) -> list[str]:
    """The keys of a file, one a line. Errors: DataError when it is absent, empty or no UTF-8."""
    try:
        lines = path.read_bytes().decode().split("\n")  # not splitlines(): a key may hold other line breaks
    except OSError as error:
        raise DataError(f"keys file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"keys file {path} is no UTF-8 (byte {error.start}); save it as UTF-8") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise DataError(f"keys file {path} is empty; name at least 1 identity, one a line")
    return lines


def _float32(rows: ClassRows) -> torch.Tensor:
    if isinstance(rows.weight, PlainTable):
        return rows.weight.load(slice(0, rows.num_local)).float()
    parts = [slice(low, min(low + _CHUNK, rows.num_local)) for low in range(0, rows.num_local, _CHUNK)]
    dim = rows.weight.load(slice(0, 0)).shape[1]
    whole_SD = torch.empty(rows.num_local, dim, device=rows.inv_norm_S.device)
    for part in parts:
        whole_SD[part] = rows.weight.load(part)
    return whole_SD


def _card(directory: Path, stored: storage.Stored) -> Card:
    weight, identity = stored.shapes.get("weight"), stored.shapes.get(KEY)
    if stored.state.get("format") != FORMAT or weight is None or identity is None or weight[0] != identity[0]:
        raise CheckpointError(f"{directory} is no classifier; name a folder RUN_DIR/NAME/STAGE/classifier")
    num_bytes = sum(int(file["bytes"]) for file in stored.files.values())
    return Card(weight[0], weight[1], num_bytes, "old_centre" in stored.shapes, stored.state["model"])


def _opened(directory: Path, world: World) -> tuple[Card, storage.Stored, dict[str, StoredRows]]:
    """A classifier whose files have been hashed."""
    damage = storage.damage(directory, world)
    if damage is not None:
        raise CheckpointError(f"{damage}. Restore it")
    stored = storage.read_manifest(directory, world)
    card = _card(directory, stored)
    return card, stored, storage.together(lambda: open_rows(directory, stored), world)


def _rows_of(directory: Path, keys: Sequence[str], stored: StoredRows) -> npt.NDArray[np.int64]:
    """The row number of each key."""
    packed_N = pack_keys(keys, "line", 1)
    _refuse_twice(packed_N)
    rows_N = _places(packed_N, stored)
    unknown = np.flatnonzero(rows_N < 0)
    if unknown.size:
        raise DataError(
            f"{unknown.size} of {len(keys)} keys are no identities of {directory}; the first is line "
            f"{int(unknown[0]) + 1}. Remove them"
        )
    return rows_N


def _refuse_twice(keys_N: Keys) -> None:
    order = np.argsort(keys_N, kind="stable")
    again = order[1:][keys_N[order][1:] == keys_N[order][:-1]]
    if again.size:
        raise DataError(
            f"{again.size} of {len(keys_N)} keys are named before; the first is line {int(again.min()) + 1}. "
            "Name each identity once"
        )


def _places(keys_N: Keys, stored: StoredRows) -> npt.NDArray[np.int64]:
    """The stored row of each key, -1 for a key that is not stored."""
    places_N = np.full(len(keys_N), -1, dtype=np.int64)
    if not len(keys_N):
        return places_N
    order_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order_N]
    first = 0
    for block in stored.blocks():
        found_K = from_bytes(block)
        at_K = np.minimum(np.searchsorted(sorted_N, found_K), len(sorted_N) - 1)
        hit_K = np.flatnonzero(sorted_N[at_K] == found_K)
        places_N[order_N[at_K[hit_K]]] = first + hit_K
        first += len(found_K)
    return places_N


def _column(stored: StoredRows, rows_N: npt.NDArray[np.int64] | None) -> Column:
    count = stored.shape[0] if rows_N is None else len(rows_N)
    return Column.of_arrays(stored.dtype, (count, *stored.shape[1:]), stored.blocks(rows_N))


def _appended(stored: StoredRows, width: int | None, new: Array) -> Column:
    def blocks() -> Iterator[Array]:
        for block in stored.blocks():
            yield block if width is None else as_bytes(from_bytes(block), width)
        yield new

    return Column.of_arrays(stored.dtype, (stored.shape[0] + len(new), *new.shape[1:]), blocks())


def _at_median_length(rows_ND: torch.Tensor, stored: StoredRows) -> Array:
    rows: Array = rows_ND.detach().double().cpu().numpy()
    length_N = np.linalg.norm(rows, axis=1)
    wrong = np.flatnonzero(~np.isfinite(length_N) | (length_N == 0.0))
    if wrong.size:
        raise DataError(
            f"{wrong.size} of {len(rows)} new identities have no direction (a row of zeros, or not finite); the first "
            f"is line {int(wrong[0]) + 1}. Leave them out"
        )
    lengths = [np.linalg.norm(block.astype(np.float64), axis=1) for block in stored.blocks()]
    scaled: Array = rows * (np.median(np.concatenate(lengths)) / length_N)[:, None]
    return scaled.astype(np.float32)
