"""Which map between two frozen models is best, by how many classes it is fitted to: 100 to 10,000, both manners.

    python -m benchmarks.bridges [--quick] [--work DIR] [--out DIR]

Faces of 10,000 training identities; an old model (half of them) and a new one, trained apart, two seeds. Maps are fitted and
chosen as in a run (compat/fit.py), to growing parts of the identities, and tested on identities that neither model saw.
About 20 minutes on two cores, resumable: each finished piece is a file below --work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compatibility_cells import start
from benchmarks.compatibility_data import Pictures, Share, Source, decode_once, faces, load_pictures, part_of
from benchmarks.compatibility_plan import ALL, Budget, Side, Study, model_task
from benchmarks.compatibility_work import Perform, Result, Results, Task, perform_all
from benchmarks.record import Mark, file_stem, write_record
from lce_dist.compat.bridges import Bridge
from lce_dist.compat.fit import Pairs, fit_bridge
from lce_dist.evaluation.bootstrap import count_by_identity, resampled_tars
from lce_dist.evaluation.by_identity import tar_by_identity
from lce_dist.evaluation.metrics import EmbeddingSet, compare, far_key
from pipelines.order import derive_key

NAME, FAR, _DRAWS = "bridges", 1e-2, 200
MANNERS = ("backward", "forward")
_FAMILIES = {"procrustes": "#4d4d4d", "least squares": "#0072b2", "trained linear": "#009e73", "trained mlp": "#d55e00"}


@dataclass(frozen=True)
class Sizes:
    """Of the data and its models; counts: to how many classes maps are fitted."""

    source: Source
    budget: Budget
    counts: tuple[int, ...]
    seeds: tuple[int, ...]


def sizes_of(quick: bool) -> Sizes:
    """The whole takes about 20 minutes on two cores, half of it for 3,000 and 10,000 classes.

    Steps: at 800 and 2,500 the old model was hardly one (M(o,o) 0.090, record of 2026-11-23); now four epochs each.
    """
    if quick:
        return Sizes(faces(90, 8, 32, 30, 0.3), Budget(20, 40, 64, 0.05, 16.0), (20, 60), (1,))
    budget = Budget(2500, 5000, 64, 0.05, 24.0)
    return Sizes(faces(10_400, 8, 32, 400, 0.35), budget, (100, 300, 1000, 3000, 10_000), (1, 2))


@dataclass(frozen=True)
class FitJob:
    """One choice of a map; old, new: keys of the models' tasks."""

    manner: str
    count: int
    seed: int
    old: str
    new: str


def start_fits(source: Source, folder: Path, models: Path) -> Perform:
    """Ready a process for both kinds of task."""
    train = start({source.name: (source, folder)}, models)
    pictures = load_pictures(source, folder)

    def perform(task: Task) -> Result:
        return fit_cell(task.job, pictures, models) if isinstance(task.job, FitJob) else train(task)

    return perform


def fit_cell(job: FitJob, pictures: Pictures, models: Path) -> Result:
    """Fit to ``job.count`` of the training identities, test every candidate on the unseen ones."""
    old_ND, new_ND = (
        torch.from_numpy(np.array(np.load(models / key / "vectors.npy", mmap_mode="r", allow_pickle=False)))
        for key in (job.old, job.new)
    )
    source_ND, target_NE = (new_ND, old_ND) if job.manner == "backward" else (old_ND, new_ND)
    part = part_of(pictures, ALL, job.seed)
    kept_C = np.random.default_rng(derive_key(job.seed, 7)).permutation(part.num_classes)[: job.count]
    chosen_M = np.isin(part.labels, kept_C)
    rows = torch.from_numpy(part.positions[chosen_M])
    pairs = Pairs(source_ND[rows], target_NE[rows], torch.from_numpy(part.labels[chosen_M]))
    fitted = fit_bridge(pairs, lambda a, b, label: tar_by_identity(a, b, label, FAR), "auto", 0.2, job.seed)

    identity_M = pictures.identity_N[pictures.tested]

    def tested(bridge: Bridge | None) -> dict[str, Any]:
        with torch.no_grad():
            there = target_NE[torch.from_numpy(pictures.tested)]
            here = source_ND[torch.from_numpy(pictures.tested)]
            mapped = here if bridge is None else F.normalize(bridge(here))
        sets = [
            EmbeddingSet(name, one.numpy(), identity_M, pictures.tested) for name, one in (("m", mapped), ("t", there))
        ]
        query, gallery = sets if job.manner == "backward" else sets[::-1]
        (draws,) = resampled_tars([count_by_identity(query, gallery, FAR)], _DRAWS)
        tar = compare(query, gallery, (FAR,)).tar_at_far[far_key(FAR)]
        return {"tar": tar, "draws": [round(value, 5) for value in draws.tolist()]}

    candidates = [
        {"name": one.name, "heldout": one.score, "low": one.low, "high": one.high, **tested(one.bridge)}
        for one in fitted.candidates
    ]
    chosen = {"name": fitted.chosen.name, **tested(fitted.chosen.bridge)}  # fitted again to all identities
    line = f"chosen {chosen['name']}: {chosen['tar']:.3f} on unseen identities"
    return {"candidates": candidates, "chosen": chosen, "line": line}


