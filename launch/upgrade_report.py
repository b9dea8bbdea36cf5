"""The whole report of an upgrade from stored vectors alone: what a run does after training, without a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from launch.loaded_vectors import LoadedVectors, check_spaces, load_vectors
from launch.pair_sets import file_fingerprint
from launch.progress import RunProgress
from launch.report import VERSION, draw_figures, next_revision
from launch.same_images import SameImages, same_images
from lce_dist.compat.artefact import map_rows, read_bridge, read_card
from lce_dist.compat.bridges import Bridge
from lce_dist.compat.closed_form import PairSums, procrustes
from lce_dist.config import VectorsConfig
from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.mates import Pair
from lce_dist.evaluation.matrix import build_matrix, cells_of, report_entries
from lce_dist.evaluation.upgrade import examine, upgrade_entries
from pipelines.attributes import attributes_by_key

_NUM_STEPS = 4


@dataclass(frozen=True)
class VectorFiles:
    """Where an upgrade's vectors lie. fit_on: old and new vectors of other people, for the rotation beside the report.

    common: keys that some files lack are left out. lengths: of ``lce evaluate``.
    """

    old: Path
    new: Path
    independent: Path | None
    bridge: Path | None
    fit_on: tuple[Path, Path] | None
    common: bool
    lengths: str


def upgrade_report(files: VectorFiles, config: VectorsConfig, out: Path, progress: RunProgress) -> dict[str, Any]:
    """Read, compare and examine; write figures, resolved.json and report.json into ``out``, and return the report.

    Errors: DataError of the files, each one line that names file and row; CheckpointError of a damaged map.
    **Memory**: all vectors, once more each for a map and the rotation, and ``examine``'s.
    """
    bridge, card = None, None
    if files.bridge is not None:
        card, bridge = read_card(files.bridge), read_bridge(files.bridge)
        check_spaces(card, *((files.new, files.old) if card["direction"] == "new_to_old" else (files.old, files.new)))
    places = {"old": files.old, "new": files.new}
    if files.independent is not None:
        places["independent"] = files.independent
    loaded = {name: load_vectors(path, files.lengths, None, progress) for name, path in places.items()}
    _check_dimensions(loaded, card)
    images = same_images(loaded, files.common)
    facts = {
        name: {
            "file": str(one.path),
            "num_rows": len(one.row_of),
            "dim": one.rows_ND.shape[1],
            "space": one.space,
            "left_out": images.left_out[name],
            "sha256": file_fingerprint(one.path),
        }
        for name, one in loaded.items()
    }
    fit = None if files.fit_on is None else _read_fit(files.fit_on, files, loaded, images, progress)
    del loaded
    columns = {}
    if config.evaluation.attributes is not None:
        columns = attributes_by_key(Path(config.evaluation.attributes), images.keys, images.identities)
    for text in [*_notes(images), *(_note_of_spaces(facts) if bridge is None else ())]:
        progress.note(text)
    fars = config.evaluation.fars
    old, new, independent = images.sets["old"], images.sets["new"], images.sets.get("independent")
    cells = cells_of(old, new, independent, _crossing(old, new, bridge, card))
    progress.count("comparing", 1, _NUM_STEPS)
    matrix = build_matrix(cells, fars)
    progress.count("comparing", 2, _NUM_STEPS)
    turned = _rotation(images, cells["new_old"], fit, config.run.seed)
    rotated = build_matrix(turned.cells, fars) if turned is not None else {}
    progress.count("comparing", 3, _NUM_STEPS)
    upgrade = examine(matrix, cells, config.evaluation.criterion_far, columns, config.run.seed)
    progress.count("comparing", _NUM_STEPS, _NUM_STEPS)
    report: dict[str, Any] = {
        "version": VERSION,
        "revision": next_revision(out),
        **upgrade_entries(upgrade),
        "procrustes": report_entries({key: rotated[key] for key in rotated if key != _SAME}),
        "procrustes_note": _procrustes_note(turned, fars, rotated),
        "pairs": {},
        "mode": f"vectors-{_manner(card)}",
        "method": None,
        "bridge": card,
        "num_heldout_images": upgrade.num_images,
        "num_identities": images.num_identities,
        "num_identities_of_one_image": images.num_single,
        "vectors": facts,
        "fingerprint": _digest(
            [[one["sha256"] for one in facts.values()], None if card is None else card.get("sha256")]
        ),
        "examination": _digest(
            [config.evaluation.model_dump(mode="json"), config.run.seed, files.common, files.lengths]
        ),
        "space": facts["new"]["space"] or f"vectors {facts['new']['sha256']}",
        "parent_space": facts["old"]["space"] or f"vectors {facts['old']['sha256']}",
    }
    draw_figures(out / "figures", upgrade)
    _write(out / "resolved.json", config.model_dump(mode="json"))
    _write(out / "report.json", report)
    return report


def _check_dimensions(loaded: Mapping[str, LoadedVectors], card: dict[str, Any] | None) -> None:
    old, new = loaded["old"], loaded["new"]
    dims = {"old": old.rows_ND.shape[1], "new": new.rows_ND.shape[1]}
    if card is None:
        if dims["old"] != dims["new"]:
            raise DataError(
                f"vectors {new.path} have {dims['new']} dimensions and {old.path} {dims['old']}; must be equal to be compared. "
                "Give --bridge a map between the two models (lce bridge fit makes one)"
            )
        return
    source, _, target = str(card["direction"]).partition("_to_")
    if (dims[source], dims[target]) != (card["dim_in"], card["dim_out"]):
        raise DataError(
            f"vectors {loaded[source].path} have {dims[source]} dimensions and {loaded[target].path} {dims[target]}; the map leads "
            f"from the {source} model's {card['dim_in']} to the {target} one's {card['dim_out']}. Give the map of these models"
        )


def _crossing(old: EmbeddingSet, new: EmbeddingSet, bridge: Bridge | None, card: dict[str, Any] | None) -> Pair | None:
    """Query and gallery of the cross-test, one of them through the map, on the side that its card names."""
    if bridge is None or card is None:
        return None

    def through(one: EmbeddingSet) -> EmbeddingSet:
        mapped = map_rows(bridge, torch.from_numpy(one.vectors_ND)).numpy()
        return EmbeddingSet(f"{one.name} mapped", mapped, one.labels_N, one.sample_ids_N)

    return (through(new), old) if card["direction"] == "new_to_old" else (new, through(old))


def _manner(card: dict[str, Any] | None) -> str:
    if card is None:
        return "direct"
    return "backward" if card["direction"] == "new_to_old" else "forward"


_SAME = "new_old_of_the_same"  # of the same images as the rotation, without it


@dataclass(frozen=True, eq=False)
class _Rotation:
    """Cells of new models that are only rotated onto the old one, and on what the rotation was fitted."""

    cells: dict[str, Pair]
    fitted_on: str
    num_fitted: int
    num_images: int


def _read_fit(
    paths: tuple[Path, Path],
    files: VectorFiles,
    loaded: Mapping[str, LoadedVectors],
    images: SameImages,
    progress: RunProgress,
) -> SameImages:
    """Vectors that the rotation is fitted to, of nobody who is compared. Errors: DataError."""
    old, new = (load_vectors(path, files.lengths, None, progress) for path in paths)
    for one, name in ((old, "old"), (new, "new")):
        wanted = loaded[name].rows_ND.shape[1]
        if one.rows_ND.shape[1] != wanted:
            raise DataError(
                f"--fit-on: vectors {one.path} have {one.rows_ND.shape[1]} dimensions; the {name} model's have {wanted}. "
                "Give the old model's first, then the new one's"
            )
    fit = same_images({"old": old, "new": new}, files.common)
    compared = set(images.identities)
    known = next((key for key, who in zip(fit.keys, fit.identities, strict=True) if who in compared), None)
    if known is not None:
        raise DataError(
            f"--fit-on: the identity of row {old.row_of[known] + 1} of {old.path} is among those that are compared; a rotation "
            "must be fitted to others. Leave it out of one of the two"
        )
    return fit


def _rotation(images: SameImages, crossing: Pair, fit: SameImages | None, seed: int) -> _Rotation | None:
    """The rotation fitted to ``fit``, or to half of the identities and measured on the others; None where they are too few."""
    names = [name for name in ("new", "independent") if name in images.sets]
    if fit is not None:
        # other vectors of an independent model are not given
        turn = _fitted(fit.sets["new"], fit.sets["old"])
        cells = {"new_old": (_turned(images.sets["new"], turn), images.sets["old"])}
        return _Rotation(cells, "on the vectors of --fit-on", len(fit.keys), len(images.keys))
    label_N = images.sets["old"].labels_N
    halves = _halves(label_N, seed)
    if halves is None:
        return None
    fitted, measured = halves
    some = {name: one.rows(measured) for name, one in images.sets.items()}
    cells = {_SAME: (crossing[0].rows(measured), crossing[1].rows(measured))}
    for name in names:
        turn = _fitted(images.sets[name].rows(fitted), images.sets["old"].rows(fitted))
        cells[f"{name}_old"] = (_turned(some[name], turn), some["old"])
    return _Rotation(cells, "on half of the identities and measured on the others", len(fitted), len(measured))


def _halves(
    label_N: np.ndarray[Any, np.dtype[np.int64]], seed: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]] | None:
    """Rows of two halves of the identities, those with several images cut in two by themselves."""
    count_I = np.bincount(label_N)
    draw = np.random.default_rng(seed)
    several, single = (draw.permutation(np.flatnonzero(chosen)) for chosen in (count_I > 1, count_I == 1))
    first = np.concatenate([several[: len(several) // 2], single[: len(single) // 2]])
    if len(several) < 2 or len(first) < 1 or len(count_I) - len(first) < 2:
        return None
    of_first_N = np.isin(label_N, first)
    return np.flatnonzero(of_first_N), np.flatnonzero(~of_first_N)


def _fitted(new: EmbeddingSet, old: EmbeddingSet) -> torch.Tensor:
    return procrustes(PairSums.of(torch.from_numpy(new.vectors_ND), torch.from_numpy(old.vectors_ND))).to(torch.float32)


def _turned(one: EmbeddingSet, turn_ED: torch.Tensor) -> EmbeddingSet:
    turned = F.normalize(torch.from_numpy(one.vectors_ND) @ turn_ED.T)
    return EmbeddingSet(f"{one.name} rotated", turned.numpy(), one.labels_N, one.sample_ids_N)


def _procrustes_note(turned: _Rotation | None, fars: tuple[float, ...], rotated: Mapping[str, Any]) -> str:
    if turned is None:
        return "A rotation of the new model was not fitted: that needs four identities, two of them with two images. Give --fit-on."
    text = (
        f"The rotation of the rotated model was fitted {turned.fitted_on}: {turned.num_fitted:,} images to fit, "
        f"{turned.num_images:,} to measure."
    )
    if _SAME in rotated:
        tars = ", ".join(f"{tar:.4f} at FAR {far}" for far, tar in rotated[_SAME].tar_at_far.items())
        text += f" On those, new/old as it is has TAR {tars}."
    return text


def _notes(images: SameImages) -> list[str]:
    notes = [f"{len(images.keys):,} images of {images.num_identities:,} identities are compared"]
    left = {name: count for name, count in images.left_out.items() if count}
    if left:
        told = ", ".join(f"{count:,} of {name}" for name, count in left.items())
        notes.append(f"left out, as not every file has their keys: {told}")
    if images.num_single:
        notes.append(
            f"{images.num_single:,} identities have one image: they are impostors to others, and nobody's mates"
        )
    return notes


def _note_of_spaces(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of two files that say they are of two spaces, with nothing here that connects them."""
    old, new = facts["old"]["space"], facts["new"]["space"]
    if old == new or None in (old, new):
        return []
    return [
        f"spaces: old {old}, new {new}; compared as they are, which means something only if the new model was trained to be "
        "comparable with the old one. --bridge gives a map between the two"
    ]


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
