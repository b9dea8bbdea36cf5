"""The study's own parts: parts of the data do not overlap, work goes on where it ended, numbers and marks by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compatibility import main
from benchmarks.compatibility_cost import MANNERS, Turn, judge_cost
from benchmarks.compatibility_data import Pictures, Share, augmented, faces, part_of, pictures_of
from benchmarks.compatibility_plan import (
    ALL,
    INDEPENDENT,
    LCE_BACKWARD,
    LCE_DIRECT,
    LCE_FORWARD,
    SCENARIOS,
    Budget,
    Cell,
    Contestant,
    Plan,
    Scenario,
    Side,
    Study,
    contestants,
    plan_of,
)
from benchmarks.compatibility_report import Row, dominating, marks_of, picture_of, rows_of, table_of
from benchmarks.compatibility_tuning import SEEDS, SHARE, first_tries, next_try, tune, tuning_source, tuning_table
from benchmarks.compatibility_work import Perform, Result, Results, Task, perform_all
from lce_dist.config import AugmentConfig
from pipelines.augment import augment_table, identity_table

IDENTITIES, PHOTOS, TESTED = 20, 6, 4


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    pixels = torch.randint(0, 256, (IDENTITIES * PHOTOS, 3, 16, 16), dtype=torch.uint8)
    identity_N = np.arange(IDENTITIES).repeat(PHOTOS)
    source = faces(IDENTITIES, PHOTOS, 32, TESTED, 0.5)
    return pictures_of(source, pixels, identity_N, tuple(f"face-{i}" for i in range(IDENTITIES)), "f" * 64)


def test_shares_meet_without_overlap(pictures: Pictures) -> None:
    assert len(pictures.tested) == TESTED * PHOTOS
    for of in ("identities", "images"):
        low, high = (part_of(pictures, Share(of, *ends), 7) for ends in ((0.0, 0.3), (0.3, 1.0)))
        both = np.concatenate([low.positions, high.positions])
        assert sorted(both) == sorted(pictures.trained)
        assert not set(both) & set(pictures.tested)
        shared = set(low.identities) & set(high.identities)
        assert len(shared) == (0 if of == "identities" else IDENTITIES - TESTED)
        for part in (low, high):
            names = [part.identities[label] for label in part.labels]
            assert names == [pictures.keys[i] for i in pictures.identity_N[part.positions]]
    halves = [part_of(pictures, Share("images", 0.0, 0.5), seed).positions for seed in (7, 7, 8)]
    assert np.array_equal(halves[0], halves[1]) and not np.array_equal(halves[0], halves[2])
    assert all(count == PHOTOS // 2 for count in np.bincount(pictures.identity_N[halves[0]]) if count)


def test_augmentation_by_hand() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = pixels.float() / 127.5 - 1.0
    table = replace(identity_table(2), brightness=np.array([0.5, 1.0], dtype=np.float32))
    torch.testing.assert_close(augmented(pixels, table)[1], plain[1], atol=1e-5, rtol=0.0)
    table.mirror[1] = 1
    found = augmented(pixels, table)
    torch.testing.assert_close(found[1], plain[1].flip(2), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(found[0], 0.5 * pixels[0].float() / 127.5 - 1.0, atol=1e-5, rtol=0.0)
    # the lower right quarter: every pixel of it covers four, so the corner pixel is the source's corner
    table = identity_table(1)
    table.crop_anchor_xy[:], table.crop_size_wh[:] = 0.5, 0.5
    torch.testing.assert_close(augmented(pixels[:1], table)[0, :, -1, -1], plain[0, :, -1, -1], atol=1e-5, rtol=0.0)
    drawn = augment_table(AugmentConfig(), 1, 0, np.arange(2))
    assert float(augmented(pixels, drawn).abs().max()) <= 1.0


def start(folder: Path) -> Perform:
    """Runs in the study's processes; leaves a line a call."""

    def perform(task: Task) -> Result:
        with (folder / "calls.txt").open("a") as file:
            file.write(task.title + "\n")
        if task.title == "bad":
            raise ValueError("no luck")
        return {"value": task.job, "line": "done"}

    return perform


def task(title: str, needs: tuple[str, ...] = ()) -> Task:
    return Task(title, "all", {"title": title}, len(title), needs)