def tasks_of(
    sizes: Sizes, fingerprint: str
) -> tuple[list[Task], dict[tuple[str, int, int], Task], dict[int, tuple[Task, Task]]]:
    """All tasks in order; those of the fits by (manner, count, seed); the models' by seed."""
    study = Study(
        (sizes.source,), {sizes.source.name: fingerprint}, {sizes.source.name: sizes.budget}, (), (), sizes.seeds
    )
    sides = Side("tiny16", 128, "cosface", Share("identities", 0.0, 0.5)), Side("tiny16", 128, "cosface", ALL)
    tasks: list[Task] = []
    fits: dict[tuple[str, int, int], Task] = {}
    models: dict[int, tuple[Task, Task]] = {}
    for seed in sizes.seeds:
        old = model_task(study, sizes.source, sides[0], "old", seed)
        new = model_task(study, sizes.source, sides[1], "new", seed)
        models[seed] = (old, new)
        tasks += [old, new]
        for count in sizes.counts:
            for manner in MANNERS:
                settings = {
                    "old": old.key,
                    "new": new.key,
                    "manner": manner,
                    "count": count,
                    "seed": seed,
                    "version": 1,
                }
                job = FitJob(manner, count, seed, old.key, new.key)
                title = f"{manner}, {count} classes, seed {seed}"
                fits[manner, count, seed] = Task(title, f"{manner} {count}", settings, job, (old.key, new.key))
        tasks += [fits[manner, count, seed] for count in sizes.counts for manner in MANNERS]
    return tasks, fits, models


def family_of(name: str) -> str:
    """Ridges and targets of least squares are one family."""
    return "least squares" if name.startswith("least_squares") else name


def best_of(candidates: Sequence[Result], family: str | None) -> Result:
    """The best on held-out identities, of a family or (None) of all closed forms: what a user of it would take."""
    closed = [one for one in candidates if not one["name"].startswith("trained")]
    own = closed if family is None else [one for one in candidates if family_of(one["name"]) == family]
    return max(own, key=lambda one: one["heldout"])


def marks_of(sizes: Sizes, result_of: Callable[[str, int, int], Result]) -> list[Mark]:
    """In every place: is what was chosen worse on unseen identities than the best closed form, beyond chance?"""
    marks = []
    for manner in MANNERS:
        for count in sizes.counts:
            gains, draws = [], []
            for seed in sizes.seeds:
                found = result_of(manner, count, seed)
                closed = best_of(found["candidates"], None)
                chosen = next(one for one in found["candidates"] if one["name"] == found["chosen"]["name"])
                gains.append(chosen["tar"] - closed["tar"])
                draws.append(np.array(chosen["draws"]) - np.array(closed["draws"]))
            high = float(np.quantile(np.mean(draws, axis=0), 0.975))
            name = f"{manner}, {count} classes: chosen - best closed form (upper {high:+.4f})"
            marks.append(Mark(name, statistics.fmean(gains), "upper >= 0", high >= 0.0))
    return marks


