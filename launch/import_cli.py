"""The command ``lce data import``: from what people have to a packed data set."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lce_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.importing import Imported, ImportSettings

_FORMATS = ("folder", "zip", "recordio", "webdataset", "parquet", "csv", "pairs")
_PLAIN_EVERY_S = 10.0
_LEAST_S = 0.05
_LOOKING = "looking"  # at the source, before anything is written

_EPILOG = """\
formats, found out from what SOURCE is:
  folder, zip   a sub-folder an identity; its path is the identity's key
  recordio      train.rec with or without train.idx (MS1MV3, Glint360K, WebFace42M, im2rec), or the folder of it
  webdataset    a folder of .tar files, or one; indexed where they are, nothing is copied
  parquet       a file, or a folder of them, with the images' bytes in a column
  csv           columns path and identity; paths relative to the table
  pairs         lfw.bin, cfp_fp.bin, agedb_30.bin; pairs.csv for lce evaluate is written beside the shards

An import that was stopped, even by kill -9, goes on where it was when the same command is given again, and ends
with the same bytes.

examples:
  lce data import photos/ packed/photos
  lce data import ms1m-retinaface-t1/train.rec packed/ms1mv3 --no-decode
  lce data import shards/ indexed --format webdataset --label-key person
  lce data import table.parquet packed/table --image-column photo --label-column person --size 112
  lce data import people.csv packed/people --root /data/photos --bad skip
"""


def add_import_commands(data: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``import`` to the actions of ``lce data``."""
    importer = data.add_parser(
        "import",
        help="folders, RecordIO, tars, Parquet, CSV or pair files to WebDataset shards",
        description="Pack SOURCE into OUT: shuffled shards, index, manifest. JPEGs go in as they are.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importer.add_argument("source", type=Path, metavar="SOURCE")
    importer.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    importer.add_argument("--format", choices=_FORMATS, help="what SOURCE is (default: found out)")
    importer.add_argument("--name", default="images", help="shards are NAME-000000.tar (default: images)")
    importer.add_argument("--shard-mb", type=int, default=256, help="size of a shard in MB (default: 256)")
    importer.add_argument("--seed", type=int, default=0, help="of the shuffle (default: 0)")
    importer.add_argument("--workers", type=int, help="processes (default: one a core)")
    importer.add_argument("--size", type=int, help="scale down to this many pixels on the shorter side; never up")
    importer.add_argument("--quality", type=int, help="encode every image anew as JPEG of this quality, 1 to 100")
    importer.add_argument(
        "--bad",
        choices=("stop", "skip"),
        default="stop",
        help="images that cannot be decoded: stop at the first, or leave them out and list them in OUT/skipped.csv",
    )
    importer.add_argument(
        "--decode",
        choices=("quick", "full", "none"),
        default="quick",
        help="quick: read each JPEG's structure to its end, and decode what that leaves open (default); full: decode every "
        "image; none: trust headers, broken images are met in training",
    )
    importer.add_argument("--no-decode", dest="decode", action="store_const", const="none", help="--decode none")
    importer.add_argument("--image-column", help="parquet, csv: the column of images or paths")
    importer.add_argument("--label-column", help="parquet, csv: the column of identities")
    importer.add_argument("--label-key", help="webdataset: the entry of a sample's .json that names its identity")
    importer.add_argument(
        "--labels", type=Path, metavar="FILE.lst", help="recordio: take labels from this list, not from the records"
    )
    importer.add_argument(
        "--idx",
        action="store_true",
        help="also write NAME-000000.idx (DALI's) and shards.json (wids') beside the shards",
    )
    importer.add_argument(
        "--json", metavar="FILE", help="also write the counts here (-: standard output, nothing else)"
    )
    importer.add_argument("--root", type=Path, help="csv: the folder that paths are below (default: the table's own)")
    importer.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.edit_cli import check_json, tell
    from pipelines.formats import SourceOptions, files_below, find_format, open_source, refuse_foreign
    from pipelines.images import ImageRules
    from pipelines.importing import SKIPPED_FILE, ImportSettings, import_images

    check_json(arguments.json)
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}; must be at least 1")
    settings = ImportSettings(
        arguments.name,
        arguments.shard_mb << 20,
        arguments.seed,
        ImageRules(arguments.size, arguments.quality, arguments.decode),
        arguments.bad == "skip",
    )
    options = SourceOptions(
        arguments.image_column, arguments.label_column, arguments.labels, arguments.root, arguments.label_key
    )
    num_workers = arguments.workers or len(os.sched_getaffinity(0))
    notes: list[str] = []
    kind = arguments.format or find_format(arguments.source)
    console = Console(stderr=True)
    if kind == "webdataset":
        refuse_foreign(kind, options)
        tars = files_below(arguments.source, ".tar")
        imported = _index(arguments, tars, settings, num_workers, console)
    else:
        with bar(console, _LOOKING, "records") as looking:
            source, notes = open_source(
                arguments.source, kind, options, lambda done, of: looking.show(done, of), settings.skip_bad
            )
        for note in notes:
            console.print(note, highlight=False, soft_wrap=True)
        with bar(console, "importing", "images") as importing:
            imported = import_images(source, arguments.out, settings, num_workers, importing.show)
    packed = imported.dataset
    if arguments.idx:
        from pipelines.sidecars import write_sidecars

        write_sidecars(packed)
    lines = []
    if imported.dropped_identities:
        shown = ", ".join(imported.dropped_identities[:5])
        lines.append(f"{len(imported.dropped_identities):,} identities had no other image and are left out: {shown}")
    total = (
        f"{arguments.out}: {packed.num_samples:,} images of {len(packed.identities):,} identities in "
        f"{len(packed.manifest.shards):,} shards"
    )
    if imported.num_skipped:
        total += f"; {imported.num_skipped:,} left out, see {arguments.out / SKIPPED_FILE}"
    total += "".join(f"; {note}" for note in notes if "passed over" in note)
    values = {
        "data_set": str(arguments.out),
        "format": kind,
        "samples": packed.num_samples,
        "identities": len(packed.identities),
        "shards": len(packed.manifest.shards),
        "skipped": imported.num_skipped,
        "dropped_identities": list(imported.dropped_identities),
        "shuffled": packed.manifest.shuffled,
        "fingerprint": packed.fingerprint,
        "notes": notes,
    }
    tell(arguments.json, values, [*lines, total])


