"""Submitting to a Ray cluster that others submit to, and following a job whose log connections break: each character is shown once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from launch.submit import Submission, _follow_to_end, submit_once
from lce_dist.errors import RunError, SetupError

LOG = "step 10 of 20\nstep 20 of 20\nerror: --nodes asks for 3; nodes of the cluster with at least 1 CPU: 1\n"


class Cluster:
    """Ray's job client on a bad line: connection ``k`` brings the first ``cuts[k]`` characters and breaks."""

    def __init__(self, cuts: list[int], at_the_end: str | None) -> None:
        self.cuts, self.at_the_end = cuts, at_the_end

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        status = JobStatus.RUNNING if self.cuts else JobStatus.FAILED
        return SimpleNamespace(status=status, message="exit code 4", driver_exit_code=4)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        cut = self.cuts.pop(0)
        for start in range(0, cut, 20):
            yield LOG[start : min(start + 20, cut)]
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_logs(self, job_id: str) -> str:
        if self.at_the_end is None:
            raise RuntimeError("the node that ran the driver has gone")
        return self.at_the_end


@pytest.mark.parametrize("cuts", [[0], [17], [0, 40], [40, 17], [17, 40, len(LOG)]])
def test_a_log_is_shown_once_and_whole(cuts: list[int], capfd: pytest.CaptureFixture[str], no_wait: None) -> None:
    with pytest.raises(RunError, match="exit code 4") as caught:
        _follow_to_end(Cluster(list(cuts), LOG), "job")
    assert caught.value.exit_code == 4
    assert capfd.readouterr().out == LOG


def test_a_log_that_went_with_its_node_hides_nothing(capfd: pytest.CaptureFixture[str], no_wait: None) -> None:
    with pytest.raises(RunError, match="exit code 4"):
        _follow_to_end(Cluster([17], None), "job")
    assert capfd.readouterr().out == LOG[:17]


JOB = Submission("python -m launch.cli job --nodes 2", {"LCE_CONFIG_JSON": "{}"}, {"run": "one", "kind": "train"})


class Busy:
    """Ray's job client where the first answers to a submission are ``refusals``; after them the job of the other runs."""

    def __init__(self, refusals: list[str], others: JobStatus | None) -> None:
        self.refusals, self.others, self.submitted, self.deleted = refusals, others, 0, 0

    def list_jobs(self) -> list[SimpleNamespace]:
        if self.others is None or (self.refusals and self.others == JobStatus.RUNNING):
            return []
        return [SimpleNamespace(submission_id=JOB.id, status=self.others)]

    def delete_job(self, job_id: str) -> None:
        self.deleted += 1
        self.others = None

    def submit_job(self, **asked: object) -> None:
        assert asked["submission_id"] == JOB.id and asked["entrypoint"] == JOB.entrypoint
        if self.refusals:
            raise RuntimeError(f"Request failed with status code 500: {self.refusals.pop(0)}.")
        self.submitted += 1


def test_who_comes_a_moment_later_follows(no_wait: None) -> None:
    client = Busy([f"Job with submission_id {JOB.id} already exists"], JobStatus.RUNNING)
    assert submit_once(client, JOB) == f"{JOB.id} is running already; following it"
    assert client.submitted == 0


def test_a_cluster_that_has_only_just_started_is_asked_again(no_wait: None) -> None:
    client = Busy(["No available agent to submit job, please try again later."] * 3, None)
    assert submit_once(client, JOB) == f"{JOB.id} is submitted" and client.submitted == 1
    with pytest.raises(RunError, match=r"in 30 looks: .*No available agent"):
        submit_once(Busy(["No available agent to submit job, please try again later."] * 99, None), JOB)


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED])
def test_what_has_ended_is_said_to_have_ended(status: JobStatus, no_wait: None) -> None:
    client = Busy([], status)
    said = submit_once(client, JOB)
    assert said == f"{JOB.id} was there before and ended as {status}; {JOB.id} is submitted again"
    assert (client.deleted, client.submitted) == (1, 1)


def test_any_other_refusal_is_one_line(no_wait: None) -> None:
    with pytest.raises(SetupError, match=f"Ray refused job {JOB.id}: .*disk full"):
        submit_once(Busy(["disk full"], None), JOB)


def test_a_submission_that_differs_in_anything_is_another_job() -> None:
    others = [
        Submission(f"{JOB.entrypoint} --fresh", JOB.env_vars, JOB.metadata),
        Submission(JOB.entrypoint, {"LCE_CONFIG_JSON": '{"x": 1}'}, JOB.metadata),
        Submission(JOB.entrypoint, JOB.env_vars, {**JOB.metadata, "run_dir": "/elsewhere"}),
        Submission(JOB.entrypoint, dict(JOB.env_vars), dict(JOB.metadata)),
    ]
    assert len({JOB.id, *(other.id for other in others)}) == 4


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.submit._AGAIN_S", 0.0)
