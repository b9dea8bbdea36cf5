"""The command ``lce doctor``: is this machine ready for a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from lce_dist.errors import SetupError

_QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.toml"


def add_doctor_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``doctor`` to the commands of ``lce``."""
    doctor = commands.add_parser(
        "doctor",
        help="is this machine ready: versions, GPU, DALI, memory, limits, disk, clocks, Ray, MLflow",
        description="Look at everything that a run needs and print one line a thing; what is not well comes with its remedy.",
        epilog="examples:\n  lce doctor\n  lce doctor --config mine.toml --json\n\n"
        "exit codes: 0 nothing is bad (warnings or not), 2 config, 4 something is bad",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--config", type=Path, default=_QUICKSTART, help="TOML file (default: quickstart)")
    doctor.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; repeatable"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from launch.doctor import examine_machine
    from lce_dist.config import load_config

    console = Console(soft_wrap=True, highlight=False)
    words = {"ok": "[green]ok[/green]  ", "warn": "[yellow]warn[/yellow]", "bad": "[red]bad[/red] "}
    findings = []
    for finding in examine_machine(load_config(arguments.config, arguments.set)):
        findings.append(finding)
        if not arguments.json:
            remedy = f". Remedy: {finding.remedy}" if finding.remedy else ""
            console.print(words[finding.state], end=" ")
            console.print(f"{finding.name}: {finding.value}{remedy}", markup=False)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    bad = [finding.name for finding in findings if finding.state == "bad"]
    if bad:
        raise SetupError(f"{len(bad)} of {len(findings)} things are bad: {', '.join(bad)}")
