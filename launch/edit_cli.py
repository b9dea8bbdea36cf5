"""The commands that look after a data set: ``lce data verify | stats | split | leakage | merge | remove``."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lce_dist.errors import ConfigError, DataError, FindingsError, RunError

if TYPE_CHECKING:
    from pipelines.leakage import Leak

_SHOWN = 20  # findings in the terminal; --json has all of them
_FINDINGS = "exit codes: 0 nothing found, 2 config or data, 3 there are findings"
_MOST_MB = 1 << 20


def add_edit_commands(data: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the actions to ``lce data``."""
    raw = argparse.RawDescriptionHelpFormatter
    verify = data.add_parser(
        "verify",
        help="find what is wrong with a packed data set; exit 3 when something is",
        description="Checksums, tar structure, that every row of the index points at an image of its size whose .cls and .id "
        "say the\nsame person; with --decode every image, with --duplicates the same image twice, exactly or nearly.",
        epilog="examples:\n"
        "  lce data verify packed/faces\n"
        "  lce data verify packed/faces --decode --duplicates --json findings.json\n"
        "  lce data verify packed/faces --decode --quarantine     (training leaves out what is found)\n\n" + _FINDINGS,
        formatter_class=raw,
    )
    verify.add_argument("packed", type=Path, metavar="DIR")
    verify.add_argument("--decode", action="store_true", help="decode every image")
    verify.add_argument("--duplicates", action="store_true", help="find equal images, and images that look alike")
    verify.add_argument(
        "--quarantine",
        action="store_true",
        help="write DIR/quarantine.json: every sample with a finding of its own, but not look-alikes",
    )
    _add_common(verify)
    verify.set_defaults(run=_verify)

    stats = data.add_parser(
        "stats",
        help="images per identity, sizes, brightness, what cannot be decoded; numbers and plots",
        epilog="examples:\n"
        "  lce data stats packed/faces --png faces.png\n"
        "  lce data stats packed/faces --all --json faces.json --png faces.png",
        formatter_class=raw,
    )
    stats.add_argument("packed", type=Path, metavar="DIR")
    stats.add_argument("--all", action="store_true", help="decode all images (default: 10,000 by chance)")
    stats.add_argument("--seed", type=int, default=1, help="which 10,000 (default: 1)")
    stats.add_argument("--png", type=Path, metavar="FILE", help="four plots")
    _add_common(stats)
    stats.set_defaults(run=_stats)

    split = data.add_parser(
        "split",
        help="which people and images the old and the new model see, and who is held out",
        description="Write OUT/split.json with lists of samples and identities; a run trains on it with data.split.\n\n"
        "  extended-data    the same people; the new model sees more images of each\n"
        "  extended-class   the people of the old model are a part of those of the new one\n"
        "  open-data        the same people, but no image twice\n"
        "  open-class       other people",
        epilog="examples:\n"
        "  lce data split packed/faces splits/faces --scenario extended-class --seed 1 --heldout 100\n"
        "  lce data split packed/faces splits/open --scenario open-data --fraction 0.3\n"
        "  launch/train.sh --config mine.toml --set data.split=splits/faces/split.json",
        formatter_class=raw,
    )
    split.add_argument("packed", type=Path, metavar="DIR")
    split.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    split.add_argument(
        "--scenario", required=True, choices=("extended-data", "extended-class", "open-data", "open-class")
    )
    split.add_argument(
        "--fraction",
        type=float,
        default=0.5,
        help="of the people (of each one's images) for the old model (default: 0.5)",
    )
    split.add_argument("--heldout", type=int, default=100, metavar="N", help="people that neither sees (default: 100)")
    split.add_argument("--seed", type=int, default=1)
    split.add_argument("--json", metavar="FILE", help="also write the counts here (-: standard output, nothing else)")
    split.set_defaults(run=_split)

    leakage = data.add_parser(
        "leakage",
        help="people and images that two data sets, or the parts of a split, have in common; exit 3 when there are any",
        description="Identity keys, equal bytes and look-alikes, found by hashes. With --split the held-out part is compared with "
        "what\nthe models are trained on and, where the scenario is open, the old part with the new one.",
        epilog="examples:\n"
        "  lce data leakage packed/train packed/test\n"
        "  lce data leakage packed/faces --split splits/faces/split.json --json leaks.json\n\n" + _FINDINGS,
        formatter_class=raw,
    )
    leakage.add_argument("packed", type=Path, metavar="A")
    leakage.add_argument("other", type=Path, metavar="B", nargs="?")
    leakage.add_argument("--split", type=Path, metavar="FILE", help="compare the parts of a split of A")
    _add_common(leakage)
    leakage.set_defaults(run=_leakage)

    merge = data.add_parser(
        "merge",
        help="several packed data sets become one",
        description="Copy all samples into a new data set OUT, shuffled; image bytes stay as they are. Identities of one key "
        "become one person.\nKilled at any moment, the same command goes on. A map says which keys of which set are one person: a CSV with the columns set, key, identity.",
        epilog="examples:\n"
        "  lce data merge packed/a packed/b packed/both --identity-map same.csv\n"
        "  lce data merge packed/a packed/b packed/both --prefix       (keys a/KEY and b/KEY: nobody is in both)",
        formatter_class=raw,
    )
    merge.add_argument("packed", type=Path, nargs="+", metavar="DIR", help="data sets, and a new folder OUT last")
    merge.add_argument("--identity-map", type=Path, metavar="FILE.csv", help="columns set, key, identity")
    merge.add_argument("--prefix", action="store_true", help="keys become FOLDER/KEY, but for those in the map")
    merge.add_argument("--name", default="merged", help="shards are NAME-000000.tar (default: merged)")
    merge.add_argument("--shard-mb", type=int, default=256, help="size of a shard in MB (default: 256)")
    merge.add_argument("--seed", type=int, default=0, help="of the shuffle over all sets (default: 0)")
    merge.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    merge.add_argument("--json", metavar="FILE", help="also write the counts here (-: standard output, nothing else)")
    merge.set_defaults(run=_merge)

    remove = data.add_parser(
        "remove",
        help="take people, or images, out of a data set for good",
        description="Rewrite the shards that hold them, and index, identities, names and quarantine. The new data set takes the "
        "place of\nthe old one in one step; killed at any moment, the same command finishes. It says what else may hold "
        "them.",
        epilog="examples:\n"
        "  lce data remove packed/faces --identity anna team-b/omar\n"
        "  lce data remove packed/faces --keys images.txt     (lines: IDENTITY/FILE as packed, or 000000123.jpg)",
        formatter_class=raw,
    )
    remove.add_argument("packed", type=Path, metavar="DIR")
    remove.add_argument("--identity", nargs="+", default=[], metavar="KEY", help="identity keys")
    remove.add_argument("--keys", type=Path, metavar="FILE", help="names of images, one a line")
    remove.add_argument(
        "--json", metavar="FILE", help="also write what was done here (-: standard output, nothing else)"
    )
    remove.set_defaults(run=_remove)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--json", metavar="FILE", help="also write the result here (-: standard output, nothing else)")


