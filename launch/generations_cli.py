"""The command ``lce generations``: runs that upgraded one model after another, every later one against every gallery."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.destinations import check_destination, write_whole
from lce_dist.errors import ConfigError, DataError, SetupError
from lce_dist.mlflow_client import redact

if TYPE_CHECKING:  # heavy imports wait until the command runs
    import torch
    from torch import nn

    from lce_dist.config import Config
    from lce_dist.evaluation.generations import Generations
    from lce_dist.evaluation.metrics import EmbeddingSet
    from lce_dist.models.old_model import FrozenModel
    from pipelines.manifest import IdentitySplit, PackedDataset, View

_BLOCK_ROWS = 128
_MLFLOW_S = 60.0


def add_generations_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``generations`` to the commands of ``lce``."""
    command = commands.add_parser(
        "generations",
        help="several upgrades in a row: each model's queries in each earlier gallery",
        description="RUNs in the order of the upgrades, each of which has the new model of the one before as its old\n"
        'model (old.weights = "RUN/new/model.safetensors"). Compares images of identities that none of them trained on:\n'
        "the matrix of TARs, AC (share of pairs of generations in which the newer model does better in the older one's\n"
        "gallery than the older one did) and AM (its mean). Maps of several upgrades are composed.",
        epilog="examples:\n  lce generations runs/first runs/second --out generations.json\n"
        "  lce generations runs/first runs/second --mlflow",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished run")
    command.add_argument("--far", type=float, default=1e-2, help="FAR of the matrix (default: 0.01)")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="a .json file, or a folder; a picture, .png, beside it"
    )
    command.add_argument(
        "--mlflow", action="store_true", help="log numbers and picture as a run, where the last RUN's config has MLflow"
    )
    command.set_defaults(run=_generations)


@dataclass(frozen=True)
class _Upgrade:
    """A finished run, as it was configured, and who trained in it."""

    directory: Path
    config: Config
    dataset: PackedDataset
    split: IdentitySplit


def _generations(arguments: argparse.Namespace) -> None:
    if not 0.0 < arguments.far < 1.0:
        raise ConfigError(f"--far is {arguments.far}; must lie between 0 and 1")
    out: Path | None = arguments.out
    if out is not None:
        out = out / "generations.json" if out.is_dir() else out
        if out.suffix != ".json":
            raise ConfigError(
                f"--out is {out}; must end in .json, or be a folder: the picture beside it is {out.with_suffix('.png').name}"
            )
        check_destination("--out", out)
    from rich.console import Console

    from launch.progress import RunProgress
    from lce_dist.evaluation.figures import generations_heat_map

    with RunProgress(Console(stderr=True)) as progress:
        upgrades = [_read(directory, progress.count) for directory in arguments.runs]
        found = generations_of(upgrades, arguments.far, progress.count)
    for line in lines_of(found, arguments.far):
        print(line)
    if arguments.mlflow:
        print(_tell_mlflow(upgrades[-1], found, arguments.far))
    if out is not None:
        write_whole(out, json.dumps(plain(found, arguments.far), indent=2) + "\n")
        generations_heat_map(found, arguments.far).savefig(out.with_suffix(".png"), dpi=150)
        print(f"{out} and {out.with_suffix('.png')}")


def _tell_mlflow(last: _Upgrade, found: Generations, far: float) -> str:
    """A run of its own, named after the models, with the matrix as metrics, picture and JSON; returns what was done.

    Errors: SetupError when MLflow does not take it in a minute; nothing is left to be sent later.
    """
    from lce_dist.evaluation.figures import generations_heat_map
    from lce_dist.tracking import Tracker, tracking_uri

    runs_dir = last.directory.resolve().parent
    name = " > ".join(found.names)
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(last.config.tracking, Path(folder), name, runs_dir)
        tracker.start_run("generations", name, tags={"lce.generations": name})
        tracker.log_params("generations", {"far": far, "last": last.directory.name, "models": len(found.names)})
        tracker.log_metrics("generations", metrics_of(found), 0)
        for file, write in (
            ("generations.json", lambda path: path.write_text(json.dumps(plain(found, far), indent=2) + "\n")),
            ("generations.png", lambda path: generations_heat_map(found, far).savefig(path, dpi=150)),
        ):
            write(Path(folder) / file)
            tracker.log_file("generations", Path(folder) / file)
        text = "\n".join(["```", *lines_of(found, far), "```"])
        tracker.set_tags("generations", {"mlflow.note.content": text})
        tracker.end_run("generations")
        uri = redact(tracking_uri(last.config.tracking, runs_dir))
        if not tracker.close(_MLFLOW_S):
            raise SetupError(
                f"MLflow at {uri} did not take the matrix in {_MLFLOW_S:.0f} s; start it and run the command again"
            )
        return f"MLflow: run {tracker.run_ids()['generations']} at {uri}"


