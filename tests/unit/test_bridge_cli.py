"""`lce bridge` over real files: formats, keys, choices, and refusals of one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from launch.bridge_cli import add_bridge_commands
from launch.cli import main
from lce_dist.compat.artefact import read_bridge, read_card, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.errors import CheckpointError, ConfigError, DataError
from lce_dist.models.stored_vectors import StoredVectors
from lce_dist.vector_files import Block, open_vectors, write_vectors


def lce(*words: object) -> None:
    parser = argparse.ArgumentParser()
    add_bridge_commands(parser.add_subparsers())
    arguments = parser.parse_args(["bridge", *map(str, words)])
    arguments.run(arguments)


def some_rows(count: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def stored(path: Path, keys: list[str], rows: np.ndarray, identities: list[str] | None = None) -> Path:
    """By numpy and pyarrow alone."""
    if path.suffix == ".npz":
        more = {} if identities is None else {"identities": np.array(identities)}
        np.savez(path, keys=np.array(keys), vectors=rows, **more)
    elif path.suffix == ".npy":
        np.save(path, rows)
        path.with_name(f"{path.stem}.keys.txt").write_text("".join(f"{key}\n" for key in keys))
        if identities is not None:
            path.with_name(f"{path.stem}.identities.txt").write_text("".join(f"{one}\n" for one in identities))
    else:
        columns = {"key": keys, "vector": list(rows)}
        pq.write_table(pa.table(columns if identities is None else columns | {"identity": identities}), path)
    return path


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    folder = tmp_path / "bridge"
    made = build_bridge("stacked", 6, 4, seed=1).eval()
    made.start_from(torch.from_numpy(some_rows(4, 6, 9)))
    save_bridge(folder, made, {"kind": "stacked", "dim_in": 6, "dim_out": 4, "direction": "old_to_new"})
    return folder


@pytest.mark.parametrize("given", [".parquet", ".npz", ".npy"])
@pytest.mark.parametrize("wanted", [".parquet", ".npz", ".npy"])
def test_apply_maps_every_row_and_keeps_keys(given, wanted, tmp_path, bridge, monkeypatch):
    monkeypatch.setattr("lce_dist.vector_files._BLOCK_ROWS", 7)
    keys = [f"Müller {n:03}.jpg" for n in range(23)]
    rows = some_rows(23, 6, 1)
    out = tmp_path / f"out{wanted}"
    lce("apply", bridge, stored(tmp_path / f"gallery{given}", keys, rows), "--out", out)
    with torch.no_grad():
        truth = F.normalize(read_bridge(bridge)(F.normalize(torch.from_numpy(rows))))
    # read by the reader that training uses
    found = StoredVectors.open(out, tmp_path / "cache")
    assert (found.num_rows, found.embedding_dim) == (23, 4)
    np.testing.assert_allclose(found.rows(keys), truth.numpy(), atol=1e-6)
    assert [key for block in open_vectors(out).blocks() for key in block.keys] == keys
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_identities_go_along(tmp_path, bridge):
    keys, people = ["a", "b", "c"], ["x", "x", "y"]
    for suffix in (".parquet", ".npz", ".npy"):
        file = stored(tmp_path / f"in{suffix}", keys, some_rows(3, 6, 1), people)
        lce("apply", bridge, file, "--out", tmp_path / f"out{suffix}")
        (block,) = open_vectors(tmp_path / f"out{suffix}").blocks()
        assert block.keys == keys and block.identities == people


def test_an_upgrade_that_fails_leaves_nothing(tmp_path, bridge, monkeypatch):
    monkeypatch.setattr("lce_dist.vector_files._BLOCK_ROWS", 4)
    rows = some_rows(9, 6, 1)
    rows[8] = 0.0
    for suffix in (".parquet", ".npz", ".npy"):
        file = stored(tmp_path / f"in{suffix}", [str(n) for n in range(9)], rows)
        before = set(tmp_path.iterdir())
        with pytest.raises(DataError, match="row 9 is zero or not finite"):
            lce("apply", bridge, file, "--out", tmp_path / f"out{suffix}")
        assert set(tmp_path.iterdir()) == before


def test_apply_refuses_what_does_not_fit(tmp_path, bridge):
    narrow = stored(tmp_path / "narrow.npz", ["a"], some_rows(1, 5, 1))
    with pytest.raises(DataError, match=r"have 5 dimensions; the map .* begins at the old model's 6"):
        lce("apply", bridge, narrow, "--out", tmp_path / "out.npz")
    good = stored(tmp_path / "good.npz", ["a"], some_rows(1, 6, 1))
    (tmp_path / "out.npz").write_text("mine")
    with pytest.raises(ConfigError, match="is not overwritten"):
        lce("apply", bridge, good, "--out", tmp_path / "out.npz")
    with pytest.raises(DataError, match=r"end in '\.csv'"):
        lce("apply", bridge, good, "--out", tmp_path / "out.csv")
    with pytest.raises(CheckpointError, match="does not exist"):
        lce("apply", tmp_path, good, "--out", tmp_path / "other.npz")


def test_apply_refuses_a_key_that_stands_twice(tmp_path, bridge, monkeypatch):
    monkeypatch.setattr("lce_dist.vector_files._BLOCK_ROWS", 2)
    for suffix in (".parquet", ".npz", ".npy"):
        twice = stored(tmp_path / f"twice{suffix}", ["a", "b", "c", "b", "a"], some_rows(5, 6, 1))
        before = set(tmp_path.iterdir())
        with pytest.raises(DataError, match="the key of row 4 stands there before"):
            lce("apply", bridge, twice, "--out", tmp_path / f"out{suffix}")
        assert set(tmp_path.iterdir()) == before


def test_damaged_and_foreign_files_are_refused(tmp_path):
    objects = tmp_path / "objects.npz"
    np.savez(objects, keys=np.array(["a"], dtype=object), vectors=some_rows(1, 6, 1))
    cases = [
        (tmp_path / "absent.npz", "is not a file"),
        (stored(tmp_path / "empty.npz", [], some_rows(0, 6, 1)), r"have the shape \(0, 6\)"),
        (objects, "holds objects"),
        (stored(tmp_path / "short.npy", ["a"], some_rows(2, 6, 1)), r"short\.keys\.txt ends at line 1; must have 2"),
        (
            stored(tmp_path / "long.npy", ["a", "b", "c"], some_rows(2, 6, 1)),
            r"long\.keys\.txt:3: a line too many; must be 2",
        ),
        (stored(tmp_path / "nameless.npz", ["a", ""], some_rows(2, 6, 1)), "row 2 is empty"),
    ]
    np.savez(tmp_path / "other.npz", names=np.array(["a"]), vectors=some_rows(1, 6, 1))
    cases.append((tmp_path / "other.npz", "holds names, vectors; must hold keys"))
    np.save(tmp_path / "alone.npy", some_rows(2, 6, 1))
    cases.append((tmp_path / "alone.npy", "have no alone.keys.txt beside them"))
    pq.write_table(pa.table({"key": ["a", "b"], "vector": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    cases.append((tmp_path / "ragged.parquet", "row 2 has a vector of 1 numbers, the first row of 2"))
    pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), tmp_path / "columns.parquet")
    cases.append((tmp_path / "columns.parquet", "has the columns id, vector"))
    for name, source in (("cut.npz", "nameless.npz"), ("cut.parquet", "ragged.parquet")):
        (tmp_path / name).write_bytes((tmp_path / source).read_bytes()[:60])
        cases.append((tmp_path / name, "is damaged"))
    for path, words in cases:
        with pytest.raises(DataError, match=words):
            list(open_vectors(path).blocks())


def test_a_compressed_npz_streams_like_any(tmp_path, monkeypatch):
    monkeypatch.setattr("lce_dist.vector_files._BLOCK_ROWS", 5)
    rows = some_rows(12, 3, 1).astype(np.float64)
    np.savez_compressed(tmp_path / "in.npz", keys=np.array([str(n) for n in range(12)]), vectors=rows)
    found = np.concatenate([block.rows_bD for block in open_vectors(tmp_path / "in.npz").blocks()])
    assert np.array_equal(found, rows.astype(np.float32))
    blocks = (Block([str(n)], rows[n : n + 1].astype(np.float32), None) for n in range(12))
    write_vectors(tmp_path / "out.parquet", 3, 12, blocks)
    assert open_vectors(tmp_path / "out.parquet").num_rows == 12


def two_models(tmp_path: Path, people: int = 40, photos: int = 4) -> tuple[Path, Path, np.ndarray, list[str]]:
    """Vectors of the same images by two models, in different orders and formats; the old one is a turned, cut new one."""
    draw = np.random.default_rng(3)
    who = [f"person {n:02}" for n in range(people) for _ in range(photos)]
    centre = draw.normal(size=(people, 8))
    new = np.repeat(centre, photos, axis=0) + 0.3 * draw.normal(size=(len(who), 8))
    matrix = np.linalg.qr(draw.normal(size=(8, 8)))[0][:, :6]
    old = new @ matrix + 0.2 * draw.normal(size=(len(who), 6))
    keys = [f"{n:04}.jpg" for n in range(len(who))]
    order = draw.permutation(len(who))
    new_file = stored(tmp_path / "new.parquet", keys, new.astype(np.float32), who)
    shuffled = [keys[n] for n in order] + ["extra.jpg"]
    old_rows = np.concatenate([old[order], draw.normal(size=(1, 6))]).astype(np.float32)
    return new_file, stored(tmp_path / "old.npz", shuffled, old_rows), matrix, keys


def test_fit_matches_rows_by_key_and_show_prints_the_table(tmp_path, capsys):
    new, old, matrix, _ = two_models(tmp_path)
    out = tmp_path / "map"
    words = ("--new-vectors", new, "--old-vectors", old, "--out", out)
    lce("fit", *words, "--direction", "new_to_old", "--kind", "least_squares")
    card = read_card(out)
    assert card["images"] == 160 and card["identities"] == 40 and card["chosen"].startswith("least_squares")
    found = read_bridge(out).matrix.weight.detach().numpy()
    # unit rows of x and y: the planted matrix, up to one factor and the noise
    cosine = (found * matrix.T).sum() / np.linalg.norm(found) / np.linalg.norm(matrix)
    assert cosine > 0.98
    capsys.readouterr()
    lce("show", out)
    shown = capsys.readouterr().out
    assert "new_to_old, 8 to 6 values, linear" in shown and shown.count("tar_at_far_0.01") == 12
    assert "<- chosen" in shown and "0001.jpg" not in shown and "person" not in shown
    lce("apply", out, new, "--out", tmp_path / "mapped.parquet")
    with pytest.raises(ConfigError, match="is not overwritten"):
        lce("fit", *words, "--direction", "new_to_old")


def test_fit_forward_takes_identities_from_a_file(tmp_path):
    new, old, _, keys = two_models(tmp_path, people=16)
    bare = stored(tmp_path / "bare.npz", keys, open_one(new))
    people = tmp_path / "people.txt"
    words = ("fit", "--new-vectors", bare, "--old-vectors", old, "--direction", "old_to_new", "--out", tmp_path / "map")
    with pytest.raises(DataError, match="says who is on an image"):
        lce(*words)
    people.write_text("x\n")
    with pytest.raises(DataError, match="has 1 lines; must have 64"):
        lce(*words, "--identities", people)
    people.write_text("".join(f"{n // 4}\n" for n in range(64)))
    for flag, value in (("--heldout", 1.0), ("--far", 0.0), ("--seed", -1)):
        with pytest.raises(ConfigError, match=flag):
            lce(*words, "--identities", people, flag, value)
    lce(*words, "--identities", people, "--kind", "procrustes")
    card = read_card(tmp_path / "map")
    assert (card["dim_in"], card["dim_out"], card["direction"]) == (6, 8, "old_to_new")


def test_fit_refuses_files_that_do_not_belong_together(tmp_path):
    new, _, _, _ = two_models(tmp_path)
    other = stored(tmp_path / "other.npz", ["a", "b"], some_rows(2, 6, 1))
    twice = stored(tmp_path / "twice.npz", ["0000.jpg", "0000.jpg"], some_rows(2, 6, 1))
    words = ("fit", "--new-vectors", new, "--direction", "new_to_old", "--out", tmp_path / "map", "--old-vectors")
    with pytest.raises(DataError, match="have no key in common"):
        lce(*words, other)
    with pytest.raises(DataError, match="the key of row 2 stands there before"):
        lce(*words, twice)
    few = stored(tmp_path / "few.npz", [f"{n:04}.jpg" for n in range(12)], some_rows(12, 6, 1))
    with pytest.raises(DataError, match=r"3 of 3 identities have two images or more; .* at least 16"):
        lce(*words, few)
    alone = stored(tmp_path / "alone.npz", [f"{n:04}.jpg" for n in range(0, 160, 4)], some_rows(40, 6, 1))
    with pytest.raises(DataError, match="0 of 40 identities have two images or more"):
        lce(*words, alone)


def test_what_a_person_can_mend_is_exit_code_2(tmp_path, capsys):
    new, old, _, _ = two_models(tmp_path, people=5)
    words = [
        "bridge",
        "fit",
        "--new-vectors",
        str(new),
        "--old-vectors",
        str(old),
        "--direction",
        "new_to_old",
        "--out",
    ]
    assert main([*words, str(tmp_path / "map")]) == 2
    assert main([*words, str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "5 of 5 identities have two images" in told[0] and "is not overwritten" in told[1]


def open_one(path: Path) -> np.ndarray:
    return np.concatenate([block.rows_bD for block in open_vectors(path).blocks()])


def test_names_that_lay_beside_other_vectors_are_not_those_of_new_ones(tmp_path: Path) -> None:
    out = tmp_path / "all.npy"
    rows = some_rows(2, 3, 1)
    write_vectors(out, 3, 2, [Block(["a", "b"], rows, ["ann", "bob"])], "one model")
    out.unlink()
    write_vectors(out, 3, 2, [Block(["c", "d"], rows, None)])
    opened = open_vectors(out)
    assert (opened.has_identities, opened.space) == (False, None)
    assert [block.keys for block in opened.blocks()] == [["c", "d"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.keys.txt", "all.npy"]


@pytest.mark.parametrize("ending", [".parquet", ".npz", ".npy"])
def test_what_fails_leaves_nothing_whatever_it_is_called(ending: str, tmp_path: Path) -> None:
    def blocks():
        yield Block(["a"], some_rows(1, 3, 1), None)
        raise DataError("the second is damaged")

    with pytest.raises(DataError, match="damaged"):
        write_vectors(tmp_path / f"all[1]{ending}", 3, 2, blocks())
    assert not list(tmp_path.iterdir())