def test_work_goes_on_where_it_ended(tmp_path: Path) -> None:
    first, bad = task("first"), task("bad")
    tasks = [task("second", (first.key,)), first, bad, task("third", (bad.key,))]
    results = Results(tmp_path / "cells")
    said: list[str] = []
    failed = perform_all(tasks, results, start, (tmp_path,), 2, said.append)
    calls = (tmp_path / "calls.txt").read_text().split()
    assert sorted(calls) == ["bad", "first", "second"] and calls.index("first") < calls.index("second")
    assert set(failed) == {bad.key, tasks[3].key} and "no luck" in failed[bad.key]
    found = results.get(first.key)
    assert found is not None and found["value"] == 5 and found["settings"] == {"title": "first"}

    # what is torn (or half written by a killed process) is made again, what is whole is not
    (tmp_path / "cells" / f"{first.key}.json").write_text('{"value": ')
    failed = perform_all(tasks[:2], results, start, (tmp_path,), 1, said.append)
    assert not failed and results.get(first.key) is not None
    assert (tmp_path / "calls.txt").read_text().split()[3:] == ["first"]


SIDE = Side("tiny8", 8, "cosface", ALL)
SCENARIO = Scenario("extended-class", SIDE, SIDE)
OURS = {"direct": LCE_DIRECT, "backward": LCE_BACKWARD, "forward": LCE_FORWARD}


def numbers(tar: float) -> dict[str, Any]:
    return {"tar": tar, "rank1": tar / 2, "draws": [tar - 0.01, tar, tar + 0.01]}


def judged(lce: tuple[float, float], rival: tuple[float, float], manner: str = "direct") -> list[Row]:
    """Rows of two seeds with M(o,o) = 0.6, M(*,*) = 0.8; (M(n,o), M(n,n)) of each, the second seed 0.02 higher."""
    cells, files = [], {}
    mode = (("mode", f"training-{manner}"),)
    ours, bct = (Contestant(name, "training", mode) for name in (OURS[manner], "bct"))
    # of another manner, and better on both axes: it is nobody's rival here
    other = Contestant("l2", "training", (("mode", "training-forward" if manner != "forward" else "training-direct"),))
    for seed in (0, 1):
        old, new = f"old{seed}", f"new{seed}"
        files |= {old: {"numbers": {"self": numbers(0.6)}}, new: {"numbers": {"self": numbers(0.8)}}}
        for contestant, values in ((INDEPENDENT, None), (ours, lce), (bct, rival), (other, (0.9, 0.9))):
            own = task(f"{contestant.name} {seed}")
            found = {"cross": numbers(0.02)}
            if values is not None:
                found = {"cross": numbers(values[0] + 0.02 * seed), "self": numbers(values[1] + 0.02 * seed)}
            files[own.key] = {"numbers": found, "about": {}, "seconds": 3.0}
            cells.append(Cell("faces", SCENARIO, contestant, seed, own, None, old, new))
    refused = Contestant("ract", "training", (("mode", "training-direct"),))
    cells.append(Cell("faces", SCENARIO, refused, 0, None, "dimensions differ", "old0", "new0"))
    return rows_of(cells, json.loads(json.dumps(files)).get)


def test_numbers_by_hand() -> None:
    rows = {row.contestant: row for row in judged((0.64, 0.78), (0.61, 0.79))}
    lce = rows[LCE_DIRECT]
    assert math.isclose(lce.mean("lead"), 0.05) and math.isclose(lce.mean("gain"), 0.25)
    assert math.isclose(lce.mean("kept"), 0.79 / 0.8)
    p_comp = (1 / (1 + math.exp(-0.2)) + 1 / (1 + math.exp(-0.3))) / 2
    assert math.isclose(lce.mean("P_comp"), p_comp)
    assert math.isclose(lce.values["M(n,o)"].between_seeds, 0.02 / math.sqrt(2))
    # new/old and old/old move together with the identities: their difference does not move
    assert math.isclose(lce.values["lead"].interval[0], 0.05) and math.isclose(lce.values["lead"].interval[1], 0.05)
    assert lce.values["M(n,o)"].interval[0] < 0.645
    assert math.isclose(rows[INDEPENDENT.name].mean("kept"), 1.0)
    assert rows["ract"].missing == "refused: dimensions differ"


