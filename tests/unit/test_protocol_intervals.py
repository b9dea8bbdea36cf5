"""`lce evaluate` says how sure its numbers are, and what `--old` decides otherwise, over real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.cli import main
from launch.protocol_intervals import _accuracies
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.list_intervals import Scored, drawn_weights, resampled_means, resampled_rates
from lce_dist.evaluation.retrieval import retrieve
from lce_dist.evaluation.verification import accuracy_by_folds, roc_of_scores, score_pairs
from lce_dist.vector_files import Block, write_vectors

NUM, PEOPLE, DIM = 120, 24, 8
LABELS = np.arange(NUM, dtype=np.int64) // 5
WHO = [f"person {label:02}" for label in LABELS]
KEYS = [f"{n:03}.jpg" for n in range(NUM)]


def rows(seed: int, noise: float = 0.9) -> np.ndarray:
    likes = np.random.default_rng(5).normal(size=(PEOPLE, DIM))[LABELS]
    made = likes + noise * np.random.default_rng(seed).normal(size=likes.shape)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def stored(path: Path, made: np.ndarray, who: list[str] | None = WHO) -> Path:
    write_vectors(path, DIM, len(made), [Block(KEYS[: len(made)], made, who)])
    return path


def embedded(made: np.ndarray) -> EmbeddingSet:
    return EmbeddingSet("m", made, LABELS, np.arange(NUM, dtype=np.int64))


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(1)
    first, second = np.triu_indices(NUM, 1)
    genuine = LABELS[first] == LABELS[second]
    chosen = np.concatenate([np.flatnonzero(genuine)[:200], draw.permutation(np.flatnonzero(~genuine))[:400]])
    chosen = draw.permutation(chosen)
    first, second, genuine = first[chosen], second[chosen], genuine[chosen]
    path = tmp_path / "pairs.csv"
    lines = (f"{KEYS[a]},{KEYS[b]},{int(g)}\n" for a, b, g in zip(first, second, genuine, strict=True))
    path.write_text("first,second,genuine\n" + "".join(lines))
    return path, first, second, genuine


def numbers(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json", "-"]) == 0
    caught = capsys.readouterr()
    return json.loads(caught.out), caught.err


def test_pairs_with_intervals_and_flips(tmp_path, pairs, capsys):
    path, first, second, genuine = pairs
    new, old = stored(tmp_path / "new.npz", rows(2, 0.6)), stored(tmp_path / "old.npz", rows(1), None)
    found, table = numbers(capsys, "pairs", path, "--query", new, "--old", old, "--far", 0.01, 0.1)
    one, before = embedded(rows(2, 0.6)), embedded(rows(1))
    score, was = score_pairs(one, one, first, second), score_pairs(before, before, first, second)
    told = found["intervals"]
    assert (told["drawn"], told["num_drawn"], told["num_samples"]) == ("identities", PEOPLE, 1000)
    weights = drawn_weights(PEOPLE, 1000)
    tar_FB = resampled_rates(Scored(score, genuine, LABELS[first], LABELS[second]), [0.01, 0.1], weights)
    for key, tar_B in zip(("0.01", "0.1"), tar_FB, strict=True):
        interval = told["tar_at_far"][key]
        assert interval["value"] == found["tar_at_far"][key]
        assert (interval["low"], interval["high"]) == pytest.approx(
            np.quantile(tar_B, [0.025, 0.975]).tolist(), abs=1e-4
        )
        assert interval["low"] < interval["value"] < interval["high"]
        assert f"[{interval['low']:.5f}, {interval['high']:.5f}]" in table
    assert "95 % intervals over" in table and f"{PEOPLE} identities" in table
    # accuracy: right decisions of each fold at its own threshold
    accuracy = accuracy_by_folds(score, genuine)
    interval = told["accuracy"]
    assert interval["value"] == accuracy.mean and interval["low"] < accuracy.mean < interval["high"]
    assert interval["high"] - interval["low"] < 0.2
    # flips, pair by pair
    for position, far in enumerate((0.01, 0.1)):
        before_at, after_at = (roc_of_scores(each, genuine).at([0.01, 0.1])[1][position] for each in (was, score))
        flips = found["flips"][repr(far)]
        assert flips["negative"] == sum((was >= before_at) & (score < after_at) & genuine)
        assert flips["positive"] == sum((was < before_at) & (score >= after_at) & genuine)
        assert flips["num_genuine"] == genuine.sum() and flips["positive"] > 0
        rate = told["negative_flips"][repr(far)]
        assert rate["low"] <= rate["value"] == flips["negative_rate"] <= rate["high"]
    assert "accepted before" in table and "old model: TAR" in table
    # images that the old file lacks
    few = stored(tmp_path / "few.npz", rows(1)[:50], None)
    assert main(["evaluate", "pairs", str(path), "--query", str(new), "--old", str(few)]) == 2
    assert "few.npz lacks the key of row" in capsys.readouterr().err


def test_pairs_of_nobody_are_drawn_by_what_links_them(tmp_path, capsys):
    """As of a .bin file: each image in one pair."""
    vectors = stored(tmp_path / "v.npz", rows(2), None)
    path = tmp_path / "pairs.csv"
    lines = [
        f"{KEYS[5 * k]},{KEYS[5 * k + 1]},1\n{KEYS[5 * k + 2]},{KEYS[(5 * k + 13) % NUM]},0\n" for k in range(PEOPLE)
    ]
    path.write_text("first,second,genuine\n" + "".join(lines))
    found, _ = numbers(capsys, "pairs", path, "--query", vectors, "--far", 0.1, "--folds", 0)
    assert found["intervals"]["drawn"].startswith("groups of images") and found["intervals"]["num_drawn"] == 3 * PEOPLE
    assert "accuracy" not in found["intervals"] and found["intervals"]["tar_at_far"]["0.1"]["low"] < 1.0


def test_templates_identify_and_retrieve(tmp_path, capsys):
    vectors = stored(tmp_path / "v.npz", rows(2))
    templates = tmp_path / "templates.csv"
    templates.write_text(
        "template_id,media_id,key\n" + "".join(f"t{n // 2},m{n},{key}\n" for n, key in enumerate(KEYS))
    )
    of_template = [LABELS[2 * t] for t in range(NUM // 2)]
    some = [(a, b) for a in range(NUM // 2) for b in range(a + 1, NUM // 2)]
    path = tmp_path / "pairs.csv"
    lines = (f"t{a},t{b},{int(of_template[a] == of_template[b])}\n" for a, b in some)
    path.write_text("first,second,genuine\n" + "".join(lines))
    found, _ = numbers(capsys, "templates", path, "--templates", templates, "--query", vectors, "--far", 0.01)
    told = found["intervals"]
    assert (told["drawn"], told["num_drawn"]) == ("identities", PEOPLE)
    assert told["tar_at_far"]["0.01"]["low"] < found["tar_at_far"]["0.01"] < told["tar_at_far"]["0.01"]["high"]

    probes, enrolled = tmp_path / "probes.csv", tmp_path / "enrolled.csv"
    probes.write_text("key,identity\n" + "".join(f"{KEYS[n]},{WHO[n]}\n" for n in range(NUM) if n % 5))
    enrolled.write_text("key,identity\n" + "".join(f"{KEYS[n]},{WHO[n]}\n" for n in range(0, NUM // 2, 5)))
    words = ("--probes", probes, "--enrolled", enrolled, "--query", vectors, "--fpir", 0.1, 0.3)
    found, table = numbers(capsys, "identify", *words)
    told = found["intervals"]
    assert told["num_drawn"] == PEOPLE and "identities of the probes" in table
    for kind in ("tpir_at_fpir", "rank"):
        for key, value in found[kind].items():
            assert told[kind][key]["value"] == value and told[kind][key]["low"] <= value <= told[kind][key]["high"]
    assert told["tpir_at_fpir"]["0.1"]["low"] < told["tpir_at_fpir"]["0.1"]["high"]

    found, _ = numbers(capsys, "retrieve", "--query", vectors)
    truth = retrieve(embedded(rows(2)), embedded(rows(2)))
    mean_B = resampled_means(truth.average_precision_Q[:, None], LABELS[truth.query_Q], drawn_weights(PEOPLE, 1000))[0]
    interval = found["intervals"]["mean_average_precision"]
    assert interval["value"] == found["mean_average_precision"]
    assert (interval["low"], interval["high"]) == pytest.approx(np.quantile(mean_B, [0.025, 0.975]).tolist(), abs=1e-6)
    assert found["intervals"]["rank"]["1"]["low"] < found["rank"]["1"]


def test_the_accuracys_interval_holds_it_where_folds_are_small(tmp_path, capsys):
    """Vectors that are all equal are right about impostors alone: half of each fold, whoever is drawn."""
    vectors = stored(tmp_path / "v.npz", np.tile(rows(2)[:1], (NUM, 1)))
    path = tmp_path / "pairs.csv"
    lines = [f"{KEYS[5 * k]},{KEYS[5 * k + 1]},1\n{KEYS[5 * k]},{KEYS[5 * k - 5]},0\n" for k in range(PEOPLE)]
    path.write_text("first,second,genuine\n" + "".join(lines))
    found, _ = numbers(capsys, "pairs", path, "--query", vectors, "--folds", 6)
    assert found["accuracy"]["mean"] == 0.5
    interval = found["intervals"]["accuracy"]
    assert interval["low"] <= 0.5 <= interval["high"] and interval["high"] - interval["low"] < 0.2

    # as a loop: each kind of a fold is as large as the list has it
    score, genuine, fold = np.arange(8.0), np.array([1, 1, 0, 0, 1, 0, 0, 0], dtype=bool), np.array([0] * 4 + [1] * 4)
    right = np.array([1, 0, 1, 0, 1, 1, 0, 1], dtype=bool)
    first, second = np.array([0, 1, 2, 0, 2, 1, 0, 1]), np.array([0, 1, 1, 2, 2, 0, 2, 2])
    weights = np.array([[1, 1, 1], [2, 1, 0], [3, 0, 0], [0, 2, 1]], dtype=np.float32)
    truth = []
    for weight in weights.astype(float):
        total, known = 0.0, 0.0
        for k in (0, 1):
            for kind in (True, False):
                chosen = [p for p in range(8) if fold[p] == k and genuine[p] == kind]
                each = [weight[first[p]] * (1.0 if kind else weight[second[p]]) for p in chosen]
                if sum(each) > 0.0:
                    share = sum(w * right[p] for w, p in zip(each, chosen, strict=True)) / sum(each)
                    total, known = total + share * len(chosen) / 4, known + len(chosen) / 4
        truth.append(total / known)
    found_B = _accuracies(Scored(score, genuine, first, second), right, fold, weights)
    np.testing.assert_allclose(found_B, truth, rtol=1e-12)
    assert found_B[0] == pytest.approx(np.mean(right[fold == 0]) / 2 + np.mean(right[fold == 1]) / 2)
