"""The command ``lce evaluate upgrade``: from vectors of an old and a new model to the report, its gate, and MLflow."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lce_dist.errors import ConfigError, SetupError

if TYPE_CHECKING:  # heavy imports wait until the command runs
    from lce_dist.config import VectorsConfig

_FILES = ".parquet (key, vector, identity), .npz (keys, vectors, identities), or .npy with NAME.keys.txt beside it"
_SETTABLE = ("gate.", "tracking.", "run.name", "run.seed")


def add_upgrade_action(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``upgrade`` to the actions of ``lce evaluate``."""
    upgrade = actions.add_parser(
        "upgrade",
        help="the whole upgrade report from vectors of an old and a new model: gain, thresholds, flips, groups, backfill",
        description="Compare vectors of the same images by an old and a new model as lce train compares its models, and write\n"
        f"report.html, report.json, gate.json and figures. lce gate DIR judges it. Vectors: {_FILES}.",
        epilog="examples:\n"
        "  lce evaluate upgrade --old old.parquet --new new.parquet --out upgrade\n"
        "  lce evaluate upgrade --old old.npz --new new.npz --bridge bridges/forward --attributes people.csv --out upgrade\n"
        "  lce gate upgrade && ./ship.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    upgrade.add_argument("--old", type=Path, required=True, metavar="FILE", help="the old model's vectors")
    upgrade.add_argument("--new", type=Path, required=True, metavar="FILE", help="the new model's, of the same images")
    upgrade.add_argument(
        "--independent", type=Path, metavar="FILE", help="of a new model trained without the old one, as a control"
    )
    upgrade.add_argument(
        "--bridge", type=Path, metavar="DIR", help="a map between the two; its card says which side goes through it"
    )
    upgrade.add_argument("--attributes", type=Path, metavar="FILE", help=".csv or .parquet: key and columns of groups")
    upgrade.add_argument("--out", type=Path, default=Path("upgrade"), metavar="DIR", help="(default: upgrade)")
    upgrade.add_argument(
        "--far",
        type=float,
        nargs="+",
        default=(1e-2, 1e-3),
        metavar="RATE",
        help="the first one decides (default: 0.01 0.001)",
    )
    upgrade.add_argument(
        "--fit-on",
        type=Path,
        nargs=2,
        metavar=("OLD", "NEW"),
        help="vectors of other people, to fit the rotation beside the report to (default: half of the identities)",
    )
    upgrade.add_argument("--common", action="store_true", help="leave out images that not every file has")
    upgrade.add_argument(
        "--lengths",
        choices=("unit", "normalise"),
        default="unit",
        help="unit (default): refuse vectors whose length is not 1; normalise: bring them to it",
    )
    upgrade.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of [gate] and [tracking], run.name, run.seed; repeatable",
    )
    upgrade.add_argument("--mlflow", action="store_true", help="log the report to MLflow, as a run does")
    upgrade.set_defaults(run=_upgrade)


def _upgrade(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.gate import conclude_gate
    from launch.progress import RunProgress
    from launch.report import result_table
    from launch.upgrade_report import VectorFiles, upgrade_report

    out: Path = arguments.out
    config = _config(arguments)
    _claim(out)
    files = VectorFiles(
        arguments.old,
        arguments.new,
        arguments.independent,
        arguments.bridge,
        None if arguments.fit_on is None else tuple(arguments.fit_on),
        arguments.common,
        arguments.lengths,
    )
    console = Console()
    with RunProgress(Console(stderr=True)) as progress:
        report = upgrade_report(files, config, out, progress)
    _, gate = conclude_gate(out, config, report)
    console.print(result_table(report))
    console.print(report["procrustes_note"], highlight=False, soft_wrap=True)
    for question, answer in gate["answers"].items():
        colour = "green" if gate["passed"] else "red"
        console.print(f"[{colour}]{question}[/{colour}]", end=" ")
        console.print(answer, highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {out / 'report.html'}; judge it again: lce gate {out}", highlight=False, soft_wrap=True)
    if arguments.mlflow:
        from launch.upgrade_tracking import track_upgrade

        if not track_upgrade(config, out, report, gate):
            raise SetupError(
                f"MLflow has not taken the report yet; it is in {out}. The same command sends it when MLflow answers"
            )


def _config(arguments: argparse.Namespace) -> VectorsConfig:
    from lce_dist.config import parse_vectors_config, with_overrides

    for override in arguments.set:
        if not override.strip().startswith(_SETTABLE):
            raise ConfigError(
                f"--set {override!r}; must be of gate. or tracking., run.name or run.seed: nothing is trained"
            )
    for far in arguments.far:
        if not 0.0 < far < 1.0:
            raise ConfigError(f"--far is {far}; must be above 0 and below 1")
    places = {"old": arguments.old, "new": arguments.new, "independent": arguments.independent}
    evaluation: dict[str, Any] = {"fars": list(dict.fromkeys(arguments.far)), "criterion_far": arguments.far[0]}
    if arguments.attributes is not None:
        evaluation["attributes"] = str(arguments.attributes.resolve())
    values = {
        "vectors": {
            name: str(place.resolve()) for name, place in (places | {"bridge": arguments.bridge}).items() if place
        },
        "run": {"name": _name(arguments.out)},
        "evaluation": evaluation,
    }
    return parse_vectors_config(with_overrides(values, arguments.set), "--set")


def _name(out: Path) -> str:
    """The folder's name, in letters that a run's name may have."""
    word = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in out.resolve().name
    )
    return word.lower().lstrip("._-")[:63] or "upgrade"


def _claim(out: Path) -> None:
    """Make the folder; an earlier report over vectors there is replaced, anything else is not touched. Errors: ConfigError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        try:
            known = "vectors" in json.loads((out / "resolved.json").read_text())
        except (OSError, ValueError):
            known = False
        if not known:
            raise ConfigError(f"--out {out} exists and holds no report over vectors; name another folder, or a new one")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}. Choose another place") from None
