"""An old model of which only vectors are left: found by image or identity, and as good as the model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.job import Job, _old_space, run_job
from launch.parts import open_parts
from launch.prepare import seen_identities
from launch.stored import check_against_vectors, open_stored
from lce_dist.compat.old_space import compute_old_space
from lce_dist.config import parse_config
from lce_dist.embedding import embed_batches, gather_all
from lce_dist.errors import ConfigError, DataError
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import FrozenModel
from lce_dist.models.preprocess import OUR_INPUT, InputSpec
from lce_dist.models.weights import save_weights
from lce_dist.world import World
from pipelines.manifest import MANIFEST_FILE, PackedDataset, View, split_identities
from pipelines.pack import pack_folder
from pipelines.stream import ImageStream, block_plan

DIM, SIZE, CPU = 16, 32, torch.device("cpu")
PEOPLE, PHOTOS = 40, 4


@dataclass(frozen=True)
class Place:
    """A folder of photos, packed, and an old model's file and vectors of all of them."""

    folder: Path
    dataset: PackedDataset
    old: torch.nn.Module
    keys: tuple[str, ...]  # of photos
    vectors: np.ndarray

    def save(self, name: str, keys: list[str], vectors: np.ndarray) -> Path:
        path = self.folder / f"{name}.npz"
        np.savez(path, keys=np.asarray(keys, dtype=str), vectors=vectors)
        return path

    def by_image(self) -> Path:
        order = np.random.default_rng(1).permutation(len(self.keys))
        return self.save("image", [self.keys[n] for n in order], 3.0 * self.vectors[order])

    def by_identity(self) -> Path:
        people = sorted({key.partition("/")[0] for key in self.keys})
        means = [self.vectors[[key.startswith(f"{one}/") for key in self.keys]].mean(0) for one in people]
        return self.save("identity", people, np.stack(means))


def everybody(dataset: PackedDataset) -> View:
    return dataset.select(dataset.identities)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("stored")
    chance = np.random.default_rng(0)
    keys = []
    for person in range(PEOPLE):
        base = chance.integers(0, 255, (4, 4, 3))
        (folder / "photos" / f"p{person:02d}").mkdir(parents=True)
        for photo in range(PHOTOS):
            pixels = np.clip(base + chance.integers(-40, 40, (4, 4, 3)), 0, 255).astype(np.uint8)
            keys.append(f"p{person:02d}/{photo}.jpg")
            picture = Image.fromarray(pixels).resize((SIZE, SIZE))
            picture.save(folder / "photos" / keys[-1], quality=95)
    dataset = pack_folder(folder / "photos", folder / "packed", "photos")
    old = build_net("tiny8", DIM, SIZE, seed=3).eval()
    save_weights(old, folder / "old.safetensors", {})
    save_weights(build_net("tiny16", DIM, SIZE, seed=4), folder / "new.safetensors", {})
    view = dataset.select(dataset.identities)
    ids, vectors = [], []
    with ImageStream(view, block_plan(view.num_samples, 0, 1, 128), SIZE, None, 0, CPU) as stream:
        for rows in embed_batches(old, stream, DIM):
            ids.append(rows.sample_ids_b)
            vectors.append(rows.unit_bD)
    # which photo each sample is: packing shuffled them, and kept the order in no readable form
    pixels_of = {(folder / "photos" / key).read_bytes(): key for key in keys}
    named = []
    for sample in torch.cat(ids).tolist():
        row = dataset.index[sample]
        with dataset.shard_path(int(row["shard"])).open("rb") as file:
            file.seek(int(row["offset"]))
            named.append(pixels_of[file.read(int(row["size"]))])
    return Place(folder, dataset, old, tuple(named), torch.cat(vectors).numpy())


def test_vectors_by_image_stand_for_the_model_on_any_number_of_ranks(place: Place) -> None:
    stored = open_stored(place.by_image(), everybody(place.dataset), DIM, place.folder)
    assert stored.by == "image"
    view = place.dataset.select(place.dataset.identities[5:])
    row_of = {sample: row for row, sample in enumerate(range(place.dataset.num_samples))}
    for size in (1, 3):
        ids, vectors, labels = [], [], []
        for rank in range(size):
            for rows in stored.image_rounds(view, World(rank=rank, size=size))():
                ids += rows.sample_ids_b.tolist()
                labels += rows.labels_b.tolist()
                vectors.append(rows.unit_bD.numpy())
        assert sorted(ids) == view.sample_ids.tolist()
        expected = place.vectors[[row_of[sample] for sample in ids]]
        np.testing.assert_allclose(np.concatenate(vectors), expected, atol=1e-6)
        people = [place.keys[sample].partition("/")[0] for sample in ids]
        assert [view.identities[label] for label in labels] == people
    halfway = [rows.sample_ids_b.tolist() for rows in stored.image_rounds(view, World())(128)]
    assert [sample for ids in halfway for sample in ids] == view.sample_ids[128:].tolist()
    some = torch.tensor([7, 0, 7])
    np.testing.assert_allclose(stored.of_images(some.numpy()).numpy(), place.vectors[[7, 0, 7]], atol=1e-6)


