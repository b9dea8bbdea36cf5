"""The same job on a running Ray cluster: submitted once, followed to its end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.train import TrainOptions
from lce_dist.config import Config
from lce_dist.errors import Interrupted, LceError, RunError, SetupError

_AGAIN_S = 1.0
_CHECKOUT = Path(__file__).resolve().parents[1]
_CODE = {
    "working_dir": str(_CHECKOUT),
    "excludes": [
        "/.venv",
        "/.git",
        "/.mypy_cache",
        "/.ruff_cache",
        "/.hypothesis",
        "/runs",
        "/data",
        "/docs",
        "/benchmarks",
        "/tests",
    ],
}


def submit_to_ray(config_path: Path, config: Config, options: TrainOptions) -> None:
    """Submit to RAY_ADDRESS, print the job's log until it ends, and fail as it failed.

    The submission id is made from what is asked for, so asking twice attaches to the job that runs.
    The run directory must be storage that every node sees under the same path.
    """
    client = _client()
    config_text = json.dumps(config.with_absolute_places().model_dump(mode="json"))
    arguments = ["--nodes", options.nodes_text, "--workers-per-node", str(options.workers_per_node)]
    arguments += ["--with-independent"] * options.with_independent + ["--fresh"] * options.fresh
    arguments += ["--check"] * options.check_only
    entrypoint = shlex.join(["python", "-m", "launch.cli", "job", "--config-json-env", "LCE_CONFIG_JSON", *arguments])
    content = hashlib.sha256((config_text + entrypoint).encode()).hexdigest()[:12]
    job_id = _free_id(client, f"lce-{config.run.name}-{content}")
    if job_id is not None:
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env={
                **_CODE,
                "env_vars": {"LCE_CONFIG_JSON": config_text, "COLUMNS": "120", **_tracking_server()},
            },
            metadata={"run": config.run.name, "config": config_path.name},
        )
    else:
        job_id = f"lce-{config.run.name}-{content}"
        print(f"{job_id} is running already; following it")
    print(f"job {job_id} on {os.environ['RAY_ADDRESS']}")
    _follow_to_end(client, job_id)


def _client():  # type: ignore[no-untyped-def]
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of every file that it packs
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise SetupError("RAY_ADDRESS is not set; --target ray needs it, for example RAY_ADDRESS=http://HEAD:8265")
    try:
        return JobSubmissionClient(address)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"Ray cluster {address} takes no jobs: {_first_line(error)}. Check RAY_ADDRESS and RAY_AUTH_TOKEN"
        ) from None


def _follow_to_end(client, job_id: str) -> None:  # type: ignore[no-untyped-def]
    """Print the job's log until it ends; fails as it failed."""
    from ray.job_submission import JobStatus

    info, log = client.get_job_info(job_id), _Log()
    try:
        while not info.status.is_terminal():
            with contextlib.suppress(RuntimeError, OSError):  # a log connection that broke; the job did not
                asyncio.run(_follow(client, job_id, log))
            info = client.get_job_info(job_id)
            if not info.status.is_terminal():
                time.sleep(_AGAIN_S)  # a cluster that is not well is not asked in a tight loop
        with contextlib.suppress(RuntimeError, OSError):
            log.show(client.get_job_logs(job_id))  # what a connection that broke at the end did not bring
    except KeyboardInterrupt:
        raise Interrupted(f"job {job_id} runs on; the same command follows it, lce stop ends it") from None
    if info.status != JobStatus.SUCCEEDED:
        failure: LceError = RunError(f"job {job_id} ended as {info.status}: {_first_line(info.message or '')}")
        failure.exit_code = info.driver_exit_code or 1
        raise failure


@dataclass(frozen=True)
class JobLine:
    """A job of ours on the cluster: of which run, and Ray's word for its state."""

    job_id: str
    run: str
    state: str
    message: str


def jobs_of(run: str | None) -> list[JobLine]:
    """Jobs of a run (or of all) on RAY_ADDRESS, oldest first. Errors: SetupError."""
    found = [
        (job.start_time or 0, JobLine(job.submission_id, name, str(job.status), _first_line(job.message or "")))
        for job in _client().list_jobs()
        if job.submission_id is not None and (name := (job.metadata or {}).get("run")) is not None
    ]
    return [line for _, line in sorted(found, key=lambda pair: pair[0]) if run in (None, line.run)]


def job_logs(job_id: str, follow: bool) -> None:
    """Print the job's log; ``follow``: to its end, failing as it failed."""
    client = _client()
    if follow:
        _follow_to_end(client, job_id)
    else:
        sys.stdout.write(client.get_job_logs(job_id))


def stop_job(job_id: str) -> None:
    """Ask the job to end, as Ctrl-C does; returns at once."""
    _client().stop_job(job_id)


def resume_job(job_id: str) -> None:
    """Submit an ended job again as it was, and follow it: it goes on from its last checkpoint."""
    client = _client()
    info = client.get_job_info(job_id)
    if not info.status.is_terminal():
        raise RunError(f"job {job_id} is {info.status}; lce logs --follow shows what it does")
    client.delete_job(job_id)
    client.submit_job(
        entrypoint=info.entrypoint,
        submission_id=job_id,
        runtime_env={**(info.runtime_env or {}), **_CODE},
        metadata=info.metadata,
    )
    _follow_to_end(client, job_id)


def _free_id(client, wanted: str) -> str | None:  # type: ignore[no-untyped-def]
    """``wanted``, freed of an ended job of that id; None while a job of that id runs."""
    from ray.job_submission import JobStatus

    for job in client.list_jobs():
        if job.submission_id == wanted:
            if job.status in (JobStatus.PENDING, JobStatus.RUNNING):
                return None
            client.delete_job(wanted)
    return wanted


class _Log:
    """A job's log on stdout, each character once, however often it is read from its beginning."""

    def __init__(self) -> None:
        self._shown = 0

    def show(self, text: str, start: int = 0) -> None:
        """Print what ``text``, which begins at character ``start`` of the log, has beyond what was printed."""
        new = text[max(self._shown - start, 0) :]
        sys.stdout.write(new)
        sys.stdout.flush()
        self._shown += len(new)


async def _follow(client, job_id: str, log: _Log) -> None:  # type: ignore[no-untyped-def]
    start = 0
    async for text in client.tail_job_logs(job_id):
        log.show(text, start)
        start += len(text)


def _tracking_server() -> dict[str, str]:
    """The submitter's tracking server goes along; its password does not: job settings are readable on the dashboard."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return {} if uri is None or "@" in uri else {"MLFLOW_TRACKING_URI": uri}


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