def test_plan_shares_models_and_says_what_is_refused() -> None:
    source = faces(IDENTITIES, PHOTOS, 32, TESTED, 0.5)
    budget = Budget(10, 20, 8, 0.1, 16.0)

    def plan(steps: int, lr: float, only: str) -> Plan:
        budgets = {"faces": replace(budget, new_steps=steps, lr=lr)}
        weights = {("faces", one.name): 1.0 for one in contestants() if one.tuned}
        study = Study((source,), {"faces": "f" * 64}, budgets, SCENARIOS, contestants(), (1, 2), weights)
        return plan_of(study, lambda place: only in place)

    whole = plan(20, 0.1, "")
    kinds = [task.settings["kind"] for task in whole.tasks]
    # of each seed: old models on half of the images or identities, 0.3 of each, softmax, tiny8, 512; new ones on all,
    # 0.7 of images or identities, tiny8, 512
    assert kinds.count("model") == 2 * (7 + 5)
    assert len({cell.task.key for cell in whole.cells if cell.task is not None}) == kinds.count("cell")
    refused = [cell for cell in whole.cells if cell.refused is not None]
    assert {cell.scenario.name for cell in refused} == {"dimension: 128 to 512", "dimension: 512 to 128"}
    assert {"bct", LCE_DIRECT, "mapping backward, procrustes"} <= {cell.contestant.name for cell in refused}
    assert not {LCE_BACKWARD, LCE_FORWARD, INDEPENDENT.name} & {cell.contestant.name for cell in refused}
    few = {cell.scenario.name for cell in whole.cells if cell.contestant.name == "mapping forward, FCT"}
    assert few == {"extended-class", "open-class", "network: small to large"}

    bct = [
        plan(20, 0.1, "extended-class, bct"),
        plan(21, 0.1, "extended-class, bct"),
        plan(20, 0.2, "extended-class, bct"),
    ]
    assert [len(one.tasks) for one in bct] == [6, 6, 6]  # of each seed: old, independent, the cell itself
    keys = [{task.key for task in one.tasks} for one in bct]
    assert keys[0] <= {task.key for task in whole.tasks}
    assert len(keys[0] & keys[1]) == 2 and not keys[0] & keys[2]  # old models do not train the new one's steps


def test_marks_and_dominance_by_hand() -> None:
    good = {mark.name: mark for mark in marks_of(judged((0.64, 0.78), (0.61, 0.79)))}
    assert all(mark.met for mark in good.values()) and len(good) == 3
    for manner, kept in (
        ("backward", False),
        ("forward", False),
        ("direct", True),
    ):  # 0.985 of M(*,*): maps must keep 0.99
        mapped = marks_of(judged((0.60, 0.778), (0.62, 0.79), manner))
        assert [mark.met for mark in mapped] == [True, kept, False], "a rival of the same manner is better on both axes"
    rows = judged((0.60, 0.75), (0.62, 0.77))
    bad = marks_of(rows)
    assert [mark.met for mark in bad] == [True, False, False]  # lead 0.01, kept 0.95, dominated
    (rivalry,) = dominating(rows, next(row for row in rows if row.contestant == LCE_DIRECT))
    assert rivalry.rival == "bct" and rivalry.clear and math.isclose(rivalry.lead, 0.02)
    table = table_of(rows)
    assert "Better than LCE direct on both axes: bct (by 0.020 and 0.020)" in table
    assert "| ract | refused: dimensions differ |" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert widths == {13}
    (panel,) = picture_of(rows, "faces").axes
    assert panel.get_legend_handles_labels()[1] == [LCE_DIRECT, "bct", "l2"]


def test_tuning_tests_on_training_identities_and_trains_on_the_others(pictures: Pictures) -> None:
    arguments = (pictures.pixels_NCHW, pictures.identity_N, pictures.keys, pictures.fingerprint)
    tuning = pictures_of(tuning_source(pictures.source), *arguments)
    tested, trained, never = (set(pictures.identity_N[of]) for of in (tuning.tested, tuning.trained, pictures.tested))
    assert len(tested) == round(SHARE * (IDENTITIES - TESTED)) and not tested & trained
    assert not never & (tested | trained) and len(tested | trained) == IDENTITIES - TESTED


def test_tries_go_outwards_from_an_end_and_then_once_between() -> None:
    assert first_tries(8.0, 4.0) == (2.0, 8.0, 32.0)
    tries = [(2.0, 0.3), (8.0, 0.2), (32.0, 0.1)]
    assert next_try(tries, 4.0, math.inf) == 0.5
    rising = [(weight, -score) for weight, score in tries]
    assert next_try(rising, 4.0, math.inf) == 128.0
    assert next_try(rising, 4.0, 100.0) == 16.0, "below its limit"
    assert next_try([(2.0, 0.1), (8.0, 0.3), (32.0, 0.2)], 4.0, math.inf) == 16.0
    assert next_try([(2.0, 0.2), (8.0, 0.3), (32.0, 0.1)], 4.0, math.inf) == 4.0
    assert next_try([(2.0, 0.2), (8.0, 0.3), (32.0, 0.1), (4.0, 0.25)], 4.0, math.inf) is None
    far = [(4.0**power, power) for power in range(6)]
    assert next_try(far, 4.0, math.inf) == 512.0, "six outwards are enough"
    assert next_try([*far, (512.0, 9.0)], 4.0, math.inf) is None


