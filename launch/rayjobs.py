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
_UID_LABEL = "kueue.x-k8s.io/job-uid"  # Kueue's, on the Workload that it makes of a job
_STOPPED = "lce-dist/stopped"  # an annotation: a queue holds a job suspended while it waits, too
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
            state not in ENDED and (state != "Suspended" or is_queued(job)),
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
            if state in ENDED or (state == "Suspended" and not is_queued(job)):
                _raise_unless_done(f"{namespace}/{name}", state, status)
                return
            if with_log and state == "Running":
                since = ["--since-time", read_to] if read_to else []
                _show_log([f"job/{name}", "--namespace", namespace, "--follow", *since])
                read_to = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            time.sleep(_WAIT_S)
    except KeyboardInterrupt:
        raise Interrupted(f"RayJob {namespace}/{name} runs on; the same command follows it, lce stop ends it") from None


def is_queued(job: Mapping[str, Any]) -> bool:
    """Whether it is a queue that holds the job suspended, until all of its pods fit."""
    metadata = job["metadata"]
    in_queue = QUEUE_LABEL in metadata.get("labels", {}) and _STOPPED not in metadata.get("annotations", {})
    return in_queue and job.get("status", {}).get("jobStatus") != "STOPPED"


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
    """Suspend the RayJob: its pods save a checkpoint and go; what the run has written stays.

    In a queue its Workload is set inactive instead: Kueue would take a suspended job for one that waits, and start it.
    Errors: SetupError.
    """
    job = json.loads(kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"]))
    if QUEUE_LABEL in job["metadata"].get("labels", {}):
        _set_active(job, namespace, False)
        _patch("rayjobs.ray.io", name, namespace, {"metadata": {"annotations": {_STOPPED: "true"}}})
    else:
        _patch("rayjobs.ray.io", name, namespace, {"spec": {"suspend": True}})


def _set_active(job: Mapping[str, Any], namespace: str, active: bool) -> None:
    """Let Kueue run the job, or have it end its pods and keep it out of the queue."""
    name, selector = job["metadata"]["name"], f"{_UID_LABEL}={job['metadata']['uid']}"
    asked = ["get", "workloads.kueue.x-k8s.io", "--namespace", namespace, "--selector", selector, "--output", "json"]
    workloads = json.loads(kubectl(asked))["items"]
    if not workloads:
        raise SetupError(
            f"RayJob {namespace}/{name} is in queue {job['metadata']['labels'][QUEUE_LABEL]!r}, and Kueue has made no Workload "
            f"of it (yet); try again, or kubectl --namespace {namespace} delete rayjob {name}"
        )
    for workload in workloads:
        _patch("workloads.kueue.x-k8s.io", workload["metadata"]["name"], namespace, {"spec": {"active": active}})


def _patch(kind: str, name: str, namespace: str, change: Mapping[str, Any]) -> None:
    kubectl(["patch", kind, name, "--namespace", namespace, "--type", "merge", "--patch", json.dumps(change)])


def resume_job(name: str, namespace: str) -> None:
    """Start a suspended RayJob again; one that has ended is made anew as it was. Errors: SetupError."""
    job = json.loads(kubectl(["get", "rayjobs.ray.io", name, "--namespace", namespace, "--output", "json"]))
    annotations = job["metadata"].get("annotations", {})
    if QUEUE_LABEL in job["metadata"].get("labels", {}):
        ended = job.get("status", {}).get("jobDeploymentStatus") in ENDED
        if _STOPPED in annotations and not ended:
            _patch("rayjobs.ray.io", name, namespace, {"metadata": {"annotations": {_STOPPED: None}}})
            _set_active(job, namespace, True)
            return
        annotations.pop(_STOPPED, None)
    elif job["spec"].get("suspend"):
        _patch("rayjobs.ray.io", name, namespace, {"spec": {"suspend": False}})
        return
    status = job.pop("status", {}).get("jobDeploymentStatus", "")
    if status not in ENDED:
        raise RunError(f"RayJob {namespace}/{name} is {status or 'Waiting'}; lce logs --follow shows what it does")
    metadata = job["metadata"]
    kept = ("name", "namespace", "labels", "annotations")
    job["metadata"] = {key: value for key, value in metadata.items() if key in kept}
    kubectl(["delete", "rayjobs.ray.io", name, "--namespace", namespace, "--wait"])
    kubectl(["create", "--filename", "-"], json.dumps(job))
