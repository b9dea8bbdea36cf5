"""Every way to compatibility on equal terms: all methods in all scenarios, on faces and on handwriting, three seeds.

    python -m benchmarks.compatibility [--quick] [--only REGEX ...] [--seeds N ...] [--omniglot ZIP] [--work DIR] [--out DIR]
    python -m benchmarks.compatibility --cost [--quick] [--out DIR]

Every cell trains by the code of a real run (DeepSpeed in process, a world of one) with the same steps, images, head and
scale. Each finished cell is a file below --work: the same command goes on where it was ended, however it was ended, and
a cell whose settings or method changed is made anew. ``--cost`` measures what LCE's terms add to a step instead.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compatibility_cells import start
from benchmarks.compatibility_cost import judge_cost, measure_cost, raw_cost
from benchmarks.compatibility_data import Source, decode_once, faces, load_pictures, omniglot
from benchmarks.compatibility_plan import (
    SCENARIOS,
    Budget,
    Contestant,
    Plan,
    Study,
    contestants,
    plan_of,
)
from benchmarks.compatibility_report import Row, marks_of, rows_of, save_picture, summary_of, table_of
from benchmarks.compatibility_tuning import SCENARIO, SEEDS, SHARE, Tuned, tune, tuning_source, tuning_table
from benchmarks.compatibility_work import Results, perform_all
from benchmarks.record import Mark, file_stem, write_record
from lce_dist.errors import LceError

NAME = "compatibility"


def study_of(arguments: argparse.Namespace) -> tuple[tuple[Source, ...], dict[str, Budget]]:
    """Data sets and budgets; measured so that the old model is clearly the weaker, and the whole takes two hours."""
    if arguments.quick:
        quick = faces(identities=90, photos=10, image_size=32, tested=30, difficulty=0.3)
        return (quick,), {"faces": Budget(20, 40, 64, 0.05, 16.0)}
    sources = [faces(identities=400, photos=16, image_size=32, tested=120, difficulty=0.35)]
    if arguments.omniglot is not None:
        sources.append(omniglot(arguments.omniglot, image_size=32, tested=36))
    budgets = {"faces": Budget(90, 220, 64, 0.05, 16.0), "omniglot": Budget(150, 260, 64, 0.1, 12.0)}
    return tuple(sources), budgets


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few faces, two scenarios, one seed; judges no quality")
    parser.add_argument(
        "--only",
        metavar="REGEX",
        action="append",
        default=[],
        help="cells in whose name it is found, such as 'faces, extended-class, LCE direct, seed 1'; all must be",
    )
    parser.add_argument("--omniglot", metavar="ZIP", type=Path, help="images_background_small1.zip of Omniglot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--report", action="store_true", help="table and picture of what is done; nothing is run")
    parser.add_argument("--cost", action="store_true", help="only what LCE's terms add to a step")
    parser.add_argument("--work", type=Path, default=Path("runs/compatibility"), help="where finished cells are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args(argv)
    if arguments.cost:
        return cost(arguments)
    try:
        return study(arguments)
    except LceError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def cost(arguments: argparse.Namespace) -> int:
    num_classes = 10_000 if arguments.quick else 100_000
    turns = measure_cost(num_classes, 9 if arguments.quick else 31)
    marks = judge_cost(turns, num_classes)
    name = f"{NAME}-cost"
    return write_record(name, arguments.out, marks, raw_cost(turns, num_classes), file_stem(name))


def study(arguments: argparse.Namespace) -> int:
    sources, budgets = study_of(arguments)
    if arguments.omniglot is None and not arguments.quick:
        print("omniglot is skipped: --omniglot names no archive")
    work: Path = arguments.work
    folders = {source.name: (source, decode_once(source, work / "data")) for source in sources}
    fingerprints = {name: load_pictures(*pair).fingerprint for name, pair in folders.items()}
    scenarios = tuple(s for s in SCENARIOS if not arguments.quick or s.name in _QUICK_SCENARIOS)
    seeds = (1,) if arguments.quick else tuple(arguments.seeds)
    study = Study(sources, fingerprints, budgets, scenarios, contestants(), seeds)
    chosen = _chosen(arguments.only)
    results = Results(work / "cells")
    failed: dict[str, str] = {}
    for source, folder in list(folders.values()):
        folders[tuning_source(source).name] = (tuning_source(source), folder)

    def perform(plan: Plan) -> None:
        if not arguments.report:
            todo = (start, (folders, work / "models"), arguments.processes)
            failed.update(perform_all(plan.tasks, results, *todo, lambda line: print(line, flush=True)))

    tuned = tune(study, _to_tune(study, chosen), results.get, perform)
    plan = plan_of(replace(study, weights={key: one.chosen for key, one in tuned.items()}), chosen)
    perform(plan)
    return report(arguments, list(tuned.values()), rows_of(plan.cells, results.get), failed)


def _to_tune(study: Study, chosen: Callable[[str], bool]) -> list[tuple[Source, Contestant]]:
    """Whose weights the chosen cells need."""
    needed = dict.fromkeys(
        (cell.source, cell.contestant)
        for cell in plan_of(study, chosen).cells
        if cell.contestant.tuned and cell.refused is None
    )
    sources = {source.name: source for source in study.sources}
    return [(sources[name], contestant) for name, contestant in needed]


_QUICK_SCENARIOS = ("extended-class", "dimension: 128 to 512")


def _chosen(patterns: list[str]) -> Callable[[str], bool]:
    compiled = [re.compile(pattern, re.IGNORECASE) for pattern in patterns]
    return lambda place: all(pattern.search(place) for pattern in compiled)


def report(arguments: argparse.Namespace, tuned: list[Tuned], rows: list[Row], failed: dict[str, str]) -> int:
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    stem = file_stem(NAME + ("-quick" if arguments.quick else ""))
    table = summary_of(rows) + table_of(rows) + tuning_table(tuned)
    (out / f"{stem}.md").write_text(table)
    for source in dict.fromkeys(row.source for row in rows):
        save_picture(rows, source, out / f"{stem}-{source}.png")
    print(table)
    for traceback in failed.values():
        print(traceback, file=sys.stderr)
    missing = [row for row in rows if row.missing is not None and not row.missing.startswith("refused")]
    marks = [Mark("places that are not done", float(len(missing)), "== 0", not missing)]
    if not arguments.quick:
        marks += marks_of(rows)
    tuning = {"seeds": SEEDS, "share": SHARE, "scenario": SCENARIO.name, "weights": [one.plain() for one in tuned]}
    raw = {"quick": arguments.quick, "tuning": tuning, "rows": [_plain(row) for row in rows], "failed": failed}
    return write_record(NAME, out, marks, raw, stem)


def _plain(row: Row) -> dict[str, Any]:
    return {
        "source": row.source,
        "scenario": row.scenario,
        "contestant": row.contestant,
        "values": {name: value.plain() for name, value in row.values.items()},
        "seeds": row.seeds,
        "seconds": row.seconds,
        "about": row.about,
        "missing": row.missing,
    }


if __name__ == "__main__":
    sys.exit(main())
