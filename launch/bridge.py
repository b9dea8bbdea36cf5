"""The stage after both models exist: fit the map between their spaces, choose it, keep it beside the run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import nn

from lce_dist.collectives import all_agree, barrier
from lce_dist.compat.artefact import CARD, Direction, card_of, read_bridge, save_bridge, spaces_of
from lce_dist.compat.bridges import Bridge
from lce_dist.compat.fit import Pairs, Terms, fit_bridge
from lce_dist.config import CompatConfig
from lce_dist.embedding import EmbeddedRows, gather_all
from lce_dist.errors import RunError
from lce_dist.evaluation.by_identity import tar_by_identity
from lce_dist.storage import together
from lce_dist.training.loop import Report
from lce_dist.world import World
from pipelines.manifest import View

_FAR = 1e-2  # at which maps are compared
MOST_PAIRS = 200_000  # images whose vectors a map is fitted to; more do not change a matrix of D * E numbers
Passes = Callable[[], Iterable[EmbeddedRows]]


def some_identities(view: View, seed: int, most_images: int = MOST_PAIRS) -> View:
    """Identities of at most ``most_images`` images, drawn with a seed; two of them where none fits."""
    order_C = np.random.default_rng(seed).permutation(view.num_classes)
    fits = np.cumsum(view.count_C[order_C]) <= most_images
    chosen = order_C[fits] if bool(fits.any()) else np.arange(min(2, view.num_classes))
    return view.dataset.select_labels(view.class_C[chosen])


def bridge_stage(
    directory: Path,
    config: CompatConfig,
    new_rows: Passes,
    old_rows: Passes,
    trained: dict[str, nn.Module],
    seed: int,
    fingerprint: str,
    spaces: tuple[str, str],
    world: World,
    report: Report,
) -> Bridge:
    """The map that ``config.mode`` needs, fitted on the first rank and read by all; kept when it was fitted before.

    new_rows, old_rows: passes over the same images. spaces: fingerprints of new and old model. trained: maps that were trained with the network, by direction.
    **Collectives**: gathers of all pairs. **Memory**: 4 * (D + E) bytes a pair on every rank.
    """
    direction: Direction = "old_to_new" if config.manner == "forward" else "new_to_old"
    report({"type": "stage_start", "stage": "bridge", "total_steps": 1, "first_step": 0})
    if not all_agree((directory / CARD).exists(), world):
        new_ND, label_N, _ = gather_all(new_rows(), world)
        old_NE, _, _ = gather_all(old_rows(), world)
        source, target = (old_NE, new_ND) if direction == "old_to_new" else (new_ND, old_NE)
        given = trained.get(direction)

        def fit() -> None:
            fitted = fit_bridge(
                Pairs(source, target, label_N),
                lambda mapped, other, label: tar_by_identity(mapped, other, label, _FAR),
                "procrustes" if config.manner == "direct" else config.bridge,
                config.bridge_heldout,
                seed,
                {"jointly trained": copy.deepcopy(given).cpu()} if isinstance(given, Bridge) else {},
                lambda text: report({"type": "note", "stage": "bridge", "text": text}),
                Terms(align=config.align_weight, boundary=config.boundary_weight, hinge=config.boundary),
            )
            about = {"fingerprint": fingerprint, **spaces_of(direction, *spaces)}
            save_bridge(directory, fitted.chosen.bridge, card_of(fitted, direction, _FAR, about))
            report({"type": "note", "stage": "bridge", "text": f"map chosen: {fitted.chosen.name}"})

        together(lambda: fit() if world.is_first else None, world, RunError)
    barrier(world)
    bridge = read_bridge(directory).to(world.device)
    report({"type": "stage_done", "stage": "bridge"})
    return bridge
