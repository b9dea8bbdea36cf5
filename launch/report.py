"""What a run says at its end: report.json, the pictures, and the table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lce_dist.config import Config
from lce_dist.errors import ConfigError
from lce_dist.evaluation.figures import matrix_heat_map, roc, similarity_histograms
from lce_dist.evaluation.matrix import report_entries
from lce_dist.evaluation.metrics import PairResult
from lce_dist.evaluation.upgrade import Upgrade, upgrade_entries
from lce_dist.evaluation.upgrade_figures import backfill_curves, det, flips_bars, groups_plot
from lce_dist.spool import read_cursor, read_events

_TOLD = "rank1/new_old"  # in MLflow, of every report
VERSION = 3  # of report.json; another one is written anew from the trained weights

_FIGURES = ("matrix", "roc", "det", "similarities", "flips", "backfill", "groups")
_TITLES = {
    "old_old": "M(old, old)",
    "new_old": "M(new, old)",
    "new_new": "M(new, new)",
    "independent_old": "M(independent new, old)",
    "independent_new": "M(independent new, itself)",
}
_ROTATED = {"new_old": "M(new rotated, old)", "independent_old": "M(independent rotated, old)"}


@dataclass(frozen=True)
class RunFacts:
    """What the report says of the run itself; bridge: its map's card.

    fingerprint, examination: of what weights and report depend on; space, parent_space: of new and old model.
    """

    fingerprint: str
    examination: str
    space: str
    parent_space: str
    images_per_s: dict[str, float]
    num_ranks: int
    num_nodes: int
    bridge: dict[str, Any] | None


def write_report(
    run_dir: Path,
    config: Config,
    facts: RunFacts,
    upgrade: Upgrade,
    rotated: Mapping[str, PairResult],
    pairs: Mapping[str, dict[str, Any]],
) -> None:
    """Write ``figures/*.png`` and ``report.json`` (last, atomically); rotated: cells through Procrustes alone; pairs: by pair file.

    ``revision`` in it counts the reports of this run: 0, then one more each time it was evaluated anew.
    """
    report: dict[str, Any] = {
        "version": VERSION,
        "revision": next_revision(run_dir),
        **upgrade_entries(upgrade),
        "procrustes": report_entries(rotated),
        "pairs": dict(pairs),
        "mode": config.compat.mode,
        "method": None if config.compat.maps_only else config.compat.method,
        "bridge": facts.bridge,
        "num_nodes": facts.num_nodes,
        "num_ranks": facts.num_ranks,
        "images_per_s": facts.images_per_s.get("new", 0.0),
        "images_per_s_by_stage": facts.images_per_s,
        "fingerprint": facts.fingerprint,
        "examination": facts.examination,
        "space": facts.space,
        "parent_space": facts.parent_space,
        "num_heldout_images": upgrade.num_images,
    }
    draw_figures(run_dir / "figures", upgrade)
    partial = run_dir / "report.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(run_dir / "report.json")


def next_revision(run_dir: Path) -> int:
    """One more than every report of the folder had that lies there or was told to MLflow; 0 for the first one.

    A report's numbers are logged at this step, and steps that MLflow has already are dropped: it must grow, also where
    report.json was deleted.
    """
    before = read_report(run_dir / "report.json") or {}
    told = [before.get("revision", 0 if before else -1)]
    spool = run_dir / "tracking.jsonl"
    if spool.is_file():
        events = (event for event, _ in read_events(spool) if event.get("kind") == "metrics")
        told += [event["step"] for event in events if event.get("key") == "parent" and _TOLD in event["metrics"]]
    steps = (read_cursor(run_dir / "tracking.json") or {}).get("steps")
    if isinstance(steps, dict):
        told.append(steps.get("parent", {}).get(_TOLD, -1))
    return max(int(step) for step in told) + 1


def draw_figures(folder: Path, upgrade: Upgrade) -> None:
    """Every picture of the upgrade as a PNG; what an earlier report had drawn goes first, whether or not it is drawn again."""
    folder.mkdir(exist_ok=True)
    for name in _FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    matrix, far = upgrade.matrix, upgrade.far
    figures = {
        "matrix": matrix_heat_map(report_entries(matrix), far),
        "roc": roc(matrix),
        "det": det(matrix),
        "similarities": similarity_histograms(matrix, far),
    }
    if upgrade.flips:
        figures["flips"] = flips_bars(upgrade.flips, far)
    if upgrade.backfill is not None:
        figures["backfill"] = backfill_curves(upgrade.backfill)
    if upgrade.slices:
        figures["groups"] = groups_plot(upgrade.slices, far)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)


def pairs_table(report: dict[str, Any]) -> Table | None:
    """Accuracy over 10 folds on each pair file; None without any."""
    sets = report.get("pairs", {})
    if not sets:
        return None
    table = Table(title="pair files, accuracy over 10 folds", title_justify="left")
    table.add_column("query, gallery")
    for name in sets:
        table.add_column(name, justify="right")
    for key, title in _TITLES.items():
        if all(key in entry for entry in sets.values()):
            cells = (f"{entry[key]['accuracy']:.4f} ± {entry[key]['accuracy_std']:.4f}" for entry in sets.values())
            table.add_row(title, *cells)
    return table


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
    through |= {"vectors-backward": "M(T21 new, old)", "vectors-forward": "M(new, T12 old)"}
    titles = _TITLES | {"new_old": through.get(report["mode"], _TITLES["new_old"])}
    rotated = report.get("procrustes", {})  # absent in reports of earlier versions
    rows = [(title, report[key]) for key, title in titles.items() if key in report]
    rows += [(title, rotated[key]) for key, title in _ROTATED.items() if key in rotated]
    for title, entry in rows:
        table.add_row(title, *(f"{entry['tar_at_far'][far]:.3f}" for far in fars), f"{entry['rank1']:.3f}")
    return table


def open_report(run_dir: Path) -> dict[str, Any]:
    """The report of a finished run. Errors: ConfigError where there is none, it is damaged or of another version."""
    path = run_dir / "report.json"
    report = read_report(path)
    if report is None:
        word = "is damaged" if path.exists() else "is not there"
        raise ConfigError(f"{path} {word}; name the directory of a run that has finished, or run its command again")
    if report.get("version") != VERSION:
        raise ConfigError(
            f"{path} is of version {report.get('version')}, this program writes {VERSION}; run its command again, which "
            "evaluates the trained models anew"
        )
    return report


def read_report(path: Path) -> dict[str, Any] | None:
    """The report that lies there; None where there is none, or what is there is damaged."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None
