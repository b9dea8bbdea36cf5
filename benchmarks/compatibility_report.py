"""What the study's cells say together: means over seeds with intervals, marks, a table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.compatibility_plan import (
    LCE_BACKWARD,
    LCE_DEFAULT,
    LCE_DIRECT,
    LCE_FORWARD,
    MAP_BACKWARD,
    MAP_FORWARD,
    Cell,
    Contestant,
)
from benchmarks.compatibility_work import Result
from benchmarks.record import Mark
from lce_dist.evaluation.scores import Cells, p_scores

Floats = npt.NDArray[np.float64]
Get = Callable[[str], Result | None]
DIRECT_KEPT, MAPPED_KEPT = 0.97, 0.99  # of the independent model's M(n, n)


@dataclass(frozen=True)
class Value:
    """A mean over seeds; draws (B,): the same mean when other test identities are drawn. seeds: one each."""

    seeds: tuple[float, ...]
    draws: Floats

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def between_seeds(self) -> float:
        """Standard deviation over seeds; 0 for a single one."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the draws; nan where nothing was drawn."""
        if np.isnan(self.draws).all():
            return math.nan, math.nan
        low, high = np.nanpercentile(self.draws, (2.5, 97.5))
        return float(low), float(high)

    def plain(self) -> dict[str, Any]:
        numbers = (self.mean, *self.interval, self.between_seeds, *self.seeds)
        mean, low, high, spread, *seeds = (
            None if math.isnan(number) else number for number in numbers
        )  # JSON has no nan
        return {"mean": mean, "interval": [low, high], "between_seeds": spread, "seeds": seeds}


@dataclass(frozen=True)
class Row:
    """One contestant in one scenario: numbers by name, or why there are none."""

    source: str
    scenario: str
    contestant: str
    kind: str
    manner: str
    values: dict[str, Value]
    seeds: tuple[int, ...]
    seconds: float
    about: tuple[dict[str, Any], ...]
    missing: str | None

    def mean(self, name: str) -> float:
        return self.values[name].mean


def rows_of(cells: Sequence[Cell], get: Get) -> list[Row]:
    """Cells of one place joined over seeds; a place with a cell that is not done is missing."""
    places: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.source, cell.scenario.name, cell.contestant.name), []).append(cell)
    return [_row(group, get) for group in places.values()]


def _row(cells: list[Cell], get: Get) -> Row:
    first = cells[0]
    place = (
        first.source,
        first.scenario.name,
        first.contestant.name,
        first.contestant.kind,
        manner_of(first.contestant),
    )
    if first.refused is not None:
        return Row(*place, {}, (), 0.0, (), f"refused: {first.refused}")
    done: list[tuple[int, Result, Result, Result]] = []
    for cell in cells:
        old, independent, own = (get(key) for key in (cell.old, cell.independent, cell.task.key if cell.task else ""))
        if old is not None and independent is not None and own is not None:
            done.append((cell.seed, old, independent, own))
    if not done:
        return Row(*place, {}, (), 0.0, (), "not done")
    by_name: dict[str, list[tuple[float, Floats]]] = {}
    for _, old, independent, own in done:
        for name, pair in _derived(old["numbers"], independent["numbers"], own["numbers"]).items():
            by_name.setdefault(name, []).append(pair)
    values = {
        name: Value(tuple(one for one, _ in pairs), np.mean([draws for _, draws in pairs], axis=0))
        for name, pairs in by_name.items()
    }
    results = [found[-1] for found in done]
    seconds = statistics.fmean(result["seconds"] for result in results)
    missing = None if len(done) == len(cells) else f"{len(done)} of {len(cells)} seeds"
    seeds = tuple(seed for seed, *_ in done)
    return Row(*place, values, seeds, seconds, tuple(result["about"] for result in results), missing)


def rows_of_record(raw: dict[str, Any], contestants: Sequence[Contestant]) -> list[Row]:
    """The rows that a record of the study keeps, without draws: what means are asked of, intervals are not."""
    known = {one.name: one for one in contestants}
    rows = []
    for kept in raw["rows"]:
        one = known[kept["contestant"]]
        values = {
            name: Value(tuple(math.nan if seed is None else seed for seed in value["seeds"]), np.full(1, math.nan))
            for name, value in kept["values"].items()
        }
        place = (kept["source"], kept["scenario"], one.name, one.kind, manner_of(one))
        rows.append(Row(*place, values, tuple(kept["seeds"]), kept["seconds"], tuple(kept["about"]), kept["missing"]))
    return rows


def manner_of(contestant: Contestant) -> str:
    return "" if contestant.kind == "none" else str(dict(contestant.compat)["mode"]).partition("-")[2]


