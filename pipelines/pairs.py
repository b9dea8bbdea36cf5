"""Pair files of the arcface_torch world (lfw.bin, cfp_fp.bin, agedb_30.bin), and the folder of images that one becomes.

Such a file is a pickle of (2P encoded images, P bools); pair p is of the images 2p and 2p + 1. Nothing in it is executed.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError, RunError
from pipelines.pickled import PickledArray, kind_of, read_pickled_data

PAIRS_FILE = "pairs.csv"
_NEEDS = "must be a pickle of (list of 2P encoded images, list of P bools)"
_STARTS = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG\r\n\x1a\n", ".png"), (b"BM", ".bmp"), (b"GIF8", ".gif"))


@dataclass(frozen=True, eq=False)
class PairBin:
    """2P encoded images, pair after pair, and whether each pair is of one person (P,) bool."""

    images: list[bytes]
    is_genuine: npt.NDArray[np.bool_]


def read_pair_bin(path: Path) -> PairBin:
    """Read a pair file. Nothing in it is executed.

    Errors: DataError, with the place in bytes, for any instruction that data do not need, what is cut off or goes on after
    its end, and anything but images and bools in the right numbers. **Memory**: the images, and a little.
    """
    made = read_pickled_data(path)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise DataError(f"pair file {path} holds {kind_of(made)}; {_NEEDS}")
    images = [_image(path, number, image) for number, image in enumerate(_sequence(path, "images", made[0]))]
    answers = _answers(path, made[1])
    if not answers or len(images) != 2 * len(answers):
        raise DataError(
            f"pair file {path} holds {len(images)} images for {len(answers)} pairs; must be two a pair, and a pair"
        )
    return PairBin(images, np.array(answers, dtype=np.bool_))


def unpack_pair_bin(path: Path, out: Path) -> tuple[int, int]:
    """Write the images as files 000000.jpg ... (the ending says what they are) and ``pairs.csv`` into a new folder ``out``.

    Returns how many images and pairs there are. ``out`` appears whole or not at all.
    Errors: DataError of :func:`read_pair_bin`, and for an image of an unknown format, and where ``out`` exists; RunError where the
    file system refuses.
    """
    if out.exists():
        raise DataError(f"{out} exists; it is not written over. Choose another place, or remove it")
    pairs = read_pair_bin(path)
    names = [f"{number:06}{_suffix(path, number, image)}" for number, image in enumerate(pairs.images)]
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for name, image in zip(names, pairs.images, strict=True):
            (partial / name).write_bytes(image)
        rows = (f"{names[2 * p]},{names[2 * p + 1]},{int(same)}\n" for p, same in enumerate(pairs.is_genuine))
        (partial / PAIRS_FILE).write_text("first,second,genuine\n" + "".join(rows), encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error}. Free space or choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return len(names), len(pairs.is_genuine)


def _suffix(path: Path, number: int, image: bytes) -> str:
    for start, suffix in _STARTS:
        if image.startswith(start):
            return suffix
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return ".webp"
    raise DataError(
        f"pair file {path}: image {number + 1} begins with {image[:8].hex()}; must be a JPEG, PNG, BMP, GIF or WebP file"
    )


def _sequence(path: Path, what: str, made: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(made, (list, tuple)):
        raise DataError(f"pair file {path}: its {what} are {kind_of(made)}; {_NEEDS}")
    return made


def _image(path: Path, number: int, made: Any) -> bytes:
    if isinstance(made, PickledArray) and made.dtype == "u1" and len(made.shape) - made.shape.count(1) <= 1:
        made = made.raw
    if not isinstance(made, bytes) or not made:
        found = "empty" if isinstance(made, bytes) else kind_of(made)
        raise DataError(f"pair file {path}: image {number + 1} is {found}; must be the bytes of an image file")
    return made


def _answers(path: Path, made: Any) -> list[bool]:
    if isinstance(made, PickledArray) and made.dtype == "b1" and len(made.shape) == 1:
        return [value != 0 for value in made.raw]
    answers = list(_sequence(path, "answers", made))
    for number, answer in enumerate(answers):
        if not isinstance(answer, bool):
            raise DataError(f"pair file {path}: answer {number + 1} is {kind_of(answer)}; must be True or False")
    return answers
