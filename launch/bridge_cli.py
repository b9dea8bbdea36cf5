"""The command ``lce bridge``: look at a map between two models, send stored vectors through it, fit one from vectors."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lce_dist.errors import ConfigError, DataError

if TYPE_CHECKING:  # heavy imports wait until a command needs them
    import numpy as np
    import numpy.typing as npt
    import torch

    from lce_dist.compat.fit import Pairs
    from lce_dist.vector_files import VectorFile

_BRIDGE = "a folder that holds a map, as RUN_DIR/NAME/bridge"
_FILES = ".parquet (key, vector), .npz (keys, vectors), or .npy with NAME.keys.txt beside it"
_KINDS = ("auto", "procrustes", "least_squares", "linear", "mlp", "stacked", "orthogonal", "paper", "fct")
_MOST_PAIRS = 200_000  # whole identities are drawn from more; more do not change a matrix of D * E numbers


def add_bridge_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bridge show | apply | fit | export`` to the commands of ``lce``."""
    raw = argparse.RawDescriptionHelpFormatter
    bridge = commands.add_parser("bridge", help="look at, apply and fit a map between two models' vectors")
    actions = bridge.add_subparsers(required=True, metavar="ACTION")

    show = actions.add_parser(
        "show",
        help="what a map is, and what every candidate for it reached",
        epilog="example:\n  lce bridge show runs/quickstart/bridge",
        formatter_class=raw,
    )
    show.add_argument("bridge", type=Path, metavar="BRIDGE", help=_BRIDGE)
    show.set_defaults(run=_show)

    apply = actions.add_parser(
        "apply",
        help="send stored vectors through a map, as when a gallery is upgraded without its photos",
        description="Write the mapped vectors, of length 1, under the same keys and in the same order. OUT appears whole\n"
        f"or not at all. Files: {_FILES}.",
        epilog="example:\n  lce bridge apply runs/quickstart/bridge gallery.parquet --out upgraded.parquet",
        formatter_class=raw,
    )
    apply.add_argument("bridge", type=Path, metavar="BRIDGE", help=_BRIDGE)
    apply.add_argument("vectors", type=Path, metavar="VECTORS", help="vectors of the model that the map begins at")
    apply.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file, of any of the formats")
    apply.set_defaults(run=_apply)

    fit = actions.add_parser(
        "fit",
        help="fit a map from two files of vectors, without models or photos",
        description="Fit every kind of map on most identities, judge it on the others, keep the best. Rows of the two\n"
        "files are matched by key. Who is on a photo comes from a column `identity` (npz: identities; npy: a file\n"
        f"NAME.identities.txt) of either file, or from --identities. Files: {_FILES}.",
        epilog="example:\n  lce bridge fit --new-vectors new.npz --old-vectors old.npz --direction old_to_new "
        "--out bridges/forward",
        formatter_class=raw,
    )
    fit.add_argument("--new-vectors", type=Path, required=True, metavar="FILE", help="the new model's")
    fit.add_argument(
        "--old-vectors", type=Path, required=True, metavar="FILE", help="the old model's, of the same images"
    )
    fit.add_argument(
        "--direction",
        choices=("new_to_old", "old_to_new"),
        required=True,
        help="new_to_old: queries are mapped (backward). old_to_new: the gallery is mapped once (forward)",
    )
    fit.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    fit.add_argument(
        "--identities", type=Path, metavar="FILE", help="identities, one a line, in the order of the new file"
    )
    fit.add_argument("--kind", choices=_KINDS, default="auto", help="auto (default): the best on held-out identities")
    fit.add_argument("--heldout", type=float, default=0.2, metavar="SHARE", help="of the identities (default: 0.2)")
    fit.add_argument("--far", type=float, default=1e-2, help="at which maps are compared (default: 0.01)")
    fit.add_argument("--seed", type=int, default=1, help="of the held-out identities and the training (default: 1)")
    fit.set_defaults(run=_fit)

    export = actions.add_parser(
        "export",
        help="write a map for a server that does not have this package",
        description="A map alone takes vectors of any length and gives unit vectors. With --with RUN/new, of a map from new to old,\n"
        "the file takes images and gives vectors in the old space: the backward manner as one model.",
        epilog="examples:\n  lce bridge export runs/quickstart/bridge --format onnx --out map.onnx\n"
        "  lce bridge export runs/quickstart/bridge --with runs/quickstart/new --format onnx --out query.onnx",
        formatter_class=raw,
    )
    export.add_argument("bridge", type=Path, metavar="BRIDGE", help=_BRIDGE)
    export.add_argument("--format", choices=("onnx", "torchscript", "safetensors"), required=True)
    export.add_argument(
        "--with", type=Path, dest="model", metavar="RUN/new", help="put this new model in front of the map"
    )
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new file")
    export.set_defaults(run=_export)


