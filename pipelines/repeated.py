"""A data set of any size out of a small one: an index of as many people and samples as asked, whose bytes are used over and over.

For measuring: memory and start-up at a hundred million samples, training at ten million identities. Its shards are those of the
small set, so ``.cls`` members say other labels than the index, and ``lce data verify`` finds them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lce_dist.errors import DataError, SetupError
from pipelines.importable import already_packed, digest
from pipelines.manifest import IDENTITIES_FILE, INDEX_DTYPE, INDEX_FILE, PackedDataset, write_manifest
from pipelines.order import derive_key, permute

_PIECE_ROWS = 1 << 20
MOST_SAMPLES = 2**40
MOST_IDENTITIES = 2**31


def repeat_dataset(
    dataset: PackedDataset,
    out: Path,
    identities: int,
    images_per_identity: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PackedDataset:
    """An index of ``identities`` people, ``images_per_identity`` samples each, in a seeded order, over the shards of ``dataset``.

    One that is there already is opened. ``progress`` gets (samples done, samples).
    Errors: DataError for sizes out of range or a foreign ``out``, SetupError where the disk refuses. **Memory**: 100 MB.
    """
    num_samples = identities * images_per_identity
    if not 2 <= identities <= MOST_IDENTITIES or not images_per_identity >= 1 or num_samples > MOST_SAMPLES:
        raise DataError(
            f"{identities} identities of {images_per_identity} images; must be 2 to {MOST_IDENTITIES} identities, and "
            f"1 to {MOST_SAMPLES} samples in all"
        )
    facts = f"repeated {dataset.fingerprint} {identities} {images_per_identity} {seed}"
    source = digest(facts)
    packed = already_packed(out, source)
    if packed is not None:
        return packed
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_index(dataset, partial / INDEX_FILE, identities, images_per_identity, seed, progress)
        width = len(str(identities - 1))
        with open(partial / IDENTITIES_FILE, "w", encoding="utf-8", newline="") as file:
            file.writelines(f"id{number:0{width}d}\n" for number in range(identities))
        root = dataset.manifest.root if dataset.is_remote else _place_of_shards(dataset, out)
        write_manifest(partial, "repeated", dataset.manifest.shards, num_samples, identities, source, root, True)
        partial.replace(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SetupError(f"writing {out} failed ({error}); mend that and run again") from error
    return PackedDataset.open(out)


def _place_of_shards(dataset: PackedDataset, out: Path) -> str:
    """Relative where both lie near each other, so that they can move together."""
    place = (dataset.directory / (dataset.manifest.root or "")).absolute()
    if place.is_relative_to(out.absolute().parent):
        return Path(os.path.relpath(place, out.absolute())).as_posix()
    return str(place)


def _write_index(
    dataset: PackedDataset,
    path: Path,
    identities: int,
    images_per_identity: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    num_samples, key = identities * images_per_identity, derive_key(seed, identities, images_per_identity)
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (num_samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, num_samples, _PIECE_ROWS):
            numbers = np.arange(first, min(first + _PIECE_ROWS, num_samples), dtype=np.int64)
            rows = dataset.index[numbers % dataset.num_samples]
            rows["label"] = permute(numbers, num_samples, key) // images_per_identity
            file.write(rows.tobytes())
            if progress is not None:
                progress(int(numbers[-1]) + 1, num_samples)
        file.flush()
        os.fsync(file.fileno())
