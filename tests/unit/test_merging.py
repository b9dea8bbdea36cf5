"""Merging is shuffled over all sets by a seed, gives the same bytes on any number of workers, and survives kill -9."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lce_dist.errors import DataError
from pipelines.importing import ImportSettings
from pipelines.manifest import PackedDataset, Quarantined, read_quarantine, write_quarantine
from pipelines.merging import merge
from pipelines.order import derive_key, permute
from pipelines.reading import ShardReader
from pipelines.tars import index_tars
from pipelines.verify import verify
from tests.unit.test_edit import contents, pack
from tests.unit.test_import import encoded, hashes
from tests.unit.test_import_formats import tar_of

SETTINGS = ImportSettings("both", 40_000, images=None)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sets")
    people = ({"ann": 60, "bob": 30}, {"bob": 40, "cai": 60}, {"dee": 110})
    return [pack(root / name, of_set, 1000 * n) for n, (name, of_set) in enumerate(zip("abc", people, strict=True))]


def test_samples_come_in_the_order_of_packing_over_all_sets(three: list[Path], tmp_path: Path) -> None:
    merged = merge(three, tmp_path / "out", SETTINGS, {}, False, 1).dataset
    sets = [PackedDataset.open(one) for one in three]
    images = [bytes(image) for one in sets for image in ShardReader(one).read(np.arange(one.num_samples))]
    order = permute(np.arange(300), 300, derive_key(0, 300)).tolist()
    assert [bytes(one) for one in ShardReader(merged).read(np.arange(300))] == [images[place] for place in order]
    assert merged.manifest.shuffled is True and len(merged.manifest.shards) > 10
    assert contents(tmp_path / "out") == sum((contents(one) for one in three[1:]), contents(three[0]))
    other = merge(three, tmp_path / "turned", ImportSettings("both", 40_000, 1, images=None), {}, False, 1).dataset
    assert other.index["label"].tolist() != merged.index["label"].tolist()
    again = merge(three, tmp_path / "out", SETTINGS, {}, False, 1)
    assert again.dataset.fingerprint == merged.fingerprint
    merge(three, tmp_path / "many", SETTINGS, {}, False, 2)
    assert hashes(tmp_path / "many") == hashes(tmp_path / "out")


def test_images_of_other_formats_keep_their_bytes_and_are_called_what_they_are(
    three: list[Path], tmp_path: Path
) -> None:
    png, tiff = encoded(1, "PNG"), encoded(2, "TIFF")
    tars = tar_of(tmp_path / "tars" / "a.tar", [("x.cls", b"1"), ("x.png", png), ("y.cls", b"2"), ("y.tif", tiff)])
    indexed = tmp_path / "indexed"
    index_tars([tars], tars.parent, indexed, ImportSettings(), 1)
    write_quarantine(indexed, [Quarantined(1, "y.tif", "blurred")])
    merged = merge([three[0], indexed], tmp_path / "out", SETTINGS, {}, False, 1).dataset
    assert contents(tmp_path / "out") == contents(three[0]) + contents(indexed)
    (one,) = read_quarantine(tmp_path / "out", merged.num_samples)
    assert one.reason == "blurred" and one.key == merged.sample_key(one.sample) and one.key.endswith(".tif")
    assert verify(tmp_path / "out", decode=True, num_workers=1).findings == ()


def test_a_shard_that_was_cut_stops_it(three: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(three[0], tmp_path / "a"))
    index = np.load(copy / "index.npy")
    source = PackedDataset.open(copy)
    path = source.shard_path(int(index["shard"][-1]))
    content = path.read_bytes()
    opened = PackedDataset.open(copy)  # found whole, and cut after that
    path.write_bytes(content[: int(index["offset"][-1]) + 10])
    from pipelines.merging import _source

    made, _ = _source([opened], {}, False)
    with pytest.raises(DataError, match="ends before byte"):
        made.read(opened.num_samples - 1)


_RUN = """
import sys
from pathlib import Path
from pipelines.importing import ImportSettings
from pipelines.merging import merge
print("begins", flush=True)
merge([Path(one) for one in sys.argv[3:]], Path(sys.argv[1]), ImportSettings("both", 40_000, images=None), {}, False, int(sys.argv[2]))
"""


def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(three: list[Path], tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.importing"
    merge(three, tmp_path / "calm", SETTINGS, {}, False, 1)
    moments, kills, seen = random.Random(3), 0, []
    finished: dict[str, int] = {}
    while kills < 10:
        command = [sys.executable, "-c", _RUN, str(out), "2" if kills % 5 == 4 else "1", *map(str, three)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        before, more = len(list(work.glob("records-0/*.npz"))), moments.randrange(4)
        while process.poll() is None and len(list(work.glob("records-0/*.npz"))) < before + more:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.communicate()
        if out.exists():  # quicker than the kill
            assert hashes(out) == hashes(tmp_path / "calm")
            shutil.rmtree(out)
            shutil.rmtree(work, ignore_errors=True)
            finished = {}
            continue
        kills += 1
        assert process.returncode == -signal.SIGKILL
        records = {path.stem for path in work.glob("records-0/*.npz")}
        assert finished.keys() <= records
        finished.update({stem: (work / "data" / f"both-{stem}.tar").stat().st_ino for stem in records})
        seen.append(len(records))
    assert len(set(seen)) > 3, f"the kills came too early or too late to matter: {seen} shards were done"
    subprocess.run([sys.executable, "-c", _RUN, str(out), "1", *map(str, three)], check=True)
    assert hashes(out) == hashes(tmp_path / "calm") and not work.exists()
    assert {stem: (out / f"both-{stem}.tar").stat().st_ino for stem in finished} == finished