def _verify(arguments: argparse.Namespace) -> None:
    from launch.data_cli import counter
    from pipelines.manifest import read_quarantine, write_quarantine
    from pipelines.verify import as_json, to_quarantine, verify

    _check_common(arguments)
    directory: Path = arguments.packed
    with counter() as count:
        report = verify(directory, arguments.decode, arguments.duplicates, arguments.workers, count)
    found = report.open_findings
    lines = [str(one) for one in found[:_SHOWN]]
    number = len(found) + sum(report.unlisted.values())
    if number > len(lines):
        lines.append(f"... and {number - len(lines):,} more" + ("" if arguments.json else "; --json FILE lists them"))
    answered = len(report.findings) - len(found)
    done = ", ".join(
        part
        for part, was_done in (("decoded", report.decoded), ("compared with each other", report.compared))
        if was_done
    )
    if not number:
        lines.append(
            f"{directory}: {report.num_samples:,} images in {report.num_shards:,} shards, as packed"
            + (f"; all {done}" if done else "")
        )
    if answered:
        lines.append(f"{answered:,} findings more are about samples in quarantine")
    if arguments.quarantine:
        if not report.num_samples:
            raise DataError(f"{directory} cannot be read far enough to name samples; restore it, then --quarantine")
        before = len(read_quarantine(directory, report.num_samples))
        listed = to_quarantine(report, directory)
        write_quarantine(directory, listed)
        lines.append(
            f"quarantine: {len(listed):,} samples, {len(listed) - before:,} of them new; training leaves them out"
        )
    tell(arguments.json, as_json(report, directory), lines)
    if number:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
        raise FindingsError(f"{directory}: {number:,} findings ({kinds})")


