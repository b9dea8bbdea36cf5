"""What a run says at its end: report.json, the pictures, and the table in the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from lce_dist.config import Config
from lce_dist.evaluation.figures import matrix_heat_map, roc, similarity_histograms
from lce_dist.evaluation.matrix import build_matrix, criterion, report_entries
from lce_dist.evaluation.metrics import EmbeddingSet
from lce_dist.world import World

_TITLES = {
    "old_old": "M(old, old)",
    "new_old": "M(new, old)",
    "new_new": "M(new, new)",
    "independent_old": "M(independent new, old)",
    "independent_new": "M(independent new, itself)",
}


def write_report(
    run_dir: Path,
    config: Config,
    fingerprint: str,
    sets: dict[str, EmbeddingSet],
    images_per_s: dict[str, float],
    world: World,
    bridge: dict[str, Any] | None = None,
    crossing: tuple[EmbeddingSet, EmbeddingSet] | None = None,
) -> None:
    """Score every pair of models (new against old by ``crossing``, through the map ``bridge``), write ``report.json`` (last, atomically) and ``figures/*.png``."""
    evaluation = config.evaluation
    matrix = build_matrix(sets["old"], sets["new"], sets.get("independent"), evaluation.fars, crossing)
    verdict = criterion(matrix, evaluation.criterion_far)
    entries = report_entries(matrix)
    report: dict[str, Any] = {
        **entries,
        "mode": config.compat.mode,
        "method": None if config.compat.maps_only else config.compat.method,
        "bridge": bridge,
        "criterion_met": verdict.met,
        "criterion_far": evaluation.criterion_far,
        "reasons": list(verdict.reasons),
        "update_gain": verdict.update_gain,
        "num_nodes": world.num_nodes,
        "num_ranks": world.size,
        "images_per_s": images_per_s.get("new", 0.0),
        "images_per_s_by_stage": images_per_s,
        "fingerprint": fingerprint,
        "num_heldout_images": len(sets["new"].labels_N),
    }
    figures = run_dir / "figures"
    figures.mkdir(exist_ok=True)
    matrix_heat_map(entries, evaluation.criterion_far).savefig(figures / "matrix.png", dpi=150)
    roc(matrix).savefig(figures / "roc.png", dpi=150)
    similarity_histograms(matrix, evaluation.criterion_far).savefig(figures / "similarities.png", dpi=150)
    partial = run_dir / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(run_dir / "report.json")


def result_table(report: dict[str, Any]) -> Table:
    """The matrix as a table: query model, gallery model, TAR at each FAR, rank-1."""
    fars = list(report["new_new"]["tar_at_far"])
    table = Table(title="held-out identities, all pairs", title_justify="left")
    table.add_column("query, gallery")
    for far in fars:
        table.add_column(f"TAR at FAR {far}", justify="right")
    table.add_column("rank-1", justify="right")
    through = {"training-backward": "M(T21 new, old)", "training-forward": "M(new, T12 old)"}
    through |= {"mapping-backward": "M(T21 new, old)", "mapping-forward": "M(new, T12 old)"}
    for key, title in (_TITLES | {"new_old": through.get(report["mode"], _TITLES["new_old"])}).items():
        if key in report:
            entry = report[key]
            table.add_row(title, *(f"{entry['tar_at_far'][far]:.3f}" for far in fars), f"{entry['rank1']:.3f}")
    return table
