"""The pictures of a run: each function takes numbers and returns one matplotlib Figure.

No pyplot: figures belong to who asked for them, and workers without a screen can draw them.
A model pair has the same colour in every figure (Okabe-Ito, told apart by the colour-blind too).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from lce_dist.errors import RunError
from lce_dist.evaluation.generations import Generations
from lce_dist.evaluation.matrix import PAIRS
from lce_dist.evaluation.metrics import HISTOGRAM_EDGES, Counts, Floats, PairResult, far_key

Series = Mapping[str, Sequence[tuple[int, float]]]

PAIR_COLOURS = {
    "old_old": "#4d4d4d",
    "new_old": "#d55e00",
    "new_new": "#0072b2",
    "independent_old": "#cc79a7",
    "independent_new": "#009e73",
}
_SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d", "#8c6d1f")
_SERIES_DASHES = ("-", "--", "-.", ":")
_MET, _NOT_MET = "#1b7837", "#b2182b"
_DPI = 150


def matrix_heat_map(entries: Mapping[str, Mapping[str, Any]], far: float) -> Figure:
    """TAR at ``far`` of each (query row, gallery column) in ``report_entries`` form; cells not measured are hatched.

    The (new, old) cell has a frame: green when the criterion is met, red when not.
    Errors: RunError when ``far`` is not among the entries' FARs.
    """
    tar = {key: _at(key, entry["tar_at_far"], far) for key, entry in entries.items()}
    models = [name for name in ("old", "new", "independent") if any(name in PAIRS[key] for key in entries)]
    row_of = {name: row for row, name in enumerate(models)}
    grid = np.full((len(models), len(models)), np.nan)
    for key, value in tar.items():
        query, gallery = PAIRS[key]
        grid[row_of[query], row_of[gallery]] = value
    side = 1.75 * len(models)
    figure = new_figure(side + 2.6, side + 1.5)
    axes = figure.add_subplot()
    axes.set_facecolor("#f2f2f2")
    image = axes.imshow(grid, vmin=0.0, vmax=1.0, cmap="Blues")
    for row, column in zip(*np.nonzero(np.isnan(grid)), strict=True):
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="///", edgecolor="#c4c4c4", linewidth=0)
        )
    for key, value in tar.items():
        row, column = (row_of[name] for name in PAIRS[key])
        colour = "white" if value > 0.55 else "black"
        rank1 = f"rank-1 {entries[key]['rank1']:.4f}"
        for drop, text, size in ((-0.08, f"{value:.4f}", 15.0), (0.17, rank1, 8.5)):
            axes.text(column, row + drop, text, ha="center", va="center", color=colour, fontsize=size)
    axes.set_xticks(range(len(models)), models)
    axes.set_yticks(range(len(models)), models, rotation=90, va="center")
    axes.set_xticks(np.arange(len(models) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(models) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=3)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("gallery model")
    axes.set_ylabel("query model")
    title = f"TAR at FAR {far_key(far)}"
    if {"old_old", "new_old"} <= tar.keys():
        met = tar["new_old"] > tar["old_old"]
        colour, word, sign = (_MET, "met", ">") if met else (_NOT_MET, "not met", "≤")
        row, column = (row_of[name] for name in PAIRS["new_old"])
        # White below the colour keeps the frame visible on dark and on light cells.
        for edge, width in (("white", 8), (colour, 4)):
            corner = (column - 0.475, row - 0.475)
            axes.add_patch(Rectangle(corner, 0.95, 0.95, fill=False, edgecolor=edge, linewidth=width, zorder=3))
        figure.supxlabel(f"criterion {word}: new/old {sign} old/old", color=colour, fontsize=11, weight="bold")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.8, label="TAR (share of genuine pairs accepted)")
    return figure


def generations_heat_map(generations: Generations, far: float) -> Figure:
    """TAR at ``far`` of each model's queries in its own and each earlier gallery; framed as in ``matrix_heat_map``.

    Green: better than the older model did in that gallery; red: not.
    """
    count = len(generations.names)
    side = 1.5 * count
    figure = new_figure(side + 2.8, side + 1.5)
    axes = figure.add_subplot()
    axes.set_facecolor("#f2f2f2")
    image = axes.imshow(generations.tar_GG, vmin=0.0, vmax=1.0, cmap="Blues")
    for row in range(count):
        for column in range(row + 1):
            value = generations.tar_GG[row, column]
            colour = "white" if value > 0.55 else "black"
            known = generations.intervals.get((row, column))
            axes.text(column, row, f"{value:.4f}", ha="center", va="center", color=colour, fontsize=14.0)
            if known is not None:
                spread = f"{known.low:.3f} to {known.high:.3f}"
                axes.text(column, row + 0.22, spread, ha="center", va="center", color=colour, fontsize=8.5)
            if column < row:
                met = value > generations.tar_GG[column, column]
                for edge, width in (("white", 8), (_MET if met else _NOT_MET, 4)):
                    corner = (column - 0.475, row - 0.475)
                    axes.add_patch(Rectangle(corner, 0.95, 0.95, fill=False, edgecolor=edge, linewidth=width, zorder=3))
    names = [wrapped(name, 14) for name in generations.names]
    axes.set_xticks(range(count), names)
    axes.set_yticks(range(count), names, rotation=90, va="center")
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("gallery model")
    axes.set_ylabel("query model")
    axes.set_title(f"TAR at FAR {far_key(far)}")
    figure.supxlabel(
        f"AC {generations.average_compatibility:.3f}, AM {generations.average_metric:.3f}", fontsize=11, weight="bold"
    )
    figure.colorbar(image, ax=axes, shrink=0.8, label="TAR (share of genuine pairs accepted)")
    return figure


def roc(matrix: Mapping[str, PairResult]) -> Figure:
    """TAR over FAR (logarithmic), one line a model pair."""
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for key, result in matrix.items():
        far, tar = result.roc
        axes.plot(far, tar, color=PAIR_COLOURS[key], linewidth=2, label=pair_label(key))
    axes.set_xscale("log")
    axes.set_xlim(min((result.roc[0][0] for result in matrix.values()), default=1e-4), 1.0)
    axes.set_ylim(0.0, 1.01)
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.grid(which="minor", axis="x", color="#eeeeee", linewidth=0.5)
    axes.set_xlabel("FAR (share of impostor pairs accepted)")
    axes.set_ylabel("TAR (share of genuine pairs accepted)")
    axes.set_title("ROC over all pairs of held-out images")
    legend_right(axes, "query / gallery")
    return figure


def similarity_histograms(matrix: Mapping[str, PairResult], far: float) -> Figure:
    """Densities of genuine and impostor scores, one panel a model pair, with the threshold at ``far``.

    Errors: RunError when ``far`` is not among the results' FARs.
    """
    figure = new_figure(8.0, 0.9 + 1.75 * len(matrix))
    panels = figure.subplots(len(matrix), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, result) in zip(panels, matrix.items(), strict=True):
        colour = PAIR_COLOURS[key]
        impostor = _density(result.impostor_histogram)
        axes.stairs(impostor, HISTOGRAM_EDGES, color="#8a8a8a", hatch="////", linewidth=0.8, label="impostor")
        genuine = _density(result.genuine_histogram)
        axes.stairs(genuine, HISTOGRAM_EDGES, fill=True, color=colour, alpha=0.35)
        axes.stairs(genuine, HISTOGRAM_EDGES, color=colour, linewidth=1.5, label="genuine")
        threshold = _at(key, result.threshold_at_far, far)
        tar = _at(key, result.tar_at_far, far)
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3f}")
        axes.set_title(f"{pair_label(key)}: TAR {tar:.4f}", loc="left", fontsize=10, color=colour, weight="bold")
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel("density")
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.spines[["top", "right"]].set_visible(False)
        legend_right(axes)
    seen = np.flatnonzero(sum(result.genuine_histogram + result.impostor_histogram for result in matrix.values()))
    if seen.size:
        panels[-1].set_xlim(HISTOGRAM_EDGES[seen[0]] - 0.02, HISTOGRAM_EDGES[seen[-1] + 1] + 0.02)
    figure.align_ylabels(panels)
    panels[-1].set_xlabel("cosine of query and gallery vector")
    figure.suptitle(f"Scores by model pair (query / gallery), threshold at FAR {far_key(far)}")
    return figure


def training_curves(series: Series, title: str, ylabel: str) -> Figure:
    """Values over optimizer steps: raw in a faint line, smoothed over about 4 % of the points in a strong one."""
    figure = new_figure(7.6, 4.2)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(series.items()):
        _draw_series(axes, index, name, points)
    axes.set_title(wrapped(title, 70))
    axes.set_ylabel(ylabel)
    _finish_steps(axes)
    if len(series) > 1:
        legend_right(axes)
    return figure


def loss_overlay(curves: Series, title: str) -> Figure:
    """Losses of several runs over optimizer steps, with each run's last smoothed value in the legend."""
    figure = new_figure(8.2, 4.4)
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(curves.items()):
        line = _draw_series(axes, index, name, points)
        values = np.asarray(line.get_ydata(), dtype=np.float64)
        ending = f"ends at {values[-1]:.4g}" if values.size else "no points"
        line.set_label(f"{wrapped(name, 24)}\n{ending}")
    axes.set_title(wrapped(title, 70))
    axes.set_ylabel("loss")
    _finish_steps(axes)
    legend_right(axes, "run")
    return figure


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty page of that size in inches."""
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def pair_label(key: str) -> str:
    """Query and gallery model of a cell, for people."""
    return " / ".join(PAIRS[key])


def _at(key: str, values: Mapping[str, float], far: float) -> float:
    if far_key(far) not in values:
        raise RunError(
            f"FAR {far_key(far)} was not measured for {key}; must be one of {', '.join(values)}. "
            "Add it to evaluation.fars"
        )
    return values[far_key(far)]


def _density(counts: Counts) -> Floats:
    return counts / (counts.sum() * np.diff(HISTOGRAM_EDGES))


def _draw_series(axes: Axes, index: int, name: str, points: Sequence[tuple[int, float]]) -> Line2D:
    """Draw one series, raw and smoothed; returns the smoothed line. Values that are not finite are left out."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    steps, values = table[np.isfinite(table[:, 1])].T
    # Colours first; a second round of them is told apart by its dashes.
    colour = _SERIES_COLOURS[index % len(_SERIES_COLOURS)]
    dashes = _SERIES_DASHES[index // len(_SERIES_COLOURS) % len(_SERIES_DASHES)]
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.28, label="_raw")
    marker = "o" if len(values) == 1 else ""
    (line,) = axes.plot(
        steps, _smoothed(values), color=colour, linewidth=1.8, linestyle=dashes, marker=marker, label=wrapped(name, 24)
    )
    return line


def _smoothed(values: Floats) -> Floats:
    """Mean over a centred window of about 4 % of the points, cut off at the ends; up to 20 points stay as they are."""
    count = len(values)
    half = max(1, count // 50) if count > 20 else 0
    first = np.maximum(np.arange(count) - half, 0)
    after = np.minimum(np.arange(count) + half + 1, count)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[after] - total[first]) / (after - first)


def _finish_steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def legend_right(axes: Axes, title: str | None = None) -> None:
    """A legend where no curve runs."""
    # Outside the axes, so that no curve ever runs under it.
    if axes.get_legend_handles_labels()[0]:
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize=9, title=title
        )
        legend.set_alignment("left")


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most ``width`` characters; a dollar in it is a dollar, not the start of a formula."""
    return ("\n".join(textwrap.wrap(text, width)) or text).replace("$", r"\$")
