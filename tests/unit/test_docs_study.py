"""Every number in the tables of docs/study.md is that of the record that the page names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import bridges
from benchmarks.compatibility_plan import contestants
from benchmarks.compatibility_report import rows_of_record, summary_of

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
    raw = record("compatibility-tries")["raw"]
    shown = {line.split(" | ")[0].strip("| "): line for line in TABLES if re.search(r"\d: [+-]0", line)}
    pairs = [line for line in TABLES if line.startswith(("| faces | ", "| omniglot | "))]
    counted = 0
    for one in raw["tries"]:
        numbers = one["numbers"]
        if one["mode"] == "training-direct":
            weight = one["align_weight"] if one["method"] == "lce" else one["method_weight"]
            assert f"{weight:.3g}: {numbers['lead']:+.3f} ({numbers['kept']:.3f})" in shown[one["method"]]
        else:
            manner, tail = one["mode"].partition("-")[2], (numbers["lead"], numbers["kept"], numbers["P_1"])
            begin = f"| {one['source'].split()[0]} | {manner} | {'RBT' if one['method'] == 'rbt' else ''}"
            end = f"| {numbers['M(o,o)']:.3f} | {tail[0]:+.3f} | {tail[1]:.3f} | {tail[2]:.3f} |"
            assert any(line.startswith(begin) and line.endswith(end) for line in pairs)
            counted += 1
    assert counted == len(pairs) > 0


def test_the_part_that_was_run_at_tuned_weights_is_the_records() -> None:
    raw = record("compatibility-part")["raw"]
    for row in raw["rows"]:
        if row["contestant"] != "independent":
            lead, kept, p_1 = (row["values"][name] for name in ("lead", "kept", "P_1"))
            bounds = ", ".join(f"{bound:+.3f}" for bound in lead["interval"])
            cells = (row["contestant"], f"{lead['mean']:+.3f} [{bounds}]", f"{kept['mean']:.3f}", f"{p_1['mean']:.3f}")
            assert f"| {' | '.join(cells)} |" in TABLES
    # the tries are the same in both records
    tries = {
        (one["method"], round(one.get("method_weight", one.get("align_weight")), 6)): one["numbers"]["P_1"]
        for one in record("compatibility-tries")["raw"]["tries"]
        if one["mode"] == "training-direct"
    }
    for one in raw["tuning"]["weights"]:
        method = "lce" if one["contestant"].startswith("LCE") else one["contestant"]
        for tried in one["tries"]:
            assert tries[method, round(tried["weight"], 6)] == tried["P_1"]
