"""``lce status | logs | stop | resume`` over directories with real drivers, and a kubectl that writes down what it is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main
from launch.rayjobs import jobs_of, wait_for_job
from launch.runs import find_run, read_launch, runs_below, status_of, stop_run, write_launch
from lce_dist.config import load_config
from lce_dist.errors import ConfigError, LceError, RunError, SetupError
from lce_dist.spool import Spool, holder

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml"
_DRIVER = """
import signal, sys, time
from pathlib import Path
from lce_dist.spool import Spool
spool = Spool(Path(sys.argv[1]) / "tracking.jsonl")
spool.append({"kind": "metrics", "key": "new", "step": 30, "metrics": {"loss/total": 4.25, "speed/images_per_s": 700.0}})
spool.append({"kind": "metrics", "key": "parent", "step": 9, "metrics": {"system/cpu": 3.0}})
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


def run_at(root: Path, name: str) -> Path:
    run_dir = root / name
    (run_dir / "new" / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run_dir / "new" / "checkpoints" / "step-00000020" / "manifest.json").write_text("{}")
    (run_dir / "new" / "checkpoints" / "step-00000040").mkdir()  # killed before its manifest
    (run_dir / "new" / "checkpoints" / "step-00000030.partial").mkdir()
    (run_dir / "config.json").write_text("{}")
    return run_dir


@pytest.fixture
def drivers() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(drivers: list[subprocess.Popen[str]], run_dir: Path, kind: str = "hears") -> int:
    words = [sys.executable, "-c", _DRIVER, str(run_dir), kind]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    drivers.append(process)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process.pid


