"""The benchmark of reading compares like with like, and its store keeps its limit."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import numpy as np

from benchmarks.data import image_means, pass_over, ratio, same_pixels
from benchmarks.data_readers import contestants, pack_noise, write_dali_indices, write_folder, write_records
from benchmarks.data_scale import one_process, slope
from benchmarks.data_store import store
from pipelines.repeated import repeat_dataset


def test_all_readers_hand_out_the_same_images(tmp_path: Path) -> None:
    view = pack_noise(tmp_path, 600)
    indices = write_dali_indices(view.dataset, tmp_path)
    write_folder(view, tmp_path / "folder")
    write_records(view, tmp_path / "train.rec")
    readers = contestants(view, indices, tmp_path / "folder", tmp_path / "train.rec")
    plain = {name: reader for name, reader in readers.items() if "augmented" not in name}
    assert len(plain) == 6 and same_pixels(plain, 600)
    other = pack_noise(tmp_path / "other", 400)
    assert not same_pixels({**plain, "ours": contestants(other, [], tmp_path, tmp_path)["ours"]}, 600)
    for name in ("ours, augmented", "WebDataset + Pillow, augmented"):
        means = image_means(readers[name])
        assert len(means) == 600 and abs(means.mean() - image_means(plain["ours"]).mean()) < 0.1
        assert not np.allclose(means, image_means(plain["ours"]), atol=1e-3)
    speed, first_s = pass_over(plain["ours"])
    assert speed > 0 and first_s > 0


def test_the_store_gives_no_more_than_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1 << 20))
    with store(tmp_path, 4 * 2**20) as url:
        started = time.monotonic()
        for _ in range(2):
            assert len(urllib.request.urlopen(f"{url}/a.tar").read()) == 1 << 20
        assert time.monotonic() - started > 0.4


def test_a_process_tells_what_a_large_set_adds(tmp_path: Path) -> None:
    small = pack_noise(tmp_path / "few", 300).dataset
    repeat_dataset(small, tmp_path / "large", 2_000, 10)
    told = one_process(small.directory, tmp_path / "large", tmp_path / "cache")
    assert {"open_s", "views_s", "first_batch_s", "resident_mib", "anonymous_mib"} == told.keys()
    assert abs(slope({1: 3.0, 2: 5.0, 4: 9.0}) - 2.0) < 1e-9
    assert ratio({"a": [2.0, 6.0, 1.0], "b": [1.0, 2.0, 1.0]}, "a", "b") == 2.0
