"""Images as people have them, each with the key that its vector gets: a folder of identities, a flat one, a packed data set."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lce_dist.errors import DataError
from lce_dist.keys import hash_keys
from lce_dist.vector_files import lines_of
from pipelines.folders import open_tree
from pipelines.images import as_jpeg
from pipelines.manifest import MANIFEST_FILE, PackedDataset, View, fetch_description, is_url
from pipelines.pack import pack_folder, pack_images, source_fingerprint

Progress = Callable[[str, int, int], None]

_NOBODY = "images"  # the one identity that a flat folder is packed as
_BLOCK_NAMES = 1 << 16
_NO_KEY = re.compile(
    "[\0\n\ud800-\udfff]"
)  # what a key in a file of vectors cannot hold; bytes that are no UTF-8 among it


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images, with a key each and, where it is known, who is on them, in the order of the view."""

    view: View
    keys: list[str]
    identities: list[str] | None


def open_images(place: str, names: Path | None, work: Path, progress: Progress) -> ImageSet:
    """The images at ``place``; of a folder or .zip a packed copy is made in ``work``.

    A folder's images are called by their paths in it; those of a packed data set, which keeps no names, IDENTITY/NUMBER, or by
    ``names``, a file of the names that were packed, one a line.
    Errors: DataError for images that cannot be read, and names that do not fit. **Memory**: keys and identities.
    """
    packed = is_url(place) or (Path(place) / MANIFEST_FILE).is_file()
    if not packed:
        if names is not None:
            raise DataError(f"--names {names} is for a packed data set; {place} is a folder, whose files have names")
        return _of_folder(Path(place), work, progress)
    directory = fetch_description(place, work) if is_url(place) else Path(place)
    dataset = PackedDataset.open(directory, checked=work)
    view = _all(dataset)
    who = _identities(view)
    if names is None:
        return ImageSet(
            view, [f"{one}/{number:09d}" for one, number in zip(who, np.asarray(view.sample_ids), strict=True)], who
        )
    if not names.is_file():
        raise DataError(f"--names {names} is not a file; write the names of the packed images, one a line")
    return ImageSet(view, _names(view, lambda: lines_of(names), str(names)), who)


def _of_folder(source: Path, work: Path, progress: Progress) -> ImageSet:
    with open_tree(source) as tree:
        images = tree.images
    for name in images:
        if _NO_KEY.search(name):
            raise DataError(f"image {name!r} of {source} must have a name of UTF-8 text without line breaks; rename it")
    stamp = source_fingerprint(source)

    def packing(done: int, total: int) -> None:
        progress("reading images", done, total)

    if images and not any("/" in name for name in images):
        view = _all(_packed_flat(source, work / f"images-{stamp}", stamp, packing))
        return ImageSet(view, _names(view, lambda: iter(images), str(source)), None)
    view = _all(pack_folder(source, work / f"images-{stamp}", "images", progress=packing))
    return ImageSet(view, _names(view, lambda: iter(images), str(source)), _identities(view))


def _packed_flat(source: Path, out: Path, stamp: str, packing: Callable[[int, int], None]) -> PackedDataset:
    """Images without sub-folders, as ``lce evaluate unpack-bin`` leaves them: nobody is named."""
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(open_tree(source))

        def images() -> Iterator[tuple[str, str, bytes]]:
            for name in tree.images:
                yield _NOBODY, name, as_jpeg(tree.read(name), f"{source}/{name}")

        return pack_images(images(), [_NOBODY], len(tree.images), out, "images", stamp, progress=packing)


def _all(dataset: PackedDataset) -> View:
    return dataset.select_labels(np.arange(len(dataset.identities), dtype=np.int64))


def _identities(view: View) -> list[str]:
    name_C = list(view.identities)
    return [name_C[label] for label in np.asarray(view.labels).tolist()]


def _names(view: View, names: Callable[[], Iterator[str]], source: str) -> list[str]:
    """The name of each image, found by its hash. Errors: DataError where one has none."""
    hashes = view.dataset.name_hash_N2
    if hashes is None:
        raise DataError(
            f"{view.dataset.directory} was packed before images' names were kept; pack it again, or leave --names out"
        )
    place_of = {(one, two): place for place, (one, two) in enumerate(hashes[view.sample_ids].tolist())}
    found: list[str | None] = [None] * view.num_samples
    block: list[str] = []

    def look_up() -> None:
        for name, (one, two) in zip(block, hash_keys(block).tolist(), strict=True):
            place = place_of.get((one, two))
            if place is not None:
                found[place] = name
        block.clear()

    for name in names():
        block.append(name)
        if len(block) == _BLOCK_NAMES:
            look_up()
    look_up()
    known = [name for name in found if name is not None]
    if len(known) < len(found):
        raise DataError(
            f"{source} names {len(known)} of the {len(found)} images of {view.dataset.directory}; must name all, by their paths "
            "in the folder or archive that was packed"
        )
    return known
