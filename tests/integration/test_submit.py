"""The same job on a running Ray cluster: submitted through its dashboard, followed, its exit code passed on."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import Workplace, wait_for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard and a token of its own, as ``ray start`` makes it."""
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("f" * 64)
    with contextlib.ExitStack() as held:  # Ray's own choices are the same for every head on this machine
        sockets = [held.enter_context(socket.socket()) for _ in range(4)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        gcs, dashboard, agent, clients = (one.getsockname()[1] for one in sockets)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    bin_folder = Path(sys.executable).parent
    ray = str(bin_folder / "ray")
    inherited["PATH"] = f"{bin_folder}:{inherited['PATH']}"  # as in an activated environment: jobs run its `python`
    words = ["start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    words += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={clients}"]
    # a folder of its own, with a short name for its sockets: in Ray's the last head that started is "the" cluster of a machine
    folder = tempfile.mkdtemp(prefix="lce-ray-")
    words += ["--include-dashboard=true", "--disable-usage-stats", f"--temp-dir={folder}"]
    log = tmp_path_factory.mktemp("cluster") / "log"
    with log.open("w") as file:
        head = subprocess.Popen([ray, *words], env={**inherited, **environment}, stdout=file, stderr=file)
    deadline_s = time.monotonic() + 120.0
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.2)
    yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    # not `ray stop`, which ends every cluster of this machine
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_submit_follow_and_finish(workplace: Workplace, cluster: dict[str, str]) -> None:
    arguments = ("train", "--config", "small.toml", "--nodes", "1", "--workers-per-node", "2", "--name", "submitted")
    code, output = workplace.run(*arguments, **cluster)
    assert code == 0, output
    assert "job lce-submitted-" in output and "M(new, old)" in output
    assert workplace.report("submitted")["num_ranks"] == 2
    code, output = workplace.run(*arguments, **cluster)
    assert code == 0 and "finished before" in output
    assert "was there before and ended as SUCCEEDED" in output and "is submitted again" in output
    code, output = workplace.run("status", "submitted", **cluster)
    assert code == 0 and output.startswith("submitted: SUCCEEDED, lce-submitted-"), output
    code, output = workplace.run("logs", "submitted", **cluster)
    assert code == 0 and "finished before" in output
    code, output = workplace.run("resume", "submitted", **cluster)
    assert code == 0 and "finished before" in output, output
    code, output = workplace.run("status", "submitted", "--target", "local", **cluster)
    assert code == 0 and output.startswith("submitted: finished, "), output


_AT_ONCE = """
import threading
from launch.submit import Submission, _client, submit_once
said, gate = [], threading.Barrier(4)
def submit(job):
    client = _client()
    gate.wait()
    said.append(submit_once(client, job))
for number in range(3):
    for entrypoint in (f"sleep 60 # {number}", f"true # {number}"):
        job = Submission(entrypoint, {}, {"run": "at-once", "kind": "check"})
        said.clear()
        threads = [threading.Thread(target=submit, args=(job,)) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        there = [one for one in _client().list_jobs() if one.submission_id == job.id]
        started = sum("is submitted" in line for line in said)
        if entrypoint.startswith("sleep"):
            assert (len(said), started, len(there)) == (4, 1, 1), said
            _client().stop_job(job.id)
        else:  # some may find it ended, and do it again
            assert len(said) == 4 and started >= 1 and len(there) == 1, said
print("one job each time")
"""


def test_submissions_of_the_same_moment_are_one_job(workplace: Workplace, cluster: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AT_ONCE],
        cwd=workplace.folder,
        env={**workplace.environment(), **cluster},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0 and "one job each time" in done.stdout, done.stdout + done.stderr


def test_stop_leaves_time_for_a_checkpoint(workplace: Workplace, cluster: dict[str, str]) -> None:
    """No checkpoint is due by itself: those that there are were asked for. Ray alone would wait 3 s, which are fewer than 500 steps."""
    long = ("--set", "new.epochs=4000.0", "--set", "old.epochs=1.0")
    long += ("--set", "checkpoint.every_steps=1000000", "--set", "tracking.every_steps=500")
    arguments = ("train", "--config", "small.toml", "--name", "stopped", *long)
    follower = workplace.start(*arguments, **cluster)
    run_dir = workplace.folder / "runs" / "stopped"

    def committed() -> list[str]:
        names = (path.name for path in (run_dir / "new" / "checkpoints").glob("step-*"))
        return sorted(name for name in names if name[5:].isdigit())

    try:
        ids = run_dir / "new" / "batch_ids.tsv"
        wait_for(lambda: ids.exists() and ids.stat().st_size > 0, follower, 200.0)
        other = workplace.start(*arguments, "--set", "optim.lr=0.05", **cluster)
        output, _ = other.communicate(timeout=100)
        assert other.returncode == 1 and "run stopped is at work as job lce-stopped-" in output, output
        leaving = subprocess.run(  # what a pod does before it goes
            [sys.executable, "-m", "launch.leaving", str(run_dir), "120"],
            env=workplace.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"{run_dir}: saved as new/step-" in leaving.stdout, leaving.stdout
        (saved,) = committed()
        code, output = workplace.run("profile", "stopped", "--steps", "3", **cluster)
        assert code == 0 and f"{run_dir}/new/profiles/step-" in output, output
        code, output = workplace.run("stop", "stopped", **cluster)
        assert code == 0 and "has ended; lce resume stopped" in output, output
        assert follower.wait(60) != 0
    finally:
        follower.kill()
    code, output = workplace.run("logs", "stopped", **cluster)
    assert code == 0 and "which is saved; the same command goes on from there" in output, output
    assert len(committed()) == 2 and committed()[0] == saved
    code, output = workplace.run("status", "stopped", **cluster)
    assert output.startswith("stopped: STOPPED, lce-stopped-"), output


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
