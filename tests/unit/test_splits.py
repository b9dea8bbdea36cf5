"""Splits: each scenario means what it says, files are checked before a run believes them, and leaks are found."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from launch.cli import main
from launch.job import Job, run_job
from launch.parts import open_parts
from launch.prepare import prepare
from lce_dist.config import Config, parse_config
from lce_dist.errors import ConfigError, DataError
from lce_dist.models.catalog import build_net
from lce_dist.models.weights import save_weights
from lce_dist.world import World
from pipelines.leakage import Leak, Side, find_leaks
from pipelines.manifest import PackedDataset, Quarantined, file_sha256, split_identities, write_quarantine
from pipelines.pack import pack_images
from pipelines.splits import SCENARIOS, Scenario, make_split, open_split, select_samples, write_split
from pipelines.verify import hash_images
from tests.unit.test_verify import jpeg

PEOPLE = 60


def pack(out: Path, order: int) -> PackedDataset:
    """Person n has n % 5 + 1 images; ``order`` is of the samples in the shards."""
    images = [(f"id{n:02}", f"id{n:02}/{i}.jpg", jpeg(10 * n + i)) for n in range(PEOPLE) for i in range(n % 5 + 1)]
    shuffled = [images[place] for place in np.random.default_rng(order).permutation(len(images))]
    keys = sorted({key for key, _, _ in images})
    return pack_images(shuffled, keys, len(images), out, "faces", "source", shard_size_bytes=60_000)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return pack(tmp_path_factory.mktemp("split") / "faces", 1)


def people(dataset: PackedDataset, samples: np.ndarray) -> set[str]:
    return {dataset.identities[label] for label in dataset.index["label"][samples].tolist()}


def names(dataset: PackedDataset, samples: np.ndarray) -> set[int]:
    assert dataset.name_hash_N2 is not None
    return set(dataset.name_hash_N2[samples, 0].tolist())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCENARIOS), st.integers(2, 6), st.floats(0.25, 0.75), st.integers(0, 5))
def test_scenarios_mean_what_they_say(
    faces: PackedDataset, scenario: Scenario, heldout: int, fraction: float, seed: int
) -> None:
    split = make_split(faces, scenario, heldout, fraction, seed)
    old, new, held = (set(part.tolist()) for part in (split.old, split.new, split.heldout))
    old_people, new_people, held_people = (people(faces, part) for part in (split.old, split.new, split.heldout))
    assert len(held_people) == heldout and not held_people & (old_people | new_people)
    assert held == {n for n in range(faces.num_samples) if faces.identities[faces.index["label"][n]] in held_people}
    assert old | new | held == set(range(faces.num_samples))
    size = {key: int(key[2:]) % 5 + 1 for key in faces.identities}
    if scenario == "extended-data":
        assert old <= new and old_people == new_people and len(old) < len(new)
    elif scenario == "extended-class":
        assert old < new and old_people < new_people
        assert len(old) == sum(size[key] for key in old_people)  # with all of their images
    elif scenario == "open-data":
        assert not old & new and old_people == {key for key in new_people if size[key] > 1}
    else:
        assert not old_people & new_people
    if scenario.endswith("data"):
        for key in old_people:
            has = sum(faces.identities[faces.index["label"][n]] == key for n in old)
            wanted = min(max(1, round(fraction * size[key])), size[key] - (scenario == "open-data"))
            assert abs(has - wanted) <= 0
    for part in (split.old, split.new, split.heldout):
        assert part.dtype == np.int64 and bool(np.all(np.diff(part) > 0))


def test_seed_and_names_decide_not_the_place_in_the_shards(faces: PackedDataset, tmp_path: Path) -> None:
    other = pack(tmp_path / "other", 2)
    for scenario in SCENARIOS:
        one, same, turned = (make_split(*given) for given in (
            (faces, scenario, 3, 0.5, 7), (other, scenario, 3, 0.5, 7), (faces, scenario, 3, 0.5, 8),
        ))  # fmt: skip
        assert names(faces, one.old) == names(other, same.old) != names(faces, turned.old)


@pytest.mark.parametrize("scenario", ["extended-data", "open-data"])
def test_people_drawn_a_few_at_a_time_are_those_drawn_at_once(
    faces: PackedDataset, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = make_split(faces, scenario, 3, 0.4, 7)
    for samples in (1, 7, 50):
        monkeypatch.setattr("pipelines.splits._AT_ONCE", samples)
        pieces = make_split(faces, scenario, 3, 0.4, 7)
        for part in ("old", "new", "heldout"):
            assert pieces.part(part).tolist() == at_once.part(part).tolist()


def test_class_splits_are_those_of_the_settings(faces: PackedDataset) -> None:
    split = make_split(faces, "extended-class", 3, 0.5, 7)
    setting = split_identities(faces.identities, 3, 0.5, 7)
    for part, keys in ((split.old, setting.old), (split.new, setting.train), (split.heldout, setting.heldout)):
        view, by_key = select_samples(faces, part), faces.select(keys)
        assert view.identities == tuple(by_key.identities)
        assert view.labels.tolist() == by_key.labels.tolist()
        assert view.sample_ids.tolist() == by_key.sample_ids.tolist()


def test_a_view_of_samples_holds_no_quarantined_one(faces: PackedDataset, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(faces.directory, tmp_path / "faces"))
    split = make_split(faces, "extended-data", 3, 0.5, 7)
    alone = next(n for n in split.old.tolist() if (faces.index["label"] == faces.index["label"][n]).sum() == 1)
    write_quarantine(copy, [Quarantined(alone, "", "bad")])
    view = select_samples(PackedDataset.open(copy), split.old)
    assert alone not in view.sample_ids and view.num_samples == len(split.old) - 1
    assert sorted(set(view.labels.tolist())) == list(range(view.num_classes))  # no class without images
    assert view.fingerprint != select_samples(faces, split.old).fingerprint
    assert alone not in make_split(PackedDataset.open(copy), "extended-data", 3, 0.5, 7).new


def test_written_and_read_again(faces: PackedDataset, tmp_path: Path) -> None:
    split = make_split(faces, "open-data", 3, 0.4, 7)
    path = write_split(faces, split, tmp_path / "split")
    for place in (path, path.parent):
        found = open_split(place, faces)
        for part in ("old", "new", "heldout"):
            assert found.split.part(part).tolist() == split.part(part).tolist()
        assert set(found.identities.train) == people(faces, split.new)
    with pytest.raises(DataError, match="exists"):
        write_split(faces, split, tmp_path / "split")


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        ("old.npy", lambda b: b[:-8] + b"\0" * 8, "changed since"),
        ("heldout.txt", lambda b: b + b"id00\n", "changed since"),
        ("new.npy", None, "missing"),
        ("split.json", None, "cannot be read"),
        ("split.json", lambda b: b[:50], "damaged"),
        ("split.json", lambda b: b.replace(b'"version": 1', b'"version": 2'), "another version"),
    ],
)
def test_a_changed_split_is_refused(faces: PackedDataset, tmp_path: Path, file: str, change, word: str) -> None:
    path = write_split(faces, make_split(faces, "open-class", 3, 0.5, 7), tmp_path / "split")
    place = path.parent / file
    if change is None:
        place.unlink()
    else:
        place.write_bytes(change(place.read_bytes()))
    with pytest.raises(DataError, match=word):
        open_split(path, faces)


def test_a_large_split_is_hashed_once_and_again_when_a_file_changes(
    faces: PackedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_split(faces, make_split(faces, "open-data", 3, 0.4, 7), tmp_path / "split")
    small = open_split(path, faces, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # of a small one nothing is kept
    monkeypatch.setattr("pipelines.splits._LARGE_SAMPLES", 1)
    hashed: list[Path] = []
    monkeypatch.setattr("pipelines.splits.file_sha256", lambda place: hashed.append(place) or file_sha256(place))
    for _ in range(3):
        found = open_split(path, faces, tmp_path / "cache")
        for part in ("train", "old", "heldout"):
            assert getattr(found.identities, part) == getattr(small.identities, part)
        assert found.split.old.tolist() == small.split.old.tolist()
    assert len(hashed) == 6
    names = path.parent / "heldout.txt"
    names.write_bytes(names.read_bytes().replace(b"id", b"ix"))
    with pytest.raises(DataError, match="changed since"):
        open_split(path, faces, tmp_path / "cache")
    names.unlink()
    with pytest.raises(DataError, match="missing"):
        open_split(path, faces, tmp_path / "cache")


def test_a_split_of_another_data_set_is_refused(faces: PackedDataset, tmp_path: Path) -> None:
    path = write_split(faces, make_split(faces, "open-class", 3, 0.5, 7), tmp_path / "split")
    with pytest.raises(DataError, match=r"lce data split .* --scenario open-class --seed 7"):
        open_split(path, pack(tmp_path / "other", 2))


def test_too_few_people_are_told(faces: PackedDataset) -> None:
    with pytest.raises(DataError, match=r"leaves . identities for .new."):
        make_split(faces, "open-class", PEOPLE - 3, 0.67, 1)
    with pytest.raises(DataError, match="fraction is 1"):
        make_split(faces, "open-data", 2, 1.0, 1)


# Leaks


def side(dataset: PackedDataset, samples: list[int] | None = None) -> Side:
    chosen = np.arange(dataset.num_samples) if samples is None else np.array(samples, dtype=np.int64)
    return Side(dataset.directory.name, dataset, chosen, hash_images(dataset, 1))


def test_leaks_between_two_sets(tmp_path: Path) -> None:
    again = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3))).save(again, "JPEG", quality=60)
    sets = {
        "a": [("ann", jpeg(1)), ("bob", jpeg(2)), ("bob", jpeg(3)), ("cai", jpeg(4)), ("cai", jpeg(2))],
        "b": [("bob", jpeg(5)), ("dee", jpeg(2)), ("dee", again.getvalue()), ("dee", jpeg(6))],
    }
    one, other = (
        pack_images(
            [(key, f"{n}.jpg", payload) for n, (key, payload) in enumerate(images)],
            sorted({key for key, _ in images}),
            len(images),
            tmp_path / name,
            name,
            "source",
        )
        for name, images in sets.items()
    )
    found = find_leaks(side(one), side(other))
    assert found == [
        Leak("identity", "bob", "bob", True),
        Leak("image", "a a-000000.tar:000000001.jpg", "b b-000000.tar:000000001.jpg", False),
        Leak("look-alike", "a a-000000.tar:000000002.jpg", "b b-000000.tar:000000002.jpg", False),
    ]
    assert find_leaks(side(one, [0, 3]), side(other, [1, 2, 3])) == []
    assert [leak.kind for leak in find_leaks(side(one), side(other), images_only=True)] == ["image", "look-alike"]


def test_the_leakage_command(faces: PackedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(faces.directory), tmp_path / "split"
    make = ["data", "split", data, str(out), "--scenario", "open-data", "--heldout", "3", "--json", "-"]
    assert main(make) == 0
    assert json.loads(capsys.readouterr().out)["heldout"]["identities"] == 3
    assert main(["data", "leakage", data, "--split", str(out / "split.json"), "--workers", "1"]) == 0
    assert "nothing in common" in capsys.readouterr().out
    file = tmp_path / "leaks.json"
    assert main(["data", "leakage", data, data, "--workers", "1", "--json", str(file)]) == 3
    leaks = json.loads(file.read_text())["leaks"]
    assert [leak["kind"] for leak in leaks] == ["identity"] * PEOPLE + ["image"] * faces.num_samples
    capsys.readouterr()
    assert main(["data", "leakage", data]) == 2
    assert "name one" in capsys.readouterr().err


# Runs


@pytest.fixture(scope="module")
def place(faces: PackedDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits, and two networks."""
    folder = tmp_path_factory.mktemp("runs")
    for scenario in SCENARIOS:
        write_split(faces, make_split(faces, scenario, 4, 0.5, 7), folder / scenario)
    for name, seed in (("old", 1), ("new", 2)):
        save_weights(build_net("tiny8", 16, 32, seed=seed), folder / f"{name}.safetensors", {})
    return folder


