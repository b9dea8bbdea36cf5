"""Views and splits of a data set as files, listed once and mapped by every rank: at a hundred million samples nobody lists them again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.identities import Chosen
from pipelines.manifest import Choice, IdentitySplit, PackedDataset, View
from pipelines.order import Int64Array
from pipelines.rows import Rows

_CARD = "card.json"
_VERSION = 1
_PARTS = ("train", "old", "heldout")


def stored_view(cache: Path, name: object, dataset: PackedDataset, make: Callable[[], Choice | View]) -> View:
    """The view that ``make`` describes, read from ``cache``; made there when it is not there yet.

    name: all that the view depends on beside the data set, as JSON. **Memory**: of making it, 24 bytes an identity.
    """
    folder = cache / f"view-{_key(dataset, name)}"
    found = _open_view(folder, dataset)
    if found is None:
        made = make()
        _publish(folder, lambda partial: _write_view(partial, made))
        found = _open_view(folder, dataset)
        assert found is not None, "it was written just now"
    return found


def stored_split(cache: Path, name: object, dataset: PackedDataset, make: Callable[[], IdentitySplit]) -> IdentitySplit:
    """The split that ``make`` draws, mapped from ``cache``; drawn when it is not there yet."""
    folder = cache / f"split-{_key(dataset, name)}"
    places = _read(folder, _PARTS)
    if places is None:
        made = make()

        def write(partial: Path) -> dict[str, Any]:
            for part in _PARTS:
                keys = getattr(made, part)
                assert isinstance(keys, Chosen), "drawn from the identities of a data set"
                np.save(partial / f"{part}.npy", keys.place_C, allow_pickle=False)
            return {}

        _publish(folder, write)
        return made
    return IdentitySplit(*(Chosen(dataset.identities, places[part]) for part in _PARTS))


def _key(dataset: PackedDataset, name: object) -> str:
    return hashlib.sha256(json.dumps([_VERSION, dataset.fingerprint_in_use, name]).encode()).hexdigest()[:16]


def _open_view(folder: Path, dataset: PackedDataset) -> View | None:
    arrays = _read(folder, ("counts", "classes"))
    if arrays is None:
        return None
    try:
        samples, labels = (Rows(folder / f"{name}.npy", np.dtype(np.int64)) for name in ("samples", "labels"))
        card = json.loads((folder / _CARD).read_text())
    except (OSError, ValueError):
        (folder / _CARD).unlink(missing_ok=True)
        return None
    return View(dataset, samples, labels, arrays["counts"], arrays["classes"], card["fingerprint"])


def _write_view(partial: Path, made: Choice | View) -> dict[str, Any]:
    if isinstance(made, View):
        np.save(partial / "samples.npy", made.sample_ids, allow_pickle=False)
        np.save(partial / "labels.npy", made.labels, allow_pickle=False)
    else:
        header = {"descr": "<i8", "fortran_order": False, "shape": (int(made.count_C.sum()),)}
        with (partial / "samples.npy").open("wb") as samples, (partial / "labels.npy").open("wb") as labels:
            for file in (samples, labels):
                np.lib.format.write_array_header_1_0(file, header)
            for ids, new_labels in made.pieces():
                samples.write(ids.astype("<i8").tobytes())
                labels.write(new_labels.astype("<i8").tobytes())
    np.save(partial / "counts.npy", made.count_C, allow_pickle=False)
    np.save(partial / "classes.npy", made.class_C, allow_pickle=False)
    return {"fingerprint": made.fingerprint}


def _publish(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """A folder that is whole or not there; of several that write it at once, one stays."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        card = write(partial)
        with (partial / _CARD).open("w") as file:
            file.write(json.dumps({"version": _VERSION, **card}))
            file.flush()
            os.fsync(file.fileno())
        if not (folder / _CARD).exists():
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            partial.rename(folder)
    except FileExistsError:
        pass
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(folder: Path, arrays: tuple[str, ...]) -> dict[str, Int64Array] | None:
    """The arrays of a folder, mapped; None when it is not there, or not whole."""
    try:
        if json.loads((folder / _CARD).read_text()).get("version") != _VERSION:
            return None
        found: dict[str, npt.NDArray[np.int64]] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in arrays
        }
    except (OSError, ValueError):
        (folder / _CARD).unlink(missing_ok=True)  # of a damaged one: it is made anew
        return None
    return found
