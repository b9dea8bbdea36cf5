"""A file of vectors in memory: unit rows by key, through a map where one is given, every row checked on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lce_dist.compat.artefact import map_rows
from lce_dist.errors import DataError
from lce_dist.vector_files import open_vectors

if TYPE_CHECKING:
    from launch.progress import RunProgress
    from launch.protocol_files import Known
    from lce_dist.compat.bridges import Bridge

_UNIT_TOLERANCE = 1e-3
_UNIT_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class LoadedVectors:
    """Rows (N, D), the row of each key in the order of the file, and what else the file says: identities, space, or None."""

    path: Path
    rows_ND: npt.NDArray[np.float32]
    row_of: dict[str, int]
    identities: list[str] | None
    space: str | None = None

    @property
    def known(self) -> Known:
        """For lists that name keys."""
        from launch.protocol_files import Known

        return Known(str(self.path), self.row_of)


def load_vectors(path: Path, lengths: str, bridge: Bridge | None, progress: RunProgress) -> LoadedVectors:
    """All rows of a file. lengths: "unit" (others are refused), "normalise", "keep"; a map gives unit rows.

    Errors: DataError of ``open_vectors``, for a key that comes twice, another length than asked, or other dimensions than
    the map begins at; each names the file and the row. **Memory**: 4 * D bytes a row, and its key; of rows that are used as they
    lie in the file, what is touched.
    """
    file = open_vectors(path)
    if bridge is not None and file.dim != bridge.dim_in:
        raise DataError(
            f"vectors {path} have {file.dim} dimensions; the map begins at {bridge.dim_in}. Give the other side's"
        )
    lies_ready = bridge is None and lengths == "unit" and file.dtype == np.dtype("<f4")
    lying_ND = file.mapped() if lies_ready else None
    rows_ND = lying_ND
    if rows_ND is None:
        rows_ND = np.empty((file.num_rows, file.dim if bridge is None else bridge.dim_out), dtype=np.float32)
    row_of: dict[str, int] = {}
    identities: list[str] = []
    for block in file.blocks():
        low = len(row_of)
        for key in block.keys:
            if key in row_of:
                both = f"rows {row_of[key] + 1} and {len(row_of) + 1}"
                raise DataError(f"vectors {path}: {both} have one key; keep one row a key")
            row_of[key] = len(row_of)
        identities += block.identities or []
        rows_bD = block.rows_bD.astype(np.float64)
        norm_b = np.linalg.norm(rows_bD, axis=1, keepdims=True)
        wrong = np.flatnonzero(np.abs(norm_b[:, 0] - 1.0) > _UNIT_TOLERANCE)
        if lengths == "unit" and wrong.size:
            raise DataError(
                f"vectors {path}: row {low + int(wrong[0]) + 1} has length {norm_b[wrong[0], 0]:.6g}; must be 1, within "
                f"{_UNIT_TOLERANCE}. If its model gives such vectors, add --lengths normalise"
            )
        # what is a unit vector in float32 stays as it is, so that numbers are those of the run that made it
        norm_b[(np.abs(norm_b - 1.0) <= _UNIT_ROUNDING) | (lengths == "keep")] = 1.0
        progress.count(f"reading {path.name}", len(row_of), file.num_rows)
        if lying_ND is not None and bool(np.all(norm_b == 1.0)):
            continue
        rows_bD = (rows_bD / norm_b).astype(np.float32)
        if bridge is not None:
            rows_bD = map_rows(bridge, torch.from_numpy(rows_bD)).numpy()
        rows_ND[low : len(row_of)] = rows_bD
    return LoadedVectors(path, rows_ND, row_of, identities or None, file.space)


def check_identities(one: LoadedVectors, other: LoadedVectors) -> None:
    """Refuse two files that name other people for the same image. Errors: DataError."""
    if one is other or one.identities is None or other.identities is None:
        return
    for key, row in one.row_of.items():
        there = other.row_of.get(key)
        if there is not None and one.identities[row] != other.identities[there]:
            raise DataError(
                f"vectors {one.path}, row {row + 1}, and {other.path}, row {there + 1}, have the same key and name two identities; "
                "must be one. Correct one of them"
            )


def check_spaces(card: dict[str, Any], source: Path, target: Path) -> None:
    """Refuse a map between other models than the files say. Errors: DataError."""
    for path, key, word in ((source, "from_space", "begins at"), (target, "to_space", "leads to")):
        space, wanted = open_vectors(path).space, card.get(key)
        if None not in (space, wanted) and space != wanted:
            raise DataError(
                f"vectors {path} are of space {space!r}; the map {word} {wanted!r}. Give the map of these models"
            )
