"""A map on disk: a folder of its numbers (bridge.safetensors) and its card (bridge.json), read without the models.

The card is written last and names the hash of the numbers, so a folder whose writing was cut off is not taken for whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from lce_dist.compat.bridges import Bridge, Kind, build_bridge
from lce_dist.compat.fit import Fitted
from lce_dist.errors import CheckpointError, RunError
from lce_dist.models.weights import load_weights, save_weights

Direction = Literal["new_to_old", "old_to_new"]
WEIGHTS, CARD = "bridge.safetensors", "bridge.json"
_NEEDED = {"kind", "dim_in", "dim_out", "direction"}
_BLOCK_ROWS = 4096


def card_of(fitted: Fitted, direction: Direction, far: float, about: dict[str, Any]) -> dict[str, Any]:
    """What the chosen map is and what every candidate reached at ``far``; about: of the models and the data."""
    chosen = fitted.chosen
    return {
        "direction": direction,
        "chosen": chosen.name,
        "kind": chosen.bridge.kind,
        "dim_in": chosen.bridge.dim_in,
        "dim_out": chosen.bridge.dim_out,
        "heldout_identities": fitted.num_heldout_identities,
        "scored_identities": fitted.num_scored_identities,
        "candidates": [
            {
                "name": one.name,
                f"tar_at_far_{far:g}": round(one.score, 6),
                "standard_error": round(one.score_error, 6),
                "low": round(one.low, 6),
                "high": round(one.high, 6),
            }
            for one in fitted.candidates
        ],
        **about,
    }


def spaces_of(direction: Direction, new: str | None, old: str | None) -> dict[str, str]:
    """For a card: of which models a map's input and output are, where that is known (``space`` of reports and vector files)."""
    begins, ends = (new, old) if direction == "new_to_old" else (old, new)
    return {key: space for key, space in (("from_space", begins), ("to_space", ends)) if space is not None}


def save_bridge(directory: Path, bridge: Bridge, card: dict[str, Any]) -> None:
    """Write the map and its card; a map that lay there is replaced. Errors: RunError where the file system refuses."""
    save_weights(bridge, directory / WEIGHTS, {"kind": bridge.kind, "direction": str(card["direction"])})
    partial = directory / f"{CARD}.{os.getpid()}.partial"
    try:
        values = {**card, "sha256": _hash_of(directory / WEIGHTS)}
        with partial.open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / CARD)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"map {directory} cannot be written: {error}. Free space or choose another place") from None


def read_card(directory: Path) -> dict[str, Any]:
    """What a map says of itself. Errors: CheckpointError for a folder that holds none, or a damaged one."""
    path = directory / CARD
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} does not exist; name a folder that holds a map, as RUN_DIR/NAME/bridge"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(card, dict) or not card.keys() >= _NEEDED:
        raise CheckpointError(f"{path} is no bridge's card; name a folder that holds a map, as RUN_DIR/NAME/bridge")
    fits = card["kind"] in get_args(Kind) and card["direction"] in get_args(Direction)
    if not fits or not all(isinstance(card[key], int) and card[key] > 0 for key in ("dim_in", "dim_out")):
        words = ", ".join(f"{key} {card[key]!r}" for key in sorted(_NEEDED))
        raise CheckpointError(f"{path} says {words}; it is damaged, or of a later release")
    return card


def read_bridge(directory: Path) -> Bridge:
    """The map in ``directory``, in eval mode, on the CPU. Errors: CheckpointError."""
    card = read_card(directory)
    path = directory / WEIGHTS
    if "sha256" in card and path.is_file() and _hash_of(path) != card["sha256"]:
        raise CheckpointError(f"{path} is not what {CARD} was written for: damaged, or cut off. Fit the map again")
    bridge = build_bridge(card["kind"], card["dim_in"], card["dim_out"], seed=0)
    load_weights(bridge, path)
    return bridge.eval().requires_grad_(False)


@torch.no_grad()
def map_rows(bridge: Bridge, rows_ND: torch.Tensor) -> torch.Tensor:
    """(N, E) unit rows of (N, D) rows of any length."""
    parts = [F.normalize(bridge(F.normalize(rows))) for rows in rows_ND.split(_BLOCK_ROWS)]
    return torch.cat(parts)


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
