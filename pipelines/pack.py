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
import stat
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import webdataset
from PIL import Image, ImageOps

from lce_dist.errors import DataError, SetupError
from lce_dist.keys import hash_keys
from pipelines.manifest import (
    INDEX_DTYPE,
    MANIFEST_FILE,
    PackedDataset,
    ShardRecord,
    file_sha256,
    write_description,
)
from pipelines.order import derive_key, permute

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 64 * 2**20
SHARD_SIZE_BYTES = 256 * 2**20
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
JPEG_QUALITY = 95  # of images that arrive in another format

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
    with _open_tree(source) as tree:
        images = _images_by_identity(source, tree)
        fingerprint = _digest(["folder", name, shard_size_bytes, seed, tree.stamps])
        order = permute(np.arange(len(images), dtype=np.int64), len(images), derive_key(seed, len(images)))

        def read_shuffled() -> Iterator[NamedImage]:
            for position in order.tolist():
                key, path = images[position]
                payload = tree.read(path)
                yield key, path, as_jpeg(payload, f"{source}/{path}")

        identities = sorted({key for key, _ in images})
        return pack_images(read_shuffled(), identities, len(images), out, name, fingerprint, shard_size_bytes, progress)


def source_fingerprint(source: Path) -> str:
    """16 hex digits over names, sizes and times of a source's images; changes when one is added or touched."""
    with _open_tree(source) as tree:
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
) -> PackedDataset:
    """Pack (identity key, image name, JPEG bytes) in the order given; labels are places in ``identities``.

    Of names hashes are kept, by which stored vectors find their image.
    ``source`` says what is packed (a hash of its parameters): if ``out`` already holds it, ``images`` is not touched.
    Errors: DataError for a key that is unknown, repeated or without images, a wrong count, a foreign ``out``.
    **Memory**: 40 bytes an image and one image.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise DataError(f"data set name {name!r} must match {NAME_PATTERN}; its shards are called after it")
    packed = _already_packed(out, source)
    if packed is not None:
        return packed
    _check_identities(identities)
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)  # left by a killed run
        partial.mkdir(parents=True)
        shards, index, names_N2 = _write_shards(
            images, identities, num_images, partial, name, shard_size_bytes, progress
        )
        write_description(partial, name, shards, index, identities, source, names_N2)
        partial.replace(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise SetupError(f"packing into {out} failed ({error}); mend that and run again") from error
        raise
    return PackedDataset.open(out)


def as_jpeg(payload: bytes, origin: str) -> bytes:
    """Decode an image fully; return its bytes if it is a grey or RGB JPEG, else an RGB JPEG of its first frame.

    Transparent parts become white; 16-bit greys keep their upper 8 bits.
    Errors: DataError naming ``origin`` when the image cannot be decoded or is too large.
    """
    if len(payload) > MAX_IMAGE_BYTES:
        raise DataError(
            f"image {origin} is {len(payload)} bytes; must be at most {MAX_IMAGE_BYTES}. Scale it down or remove it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(io.BytesIO(payload)) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise DataError(
                        f"image {origin} is {image.width} x {image.height} pixels; must be at most "
                        f"{MAX_IMAGE_PIXELS} in all. Scale it down or remove it"
                    )
                image.load()
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    return payload
                encoded = io.BytesIO()
                _to_rgb(image).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
                return encoded.getvalue()
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 (Pillow raises whatever its decoders meet first)
        reason = str(error).split("\n", 1)[0].split(" <_io", 1)[0] or type(error).__name__
        raise DataError(f"image {origin} cannot be decoded ({reason}); replace or remove it") from None


@dataclass(frozen=True)
class _Tree:
    """A folder or an archive, seen as relative posix paths of images and of folders."""

    images: tuple[str, ...]
    folders: tuple[str, ...]
    stamps: tuple[tuple[str, int, int], ...]
    read: Callable[[str], bytes]


@contextlib.contextmanager
def _open_tree(source: Path) -> Iterator[_Tree]:
    if source.is_dir():
        yield _folder_tree(source)
    elif not source.exists():
        raise DataError(f"image source {source} does not exist; name a folder or a .zip with a sub-folder per identity")
    else:
        try:
            archive = zipfile.ZipFile(source)
        except zipfile.BadZipFile as error:
            raise DataError(f"image source {source} is no folder and no .zip archive ({error})") from None
        with archive:
            yield _zip_tree(source, archive)


def _folder_tree(source: Path) -> _Tree:
    stamps: list[tuple[str, int, int]] = []
    folders: list[str] = []
    seen = set()
    for directory, subdirectories, files in os.walk(source, followlinks=True):
        place = Path(directory).resolve()
        if place in seen:
            raise DataError(f"folder {directory} is a link back to a folder already read; remove it")
        seen.add(place)
        subdirectories[:] = sorted(entry for entry in subdirectories if not _is_hidden(entry))
        folder = Path(directory).relative_to(source).as_posix()
        folders.append(folder)
        for file in sorted(files):
            if _is_image(file):
                try:
                    status = (Path(directory) / file).stat()
                except OSError as error:
                    raise DataError(f"image {directory}/{file} cannot be read ({error.strerror}); remove it") from None
                path = file if folder == "." else f"{folder}/{file}"
                stamps.append((path, status.st_size, status.st_mtime_ns))

    def read(path: str) -> bytes:
        with open(source / path, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    return _Tree(tuple(path for path, _, _ in stamps), tuple(folders), tuple(stamps), read)


def _zip_tree(source: Path, archive: zipfile.ZipFile) -> _Tree:
    stamps: list[tuple[str, int, int]] = []
    folders = {"."}
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        place = PurePosixPath(member.filename)
        if place.is_absolute() or ".." in place.parts or "\\" in member.filename:
            raise DataError(f"archive {source} has a member {member.filename!r} that leaves its folder; do not use it")
        if any(_is_hidden(part) for part in place.parts):
            continue
        folder = place if member.is_dir() else place.parent
        folders.update(part.as_posix() for part in (folder, *folder.parents))
        if member.is_dir() or not _is_image(place.name) or stat.S_ISLNK(member.external_attr >> 16):
            continue
        if place.as_posix() in members:
            raise DataError(f"archive {source} holds {member.filename!r} twice; make it anew")
        if member.file_size > MAX_IMAGE_BYTES:
            raise DataError(
                f"image {source}/{place} is {member.file_size} bytes; must be at most {MAX_IMAGE_BYTES}. Remove it"
            )
        members[place.as_posix()] = member
        stamps.append((place.as_posix(), member.file_size, member.CRC))

    def read(path: str) -> bytes:
        try:
            with archive.open(members[path]) as file:
                return file.read(MAX_IMAGE_BYTES + 1)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
            raise DataError(f"archive {source} cannot give {path} ({error}); make it anew") from None

    return _Tree(tuple(members), tuple(sorted(folders)), tuple(sorted(stamps)), read)


def _images_by_identity(source: Path, tree: _Tree) -> list[tuple[str, str]]:
    """(identity key, path) of every image, sorted; a folder without images, below it or in it, is an error."""
    filled = {"."}
    for path in tree.images:
        folder = PurePosixPath(path).parent
        filled.update(part.as_posix() for part in (folder, *folder.parents))
    if not tree.images:
        raise DataError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)}); put each identity's in a sub-folder")
    for path in tree.images:
        if "/" not in path:
            raise DataError(f"image {source}/{path} lies in no sub-folder; its folder names the identity. Move it")
    for empty in tree.folders:
        if empty not in filled:
            raise DataError(f"folder {source}/{empty} holds no images (an empty class); fill or remove it")
    return sorted((PurePosixPath(path).parent.as_posix(), path) for path in tree.images)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """What file managers leave behind: .DS_Store, ._photo.jpg, __MACOSX, .git."""
    return name.startswith(".") or name == "__MACOSX"


def _to_rgb(image: Image.Image) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255
        upper_bits = np.asarray(upright).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper_bits.astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return upright.convert("RGB")


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([_PACKING_RULES, *parts]).encode()).hexdigest()


def _already_packed(out: Path, source: str) -> PackedDataset | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(f"output {out} exists and is no packed data set; name another or remove it")
    dataset = PackedDataset.open(out)
    if dataset.manifest.source != source:
        raise DataError(
            f"output {out} already holds a data set {dataset.manifest.name!r} from another source or other arguments "
            f"({dataset.num_samples} images of {len(dataset.identities)} identities); name another or remove it"
        )
    return dataset


def _check_identities(identities: Sequence[str]) -> None:
    if not identities:
        raise DataError("there is no identity to pack; at least 1 is needed")
    if list(identities) != sorted(set(identities)):
        raise DataError(f"the {len(identities)} identity keys must be sorted and unique; sort them")
    for key in identities:
        if not key or any(unicodedata.category(character) in ("Cc", "Cs") for character in key):
            raise DataError(f"identity key {key!r} must be UTF-8 text without control characters; rename its folder")


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