def _derived(old: Result, independent: Result, cell: Result) -> dict[str, tuple[float, Floats]]:
    """Each number of one seed, and over the draws of identities."""
    mine = cell["self"] if "self" in cell else independent["self"]  # a map leaves the independent model as it is
    compared = {"M(o,o)": old["self"], "M(*,*)": independent["self"], "M(n,n)": mine}
    if "cross" in cell:
        compared["M(n,o)"] = cell["cross"]
    values = {name: (float(numbers["tar"]), np.array(numbers["draws"])) for name, numbers in compared.items()}
    points = [{name: value for name, (value, _) in values.items()}]
    points += [dict(zip(values, drawn, strict=True)) for drawn in zip(*(d for _, d in values.values()), strict=True)]
    scores = [_scores(point) for point in points]
    for name in scores[0]:
        values[name] = (scores[0][name], np.array([score[name] for score in scores[1:]]))
    for name, numbers in (("rank-1 n,n", mine), ("rank-1 n,o", cell.get("cross"))):
        if numbers is not None:
            values[name] = (float(numbers["rank1"]), np.full(1, math.nan))
    return values


def _scores(tar: dict[str, float]) -> dict[str, float]:
    """What lce_dist.evaluation.scores makes of one comparison; nan where a number is not defined."""
    crossed = "M(n,o)" in tar
    cells = Cells(tar["M(o,o)"], tar.get("M(n,o)", math.nan), tar["M(n,n)"], tar["M(*,*)"])
    scores = p_scores({"the only one": cells})
    values: dict[str, float | None] = {"kept": 1.0 + cells.relative_change, "P_up": scores.p_up}
    if crossed:
        values |= {"lead": cells.new_old - cells.old_old, "gain": cells.update_gain}
        values |= {"P_comp": scores.p_comp, "P_1": scores.p_1}
    return {name: math.nan if value is None else value for name, value in values.items()}


def stronger(row: Row) -> bool:
    """Whether the scenario has something to gain: the independent new model beats the old one."""
    return bool(row.values) and row.mean("M(*,*)") > row.mean("M(o,o)")


@dataclass(frozen=True)
class Rivalry:
    """A rival that is better than LCE on both axes; clear: on one of them by more than chance."""

    rival: str
    lead: float
    kept: float
    clear: bool


def dominating(rows: Sequence[Row], ours: Row) -> list[Rivalry]:
    """Trained rivals of ``ours``'s manner that lead it in M(n,o) and in M(n,n), all of one source and scenario."""
    found = []
    for row in _rivals(rows, ours.manner):
        if row.seeds != ours.seeds:
            continue
        differences = {name: _difference(row.values[name], ours.values[name]) for name in ("M(n,o)", "M(n,n)")}
        if all(difference.mean > 0.0 for difference in differences.values()):
            clear = any(
                difference.interval[0] > 0.0 and min(difference.seeds) > 0.0 for difference in differences.values()
            )
            found.append(Rivalry(row.contestant, differences["M(n,o)"].mean, differences["M(n,n)"].mean, clear))
    return found


def _rivals(rows: Sequence[Row], manner: str) -> list[Row]:
    return [
        row
        for row in rows
        if row.kind == "training"
        and row.manner == manner
        and not row.contestant.startswith("LCE")
        and "lead" in row.values
    ]


def _difference(one: Value, other: Value) -> Value:
    return Value(tuple(a - b for a, b in zip(one.seeds, other.seeds, strict=True)), one.draws - other.draws)


def marks_of(rows: Sequence[Row]) -> list[Mark]:
    """The issue's marks in every scenario where there is something to gain."""
    marks = []
    for source, scenario in dict.fromkeys((row.source, row.scenario) for row in rows):
        here = {row.contestant: row for row in rows if (row.source, row.scenario) == (source, scenario)}
        ruler = next((row for row in here.values() if row.values), None)
        if ruler is None or not stronger(ruler):
            continue
        place = f"{source}, {scenario}"
        for name in (LCE_DIRECT, LCE_DEFAULT, LCE_BACKWARD, LCE_FORWARD, MAP_BACKWARD, MAP_FORWARD):
            row = here.get(name)
            if row is None or "lead" not in row.values:
                continue
            lead, kept = row.mean("lead"), row.mean("kept")
            marks.append(Mark(f"{place}: {name} M(n,o) - M(o,o)", lead, "> 0", lead > 0.0))
            if row.kind == "mapping":
                continue
            least = DIRECT_KEPT if row.manner == "direct" else MAPPED_KEPT
            marks.append(Mark(f"{place}: {name} M(n,n) / M(*,*)", kept, f">= {least}", kept >= least))
            clear = sum(rivalry.clear for rivalry in dominating(list(here.values()), row))
            marks.append(Mark(f"{place}: {name}: rivals clearly better on both axes", float(clear), "== 0", clear == 0))
    return marks


