"""May this upgrade be shipped: the numbers of a report held against what the config asks, check by check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lce_dist.config import GateConfig
from lce_dist.errors import RunError


@dataclass(frozen=True)
class Check:
    """One thing that was asked; passed is None where the report cannot say, which does not pass."""

    name: str
    asked: str
    reached: str
    passed: bool | None


@dataclass(frozen=True)
class GateVerdict:
    """passed: every check passed, and there was at least one."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


def judge(report: Mapping[str, Any], gate: GateConfig) -> GateVerdict:
    """Every check that ``gate`` asks. Errors: RunError for a report of an earlier version, which lacks numbers."""
    for key in ("intervals", "flips", "old_threshold_kept", "slices"):
        if key not in report:
            raise RunError(f"the report has no {key!r}: an earlier version wrote it. Run the same command with --fresh")
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
    if gate.min_self_ratio != "off" and "independent_new" in tar:
        ratio = tar["new_new"] / tar["independent_new"] if tar["independent_new"] > 0.0 else None
        checks.append(_at_least("M(n,n) / M(*,*)", ratio, gate.min_self_ratio, "{:.4f}"))
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
    if gate.min_slice_gain != "off":
        worst = worst_group(report, gate.min_slice_images)
        if worst is None and report["slices"]:
            asked = f"a group of at least {gate.min_slice_images} images"
            checks.append(Check("M(n,o) - M(o,o) of the worst group", asked, "no group is as large", None))
        elif worst is not None:
            group, gain = worst
            name = f"M(n,o) - M(o,o) of the worst group, {group['column']}: {group['value']}"
            checks.append(_at_least(name, gain, gate.min_slice_gain, "{:+.4f}"))
    return GateVerdict(tuple(checks))


def worst_group(report: Mapping[str, Any], min_images: int) -> tuple[Mapping[str, Any], float] | None:
    """The group of at least ``min_images`` images with the smallest M(n,o) - M(o,o), and that; None without groups."""
    gains = [
        (one["tar"]["new_old"] - one["tar"]["old_old"], number)
        for number, one in enumerate(report["slices"])
        if one["num_images"] >= min_images and {"old_old", "new_old"} <= one["tar"].keys()
    ]
    if not gains:
        return None
    gain, number = min(gains)
    return report["slices"][number], gain


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
