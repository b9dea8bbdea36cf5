"""The board shows what a run offers: every gauge, and nothing that does not exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from launch.raytrain import GAUGES

BOARD = Path(__file__).parents[2] / "k8s" / "monitoring" / "grafana-lce.json"


def test_the_board_and_the_gauges_agree() -> None:
    board = json.loads(BOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert {name for text in expressions for name in re.findall(r"ray_(lce_\w+)", text)} == set(GAUGES)
    assert all(text.count("(") == text.count(")") and "$run" in text for text in expressions)
    used = set(re.findall(r"(?:by \(|\{\{)(\w+)", " ".join(expressions))) | {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"{{(\w+)}}", target["legendFormat"])
    }
    assert used <= {"run", "rank", "stage"}


def test_no_two_panels_lie_on_each_other() -> None:
    cells = [
        (x, y)
        for panel in json.loads(BOARD.read_text())["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