def _stats(arguments: argparse.Namespace) -> None:
    from launch.data_cli import counter
    from pipelines.manifest import PackedDataset
    from pipelines.statistics import SAMPLE, measure

    _check_common(arguments)
    if arguments.png is not None:
        check_png("--png", arguments.png)
    dataset = PackedDataset.open(arguments.packed)
    looked_at = None if arguments.all else SAMPLE
    with counter() as count:
        found = measure(
            dataset, looked_at, arguments.seed, arguments.workers, lambda n, of: count("looking at images", n, of)
        )
    if arguments.png is not None:
        from launch.statistics_plot import plot_statistics

        with writing(arguments.png):
            plot_statistics(found, arguments.png)
    values = found.as_json()
    per, size, light = values["images_per_identity"], values["bytes"], values["brightness"]
    lines = [
        f"{arguments.packed}: {dataset.num_samples:,} images of {values['identities']:,} identities in "
        f"{values['shards']:,} shards, {size['sum'] / 1e9:,.3f} GB of images",
        f"  images per identity  median {per['p50']:g}, mean {per['mean']:.1f}, {per['p0']:g} to {per['p100']:g}",
        f"  bytes an image       median {size['p50']:,.0f}, mean {size['mean']:,.0f}, {size['p0']:,.0f} to {size['p100']:,.0f}",
    ]
    if light:
        sizes = ", ".join(f"{one['width']} x {one['height']} ({one['number']:,})" for one in values["sizes"][:4])
        kinds = ", ".join(f"{kind} ({number:,})" for kind, number in values["kinds"].items())
        lines += [
            f"  brightness           median {light['p50']:.0f}, {light['p0']:.0f} to {light['p100']:.0f} of 255",
            f"  pixels               {sizes}" + (", ..." if len(values["sizes"]) > 4 else ""),
            f"  kinds                {kinds}",
        ]
    bad = values["undecodable"]["number"]
    lines.append(
        f"  undecodable          {bad:,} of {found.looked_at:,} looked at; {values['quarantined']:,} in quarantine"
    )
    if arguments.png is not None:
        lines.append(str(arguments.png))
    tell(arguments.json, values, lines)


def _split(arguments: argparse.Namespace) -> None:
    from pipelines.manifest import PackedDataset
    from pipelines.splits import PARTS, labels_of, make_split, write_split

    check_json(arguments.json)
    dataset = PackedDataset.open(arguments.packed)
    split = make_split(dataset, arguments.scenario, arguments.heldout, arguments.fraction, arguments.seed)
    path = write_split(dataset, split, arguments.out)
    values: dict[str, Any] = {"split": str(path), "scenario": split.scenario, "seed": split.seed}
    lines = [str(path)]
    for part in PARTS:
        samples = split.part(part)
        people = len(labels_of(dataset, samples))
        values[part] = {"images": len(samples), "identities": people}
        lines.append(f"  {part:<8} {len(samples):>12,} images of {people:,} identities")
    lines.append(f"train on it with --set data.shards={arguments.packed} --set data.split={path}")
    tell(arguments.json, values, lines)


