"""Four plots of a data set on one page: images per identity, file sizes, pixels, brightness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipelines.statistics import Statistics

_INK, _BAR, _REST, _MARK = "#222428", "#4c78a8", "#b8c4d0", "#c2410c"
_MOST_SIZES = 12
_MOST_BARS = 60


def plot_statistics(found: Statistics, png: Path) -> None:
    """Write the page; what was looked at in a sample alone says of how many images it speaks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    dataset = found.dataset
    figure.suptitle(
        f"{dataset.directory.name}: {dataset.num_samples:,} images of {len(found.images_per_identity):,} identities\n"
        f"pixels and brightness of {len(found.width):,} images; {len(found.undecodable):,} of {found.looked_at:,} looked at "
        "could not be decoded",
        fontsize=13,
        color=_INK,
    )
    _per_identity(axes[0, 0], found.images_per_identity)
    _histogram(axes[0, 1], found.num_bytes / 1024, "File size", "KB (1,024 bytes) an image", "images", logarithmic=True)
    _sizes(axes[1, 0], found)
    _histogram(axes[1, 1], found.brightness, "Brightness", "mean grey, 0 black to 255 white", "images")
    axes[1, 1].set_xlim(0, 255)
    for one in axes.ravel():
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(colors=_INK, labelsize=10)
    for one in (axes[0, 0].yaxis, axes[0, 1].yaxis, axes[1, 0].xaxis, axes[1, 1].yaxis):
        one.set_major_formatter(lambda value, _: f"{value:,.0f}")
        one.get_major_locator().set_params(integer=True)
    figure.savefig(png, dpi=110)
    pyplot.close(figure)


def _per_identity(axes: Any, images: Any) -> None:
    """Bars of whole numbers; the longest hundredth of a long tail is told in words."""
    most = int(images.max())
    shown = most if most <= _MOST_BARS else int(np.quantile(images, 0.99))
    width = -(-shown // _MOST_BARS)
    axes.hist(images[images <= shown], bins=np.arange(0.5, shown + width + 0.5, width), rwidth=0.9, color=_BAR)
    axes.set_xlim(0, shown + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if shown < most:
        beyond = f"{int((images > shown).sum()):,} more have {shown + 1:,} to {most:,}"
        axes.text(0.98, 0.92, beyond, ha="right", transform=axes.transAxes, color=_INK, fontsize=10)
    _median(axes, images)
    _label(axes, "Images per identity", "images", "identities")


def _histogram(axes: Any, values: Any, title: str, what: str, of: str, logarithmic: bool = False) -> None:
    _label(axes, title, what, of)
    if not len(values):
        axes.text(0.5, 0.5, "nothing to show", ha="center", transform=axes.transAxes, color=_INK)
        return
    low, high = float(values.min()), float(values.max())
    if logarithmic and high > 20 * low:
        axes.hist(values, bins=np.geomspace(low, high * 1.0001, 50), color=_BAR)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.hist(values, bins=50, color=_BAR)
    _median(axes, values)


def _sizes(axes: Any, found: Statistics) -> None:
    """The most frequent sizes as bars; the rest as one."""
    pairs = np.stack((found.width, found.height), axis=1)
    _label(axes, "Width x height in pixels", "images", "")
    if not len(pairs):
        axes.text(0.5, 0.5, "nothing to show", ha="center", transform=axes.transAxes, color=_INK)
        return
    sizes, times = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-times, kind="stable")
    names = [f"{width} x {height}" for width, height in sizes[order[:_MOST_SIZES]].tolist()]
    counts = times[order[:_MOST_SIZES]].tolist()
    if len(order) > _MOST_SIZES:
        names.append(f"{len(order) - _MOST_SIZES:,} other sizes")
        counts.append(int(times[order[_MOST_SIZES:]].sum()))
    colours = [_BAR] * _MOST_SIZES + [_REST]
    bars = axes.barh(names[::-1], counts[::-1], color=colours[: len(names)][::-1], height=min(0.8, 0.15 * len(names)))
    axes.bar_label(bars, labels=[f"{count:,}" for count in counts[::-1]], padding=4, fontsize=9, color=_INK)
    axes.set_xlim(0, max(counts) * 1.15)
    if len(names) == 1:
        axes.set_ylim(-1, 1)


def _median(axes: Any, values: Any) -> None:
    median = float(np.median(values))
    axes.axvline(median, color=_MARK, linewidth=1.5)
    place = axes.get_xaxis_transform()
    axes.text(median, 1.01, f"median {median:,.4g}", color=_MARK, fontsize=9, ha="center", va="bottom", transform=place)


def _label(axes: Any, title: str, across: str, up: str) -> None:
    axes.set_title(title, fontsize=12, color=_INK, loc="left", pad=18)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(up, color=_INK)
