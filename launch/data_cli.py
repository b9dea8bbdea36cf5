"""The commands ``lce data``: pack, draw, look at and check data sets."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.edit_cli import add_edit_commands, check_png, writing
from launch.import_cli import add_import_commands
from lce_dist.config import SyntheticConfig
from lce_dist.errors import ConfigError


def add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``data`` and its actions to the commands of ``lce``."""
    data = commands.add_parser("data", help="pack, draw and look at data sets").add_subparsers(
        required=True, metavar="ACTION"
    )
    pack = data.add_parser(
        "pack",
        help="a folder of images to WebDataset shards",
        description="Pack FOLDER (or a .zip of it; every folder that holds images is one identity) into OUT.",
        epilog="example:\n  lce data pack photos/ packed/photos",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pack.add_argument("folder", type=Path)
    pack.add_argument("out", type=Path)
    pack.add_argument("--name", default="images", help="shards are NAME-000000.tar (default: images)")
    pack.add_argument("--shard-mb", type=int, default=256, help="size of a shard in MB (default: 256)")
    pack.set_defaults(run=_pack)
    synth = data.add_parser(
        "synth",
        help="draw the embedded data set of synthetic faces",
        epilog="example:\n  lce data synth packed/faces --identities 1000 --photos 20",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    synth.add_argument("out", type=Path)
    synth.add_argument("--identities", type=int, default=600)
    synth.add_argument("--photos", type=int, default=16, help="photos an identity")
    synth.add_argument("--size", type=int, default=64, help="pixels")
    synth.add_argument("--difficulty", type=float, default=0.5, help="0 clean ... 1 extreme")
    synth.add_argument("--seed", type=int, default=1)
    synth.set_defaults(run=_synth)
    repeat = data.add_parser(
        "repeat",
        help="an index of any size over a small data set's bytes, to measure with",
        description="Write OUT: an index of as many people and samples as asked, over the shards of PACKED, whose bytes are used "
        "again and again. What start-up, memory and a step cost at your size, before you have the data.",
        epilog="example (2.4 GB of index, two minutes):\n"
        "  lce data repeat packed/faces packed/large --identities 10000000 --photos 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    repeat.add_argument("packed", type=Path)
    repeat.add_argument("out", type=Path)
    repeat.add_argument("--identities", type=int, required=True)
    repeat.add_argument("--photos", type=int, default=10, help="samples an identity (default: 10)")
    repeat.add_argument("--seed", type=int, default=0)
    repeat.set_defaults(run=_repeat)
    show = data.add_parser(
        "show",
        help="a contact sheet (PNG) of a packed data set",
        epilog="example:\n  lce data show packed/faces sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("packed", type=Path)
    show.add_argument("png", type=Path)
    show.add_argument("--identities", type=int, default=8)
    show.add_argument("--photos", type=int, default=10)
    show.add_argument("--tile", type=int, default=96, help="pixels of one photo on the sheet")
    show.set_defaults(run=_show)
    add_edit_commands(data)
    add_import_commands(data)


def _pack(arguments: argparse.Namespace) -> None:
    from pipelines.pack import pack_folder

    if not re.fullmatch(r"[A-Za-z0-9._-]+", arguments.name):
        raise ConfigError(f"--name is {arguments.name!r}; must be letters, digits, '.', '_' or '-'")
    if arguments.shard_mb < 1:
        raise ConfigError(f"--shard-mb is {arguments.shard_mb}; must be at least 1")
    with counter() as count:
        packed = pack_folder(
            arguments.folder,
            arguments.out,
            arguments.name,
            shard_size_bytes=arguments.shard_mb << 20,
            progress=lambda done, total: count("packing", done, total),
        )
    print(f"{arguments.out}: {packed.num_samples:,} images of {len(packed.identities):,} identities")


def _synth(arguments: argparse.Namespace) -> None:
    from launch.prepare import draw_faces
    from lce_dist.config import parse_synthetic

    config: SyntheticConfig = parse_synthetic(
        {
            "identities": arguments.identities,
            "photos_per_identity": arguments.photos,
            "photo_size": arguments.size,
            "difficulty": arguments.difficulty,
            "seed": arguments.seed,
        }
    )
    with counter() as count:
        packed = draw_faces(config, arguments.out, count)
    print(f"{arguments.out}: {packed.num_samples:,} images of {len(packed.identities):,} identities")


def _repeat(arguments: argparse.Namespace) -> None:
    from pipelines.manifest import PackedDataset
    from pipelines.repeated import repeat_dataset

    with counter() as count:
        made = repeat_dataset(
            PackedDataset.open(arguments.packed),
            arguments.out,
            arguments.identities,
            arguments.photos,
            arguments.seed,
            lambda done, total: count("repeating", done, total),
        )
    print(f"{arguments.out}: {made.num_samples:,} samples of {len(made.identities):,} identities")


def _show(arguments: argparse.Namespace) -> None:
    from launch.sheet import sheet_of
    from pipelines.manifest import PackedDataset

    for flag, value in (
        ("--identities", arguments.identities),
        ("--photos", arguments.photos),
        ("--tile", arguments.tile),
    ):
        if value < 1:
            raise ConfigError(f"{flag} is {value}; must be at least 1")
    check_png("PNG", arguments.png)
    sheet = sheet_of(PackedDataset.open(arguments.packed), arguments.identities, arguments.photos, arguments.tile)
    with writing(arguments.png):
        sheet.save(arguments.png)
    print(f"{arguments.png}: {sheet.width} x {sheet.height}")


@contextmanager
def counter() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: call it with (what, done, total)."""
    from rich.console import Console

    from launch.progress import RunProgress

    with RunProgress(Console(stderr=True)) as progress:
        yield progress.count
