"""Stored vectors of one set of images by several models, brought into one order and held against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from launch.loaded_vectors import LoadedVectors, check_identities
from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet


@dataclass(frozen=True, eq=False)
class SameImages:
    """Of each model the vectors of the same N images in the same order, by its name.

    left_out: how many keys of each model's file are not compared. num_single: identities with one image, which have no
    genuine pair.
    """

    sets: dict[str, EmbeddingSet]
    keys: list[str]
    identities: list[str]
    left_out: dict[str, int]
    num_identities: int
    num_single: int


def same_images(files: Mapping[str, LoadedVectors], common: bool) -> SameImages:
    """The images whose keys all files have, in the order of the first one. common: keys that some files lack are left out.

    Errors: DataError, naming file and row, for a key that not all have (unless ``common``), identities that disagree or are
    not named, fewer than two of them, or none with two images. **Memory**: another copy of files in another order.
    """
    first = next(iter(files.values()))
    keys = [key for key in first.row_of if all(key in one.row_of for one in files.values())]
    left_out = {name: len(one.row_of) - len(keys) for name, one in files.items()}
    if not common or not keys:
        _refuse_missing(files, left_out, len(keys))
    identities = _identities(files, keys)
    _, label_N, count_I = np.unique(np.asarray(identities, dtype=str), return_inverse=True, return_counts=True)
    if len(count_I) < 2 or count_I.max() < 2:
        raise DataError(
            f"vectors {first.path} have {len(keys)} images of {len(count_I)} identities in common with the other model's, "
            f"and at most {count_I.max()} of one identity; must be two identities, and two images of one. Is the column "
            "identity right?"
        )
    sets = {}
    for name, one in files.items():
        row_N = np.fromiter((one.row_of[key] for key in keys), dtype=np.int64, count=len(keys))
        in_order = len(row_N) == len(one.rows_ND) and bool((row_N == np.arange(len(row_N))).all())
        rows_ND = one.rows_ND if in_order else one.rows_ND[row_N]
        sets[name] = EmbeddingSet(name, rows_ND, label_N.astype(np.int64), np.arange(len(keys), dtype=np.int64))
    return SameImages(sets, keys, identities, left_out, len(count_I), int(np.count_nonzero(count_I == 1)))


def _refuse_missing(files: Mapping[str, LoadedVectors], left_out: Mapping[str, int], num_common: int) -> None:
    for name, one in files.items():
        if left_out[name]:
            other, row = next(
                (other, row) for key, row in one.row_of.items() for other in files.values() if key not in other.row_of
            )
            told = ", ".join(f"{left_out[each]} of {len(two.row_of)} keys of {two.path}" for each, two in files.items())
            fix = f"add --common to compare the {num_common} images that all have" if num_common else "look at the keys"
            raise DataError(
                f"vectors {one.path}: the key of row {row + 1} is not in {other.path}; must be in each file, of the same "
                f"image ({told} are not). Embed the same images with each model, or {fix}"
            )


def _identities(files: Mapping[str, LoadedVectors], keys: list[str]) -> list[str]:
    for one, other in combinations(files.values(), 2):
        check_identities(one, other)
    for one in files.values():
        if one.identities is not None:
            return [one.identities[one.row_of[key]] for key in keys]
    named = ", ".join(str(one.path) for one in files.values())
    raise DataError(
        f"none of {named} says who is on an image; add a column identity (npz: identities, npy: NAME.identities.txt)"
    )
