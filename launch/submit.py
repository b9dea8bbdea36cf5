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
from pathlib import Path

from launch.train import TrainOptions
from lce_dist.config import Config
from lce_dist.errors import Interrupted, LceError, RunError, SetupError

_CHECKOUT = Path(__file__).resolve().parents[1]


def submit_to_ray(config_path: Path, config: Config, options: TrainOptions) -> None:
    """Submit to RAY_ADDRESS, print the job's log until it ends, and fail as it failed.

    The submission id is made from what is asked for, so asking twice attaches to the job that runs.
    The run directory must be storage that every node sees under the same path.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of every file that it packs
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise SetupError("RAY_ADDRESS is not set; --target ray needs it, for example RAY_ADDRESS=http://HEAD:8265")
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"Ray cluster {address} takes no jobs: {_first_line(error)}. Check RAY_ADDRESS and RAY_AUTH_TOKEN"
        ) from None

    config_text = json.dumps(config.with_absolute_places().model_dump(mode="json"))
    arguments = ["--nodes", str(options.nodes), "--workers-per-node", str(options.workers_per_node)]
    arguments += ["--with-independent"] * options.with_independent + ["--fresh"] * options.fresh
    entrypoint = shlex.join(["python", "-m", "launch.cli", "job", "--config-json-env", "LCE_CONFIG_JSON", *arguments])
    content = hashlib.sha256((config_text + entrypoint).encode()).hexdigest()[:12]
    job_id = _free_id(client, f"lce-{config.run.name}-{content}")
    if job_id is not None:
        client.submit_job(
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env={
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
                "env_vars": {"LCE_CONFIG_JSON": config_text, "COLUMNS": "120", **_tracking_server()},
            },
            metadata={"run": config.run.name, "config": config_path.name},
        )
    else:
        job_id = f"lce-{config.run.name}-{content}"
        print(f"{job_id} is running already; following it")
    print(f"job {job_id} on {address}")
    info = client.get_job_info(job_id)
    try:
        while not info.status.is_terminal():
            with contextlib.suppress(RuntimeError, ConnectionError):  # a log connection that broke; the job did not
                asyncio.run(_follow(client, job_id))
            info = client.get_job_info(job_id)
    except KeyboardInterrupt:
        raise Interrupted(f"job {job_id} runs on; the same command follows it, ray job stop {job_id} ends it") from None
    if info.status != JobStatus.SUCCEEDED:
        failure: LceError = RunError(f"job {job_id} ended as {info.status}: {_first_line(info.message or '')}")
        failure.exit_code = info.driver_exit_code or 1
        raise failure


def _free_id(client, wanted: str) -> str | None:  # type: ignore[no-untyped-def]
    """``wanted``, freed of an ended job of that id; None while a job of that id runs."""
    from ray.job_submission import JobStatus

    for job in client.list_jobs():
        if job.submission_id == wanted:
            if job.status in (JobStatus.PENDING, JobStatus.RUNNING):
                return None
            client.delete_job(wanted)
    return wanted


async def _follow(client, job_id: str) -> None:  # type: ignore[no-untyped-def]
    async for text in client.tail_job_logs(job_id):
        sys.stdout.write(text)
        sys.stdout.flush()


def _tracking_server() -> dict[str, str]:
    """The submitter's tracking server goes along; its password does not: job settings are readable on the dashboard."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return {} if uri is None or "@" in uri else {"MLFLOW_TRACKING_URI": uri}


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
