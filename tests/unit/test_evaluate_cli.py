"""`lce evaluate` over real files: the numbers of the library, formats, bridges, and refusals of one line."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from launch.evaluate_cli import add_evaluate_commands
from lce_dist.compat.artefact import map_rows, read_bridge, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.errors import CheckpointError, ConfigError, DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.identification import identify
from lce_dist.evaluation.metrics import compare
from lce_dist.evaluation.protocol_figures import curve_points, identification_curves, verification_curves
from lce_dist.evaluation.retrieval import retrieve
from lce_dist.evaluation.templates import pool_templates
from lce_dist.evaluation.verification import accuracy_by_folds, roc_of_scores, score_pairs
from lce_dist.vector_files import Block, open_vectors, write_vectors

NUM, NEW_DIM, OLD_DIM = 60, 8, 6
KEYS = [f"{n // 5}/photo {n:03}.jpg" for n in range(NUM)]
PEOPLE = [f"person {n // 5}" for n in range(NUM)]
LABELS = np.arange(NUM) // 5


def lce(*words: object) -> None:
    parser = argparse.ArgumentParser()
    add_evaluate_commands(parser.add_subparsers())
    arguments = parser.parse_args(["evaluate", *map(str, words)])
    arguments.run(arguments)


def numbers(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    capsys.readouterr()
    lce(*words, "--json", "-")
    return json.loads(capsys.readouterr().out)


def some_rows(dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(5).normal(size=(NUM // 5, dim))
    rows = centres[LABELS] + 0.9 * rng.normal(size=(NUM, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def stored(path: Path, rows: np.ndarray, keys: list[str] = KEYS, people: list[str] | None = PEOPLE) -> Path:
    write_vectors(path, rows.shape[1], len(rows), [Block(keys, rows, people)])
    return path


def listed(path: Path, head: str, rows: list[tuple]) -> Path:
    path.write_text(head + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def embedding_set(rows: np.ndarray, labels: np.ndarray = LABELS, ids: np.ndarray | None = None) -> EmbeddingSet:
    return EmbeddingSet("m", rows, labels, np.arange(len(rows)) if ids is None else ids)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of one dimension, in two formats, the second in another order."""
    order = np.random.default_rng(0).permutation(NUM)
    old = stored(tmp_path / "old.npz", some_rows(NEW_DIM, 2)[order], [KEYS[n] for n in order], None)
    return stored(tmp_path / "new.parquet", some_rows(NEW_DIM, 1)), old


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    made = build_bridge("linear", NEW_DIM, OLD_DIM, seed=3).eval()
    card = {"kind": "linear", "dim_in": NEW_DIM, "dim_out": OLD_DIM, "direction": "new_to_old"}
    save_bridge(tmp_path / "bridge", made, card)
    return tmp_path / "bridge"


