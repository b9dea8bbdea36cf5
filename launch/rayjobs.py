"""Runs on Kubernetes after they were submitted: listed, shown, followed to their end, stopped, gone on with."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launch.kubectl import kubectl, kubectl_program, last_line
from lce_dist.errors import Interrupted, LceError, RunError, SetupError

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FAILED = ("Failed", "ValidationFailed")
ENDED = (*FAILED, "Complete")
_WAIT_S, _UNANSWERED = 5.0, 12


@dataclass(frozen=True)
class RayJobLine:
    """A RayJob of ours: of which run, the operator's words for its state, and whether it has pods or waits for them."""

    name: str
    run: str
    state: str
    message: str
    at_work: bool


def jobs_of(run: str | None, namespace: str) -> list[RayJobLine]:
    """RayJobs of a run (or of all) in the namespace, oldest first. Errors: SetupError for what the cluster answers."""
    listed = json.loads(kubectl(["get", "rayjobs.ray.io", "--namespace", namespace, "--output", "json"]))
    found = []
    for job in listed["items"]:
        words = shlex.split(str(job["spec"].get("entrypoint", "")))
        if "--name" not in words[:-1] or "launch.cli" not in words:
            continue
        status = job.get("status", {})
        state = status.get("jobDeploymentStatus") or "Waiting"
        line = RayJobLine(
            job["metadata"]["name"],
            words[words.index("--name") + 1],
            state,
            last_line(status.get("message", "")),
            state not in ENDED and (state != "Suspended" or _is_queued(job)),
        )
        if run in (None, line.run):
            found.append((job["metadata"].get("creationTimestamp", ""), line))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def profile_command(name: str, namespace: str, run: str, steps: int) -> str:
    """What asks for a profile in the head pod of a RayJob that runs; a submitter's role may not. Errors: RunError, SetupError."""
    job = json.loads(kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"]))
    cluster = job.get("status", {}).get("rayClusterName")
    if not cluster:
        raise RunError(f"RayJob {namespace}/{name} has no Ray cluster; nothing trains that could be recorded")
    inside = f"python -m launch.cli profile /runs/{run} --target local --steps {steps}"
    return f"kubectl --namespace {namespace} exec service/{cluster}-head-svc -c ray-head -- {inside}"


def job_logs(name: str, namespace: str) -> None:
    """Show what the RayJob's submitter has printed so far. Errors: SetupError."""
    arguments = ["logs", "--namespace", namespace, f"job/{name}"]
    done = subprocess.run([kubectl_program(), *arguments], check=False)  # noqa: S603 - no shell, and the arguments are ours
    if done.returncode != 0:
        raise SetupError(f"kubectl logs of {namespace}/{name} ended with {done.returncode}; is the job there already?")


def wait_for_job(name: str, namespace: str, with_log: bool, say: Callable[[str], None] = print) -> None:
    """Wait until the RayJob has ended, telling each state that it passes; ``with_log``: and what its submitter prints.

    Errors: Interrupted when it was suspended or stopped; RunError with the exit code of the job; SetupError when the cluster
    has not answered for a minute.
    """
    told, failures, read_to = "", 0, ""
    try:
        while True:
            try:
                job = json.loads(kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"]))
                failures = 0
            except SetupError:  # an API server is updated now and then; the job runs on
                failures += 1
                if failures > _UNANSWERED:
                    raise
                time.sleep(_WAIT_S)
                continue
            status = job.get("status", {})
            state = status.get("jobDeploymentStatus") or "Waiting"
            if state != told:
                say(f"RayJob {namespace}/{name}: {state}")
                told = state
            if state in ENDED or (state == "Suspended" and not _is_queued(job)):
                _raise_unless_done(f"{namespace}/{name}", state, status)
                return
            if with_log and state == "Running":
                since = ["--since-time", read_to] if read_to else []
                _show_log([f"job/{name}", "--namespace", namespace, "--follow", *since])
                read_to = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            time.sleep(_WAIT_S)
    except KeyboardInterrupt:
        raise Interrupted(f"RayJob {namespace}/{name} runs on; the same command follows it, lce stop ends it") from None


def _is_queued(job: Mapping[str, Any]) -> bool:
    """Whether it is a queue that holds the job suspended, until all of its pods fit."""
    return QUEUE_LABEL in job["metadata"].get("labels", {}) and job.get("status", {}).get("jobStatus") != "STOPPED"


def _raise_unless_done(job: str, state: str, status: Mapping[str, Any]) -> None:
    message = str(status.get("message", ""))
    if state == "Suspended" or status.get("jobStatus") == "STOPPED":
        raise Interrupted(f"RayJob {job} was stopped; lce resume goes on from the last checkpoint")
    if state in FAILED:
        failure: LceError = RunError(f"RayJob {job} is {state}: {last_line(message) or 'no message'}")
        code = re.search(r"exit code (\d+)", message)
        failure.exit_code = int(code[1]) if code else 1
        raise failure


def _show_log(arguments: list[str]) -> None:
    """Print a log until it breaks off; that there is none yet is no error."""
    subprocess.run([kubectl_program(), "logs", *arguments], stderr=subprocess.DEVNULL, check=False)  # noqa: S603 - no shell, and the arguments are ours


def stop_job(name: str, namespace: str) -> None:
    """Suspend the RayJob: its pods save a checkpoint and go; what the run has written stays. Errors: SetupError."""
    suspend = json.dumps({"spec": {"suspend": True}})
    kubectl(["patch", "rayjobs.ray.io", name, "--namespace", namespace, "--type", "merge", "--patch", suspend])


def resume_job(name: str, namespace: str) -> None:
    """Start a suspended RayJob again; one that has ended is made anew as it was. Errors: SetupError."""
    job = json.loads(kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"]))
    if job["spec"].get("suspend"):
        resume = json.dumps({"spec": {"suspend": False}})
        kubectl(["patch", "rayjobs.ray.io", name, "--namespace", namespace, "--type", "merge", "--patch", resume])
        return
    status = job.pop("status", {}).get("jobDeploymentStatus", "")
    if status not in ENDED:
        raise RunError(f"RayJob {namespace}/{name} is {status or 'Waiting'}; lce logs --follow shows what it does")
    metadata = job["metadata"]
    kept = ("name", "namespace", "labels", "annotations")
    job["metadata"] = {key: value for key, value in metadata.items() if key in kept}
    kubectl(["delete", "rayjobs.ray.io", name, "--namespace", namespace, "--wait"])
    kubectl(["create", "--filename", "-"], json.dumps(job))
