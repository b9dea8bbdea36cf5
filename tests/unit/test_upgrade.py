"""An upgrade's numbers as a whole, the gate's checks one by one, and what is said of them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from launch.html_report import html_report
from launch.report import draw_figures
from lce_dist.config import GateConfig
from lce_dist.errors import DataError
from lce_dist.evaluation.answers import answers_of
from lce_dist.evaluation.bootstrap import Interval
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.gate import judge
from lce_dist.evaluation.matrix import build_matrix, cells_of
from lce_dist.evaluation.metrics import compare
from lce_dist.evaluation.scores import flips, keep_threshold
from lce_dist.evaluation.slices import Slice, slices
from lce_dist.evaluation.upgrade import CHANGES, Upgrade, examine, upgrade_entries
from lce_dist.evaluation.upgrade_figures import groups_plot

FAR = 0.01


def model(name: str, seed: int, noise: float, num: int = 400) -> EmbeddingSet:
    labels = np.arange(num) % 50
    likes = np.random.default_rng(3).normal(size=(50, 16))[labels]
    rows = likes + noise * np.random.default_rng(seed).normal(size=likes.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet(name, rows.astype(np.float32), labels.astype(np.int64), np.arange(num))


OLD, NEW, ALONE = model("old", 1, 0.75), model("new", 2, 0.4), model("independent", 4, 0.38)
COLUMNS = {"cover": np.random.default_rng(7).choice(["none", "mask"], 400)}


@pytest.fixture(scope="module")
def upgrade() -> Upgrade:
    cells = cells_of(OLD, NEW, ALONE)
    return examine(build_matrix(cells, (FAR, 0.1)), cells, FAR, COLUMNS, seed=3)


@pytest.fixture
def report(upgrade: Upgrade) -> dict[str, Any]:
    facts = {"mode": "training-direct", "method": "lce", "bridge": None, "num_nodes": 2, "num_ranks": 4}
    facts |= {"images_per_s": 10.0, "fingerprint": "f", "num_heldout_images": 400, "procrustes": {}, "pairs": {}}
    return copy.deepcopy({**upgrade_entries(upgrade), **facts})


def test_every_part_is_that_of_its_own_function(upgrade: Upgrade) -> None:
    tar = {key: result.tar_at_far["0.01"] for key, result in upgrade.matrix.items()}
    assert tar["new_old"] == compare(NEW, OLD, [FAR]).tar_at_far["0.01"] > tar["old_old"]
    for key, name in (("new_old", "shipped"), ("new_new", "re_encoded")):
        pair = (NEW, OLD) if key == "new_old" else (NEW, NEW)
        reached = keep_threshold((OLD, OLD), pair, FAR)
        assert (upgrade.kept[key].far, upgrade.kept[key].tar) == (reached.far, reached.tar)
        assert upgrade.flips[name] == flips((OLD, OLD), pair, FAR)
    assert upgrade.backfill is not None
    for tar_K in upgrade.backfill.tar_K.values():
        assert (tar_K[0], tar_K[-1]) == (tar["new_old"], tar["new_new"])
    cells = {key: pair for key, pair in cells_of(OLD, NEW, ALONE).items() if key != "independent_old"}
    thresholds = {key: result.threshold_at_far["0.01"] for key, result in upgrade.matrix.items()}
    plain = [dataclasses.replace(one, gain=None) for one in upgrade.slices]
    assert plain == slices(cells, thresholds, COLUMNS, CHANGES)
    for group in upgrade.slices:
        assert group.gain is not None and group.gain.low < group.gain.value < group.gain.high
        assert group.gain.value == pytest.approx(group.tar["new_old"] - group.tar["old_old"], abs=1e-12)
    for name in ("old_old", "new_old", "new_old_minus_old_old", "new_new_minus_independent"):
        one = upgrade.intervals[name]
        assert one.low < one.value < one.high
    assert upgrade.intervals["new_old_minus_old_old"].low > 0.0 and upgrade.confidence == 1.0
    assert upgrade.p is not None and upgrade.p.p_1 is not None and upgrade.drawn == 400


def test_old_vectors_of_one_an_identity_leave_out_what_needs_pairs() -> None:
    chosen = np.arange(50)
    single = EmbeddingSet("old", OLD.vectors_ND[chosen], OLD.labels_N[chosen], -1 - chosen)
    cells = cells_of(single, NEW, None)
    found = examine(build_matrix(cells, (FAR,)), cells, FAR, COLUMNS)
    assert (found.confidence, found.kept, found.flips, found.backfill, found.slices) == (None, {}, {}, None, ())
    assert set(found.intervals) == {"new_new"}
    entries = {**upgrade_entries(found), "fingerprint": "f"}
    verdict = judge(entries, GateConfig())
    assert not verdict.passed and [check.passed for check in verdict.checks] == [None, None, None]
    assert "cannot be measured" in answers_of(entries, verdict, 100).gain


def gate(**values: Any) -> GateConfig:
    off = dict.fromkeys(
        ("confidence", "min_self_gain", "min_self_ratio", "max_far_ratio", "max_negative_flips", "min_slice_gain"),
        "off",
    )
    return GateConfig(**(off | values))


def test_each_check_passes_and_fails_on_its_own_number(report: dict[str, Any]) -> None:
    tar = {key: report[key]["tar_at_far"]["0.01"] for key in ("old_old", "new_old", "new_new", "independent_new")}
    worst = min(one["gain"]["high"] for one in report["slices"])
    turns = {
        "confidence": (report["confidence"], 1),
        "min_self_gain": (tar["new_new"] - tar["old_old"], 1),
        "min_self_ratio": (tar["new_new"] / tar["independent_new"], 1),
        "max_far_ratio": (report["old_threshold_kept"]["new_old"]["far"] / FAR, -1),
        "max_negative_flips": (report["flips"]["shipped"]["negative_rate"], -1),
        "min_slice_gain": (worst, 1),
    }
    for name, (value, sign) in turns.items():
        assert judge(report, gate(**{name: value})).passed, name
        if name != "confidence":  # which cannot be asked above 1
            refused = judge(report, gate(**{name: value + sign * 1e-6}))
            assert not refused.passed and len(refused.failed) == 1, name
    report["confidence"] = 0.9
    assert not judge(report, gate(confidence=0.95)).passed
    report["confidence"] = 1.0
    report["new_old"]["tar_at_far"]["0.01"] = tar["old_old"]  # equal is not better
    assert not judge(report, gate(confidence=0.95)).passed
    report["old_old"]["tar_at_far"]["0.01"], report["new_old"]["tar_at_far"]["0.01"] = 0.008, 0.012
    report["intervals"]["new_old"] = {"value": 0.012, "low": 0.009, "high": 0.015, "level": 0.95}
    by_chance = judge(report, gate(confidence=0.95))  # better than an old state that is worse than chance
    assert not by_chance.passed and "chance" in by_chance.checks[0].reached


def test_small_groups_and_missing_models_are_not_judged(report: dict[str, Any]) -> None:
    assert judge(report, gate(min_slice_gain=0.9, min_slice_images=1)).failed
    unknown = judge(report, gate(min_slice_gain=0.9, min_slice_images=10_000))
    assert [check.passed for check in unknown.checks] == [
        None
    ] and not unknown.passed  # what cannot be told does not pass
    # "auto" asks where there is something to ask, a bound that somebody wrote is asked always
    bare = {key: value for key, value in report.items() if key != "independent_new"} | {"slices": []}
    auto = gate(min_slice_gain="auto", min_self_ratio="auto")
    assert [check.asked for check in judge(report, auto).checks] == ["at least 0.9700", "not surely below -0.0200"]
    assert judge(bare, auto).checks == () == judge(bare, gate()).checks
    assert GateConfig().min_slice_gain == GateConfig().min_self_ratio == "auto"
    for bound in ({"min_slice_gain": 0.5}, {"min_slice_gain": -0.02}, {"min_self_ratio": 0.5}):
        (check,) = judge(bare, gate(**bound)).checks
        assert (check.passed, check.reached) == (None, "not measured")
    assert not judge(report, gate()).passed  # nothing asked is nothing passed
    del report["flips"]
    with pytest.raises(DataError, match="earlier version"):
        judge(report, gate())


def test_wrong_bounds_are_refused() -> None:
    for values in ({"confidence": 1.5}, {"max_negative_flips": -0.1}, {"min_self_gain": "of"}, {"max_far_ratio": 0.0}):
        with pytest.raises(ValidationError):
            GateConfig(**values)


def test_the_answers_name_numbers_and_losers(report: dict[str, Any]) -> None:
    verdict = judge(report, GateConfig())
    said = answers_of(report, verdict, 100)
    count = len(verdict.checks)
    off = "Not asked: FAR with the old threshold kept (gate.max_far_ratio)."
    assert said.safe == f"Yes: {count} of {count} checks passed. {off}"
    strict = judge(report, GateConfig(max_far_ratio=100.0))
    assert answers_of(report, strict, 100).safe == f"Yes: {count + 1} of {count + 1} checks passed."
    lax = answers_of(report, judge(report, GateConfig(min_self_gain="off")), 100).safe
    assert "Not asked: M(n,n) - M(o,o) (gate.min_self_gain); FAR with the old threshold kept" in lax
    assert (
        f"{report['old_old']['tar_at_far']['0.01']:.3f} to {report['new_old']['tar_at_far']['0.01']:.3f}" in said.gain
    )
    assert (
        "No group of 100 images or more is sure to lose. The smallest gain of those is that of cover: " in said.losers
    )
    assert f"{report['old_threshold_kept']['new_old']['threshold']:.4f}" in said.changes
    assert "not measured" not in said.gain
    # a FAR that nobody has the pairs to measure is not told as if it were
    fewer = {key: {**report[key], "num_impostor": 99} if key == "new_old" else report[key] for key in report}
    assert answers_of(fewer, verdict, 100).gain == (
        f"{said.gain} A FAR of 0.01 was not measured: that takes 100 impostor pairs, and there are 99; these TARs are those with no "
        "false accept at all."
    )
    # the worst estimate alone accuses nobody
    report["slices"][0]["gain"] |= {"value": -0.125, "low": -0.3, "high": 0.05}
    verdict = judge(report, GateConfig())
    said = answers_of(report, verdict, 100)
    assert verdict.passed and "is sure to lose" in said.losers
    assert "is that of cover: mask (-0.125, -0.300 to +0.050), which may be chance." in said.losers
    report["slices"][0]["gain"] |= {"value": -0.125, "low": -0.21, "high": -0.04}
    verdict = judge(report, GateConfig())
    said = answers_of(report, verdict, 100)
    assert said.safe.startswith(
        "No: 1 of 5 checks failed (M(n,o) - M(o,o) of the worst group, cover: mask: -0.1250 (-0.2100 to -0.0400), asked"
    )
    assert said.safe.endswith(f". {off}")
    assert "Groups that lose: cover: mask (-0.125, -0.210 to -0.040). The smallest gain of the others" in said.losers
    assert "chance" not in said.losers


def test_the_page_needs_nothing_else_and_shows_everything(
    upgrade: Upgrade, report: dict[str, Any], tmp_path: Path
) -> None:
    draw_figures(tmp_path, upgrade)
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"matrix", "roc", "det", "similarities", "flips", "backfill", "groups"}
    report["slices"][0]["value"] = "<script>alert(1)</script>"
    verdict = judge(report, GateConfig())
    word = "safe to ship" if verdict.passed else "do not ship"
    page = html_report("a & b", report, verdict, answers_of(report, verdict, 100), tmp_path)
    assert "<script>" not in page and "a &amp; b" in page
    assert page.count("data:image/png;base64,") == 7
    assert "http" not in page.replace("http-equiv", "")
    for question in ("Is it safe to ship?", "What do we gain?", "Who loses?", "What must change?"):
        assert page.index(question) < page.index("The gate")
    assert "by rules set by hand" not in page
    (tmp_path / "roc.png").unlink()
    (tmp_path / "roc.png").mkdir()  # no picture
    page = html_report("a", report, verdict, answers_of(report, verdict, 100), tmp_path, ["gate.confidence=0.5"])
    assert f"{word}, by rules set by hand</div>" in page and page.count("data:image/png;base64,") == 6


def test_many_groups_are_drawn_worst_first_and_a_dollar_is_a_dollar() -> None:
    def group(number: int) -> Slice:
        tar = {"old_old": 0.5, "new_old": 0.5 + number / 1000, "new_new": 0.9}
        gain = Interval(number / 1000, number / 1000 - 0.01, number / 1000 + 0.01, 0.95)
        return Slice("income in $", f"{number} $", 100, 10, 300, tar, {}, {}, gain)

    figure = groups_plot([group(number) for number in range(90)], FAR)
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[0] == r"income in \$" and len(shown) == 41
    assert shown[1].startswith(r"0 \$") and shown[-1].startswith(r"39 \$")  # those that gain least
    assert "the worst 40 of 90" in figure.axes[0].get_title()