def test_a_run_is_followed_through_its_states(
    tmp_path: Path, drivers: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = run_at(tmp_path, "one")
    assert status_of(run_dir).line() == "interrupted, checkpoints: new step-00000020"
    assert holder(run_dir / "tracking.jsonl") is None and not (run_dir / "tracking.jsonl.lock").exists()
    pid = start(drivers, run_dir)
    status = status_of(run_dir)
    assert (status.state, status.pid, status.stage, status.step) == ("running", pid, "new", 30)
    assert status.line() == f"running (pid {pid}), new, step 30, loss 4.25, images/s 700"
    with pytest.raises(RunError, match="written by another process"):
        Spool(run_dir / "tracking.jsonl")

    assert main(["stop", "one", "--run-dir", str(tmp_path)]) == 0
    assert drivers[0].wait(5) == -signal.SIGTERM
    assert "has ended; lce resume" in capsys.readouterr().out
    assert main(["stop", "one", "--run-dir", str(tmp_path)]) == 1
    assert "has no driver at work" in capsys.readouterr().err
    with (run_dir / "tracking.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "key": "new", "step": 40, "metr')  # cut off by a crash
    assert status_of(run_dir).step == 30

    (run_dir / "failure.log").write_text("disk full\n")
    assert main(["logs", "one", "--run-dir", str(tmp_path), "--follow"]) == 0
    assert capsys.readouterr().out.endswith(
        "failed, new, step 30, loss 4.25, images/s 700, checkpoints: new step-00000020\ndisk full\n"
    )
    (run_dir / "report.json").write_text("{}")
    for verdict, words in (
        (None, "not judged"),
        ({"passed": False}, "do not ship"),
        ({"passed": True}, "safe to ship"),
    ):
        if verdict is not None:
            (run_dir / "gate.json").write_text(json.dumps(verdict))
        assert status_of(run_dir).line() == f"finished, {words}"
    # the run was evaluated anew, and ended before that was judged
    (run_dir / "report.json").write_text('{"fingerprint": "a", "examination": "new"}')
    (run_dir / "gate.json").write_text('{"passed": true, "fingerprint": "a", "examination": "old"}')
    assert status_of(run_dir).line() == "finished, not judged"
    (run_dir / "gate.json").write_text('{"passed": true, "fingerprint": "a", "examination": "new"}')
    assert status_of(run_dir).line() == "finished, safe to ship"
    by_hand = '{"passed": true, "fingerprint": "a", "examination": "new", "overridden": ["gate.confidence=0.5"]}'
    (run_dir / "gate.json").write_text(by_hand)
    assert status_of(run_dir).line() == "finished, safe to ship, by rules set by hand"
    run_at(tmp_path, "another")
    assert [path.name for path in runs_below(tmp_path)] == ["another", "one"]
    assert main(["status", "--run-dir", str(tmp_path), "--json"]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["interrupted", "finished"]
    with pytest.raises(ConfigError, match=r"nobody is no run.*Runs of .*: another, one"):
        find_run(Path("nobody"), tmp_path)


def test_a_driver_that_does_not_end_is_told_of(tmp_path: Path, drivers: list[subprocess.Popen[str]]) -> None:
    run_dir = run_at(tmp_path, "one")
    pid = start(drivers, run_dir, "deaf")
    started = time.monotonic()
    with pytest.raises(RunError, match=rf"pid {pid}\) still works 0 s after SIGTERM"):
        stop_run(run_dir, 0.4)
    assert time.monotonic() - started < 5.0


def test_what_resume_needs_survives_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(QUICKSTART, ["run.name=one", "data.synthetic=none", 'data.images="photos"'])
    run_dir = run_at(tmp_path / "runs", "one")
    write_launch(run_dir, config, 2, 3, True)
    monkeypatch.chdir("/")
    again, asked = read_launch(run_dir)
    assert asked == {"nodes": 2, "workers_per_node": 3, "with_independent": True}
    assert again.data.images == str(tmp_path / "photos") and again.run.dir == str(tmp_path / "runs")
    assert again.fingerprint() == config.fingerprint()
    (run_dir / "launch.json").write_text("{")
    with pytest.raises(ConfigError, match=r"launch\.json is absent or damaged"):
        read_launch(run_dir)


_KUBECTL = """#!/bin/sh
# Stands for a cluster: answers from a file, writes down what it is asked.
printf '%s\\n' "$*" >> "{folder}/calls"
if [ "$1" = get ] && [ "$3" != --namespace ]; then exec cat "{folder}/job"; fi
if [ "$1" = get ]; then exec cat "{folder}/list"; fi
if [ "$1" = create ]; then cat > "{folder}/created"; fi
if [ "$1" = logs ]; then echo "a line of the log"; fi
"""


def ray_job(name: str, run: str, made: str, state: str, **spec: object) -> dict[str, object]:
    entrypoint = f"python -m launch.cli job --config /etc/lce/config.toml --nodes 2 --name {run} --run-dir /runs"
    return {
        "metadata": {"name": name, "namespace": "team", "creationTimestamp": made, "uid": "1", "resourceVersion": "7"},
        "spec": {"entrypoint": entrypoint, **spec},
        "status": {"jobDeploymentStatus": state, "message": "first\nlast."},
    }


def test_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(_KUBECTL.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    jobs = [
        ray_job("one-new", "one", "2026-02-01T00:00:00Z", "Failed"),
        ray_job("one-old", "one", "2026-01-01T00:00:00Z", "Complete"),
        ray_job("two-a", "two", "2026-01-01T00:00:00Z", "Running"),
        {"metadata": {"name": "foreign"}, "spec": {"entrypoint": "python train.py"}, "status": {}},
    ]
    (tmp_path / "list").write_text(json.dumps({"items": jobs}))
    (tmp_path / "job").write_text(json.dumps(jobs[0]))
    there = ("--target", "k8s", "--namespace", "team")
    assert main(["status", *there]) == 0
    told = capfd.readouterr().out.splitlines()
    assert told == ["one: Complete, one-old, last", "two: Running, two-a, last", "one: Failed, one-new, last"]
    assert main(["logs", "one", *there]) == 0
    assert capfd.readouterr().out == "a line of the log\n"
    assert main(["stop", "two", *there]) == 0
    assert main(["resume", "one", *there]) == 0
    made = json.loads((tmp_path / "created").read_text())
    assert made["metadata"] == {"name": "one-new", "namespace": "team"} and "status" not in made
    capfd.readouterr()
    with_cluster = ray_job("two-a", "two", "", "Running")
    with_cluster["status"] = {"jobDeploymentStatus": "Running", "rayClusterName": "two-a-x"}
    for job, code, words in (
        (
            with_cluster,
            2,
            "kubectl --namespace team exec service/two-a-x-head-svc -c ray-head -- python -m launch.cli profile /runs/two",
        ),
        (jobs[0], 1, "has no Ray cluster"),
    ):
        (tmp_path / "job").write_text(json.dumps(job))
        assert main(["profile", "two", *there]) == code
        assert words in capfd.readouterr().err
    (tmp_path / "job").write_text(json.dumps(ray_job("two-a", "two", "", "Suspended", suspend=True)))
    assert main(["resume", "two", *there]) == 0
    (tmp_path / "job").write_text(json.dumps(jobs[2]))
    capfd.readouterr()
    assert main(["resume", "two", *there]) == 1
    assert "RayJob team/two-a is Running" in capfd.readouterr().err
    assert main(["logs", "three", *there]) == 2
    calls = (tmp_path / "calls").read_text()
    assert 'patch rayjobs.ray.io two-a --namespace team --type merge --patch {"spec": {"suspend": true}}' in calls
    assert '{"spec": {"suspend": false}}' in calls
    assert "delete rayjobs.ray.io one-new --namespace team --wait\ncreate --filename -" in calls


def test_a_run_in_a_queue_is_stopped_by_the_queue_that_would_start_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(
        _KUBECTL.replace(
            'if [ "$1" = get ] &&',
            'case "$1 $2" in "get workloads.kueue.x-k8s.io") exec cat "{folder}/workloads"; esac\nif [ "$1" = get ] &&',
        ).format(folder=tmp_path)
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    there = ("--target", "k8s", "--namespace", "team")

    def is_there(state: str, annotations: dict[str, str]) -> None:
        job = ray_job("two-a", "two", "2026-01-01T00:00:00Z", state, suspend=state == "Suspended")
        job["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "lce"}, "annotations": annotations}  # type: ignore[operator]
        (tmp_path / "job").write_text(json.dumps(job))
        (tmp_path / "list").write_text(json.dumps({"items": [job]}))

    def calls() -> str:
        text = (tmp_path / "calls").read_text()
        (tmp_path / "calls").unlink()
        return text

    stopped = {"lce-dist/stopped": "true"}
    is_there("Suspended", {})  # it waits for its pods
    (tmp_path / "workloads").write_text(json.dumps({"items": []}))
    assert main(["stop", "two", *there]) == 4
    assert "Kueue has made no Workload of it" in capfd.readouterr().err and "patch" not in calls()
    (tmp_path / "workloads").write_text(json.dumps({"items": [{"metadata": {"name": "rayjob-two-a-1f"}}]}))
    assert main(["stop", "two", *there]) == 0
    told = calls()
    assert "get workloads.kueue.x-k8s.io --namespace team --selector kueue.x-k8s.io/job-uid=1 --output json" in told
    inactive = 'patch workloads.kueue.x-k8s.io rayjob-two-a-1f --namespace team --type merge --patch {"spec": {"active": false}}'
    assert inactive in told and '{"spec": {"suspend"' not in told
    assert '--patch {"metadata": {"annotations": {"lce-dist/stopped": "true"}}}' in told
    is_there("Suspended", stopped)
    (line,) = jobs_of("two", "team")
    assert not line.at_work
    calls()
    assert main(["resume", "two", *there]) == 0
    told = calls()
    assert told.index('{"annotations": {"lce-dist/stopped": null}}') < told.index('{"spec": {"active": true}}')
    is_there("Complete", stopped)
    assert main(["resume", "two", *there]) == 0
    made = json.loads((tmp_path / "created").read_text())
    assert made["metadata"]["annotations"] == {} and made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "lce"}


_CHANGING = """#!/bin/sh
# Stands for a cluster whose job goes through the states in the files 1, 2, ...; the last one stays.
if [ "$1" = get ]; then
    n=$(cat "{folder}/n"); if [ -e "{folder}/$((n + 1))" ]; then echo $((n + 1)) > "{folder}/n"; n=$((n + 1)); fi
    if ! [ -s "{folder}/$n" ]; then echo "connection refused" >&2; exit 1; fi
    exec cat "{folder}/$n"
fi
printf '%s\\n' "$*" >> "{folder}/calls"
echo "step 10 of 20"
"""


@pytest.mark.parametrize(
    ("states", "code", "words"),
    [
        (
            [("Initializing", "", ""), None, ("Running", "RUNNING", ""), ("Complete", "SUCCEEDED", "Job finished")],
            0,
            "",
        ),
        (
            [
                ("Running", "RUNNING", ""),
                ("Failed", "FAILED", "Job entrypoint command failed with exit code 2, logs:\nno data"),
            ],
            2,
            "RayJob team/one-a is Failed: no data",
        ),
        ([("Running", "RUNNING", ""), ("Suspended", "STOPPED", "")], 5, "was stopped; lce resume goes on"),
        ([("Complete", "STOPPED", "")], 5, "was stopped"),
        ([("ValidationFailed", "", "")], 1, "ValidationFailed: no message"),
    ],
)
def test_a_kubernetes_job_is_followed_to_its_end(
    states: list[tuple[str, str, str] | None],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(_CHANGING.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("launch.rayjobs._WAIT_S", 0.01)
    (tmp_path / "n").write_text("0")
    for number, state in enumerate(states, start=1):
        job = ray_job("one-a", "one", "2026-01-01T00:00:00Z", "")
        if state is not None:
            job["status"] = dict(zip(("jobDeploymentStatus", "jobStatus", "message"), state, strict=True))
        (tmp_path / str(number)).write_text("" if state is None else json.dumps(job))
    try:
        wait_for_job("one-a", "team", with_log=True)
        found, told = 0, ""
    except LceError as error:
        found, told = error.exit_code, str(error)
    assert (found, words in told) == (code, True), told
    said = capfd.readouterr().out
    for state in states:
        assert state is None or f"RayJob team/one-a: {state[0]}" in said
    if ("Running", "RUNNING", "") in states:
        assert "step 10 of 20" in said
        assert "logs job/one-a --namespace team --follow" in (tmp_path / "calls").read_text()


def test_a_job_that_its_queue_holds_back_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(_CHANGING.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("launch.rayjobs._WAIT_S", 0.01)
    (tmp_path / "n").write_text("0")
    for number, state in enumerate(("Suspended", "Running", "Complete"), start=1):
        job = ray_job("one-a", "one", "2026-01-01T00:00:00Z", state)
        job["metadata"] |= {"labels": {"kueue.x-k8s.io/queue-name": "lce"}}  # type: ignore[operator]
        (tmp_path / str(number)).write_text(json.dumps(job))
    wait_for_job("one-a", "team", with_log=False)
    assert capfd.readouterr().out.split("one-a: ")[1:] == [
        "Suspended\nRayJob team/",
        "Running\nRayJob team/",
        "Complete\n",
    ]


def test_a_cluster_that_does_not_answer_any_more_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "kubectl"
    program.write_text("#!/bin/sh\necho 'connection refused' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("launch.rayjobs._WAIT_S", 0.01)
    with pytest.raises(SetupError, match="connection refused"):
        wait_for_job("one-a", "team", with_log=False)