def test_one_vector_an_identity_is_a_centre_without_a_boundary(place: Place) -> None:
    stored = open_stored(place.by_identity(), everybody(place.dataset), DIM, place.folder)
    assert stored.by == "identity"
    view = place.dataset.select(place.dataset.identities[5:])
    space = compute_old_space(stored.identity_rounds(view, World()), view.num_classes, DIM, World())
    vectors, labels, ids = gather_all(stored.identity_rounds(view, World())(), World())
    assert labels.tolist() == list(range(35)) and len(set(ids.tolist()) | set(range(160))) == 195
    torch.testing.assert_close(space.centre_SD, vectors)
    assert space.count_S.tolist() == [1] * 35 and space.cos_boundary_S.tolist() == [-1.0] * 35
    sample = int(view.sample_ids[9])
    own = stored.of_images(np.array([sample]))
    torch.testing.assert_close(own, vectors[view.identities.index(place.keys[sample].partition("/")[0])][None])
    assert stored.fingerprint != open_stored(place.by_image(), everybody(place.dataset), DIM, place.folder).fingerprint


def test_what_does_not_fit_is_named(place: Place, tmp_path: Path) -> None:
    few = place.save("few", list(place.keys[:100]), place.vectors[:100])
    with pytest.raises(
        DataError, match="100 of the 160 training images and 0 of the 40 training identities; must hold all"
    ):
        open_stored(few, everybody(place.dataset), DIM, tmp_path)
    with pytest.raises(ConfigError, match=r"old.embedding_dim is 24; .* have 16\. Set it to 16"):
        open_stored(place.by_image(), everybody(place.dataset), 24, tmp_path)
    other = place.save("other", ["x"], place.vectors[:1])
    model = FrozenModel(place.old, DIM, "x", OUR_INPUT)
    with pytest.raises(DataError, match="hold none of the 160 images"):
        check_against_vectors(model, other, place.dataset, SIZE, tmp_path)
    # packed by an earlier release: no names
    packed = place.folder / "packed-before"
    packed.mkdir()
    for file in (place.folder / "packed").iterdir():
        if file.name not in (MANIFEST_FILE, "names.npy"):
            (packed / file.name).symlink_to(file)
    before = place.dataset.manifest.model_copy(update={"names_sha256": None})
    before = before.model_copy(update={"fingerprint": before.content_fingerprint()})
    (packed / MANIFEST_FILE).write_text(json.dumps(before.model_dump(exclude_none=True)))
    dataset = PackedDataset.open(packed)
    assert open_stored(place.by_identity(), everybody(dataset), DIM, tmp_path).by == "identity"
    with pytest.raises(DataError, match="pack it again"):
        open_stored(place.by_image(), everybody(dataset), DIM, tmp_path)


def test_a_model_is_held_against_stored_vectors(place: Place, tmp_path: Path) -> None:
    few = place.save("few", list(place.keys[60:80]), place.vectors[60:80])  # a model needs no vector for each image
    model = FrozenModel(place.old, DIM, "x", OUR_INPUT)
    assert check_against_vectors(model, few, place.dataset, SIZE, tmp_path) > 0.9999
    wrong = FrozenModel(place.old, DIM, "x", InputSpec(channels="bgr"))
    with pytest.raises(DataError, match='They agree with channels = "rgb"'):
        check_against_vectors(wrong, few, place.dataset, SIZE, tmp_path)


def test_a_run_over_vectors_equals_the_run_over_their_model(place: Place) -> None:
    model, image, identity = (
        report_of(place, name, old)
        for name, old in (
            ("model", {"net": "tiny8", "weights": "old.safetensors"}),
            ("image", {"vectors": place.by_image().name}),
            ("identity", {"vectors": place.by_identity().name}),
        )
    )
    for pair in ("old_old", "new_old", "new_new"):
        assert image[pair]["tar_at_far"]["0.1"] == pytest.approx(model[pair]["tar_at_far"]["0.1"], abs=2e-2)
        assert image[pair]["num_genuine"] == model[pair]["num_genuine"]
    assert image["criterion_met"] == model["criterion_met"]
    assert "old_old" not in identity and identity["criterion_met"] is None
    assert "cannot be measured" in identity["reasons"][0]
    assert identity["new_new"] == image["new_new"]
    assert identity["new_old"]["num_genuine"] == 10 * PHOTOS  # each photo against its person's one vector


