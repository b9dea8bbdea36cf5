"""What a person who ships wants to know first, in sentences made from a report and its gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lce_dist.evaluation.gate import GateVerdict, judged_groups

_FELT = 5e-3  # of mean TAR: less is within what other queries would give
_ORDER_WORDS = {
    "boundary_excess_first": "images outside their identity's boundary first",
    "farthest_from_centre_first": "images farthest from their identity's centre first",
}


@dataclass(frozen=True)
class Answers:
    """Four answers, each of one or a few sentences."""

    safe: str
    gain: str
    losers: str
    changes: str

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Question and answer."""
        return (
            ("Is it safe to ship?", self.safe),
            ("What do we gain?", self.gain),
            ("Who loses?", self.losers),
            ("What must change?", self.changes),
        )


def answers_of(report: Mapping[str, Any], verdict: GateVerdict, min_images: int) -> Answers:
    """The answers; only groups of ``min_images`` images whose interval lies below 0 are called losers."""
    far = repr(float(report["criterion_far"]))
    tar = {
        key: report[key]["tar_at_far"][far]
        for key in ("old_old", "new_old", "new_new", "independent_new")
        if key in report
    }
    return Answers(
        _safe(verdict),
        _gain(report, tar, far),
        _losers(report, min_images),
        _changes(report, far),
    )


def _safe(verdict: GateVerdict) -> str:
    count = len(verdict.checks)
    off = f" Not asked: {'; '.join(verdict.off)}." if verdict.off else ""
    if verdict.passed:
        return f"Yes: {count} of {count} checks passed.{off}"
    if not verdict.checks:
        return "Not judged: the config asks no check."
    failed = "; ".join(f"{check.name}: {check.reached}, asked {check.asked}" for check in verdict.failed)
    return f"No: {len(verdict.failed)} of {count} checks failed ({failed}).{off}"


def _gain(report: Mapping[str, Any], tar: Mapping[str, float], far: str) -> str:
    scarce = _unmeasured(report, tar, far)
    if "old_old" not in tar:
        return (
            f"TAR at FAR {far} is {tar['new_old']:.3f} for new queries in the gallery as it is, {tar['new_new']:.3f} after it is "
            f"re-encoded. The old vectors are one an identity, so the old state cannot be measured.{scarce}"
        )
    shipped = _difference(report, "new_old_minus_old_old", tar["new_old"] - tar["old_old"])
    whole = _difference(report, "new_new_minus_old_old", tar["new_new"] - tar["old_old"])
    text = (
        f"TAR at FAR {far} goes from {tar['old_old']:.3f} to {tar['new_old']:.3f} ({shipped}) with the gallery as it is, and to "
        f"{tar['new_new']:.3f} ({whole}) once it is re-encoded."
    )
    if report["update_gain"] is not None and report["update_gain"] > 0.0:
        text += f" That is {100.0 * report['update_gain']:.0f} % of the way to a new model that is bound to nothing."
    return text + scarce


def _unmeasured(report: Mapping[str, Any], tar: Mapping[str, float], far: str) -> str:
    """What a FAR says that no pair of models has the impostor pairs to measure; nothing where all have."""
    fewest = min(report[key]["num_impostor"] for key in tar)
    if float(far) * fewest >= 1.0:
        return ""
    return (
        f" A FAR of {far} was not measured: that takes {1.0 / float(far):,.0f} impostor pairs, and there are {fewest:,}; these TARs "
        "are those with no false accept at all."
    )


def _difference(report: Mapping[str, Any], name: str, value: float) -> str:
    found = report["intervals"].get(name)
    return (
        f"{value:+.3f}" if found is None else f"{value:+.3f}, 95 % interval {found['low']:+.3f} to {found['high']:+.3f}"
    )


def _losers(report: Mapping[str, Any], min_images: int) -> str:
    flips = report["flips"].get("shipped")
    if flips is None:
        return "Not known: the old state has no pairs of its own."
    lost, won = (100.0 * flips[kind] / flips["num_genuine"] for kind in ("negative", "positive"))
    text = f"{lost:.1f} % of genuine pairs were accepted before and are rejected now; {won:.1f} % the other way round."
    if not report["slices"]:
        return f"{text} Images carry no attributes, so groups are not told apart."
    judged = judged_groups(report["slices"], min_images)
    losing = [one for one in judged if one["gain"]["high"] < 0.0]
    if losing:
        text += f" Groups that lose: {_named(losing)}."
    elif not judged:
        text += f" No group has {min_images} images of 10 identities, so none is judged."
    else:
        text += f" No group of {min_images} images or more is sure to lose."
    others = [one for one in judged if one not in losing]
    if others:
        text += f" The smallest gain of {'the others' if losing else 'those'} is that of {_named(others[:1])}"
        text += ", which may be chance." if others[0]["gain"]["value"] < 0.0 else "."
    return text


def _named(groups: list[Mapping[str, Any]]) -> str:
    shown = ", ".join(
        f"{one['column']}: {one['value']} ({one['gain']['value']:+.3f}, {one['gain']['low']:+.3f} to {one['gain']['high']:+.3f})"
        for one in groups[:5]
    )
    return f"{shown}, and {len(groups) - 5} others" if len(groups) > 5 else shown


def _changes(report: Mapping[str, Any], far: str) -> str:
    kept = report["old_threshold_kept"].get("new_old")
    if kept is None:
        own = report["new_old"]["threshold_at_far"][far]
        return f"The threshold for FAR {far} of new queries in the gallery as it is is {own:.4f}."
    after = report["old_threshold_kept"]["new_new"]
    text = (
        f"The threshold: from {kept['old_threshold']:.4f} to {kept['threshold']:.4f} for new queries in the gallery as it is, "
        f"and to {after['threshold']:.4f} once it is re-encoded. With the old one kept, new queries would reach FAR {kept['far']:.2g} "
        f"and TAR {kept['tar']:.3f}, where the old model has {far} and {report['old_old']['tar_at_far'][far]:.3f}."
    )
    backfill = report["backfill"]
    if backfill is not None:
        areas = {name: one["area"] for name, one in backfill["orders"].items()}
        best = max(areas, key=lambda name: areas[name])
        if best != "random" and areas[best] - areas["random"] > _FELT:
            text += f" Re-encode {_ORDER_WORDS[best]}: TAR {areas[best]:.3f} on average over the way, {areas['random']:.3f} in any order."
        else:
            text += " The order in which the gallery is re-encoded hardly matters."
    return text
