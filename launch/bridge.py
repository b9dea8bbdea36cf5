"""The stage after both models exist: fit the map between their spaces, choose it, keep it beside the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lce_dist.collectives import all_agree, barrier
from lce_dist.compat.bridges import Bridge, Kind, build_bridge
from lce_dist.compat.fit import Fitted, Pairs, fit_bridge
from lce_dist.config import CompatConfig
from lce_dist.embedding import EmbeddedRows, gather_all
from lce_dist.errors import CheckpointError, RunError
from lce_dist.evaluation.by_identity import tar_by_identity
from lce_dist.models.weights import load_weights, save_weights
from lce_dist.storage import together
from lce_dist.training.loop import Report
from lce_dist.world import World
from pipelines.manifest import View

MOST_PAIRS = 200_000  # images whose vectors a map is fitted to; more do not change a matrix of D * E numbers
Passes = Callable[[], Iterable[EmbeddedRows]]


def some_identities(view: View, seed: int) -> tuple[str, ...]:
    """Identities of at most ``MOST_PAIRS`` images, drawn with a seed; all of them where they fit."""
    count_C = np.bincount(view.labels, minlength=len(view.identities))
    order_C = np.random.default_rng(seed).permutation(len(view.identities))
    fits = np.cumsum(count_C[order_C]) <= MOST_PAIRS
    return tuple(view.identities[number] for number in order_C[fits])


def bridge_stage(
    directory: Path,
    config: CompatConfig,
    new_rows: Passes,
    old_rows: Passes,
    trained: dict[str, nn.Module],
    seed: int,
    fingerprint: str,
    world: World,
    report: Report,
) -> Bridge:
    """The map that ``config.mode`` needs, fitted on the first rank and read by all; kept when it was fitted before.

    new_rows, old_rows: passes over the same images. trained: maps that were trained with the network, by direction.
    **Collectives**: gathers of all pairs. **Memory**: 4 * (D + E) bytes a pair on every rank.
    """
    direction = "old_to_new" if config.manner == "forward" else "new_to_old"
    weights, card_path = directory / "bridge.safetensors", directory / "bridge.json"
    report({"type": "stage_start", "stage": "bridge", "total_steps": 1, "first_step": 0})
    if not all_agree(card_path.exists(), world):
        new_ND, label_N, _ = gather_all(new_rows(), world)
        old_NE, _, _ = gather_all(old_rows(), world)
        source, target = (old_NE, new_ND) if direction == "old_to_new" else (new_ND, old_NE)
        given = trained.get(direction)

        def fit() -> None:
            fitted = fit_bridge(
                Pairs(source, target, label_N),
                lambda mapped, other, label: tar_by_identity(mapped, other, label, 1e-2),
                "procrustes" if config.manner == "direct" else config.bridge,
                config.bridge_heldout,
                seed,
                {"jointly trained": copy.deepcopy(given).cpu()} if isinstance(given, Bridge) else {},
                lambda text: report({"type": "note", "stage": "bridge", "text": text}),
            )
            directory.mkdir(parents=True, exist_ok=True)
            save_weights(fitted.chosen.bridge, weights, {"fingerprint": fingerprint, "direction": direction})
            _write(card_path, _card(fitted, direction, fingerprint))
            report({"type": "note", "stage": "bridge", "text": f"map chosen: {fitted.chosen.name}"})

        together(lambda: fit() if world.is_first else None, world, RunError)
    barrier(world)
    bridge = read_bridge(directory).to(world.device)
    report({"type": "stage_done", "stage": "bridge"})
    return bridge


def read_card(directory: Path) -> dict[str, Any]:
    """What a bridge says of itself. Errors: CheckpointError."""
    path = directory / "bridge.json"
    try:
        card: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; name a folder RUN_DIR/NAME/bridge") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(card, dict) or not {"kind", "dim_in", "dim_out", "direction"} <= card.keys():
        raise CheckpointError(f"{path} is no bridge's card; name a folder RUN_DIR/NAME/bridge")
    return card


def read_bridge(directory: Path) -> Bridge:
    """The map kept in ``directory``, in eval mode. Errors: CheckpointError."""
    card = read_card(directory)
    kind: Kind = card["kind"]
    bridge = build_bridge(kind, int(card["dim_in"]), int(card["dim_out"]), seed=0)
    load_weights(bridge, directory / "bridge.safetensors")
    return bridge.eval().requires_grad_(False)


def _card(fitted: Fitted, direction: str, fingerprint: str) -> dict[str, Any]:
    chosen = fitted.chosen
    return {
        "direction": direction,
        "chosen": chosen.name,
        "kind": chosen.bridge.kind,
        "dim_in": chosen.bridge.dim_in,
        "dim_out": chosen.bridge.dim_out,
        "fingerprint": fingerprint,
        "heldout_identities": fitted.num_heldout_identities,
        "candidates": [
            {"name": one.name, "tar_at_far_0.01": round(one.score, 6), "standard_error": round(one.score_error, 6)}
            for one in fitted.candidates
        ],
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)
