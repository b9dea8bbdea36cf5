"""Columns of attributes, found by images' names or identities, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lce_dist.config import parse_synthetic
from lce_dist.errors import DataError
from pipelines.attributes import attributes_of, drawn_attributes
from pipelines.manifest import PackedDataset
from pipelines.pack import pack_images
from pipelines.synthetic import draw_photo, photo_attributes

IMAGES = [(f"id-{number}", f"id-{number}/{photo}.jpg") for number in range(3) for photo in range(4)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    out = tmp_path_factory.mktemp("packed") / "p"
    rows = ((key, name, b"jpeg") for key, name in IMAGES)
    return pack_images(rows, ["id-0", "id-1", "id-2"], 12, out, "p", "source")


def written(folder: Path, rows: list[str], name: str = "a.csv") -> Path:
    (folder / name).write_text("\n".join(rows) + "\n")
    return folder / name


ALL = np.arange(12)


def test_by_image_by_identity_or_both(dataset: PackedDataset, tmp_path: Path) -> None:
    by_image = written(tmp_path, ["key,cover", *(f"{name},{place % 2}x" for place, (_, name) in enumerate(IMAGES))])
    assert attributes_of(by_image, dataset, ALL)["cover"].tolist() == ["0x", "1x"] * 6
    assert attributes_of(by_image, dataset, np.array([3, 6]))["cover"].tolist() == ["1x", "0x"]
    by_identity = written(tmp_path, ["key,group,town", "id-2,b,", "id-0,a,Ulm"])
    found = attributes_of(by_identity, dataset, ALL)
    assert found["group"].tolist() == ["a"] * 4 + ["unknown"] * 4 + ["b"] * 4
    assert found["town"].tolist() == ["Ulm"] * 4 + ["unknown"] * 8
    both = written(tmp_path, ["key,group", "id-0,a", "id-0/2.jpg,special"])
    assert attributes_of(both, dataset, ALL)["group"].tolist() == ["a", "a", "special", "a"] + ["unknown"] * 8


def test_numbers_are_cut_at_their_quartiles_when_there_are_many(dataset: PackedDataset, tmp_path: Path) -> None:
    names = [name for _, name in IMAGES] + [f"elsewhere/{number}" for number in range(20)]
    table = pa.table({"key": names, "age": [float(n) for n in range(31)] + [None], "few": [n % 3 for n in range(32)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = attributes_of(tmp_path / "a.parquet", dataset, ALL)
    assert sorted(set(found["age"].tolist())) == [f"{n}" for n in sorted(f"{float(n)}" for n in range(12))]
    assert set(found["few"].tolist()) == {"0", "1", "2"}
    many = pa.table({"key": names[:12], "age": [float(n) / 7 for n in range(12)]})
    pyarrow.parquet.write_table(many, tmp_path / "b.parquet")
    assert (
        len(set(attributes_of(tmp_path / "b.parquet", dataset, ALL)["age"].tolist())) == 12
    )  # up to 12 stay as they are


def test_quartiles_of_more_than_twelve(tmp_path: Path) -> None:
    rows = ((f"i-{n // 2:02d}", f"{n}.jpg", b"jpeg") for n in range(40))
    dataset = pack_images(rows, [f"i-{n:02d}" for n in range(20)], 40, tmp_path / "p", "p", "source")
    path = written(tmp_path, ["key,age", *(f"{n}.jpg,{n}" for n in range(39))])
    age = attributes_of(path, dataset, np.arange(40))["age"].tolist()
    assert age[0] == "0 to 9.5" and age[9] == "0 to 9.5" and age[10] == "9.5 to 19" and age[38] == "28.5 to 38"
    assert age[39] == "unknown" and {age.count(word) for word in set(age)} == {1, 9, 10}


@pytest.mark.parametrize(
    ("rows", "name", "what"),
    [
        (["key,a", "id-0,1"], "a.txt", "must be .csv or .parquet"),
        (["name,a", "id-0,1"], "a.csv", "must be 'key' and at least one"),
        (["key", "id-0"], "a.csv", "must be 'key' and at least one"),
        (["key,a,a", "id-0,1,2"], "a.csv", "each once"),
        (["key,a", "id-0,1", "id-0,2"], "a.csv", "rows 1 and 2 below the head have one key"),
        (["key,a", "nobody,1"], "a.csv", "none of 1 keys names one of the 12"),
        (["key,a", "id-0,1,2,3"], "a.csv", "cannot be read"),
        (["key,a", *(f"{name},word{place}" for place, (_, name) in enumerate(IMAGES))], "a.csv", None),
    ],
)
def test_refusals(dataset: PackedDataset, tmp_path: Path, rows: list[str], name: str, what: str | None) -> None:
    path = written(tmp_path, rows, name)
    if what is None:
        assert len(set(attributes_of(path, dataset, ALL)["a"].tolist())) == 12
        return
    with pytest.raises(DataError, match=what) as error:
        attributes_of(path, dataset, ALL)
    assert "id-0" not in str(error.value) and "nobody" not in str(error.value)


def test_too_many_words_and_other_types_are_refused(tmp_path: Path) -> None:
    rows = ((f"i-{n // 2:02d}", f"{n}.jpg", b"jpeg") for n in range(80))
    dataset = pack_images(rows, [f"i-{n:02d}" for n in range(40)], 80, tmp_path / "p", "p", "source")
    path = written(tmp_path, ["key,a", *(f"{n}.jpg,w{n}" for n in range(80))])
    with pytest.raises(DataError, match="80 different words"):
        attributes_of(path, dataset, np.arange(80))
    pyarrow.parquet.write_table(pa.table({"key": ["0.jpg"], "a": [[1, 2]]}), tmp_path / "l.parquet")
    with pytest.raises(DataError, match="must be words, numbers or booleans"):
        attributes_of(tmp_path / "l.parquet", dataset, np.arange(80))
    with pytest.raises(DataError, match="is not a file"):
        attributes_of(tmp_path / "none.csv", dataset, np.arange(80))


def test_drawn_faces_say_what_they_were_drawn_with() -> None:
    config = parse_synthetic(
        {"identities": 30, "photos_per_identity": 8, "photo_size": 64, "difficulty": 0.8, "seed": 3}
    )
    found = drawn_attributes(config, np.arange(240))
    assert found["cover"].tolist()[17] == photo_attributes(config, 2, 1)["cover"]
    for name, words in (
        ("cover", {"none", "glasses", "hat"}),
        ("light", {"dark", "even", "bright"}),
        ("pose", {"frontal", "turned"}),
    ):
        assert words <= set(found[name].tolist())
    # one person has one skin
    assert all(len(set(found["skin"][first : first + 8].tolist())) == 1 for first in range(0, 240, 8))

    # dark photos are darker: what is said is what was drawn
    def mean(light: str) -> float:
        chosen = [divmod(n, 8) for n in range(240) if found["light"][n] == light][:20]
        return float(np.mean([draw_photo(3, who, photo, 64, 0.8).mean() for who, photo in chosen]))

    assert mean("dark") + 15 < mean("even") < mean("bright") - 15