def some_pairs(num: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    first = rng.permutation(np.repeat(np.arange(NUM), 2))[:num]
    genuine = np.arange(num) % 2 == 0
    second = np.where(genuine, first // 5 * 5 + (first + 1 + np.arange(num) // 2 % 4) % 5, (first + 7) % NUM)
    kept = np.unique(first * NUM + second, return_index=True)[1]
    kept = np.sort(kept[first[kept] != second[kept]])
    return first[kept], second[kept], LABELS[first[kept]] == LABELS[second[kept]]


def test_pairs_of_two_models(tmp_path, files, capsys):
    first, second, genuine = some_pairs()
    path = listed(
        tmp_path / "pairs.csv",
        "first,second,genuine",
        [(KEYS[a], KEYS[b], int(same)) for a, b, same in zip(first, second, genuine, strict=True)],
    )
    found = numbers(capsys, "pairs", path, "--query", files[0], "--gallery", files[1], "--far", "0.1", "0.01")
    scores = score_pairs(embedding_set(some_rows(NEW_DIM, 1)), embedding_set(some_rows(NEW_DIM, 2)), first, second)
    roc = roc_of_scores(scores, genuine)
    tar, threshold = roc.at([0.1, 0.01])
    assert list(found["tar_at_far"].values()) == pytest.approx(tar.tolist(), abs=1e-12)
    assert list(found["threshold_at_far"].values()) == pytest.approx(threshold.tolist(), abs=1e-6)
    assert found["equal_error_rate"] == pytest.approx(roc.equal_error_rate)
    accuracy = accuracy_by_folds(scores, genuine)
    assert found["accuracy"]["folds"] == accuracy.accuracy_K.tolist()
    assert (found["accuracy"]["mean"], found["accuracy"]["std"]) == (accuracy.mean, accuracy.std)
    assert (found["num_genuine"], found["num_impostor"]) == (genuine.sum(), (~genuine).sum())
    assert (found["query"], found["gallery"], found["bridge"]) == (str(files[0]), str(files[1]), None)
    # one model alone, no folds
    alone = numbers(capsys, "pairs", path, "--query", files[0], "--folds", 0)
    own = score_pairs(embedding_set(some_rows(NEW_DIM, 1)), embedding_set(some_rows(NEW_DIM, 1)), first, second)
    assert alone["equal_error_rate"] == pytest.approx(roc_of_scores(own, genuine).equal_error_rate)
    assert "accuracy" not in alone


def test_folds_of_lfw_are_its_own(tmp_path, capsys):
    keys = [f"P{n // 5}/P{n // 5}_{n % 5 + 1:04}.jpg" for n in range(NUM)]
    vectors = stored(tmp_path / "lfw.npz", some_rows(NEW_DIM, 1), keys, None)
    lines, first, second = ["3\t4"], [], []
    for fold in range(3):
        for k in range(4):
            person = fold * 4 + k
            lines.append(f"P{person}\t1\t{2 + k}")
            first.append(person * 5)
            second.append(person * 5 + 1 + k)
        for k in range(4):
            person = fold * 4 + k
            lines.append(f"P{person}\t2\tP{(person + 1) % 12}\t3")
            first.append(person * 5 + 1)
            second.append((person + 1) % 12 * 5 + 2)
    path = tmp_path / "pairs.txt"
    path.write_text("\n".join(lines) + "\n")
    found = numbers(capsys, "pairs", path, "--query", vectors)
    one = embedding_set(some_rows(NEW_DIM, 1))
    genuine = np.tile(np.repeat([True, False], 4), 3)
    truth = accuracy_by_folds(score_pairs(one, one, np.array(first), np.array(second)), genuine, 3)
    assert found["accuracy"]["folds"] == truth.accuracy_K.tolist()


@pytest.mark.parametrize("side", ["query", "gallery"])
def test_a_bridge_maps_one_side(tmp_path, bridge, capsys, side):
    new, old = some_rows(NEW_DIM, 1), some_rows(OLD_DIM, 2)
    mapped = map_rows(read_bridge(bridge), torch.from_numpy(new)).numpy()
    new_file, old_file = stored(tmp_path / "new.npy", 3.0 * new), stored(tmp_path / "old.npz", old)
    if side == "query":  # what the card says
        found = numbers(
            capsys,
            "all-pairs",
            "--query",
            new_file,
            "--gallery",
            old_file,
            "--bridge",
            bridge,
            "--far",
            0.1,
            "--lengths",
            "normalise",
        )
        truth = compare(embedding_set(mapped), embedding_set(old), [0.1])
    else:
        found = numbers(
            capsys, "all-pairs", "--query", old_file, "--gallery", new_file, "--bridge", bridge, "--map", "gallery",
            "--far", 0.1, "--lengths", "normalise"
        )  # fmt: skip
        truth = compare(embedding_set(old), embedding_set(mapped), [0.1])
    assert found["tar_at_far"] == pytest.approx(truth.tar_at_far, abs=1e-12)
    assert found["threshold_at_far"] == pytest.approx(truth.threshold_at_far, abs=2e-6)
    assert found["rank1"] == truth.rank1
    assert found["bridge"] == str(bridge)


@pytest.mark.parametrize("lengths", ["unit", "keep"])
def test_templates_of_two_models(tmp_path, capsys, lengths):
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.5, 2, (NUM, 1)) if lengths == "keep" else 1.0
    new, old = (some_rows(NEW_DIM, 1) * scale).astype(np.float32), some_rows(NEW_DIM, 2)
    template, media, weight = np.arange(NUM) // 2 + 100, np.arange(NUM) % 3, rng.uniform(0.1, 1, NUM).round(3)
    # the list also has a template that no pair needs, of an image that no file has
    members = listed(
        tmp_path / "templates.csv",
        "template_id,media_id,key,weight",
        [(template[n], media[n], KEYS[n], weight[n]) for n in rng.permutation(NUM)] + [(999, 1, "elsewhere.jpg", 1)],
    )
    first, second = np.arange(100, 129), np.arange(101, 130)
    genuine = LABELS[(first - 100) * 2] == LABELS[(second - 100) * 2]
    path = listed(
        tmp_path / "pairs.csv",
        "first,second,genuine",
        [(a, b, int(same)) for a, b, same in zip(first, second, genuine, strict=True)],
    )
    new_file, old_file = stored(tmp_path / "new.npz", new), stored(tmp_path / "old.npz", old)
    words = ["templates", path, "--templates", members, "--query", new_file, "--gallery", old_file]
    found = numbers(capsys, *words, "--lengths", lengths, "--far", 0.1)
    rows = np.arange(NUM)
    query = pool_templates("q", new, rows, template, media, weight)
    gallery = pool_templates("g", old, rows, template, media, weight)
    roc = roc_of_scores(score_pairs(query, gallery, first - 100, second - 100), genuine)
    assert found["tar_at_far"]["0.1"] == pytest.approx(roc.at([0.1])[0][0])
    assert found["threshold_at_far"]["0.1"] == pytest.approx(roc.at([0.1])[1][0], abs=1e-6)
    assert found["weighted"] is True
    if lengths == "keep":
        with pytest.raises(
            DataError, match=r"new\.npz: row 1 has length .*; must be 1, within 0\.001.*--lengths normalise"
        ):
            lce(*words)


@pytest.mark.parametrize("templates", [False, True])
def test_identification_of_two_models(tmp_path, files, capsys, templates):
    probes = np.arange(0, NUM, 2)
    enrolled = np.array([n for n in range(1, NUM, 2) if LABELS[n] < 8])
    name = (lambda n: n + 1000) if templates else (lambda n: KEYS[n])
    lists = [
        listed(tmp_path / f"{what}.csv", "key,identity", [(name(n), PEOPLE[n]) for n in reversed(rows)])
        for what, rows in (("probes", probes), ("enrolled", enrolled))
    ]
    words = ["identify", "--probes", lists[0], "--enrolled", lists[1], "--query", files[0], "--gallery", files[1]]
    if templates:  # of one image each
        members = [(n + 1000, 1, KEYS[n]) for n in range(NUM)]
        words += ["--templates", listed(tmp_path / "templates.csv", "template_id,media_id,key", members)]
    for enrolment in ("best", "mean"):
        found = numbers(capsys, *words, "--fpir", 0.1, 0.5, "--rank", 1, 3, "--enrolment", enrolment)
        truth = identify(
            embedding_set(some_rows(NEW_DIM, 1)[probes], LABELS[probes], probes),
            embedding_set(some_rows(NEW_DIM, 2)[enrolled], LABELS[enrolled], enrolled),
            enrolment,
        )
        tpir, threshold = truth.tpir_at([0.1, 0.5])
        assert list(found["tpir_at_fpir"].values()) == pytest.approx(tpir.tolist(), abs=1e-12)
        assert list(found["threshold_at_fpir"].values()) == pytest.approx(threshold.tolist(), abs=1e-6)
        assert found["rank"] == {"1": truth.rank_rate(1), "3": truth.rank_rate(3)}
        assert (found["num_mated"], found["num_nonmated"], found["num_identities"]) == (20, 10, 8)


def test_an_image_that_is_probe_and_enrolled_is_refused(tmp_path, files):
    path = listed(tmp_path / "p.csv", "key,identity", [(KEYS[0], "a"), (KEYS[7], "b")])
    other = listed(tmp_path / "e.csv", "key,identity", [(KEYS[0], "a")])
    with pytest.raises(DataError, match="1 images are both probes"):
        lce("identify", "--probes", path, "--enrolled", other, "--query", files[0], "--gallery", files[1])


def test_an_image_of_a_probes_template_and_an_enrolled_one_is_refused(tmp_path, files):
    templates = [("a", 1, KEYS[0]), ("a", 2, KEYS[1]), ("b", 1, KEYS[7]), ("c", 1, KEYS[2]), ("c", 2, KEYS[1])]
    path = listed(tmp_path / "t.csv", "template_id,media_id,key", templates)
    probes = listed(tmp_path / "p.csv", "key,identity", [("a", "one"), ("b", "two")])
    enrolled = listed(tmp_path / "e.csv", "key,identity", [("c", "one")])
    words = ["identify", "--probes", probes, "--enrolled", enrolled, "--query", files[0], "--gallery", files[1]]
    told = r"t\.csv:6: the image is enrolled, and in a probe's template by line 3 \(1 such images\)"
    with pytest.raises(DataError, match=told) as refused:
        lce(*words, "--templates", path)
    assert "photo" not in str(refused.value)
    # of templates that nobody asks for, anything goes
    others = [*templates[:4], ("d", 1, KEYS[0]), ("d", 2, KEYS[2])]
    lce(*words, "--templates", listed(tmp_path / "t2.csv", "template_id,media_id,key", others))


def test_retrieval_with_cameras_and_junk(tmp_path, files, capsys):
    camera = np.arange(NUM) % 3
    names = [PEOPLE[n] if n % 11 else "-1" for n in range(NUM)]
    lists = [
        listed(tmp_path / f"{what}.csv", "key,identity,camera", [(KEYS[n], names[n], f"c{camera[n]}") for n in rows])
        for what, rows in (("query", range(0, NUM, 4)), ("gallery", range(NUM)))
    ]
    words = [
        "retrieve",
        "--query",
        files[0],
        "--gallery",
        files[1],
        "--query-list",
        lists[0],
        "--gallery-list",
        lists[1],
    ]
    found = numbers(capsys, *words)
    labels = np.where(np.arange(NUM) % 11, LABELS, -1)
    rows = np.arange(0, NUM, 4)
    truth = retrieve(
        embedding_set(some_rows(NEW_DIM, 1)[rows], labels[rows], rows),
        embedding_set(some_rows(NEW_DIM, 2), labels),
        camera[rows],
        camera,
    )
    assert found["mean_average_precision"] == pytest.approx(truth.mean_average_precision, abs=1e-12)
    assert found["map_at_r"] == pytest.approx(truth.map_at_r, abs=1e-12)
    assert found["rank"] == {str(k): truth.rank_rate(k) for k in (1, 5, 10)}
    assert (found["num_queries"], found["num_queries_with_mate"], found["cameras"]) == (15, len(truth.query_Q), True)
    with pytest.raises(ConfigError, match="go together"):
        lce(*words[:-2])
    without = listed(tmp_path / "g.csv", "key,identity", [(KEYS[n], names[n]) for n in range(NUM)])
    with pytest.raises(DataError, match=r"g\.csv has no cameras"):
        lce(*words[:-1], without)


def test_retrieval_of_whole_files_takes_identities_from_either(files, capsys):
    # old.npz names none
    truth = retrieve(embedding_set(some_rows(NEW_DIM, 2)), embedding_set(some_rows(NEW_DIM, 1)))
    found = numbers(capsys, "retrieve", "--query", files[1], "--gallery", files[0])
    assert found["mean_average_precision"] == pytest.approx(truth.mean_average_precision, abs=1e-12)
    own = retrieve(*[embedding_set(some_rows(NEW_DIM, 1))] * 2)
    assert numbers(capsys, "retrieve", "--query", files[0])["map_at_r"] == pytest.approx(own.map_at_r, abs=1e-12)
    with pytest.raises(DataError, match=r"neither .* says who is on an image"):
        lce("retrieve", "--query", files[1])


def test_junk_is_nobody_with_lists_and_without(tmp_path, capsys):
    names = [PEOPLE[n] if n % 7 else "-1" for n in range(NUM)]
    new = stored(tmp_path / "new.npz", some_rows(NEW_DIM, 1), people=names)
    old = stored(tmp_path / "old.npz", some_rows(NEW_DIM, 2), people=names)
    path = listed(tmp_path / "all.csv", "key,identity", [(KEYS[n], names[n]) for n in range(NUM)])
    words = ("retrieve", "--query", new, "--gallery", old)
    found = numbers(capsys, *words)
    assert found == numbers(capsys, *words, "--query-list", path, "--gallery-list", path)
    assert found["num_queries_with_mate"] == sum(name != "-1" for name in names)


def test_places_that_take_no_file_are_refused_before_the_work(tmp_path, capsys):
    work = ("all-pairs", "--query", tmp_path / "absent.npz")  # which is looked for later
    (tmp_path / "folder.png").mkdir()
    for words, told in (
        (("--plot", "/proc/x.png"), r"--plot /proc/x\.png: nothing can be written in /proc"),
        (("--json", "/proc/1/x.json"), r"--json /proc/1/x\.json: nothing can be written in /proc/1"),
        (("--json", f"{tmp_path}/o/"), "names a folder"),
        (("--json", tmp_path), "names a folder"),
        (("--plot", tmp_path / "folder.png"), "names a folder"),
        (("--json", tmp_path / "no" / "x.json"), "no is not a folder; make it first"),
    ):
        with pytest.raises(ConfigError, match=told) as refused:
            lce(*work, *words)
        assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_all_pairs_of_one_person_or_of_strangers_is_a_fault_of_the_data(tmp_path):
    rows = some_rows(NEW_DIM, 1)
    for people, told in ((["one"] * NUM, "0 impostor pairs"), ([f"p{n}" for n in range(NUM)], "0 genuine pairs")):
        with pytest.raises(DataError, match=told) as refused:
            lce("all-pairs", "--query", stored(tmp_path / "v.npz", rows, people=people))
        assert "v.npz" in str(refused.value) and "\n" not in str(refused.value)


def test_two_spaces_are_named_and_doubted_unless_a_card_connects_them(tmp_path, capsys):
    new, old, same = (tmp_path / f"{name}.npz" for name in ("new", "old", "same"))
    for path, seed, space in ((new, 1, "space n"), (old, 2, "space o"), (same, 2, "space n")):
        write_vectors(path, NEW_DIM, NUM, [Block(KEYS, some_rows(NEW_DIM, seed), PEOPLE)], space=space)
    words = ("all-pairs", "--query", new, "--far", "0.1", "--gallery")

    def told(*more: object) -> str:
        capsys.readouterr()
        lce(*words, *more)
        return capsys.readouterr().err

    assert "spaces: query space n, gallery space o\nwarning: vectors of two spaces" in told(old)
    assert "space" not in told(same)
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"space": "space n", "parent_space": "space o"}))
    assert "warning" not in told(old, "--card", card)
    card.write_text(json.dumps({"space": "space n", "parent_space": "space x"}))
    assert "warning" in told(old, "--card", card)
    card.write_text(json.dumps({"space": "space z", "parent_space": "space o"}))
    with pytest.raises(ConfigError, match="is of space 'space z'"):
        lce(*words, old, "--card", card)
    card.write_text("[]")
    with pytest.raises(ConfigError, match="does not tell space and parent_space"):
        lce(*words, old, "--card", card)


