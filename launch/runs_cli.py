"""The commands ``lce status | logs | stop | resume | profile``: runs after they were started, here, on a Ray cluster, on Kubernetes."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from lce_dist.errors import ConfigError

_FOLLOW_S = 2.0


def node_range(text: str) -> tuple[int | None, int]:
    """ "4" as (None, 4), "2:4" as (2, 4): with how few a run may go on, and how many it wants. Errors: ValueError."""
    least, colon, most = text.rpartition(":")
    return int(least) if colon else None, int(most)


def add_run_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``status``, ``logs``, ``stop``, ``resume`` and ``profile`` to the commands of ``lce``."""
    raw = argparse.RawDescriptionHelpFormatter
    status = commands.add_parser(
        "status",
        help="what runs are at: running, finished and their verdict, failed, interrupted",
        description="One line a run; without RUN all of them.",
        epilog="examples:\n  lce status\n  lce status quickstart\n  RAY_ADDRESS=http://HEAD:8265 lce status --json",
        formatter_class=raw,
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=_status)
    logs = commands.add_parser(
        "logs",
        help="what a run printed",
        epilog="examples:\n  lce logs quickstart --follow\n  lce logs quickstart --target k8s",
        formatter_class=raw,
    )
    logs.add_argument("--follow", action="store_true", help="go on until the run ends; on a cluster fails as it fails")
    logs.set_defaults(run=_logs)
    stop = commands.add_parser(
        "stop",
        help="end a run as Ctrl-C does; lce resume goes on from its last checkpoint",
        epilog="example:\n  lce stop quickstart",
        formatter_class=raw,
    )
    stop.add_argument(
        "--timeout", type=float, default=120.0, metavar="SECONDS", help="here and on Ray: wait so long (default: 120)"
    )
    stop.set_defaults(run=_stop)
    resume = commands.add_parser(
        "resume",
        help="go on with a run as it was started",
        epilog="examples:\n  lce resume quickstart\n  RAY_ADDRESS=http://HEAD:8265 lce resume quickstart",
        formatter_class=raw,
    )
    resume.set_defaults(run=_resume)
    profile = commands.add_parser(
        "profile",
        help="record some steps of a run that trains: a trace for chrome://tracing or ui.perfetto.dev, and a table",
        description="Ask the first rank of a run to record its next steps with torch.profiler, and wait for the result, which\n"
        "is in RUN/STAGE/profiles and among the artifacts of the stage in MLflow. On a Ray cluster a job there asks; on Kubernetes the command\n"
        "that asks in the run's head pod is shown.",
        epilog="examples:\n  lce profile quickstart --steps 20\n  lce profile /runs/big --steps 5 --timeout 1800\n"
        "  RAY_ADDRESS=http://HEAD:8265 lce profile quickstart",
        formatter_class=raw,
    )
    profile.add_argument("--steps", type=int, default=20, metavar="N", help="how many, 1 to 1000 (default: 20)")
    profile.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="wait so long (default: 600)")
    profile.set_defaults(run=_profile)
    for parser in (status, logs, stop, resume, profile):
        parser.add_argument(
            "which",
            nargs="?" if parser is status else None,
            metavar="RUN",
            help="a name, or here a run's directory" + (" (default: all)" if parser is status else ""),
        )
        parser.add_argument(
            "--target",
            choices=("auto", "local", "ray", "k8s"),
            default="auto",
            help="auto (default): ray when RAY_ADDRESS is set, else local",
        )
        parser.add_argument(
            "--run-dir", type=Path, default=Path("runs"), help="here: where runs are kept (default: runs)"
        )
        parser.add_argument("--namespace", default="lce-dist", help="k8s: of the RayJobs (default: lce-dist)")


def _profile(arguments: argparse.Namespace) -> None:
    target = _target(arguments)
    if target == "ray":
        from launch.submit import profile_job

        profile_job(arguments.which, arguments.steps, arguments.timeout)
        return
    if target == "k8s":
        from launch.rayjobs import profile_command

        job = _newest(arguments, target)
        raise ConfigError(
            f"lce profile asks by a file in the run's storage, which is in its pods. Who may enter them asks there: "
            f"{profile_command(job, arguments.namespace, arguments.which, arguments.steps)}"
        )
    from launch.runs import find_run, profile_run

    for path in profile_run(find_run(Path(arguments.which), arguments.run_dir), arguments.steps, arguments.timeout):
        print(path)