def _index(
    arguments: argparse.Namespace, tars: list[Path], settings: ImportSettings, num_workers: int, console: Console
) -> Imported:
    from pipelines.tars import index_tars

    source, out = arguments.source, arguments.out
    if source.is_dir() and out.absolute().is_relative_to(source.absolute()):
        raise DataError(
            f"output {out} lies in the folder of the tars, {source}, where nothing is written; choose another"
        )
    root = source if source.is_dir() else source.parent
    with bar(console, "indexing", "MB", 1e6) as indexing:
        return index_tars(tars, root, arguments.out, settings, num_workers, arguments.label_key, indexing.show)


class ImportBar:
    """How far it is, how fast, and how long still: one live line in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console: Console, what: str, unit: str, progress: Any, per_unit: float) -> None:
        self._console, self._what, self._unit, self._progress, self._per_unit = console, what, unit, progress, per_unit
        self._task: Any = None
        self._first, self._ended = 0.0, False
        self._started_s = self._printed_s = time.monotonic()

    def show(self, done: int, total: int, num_bytes: int = 0) -> None:
        """Tell that ``done`` of ``total`` are done, ``num_bytes`` of them in this run."""
        now = time.monotonic()
        done_units, units = done / self._per_unit, total / self._per_unit
        if self._task is None:
            self._task = self._progress.add_task(self._what, total=units, detail="")
            if done and num_bytes == 0 and self._what != _LOOKING:
                self._first, self._started_s = done_units, now
                self._console.print(f"going on from {done_units:,.0f} of {units:,.0f} {self._unit}", highlight=False)
        if now - self._printed_s < (0.2 if self._console.is_terminal else _PLAIN_EVERY_S) and (
            done < total or self._ended
        ):
            return
        self._ended = done == total
        self._printed_s = now
        elapsed_s = now - self._started_s
        rate = (done_units - self._first) / max(elapsed_s, _LEAST_S)
        told = []
        if elapsed_s >= _LEAST_S:  # a rate of a moment says nothing
            told.append(f"{rate:,.0f} {self._unit}/s")
            if num_bytes and self._unit != "MB":
                told.append(f"{num_bytes / 1e6 / elapsed_s:,.0f} MB/s")
            if rate > 0 and done < total:
                minutes, seconds = divmod(round((units - done_units) / rate), 60)
                told.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
        detail = ", ".join(told)
        if self._console.is_terminal:
            self._progress.update(self._task, completed=done_units, total=units, detail=detail)
            self._progress.refresh()
        else:
            digits = 1 if self._per_unit > 1 and units < 10 else 0
            line = f"{self._what}: {done_units:,.{digits}f}/{units:,.{digits}f}"
            line += f" {self._unit}" if self._per_unit > 1 else ""
            self._console.print(f"{line} {detail}".rstrip(), highlight=False, soft_wrap=True)


@contextmanager
def bar(console: Console, what: str, unit: str, per_unit: float = 1.0) -> Iterator[ImportBar]:
    """The bar of one piece of work; ``per_unit``: how many of what is counted make one of ``unit``."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[detail]}"),
    )
    progress = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
    with progress:
        yield ImportBar(console, what, unit, progress, per_unit)
