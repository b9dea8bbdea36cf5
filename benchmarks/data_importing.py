"""How fast images are imported and merged, with each check, against the floor: a bare loop that copies them in shuffled order.

    python -m benchmarks.data_importing [--quick] [--out DIR]

Records of 112 x 112 JPEGs lie in a .rec in the page cache. The floor reads each by pread in the order of an import, writes it to
one file and calls fsync; a second one writes and hashes as many bytes as a tar of them has. One process, no headers, no hash, no look at the images. Imports run in this one process too, so that the start
of workers is not in it. Rounds are interleaved; ratios are medians of those within rounds,
of wall and of processor time: the latter hold on a shared machine. Memory is the peak of what was allocated.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import Mark, write_record
from pipelines.images import Check, ImageRules
from pipelines.importing import ImportSettings, import_images
from pipelines.merging import merge
from pipelines.order import derive_key, permute
from pipelines.recordio import MAGIC, RecordSource, open_records

_LEAST_OF_FLOOR = 0.8
_MOST_BYTES = 150  # an image of a folder, with paths of 28 characters

_FOLDER_MEMORY = """
import sys, tracemalloc
from pathlib import Path
from pipelines.folders import open_folder
tracemalloc.start()
found = open_folder(Path(sys.argv[1]))
print(tracemalloc.get_traced_memory()[1] / len(found.label_N))
"""


def write_records(path: Path, num_images: int) -> RecordSource:
    """JPEGs of about 4 KB with a grain; 500 are distinct, which no contestant can exploit."""
    generator, payloads = np.random.default_rng(1), []
    for _ in range(min(500, num_images)):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((112, 112), Image.Resampling.BICUBIC), dtype=np.float64)
        encoded = io.BytesIO()
        grainy = (smooth + generator.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(encoded, "JPEG", quality=86)
        payloads.append(encoded.getvalue())
    with open(path, "wb") as file, open(path.with_suffix(".idx"), "w") as index:
        for number in range(num_images):
            body = struct.pack("<IfQQ", 0, float(number % max(2, num_images // 20)), number, 0)
            body += payloads[number % len(payloads)]
            index.write(f"{number}\t{file.tell()}\n")
            file.write(struct.pack("<II", MAGIC, len(body)) + body + bytes(-len(body) % 4))
    return open_records(path)[0]


def copy_loop(source: RecordSource, out: Path) -> None:
    """The floor."""
    count = len(source.label_N)
    order = permute(np.arange(count, dtype=np.int64), count, derive_key(0, count)).tolist()
    offsets, sizes = (source.offset_N + 32).tolist(), source.bytes_N.tolist()
    descriptor = os.open(source.path, os.O_RDONLY)
    with open(out, "wb", buffering=1 << 20) as file:
        for number in order:
            file.write(os.pread(descriptor, sizes[number], offsets[number]))
        file.flush()
        os.fsync(file.fileno())
    os.close(descriptor)


def copy_into_tar(source: RecordSource, out: Path) -> None:
    """The floor of what becomes a shard: as many bytes as its members take, hashed; but no header is made."""
    count = len(source.label_N)
    order = permute(np.arange(count, dtype=np.int64), count, derive_key(0, count)).tolist()
    offsets, sizes = (source.offset_N + 32).tolist(), source.bytes_N.tolist()
    descriptor, hashed, parts, head = os.open(source.path, os.O_RDONLY), hashlib.sha256(), [], bytes(5 * 512)
    with open(out, "wb", buffering=0) as file:
        for place, number in enumerate(order):
            parts += [head, os.pread(descriptor, sizes[number], offsets[number]), bytes(-sizes[number] % 512)]
            if len(parts) >= 3 * 512 or place + 1 == count:
                chunk = b"".join(parts)
                hashed.update(chunk)
                file.write(chunk)
                parts = []
        os.fsync(file.fileno())
    os.close(descriptor)


def measure(folder: Path, quick: bool) -> tuple[list[Mark], dict[str, Any]]:
    """Times of each contestant in each round, and the marks; ``folder`` is filled and left to the caller."""
    num_images, num_rounds = (20_000, 3) if quick else (100_000, 5)
    source = write_records(folder / "train.rec", num_images)

    def importing(check: Check) -> Callable[[], None]:
        settings = ImportSettings(shard_bytes=64 << 20, images=ImageRules(check=check))
        return lambda: _void(import_images(source, folder / "out", settings, 1))

    for half in ("one", "other"):
        settings = ImportSettings(half, 64 << 20, images=ImageRules(check="none"))
        import_images(source, folder / half, settings, 1)
    merged = ImportSettings(shard_bytes=64 << 20, images=None)
    sets = (folder / "one", folder / "other")
    contestants: dict[str, tuple[int, Callable[[], None]]] = {
        "copy loop": (num_images, lambda: copy_loop(source, folder / "out")),
        "into tar": (num_images, lambda: copy_into_tar(source, folder / "out")),
        "none": (num_images, importing("none")),
        "quick": (num_images, importing("quick")),
        "merge": (2 * num_images, lambda: _void(merge(sets, folder / "out", merged, {}, False, 1))),
    }
    if not quick:
        contestants["full"] = (num_images, importing("full"))
    clocks: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
    rates: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in contestants} for clock in clocks}
    for turn in range(num_rounds + 1):  # the first warms up
        for name, (count, work) in contestants.items():
            begun = {clock: now() for clock, now in clocks.items()}
            work()
            if turn:
                for clock, now in clocks.items():
                    rates[clock][name].append(count / (now() - begun[clock]))
            out = folder / "out"
            shutil.rmtree(out) if out.is_dir() else out.unlink()
    shares: dict[str, dict[str, float]] = {}
    for clock, of_all in rates.items():
        floors = of_all["copy loop"]
        shares[clock] = {
            name: statistics.median(one / floor for one, floor in zip(of_name, floors, strict=True))
            for name, of_name in of_all.items()
        }
        for name, of_name in of_all.items():
            print(
                f"{clock:10}{name:10}{statistics.median(of_name):>9,.0f} images/s ({min(of_name):,.0f} to {max(of_name):,.0f})"
                f"{shares[clock][name]:>8.2f} of the copy loop"
            )
    memory = _folder_memory(folder, 20_000 if quick else 200_000)
    marks = []
    for name, against in (("none", "into tar"), ("quick", "none"), ("merge", "none")):
        best = max(
            statistics.median(one / other for one, other in zip(of_all[name], of_all[against], strict=True))
            for of_all in rates.values()
        )
        what = f"{name} against {against}"
        marks.append(Mark(what, best, f">= {_LEAST_OF_FLOOR}", best >= _LEAST_OF_FLOOR))
    marks.append(Mark("listing a folder, bytes an image", memory, f"<= {_MOST_BYTES}", memory <= _MOST_BYTES))
    raw = {"images_per_s": rates, "of_copy_loop": shares, "images": num_images, "workers": 1}
    return marks, {**raw, "folder_bytes_per_image": memory}


def _void(_: object) -> None:
    """Nothing is returned."""


def _folder_memory(folder: Path, num_images: int) -> float:
    root, photo = folder / "photos", folder / "photo.jpg"
    photo.write_bytes(b"x")
    for person in range(num_images // 100):
        place = root / f"0_{person % 10}" / f"{person:07d}"
        place.mkdir(parents=True)
        for number in range(100):
            os.link(photo, place / f"{person % 10}_{number:06d}.jpg")
    told = subprocess.run([sys.executable, "-c", _FOLDER_MEMORY, str(root)], capture_output=True, text=True, check=True)
    return float(told.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        marks, raw = measure(Path(folder), arguments.quick)
    return write_record("data-importing", arguments.out, marks, raw)


if __name__ == "__main__":
    sys.exit(main())
