"""Whose class row is whose: identity keys as a tensor of bytes, cut and stored beside the rows.

A key is personal: errors name numbers of classes or lines, never a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from lce_dist import storage
from lce_dist.collectives import all_reduce_max
from lce_dist.errors import CheckpointError, DataError
from lce_dist.world import World

KEY = "identity"  # the tensor's name wherever it is stored
Keys = npt.NDArray[np.bytes_]  # (N,) UTF-8, padded with zeros


def pack_keys(keys: Sequence[str], what: str, first: int) -> Keys:
    """(N,) UTF-8, as wide as the longest key; ``what`` and ``first`` number them in errors ("class", "line").

    Errors: DataError for a key that is empty or holds a NUL or a line break: files could not tell it from another.
    """
    encoded: list[bytes] = []
    for number, key in enumerate(keys, first):
        try:
            encoded.append(key.encode())
        except UnicodeEncodeError:
            encoded.append(b"")
        if not encoded[-1] or "\0" in key or "\n" in key:
            raise DataError(
                f"the identity key of {what} {number} is empty, is no UTF-8, or holds a NUL or a line break; "
                "give this identity another key"
            )
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def unpack_keys(keys_N: Keys) -> list[str]:
    """The inverse of :func:`pack_keys`."""
    return [key.decode() for key in keys_N.tolist()]


def as_bytes(keys_N: Keys, width: int) -> npt.NDArray[np.uint8]:
    """(N, width) uint8, padded with zeros."""
    wide = np.ascontiguousarray(keys_N.astype(f"S{width}"))
    return wide.view(np.uint8).reshape(len(keys_N), width)


def from_bytes(bytes_NL: npt.NDArray[np.uint8]) -> Keys:
    """The inverse of :func:`as_bytes`."""
    keys_N: Keys = np.ascontiguousarray(bytes_NL).view(f"S{bytes_NL.shape[1]}").reshape(len(bytes_NL))
    return keys_N


def identity_tensor(keys_S: Sequence[str], first_class: int, world: World) -> torch.Tensor:
    """(S, L) uint8 of this shard's keys; L is the longest key of all shards.

    Errors: DataError, on every rank. **Collectives**: two small all-reduces.
    """
    packed_S = storage.together(lambda: pack_keys(keys_S, "class", first_class), world, DataError)
    longest = all_reduce_max(torch.tensor([packed_S.dtype.itemsize], device=world.device), world)
    return torch.from_numpy(as_bytes(packed_S, int(longest.item()))).to(world.device)


def refuse_other_keys(
    directory: Path, name: str, identity_SL: torch.Tensor, num_classes: int, first_class: int, world: World
) -> None:
    """Compare the keys that ``directory`` holds as ``name`` with this run's, before anything else of it is read.

    Errors: CheckpointError, on every rank, for another number of classes, or naming the first class whose
    identity is another. **Collectives**: those of ``storage.load``, and one all-reduce.
    """
    shape = storage.read_manifest(directory, world).shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{directory} holds no identity keys ({name}); its rows cannot be matched with classes")
    if shape[0] != num_classes:
        raise CheckpointError(
            f"{directory} holds {shape[0]} classes; this run has {num_classes}. Go back to the data that it was "
            "written with, or choose another run.name"
        )
    stored_SL = torch.zeros((identity_SL.shape[0], shape[1]), dtype=torch.uint8, device=identity_SL.device)
    storage.load(directory, {name: storage.class_rows(stored_SL, num_classes, world)}, world)
    width = max(shape[1], identity_SL.shape[1])
    differs_S = (_padded(stored_SL, width) != _padded(identity_SL, width)).any(1)
    # the lowest class number is the greatest distance from the end
    places = num_classes - first_class - torch.nonzero(differs_S).reshape(-1)
    farthest = torch.zeros(1, dtype=torch.int64, device=world.device)
    if places.numel():
        farthest[0] = places.max()
    farthest = all_reduce_max(farthest, world)
    if farthest.item() > 0:
        raise CheckpointError(
            f"{directory} was written with other identities: the first that differs is class "
            f"{num_classes - int(farthest.item())} of {num_classes}. Go back to the data that it was written with, "
            "or choose another run.name"
        )


def _padded(bytes_NL: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(bytes_NL, (0, width - bytes_NL.shape[1]))
