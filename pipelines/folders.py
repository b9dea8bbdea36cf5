"""Folders and .zip archives of images, a sub-folder an identity, as sources to import."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from pipelines.images import FOREIGN_SUFFIXES, IMAGE_SUFFIXES
from pipelines.importable import OpenFiles, Texts, TextsInProgress, check_identities, digest, file_stamp, label_texts
from pipelines.jpeg import MAX_IMAGE_BYTES
from pipelines.order import Int64Array

_SUFFIXES = (*IMAGE_SUFFIXES, *FOREIGN_SUFFIXES)

_LOCAL_HEADER_BYTES, _LOCAL_HEADER_MAGIC = 30, b"PK\x03\x04"
_ENCRYPTED = 1


@dataclass(frozen=True)
class Tree:
    """A folder or an archive, seen as relative posix paths of images and of folders."""

    images: tuple[str, ...]
    folders: tuple[str, ...]
    stamps: tuple[tuple[str, int, int], ...]
    read: Callable[[str], bytes]
    members: dict[str, zipfile.ZipInfo] | None = None


@contextlib.contextmanager
def open_tree(source: Path) -> Iterator[Tree]:
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


@dataclass(frozen=True)
class _Folder:
    """One folder below a source: its relative path, its images (name, size, time) in order, and its other files' names."""

    path: str
    images: list[tuple[str, int, int]]
    others: list[str]


def refuse_folder(error: OSError) -> None:
    """For ``os.walk``, which passes over what it cannot list. Errors: DataError."""
    raise DataError(f"folder {error.filename} cannot be listed ({error.strerror}); make it readable, or remove it")


def _walk(source: Path, skip_bad: bool = False) -> Iterator[_Folder]:
    """Errors: DataError for a file that cannot be looked at, such as a link to nothing; with ``skip_bad`` reading it is the error."""
    seen = set()
    for directory, subdirectories, files in os.walk(source, onerror=refuse_folder, followlinks=True):
        place = Path(directory).resolve()
        if place in seen:
            raise DataError(f"folder {directory} is a link back to a folder already read; remove it")
        seen.add(place)
        subdirectories[:] = sorted(entry for entry in subdirectories if not _is_hidden(entry))
        images, others = [], []
        for file in sorted(files):
            if _is_image(file):
                try:
                    status = (Path(directory) / file).stat()
                    if not stat.S_ISREG(status.st_mode):
                        others.append(file)  # a pipe, which would be waited for without end
                        continue
                    images.append((file, status.st_size, status.st_mtime_ns))
                except OSError as error:
                    if not skip_bad:
                        raise DataError(
                            f"image {directory}/{file} cannot be read ({error.strerror}); remove it"
                        ) from None
                    images.append((file, 0, 0))
            elif not _is_hidden(file):
                others.append(file)
        yield _Folder(Path(directory).relative_to(source).as_posix(), images, others)


