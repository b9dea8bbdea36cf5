"""The same job on a running Ray cluster: submitted through its dashboard, followed, its exit code passed on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Workplace


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard and a token of its own, as ``ray start`` makes it."""
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("f" * 64)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        dashboard, gcs = one.getsockname()[1], two.getsockname()[1]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    bin_folder = Path(sys.executable).parent
    ray = str(bin_folder / "ray")
    inherited["PATH"] = f"{bin_folder}:{inherited['PATH']}"  # as in an activated environment: jobs run its `python`
    subprocess.run(
        [
            ray,
            "start",
            "--head",
            "--num-cpus=2",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            "--include-dashboard=true",
            "--disable-usage-stats",
        ],
        env={**inherited, **environment},
        check=True,
        capture_output=True,
        timeout=120,
    )
    yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    subprocess.run([ray, "stop", "--force"], check=False, capture_output=True, timeout=60)


def test_submit_follow_and_finish(workplace: Workplace, cluster: dict[str, str]) -> None:
    arguments = ("train", "--config", "small.toml", "--nodes", "1", "--workers-per-node", "2", "--name", "submitted")
    code, output = workplace.run(*arguments, **cluster)
    assert code == 0, output
    assert "job lce-submitted-" in output and "M(new, old)" in output
    assert workplace.report("submitted")["num_ranks"] == 2
    code, output = workplace.run(*arguments, **cluster)
    assert code == 0 and "finished before" in output
    code, output = workplace.run("status", "submitted", **cluster)
    assert code == 0 and output.startswith("submitted: SUCCEEDED, lce-submitted-"), output
    code, output = workplace.run("logs", "submitted", **cluster)
    assert code == 0 and "finished before" in output
    code, output = workplace.run("resume", "submitted", **cluster)
    assert code == 0 and "finished before" in output, output
    code, output = workplace.run("status", "submitted", "--target", "local", **cluster)
    assert code == 0 and output.startswith("submitted: finished, "), output


def test_too_few_nodes_is_an_error_with_its_exit_code(workplace: Workplace, cluster: dict[str, str]) -> None:
    code, output = workplace.run("train", "--config", "small.toml", "--nodes", "3", "--name", "wide", **cluster)
    assert code == 4, output
    assert "--nodes asks for 3; nodes of the cluster with at least 1 CPU: 1" in output


def test_without_the_token_nothing_is_told(workplace: Workplace, cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("e" * 64)
    for more in ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, {}):
        environment = {"RAY_ADDRESS": cluster["RAY_ADDRESS"], "RAY_AUTH_MODE": "token", "HOME": str(tmp_path), **more}
        code, output = workplace.run("status", **environment)
        assert code == 4 and "lce-submitted" not in output and "Traceback" not in output, output


def test_no_cluster_there(workplace: Workplace) -> None:
    code, output = workplace.run("train", "--config", "small.toml", RAY_ADDRESS="http://127.0.0.1:9")
    assert code == 4 and "http://127.0.0.1:9" in output.splitlines()[-1] and "Traceback" not in output
