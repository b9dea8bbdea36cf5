"""Drills: what is lost when a process is killed, hangs or is asked to end, a file is damaged, a disk is full; and what checkpoints cost.

    python -m benchmarks.faults [--quick] [--moments N] [--kinds WORDS ...] [--work DIR] [--out DIR]

Real runs (Ray, DeepSpeed, DALI, MLflow) on two ranks meet each kind of fault at random steps of their training, and are compared with
an undisturbed one: weights bit for bit, the whole report, batches, points in MLflow. One run goes from 4 nodes to 2 and to 3. A checkpoint's writer is killed before each of its
operations on the file system. Takes about an hour on two cores that are free; drills that are done are kept below --work, and the same
command goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults_cost import measure_cost
from benchmarks.faults_elastic import elastic_drill, marks_of_elastic
from benchmarks.faults_files import damaged_files, full_disk, killed_writers
from benchmarks.faults_runs import EVERY_STEPS, KINDS, Drill, calm_run, code_folder, run_drills
from benchmarks.record import Mark, file_stem, write_record

NAME = "faults"
ELASTIC = "4 nodes, then 2, then 3"


def marks_of(drills: list[Drill]) -> list[Mark]:
    """What must hold of every drill; a run that did not come to its end meets nothing."""
    same, points = sum(one.is_undisturbed for one in drills), points_wrong(drills)
    repeated = max(one.repeated_steps for one in drills)
    seconds = [one.recovery_s for one in drills if one.recovery_s is not None and "SIGSTOP" not in one.kind]
    unknown = sum(one.recovery_s is None for one in drills)
    return [
        Mark("faults after which the run is the undisturbed one", same / len(drills), "= 1", same == len(drills)),
        Mark("points missing or double in MLflow", float(points), "= 0", points == 0),
        # what was being written when it came is not there yet
        Mark("steps repeated, at most", float(repeated), f"<= {2 * EVERY_STEPS}", repeated <= 2 * EVERY_STEPS),
        Mark("faults without a step of new workers after them", float(unknown), "= 0", unknown == 0),
        Mark(
            "fault to next step, seconds, at most",
            max(seconds, default=float("nan")),
            "<= 60",
            max(seconds, default=float("inf")) <= 60,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="each kind once, a smaller table; a few minutes")
    parser.add_argument(
        "--moments", type=int, default=10, help="of each kill; a third of them of the rest (default: 10)"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        choices=(*KINDS, ELASTIC),
        default=(*KINDS, ELASTIC),
        help="; ".join((*KINDS, ELASTIC)),
    )
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="where finished drills are kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    kills = 1 if arguments.quick else arguments.moments
    counts = {
        kind: kills if number < 2 else -(-kills * 3 // 10)
        for number, kind in enumerate(KINDS)
        if kind in arguments.kinds
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        writers = killed_writers(folder / "writers")
        damages = damaged_files(folder / "damages")
        full = full_disk(folder / "full")
        print(f"writers killed before each operation: {writers}; damages: {damages}; full disk: {full}", flush=True)
        cost = measure_cost(folder / "cost", 10_000 if arguments.quick else 100_000)
        print(json.dumps(cost), flush=True)
    work = code_folder(arguments.work.resolve())
    drills = run_drills(work, counts)
    elastic = elastic_drill(work) if ELASTIC in arguments.kinds and not arguments.quick else None
    marks = [
        Mark("kills of a writer by which something was lost", float(writers["lost"]), "= 0", writers["lost"] == 0),
        Mark("damaged files that were not told", float(len(damages["missed"])), "= 0", not damages["missed"]),
        *([] if full is None else [Mark("full disk: refused in words, the one before stays", full, "holds", full)]),
        *(marks_of(drills) if drills else []),
        *([] if elastic is None else marks_of_elastic(elastic)),
        Mark("a checkpoint each 500 steps: share of the steps' time", cost["share"], "<= 0.02", cost["share"] <= 0.02),
    ]
    raw: dict[str, Any] = {
        "writers": writers,
        "damages": damages,
        "full_disk": full,
        "cost": cost,
        "calm_s": calm_run(work),
    }
    raw |= {"not_judged": ["full disk"] if full is None else [], "counts": counts, "load": os.getloadavg()}
    stem = file_stem(NAME + ("-quick" if arguments.quick else ""))
    raw |= {"drills": [asdict(one) for one in drills], "elastic": None if elastic is None else asdict(elastic)}
    return write_record(NAME, arguments.out, marks, raw, stem)


def points_wrong(drills: list[Drill]) -> int:
    return sum(one.missing_points + one.double_points for one in drills)


if __name__ == "__main__":
    sys.exit(main())