def _status(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    lines: list[tuple[str, str]]
    target = _target(arguments)
    if target == "local":
        from launch.runs import find_run, runs_below, status_of

        named = arguments.which
        found = runs_below(arguments.run_dir) if named is None else [find_run(Path(named), arguments.run_dir)]
        states = [status_of(run_dir) for run_dir in found]
        lines, told = [(one.name, one.line()) for one in states], [asdict(one) for one in states]
        nothing = f"no runs below {arguments.run_dir}"
    else:
        jobs = _jobs(arguments, target)
        lines = [(one.run, ", ".join(word for word in (one.state, _id_of(one), one.message) if word)) for one in jobs]
        told = [asdict(one) for one in jobs]
        nothing = "no jobs of ours there"
    if arguments.json:
        print(json.dumps(told, indent=2))
        return
    for name, line in lines:
        console.print(f"{name}: {line}", markup=False)
    if not lines:
        console.print(nothing, markup=False)


def _logs(arguments: argparse.Namespace) -> None:
    target = _target(arguments)
    if target == "ray":
        from launch.submit import job_logs

        job_logs(_newest(arguments, target), arguments.follow)
    elif target == "k8s":
        from launch.rayjobs import job_logs as kubernetes_logs
        from launch.rayjobs import wait_for_job

        if arguments.follow:
            wait_for_job(_newest(arguments, target), arguments.namespace, with_log=True)
        else:
            kubernetes_logs(_newest(arguments, target), arguments.namespace)
    else:
        _local_logs(arguments)


def _local_logs(arguments: argparse.Namespace) -> None:
    """What the driver told, then what the run is at."""
    from launch.runs import LOG_FILE, find_run, status_of

    run_dir = find_run(Path(arguments.which), arguments.run_dir)
    log, shown = run_dir / LOG_FILE, 0
    while True:
        status = status_of(run_dir)  # before the log: what was said up to the end is shown
        if log.exists():
            with log.open("rb") as file:
                file.seek(shown)
                new = file.read()
            shown += len(new)
            print(new.decode(errors="replace"), end="", flush=True)
        if status.state != "running" or not arguments.follow:
            break
        time.sleep(_FOLLOW_S)
    print(status.line(), flush=True)
    failure = run_dir / "failure.log"
    if failure.exists():
        print(failure.read_text(encoding="utf-8"), end="")


def _stop(arguments: argparse.Namespace) -> None:
    target = _target(arguments)
    if target == "ray":
        from launch.submit import stop_job

        job = _newest(arguments, target)
        stop_job(job, arguments.timeout)
        print(f"job {job} has ended; lce resume {arguments.which} --target ray goes on")
    elif target == "k8s":
        from launch.rayjobs import stop_job as stop_kubernetes

        job = _newest(arguments, target)
        stop_kubernetes(job, arguments.namespace)
        print(f"RayJob {arguments.namespace}/{job} is suspended; its storage keeps what was written")
    else:
        from launch.runs import find_run, stop_run

        run_dir = find_run(Path(arguments.which), arguments.run_dir)
        stop_run(run_dir, arguments.timeout)
        print(f"run {run_dir} has ended; lce resume {run_dir} goes on")


def _resume(arguments: argparse.Namespace) -> None:
    target = _target(arguments)
    if target == "ray":
        from launch.submit import resume_job

        resume_job(_newest(arguments, target))
    elif target == "k8s":
        from launch.rayjobs import resume_job as resume_kubernetes

        job = _newest(arguments, target)
        resume_kubernetes(job, arguments.namespace)
        print(f"RayJob {arguments.namespace}/{job} goes on; lce logs {arguments.which} --target k8s --follow shows it")
    else:
        from rich.console import Console

        from launch.runs import find_run, read_launch
        from launch.train import TrainOptions, train

        config, asked = read_launch(find_run(Path(arguments.which), arguments.run_dir))
        least, most = node_range(str(asked["nodes"]))
        options = TrainOptions(most, asked["workers_per_node"], asked["with_independent"], False, False, least)
        train(config, options, Console())


def _target(arguments: argparse.Namespace) -> str:
    if arguments.target != "auto":
        return str(arguments.target)
    return "ray" if os.environ.get("RAY_ADDRESS") else "local"


def _jobs(arguments: argparse.Namespace, target: str):  # type: ignore[no-untyped-def]
    if target == "ray":
        from launch.submit import jobs_of

        return jobs_of(arguments.which)
    from launch.rayjobs import jobs_of as kubernetes_jobs

    return kubernetes_jobs(arguments.which, arguments.namespace)


def _newest(arguments: argparse.Namespace, target: str) -> str:
    jobs = _jobs(arguments, target)
    if not jobs:
        raise ConfigError(f"no job of run {arguments.which!r} there; lce status --target {target} lists them")
    return _id_of(jobs[-1])


def _id_of(job: object) -> str:
    return str(getattr(job, "job_id", None) or getattr(job, "name", ""))
