"""The commands ``lce ckpt ls | verify``: the checkpoints of a run, and whether each of them is whole."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from lce_dist.errors import ConfigError, FindingsError


def add_ckpt_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``ckpt`` to the commands of ``lce``."""
    raw = argparse.RawDescriptionHelpFormatter
    ckpt = commands.add_parser("ckpt", help="checkpoints of a run: list them, verify their hashes")
    which = ckpt.add_subparsers(required=True, metavar="COMMAND")
    for name, text, more in (
        ("ls", "each checkpoint: stage, step, ranks that wrote it, bytes, date, and whether its files are there", ""),
        (
            "verify",
            "the same after hashing every file",
            "\n\nexit codes: 0 all are whole, 2 no such run, 3 some are damaged",
        ),
    ):
        command = which.add_parser(
            name,
            help=text,
            description=text.capitalize() + ".",
            epilog=f"example:\n  lce ckpt {name} quickstart" + more,
            formatter_class=raw,
        )
        command.add_argument("which", metavar="RUN", help="a name, or a run's directory")
        command.add_argument("--run-dir", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=_show, hashes=name == "verify")


def _show(arguments: argparse.Namespace) -> None:
    from launch.runs import find_run

    run_dir = find_run(Path(arguments.which), arguments.run_dir)
    found = [
        _look(run_dir, path, arguments.hashes)
        for path in sorted(run_dir.glob("*/checkpoints/step-*"))
        if path.name[5:].isdigit()
    ]
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for one in found:
            print(_line(one))
    if not found:
        raise ConfigError(f"run {run_dir} has no checkpoint; one comes each checkpoint.every_steps of a stage")
    damaged = [one for one in found if one["damage"] is not None]
    if damaged and arguments.hashes:
        raise FindingsError(
            f"{len(damaged)} of {len(found)} checkpoints are damaged: a run goes on from the newest that is whole"
        )


def _look(run_dir: Path, path: Path, hashes: bool) -> dict[str, Any]:
    from lce_dist import storage
    from lce_dist.errors import CheckpointError
    from lce_dist.training.checkpoint import other_step
    from lce_dist.world import World

    alone = World()
    one: dict[str, Any] = {
        "checkpoint": str(path.relative_to(run_dir)),
        "stage": path.parents[1].name,
        "step": int(path.name[5:]),
        "ranks": None,
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "written": datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds"),
    }
    try:
        one["ranks"] = storage.read_manifest(path, alone).state.get("num_ranks")
        reason = storage.damage(path, alone) if hashes else storage.missing(path, alone)
        one["damage"] = reason or other_step(path, alone)
    except CheckpointError as error:
        one["damage"] = str(error)
    return one | {"verified": hashes}


def _line(one: dict[str, Any]) -> str:
    ranks = "ranks unknown" if one["ranks"] is None else f"{one['ranks']} rank{'s' * (one['ranks'] > 1)}"
    state = one["damage"] or ("whole, every hash is right" if one["verified"] else "whole by the sizes of its files")
    return f"{one['checkpoint']}: {ranks}, {one['bytes'] / 2**20:,.1f} MiB, {one['written']}, {state}"