def _leakage(arguments: argparse.Namespace) -> None:
    import numpy as np

    from launch.data_cli import counter
    from pipelines.leakage import Side, find_leaks
    from pipelines.manifest import PackedDataset
    from pipelines.splits import open_split
    from pipelines.verify import hash_images

    _check_common(arguments)
    if (arguments.other is None) == (arguments.split is None):
        raise ConfigError(
            "lce data leakage compares two data sets (A B) or the parts of a split (A --split FILE); name one"
        )
    one = PackedDataset.open(arguments.packed)
    leaks: list[tuple[str, Leak]] = []
    with counter() as count:
        if arguments.split is not None:
            opened = open_split(arguments.split, one)
            hashes = hash_images(one, arguments.workers, count)
            parts = opened.split
            trained = np.union1d(parts.old, parts.new)
            sides = [("held out and trained on", "heldout", parts.heldout, "trained", trained, False)]
            if parts.scenario.startswith("open"):
                same_people = parts.scenario == "open-data"
                sides.append(("old and new", "old", parts.old, "new", parts.new, same_people))
            for name, first, mine, second, theirs, images_only in sides:
                left, right = Side(first, one, np.asarray(mine), hashes), Side(second, one, np.asarray(theirs), hashes)
                leaks += [(name, leak) for leak in find_leaks(left, right, images_only, count)]
        else:
            other = PackedDataset.open(arguments.other)
            left, right = (
                Side(
                    str(dataset.directory),
                    dataset,
                    np.arange(dataset.num_samples),
                    hash_images(dataset, arguments.workers, count),
                )
                for dataset in (one, other)
            )
            leaks = [("the two data sets", leak) for leak in find_leaks(left, right, False, count)]
    lines = [f"{name}: {leak}" for name, leak in leaks[:_SHOWN]]
    if len(leaks) > _SHOWN:
        lines.append(f"... and {len(leaks) - _SHOWN:,} more" + ("" if arguments.json else "; --json FILE lists them"))
    if not leaks:
        lines.append("nothing in common: no identity key, no image, no look-alike")
    tell(arguments.json, {"leaks": [{"between": name, **vars(leak)} for name, leak in leaks]}, lines)
    if leaks:
        raise FindingsError(f"{len(leaks):,} things are on both sides; remove them from one (lce data remove)")


