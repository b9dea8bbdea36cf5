"""Every number in the tables of docs/study.md is that of the record that the page names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import bridges
from benchmarks.compatibility_plan import contestants
from benchmarks.compatibility_report import rows_of_record, summary_of
from benchmarks.compatibility_tuning import Tuned, tuning_table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "study.md").read_text()
TABLES = [line for line in PAGE.splitlines() if line.startswith("|")]


def record(name: str) -> dict[str, Any]:
    """The one that the page links to, by what its file's name begins with."""
    (stem,) = set(re.findall(rf"results/({name}-AMD-EPYC-[0-9-]*[0-9])\.(?:json|md|png)", PAGE))
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{stem}.json").read_text())
    return found


def test_the_tables_of_scenarios_are_the_records() -> None:
    rows = rows_of_record(record("compatibility")["raw"], contestants())
    lines = [line for line in summary_of(rows).splitlines() if line.startswith("|")]
    assert len(lines) == 2 * (2 + 9) and [line for line in lines if line not in TABLES] == []
    # the check can fail
    assert summary_of(rows).replace("0.659", "0.695").splitlines()[6] not in TABLES


def test_the_table_of_maps_is_the_records() -> None:
    raw = record("bridges")["raw"]
    lines = bridges.lines_of(bridges.sizes_of(False), lambda m, count, seed: raw["fits"][f"{m}, {count}, seed {seed}"])
    assert len(lines) == 2 + 10 and [line for line in lines if line not in TABLES] == []
    assert all(f"{name} {value:.3f}" in PAGE for name, value in raw["models"].items())


def test_the_weights_that_were_tried_are_the_records() -> None:
    weights = [Tuned.of(one) for one in record("compatibility")["raw"]["tuning"]["weights"]]
    lines = [line for line in tuning_table(weights).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(weights) > 20 and [line for line in lines if line not in TABLES] == []
    for one in weights:
        ends = min(one.tries, key=lambda tried: tried.weight), max(one.tries, key=lambda tried: tried.weight)
        assert one.chosen not in {tried.weight for tried in ends} or len(one.tries) >= 4, one.contestant
