"""Pictures of an upgrade beyond its matrix: errors, flips, groups, and the way of a backfill.

As in figures.py, each function takes numbers and returns one matplotlib Figure; a model pair has one colour everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lce_dist.evaluation.backfill import ORDERS, Backfill, Order
from lce_dist.evaluation.figures import PAIR_COLOURS, legend_right, new_figure, pair_label, wrapped
from lce_dist.evaluation.mates import Flips
from lce_dist.evaluation.metrics import PairResult, far_key
from lce_dist.evaluation.slices import Slice

_ORDER_LOOKS: dict[Order, tuple[str, str, str]] = {
    "random": ("#4d4d4d", "--", "random"),
    "boundary_excess_first": ("#d55e00", "-", "boundary excess first"),
    "farthest_from_centre_first": ("#0072b2", "-.", "farthest from centre first"),
}
_CHANGE_TITLES = {"shipped": "new queries,\ngallery as it is", "re_encoded": "gallery\nre-encoded"}
_LOST, _WON, _UNSURE = "#b2182b", "#1b7837", "#8c8c8c"
_MOST_GROUPS = 40


def det(matrix: Mapping[str, PairResult]) -> Figure:
    """Genuine pairs rejected over impostors accepted, both logarithmic, one line a model pair."""
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    lowest = 1.0
    for key, result in matrix.items():
        far_P, tar_P = result.roc
        missed_P = 1.0 - tar_P
        seen = missed_P > 0.0
        axes.plot(far_P[seen], missed_P[seen], color=PAIR_COLOURS[key], linewidth=2, label=pair_label(key))
        lowest = min(lowest, float(missed_P[seen].min(initial=1.0)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min((result.roc[0][0] for result in matrix.values()), default=1e-4), 1.0)
    axes.set_ylim(max(lowest / 1.5, 1e-5), 1.3)
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.set_xlabel("FAR (share of impostor pairs accepted)")
    axes.set_ylabel("1 - TAR (share of genuine pairs rejected)")
    axes.set_title("DET over all pairs of held-out images")
    legend_right(axes, "query / gallery")
    return figure


def flips_bars(flips: Mapping[str, Flips], far: float) -> Figure:
    """Genuine pairs that lose, and that gain, their acceptance, in percent of all genuine pairs; keys are upgrade.CHANGES."""
    figure = new_figure(7.6, 1.5 + 0.8 * len(flips))
    axes = figure.add_subplot()
    most = max([1e-9, *(100.0 * max(one.negative, one.positive) / one.num_genuine for one in flips.values())])
    for row, one in enumerate(flips.values()):
        for count, sign, colour in ((one.negative, -1.0, _LOST), (one.positive, 1.0, _WON)):
            percent = 100.0 * count / one.num_genuine
            axes.barh(row, sign * percent, color=colour, height=0.55)
            axes.text(
                sign * (percent + 0.03 * most),
                row,
                f"{percent:.2f} %\n{count:,} pairs",
                ha="left" if sign > 0 else "right",
                va="center",
                fontsize=9,
                color=colour,
            )
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set_yticks(range(len(flips)), [_CHANGE_TITLES.get(name, name) for name in flips])
    axes.set_xlim(-1.45 * most, 1.45 * most)
    axes.set_ylim(len(flips) - 0.4, -0.6)
    axes.set_xticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(f"Genuine pairs lost (left) and won (right), each model at FAR {far_key(far)}", fontsize=11)
    return figure


def backfill_curves(curves: Backfill) -> Figure:
    """TAR over the share of the gallery that is re-encoded, one line an order, with its mean over the way."""
    figure = new_figure(7.4, 4.2)
    axes = figure.add_subplot()
    for order in ORDERS:
        colour, dashes, title = _ORDER_LOOKS[order]
        axes.plot(
            100.0 * curves.share_K,
            curves.tar_K[order],
            color=colour,
            linestyle=dashes,
            linewidth=2,
            marker="o",
            markersize=3.5,
            label=f"{title}\nmean {curves.area(order):.4f}",
        )
    axes.set_xlim(0.0, 100.0)
    axes.set_xlabel("share of the gallery re-encoded (%)")
    axes.set_ylabel(f"TAR at FAR {far_key(curves.far)}")
    axes.set_title("Backfill: new queries while old vectors are replaced")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend_right(axes, "order")
    return figure


def groups_plot(groups: Sequence[Slice], far: float) -> Figure:
    """TAR of each group in the old state, as shipped, and re-encoded, and the interval of the gain. Of more than 40 the worst.

    Green, red: shipping gains or loses beyond what chance does among so many groups; grey: neither.
    """
    shown = groups
    if len(groups) > _MOST_GROUPS:
        worst = sorted(groups, key=lambda one: one.tar.get("new_old", 0.0) - one.tar.get("old_old", 0.0))[:_MOST_GROUPS]
        shown = [one for one in groups if one in worst]
    cells = [key for key in ("old_old", "new_old", "new_new") if all(key in one.tar for one in shown)]
    figure = new_figure(8.0, 1.4 + 0.34 * (len(shown) + len({one.column for one in shown})))
    axes = figure.add_subplot()
    ticks: list[float] = []
    names: list[str] = []
    heads: list[int] = []
    row, column = 0.0, None
    for one in shown:
        if one.column != column:
            column = one.column
            ticks.append(row)
            heads.append(len(names))
            names.append(wrapped(one.column, 24))
            row += 1.0
        if {"old_old", "new_old"} <= one.tar.keys():
            sure = one.gain is not None and one.gain.low > 0.0
            colour = _LOST if one.loses else _WON if sure else _UNSURE
            axes.plot([one.tar["old_old"], one.tar["new_old"]], [row, row], color=colour, linewidth=3)
            if one.gain is not None:
                ends = one.tar["old_old"] + one.gain.low, one.tar["old_old"] + one.gain.high
                axes.plot(ends, [row, row], color=colour, linewidth=1, marker="|", markersize=8, zorder=1)
        for key in cells:
            axes.plot(one.tar[key], row, "o", color=PAIR_COLOURS[key], markersize=7, markeredgecolor="white")
        ticks.append(row)
        names.append(f"{wrapped(one.value, 24)}  ({one.num_images:,} images)")
        row += 1.0
    axes.set_yticks(ticks, names, fontsize=9)
    for place in heads:
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.set_ylim(row - 0.4, -0.6)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"TAR at the threshold for FAR {far_key(far)} over all images")
    more = f" (the worst {_MOST_GROUPS} of {len(groups)})" if len(groups) > _MOST_GROUPS else ""
    axes.set_title(f"Who gains, who loses{more}")
    handles = [
        Line2D([], [], color=PAIR_COLOURS[key], marker="o", linestyle="", label=pair_label(key)) for key in cells
    ]
    looks = ((_WON, "shipping gains"), (_LOST, "shipping loses"), (_UNSURE, "may be chance"))
    handles += [Line2D([], [], color=colour, linewidth=3, label=label) for colour, label in looks]
    handles += [Line2D([], [], color="black", linewidth=1, marker="|", label="new/old, interval\nof the gain")]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    return figure