def lines_of(sizes: Sizes, result_of: Callable[[str, int, int], Result]) -> list[str]:
    """A Markdown table: TAR on unseen identities, mean over seeds."""
    lines = [
        "| manner | classes | " + " | ".join(_FAMILIES) + " | chosen |",
        "|---|---|" + "---|" * (len(_FAMILIES) + 1),
    ]
    for manner in MANNERS:
        for count in sizes.counts:
            found = [result_of(manner, count, seed) for seed in sizes.seeds]
            cells = [
                statistics.fmean(best_of(one["candidates"], family)["tar"] for one in found) for family in _FAMILIES
            ]
            names = ", ".join(dict.fromkeys(one["chosen"]["name"] for one in found))
            chosen = statistics.fmean(one["chosen"]["tar"] for one in found)
            shown = " | ".join(f"{cell:.3f}" for cell in cells)
            lines.append(f"| {manner} | {count:,} | {shown} | {chosen:.3f} ({names}) |")
    return lines


def picture_of(sizes: Sizes, result_of: Callable[[str, int, int], Result], models: dict[str, float]) -> Figure:
    """A panel a manner: TAR on unseen identities over the number of classes."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, manner in zip(panels, MANNERS, strict=True):
        for family, colour in _FAMILIES.items():
            values = [
                [best_of(result_of(manner, count, seed)["candidates"], family)["tar"] for seed in sizes.seeds]
                for count in sizes.counts
            ]
            panel.plot(sizes.counts, [statistics.fmean(v) for v in values], color=colour, marker="o", label=family)
            panel.fill_between(
                sizes.counts, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15
            )
        chosen = [
            statistics.fmean(result_of(manner, count, seed)["chosen"]["tar"] for seed in sizes.seeds)
            for count in sizes.counts
        ]
        panel.plot(
            sizes.counts,
            chosen,
            linestyle="none",
            marker="s",
            markersize=11,
            fillstyle="none",
            color="black",
            label="chosen",
        )
        for (name, value), dash in zip(models.items(), (":", "--"), strict=True):
            panel.axhline(value, color="0.5", linestyle=dash, linewidth=1.0, label=f"{name} {value:.3f}")
        panel.set_xscale("log")
        panel.set_xticks(sizes.counts, [f"{count:,}" for count in sizes.counts])
        panel.minorticks_off()
        panel.set_xlabel("classes that the map is fitted to")
        panel.set_title(
            {"backward": "backward: T21 of new queries", "forward": "forward: T12 of the old gallery"}[manner]
        )
        panel.grid(color="0.9")
    panels[0].set_ylabel("TAR at FAR 1e-2, unseen identities")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="90 identities, one seed; judges no quality")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/bridges"), help="where finished pieces are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    sizes = sizes_of(arguments.quick)
    folder = decode_once(sizes.source, arguments.work / "data")
    tasks, fits, models = tasks_of(sizes, load_pictures(sizes.source, folder).fingerprint)
    results = Results(arguments.work / "cells")
    start_with = (sizes.source, folder, arguments.work / "models")
    failed = perform_all(
        tasks, results, start_fits, start_with, arguments.processes, lambda line: print(line, flush=True)
    )
    for traceback in failed.values():
        print(traceback, file=sys.stderr)
    if failed:
        return 1

    def found(task: Task) -> Result:
        result = results.get(task.key)
        assert result is not None, "nothing failed"
        return result

    def result_of(manner: str, count: int, seed: int) -> Result:
        return found(fits[manner, count, seed])

    own = {
        name: statistics.fmean(found(models[seed][place])["numbers"]["self"]["tar"] for seed in sizes.seeds)
        for place, name in enumerate(("M(o,o)", "M(n,n)"))
    }
    print("\n".join([f"M(o,o) {own['M(o,o)']:.3f}, M(n,n) {own['M(n,n)']:.3f}", *lines_of(sizes, result_of)]))
    stem = file_stem(NAME + ("-quick" if arguments.quick else ""))
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture_of(sizes, result_of, own).savefig(arguments.out / f"{stem}.png", dpi=130)
    raw = {
        "models": own,
        "far": FAR,
        "fits": {f"{m}, {c}, seed {s}": _plain(found(task)) for (m, c, s), task in fits.items()},
    }
    return write_record(NAME, arguments.out, [] if arguments.quick else marks_of(sizes, result_of), raw, stem)


def _plain(result: Result) -> dict[str, Any]:
    """Without the draws."""
    candidates = [{key: value for key, value in one.items() if key != "draws"} for one in result["candidates"]]
    chosen = {key: value for key, value in result["chosen"].items() if key != "draws"}
    return {"candidates": candidates, "chosen": chosen, "seconds": result["seconds"]}


if __name__ == "__main__":
    sys.exit(main())