def _show(arguments: argparse.Namespace) -> None:
    from lce_dist.compat.artefact import read_card

    card = read_card(arguments.bridge)
    told = ("direction", "dim_in", "dim_out", "kind", "chosen", "candidates")
    print(f"{arguments.bridge}: {card['direction']}, {card['dim_in']} to {card['dim_out']} values, {card['kind']}")
    for key, value in card.items():
        if key not in told:
            print(f"  {key}: {value}")
    for row in card.get("candidates", []):
        numbers = ", ".join(f"{key} {value}" for key, value in row.items() if key != "name")
        chosen = "  <- chosen" if row["name"] == card.get("chosen") else ""
        print(f"  {row['name']}: {numbers}{chosen}")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"--out {out} exists and is not overwritten; choose another name, or remove it")


def _refuse_twice(path: Path, hash_N2: npt.NDArray[np.uint64]) -> None:
    """Errors: DataError naming the first row whose key stands in an earlier one. **Memory**: 40 bytes a row."""
    import numpy as np

    order = np.lexsort((np.arange(len(hash_N2)), hash_N2[:, 1], hash_N2[:, 0]))
    again = order[1:][(hash_N2[order[1:]] == hash_N2[order[:-1]]).all(1)]
    if again.size:
        raise DataError(
            f"vectors {path}: the key of row {int(again.min()) + 1} stands there before; keep one row a key"
        )


