"""Pair files in a run: packed once, found again, judged by the same functions as any list of pairs."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.pair_sets import accuracy_cells, open_pair_sets, pair_set_entries
from lce_dist.errors import ConfigError, DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.verification import accuracy_by_folds, equal_error_rate, tar_at_far
from pipelines.pixels import decode_sample

GENUINE = [True, False, True, True, False, False, True, False, True, False, False, True]


def pair_file(path: Path, kinds: tuple[str, ...] = ("JPEG", "PNG"), genuine: list[bool] = GENUINE) -> Path:
    images = []
    for number in range(2 * len(genuine)):
        picture = Image.new("RGB", (40, 40), (10 * number, 200, 30))
        held = io.BytesIO()
        picture.save(held, kinds[number % len(kinds)])
        images.append(held.getvalue())
    path.write_bytes(pickle.dumps((images, genuine)))
    return path


def test_a_file_is_packed_once_in_its_order(tmp_path: Path) -> None:
    pair_file(tmp_path / "lfw.bin")
    told: list[tuple[str, int, int]] = []
    (one,) = open_pair_sets(["lfw.bin"], tmp_path, tmp_path / "cache", lambda *event: told.append(event))
    assert (one.name, one.is_genuine.tolist(), one.view.num_samples) == ("lfw", GENUINE, 24)
    assert told[-1] == ("packing lfw", 24, 24)
    for number in (0, 1, 13, 23):
        red = np.asarray(decode_sample(one.view.dataset, int(one.view.sample_ids[number])))[20, 20, 0]
        assert abs(int(red) - 10 * number) <= 4
    told.clear()
    (again,) = open_pair_sets(
        [str(tmp_path / "lfw.bin")], Path("/"), tmp_path / "cache", lambda *event: told.append(event)
    )
    assert not told and again.fingerprint == one.fingerprint and again.view.fingerprint == one.view.fingerprint


def test_entries_are_those_of_a_list_of_pairs_whatever_the_order_of_rows(tmp_path: Path) -> None:
    pair_file(tmp_path / "lfw.bin")
    (pair_set,) = open_pair_sets(["lfw.bin"], tmp_path, tmp_path / "cache")
    draw = np.random.default_rng(3)

    def model(name: str) -> EmbeddingSet:
        rows = draw.normal(size=(24, 8))
        rows[1::2] += np.where(np.array(GENUINE)[:, None], 1.5, 0.0) * rows[::2]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return EmbeddingSet(name, rows.astype(np.float32), np.arange(24), np.arange(24))

    old, new = model("old"), model("new")
    order = draw.permutation(24)
    shuffled = EmbeddingSet("new", new.vectors_ND[order], new.labels_N[order], new.sample_ids_N[order])
    cells = {
        "old_old": (old, old),
        "new_old": (shuffled, old),
        "new_new": (shuffled, shuffled),
        "independent_new": (new, new),
    }
    entries = pair_set_entries(pair_set, cells, (0.1, 0.5))
    for key, (query, gallery) in {**cells, "new_old": (new, old), "new_new": (new, new)}.items():
        scores = np.array([query.vectors_ND[2 * p].astype(float) @ gallery.vectors_ND[2 * p + 1] for p in range(12)])
        assert entries[key]["accuracy"] == pytest.approx(accuracy_by_folds(scores, GENUINE).mean, abs=1e-12)
        assert entries[key]["equal_error_rate"] == pytest.approx(equal_error_rate(scores, GENUINE), abs=1e-6)
        assert list(entries[key]["tar_at_far"].values()) == tar_at_far(scores, GENUINE, (0.1, 0.5))[0].tolist()
    cell = accuracy_cells({"lfw": entries, "part": {"old_old": entries["old_old"]}})
    assert set(cell) == {"lfw"} and cell["lfw"].new_old == entries["new_old"]["accuracy"]


def test_refusals(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="is not a file"):
        open_pair_sets(["none.bin"], tmp_path, cache)
    with pytest.raises(ConfigError, match="names must differ"):
        open_pair_sets(["a/lfw.bin", "b/lfw.bin"], tmp_path, cache)
    (tmp_path / "one.bin").write_bytes(pickle.dumps(([b"x"] * 4, [True, True])))
    with pytest.raises(DataError, match="2 pairs of one kind"):
        open_pair_sets(["one.bin"], tmp_path, cache)
    (tmp_path / "junk.bin").write_bytes(pickle.dumps(([b"x"] * 4, [True, False])))
    with pytest.raises(DataError, match=r"1 of .*junk\.bin cannot be decoded"):
        open_pair_sets(["junk.bin"], tmp_path, cache)
    with pytest.raises(DataError):  # and a second time, too: nothing half-made is taken for whole
        open_pair_sets(["junk.bin"], tmp_path, cache)


def test_what_cannot_be_judged_is_refused_before_the_training_and_names_are_made_fit_for_metrics(
    tmp_path: Path,
) -> None:
    pair_file(tmp_path / "bad.bin", genuine=[True, False, False, False])
    with pytest.raises(DataError, match=r"bad\.bin: without fold 1 of the list no genuine pair is left"):
        open_pair_sets(["bad.bin"], tmp_path, tmp_path / "cache")
    pair_file(tmp_path / "lfw (v2) #1.bin")
    (one,) = open_pair_sets(["lfw (v2) #1.bin"], tmp_path, tmp_path / "cache")
    assert one.name == "lfw _v2_ _1"