def test_a_threshold_of_few_false_accepts_says_so(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    capsys.readouterr()
    lce("all-pairs", "--query", files[0], "--far", "1e-4", "1e-3", "0.1")
    lines = [line for line in capsys.readouterr().out.splitlines() if "TAR at FAR" in line]
    assert ", no impostor)" in lines[0] and ", of 3 impostors)" in lines[1] and "impostor" not in lines[2]
    probes = listed(tmp_path / "p.csv", "key,identity", [(KEYS[n], PEOPLE[n]) for n in range(0, NUM, 2)])
    enrolled = listed(tmp_path / "e.csv", "key,identity", [(KEYS[n], PEOPLE[n]) for n in range(1, 30, 2)])
    lce("identify", "--probes", probes, "--enrolled", enrolled, "--query", files[0], "--fpir", "0.01", "0.2")
    lines = [line for line in capsys.readouterr().out.splitlines() if "TPIR" in line]
    assert ", no non-mated probe)" in lines[0] and ", of 3 non-mated probes)" in lines[1]


def test_vectors_in_plain_arrays_are_used_where_they_lie(tmp_path, capsys):
    rows, found = some_rows(NEW_DIM, 1), {}
    np.savez_compressed(tmp_path / "small.npz", keys=np.array(KEYS), vectors=rows, identities=np.array(PEOPLE))
    np.savez(tmp_path / "theirs.npz", keys=np.array(KEYS), vectors=rows, identities=np.array(PEOPLE))
    for name in ("a.npz", "a.npy", "a.parquet"):
        stored(tmp_path / name, rows)
    for name in ("a.npz", "a.npy", "theirs.npz", "small.npz", "a.parquet"):
        mapped = open_vectors(tmp_path / name).mapped()
        assert (mapped is None) is (name in ("small.npz", "a.parquet"))
        if mapped is not None:
            np.testing.assert_array_equal(mapped, rows)
        found[name] = numbers(capsys, "all-pairs", "--query", tmp_path / name, "--far", "0.1")
        del found[name]["query"], found[name]["gallery"]
    assert all(one == found["a.npz"] for one in found.values())
    # lengths that are off a little are mended in memory, and stay as they are in the file
    longer = stored(tmp_path / "longer.npy", rows * 1.0005)
    assert numbers(capsys, "all-pairs", "--query", longer, "--far", "0.1")["tar_at_far"] == found["a.npz"]["tar_at_far"]
    np.testing.assert_array_equal(np.load(longer), rows * np.float32(1.0005))


def test_scores_that_rounding_blurs_are_told(tmp_path, capsys):
    rows = some_rows(NEW_DIM, 1)
    rows[:, 0] += 400.0
    path = stored(tmp_path / "near.npz", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    lce("all-pairs", "--query", path, "--far", "0.1", "--device", "cpu")
    caught = capsys.readouterr()
    assert "warning: at FAR 0.1 scores lie so close together" in caught.err
    assert "TAR moved by rounding, at most" in caught.out
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device is cuda and PyTorch sees no GPU"):
            lce("all-pairs", "--query", path, "--device", "cuda")


def test_table_json_and_plot_files(tmp_path, files, capsys):
    capsys.readouterr()
    out, picture = tmp_path / "numbers.json", tmp_path / "cmc.png"
    lce("retrieve", "--query", files[0], "--json", out, "--plot", picture, "--rank", 2)
    table = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert f"{found['mean_average_precision']:.5f}" in table
    assert f"{found['rank']['2']:.5f}" in table
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20  # a curve, not a blank page
    assert not list(tmp_path.glob("*.partial"))


def test_pictures_show_the_numbers():
    rng = np.random.default_rng(0)
    genuine = np.arange(400) % 2 == 0
    roc = roc_of_scores(rng.normal(size=400) + 2 * genuine, genuine)
    far, tar = curve_points(roc, 200)
    assert (far[0], far[-1]) == (1 / 200, 1.0)
    left, right = verification_curves((far, tar), "title").axes
    assert left.lines[0].get_ydata().tolist() == [float(roc.at([one])[0][0]) for one in far]
    seen = tar < 1.0
    np.testing.assert_array_equal(right.lines[0].get_xydata(), np.stack([far[seen], 1 - tar[seen]], axis=1))
    perfect = verification_curves((far, np.ones_like(far)), "title").axes[1]
    assert [text.get_text() for text in perfect.texts] == ["no misses"]
    found = identify(
        embedding_set(some_rows(NEW_DIM, 1)),
        embedding_set(some_rows(NEW_DIM, 2)[:30], LABELS[:30], np.arange(100, 130)),
    )
    misses, cmc = identification_curves(found, "title").axes
    assert misses.lines[0].get_xydata()[-1].tolist() == [1.0, 1.0 - found.tpir_at([1.0])[0][0]]
    assert cmc.lines[0].get_ydata().tolist() == [found.rank_rate(k) for k in range(1, 7)]


def test_unpacked_pairs_can_be_measured(tmp_path, capsys):
    images = [b"\xff\xd8\xff" + bytes([n]) for n in range(40)]
    (tmp_path / "a.bin").write_bytes(pickle.dumps((images, [n % 2 == 0 for n in range(20)]), 2))
    lce("unpack-bin", tmp_path / "a.bin", tmp_path / "a")
    assert "40 images; pairs.csv: 20 pairs" in capsys.readouterr().out
    rows = some_rows(NEW_DIM, 1)[:40]
    vectors = stored(tmp_path / "a.npz", rows, [f"{n:06}.jpg" for n in range(40)], None)
    found = numbers(capsys, "pairs", tmp_path / "a" / "pairs.csv", "--query", vectors)
    one = embedding_set(rows, np.zeros(40, np.int64))
    scores = score_pairs(one, one, np.arange(0, 40, 2), np.arange(1, 40, 2))
    assert found["accuracy"]["mean"] == accuracy_by_folds(scores, np.arange(20) % 2 == 0).mean


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["--far", "0"], ConfigError, "--far is 0.0; must be above 0"),
        (["--far", "1.0"], ConfigError, "--far is 1.0"),
        (["--bridge", "x"], ConfigError, "--bridge stands between two models"),
        (["--map", "query"], ConfigError, "--map query needs --bridge"),
        (["--plot", "x.pdf"], ConfigError, r"--plot is x\.pdf; must end in \.png"),
        (["--folds", "1"], ConfigError, "--folds is 1"),
        (["--gallery", "NARROW"], DataError, r"8 dimensions and .*narrow\.npz 6; must be equal"),
        (["--gallery", "NARROW", "--bridge", "nowhere"], CheckpointError, "nowhere"),
        (
            ["--gallery", "NARROW", "--bridge", "BRIDGE", "--map", "gallery"],
            DataError,
            "6 dimensions; the map begins at 8",
        ),
        (["--gallery", "LONG"], DataError, r"long\.npz: row 3 has length 2;"),
        (["--gallery", "TWICE"], DataError, r"twice\.npz: rows 1 and 60 have one key; keep one row a key"),
        (["--gallery", "nowhere.npz"], DataError, "is not a file"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, files, bridge, words, error, told):
    rows = some_rows(NEW_DIM, 2)
    long = rows.copy()
    long[2] *= 2.0
    places = {
        "NARROW": stored(tmp_path / "narrow.npz", some_rows(OLD_DIM, 2)),
        "LONG": stored(tmp_path / "long.npz", long),
        "TWICE": stored(tmp_path / "twice.npz", rows, [*KEYS[:-1], KEYS[0]]),
        "BRIDGE": bridge,
    }
    path = listed(tmp_path / "p.csv", "first,second,genuine", [(KEYS[0], KEYS[1], 1), (KEYS[0], KEYS[9], 0)])
    with pytest.raises(error, match=told) as refused:
        lce("pairs", path, "--query", files[0], *(places.get(word, word) for word in words))
    assert "\n" not in str(refused.value)
    assert "photo" not in str(refused.value)  # no key is told


def test_more_refusals(tmp_path, files, bridge):
    lists = [listed(tmp_path / f"{n}.csv", "key,identity", [(KEYS[n], "a")]) for n in range(2)]
    with pytest.raises(ConfigError, match="'keep' without --templates"):
        lce("identify", "--probes", lists[0], "--enrolled", lists[1], "--query", files[0], "--lengths", "keep")
    with pytest.raises(ConfigError, match="--rank is 0"):
        lce("retrieve", "--query", files[0], "--rank", 0)
    with pytest.raises(ConfigError, match="'keep' with --bridge"):
        lce(
            "templates", "p", "--templates", "t", "--query", files[0], "--gallery", files[1], "--bridge", bridge,
            "--lengths", "keep",
        )  # fmt: skip
    with pytest.raises(DataError, match=r"p\.csv:2: its first is not in .*new\.parquet"):
        lce("pairs", listed(tmp_path / "p.csv", "first,second,genuine", [("z", KEYS[0], 1)]), "--query", files[0])


def test_a_file_holds_the_vectors_of_one_model(tmp_path: Path) -> None:
    rows = some_rows(NEW_DIM, 1)
    for name in ("a.parquet", "a.npz", "a.npy"):
        write_vectors(tmp_path / name, NEW_DIM, NUM, [Block(KEYS, rows, PEOPLE)], space="model A")
        assert open_vectors(tmp_path / name).space == "model A"
        lce("all-pairs", "--query", tmp_path / name, "--far", "0.1")
    assert open_vectors(stored(tmp_path / "unsaid.parquet", rows)).space is None
    for name, spaces in (("nulls", [None] * NUM), ("some", ["A"] * 50 + [None] * 10)):
        columns = {"key": KEYS, "vector": list(rows), "space": pa.array(spaces, pa.string())}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    assert open_vectors(tmp_path / "nulls.parquet").space is None
    with pytest.raises(DataError, match=r"some\.parquet: row 51 is of none that it says, the first of space 'A'"):
        open_vectors(tmp_path / "some.parquet")
    np.savez(tmp_path / "two.npz", keys=np.array(KEYS), vectors=rows, spaces=np.array(["A"] * 50 + ["B"] * 10))
    with pytest.raises(DataError, match=r"two\.npz: row 51 is of space 'B', the first of space 'A'; a file holds"):
        lce("all-pairs", "--query", tmp_path / "two.npz")


def test_a_map_of_other_models_is_refused(tmp_path: Path, bridge: Path) -> None:
    card = json.loads((bridge / "bridge.json").read_text())
    (bridge / "bridge.json").write_text(json.dumps(card | {"from_space": "new A", "to_space": "old A"}))
    new, other = tmp_path / "new.parquet", tmp_path / "other.parquet"
    old = tmp_path / "old.npz"
    write_vectors(new, NEW_DIM, NUM, [Block(KEYS, some_rows(NEW_DIM, 1), PEOPLE)], space="new A")
    write_vectors(other, NEW_DIM, NUM, [Block(KEYS, some_rows(NEW_DIM, 3), PEOPLE)], space="new B")
    write_vectors(old, OLD_DIM, NUM, [Block(KEYS, some_rows(OLD_DIM, 2), PEOPLE)], space="old A")
    lce("all-pairs", "--query", new, "--gallery", old, "--bridge", bridge, "--far", "0.1")
    with pytest.raises(DataError, match=r"other\.parquet are of space 'new B'; the map begins at 'new A'"):
        lce("all-pairs", "--query", other, "--gallery", old, "--bridge", bridge, "--far", "0.1")


def test_files_that_name_other_people_are_refused_with_both_rows(tmp_path: Path, files: tuple[Path, Path]) -> None:
    people = list(PEOPLE)
    people[7] = "somebody else"
    other = stored(tmp_path / "other.parquet", some_rows(NEW_DIM, 4), people=people)
    for action in (("all-pairs", "--far", "0.1"), ("retrieve",)):
        with pytest.raises(
            DataError, match=r"new\.parquet, row 8, and .*other\.parquet, row 8, have the same key"
        ) as caught:
            lce(*action, "--query", files[0], "--gallery", other)
        assert "somebody" not in str(caught.value) and "person" not in str(caught.value)


def test_errors_name_the_very_row(tmp_path: Path) -> None:
    rows = [row.tolist() for row in some_rows(NEW_DIM, 1)]
    tables = {
        "none": ({"key": [*KEYS[:40], None, *KEYS[41:]], "vector": rows}, "row 41 has no key"),
        "short": ({"key": KEYS, "vector": [*rows[:33], rows[33][:-1], *rows[34:]]}, "row 34 has a vector of 7 numbers"),
        "hole": (
            {"key": KEYS, "vector": [*rows[:9], [None, *rows[9][1:]], *rows[10:]]},
            "row 10 has no number at place 1",
        ),
    }
    for name, (columns, told) in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match=told):
            lce("all-pairs", "--query", tmp_path / f"{name}.parquet")


def test_damaged_files_are_one_line(tmp_path: Path, files: tuple[Path, Path]) -> None:
    whole = files[1].read_bytes()
    for place in range(0, len(whole), len(whole) // 60):
        damaged = bytearray(whole)
        damaged[place : place + 8] = b"\xff" * 8
        (tmp_path / "damaged.npz").write_bytes(damaged)
        try:
            lce("all-pairs", "--query", files[0], "--gallery", tmp_path / "damaged.npz", "--far", "0.1")
        except DataError as error:
            assert "\n" not in str(error)
    (tmp_path / "pairs.txt").write_text("1" * 5000 + "\nA 1 2\n")
    with pytest.raises(DataError, match=r"pairs\.txt:1: the first line must be"):
        lce("pairs", tmp_path / "pairs.txt", "--query", files[0])