def _apply(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from rich.console import Console

    from launch.progress import RunProgress
    from lce_dist.compat.artefact import map_rows, read_bridge, read_card
    from lce_dist.keys import hash_keys
    from lce_dist.vector_files import Block, open_vectors, write_vectors

    _refuse_existing(arguments.out)
    card, bridge = read_card(arguments.bridge), read_bridge(arguments.bridge)
    file = open_vectors(arguments.vectors)
    if file.dim != bridge.dim_in:
        source, _, target = str(card["direction"]).partition("_to_")
        raise DataError(
            f"vectors {file.path} have {file.dim} dimensions; the map {arguments.bridge} begins at the {source} model's "
            f"{bridge.dim_in} (and ends at the {target} one's {bridge.dim_out}). Give vectors of the {source} model"
        )
    begins, ends = card.get("from_space"), card.get("to_space")
    if None not in (begins, file.space) and file.space != begins:
        raise DataError(
            f"vectors {file.path} are of space {file.space!r}; the map {arguments.bridge} begins at {begins!r}. Give vectors of "
            "the model that it was fitted to"
        )
    with RunProgress(Console(stderr=True)) as progress:

        def mapped() -> Iterator[Block]:
            done, hashes = 0, []
            for block in file.blocks():
                hashes.append(hash_keys(block.keys))
                rows = map_rows(bridge, torch.from_numpy(block.rows_bD).contiguous())
                done += len(block.keys)
                progress.count("mapping", done, file.num_rows)
                yield Block(block.keys, rows.numpy(), block.identities)
            _refuse_twice(file.path, np.concatenate(hashes))  # before the file gets its name

        write_vectors(arguments.out, bridge.dim_out, file.num_rows, mapped(), ends)
    print(f"{arguments.out}: {file.num_rows:,} unit vectors of {bridge.dim_out} values")


def _export(arguments: argparse.Namespace) -> None:
    from launch.bridge_export import export_bridge

    _refuse_existing(arguments.out)
    told = export_bridge(arguments.bridge, arguments.model, arguments.format, arguments.out)
    print(f"{arguments.out}: {told}")


def _fit(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.progress import RunProgress
    from lce_dist.compat.artefact import card_of, save_bridge, spaces_of
    from lce_dist.compat.fit import fit_bridge
    from lce_dist.evaluation.by_identity import tar_by_identity
    from lce_dist.vector_files import open_vectors

    _refuse_existing(arguments.out)
    for flag, value in (("--heldout", arguments.heldout), ("--far", arguments.far)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{flag} is {value}; must be above 0 and below 1")
    if arguments.seed < 0:
        raise ConfigError(f"--seed is {arguments.seed}; must be at least 0")
    new, old = open_vectors(arguments.new_vectors), open_vectors(arguments.old_vectors)
    forward = arguments.direction == "old_to_new"
    pairs, matched = _pairs(new, old, arguments.identities, forward, arguments.seed)

    def score(mapped: torch.Tensor, other: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return tar_by_identity(mapped, other, label, arguments.far)

    with RunProgress(Console(stderr=True)) as progress:
        fitted = fit_bridge(pairs, score, arguments.kind, arguments.heldout, arguments.seed, report=progress.note)
    about = {
        "images": len(pairs.label_N),
        "identities": int(pairs.label_N.max()) + 1,
        "new_model": f"vectors {_hash_of(new.path)}",
        "old_model": f"vectors {_hash_of(old.path)}",
        "heldout": arguments.heldout,
        "seed": arguments.seed,
        **spaces_of(arguments.direction, new.space, old.space),
    }
    chosen = fitted.chosen
    save_bridge(arguments.out, chosen.bridge, card_of(fitted, arguments.direction, arguments.far, about))
    print(f"{matched:,} images are in both files; {len(pairs.label_N):,} of them were used")
    print(f"{arguments.out}: {chosen.name}, TAR at FAR {arguments.far:g} of {chosen.score:.3f} on held-out identities")


def _pairs(new: VectorFile, old: VectorFile, names: Path | None, forward: bool, seed: int) -> tuple[Pairs, int]:
    """Vectors of the images that both files have, and how many these are; whole identities where they are too many."""
    import numpy as np
    import torch

    from lce_dist.compat.fit import Pairs
    from lce_dist.vector_files import lines_of

    new_of, new_identities = _index(new)
    old_of, old_identities = _index(old)
    keys = [key for key in new_of if key in old_of]
    if not keys:
        raise DataError(
            f"{new.path} ({new.num_rows} rows) and {old.path} ({old.num_rows} rows) have no key in common; rows of the "
            "same image must have the same key"
        )
    if names is not None:
        listed = list(lines_of(names)) if names.is_file() else None
        if listed is None or len(listed) != new.num_rows:
            found = "is not a file" if listed is None else f"has {len(listed)} lines"
            raise DataError(f"--identities {names} {found}; must have {new.num_rows}, one for each row of {new.path}")
        of_key = [listed[new_of[key]] for key in keys]
    elif new_identities:
        of_key = [new_identities[new_of[key]] for key in keys]
    elif old_identities:
        of_key = [old_identities[old_of[key]] for key in keys]
    else:
        raise DataError(
            f"neither {new.path} nor {old.path} says who is on an image; add a column identity (npz: identities, npy: "
            "NAME.identities.txt), or name a file with --identities"
        )
    label_N = np.unique(np.asarray(of_key, dtype=str), return_inverse=True)[1].astype(np.int64)
    count_C = np.bincount(label_N)
    order_C = np.random.default_rng(seed).permutation(len(count_C))
    taken_C = np.zeros(len(count_C), dtype=bool)
    taken_C[order_C[np.cumsum(count_C[order_C]) <= _MOST_PAIRS]] = True
    kept = np.flatnonzero(taken_C[label_N])
    if not len(kept):
        raise DataError(
            f"each identity has more than {_MOST_PAIRS} images; is {names or new.path} right about identities?"
        )
    label_N = np.unique(label_N[kept], return_inverse=True)[1].astype(np.int64)
    new_ND = _rows(new, np.array([new_of[keys[place]] for place in kept]))
    old_NE = _rows(old, np.array([old_of[keys[place]] for place in kept]))
    source, target = (old_NE, new_ND) if forward else (new_ND, old_NE)
    return Pairs(source, target, torch.from_numpy(label_N)), len(keys)


def _index(file: VectorFile) -> tuple[dict[str, int], list[str]]:
    """Row of each key, and the identity of each row ([] where the file has none)."""
    row_of: dict[str, int] = {}
    identities: list[str] = []
    for block in file.blocks():
        for key in block.keys:
            if key in row_of:
                again = len(row_of) + 1
                raise DataError(f"vectors {file.path}: the key of row {again} stands there before; keep one row a key")
            row_of[key] = len(row_of)
        identities += block.identities or []
    return row_of, identities


def _rows(file: VectorFile, row_N: npt.NDArray[np.int64]) -> torch.Tensor:
    """(N, D) unit vectors of rows, in the order asked."""
    import numpy as np
    import torch

    taken_ND = np.empty((len(row_N), file.dim), dtype=np.float32)
    order = np.argsort(row_N)
    low, done = 0, 0
    for block in file.blocks():
        high = low + len(block.keys)
        upto = int(np.searchsorted(row_N[order], high))
        here = order[done:upto]
        rows = block.rows_bD[row_N[here] - low].astype(np.float64)
        taken_ND[here] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        low, done = high, upto
    return torch.from_numpy(taken_ND)


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
