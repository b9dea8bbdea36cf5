"""May this upgrade be shipped: the numbers of a report held against what the config asks, check by check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lce_dist.config import GateConfig
from lce_dist.errors import DataError


@dataclass(frozen=True)
class Check:
    """One thing that was asked; passed is None where the report cannot say, which does not pass."""

    name: str
    asked: str
    reached: str
    passed: bool | None


@dataclass(frozen=True)
class GateVerdict:
    """passed: every check passed, and there was at least one. off: what the config takes out, in words and by its key."""

    checks: tuple[Check, ...]
    off: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


_OFF = {
    "confidence": "M(n,o) > M(o,o)",
    "min_self_gain": "M(n,n) - M(o,o)",
    "min_self_ratio": "M(n,n) / M(*,*)",
    "max_far_ratio": "FAR with the old threshold kept",
    "max_negative_flips": "genuine pairs accepted before, rejected now",
    "min_slice_gain": "the worst group",
}
# what "auto" asks, of reports that hold what it takes; a number in the config is asked of every report
AUTO_SELF_RATIO = 0.97
AUTO_SLICE_GAIN = -0.02


def judge(report: Mapping[str, Any], gate: GateConfig) -> GateVerdict:
    """Every check that ``gate`` asks; one that is asked and cannot be told does not pass.

    Errors: DataError for a report that lacks a part: an earlier version wrote it, or it is damaged.
    """
    for key in (
        "criterion_far",
        "new_old",
        "new_new",
        "confidence",
        "intervals",
        "flips",
        "old_threshold_kept",
        "slices",
    ):
        if key not in report:
            raise DataError(
                f"the report has no {key!r}: an earlier version wrote it, or it is damaged. Delete it and run the training "
                "command again, which evaluates the trained models anew"
            )
    checks = []
    far = report["criterion_far"]
    tar = {
        key: report[key]["tar_at_far"][repr(float(far))]
        for key in ("old_old", "new_old", "new_new", "independent_new")
        if key in report
    }
    if gate.confidence != "off":
        checks.append(_criterion(report, tar, gate.confidence))
    if gate.min_self_gain != "off":
        gain = tar["new_new"] - tar["old_old"] if "old_old" in tar else None
        checks.append(_at_least("M(n,n) - M(o,o)", gain, gate.min_self_gain, "{:+.4f}"))
    self_ratio = AUTO_SELF_RATIO if gate.min_self_ratio == "auto" else gate.min_self_ratio
    if self_ratio != "off" and (gate.min_self_ratio != "auto" or "independent_new" in tar):
        alone = tar.get("independent_new", 0.0)
        checks.append(
            _at_least("M(n,n) / M(*,*)", tar["new_new"] / alone if alone > 0.0 else None, self_ratio, "{:.4f}")
        )
    if gate.max_far_ratio != "off":
        kept = report["old_threshold_kept"].get("new_old")
        checks.append(
            _at_most("FAR with the old threshold kept", kept and kept["far"] / far, gate.max_far_ratio, "{:.3g} times")
        )
    if gate.max_negative_flips != "off":
        flips = report["flips"].get("shipped")
        rate = flips and 100.0 * flips["negative_rate"]
        checks.append(
            _at_most("genuine pairs accepted before, rejected now", rate, 100.0 * gate.max_negative_flips, "{:.3g} %")
        )
    slice_gain = AUTO_SLICE_GAIN if gate.min_slice_gain == "auto" else gate.min_slice_gain
    if slice_gain != "off" and (
        gate.min_slice_gain != "auto" or judged_groups(report["slices"], gate.min_slice_images)
    ):
        checks.append(_worst_group(report["slices"], slice_gain, gate.min_slice_images))
    off = tuple(f"{words} (gate.{key})" for key, words in _OFF.items() if getattr(gate, key) == "off")
    return GateVerdict(tuple(checks), off)


def judged_groups(slices: Sequence[Mapping[str, Any]], min_images: int) -> list[Mapping[str, Any]]:
    """The groups of at least ``min_images`` images whose gain has an interval, the one with the smallest gain first."""
    large = [one for one in slices if one["num_images"] >= min_images and one["gain"] is not None]
    return sorted(large, key=lambda one: float(one["gain"]["value"]))


def _worst_group(slices: Sequence[Mapping[str, Any]], least: float, min_images: int) -> Check:
    """No group's interval may lie below ``least``: the worst estimate of many is low by chance alone."""
    name = "M(n,o) - M(o,o) of the worst group"
    asked = f"not surely below {least:+.4f}"
    judged = judged_groups(slices, min_images)
    if not judged:
        why = f"no group has {min_images} images of 10 identities" if slices else "not measured"
        return Check(name, asked, why, None)
    worst = min(judged, key=lambda one: float(one["gain"]["high"]))
    if worst["gain"]["high"] >= least:
        worst = judged[0]
    gain = worst["gain"]
    reached = f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
    return Check(f"{name}, {worst['column']}: {worst['value']}", asked, reached, bool(gain["high"] >= least))


def _criterion(report: Mapping[str, Any], tar: Mapping[str, float], confidence: float) -> Check:
    name = f"M(n,o) > M(o,o) at FAR {report['criterion_far']:g}"
    asked = f"in at least {100.0 * confidence:g} % of samples of identities"
    if report["confidence"] is None:
        return Check(name, asked, "M(o,o) could not be measured", None)
    reached = f"{tar['new_old']:.4f} against {tar['old_old']:.4f}, in {100.0 * report['confidence']:.1f} %"
    known = report["intervals"].get("new_old")
    if known is not None and known["low"] <= report["criterion_far"]:  # at chance, TAR is FAR
        return Check(name, asked, f"{reached}, but M(n,o) is no better than chance", False)
    return Check(name, asked, reached, tar["new_old"] > tar["old_old"] and report["confidence"] >= confidence)


def _at_least(name: str, value: float | None, least: float, form: str) -> Check:
    return Check(name, f"at least {form.format(least)}", *_reached(value, form, lambda known: known >= least))


def _at_most(name: str, value: float | None, most: float, form: str) -> Check:
    return Check(name, f"at most {form.format(most)}", *_reached(value, form, lambda known: known <= most))


def _reached(value: float | None, form: str, passes: Any) -> tuple[str, bool | None]:
    return ("not measured", None) if value is None else (form.format(value), bool(passes(value)))