def summary_of(rows: Sequence[Row]) -> str:
    """Markdown: a line a scenario: what is gained over M(o,o), and in brackets the share of M(*,*) that is kept."""
    lines: list[str] = []
    for source in dict.fromkeys(row.source for row in rows):
        lines += [
            "",
            f"{source}: gained M(n,o) - M(o,o) (kept M(n,n) / M(*,*))",
            "",
            "| scenario | M(o,o) | M(*,*) | LCE direct | its rival that gains most | LCE backward | its rival that gains most | LCE forward | "
            "T backward | T forward |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for scenario in dict.fromkeys(row.scenario for row in rows if row.source == source):
            here = [row for row in rows if (row.source, row.scenario) == (source, scenario)]
            ruler = next((row for row in here if row.values), None)
            if ruler is None:
                continue
            ours = {name: next((_gained(row) for row in here if row.contestant == name), "") for name in _SUMMED}
            direct, backward, *others = ours.values()
            numbers = [f"{ruler.mean(name):.3f}" for name in ("M(o,o)", "M(*,*)")]
            rivals = [_best_rival(here, manner) for manner in ("direct", "backward")]
            cells = [*numbers, direct, rivals[0], backward, rivals[1], *others]
            lines.append(f"| {scenario} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _best_rival(here: Sequence[Row], manner: str) -> str:
    best = max(_rivals(here, manner), key=lambda row: row.mean("lead"), default=None)
    return "" if best is None else f"{best.contestant.removesuffix(f' {manner}')} {_gained(best)}"


_OURS = (LCE_DIRECT, LCE_BACKWARD, LCE_FORWARD)
_SUMMED = (LCE_DIRECT, LCE_BACKWARD, LCE_FORWARD, MAP_BACKWARD, MAP_FORWARD)


def _gained(row: Row) -> str:
    return f"{row.mean('lead'):+.3f} ({row.mean('kept'):.2f})" if "lead" in row.values else "other dimension"


def table_of(rows: Sequence[Row]) -> str:
    """Markdown: a table a scenario."""
    lines: list[str] = []
    for source, scenario in dict.fromkeys((row.source, row.scenario) for row in rows):
        here = [row for row in rows if (row.source, row.scenario) == (source, scenario)]
        ruler = next((row for row in here if row.values), None)
        lines += ["", f"### {source}: {scenario}", ""]
        if ruler is None:
            lines += ["Not done.", ""]
            continue
        stated = ", ".join(f"{name} {_with_interval(ruler.values[name])}" for name in ("M(o,o)", "M(*,*)"))
        lines += [f"{stated}{'' if stronger(ruler) else '; the new model is not the stronger: nothing is judged'}.", ""]
        lines += [
            "| | M(n,o) | M(n,o) - M(o,o) | M(n,n) | kept | gain | P_up | P_comp | P_1 | rank-1 n,o | rank-1 n,n | s |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in here]
        for ours in here:
            rivals = dominating(here, ours) if ours.contestant in _OURS and "lead" in ours.values else []
            if rivals:
                said = ", ".join(
                    f"{r.rival} (by {r.lead:.3f} and {r.kept:.3f}{'' if r.clear else '; within chance'})"
                    for r in rivals
                )
                lines += ["", f"Better than {ours.contestant} on both axes: {said}."]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    if not row.values:
        return f"| {row.contestant} | {row.missing} |" + " |" * 10
    name = row.contestant if row.missing is None else f"{row.contestant} ({row.missing})"
    if "lead" not in row.values:
        cells = ["not comparable", "", _with_interval(row.values["M(n,n)"]), f"{row.mean('kept'):.3f}"]
        return f"| {name} | " + " | ".join(cells) + " |" * 8
    lead = row.values["lead"]
    met = "**" if lead.mean > 0.0 else ""
    numbers = (f"{row.mean(key):.3f}" for key in ("gain", "P_up", "P_comp", "P_1", "rank-1 n,o", "rank-1 n,n"))
    cells = [
        f"{row.mean('M(n,o)'):.3f}",
        f"{met}{_with_interval(lead, sign='+')}{met}",
        _with_interval(row.values["M(n,n)"]),
        f"{row.mean('kept'):.3f}",
        *numbers,
        f"{row.seconds:.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def _with_interval(value: Value, sign: str = "") -> str:
    low, high = value.interval
    return f"{value.mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}] s {value.between_seeds:.3f}"


_LCE_COLOUR, _MAP_COLOUR = "#d55e00", "#0072b2"
_RIVAL_COLOURS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c6d1f", "#7b3294", "#000000")
_MANNER_MARKERS = {"direct": "o", "backward": "<", "forward": ">", "": "x"}


def picture_of(rows: Sequence[Row], source: str) -> Figure:
    """A panel a scenario: accuracy kept to the right, compatibility gained upwards; bars are 95 % of the draws."""
    own = [row for row in rows if row.source == source]
    scenarios = list(dict.fromkeys(row.scenario for row in own))
    columns = min(3, len(scenarios))
    lines = -(-len(scenarios) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.1 * lines + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    styles = _styles(own)
    for place, panel in enumerate(axes.flat):
        if place >= len(scenarios):
            panel.set_axis_off()
            continue
        _panel(panel, [row for row in own if row.scenario == scenarios[place]], scenarios[place], styles)
    handles, labels = [], []
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(f"{source}: accuracy kept, compatibility gained\n(TAR at FAR 1e-2, mean over seeds)", fontsize=11)
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    # fixed closed forms and maps all keep 1.0 of the accuracy: of them only what was chosen is shown
    kept = (MAP_BACKWARD, MAP_FORWARD)
    shown = [row for row in rows if row.kind == "training" or row.contestant in kept]
    names = list(dict.fromkeys(row.contestant for row in shown))
    manner = {row.contestant: row.manner for row in rows}
    kind = {row.contestant: row.kind for row in rows}
    families = list(dict.fromkeys(n.split()[0] for n in names if kind[n] == "training" and not n.startswith("LCE")))
    styles = {}
    for name in names:
        if kind[name] == "mapping":
            colour, filled = _MAP_COLOUR, True
        elif name.startswith("LCE"):
            colour, filled = _LCE_COLOUR, name in (LCE_DIRECT, LCE_BACKWARD, LCE_FORWARD)
        else:
            colour, filled = _RIVAL_COLOURS[families.index(name.split()[0]) % len(_RIVAL_COLOURS)], True
        styles[name] = {
            "color": colour,
            "marker": _MANNER_MARKERS[manner[name]],
            "markerfacecolor": colour if filled else "none",
            "markersize": 8 if name == LCE_DIRECT else 6,
            "zorder": 4 if name.startswith("LCE") else 3,
        }
    return styles


def _panel(axes: Axes, rows: Sequence[Row], title: str, styles: dict[str, dict[str, Any]]) -> None:
    axes.axhline(0.0, color="0.4", linewidth=0.8)
    axes.axvline(DIRECT_KEPT, color="0.4", linewidth=0.8, linestyle=":")
    shown = [row for row in rows if "lead" in row.values and row.contestant in styles]
    for row in shown:
        lead, kept = row.values["lead"], row.values["kept"]
        bars = [[[abs(v.mean - v.interval[0])], [abs(v.interval[1] - v.mean)]] for v in (kept, lead)]
        axes.errorbar(
            kept.mean,
            lead.mean,
            yerr=bars[1],
            linestyle="none",
            elinewidth=0.5,
            label=row.contestant,
            **styles[row.contestant],
        )
    # contestants that are far away would press the others together
    if shown:
        leads, shares = ([row.mean(name) for row in shown] for name in ("lead", "kept"))
        bottom, left = max(min(leads) - 0.03, -0.15), max(min(shares) - 0.02, 0.75)
        axes.set_ylim(bottom, max(0.02, *leads) + 0.03)
        axes.set_xlim(left, max(1.02, max(shares) + 0.01))
        outside = [row for row in shown if row.mean("lead") < bottom or row.mean("kept") < left]
        said = "; ".join(f"{row.contestant} ({row.mean('kept'):.2f}, {row.mean('lead'):+.2f})" for row in outside)
        if said:
            axes.text(0.01, 0.01, f"outside: {said}", transform=axes.transAxes, fontsize=6, color="0.3")
    ruler = next((row for row in rows if row.values), None)
    if ruler is not None:
        title += f"\nM(o,o) {ruler.mean('M(o,o)'):.3f}, M(*,*) {ruler.mean('M(*,*)'):.3f}"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("kept: M(n,n) / M(*,*)", fontsize=8)
    axes.set_ylabel("gained: M(n,o) - M(o,o)", fontsize=8)
    axes.tick_params(labelsize=7)


def save_picture(rows: Sequence[Row], source: str, path: Path) -> None:
    """PNG."""
    picture_of(rows, source).savefig(path, dpi=130)