def test_each_weight_is_chosen_by_tries_and_nothing_is_where_one_is_missing() -> None:
    source = faces(IDENTITIES, PHOTOS, 32, TESTED, 0.5)
    study = Study(
        (source,), {"faces": "f" * 64}, {"faces": Budget(10, 20, 8, 0.1, 16.0)}, SCENARIOS, contestants(), (1,)
    )
    asked = [(source, one) for one in contestants() if one.name in ("bct", LCE_BACKWARD, "mixbct")]
    assert not {cell.task for cell in plan_of(study, lambda place: ", bct," in place).cells} - {None}
    files: dict[str, Result] = {}
    lost: set[str] = set()

    def perform(plan: Plan) -> None:
        """The heavier the better, up to four times the default; all of the tuning's seeds."""
        for one in plan.tasks:
            assert one.settings["seed"] in SEEDS and one.settings["tuning_share"] == SHARE
            files[one.key] = {
                "numbers": {"self": numbers(0.6 if "old" in one.title else 0.8)},
                "about": {},
                "seconds": 1.0,
            }
            if one.settings["kind"] == "cell":
                compat = one.settings["compat"]
                weight = (
                    compat["method_weight"]
                    if "method_weight" in compat and compat["method"] != "lce"
                    else compat["align_weight"]
                )
                defaults = {"bct": 1.0, "mixbct": 0.3, "lce": 8.0}
                near = -abs(math.log(weight / defaults[compat["method"]] / 4.0))
                files[one.key]["numbers"]["cross"] = numbers(0.6 + 0.01 * near)
                if compat["method"] in lost:
                    del files[one.key]

    tuned = tune(study, asked, files.get, perform)
    bct = tuned["faces", "bct"]
    assert (
        [one.weight for one in bct.tries] == [0.25, 1.0, 4.0, 16.0, 2.0]
        and bct.chosen == 4.0
        and bct.key == "method_weight"
    )
    assert tuned["faces", LCE_BACKWARD].chosen == 32.0 and tuned["faces", LCE_BACKWARD].default == 8.0
    assert max(one.weight for one in tuned["faces", "mixbct"].tries) < 1.0, "a share of the rows"
    table = tuning_table(tuned.values())
    assert "| faces: bct | `method_weight` | 1 | 0.25: " in table and "**4: 0.5000**" in table
    weights = {key: one.chosen for key, one in tuned.items()}
    (cell,) = plan_of(replace(study, weights=weights), lambda place: "extended-class, bct" in place).cells
    assert cell.task is not None and cell.task.settings["compat"]["method_weight"] == 4.0

    lost.add("bct")
    files.clear()
    assert set(tune(study, asked, files.get, perform)) == {("faces", LCE_BACKWARD), ("faces", "mixbct")}


def test_a_mapped_and_a_trained_backward_cell_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command, over few faces: tuning, old and new models, a map alone and a model trained through one."""
    chosen = "extended-class, (LCE backward, seed|mapping backward, chosen T)"
    arguments = [
        "--quick",
        "--processes",
        "1",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path),
        "--only",
        chosen,
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    (record,) = tmp_path.glob("compatibility-quick-*.json")
    raw = json.loads(record.read_text())["raw"]
    rows = {row["contestant"]: row for row in raw["rows"]}
    assert set(rows) == {LCE_BACKWARD, "mapping backward, chosen T"} and not raw["failed"]
    for row in rows.values():
        assert row["missing"] is None and row["about"][0]["candidates"] and row["values"]["M(n,o)"]["mean"] > 0.2
    (weight,) = raw["tuning"]["weights"]
    assert len(weight["tries"]) == 4 and weight["chosen"] in [one["weight"] for one in weight["tries"]]
    # what is done is not done again, and says the same
    assert main([*arguments, "--report"]) == 0
    assert json.loads(record.read_text())["raw"] == raw


def test_what_each_manner_adds_to_a_step_is_judged() -> None:
    added = {
        "training-direct": (0.01, 0.02, 0.03),
        "training-backward": (0.04, 0.2, 0.02),
        "training-forward": (0.06, 0.07, 0.0),
    }
    turns = {name: [Turn(2.0, 2.0 * (1.0 + one)) for one in ratios] for name, ratios in added.items()}
    marks = judge_cost(turns, 100)
    assert [(round(float(mark.value), 6), mark.met) for mark in marks] == [(0.02, True), (0.04, True), (0.06, False)]
    assert set(turns) == set(MANNERS)
