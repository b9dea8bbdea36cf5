"""The comparison of maps by the number of classes: what it takes for the best, its marks, its table."""

from __future__ import annotations

from typing import Any

from benchmarks.bridges import best_of, family_of, lines_of, marks_of, sizes_of


def candidate(name: str, heldout: float, tar: float) -> dict[str, Any]:
    return {"name": name, "heldout": heldout, "tar": tar, "draws": [tar - 0.01, tar, tar + 0.01]}


CANDIDATES = [
    candidate("procrustes", 0.5, 0.52),
    candidate("least_squares 0.01", 0.7, 0.6),
    candidate("least_squares 0.01 to centres", 0.6, 0.9),  # best on unseen identities, which nobody may look at
    candidate("trained linear", 0.8, 0.65),
]


def test_the_best_is_the_one_that_held_out_identities_say() -> None:
    assert best_of(CANDIDATES, None)["name"] == "least_squares 0.01"
    assert best_of(CANDIDATES, "procrustes")["name"] == "procrustes"
    assert family_of("least_squares 0.1 to centres") == "least squares" and family_of("trained mlp") == "trained mlp"


def test_a_choice_that_loses_beyond_chance_is_a_mark_not_met() -> None:
    sizes = sizes_of(quick=True)

    def result_of(manner: str, count: int, seed: int) -> dict[str, Any]:
        name = "trained linear" if manner == "forward" else "procrustes"
        mlp = candidate("trained mlp", 0.1, 0.1)
        return {"candidates": [*CANDIDATES, mlp], "chosen": next(one for one in CANDIDATES if one["name"] == name)}

    met = {mark.name.partition(",")[0]: (round(mark.value, 6), mark.met) for mark in marks_of(sizes, result_of)}
    assert met == {"forward": (0.05, True), "backward": (-0.08, False)}
    lines = lines_of(sizes, result_of)
    assert lines[2] == "| backward | 20 | 0.520 | 0.600 | 0.650 | 0.100 | 0.520 (procrustes) |" and len(lines) == 6