def metrics_of(found: Generations) -> dict[str, float]:
    """By names that MLflow groups: each cell's TARs and rank-1, AC and AM."""
    metrics = {"generations/AC": found.average_compatibility, "generations/AM": found.average_metric}
    for (i, j), cell in found.cells.items():
        pair = f"{found.names[i]}_in_{found.names[j]}"
        metrics[f"rank1/{pair}"] = cell.rank1
        metrics |= {f"tar_at_far_{key}/{pair}": tar for key, tar in cell.tar_at_far.items()}
    return metrics


def lines_of(found: Generations, far: float) -> list[str]:
    """The matrix as text: a line a query model."""
    width = max(9, *(len(name) for name in found.names), *(len(_cell(found, i, i)) for i in range(len(found.names))))
    lines = [f"TAR at FAR {far:g}: query model down, gallery model across"]
    lines.append(" " * width + "".join(f"  {name:>{width}}" for name in found.names))
    for i, name in enumerate(found.names):
        cells = (_cell(found, i, j) if j <= i else "" for j in range(len(found.names)))
        lines.append(f"{name:>{width}}" + "".join(f"  {cell:>{width}}" for cell in cells))
    if found.intervals:
        lines.append("in brackets: 95 % of samples of identities")
    lines.append(f"AC {found.average_compatibility:.3f}, AM {found.average_metric:.3f}")
    return lines


def _cell(found: Generations, i: int, j: int) -> str:
    known = found.intervals.get((i, j))
    value = f"{found.tar_GG[i, j]:.3f}"
    return value if known is None else f"{value} ({known.low:.3f} to {known.high:.3f})"


def plain(found: Generations, far: float) -> dict[str, Any]:
    """For JSON: null above the diagonal."""
    rows = [
        [None if j > i else float(found.tar_GG[i, j]) for j in range(len(found.names))] for i in range(len(found.names))
    ]
    return {
        "names": list(found.names),
        "far": far,
        "tar": rows,
        "cells": [
            {
                "query": found.names[i],
                "gallery": found.names[j],
                "tar_at_far": dict(cell.tar_at_far),
                "threshold_at_far": dict(cell.threshold_at_far),
                "rank1": cell.rank1,
                "low": found.intervals[i, j].low,
                "high": found.intervals[i, j].high,
                "level": found.intervals[i, j].level,
            }
            for (i, j), cell in sorted(found.cells.items())
        ],
        "average_compatibility": found.average_compatibility,
        "average_metric": found.average_metric,
    }


