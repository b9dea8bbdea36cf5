"""Following a job of a Ray cluster whose log connections break: each character of the log is shown once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from launch.submit import _follow_to_end
from lce_dist.errors import RunError

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


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.submit._AGAIN_S", 0.0)
