"""The same job on a running Ray cluster: submitted once, followed to its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launch.train import TrainOptions
from lce_dist.config import Config
from lce_dist.errors import ConfigError, Interrupted, LceError, RunError, SetupError

_AGAIN_S = 1.0
_LOOKS = 30  # at what others do with the same submission id at the same moment
_PASSING = ("already exists", "does not exist", "non-terminal", "try again later")  # of Ray's refusals
_STOP_S = 10  # for a driver to end, after its checkpoint
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

    The submission id is made from what is asked for and from the code, so asking twice attaches to the job that runs.
    The run directory must be storage that every node sees under the same path. Errors: RunError when another job works on the run.
    """
    client = _client()
    config = config.with_absolute_places()
    config_text = json.dumps(config.model_dump(mode="json"))
    arguments = ["--nodes", options.nodes_text, "--workers-per-node", str(options.workers_per_node)]
    arguments += ["--with-independent"] * options.with_independent + ["--fresh"] * options.fresh
    arguments += ["--check"] * options.check_only
    arguments += ["--gpu", options.gpu] if options.gpu is not None else []
    job = Submission(
        _entrypoint("job", "--config-json-env", "LCE_CONFIG_JSON", *arguments),
        {
            "LCE_CONFIG_JSON": config_text,
            "COLUMNS": "120",
            # Ray would kill a job that is stopped after three seconds
            "RAY_JOB_STOP_WAIT_TIME_S": str(config.checkpoint.grace_s + _STOP_S),
            **_tracking_server(),
        },
        {
            "run": config.run.name,
            "run_dir": str(Path(config.run.dir) / config.run.name),
            "config": config_path.name,
            "kind": "check" if options.check_only else "train",
        },
    )
    job_id = job.id
    if not options.check_only:
        _refuse_two(client, job)
    print(submit_once(client, job))
    print(f"job {job_id} on {os.environ['RAY_ADDRESS']}")
    _follow_to_end(client, job_id)


@dataclass(frozen=True)
class Submission:
    """What Ray is given: a command, its environment, and what we keep with it to find it again."""

    entrypoint: str
    env_vars: dict[str, str]
    metadata: dict[str, str]

    @property
    def id(self) -> str:
        """The run's name, then twelve hex digits over all of it and the code that it would run."""
        content = json.dumps([self.entrypoint, self.env_vars, self.metadata, _code_digest()], sort_keys=True)
        return f"lce-{self.metadata['run']}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def submit_once(client, job: Submission) -> str:  # type: ignore[no-untyped-def]
    """Submit it unless it is there; returns what was found, as a line for people.

    Two that submit the same at the same moment find each other. Errors: RunError when that does not come to rest.
    """
    ended, why = "", ""
    for _ in range(_LOOKS):
        found = next((one for one in client.list_jobs() if one.submission_id == job.id), None)
        if found is not None and not found.status.is_terminal():
            return f"{job.id} is running already; following it"
        try:
            if found is not None:
                ended = f"{job.id} was there before and ended as {found.status}; "
                client.delete_job(job.id)
            client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.id,
                runtime_env={**_CODE, "env_vars": job.env_vars},
                metadata=job.metadata,
            )
        except RuntimeError as error:
            # Somebody else submitted or deleted it between our look and our word, or the cluster has only just started.
            if not any(words in str(error) for words in _PASSING):
                raise SetupError(f"Ray refused job {job.id}: {_first_line(error)}") from None
            why = _first_line(error)
            time.sleep(_AGAIN_S * (0.5 + random.random()))  # noqa: S311 - so that two do not keep meeting
            continue
        return f"{ended}{job.id} is submitted{' again' if ended else ''}"
    raise RunError(
        f"job {job.id} could neither be submitted nor followed in {_LOOKS} looks: {why}; lce status --target ray shows it"
    )


def _refuse_two(client, job: Submission) -> None:  # type: ignore[no-untyped-def]
    """Another job of this run that is at work would have its directory. Errors: RunError."""
    for other in client.list_jobs():
        known = other.metadata or {}
        is_it = known.get("run_dir") == job.metadata["run_dir"] and known.get("kind") == "train"
        if is_it and not other.status.is_terminal() and other.submission_id != job.id:
            raise RunError(
                f"run {job.metadata['run']} is at work as job {other.submission_id} ({other.status}), with other settings, size "
                f"or code. Use another --name, or first: lce stop {job.metadata['run']} --target ray"
            )


def _entrypoint(*words: str) -> str:
    return shlex.join(["python", "-m", "launch.cli", *words])


@functools.cache
def _code_digest() -> str:
    """Of the code that a job takes along."""
    digest = hashlib.sha256()
    for package in ("launch", "lce_dist", "pipelines"):
        for path in sorted((_CHECKOUT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_CHECKOUT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


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
    """Jobs that train a run (or all) on RAY_ADDRESS, oldest first. Errors: SetupError."""
    found = [
        (job.start_time or 0, JobLine(job.submission_id, name, str(job.status), _first_line(job.message or "")))
        for job in _client().list_jobs()
        if job.submission_id is not None
        and (name := (job.metadata or {}).get("run")) is not None
        and job.metadata.get("kind", "train") == "train"
    ]
    return [line for _, line in sorted(found, key=lambda pair: pair[0]) if run in (None, line.run)]


def job_logs(job_id: str, follow: bool) -> None:
    """Print the job's log; ``follow``: to its end, failing as it failed."""
    client = _client()
    if follow:
        _follow_to_end(client, job_id)
    else:
        sys.stdout.write(client.get_job_logs(job_id))


def stop_job(job_id: str, timeout_s: float) -> None:
    """Ask the job to end, as Ctrl-C does, and wait until it has. Errors: RunError when it does not."""
    client = _client()
    client.stop_job(job_id)
    deadline_s = time.monotonic() + timeout_s
    while not client.get_job_info(job_id).status.is_terminal():
        if time.monotonic() > deadline_s:
            raise RunError(
                f"job {job_id} is asked to end and still runs after {timeout_s:.0f} s; lce logs shows what it does"
            )
        time.sleep(_AGAIN_S)


def profile_job(run: str, steps: int, timeout_s: float) -> None:
    """Let a job on the cluster, which sees the run's directory, ask for a profile of the run's next steps; shows what it says.

    Errors: ConfigError for a run that is not there; as the job fails.
    """
    client = _client()
    jobs = [job for job in client.list_jobs() if (job.metadata or {}).get("run") == run and "run_dir" in job.metadata]
    jobs = [job for job in jobs if job.metadata["kind"] == "train"]
    if not jobs:
        raise ConfigError(f"no job of run {run!r} there; lce status --target ray lists them")
    run_dir = max(jobs, key=lambda job: job.start_time or 0).metadata["run_dir"]
    command = _entrypoint("profile", run_dir, "--steps", str(steps), "--timeout", str(timeout_s), "--target", "local")
    asked = {"run": run, "run_dir": run_dir, "kind": "profile", "asked": str(time.time_ns())}
    job = Submission(command, {}, asked)
    submit_once(client, job)
    _follow_to_end(client, job.id)


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