def _merge(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.import_cli import bar
    from pipelines.importing import ImportSettings
    from pipelines.merging import merge, read_identity_map
    from pipelines.parallel import num_cores

    _check_common(arguments)
    *directories, out = arguments.packed
    if len(directories) < 2:
        raise ConfigError(
            f"lce data merge got {len(arguments.packed)} folders; needs two data sets or more, and OUT last"
        )
    if not 1 <= arguments.shard_mb <= _MOST_MB:
        raise ConfigError(f"--shard-mb is {arguments.shard_mb}; must be 1 to {_MOST_MB}")
    settings = ImportSettings(arguments.name, arguments.shard_mb << 20, arguments.seed, None)
    names = [directory.resolve().name for directory in directories]
    if arguments.prefix and len(set(names)) < len(names):
        raise ConfigError(
            f"--prefix puts folder names before keys, and two folders are called {_twice(names)!r}; rename one"
        )
    given = {} if arguments.identity_map is None else read_identity_map(arguments.identity_map, directories)
    num_workers = arguments.workers or num_cores()
    with bar(Console(stderr=True), "merging", "images") as merging:
        found = merge(directories, out, settings, given, arguments.prefix, num_workers, merging.show)
    dataset = found.dataset
    lines = [
        f"{out}: {dataset.num_samples:,} images of {len(dataset.identities):,} identities; "
        f"{found.shared_identities:,} identities came from more than one key or set"
    ]
    if found.shared_names:
        lines.append(
            f"{found.shared_names:,} image names are in more than one set, so vectors stored by image name cannot tell those apart"
        )
    values = {
        "data_set": str(out),
        "samples": dataset.num_samples,
        "identities": len(dataset.identities),
        "shared_identities": found.shared_identities,
        "shared_names": found.shared_names,
    }
    tell(arguments.json, values, lines)


def _remove(arguments: argparse.Namespace) -> None:
    from launch.data_cli import counter
    from pipelines.edit import remove

    check_json(arguments.json)
    images = [] if arguments.keys is None else _lines(arguments.keys)
    if not arguments.identity and not images:
        raise ConfigError("lce data remove needs --identity KEY or --keys FILE with at least one line")
    with counter() as count:
        done = remove(arguments.packed, arguments.identity, images, count)
    lines = []
    if done.finished:
        lines.append(f"{arguments.packed}: what an earlier removal that was killed had left behind is deleted now")
    if done.unknown:
        lines.append(f"not there (any more): {len(done.unknown):,} of what was asked, {done.unknown[0]!r} first")
    lines.append(
        f"{arguments.packed}: {done.num_samples:,} images and {len(done.identities):,} identities removed, "
        f"{done.num_rewritten:,} shards written anew"
    )
    if done.others:
        lines.append(f"came along unread, look into them yourself: {', '.join(done.others)}")
    tell(arguments.json, {**vars(done), "data_set": str(arguments.packed)}, [*lines, *_ELSEWHERE])


_ELSEWHERE = (
    "What else may hold them, and this command does not reach:",
    "  class rows        lce head shrink CLASSIFIER --ids STAYING.txt --out NEW; delete the old one and RUN/*/checkpoints",
    "  models            weights trained on their images; only training again without them takes them out",
    "  vectors           old.vectors files, galleries and indexes of vectors, .cache/old-space-*, maps fitted on them",
    "  runs              contact sheets and figures in RUN and in MLflow; RUN/.cache copies of packed data",
    "  lists             splits (make them anew: sample numbers changed), findings files, identity maps, shell history",
    "  sources           the folder, archive or data sets that this one was packed or merged from; caches of remote shards",
    "  the file system   snapshots, backups, replicas, and freed blocks of the disk until they are written over",
    "Runs that have the data set open keep the old files until they end; stop them.",
)


def _lines(path: Path) -> list[str]:
    """Names, each a whole line: of a folder called ``" anna"`` the blank is a part, and ``"anna"`` is somebody else."""
    from lce_dist.vector_files import lines_of

    try:
        return list(dict.fromkeys(line for line in lines_of(path) if line.strip()))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); name a text file, one name a line") from None


def _twice(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _check_common(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}; must be at least 1")
    check_json(arguments.json)


def check_json(file: str | None) -> None:
    """Errors: ConfigError where the file that --json names cannot be made."""
    if file is None or file == "-":
        return
    if not Path(file).parent.is_dir():
        raise ConfigError(f"--json {file}: {Path(file).parent} is not a folder; make it first")
    if Path(file).is_dir():
        raise ConfigError(f"--json {file} is a folder; name a file in it")


def check_png(name: str, file: Path) -> None:
    """Errors: ConfigError where the picture that ``name`` asks for cannot be made."""
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ConfigError(f"{name} is {str(file)!r}; must be a file that ends in .png")


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Make the folder of ``file``, which the block writes. Errors: RunError where the file system refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error}. Free space or choose another place") from None


def tell(file: str | None, values: dict[str, Any], lines: list[str]) -> None:
    """Lines for a person, unless standard output is to hold the JSON."""
    text = _printable(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    if file == "-":
        print(text, end="")
        return
    print(_printable("\n".join(lines)))
    if file is not None:
        with writing(Path(file)):
            Path(file).write_text(text, encoding="utf-8")


def _printable(text: str) -> str:
    """With bytes of names that are no UTF-8 as JSON writes them."""
    return text.encode(errors="backslashreplace").decode()
