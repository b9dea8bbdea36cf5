"""Folders, archives or generated images become a packed data set, checked image by image before anything is published.

The only module that imports webdataset. The same input gives the same bytes; a run that was killed leaves
only ``OUT.partial``, which the next run removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset

from lce_dist.errors import DataError, SetupError
from lce_dist.keys import hash_keys
from pipelines.folders import images_by_identity, open_tree
from pipelines.images import as_jpeg
from pipelines.importable import already_packed, check_identities
from pipelines.manifest import (
    INDEX_DTYPE,
    PackedDataset,
    ShardRecord,
    file_sha256,
    write_description,
)
from pipelines.order import derive_key, permute

SHARD_SIZE_BYTES = 256 * 2**20
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"

_TAR_BLOCK_BYTES = 512
_PACKING_RULES = 2  # raised when the same source would give other bytes

Progress = Callable[[int, int], None]
NamedImage = tuple[str, str, bytes]


def pack_folder(
    source: Path,
    out: Path,
    name: str,
    shard_size_bytes: int = SHARD_SIZE_BYTES,
    progress: Progress | None = None,
    seed: int = 0,
) -> PackedDataset:
    """Pack a folder, or a .zip of one, in which every folder that holds images is one identity.

    The identity key is the folder's relative path. The samples are shuffled with ``seed``. A data set already
    packed from the same source with the same arguments is opened and returned; ``progress`` gets (done, total).
    Errors: DataError naming the file, the rule and the fix; nothing is published then.
    """
    with open_tree(source) as tree:
        images = images_by_identity(source, tree)
        fingerprint = _digest(["folder", name, shard_size_bytes, seed, tree.stamps])
        order = permute(np.arange(len(images), dtype=np.int64), len(images), derive_key(seed, len(images)))

        def read_shuffled() -> Iterator[NamedImage]:
            for position in order.tolist():
                key, path = images[position]
                payload = tree.read(path)
                yield key, path, as_jpeg(payload, f"{source}/{path}")

        identities = sorted({key for key, _ in images})
        return pack_images(
            read_shuffled(), identities, len(images), out, name, fingerprint, shard_size_bytes, progress, shuffled=True
        )


def source_fingerprint(source: Path) -> str:
    """16 hex digits over names, sizes and times of a source's images; changes when one is added or touched."""
    with open_tree(source) as tree:
        return _digest([tree.stamps])[:16]


def pack_images(
    images: Iterable[NamedImage],
    identities: Sequence[str],
    num_images: int,
    out: Path,
    name: str,
    source: str,
    shard_size_bytes: int = SHARD_SIZE_BYTES,
    progress: Progress | None = None,
    shuffled: bool | None = None,
) -> PackedDataset:
    """Pack (identity key, image name, JPEG bytes) in the order given; labels are places in ``identities``.

    shuffled: what is known of that order, for the manifest. Of names hashes are kept, by which stored vectors find their image.
    ``source`` says what is packed (a hash of its parameters): if ``out`` already holds it, ``images`` is not touched.
    Errors: DataError for a key that is unknown, repeated or without images, a wrong count, a foreign ``out``.
    **Memory**: 40 bytes an image and one image.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise DataError(f"data set name {name!r} must match {NAME_PATTERN}; its shards are called after it")
    packed = already_packed(out, source)
    if packed is not None:
        return packed
    check_identities(identities)
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # left by a killed run
        partial.mkdir(parents=True)
        shards, index, names_N2 = _write_shards(
            images, identities, num_images, partial, name, shard_size_bytes, progress
        )
        write_description(partial, name, shards, index, identities, source, names_N2, shuffled=shuffled)
        partial.replace(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise SetupError(f"packing into {out} failed ({error}); mend that and run again") from error
        raise
    return PackedDataset.open(out)


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([_PACKING_RULES, *parts]).encode()).hexdigest()


@dataclass
class _OpenShard:
    """The shard that is being written: webdataset's writer, its file, and the index rows so far."""

    path: Path
    file: io.BufferedWriter
    writer: webdataset.TarWriter
    num_samples: int = 0


def _write_shards(
    images: Iterable[NamedImage],
    identities: Sequence[str],
    num_images: int,
    directory: Path,
    name: str,
    shard_size_bytes: int,
    progress: Progress | None,
) -> tuple[list[ShardRecord], np.ndarray, np.ndarray]:
    label_of = {key: label for label, key in enumerate(identities)}
    images_per_label = np.zeros(len(identities), dtype=np.int64)
    index = np.zeros(num_images, dtype=INDEX_DTYPE)
    name_hash_N2 = np.zeros((num_images, 2), dtype=np.uint64)
    shards: list[ShardRecord] = []
    shard: _OpenShard | None = None
    sample_id = 0
    try:
        for key, image_name, jpeg in images:
            if key not in label_of:
                raise DataError(
                    f"image {image_name} belongs to identity {key!r}, which is not in the list of identities"
                )
            if sample_id == num_images:
                raise DataError(f"image {image_name} is one more than the {num_images} announced")
            if shard is None:
                shard = _open_shard(directory / f"{name}-{len(shards):06d}.tar")
            members = {
                "__key__": f"{sample_id:09d}",
                "cls": str(label_of[key]).encode(),
                "id": key.encode(),
                "jpg": jpeg,
            }
            shard.writer.write(members)  # in the order of the extensions, so the .jpg comes last
            shard.num_samples += 1
            end = shard.writer.tarstream.offset
            padded_bytes = -(-len(jpeg) // _TAR_BLOCK_BYTES) * _TAR_BLOCK_BYTES
            index[sample_id] = (len(shards), end - padded_bytes, len(jpeg), label_of[key])
            name_hash_N2[sample_id] = hash_keys([image_name])[0]
            images_per_label[label_of[key]] += 1
            sample_id += 1
            if end >= shard_size_bytes:
                shards.append(_close_shard(shard))
                shard = None
            if progress is not None:
                progress(sample_id, num_images)
        if shard is not None:
            shards.append(_close_shard(shard))
            shard = None
    finally:
        if shard is not None:
            with contextlib.suppress(OSError):  # a full disk is already being reported
                shard.writer.close()
                shard.file.close()
    if sample_id != num_images:
        raise DataError(f"data set {name!r} got {sample_id} images of the {num_images} announced")
    empty = np.flatnonzero(images_per_label == 0)
    if empty.size:
        raise DataError(f"identity {identities[int(empty[0])]!r} has no images (an empty class); leave it out")
    return shards, index, name_hash_N2


def _open_shard(path: Path) -> _OpenShard:
    file = open(path, "wb")  # noqa: SIM115 (closed by _close_shard)
    # A fixed time and owner: the same images must give the same bytes.
    writer = webdataset.TarWriter(file, user="", group="", mode=0o444, mtime=0.0, encoder=False)
    return _OpenShard(path, file, writer)


def _close_shard(shard: _OpenShard) -> ShardRecord:
    shard.writer.close()
    shard.file.flush()
    os.fsync(shard.file.fileno())
    shard.file.close()
    return ShardRecord(
        file=shard.path.name,
        size_bytes=shard.path.stat().st_size,
        num_samples=shard.num_samples,
        sha256=file_sha256(shard.path),
    )
