"""The command ``lce sync``: send what MLflow has not taken of a run, and train nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from lce_dist.errors import ConfigError, SetupError


def add_sync_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``sync`` to the commands of ``lce``."""
    sync = commands.add_parser(
        "sync",
        help="send what MLflow has not taken of a run, without training again",
        description="What a run tells MLflow waits in RUN/tracking.jsonl while MLflow is away. Sends it, in order, nothing twice.",
        epilog="example:\n  lce sync runs/quickstart && lce gate runs/quickstart\n\n"
        "exit codes: 0 MLflow has everything, 2 no such run, 4 MLflow did not take everything",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sync.add_argument("run_dir", type=Path, metavar="RUN", help="a run's directory, as runs/quickstart")
    sync.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to try for (default: 120)")
    sync.set_defaults(run=_sync)


def _sync(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.gate_cli import config_of
    from lce_dist.mlflow_client import redact
    from lce_dist.tracking import Tracker, tracking_uri

    run_dir: Path = arguments.run_dir
    if arguments.timeout <= 0.0:
        raise ConfigError(f"--timeout is {arguments.timeout}; must be above 0")
    if not (run_dir / "tracking.jsonl").is_file():
        raise ConfigError(f"{run_dir} holds no tracking.jsonl; name the directory of a run, as runs/quickstart")
    config = config_of(run_dir, [])
    runs_dir = run_dir.resolve().parent
    uri = redact(tracking_uri(config.tracking, runs_dir))
    tracker = Tracker(config.tracking, run_dir, config.run.name, runs_dir)
    waiting = tracker.pending()
    if not tracker.close(arguments.timeout):
        raise SetupError(
            f"MLflow at {uri} has not taken {tracker.pending()} of {waiting} events of {run_dir} in {arguments.timeout:g} s; see to "
            "the server or the login, then run the same command again"
        )
    Console(soft_wrap=True).print(f"{run_dir}: {waiting} events sent; MLflow at {uri} has everything", highlight=False)