def config_of(faces: PackedDataset, split: Path | None, **changes: object) -> Config:
    values: dict = {
        "data": {"shards": str(faces.directory), "image_size": 32},
        "old": {"net": "tiny8", "embedding_dim": 16},
        "new": {"net": "tiny8", "embedding_dim": 16},
        "head": {"loss": "softmax"},
        "optim": {"global_batch": 8},
        "evaluation": {"fars": [0.1], "criterion_far": 0.1},
    }
    values["data"] |= {"heldout_identities": 4} if split is None else {"split": str(split)}
    return parse_config({**values, **changes}, "test", json_mode=True)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_is_planned_over_the_split(faces: PackedDataset, place: Path, tmp_path: Path, scenario: str) -> None:
    split = open_split(place / scenario, faces).split
    config = config_of(faces, place / scenario / "split.json")
    prepared = prepare(config, 1, True, tmp_path, lambda what, done, total: None)
    sizes = {name: (plan.num_samples, plan.num_classes) for name, plan in prepared.plans.items()}
    new = len(split.new), len(people(faces, split.new))
    assert sizes == {"old": (len(split.old), len(people(faces, split.old))), "new": new, "independent": new}
    assert np.asarray(prepared.parts.view("heldout").sample_ids).tolist() == split.heldout.tolist()