def _folder_tree(source: Path) -> Tree:
    stamps: list[tuple[str, int, int]] = []
    folders: list[str] = []
    for folder in _walk(source):
        folders.append(folder.path)
        prefix = "" if folder.path == "." else f"{folder.path}/"
        stamps += [(prefix + file, size, time_ns) for file, size, time_ns in folder.images]

    def read(path: str) -> bytes:
        with open(source / path, "rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    return Tree(tuple(path for path, _, _ in stamps), tuple(folders), tuple(stamps), read)


def _zip_tree(source: Path, archive: zipfile.ZipFile) -> Tree:
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

    return Tree(tuple(members), tuple(sorted(folders)), tuple(sorted(stamps)), read, members)


def images_by_identity(source: Path, tree: Tree) -> list[tuple[str, str]]:
    """(identity key, path) of every image, sorted; a folder without images, below it or in it, is an error."""
    _check_folders(source, tree.images, tree.folders, False)
    return _by_identity(tree)


def _by_identity(tree: Tree) -> list[tuple[str, str]]:
    return sorted((PurePosixPath(path).parent.as_posix(), path) for path in tree.images)


def _check_folders(source: Path, images: Sequence[str], folders: Sequence[str], skip_bad: bool) -> tuple[str, ...]:
    """The folders without images, below them or in them, which are an error unless ``skip_bad``.

    images: of each folder that has any one is enough. Errors: DataError, also for images in no folder.
    """
    filled = {"."}
    for path in images:
        folder = PurePosixPath(path).parent
        filled.update(part.as_posix() for part in (folder, *folder.parents))
    if not images:
        raise DataError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)}); put each identity's in a sub-folder")
    for path in images:
        if "/" not in path:
            raise DataError(f"image {source}/{path} lies in no sub-folder; its folder names the identity. Move it")
    empty = tuple(folder for folder in folders if folder not in filled)
    if empty and not skip_bad:
        raise DataError(
            f"folder {source}/{empty[0]} holds no images (an empty class); fill or remove it. Importing passes it over with --bad skip"
        )
    return empty


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """What file managers leave behind: .DS_Store, ._photo.jpg, __MACOSX, .git."""
    return name.startswith(".") or name == "__MACOSX"


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files below a folder: paths (N,) relative to ``root``, which are their names."""

    kind: str
    stamp: str
    identities: Texts
    label_N: Int64Array
    bytes_N: Int64Array
    root: str
    paths: Texts
    group_N: None = None
    in_order: bool = False
    others: Mapping[str, int] = field(default_factory=dict)  # files that were passed over, by ending
    empty: tuple[str, ...] = ()  # folders without images, likewise

    def expect(self, numbers: Int64Array) -> None:
        pass

    def read(self, number: int) -> bytes:
        path = self.paths[number]
        try:
            with open(f"{self.root}/{path}", "rb", buffering=0) as file:
                payload = file.read(int(self.bytes_N[number]) + 1)
                # a raw file may give less than it has; what grew since it was listed is still read whole
                while len(payload) < MAX_IMAGE_BYTES and (more := file.read(1 << 20)):
                    payload += more
                return payload
        except OSError as error:
            raise DataError(f"image {self.root}/{path} cannot be read ({error.strerror}); remove it") from None

    def name(self, number: int) -> str:
        return self.paths[number]

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True, eq=False)
class ZipSource:
    """Members of a .zip archive, read by their place in it: header_N (offsets), stored_N (bytes there), crc_N, is_packed_N."""

    stamp: str
    identities: Texts
    label_N: Int64Array
    bytes_N: Int64Array
    archive: str
    paths: Texts
    header_N: Int64Array
    stored_N: Int64Array
    crc_N: npt.NDArray[np.uint32]
    is_packed_N: npt.NDArray[np.bool_]
    kind: str = "zip"
    group_N: None = None
    in_order: bool = False
    files: OpenFiles = field(default_factory=OpenFiles)
    others: Mapping[str, int] = field(default_factory=dict)
    empty: tuple[str, ...] = ()

    def expect(self, numbers: Int64Array) -> None:
        pass

    def read(self, number: int) -> bytes:
        offset, stored = int(self.header_N[number]), int(self.stored_N[number])
        header = self.files.read(self.archive, _LOCAL_HEADER_BYTES, offset)
        if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(_LOCAL_HEADER_MAGIC):
            raise self._damaged(number, "no member begins where its list says")
        name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
        payload = self.files.read(self.archive, stored, offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes)
        if len(payload) != stored:
            raise self._damaged(number, "it ends too early")
        if self.is_packed_N[number]:
            try:
                payload = zlib.decompressobj(-15).decompress(payload, MAX_IMAGE_BYTES + 1)
            except zlib.error as error:
                raise self._damaged(number, str(error)) from None
        if len(payload) != self.bytes_N[number] or zlib.crc32(payload) != self.crc_N[number]:
            raise self._damaged(number, "its checksum differs")
        return payload

    def name(self, number: int) -> str:
        return self.paths[number]

    def companions(self, order_M: Int64Array) -> Mapping[str, str]:
        return {}

    def _damaged(self, number: int, why: str) -> DataError:
        return DataError(f"archive {self.archive} cannot give {self.paths[number]} ({why}); make it anew")


def open_folder(source: Path, skip_bad: bool = False) -> FileSource | ZipSource:
    """A folder, or a .zip of one, in which every folder that holds images is an identity; its relative path is the key.

    With ``skip_bad`` folders without images are passed over, and files that are gone are left to who reads them.
    Errors: DataError naming the file, the rule and the fix. **Memory**: three times what the paths take and 32 bytes an image;
    of an archive 900 bytes an image, most of them its own list.
    """
    if source.is_dir():
        return _open_files(source, skip_bad)
    with open_tree(source) as tree:
        assert tree.members is not None, "a folder is no archive"
        empty = _check_folders(source, tree.images, tree.folders, skip_bad)
        listed = _by_identity(tree)
        members = [tree.members[path] for _, path in listed]
        for member in members:
            if member.flag_bits & _ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"archive {source}: {member.filename} is encrypted or packed by method {member.compress_type}; must be "
                    "stored or deflated. Make it anew"
                )
        paths = Texts.of(path for _, path in listed)
        identities, label_N = label_texts([key for key, _ in listed])
        size_N = np.array([member.file_size for member in members], dtype=np.int64)
        crc_N = np.array([member.CRC for member in members], dtype=np.int64)
        return ZipSource(
            digest("zip", paths.blob_B, paths.end_N, size_N, crc_N, file_stamp(source)),
            identities,
            label_N,
            size_N,
            str(source),
            paths,
            np.array([member.header_offset for member in members], dtype=np.int64),
            np.array([member.compress_size for member in members], dtype=np.int64),
            crc_N.astype(np.uint32),
            np.array([member.compress_type == zipfile.ZIP_DEFLATED for member in members]),
            others=count_endings(_others_in(source)),
            empty=empty,
        )


def _open_files(source: Path, skip_bad: bool) -> FileSource:
    """Folder by folder, in the order of the folders' paths: nothing of an image is a Python object for long."""
    paths, sizes, times = TextsInProgress(), array("q"), array("q")
    keys: list[str] = []
    first: list[int] = []
    folders: list[str] = []
    some_image: list[str] = []
    others: Counter[str] = Counter()
    for folder in _walk(source, skip_bad):
        folders.append(folder.path)
        others += Counter(count_endings(folder.others))
        if folder.images:
            first.append(len(sizes))
            keys.append(folder.path)
            prefix = "" if folder.path == "." else f"{folder.path}/"
            some_image.append(prefix + folder.images[0][0])
            for name, size, time_ns in folder.images:
                paths.add(prefix + name)
                sizes.append(size)
                times.append(time_ns)
    empty = _check_folders(source, some_image, folders, skip_bad)
    order = sorted(range(len(keys)), key=keys.__getitem__)  # by whole paths: "a b" before "a/b"
    identities = [keys[place] for place in order]
    check_identities(identities)
    edges = np.array([*first, len(sizes)], dtype=np.int64)
    count_C = np.diff(edges)[order]
    size_N, time_N = (np.frombuffer(one, dtype=np.int64) for one in (sizes, times))
    if order == list(range(len(order))):  # as nearly always
        texts = paths.texts()
    else:
        number_N = np.repeat(edges[:-1][order] - np.cumsum(count_C) + count_C, count_C) + np.arange(len(sizes))
        texts = paths.texts(number_N)
        size_N, time_N = size_N[number_N], time_N[number_N]
    return FileSource(
        "folder",
        digest("folder", texts.blob_B, texts.end_N, size_N, time_N),
        Texts.of(identities),
        np.repeat(np.arange(len(identities), dtype=np.int64), count_C),
        size_N,
        str(source),
        texts,
        others=dict(others),
        empty=empty,
    )


def _others_in(archive: Path) -> Iterator[str]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            parts = PurePosixPath(member.filename).parts
            if parts and not member.is_dir() and not any(map(_is_hidden, parts)) and not _is_image(parts[-1]):
                yield parts[-1]


def count_endings(names: Iterable[str]) -> dict[str, int]:
    """How many files have each ending, in small letters."""
    return Counter(PurePosixPath(name).suffix.lower() or "no ending" for name in names)
