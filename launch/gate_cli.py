"""The command ``lce gate``: hold a finished run against what must be reached, tell MLflow, and end with 0 or 1."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.destinations import check_destination, write_whole
from lce_dist.errors import ConfigError, RunError, SetupError

if TYPE_CHECKING:  # heavy imports wait until a command needs them
    from lce_dist.config import Judged
    from lce_dist.evaluation.gate import GateVerdict


def add_gate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``gate`` to the commands of ``lce``."""
    gate = commands.add_parser(
        "gate",
        help="may this upgrade be shipped: exit code 0 or 1, reasons, the registry's alias",
        description="Judge the report of a finished run by [gate] of its config. The verdict goes to the terminal, to RUN/gate.json and\n"
        "RUN/report.html, and to the run in MLflow. When it passes, the alias moves to the run's model, if the model that has it\n"
        "now is the old one of this run.",
        epilog="examples:\n"
        "  lce gate runs/quickstart\n"
        "  lce gate runs/quickstart --set gate.max_negative_flips=0.02 --set gate.min_self_ratio=off\n"
        "  lce gate runs/quickstart --json - --no-mlflow && ./ship.sh\n\n"
        "exit codes: 0 passed, 1 not passed, 2 config or data, 4 MLflow does not answer (the verdict is in RUN/gate.json)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gate.add_argument("run_dir", type=Path, metavar="RUN", help="a finished run's directory, as runs/quickstart")
    gate.add_argument(
        "--set", action="append", default=[], metavar="gate.KEY=VALUE", help="judge by another value; repeatable"
    )
    gate.add_argument(
        "--alias", default="champion", help="of the registered model, moved when passed (default: champion)"
    )
    gate.add_argument(
        "--json", metavar="FILE", help="also write the verdict here (-: standard output, and nothing else)"
    )
    gate.add_argument(
        "--replace", action="store_true", help="move the alias also from a model that is not this run's old one"
    )
    gate.add_argument("--no-mlflow", action="store_true", help="leave MLflow alone")
    gate.set_defaults(run=_gate)


def _gate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.gate import conclude_gate, tell_mlflow
    from launch.report import open_report

    run_dir: Path = arguments.run_dir
    if arguments.json not in (None, "-"):
        check_destination("--json", arguments.json)
    report = open_report(run_dir)
    config = config_of(run_dir, arguments.set)
    verdict, entry = conclude_gate(run_dir, config, report, arguments.set)
    text = json.dumps(entry, indent=2) + "\n"
    if arguments.json == "-":
        print(text, end="")
    else:
        _show(Console(), run_dir, verdict)
        if arguments.json:
            write_whole(Path(arguments.json), text)
    if not arguments.no_mlflow:
        try:
            told = tell_mlflow(run_dir, config, report, verdict, entry, arguments.alias, arguments.replace)
        except ConfigError as error:
            raise ConfigError(f"{run_dir} passed, but the alias did not move: {error}") from None
        except RunError as error:
            if verdict.passed:
                raise SetupError(f"{run_dir} passed, but the alias did not move: {error}") from None
            told = str(error)
        print(told, file=sys.stderr if arguments.json == "-" else sys.stdout)
    if not verdict.passed:
        raise RunError(f"{run_dir} may not be shipped: {len(verdict.failed)} of {len(verdict.checks)} checks failed")


def config_of(run_dir: Path, overrides: list[str]) -> Judged:
    """The config that the run was made with. Errors: ConfigError."""
    from lce_dist.config import parse_config, parse_vectors_config, with_overrides

    for override in overrides:
        if not override.strip().startswith("gate."):
            raise ConfigError(f"--set {override!r}; must be gate.KEY=VALUE: the run is trained. Set one of [gate]")
    path = run_dir / "resolved.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        raise ConfigError(f"{path} is absent or damaged; run the training command again, it writes the file") from None
    if isinstance(values, dict) and "vectors" in values:  # of lce evaluate upgrade
        return parse_vectors_config(with_overrides(values, overrides), str(path))
    return parse_config(with_overrides(values, overrides), str(path), json_mode=True)


def _show(console: Any, run_dir: Path, verdict: GateVerdict) -> None:
    from rich.table import Table

    table = Table(title=f"gate of {run_dir}", title_justify="left")
    for head in ("check", "asked", "reached", ""):
        table.add_column(head, overflow="fold")
    for check in verdict.checks:
        word = {True: "[green]passed[/green]", False: "[red]failed[/red]", None: "[red]not known[/red]"}[check.passed]
        table.add_row(check.name, check.asked, check.reached, word)
    console.print(table)
    console.print("[green]passed[/green]" if verdict.passed else "[red]not passed[/red]")
    if verdict.off:
        console.print(f"not asked: {'; '.join(verdict.off)}", highlight=False, soft_wrap=True, markup=False)