def test_the_split_counts_by_what_is_in_it(faces: PackedDataset, place: Path, tmp_path: Path) -> None:
    def identity(split: Path | None) -> dict:
        config = config_of(faces, split)
        return prepare(config, 1, False, tmp_path, lambda what, done, total: None).identity(config)

    moved = Path(shutil.copytree(place / "open-class", tmp_path / "moved"))
    one, elsewhere, other = (
        identity(folder / "split.json") for folder in (place / "open-class", moved, place / "open-data")
    )
    assert one == elsewhere != other
    assert identity(None)["split"] is None


def test_settings_beside_a_split_are_refused(faces: PackedDataset, place: Path) -> None:
    split = place / "open-class" / "split.json"
    data = {"shards": "x", "split": str(split)}
    with pytest.raises(ConfigError, match="heldout_identities is 7 and split is"):
        config_of(faces, split, data={**data, "heldout_identities": 7})
    with pytest.raises(ConfigError, match="Name that with shards"):
        config_of(faces, split, data={"images": "photos", "split": str(split)})


@pytest.mark.parametrize("scenario", ["open-class"])
def test_a_run_evaluates_who_is_held_out(faces: PackedDataset, place: Path, tmp_path: Path, scenario: str) -> None:
    """Two given models and a map: the report counts the pairs of the split's held-out images, no others."""
    networks = {
        name: {"net": "tiny8", "embedding_dim": 16, "weights": str(place / f"{name}.safetensors")}
        for name in ("old", "new")
    }
    compat = {"mode": "mapping-forward", "bridge": "least_squares"}
    config = config_of(faces, place / scenario / "split.json", compat=compat, **networks)
    (tmp_path / "run").mkdir()
    job = Job(config, faces.directory, tmp_path / "run", tmp_path, "f" * 16, "e" * 16, Path(), False, {}, {})
    run_job(job, World(device=torch.device("cpu")), lambda event: None)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    held = open_parts(config.data, Path(), faces, None).view("heldout")
    same = held.labels[:, None] == held.labels[None, :]
    assert report["new_new"]["num_genuine"] == int(same.sum()) - held.num_samples > 0