def _read(directory: Path, progress: Callable[[str, int, int], None]) -> _Upgrade:
    from launch.parts import cache_settings, open_parts
    from launch.prepare import prepare_data
    from lce_dist.config import parse_config

    resolved = directory / "resolved.json"
    if not resolved.is_file() or not (directory / "report.json").is_file():
        raise ConfigError(f"{directory} is no finished run (it lacks resolved.json or report.json); name RUN_DIR/NAME")
    try:
        values = json.loads(resolved.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{resolved} is damaged ({error}); run the same command again") from None
    if isinstance(values, dict) and "vectors" in values:
        raise ConfigError(
            f"{directory} is a report over stored vectors; must be a run, which has the models to embed images with. Name RUN_DIR/NAME"
        )
    config = parse_config(values, str(resolved), json_mode=True)
    dataset = prepare_data(config.data, directory.parent / ".cache", progress, cache_settings(config))
    return _Upgrade(directory, config, dataset, open_parts(config.data, Path(), dataset, None).identities)


def generations_of(upgrades: Sequence[_Upgrade], far: float, progress: Callable[[str, int, int], None]) -> Generations:
    """Embed the images that nobody trained on with every model in turn, and compare.

    Errors: ConfigError where the runs do not follow each other, DataError where too few identities are left.
    """
    import torch

    from lce_dist.compat.artefact import map_rows, read_bridge
    from lce_dist.evaluation.generations import compare_generations

    manners = {upgrade.config.compat.manner for upgrade in upgrades}
    if len(manners) > 1:
        raise ConfigError(f"the runs have the manners {', '.join(sorted(manners))}; one matrix has one manner")
    (manner,) = manners
    view = _unseen(upgrades)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = upgrades[0]
    for before, after in itertools.pairwise(upgrades):
        _check_chain(before, after)
    sets = [_embedded(_old_of(first, device), first.config.old.embedding_dim, first, view, "old", device)]
    for upgrade in upgrades:
        progress("embedding", len(sets), len(upgrades) + 1)
        net, dim = _new_of(upgrade, device), upgrade.config.new.embedding_dim
        sets.append(_embedded(net, dim, upgrade, view, upgrade.directory.name, device))
    progress("embedding", len(sets), len(sets))
    fars, seed = upgrades[-1].config.evaluation.fars, upgrades[-1].config.run.seed
    if manner == "direct":
        return compare_generations(sets, far, more_fars=fars, seed=seed)
    bridges = [read_bridge(upgrade.directory / "bridge") for upgrade in upgrades]
    maps = [lambda rows, bridge=bridge: map_rows(bridge, torch.from_numpy(rows)).numpy() for bridge in bridges]
    return compare_generations(sets, far, maps, manner, fars, seed)


def _unseen(upgrades: Sequence[_Upgrade]) -> View:
    """The last run's held-out identities that no other run trained on."""
    last = upgrades[-1]
    trained = {key for upgrade in upgrades for key in upgrade.split.train}
    left = [key for key in last.split.heldout if key not in trained]
    if len(left) < 2:
        raise DataError(
            f"{len(left)} of the {len(last.split.heldout)} held-out identities of {last.directory} were trained on by no "
            "run; must be at least 2. Give all runs the same held-out identities (data.split_seed, heldout_identities)"
        )
    return last.dataset.select(left)


def _old_of(upgrade: _Upgrade, device: torch.device) -> FrozenModel:
    from launch.prepare import open_old_model

    old = upgrade.config.old
    if old.weights is not None:
        return open_old_model(upgrade.config, Path(), device)
    if old.net is None:
        raise ConfigError(f"{upgrade.directory} has stored vectors for its old model; generations compare models")
    return _of_run(upgrade, "old", old.net, old.embedding_dim, device)


def _new_of(upgrade: _Upgrade, device: torch.device) -> FrozenModel:
    """What is shipped: trained in the run, turned in it, or as it was given."""
    from launch.prepare import open_new_model

    new = upgrade.config.new
    if new.weights is None or upgrade.config.compat.mode == "mapping-direct":
        assert new.net is not None, "the config was checked"
        return _of_run(upgrade, "new", new.net, new.embedding_dim, device)
    return open_new_model(upgrade.config, Path(), device)


def _of_run(upgrade: _Upgrade, stage: Literal["old", "new"], net: str, dim: int, device: torch.device) -> FrozenModel:
    from launch.prepare import input_of
    from lce_dist.models.old_model import ModelFile, open_model

    weights = upgrade.directory / stage / "model.safetensors"
    seen = input_of(getattr(upgrade.config, stage).input)
    return open_model(ModelFile(weights, net, dim, seen), upgrade.config.data.image_size, device)


def _check_chain(before: _Upgrade, after: _Upgrade) -> None:
    """The old model of ``after`` has to be the new one of ``before``, weights and preprocessing."""
    import torch

    given = before.config.new.weights
    weights = str(before.directory / "new" / "model.safetensors")
    if given is not None and before.config.compat.mode != "mapping-direct":
        weights = given
    net = f' and old.net = "{before.config.new.net}"' if before.config.new.net is not None else ""
    told = f"{after.directory} does not upgrade the new model of {before.directory}"
    fix = f'it needs old.weights = "{weights}"{net}, and [old.input] as that run\'s [new.input]'
    if after.config.old.weights is None:
        raise ConfigError(f"{told}: it trained an old model of its own; {fix}")
    cpu = torch.device("cpu")
    if _old_of(after, cpu).fingerprint != _new_of(before, cpu).fingerprint:
        raise ConfigError(f"{told}: its old.weights are {after.config.old.weights}; {fix}")


def _embedded(net: nn.Module, dim: int, upgrade: _Upgrade, view: View, name: str, device: torch.device) -> EmbeddingSet:
    from lce_dist.embedding import embed_batches, gather_all
    from lce_dist.evaluation.metrics import EmbeddingSet
    from lce_dist.world import World
    from pipelines.stream import ImageStream, block_plan

    plan = block_plan(view.num_samples, 0, 1, _BLOCK_ROWS)
    with ImageStream(view, plan, upgrade.config.data.image_size, None, 0, device) as stream:
        vectors, labels, ids = gather_all(embed_batches(net, stream, dim), World(device=device))
    return EmbeddingSet(name, vectors.numpy(), labels.numpy(), ids.numpy())
