"""One upgrade, examined: the matrix with its intervals, thresholds, flips, groups and the way of a backfill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lce_dist.evaluation.backfill import ORDERS, Backfill, backfill
from lce_dist.evaluation.bootstrap import Interval, count_by_identity, interval, resample
from lce_dist.evaluation.embeddings import whole_identities
from lce_dist.evaluation.group_gains import Draw, group_gains
from lce_dist.evaluation.mates import Flips, Pair, flips_at, mates
from lce_dist.evaluation.matrix import Verdict, criterion, report_entries
from lce_dist.evaluation.metrics import PairResult, far_key
from lce_dist.evaluation.scores import Cells, PScores, p_scores
from lce_dist.evaluation.slices import Slice, Words, slices, with_gains

# what users live through: new queries in the gallery as it is, and after it was re-encoded
CHANGES = {"shipped": ("old_old", "new_old"), "re_encoded": ("old_old", "new_new")}
DIFFERENCES = {
    "new_old_minus_old_old": ("new_old", "old_old"),
    "new_new_minus_old_old": ("new_new", "old_old"),
    "new_new_minus_independent": ("new_new", "independent_new"),
}
_MOST_IMAGES_DRAWN = 8192
_NUM_SAMPLES = 1000


@dataclass(frozen=True)
class Kept:
    """What a cell reaches at the threshold of old/old, and the threshold of its own."""

    far: float
    tar: float
    old_threshold: float
    threshold: float


@dataclass(frozen=True, eq=False)
class Upgrade:
    """All that is said of one upgrade at the criterion's FAR; parts that need M(o,o) are empty where it has no pairs.

    intervals: TARs by cell and differences by ``DIFFERENCES``, over identities drawn again. confidence: share of those samples with
    M(n,o) > M(o,o). drawn: images that the intervals stand on. kept, flips: by cell and by ``CHANGES``.
    """

    matrix: dict[str, PairResult]
    verdict: Verdict
    far: float
    num_images: int
    intervals: dict[str, Interval]
    confidence: float | None
    drawn: int
    kept: dict[str, Kept]
    flips: dict[str, Flips]
    backfill: Backfill | None
    slices: tuple[Slice, ...]
    p: PScores | None


def examine(
    matrix: Mapping[str, PairResult],
    cells: Mapping[str, Pair],
    far: float,
    columns: Mapping[str, Words],
    seed: int = 0,
    others: Mapping[str, Cells] | None = None,
) -> Upgrade:
    """Examine the upgrade whose cells, by the keys of ``matrix.PAIRS``, were compared into ``matrix``.

    columns: attributes of the images, a value an image, in the order of the sets. others: further test sets for the
    P-scores. Everything here is of bounded cost, whatever the number of images, but for a pass over genuine pairs.
    Errors: RunError of ``criterion``, ``slices`` and ``backfill``. **Memory**: of those, one after the other.
    """
    thresholds = {key: result.threshold_at_far[far_key(far)] for key, result in matrix.items()}
    intervals, confidence, draw, drawn = _intervals(matrix, cells, far, seed)
    kept: dict[str, Kept] = {}
    flips = {name: Flips(0, 0, 0) for name in CHANGES}
    groups: list[Slice] = []
    curves = None
    if "old_old" in matrix:
        for key in ("new_old", "new_new"):
            kept[key] = Kept(*matrix[key].kept[far_key(far)], thresholds["old_old"], thresholds[key])
        judged = {key: cells[key] for key in ("old_old", "new_old", "new_new", "independent_new") if key in matrix}
        for some in mates(judged):
            for name, (before, after) in CHANGES.items():
                flips[name] += flips_at(some, before, after, thresholds)
        curves = backfill(cells["new_old"], cells["new_new"], cells["old_old"][1], far, seed)
        gains = group_gains(judged, thresholds, columns, draw, _NUM_SAMPLES, seed)
        groups = with_gains(slices(judged, thresholds, columns, CHANGES), gains)
    return Upgrade(
        dict(matrix),
        criterion(matrix, far),
        far,
        len(cells["new_new"][0].labels_N),
        intervals,
        confidence,
        drawn,
        kept,
        flips if kept else {},
        curves,
        tuple(groups),
        _p_scores(matrix, far, others or {}),
    )


def _intervals(
    matrix: Mapping[str, PairResult], cells: Mapping[str, Pair], far: float, seed: int
) -> tuple[dict[str, Interval], float | None, Draw | None, int]:
    # cells of one vector an identity have other rows; only those of the same images are drawn together
    images = cells["new_new"][0].sample_ids_N
    names = [key for key in matrix if all(np.array_equal(one.sample_ids_N, images) for one in cells[key])]
    chosen = whole_identities(cells["new_new"][0], _MOST_IMAGES_DRAWN, seed)
    pairs = {key: (cells[key][0].rows(chosen), cells[key][1].rows(chosen)) for key in names}
    counts = {key: count_by_identity(*pairs[key], far) for key in names}
    resampled = resample(list(counts.values()), _NUM_SAMPLES, seed)
    tar_CB = resampled.tar_CB
    value = {key: matrix[key].tar_at_far[far_key(far)] for key in names}
    row = {key: tar_CB[number] for number, key in enumerate(names)}
    found = {key: interval(value[key], row[key]) for key in names}
    for name, (left, right) in DIFFERENCES.items():
        if left in row and right in row:
            found[name] = interval(value[left] - value[right], row[left] - row[right])
    confidence = None
    if {"old_old", "new_old"} <= row.keys():
        known = ~np.isnan(row["new_old"] - row["old_old"])
        confidence = float(np.mean(row["new_old"][known] > row["old_old"][known]))
    draw = None
    if len(chosen) == len(images) and {"old_old", "new_old"} <= row.keys():  # groups of the same images
        draw = Draw(resampled, counts, dict(zip(names, resampled.chosen_CB, strict=True)))
    return found, confidence, draw, len(chosen)


def _p_scores(matrix: Mapping[str, PairResult], far: float, others: Mapping[str, Cells]) -> PScores | None:
    keys = ("old_old", "new_old", "new_new", "independent_new")
    if not set(keys) <= matrix.keys():
        return None
    values = [matrix[key].tar_at_far[far_key(far)] for key in keys]
    return p_scores({"held-out": Cells(*values), **others}) if values[-1] > 0.0 else None


def upgrade_entries(upgrade: Upgrade) -> dict[str, Any]:
    """The upgrade as plain numbers for a JSON report, without curves over FARs and histograms."""
    entries: dict[str, Any] = report_entries(upgrade.matrix)
    entries |= {
        "criterion_met": upgrade.verdict.met,
        "criterion_far": upgrade.far,
        "reasons": list(upgrade.verdict.reasons),
        "update_gain": upgrade.verdict.update_gain,
        "confidence": upgrade.confidence,
        "intervals": {name: _interval_entry(one) for name, one in upgrade.intervals.items()},
        "images_drawn_for_intervals": upgrade.drawn,
        "old_threshold_kept": {
            key: {"far": one.far, "tar": one.tar, "old_threshold": one.old_threshold, "threshold": one.threshold}
            for key, one in upgrade.kept.items()
        },
        "flips": {name: _flips_entry(one) for name, one in upgrade.flips.items()},
        "slices": [
            {
                "column": one.column,
                "value": one.value,
                "num_images": one.num_images,
                "num_identities": one.num_identities,
                "num_genuine": one.num_genuine,
                "tar": one.tar,
                "far": one.far,
                "gain": None if one.gain is None else _interval_entry(one.gain),
                "update_gain": one.update_gain,
                "flips": {name: _flips_entry(flips) for name, flips in one.flips.items()},
            }
            for one in upgrade.slices
        ],
        "backfill": None,
        "p_scores": None,
    }
    if upgrade.backfill is not None:
        entries["backfill"] = {
            "share": upgrade.backfill.share_K.tolist(),
            "orders": {
                order: {"tar": upgrade.backfill.tar_K[order].tolist(), "area": upgrade.backfill.area(order)}
                for order in ORDERS
            },
        }
    if upgrade.p is not None:
        p = upgrade.p
        entries["p_scores"] = {"p_comp": p.p_comp, "p_up": p.p_up, "p_1": p.p_1, "undefined": list(p.undefined)}
    return entries


def _interval_entry(one: Interval) -> dict[str, float]:
    return {"value": one.value, "low": one.low, "high": one.high, "level": one.level}


def _flips_entry(flips: Flips) -> dict[str, Any]:
    return {
        "negative": flips.negative,
        "positive": flips.positive,
        "num_genuine": flips.num_genuine,
        "negative_rate": flips.negative_rate,
    }