def report_of(place: Place, name: str, old: dict[str, str]) -> dict:
    values = {
        "data": {"images": "photos", "image_size": SIZE, "heldout_identities": 10},
        "old": {"embedding_dim": DIM, **old},
        "new": {"net": "tiny16", "embedding_dim": DIM, "weights": "new.safetensors"},
        "head": {"loss": "softmax"},
        "compat": {"mode": "mapping-forward", "bridge": "least_squares"},
        "evaluation": {"fars": [0.1], "criterion_far": 0.1},
    }
    run_dir = place.folder / name
    run_dir.mkdir()
    job = Job(
        parse_config(values, "test", json_mode=True),
        place.folder / "packed",
        run_dir,
        place.folder / "cache",
        "f" * 16,
        "e" * 16,
        place.folder,
        False,
        {},
        {},
    )
    run_job(job, World(), lambda event: None)
    report: dict = json.loads((run_dir / "report.json").read_text())
    return report


def test_vectors_of_training_images_will_do_and_the_report_is_of_held_out_ones_that_have_some(place: Place) -> None:
    people = [key.partition("/")[0] for key in place.keys]
    heldout = set(split_identities(place.dataset.identities, 10, 0.5, 1).heldout)
    kept = sorted(heldout)[:4]  # of the ten, these have old vectors, the last of them of two photos
    rows = [n for n, one in enumerate(people) if one not in heldout or one in kept]
    rows = [n for n in rows if people[n] != kept[3] or place.keys[n][-5] in "01"]
    file = place.save("training", [place.keys[n] for n in rows], place.vectors[rows])
    report = report_of(place, "training", {"vectors": file.name})
    assert report["num_heldout_images"] == 3 * PHOTOS + 2
    assert report["old_old"]["num_genuine"] == report["new_new"]["num_genuine"]
    # nobody who is held out, or nobody with two photos: nothing could be said
    for name, more in (("none", []), ("one", [next(n for n in rows if people[n] == kept[0])])):
        some = [n for n in rows if people[n] not in heldout] + more
        file = place.save(name, [place.keys[n] for n in some], place.vectors[some])
        with pytest.raises(DataError, match=f"hold {len(more)} of the 40 held-out images"):
            report_of(place, name, {"vectors": file.name})
    missing = [n for n in rows if n != next(n for n in rows if people[n] not in heldout)]
    file = place.save("missing", [place.keys[n] for n in missing], place.vectors[missing])
    with pytest.raises(DataError, match="119 of the 120 training images"):
        report_of(place, "missing", {"vectors": file.name})


def test_one_vector_an_identity_of_the_training_set_will_do(place: Place) -> None:
    people = sorted({key.partition("/")[0] for key in place.keys})
    heldout = split_identities(place.dataset.identities, 10, 0.5, 1).heldout
    kept = [one for one in people if one not in set(heldout)] + list(heldout)[:3]
    means = [place.vectors[[key.startswith(f"{one}/") for key in place.keys]].mean(0) for one in kept]
    file = place.save("people", kept, np.stack(means))
    report = report_of(place, "people", {"vectors": file.name})
    assert report["num_heldout_images"] == 3 * PHOTOS and "old_old" not in report


def test_the_identities_that_an_old_model_has_seen_come_from_its_file(place: Place) -> None:
    """Alignment weights of the stored space are those of the listed people alone, not of a share of the split."""
    split = split_identities(place.dataset.identities, 10, 0.5, 1)
    train = sorted(split.train)
    listed = [key for key in train if key not in set(split.old)][:5]  # none that the split would have guessed
    (place.folder / "seen.txt").write_text("".join(f"{key}\n" for key in [*listed, "somebody else"]), encoding="utf-8")
    values = {
        "data": {"images": "photos", "image_size": SIZE, "heldout_identities": 10},
        "old": {"embedding_dim": DIM, "vectors": place.by_image().name, "identities": "seen.txt"},
        "new": {"net": "tiny16", "embedding_dim": DIM},
        "head": {"loss": "softmax"},
        "compat": {"seen_only": True},
    }
    config = parse_config(values, "test", json_mode=True)
    parts = open_parts(config.data, place.folder, place.dataset, None)
    assert seen_identities(config, place.folder, parts) == set(listed)
    directories = (place.folder / "packed", place.folder / "seen-run", place.folder / "seen-cache")
    job = Job(config, *directories, "f" * 16, "e" * 16, place.folder, False, {}, {})
    old = open_stored(place.folder / "image.npz", parts.view("train"), DIM, place.folder)
    space = _old_space(job, old, parts.view("train"), World(), lambda event: None)
    assert space.align_weight_S is not None
    weighed = [key for key, weight in zip(train, space.align_weight_S.tolist(), strict=True) if weight > 0.0]
    assert weighed == listed
    for text, words in (("somebody else\n", "names none of the 30 training identities"), (None, "is not a file")):
        (place.folder / "seen.txt").unlink()
        if text is not None:
            (place.folder / "seen.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            seen_identities(config, place.folder, parts)
