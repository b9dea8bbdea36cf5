"""Tensors on disk, whole or cut by class over ranks: written atomically, checked by hash, read by any number of ranks.

torch.distributed.checkpoint does the cutting and the reading back; its safetensors form is used, so no
pickle is written or read. A directory appears under its name only when complete (rename of a finished one).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lce_dist.collectives import all_reduce_max, barrier
from lce_dist.errors import CheckpointError
from lce_dist.world import World

logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*torch.distributed is.*", category=UserWarning)

MANIFEST = "manifest.json"
FORMAT = "lce-dist-tensors"


def class_rows(local_S: torch.Tensor, num_classes: int, world: World) -> torch.Tensor:
    """The local rows (``shard_bounds``) of a (num_classes, ...) tensor, marked as such for ``save`` and ``load``."""
    if world.size == 1:
        return local_S
    mesh = init_device_mesh(world.device.type, (world.size,))
    shape = torch.Size((num_classes, *local_S.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local_S, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def save(directory: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any], world: World) -> None:
    """Write ``tensors`` (every rank its rows; replicas once) and the JSON ``state``, then commit by one rename.

    A directory of that name is replaced. **Collectives**: those of dcp.save, and three barriers.
    """
    partial = directory.with_name(directory.name + ".partial")
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(world)
    dcp.save(
        dict(tensors),
        storage_writer=HuggingFaceStorageWriter(path=str(partial), save_distributed=True),
        no_dist=world.size == 1,
    )
    own = f"shard-{world.rank + 1:05d}-"
    hashes = {path.name: _describe(path) for path in sorted(partial.glob(own + "*.safetensors"))}
    _write_json(partial / f"hashes-{world.rank:05d}.json", hashes)
    barrier(world)
    if world.is_first:
        files: dict[str, Any] = {}
        for part in sorted(partial.glob("hashes-*.json")):
            files |= json.loads(part.read_text())
            part.unlink()
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        manifest = {"format": FORMAT, "version": 1, "files": files, "shapes": shapes, "state": state}
        _write_json(partial / MANIFEST, manifest)
        if directory.exists():
            replaced = directory.with_name(directory.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            directory.rename(replaced)
            partial.rename(directory)
            shutil.rmtree(replaced)
        else:
            partial.rename(directory)
        _fsync(directory.parent)
    barrier(world)


def read_state(directory: Path) -> dict[str, Any]:
    """The JSON state of a committed directory; CheckpointError when it is damaged or from a later version."""
    state: dict[str, Any] = _read_manifest(directory)["state"]
    return state


def damage(directory: Path, world: World) -> str | None:
    """Why ``directory`` must not be loaded, or None; files are hashed, cut over the ranks.

    **Collectives**: one all-reduce, so that all ranks agree. Only the finding rank knows the words.
    """
    reason: str | None = None
    try:
        files = _read_manifest(directory)["files"]
        for number, (name, expected) in enumerate(sorted(files.items())):
            if number % world.size == world.rank:
                found = _describe(directory / name) if (directory / name).exists() else None
                if found != expected:
                    reason = f"{directory / name} is missing, truncated or changed (its hash differs from {MANIFEST})"
    except CheckpointError as error:
        reason = str(error)
    flag = all_reduce_max(torch.tensor([float(reason is not None)], device=world.device), world)
    return reason or (f"{directory} is damaged (found by another rank)" if flag.item() > 0 else None)


def load(directory: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill ``tensors`` in place from a committed directory, written by any number of ranks.

    Errors: CheckpointError when a name or a shape is not the stored one.
    """
    shapes = _read_manifest(directory)["shapes"]
    for name, tensor in tensors.items():
        if shapes.get(name) != list(tensor.shape):
            stored = "absent" if name not in shapes else f"stored with shape {shapes[name]}"
            raise CheckpointError(f"{directory}: {name} is {stored}; this run needs {list(tensor.shape)}")
    dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(path=str(directory)), no_dist=world.size == 1)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the directory was never finished") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != 1:
        raise CheckpointError(f"{path} is not version 1 of {FORMAT}; it was written by another program or release")
    return manifest


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
