"""Pictures of evaluation protocols: errors of a list of pairs, and of a search, for one pair of models.

As in figures.py, each function takes numbers and returns one matplotlib Figure.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lce_dist.evaluation.figures import new_figure, wrapped
from lce_dist.evaluation.identification import Identification
from lce_dist.evaluation.retrieval import Retrieval
from lce_dist.evaluation.verification import Roc

Floats = npt.NDArray[np.float64]

_COLOUR = "#0072b2"
_MOST_POINTS = 400
_MOST_RANKS = 50


def curve_points(roc: Roc, num_impostors: int) -> tuple[Floats, Floats]:
    """(FAR, TAR), both (P,), of an exact ROC at FARs spaced evenly in their logarithm."""
    far_P = np.geomspace(1.0 / num_impostors, 1.0, _MOST_POINTS) if num_impostors > 1 else np.array([1.0])
    return far_P, roc.at(far_P.tolist())[0]


def verification_curves(points: tuple[Floats, Floats], title: str) -> Figure:
    """ROC and DET side by side, from (FAR, TAR)."""
    figure, (left, right) = _two_panels(title)
    far_P, tar_P = points
    left.plot(far_P, tar_P, color=_COLOUR, linewidth=2)
    left.set_ylim(0.0, 1.01)
    _far_axis(left, far_P, "FAR (share of impostor pairs accepted)")
    left.set_ylabel("TAR (share of genuine pairs accepted)")
    _det(right, far_P, tar_P)
    _far_axis(right, far_P, "FAR (share of impostor pairs accepted)")
    right.set_ylabel("1 - TAR (share of genuine pairs rejected)")
    return figure


def identification_curves(found: Identification, title: str) -> Figure:
    """Misses over false alarms, and the CMC, side by side."""
    figure, (left, right) = _two_panels(title)
    fpir_P, tpir_P = curve_points(found.curve, found.num_nonmated)
    _det(left, fpir_P, tpir_P)
    _far_axis(left, fpir_P, "FPIR (share of non-mated probes with anybody returned)")
    left.set_ylabel("1 - TPIR (share of mated probes missed)")
    _cmc(right, found.rank_rate, found.num_identities, "mated probes with their mate\namong the first k identities")
    return figure


def retrieval_curve(found: Retrieval, gallery_size: int, title: str) -> Figure:
    """The CMC."""
    figure = new_figure(5.4, 4.2)
    axes = figure.add_subplot()
    _cmc(axes, found.rank_rate, gallery_size, "queries with a mate\namong the first k images")
    axes.set_title(wrapped(title, 60), fontsize=11)
    return figure


def _two_panels(title: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = new_figure(9.6, 4.2)
    left, right = figure.subplots(1, 2)
    figure.suptitle(wrapped(title, 100), fontsize=11)
    return figure, (left, right)


def _far_axis(axes: Axes, far_P: Floats, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(float(far_P[0]), 0.1), 1.0)
    axes.set_xlabel(label)
    axes.grid(which="major", color="#dddddd", linewidth=0.8)


def _det(axes: Axes, far_P: Floats, tar_P: Floats) -> None:
    missed_P = 1.0 - tar_P
    seen = missed_P > 0.0
    axes.plot(far_P[seen], missed_P[seen], color=_COLOUR, linewidth=2)
    if not seen.any():
        axes.text(0.5, 0.5, "no misses", transform=axes.transAxes, ha="center")
    axes.set_yscale("log")
    axes.set_ylim(max(float(missed_P[seen].min(initial=1.0)) / 1.5, 1e-7), 1.3)


def _cmc(axes: Axes, rate: Callable[[int], float], size: int, label: str) -> None:
    ranks = list(range(1, min(_MOST_RANKS, size) + 1))
    values = [rate(k) for k in ranks]
    axes.plot(ranks, values, color=_COLOUR, linewidth=2, marker="o", markersize=3)
    axes.set_xlim(0.5, ranks[-1] + 0.5)
    axes.set_ylim(max(0.0, values[0] - 0.1), 1.01)
    axes.set_xlabel("k")
    axes.set_ylabel(label)
    axes.grid(color="#dddddd", linewidth=0.8)
