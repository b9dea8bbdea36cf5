"""The command ``lce head``: look into a trained classifier, take rows out of it, let identities join or leave."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lce_dist.errors import CheckpointError, DataError

_CACHE_BYTES = 2 << 30  # vectors of a pass that are kept, so that the second pass computes nothing
_BLOCK_ROWS = 128
_CLASSIFIER = "a folder RUN_DIR/NAME/STAGE/classifier"


def add_head_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``head show | export | grow | shrink`` to the commands of ``lce``."""
    raw = argparse.RawDescriptionHelpFormatter
    head = commands.add_parser("head", help="look at, cut, extend and export a trained classifier").add_subparsers(
        required=True, metavar="ACTION"
    )
    show = head.add_parser(
        "show",
        help="counts, dimension and size; no identity is shown",
        epilog="example:\n  lce head show runs/quickstart/new/classifier",
        formatter_class=raw,
    )
    show.add_argument("classifier", type=Path, help=_CLASSIFIER)
    show.set_defaults(run=_show)

    export = head.add_parser(
        "export",
        help="rows of all or some identities as one safetensors file",
        description="Write the rows as the tensor `weight` of OUT, and their keys, one a line, to OUT with .keys.txt.",
        epilog="example:\n  lce head export runs/quickstart/new/classifier --ids staff.txt --out staff.safetensors",
        formatter_class=raw,
    )
    export.add_argument("classifier", type=Path, help=_CLASSIFIER)
    export.add_argument("--ids", type=Path, metavar="FILE", help="identity keys, one a line (default: all)")
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .safetensors file")
    export.set_defaults(run=_export)

    grow = head.add_parser(
        "grow",
        help="a new classifier with the identities of a packed data set added",
        description="Add the identities of PACKED that CLASSIFIER does not have: each row is the class mean of the\n"
        "model's vectors, at the median length of the rows. Start a run from it with head.start_from.",
        epilog="example:\n  lce head grow runs/quickstart/new/classifier --weights runs/quickstart/new/model.safetensors "
        "--data packed/joined --out classifiers/grown",
        formatter_class=raw,
    )
    grow.add_argument("classifier", type=Path, help=_CLASSIFIER)
    grow.add_argument("--weights", type=Path, required=True, metavar="FILE", help="model.safetensors of the same stage")
    grow.add_argument("--data", type=Path, required=True, metavar="PACKED", help="a packed data set")
    grow.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    grow.set_defaults(run=_grow)

    shrink = head.add_parser(
        "shrink",
        help="a new classifier of some identities alone",
        epilog="example:\n  lce head shrink runs/quickstart/new/classifier --ids staying.txt --out classifiers/smaller",
        formatter_class=raw,
    )
    shrink.add_argument("classifier", type=Path, help=_CLASSIFIER)
    shrink.add_argument("--ids", type=Path, required=True, metavar="FILE", help="keys of those who stay, one a line")
    shrink.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    shrink.set_defaults(run=_shrink)


def _show(arguments: argparse.Namespace) -> None:
    from lce_dist.head.classifier import read_card

    card = read_card(arguments.classifier)
    old = "with" if card.has_old else "without"
    print(f"{arguments.classifier}: {card.num_classes:,} classes of {card.dim} values, {old} old centres")
    print(f"  {card.num_bytes:,} bytes")
    for key, value in card.model.items():
        shown = ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else value
        print(f"  {key}: {shown}")


def _export(arguments: argparse.Namespace) -> None:
    from lce_dist.head.classifier import export, keys_file, read_keys

    keys = None if arguments.ids is None else read_keys(arguments.ids)
    with _bytes("exporting") as progress:
        count = export(arguments.classifier, keys, arguments.out, progress)
    print(f"{arguments.out}: {count:,} rows; their keys are in {keys_file(arguments.out)}")


def _shrink(arguments: argparse.Namespace) -> None:
    from lce_dist.head.classifier import read_card, read_keys, shrink

    keys = read_keys(arguments.ids)
    with _bytes("writing") as progress:
        count = shrink(arguments.classifier, keys, arguments.out, progress)
    print(f"{arguments.out}: {count:,} of {read_card(arguments.classifier).num_classes:,} classes")


def _grow(arguments: argparse.Namespace) -> None:
    """Class means by one process, on a GPU where there is one."""
    import torch

    from launch.prepare import in_mib
    from lce_dist.blocks import refuse_existing
    from lce_dist.compat.old_space import compute_old_space
    from lce_dist.embedding import EmbeddedRows, embed_batches
    from lce_dist.head.classifier import grow, read_card, unknown_keys
    from lce_dist.models.catalog import build_net
    from lce_dist.models.weights import load_weights
    from lce_dist.world import World
    from pipelines.manifest import PackedDataset
    from pipelines.stream import ImageStream, block_plan

    refuse_existing(arguments.out)
    card = read_card(arguments.classifier)
    made = _card_of_weights(arguments.weights)
    for key in ("fingerprint", "stage"):
        if made[key] != card.model.get(key):
            raise CheckpointError(
                f"{arguments.weights} has {key} {made[key]!r}; {arguments.classifier} has {card.model.get(key)!r}. "
                "Rows of one classifier come from one model: name the model.safetensors beside it"
            )
    net = build_net(made["net"], card.dim, int(made["image_size"]), seed=0)
    load_weights(net, arguments.weights)
    dataset = PackedDataset.open(arguments.data)
    new = unknown_keys(arguments.classifier, dataset.identities)
    if not new:
        raise DataError(
            f"{arguments.classifier} has a row for each of the {len(dataset.identities)} identities of {arguments.data}; "
            "there is nothing to add"
        )
    view = dataset.select(new)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(device=device)
    net = net.to(device).eval().requires_grad_(False)
    keep = len(view.sample_ids) * card.dim * 4 <= _CACHE_BYTES
    kept: list[EmbeddedRows] = []
    with _counter() as count:

        def rounds() -> Iterator[EmbeddedRows]:
            if kept:
                yield from kept
                return
            planned = block_plan(len(view.sample_ids), 0, 1, _BLOCK_ROWS)
            done = 0
            with ImageStream(view, planned, int(made["image_size"]), None, 0, device) as stream:
                seen: list[EmbeddedRows] = []
                for rows in embed_batches(net, stream, card.dim):
                    done += rows.unit_bD.shape[0]
                    count("embedding", done, len(view.sample_ids))
                    if keep:
                        seen.append(rows)
                    yield rows
            kept[:] = seen

        space = compute_old_space(rounds, len(view.identities), card.dim, world)
        total = grow(
            arguments.classifier, view.identities, space.centre_SD, arguments.out, progress=in_mib(count, "writing")
        )
    known = len(dataset.identities) - len(new)
    print(f"{arguments.out}: {total:,} classes, {len(new):,} of them new; {known:,} of {arguments.data} were known")


def _card_of_weights(path: Path) -> dict[str, str]:
    """The metadata that a run writes into its weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            card: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights {path} cannot be read as safetensors ({error}); name a model.safetensors"
        ) from None
    missing = sorted({"stage", "net", "image_size", "fingerprint"} - card.keys())
    if missing:
        raise CheckpointError(
            f"weights {path} do not say their {missing[0]}; name a model.safetensors that a run wrote"
        )
    return card


@contextmanager
def _counter() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: call it with (what, done, total)."""
    from rich.console import Console

    from launch.progress import RunProgress

    with RunProgress(Console(stderr=True)) as progress:
        yield progress.count


@contextmanager
def _bytes(what: str) -> Iterator[Callable[[int, int], None]]:
    from launch.prepare import in_mib

    with _counter() as count:
        yield in_mib(count, what)
