"""A real MLflow is killed, stopped, emptied and replaced under a tracker: nothing is lost, nothing comes twice."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lce_dist.config import TrackingConfig
from lce_dist.errors import ConfigError
from lce_dist.spool import read_cursor, write_cursor
from lce_dist.tracking import UI_ENVIRONMENT, Tracker, redact, tracking_uri, ui_command

BLOCKED_S = 0.020
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    assert list((tmp_path / "cwd").iterdir()) == []  # in particular no ./mlruns


class Server:
    """The server of ui_command, in its own process group so that kill -9 reaches its worker too."""

    def __init__(self, store: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.store, self.uri = store, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.store.mkdir(exist_ok=True)
        with open(self.store / "server.log", "ab") as log:
            command = ui_command(TrackingConfig(), self.store, self.port)
            environment = {**os.environ, **UI_ENVIRONMENT}
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.store, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        _until(lambda: self._is_healthy(), 60, "server up")

    def send(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.uri + "/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "served")
    yield server
    server.kill()


def _until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _points(client: Any, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


def _expected(steps: range, factor: float) -> list[tuple[int, float]]:
    return [(step, factor * step) for step in steps]


def test_server_down_at_start_killed_stopped_and_back(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call_s: list[float] = []

    def log(steps: range) -> None:
        for step in steps:
            start = time.perf_counter()
            tracker.log_metrics("new", {"train/loss": 0.5 * step, "train/images_per_s": 2.0 * step}, step)
            call_s.append(time.perf_counter() - start)
            time.sleep(0.002)

    _client(server.uri)  # `import mlflow` holds the interpreter for moments; the calls below are measured without it
    run_dir = tmp_path / "runs" / "one"
    config = TrackingConfig(uri=server.uri, experiment="faults")
    tracker = Tracker(config, run_dir, "one", tmp_path / "runs")
    tracker.start_run("parent", "one")
    tracker.start_run("new", "one/new", parent="parent", tags={"lce.world_size": 2})
    tracker.log_params("new", {"optim.lr": 0.1})
    log(range(150))
    _until(lambda: "does not take events" in caplog.text, 60, "the outage is told")
    assert tracker.run_ids() == {"new": None, "parent": None}

    server.start()
    server.wait()
    _until(lambda: tracker.pending() == 0, 60, "first delivery")
    assert caplog.text.count("does not take events") == 1  # one line an outage, not one a try

    writer = threading.Thread(target=log, args=(range(150, 600),))
    writer.start()
    time.sleep(0.4)
    server.kill()  # in the middle of the stream
    writer.join()
    figure = run_dir / "figures" / "roc.svg"
    figure.parent.mkdir()
    figure.write_text("<svg/>")
    tracker.log_file("parent", figure, "figures")
    tracker.log_text("parent", "seed = 1\n", "config/resolved.toml")
    _until(lambda: caplog.text.count("does not take events") == 2, 60, "the second outage is told")
    assert tracker.pending() > 2
    assert tracker.close(0.2) is False

    # The process ends, the server comes back, and another process goes on with step 400.
    server.start()
    server.wait()
    tracker = Tracker(config, run_dir, "one", tmp_path / "runs")
    ids_before = tracker.run_ids()
    tracker.start_run("parent", "one")
    tracker.start_run("new", "one/new", parent="parent")
    log(range(400, 650))
    _until(lambda: tracker.pending() == 0, 60, "second delivery")
    writer = threading.Thread(target=log, args=(range(650, 1000),))
    writer.start()
    time.sleep(0.3)
    server.send(signal.SIGSTOP)  # answers nothing, but will work off what it was sent
    writer.join()
    time.sleep(6.5)  # longer than a request's 5 s: the client has given up on one that the server still takes
    server.send(signal.SIGCONT)
    tracker.end_run("new")
    tracker.end_run("parent")
    assert tracker.close(60) is True
    # A busy machine may take the processor away from a call or two; a call that waited for MLflow would take seconds.
    call_s.sort()
    assert call_s[-4] < BLOCKED_S and call_s[-1] < 0.5, call_s[-4:]

    client = _client(server.uri)
    ids = tracker.run_ids()
    assert ids == ids_before
    for name, factor in (("train/loss", 0.5), ("train/images_per_s", 2.0)):
        assert _points(client, ids["new"], name) == _expected(range(1000), factor)
    new, parent = client.get_run(ids["new"]), client.get_run(ids["parent"])
    assert (new.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert new.data.tags["mlflow.parentRunId"] == ids["parent"]
    assert new.data.tags["lce.world_size"] == "2" and new.data.params == {"optim.lr": "0.1"}
    assert [file.path for file in client.list_artifacts(ids["parent"], "figures")] == ["figures/roc.svg"]
    stored = Path(client.download_artifacts(ids["parent"], "config/resolved.toml", str(tmp_path)))
    assert stored.read_text() == "seed = 1\n"
    experiment = client.get_experiment_by_name("faults")
    assert len(client.search_runs([experiment.experiment_id])) == 2


_DRIVER = """
import sys
from pathlib import Path
from lce_dist.config import TrackingConfig
from lce_dist.tracking import Tracker
store, first, last, ends = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "ends"
tracker = Tracker(TrackingConfig(), store / "run", "run", store)
tracker.start_run("new", "run/new")
tracker.log_params("new", {"optim.lr": 0.1, "data.images": 100 + first})
import time
for step in range(first, last):
    tracker.log_metrics("new", {"train/loss": 0.5 * step}, step)
    print(step, flush=True)
    time.sleep(0.005)
if ends:
    tracker.end_run("new")
    print(tracker.close(60), tracker.run_ids()["new"])
"""


def _drive(store: Path, first: int, last: int, ends: bool) -> Any:
    command = [sys.executable, "-c", _DRIVER, str(store), str(first), str(last), "ends" if ends else "stays"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_driver_killed_with_kill_9_goes_on_with_the_same_run(tmp_path: Path) -> None:
    store = tmp_path / "runs with ünicode"
    # Killed at different moments: before MLflow has heard anything, and in the stream of deliveries.
    killed_at, first = [], 0
    for is_delivering in (False, True):
        child = _drive(store, first, 100_000, ends=False)
        last = first
        while last < first + 150 or (is_delivering and not _delivered(store) > first):
            last = int(child.stdout.readline())
        child.kill()
        child.communicate()
        killed_at.append(last)
        first = last - 60  # the checkpoint from which training goes on is older than the last step
    (store / "run" / "tracking.json").unlink()  # even the position may be lost
    end = killed_at[-1] + 40
    output, errors = _drive(store, first, end, ends=True).communicate(timeout=60)
    delivered, run_id = output.splitlines()[-1].split()
    assert delivered == "True"
    assert "param data.images of run 'new' is '100' in MLflow and now" in errors
    assert "INFO" not in errors and "Traceback" not in errors

    client = _client(f"sqlite:///{store}/mlflow.db")
    assert _points(client, run_id, "train/loss") == _expected(range(end), 0.5)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith((store / "mlartifacts").as_uri())
    assert run.data.params == {"optim.lr": "0.1", "data.images": "100"}
    assert run.data.tags["lce.changed.data.images"] == str(100 + first)
    experiment = client.get_experiment_by_name("lce-dist")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def _delivered(store: Path) -> int:
    state = read_cursor(store / "run" / "tracking.json") or {}
    return int(state.get("steps", {}).get("new", {}).get("train/loss", -1))


def test_local_store_refusals_lost_files_system_metrics_and_a_new_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, run_dir = tmp_path / "runs", tmp_path / "runs" / "two"
    tracker = Tracker(TrackingConfig(), run_dir, "two", store)
    tracker.start_run("old", "two/old", tags={"mlflow.note.content": "**old** model"})
    tracker.monitor("old", interval_s=1.0)
    tracker.log_metrics("nobody", {"x": 1.0}, 0)
    for step in range(20):
        tracker.log_metrics("old", {"train/loss": float(step)}, step)
        if step == 10:
            tracker.log_metrics("old", {"bad=name": 1.0}, step)
    tracker.log_metrics("old", {"nan": float("nan"), "inf": float("inf")}, 1)
    tracker.log_file("old", run_dir / "missing.png")
    (run_dir / "here.txt").write_text("here")
    tracker.log_file("old", run_dir / "here.txt")
    spooled = (run_dir / "tracking.jsonl").read_text
    _until(lambda: '"system/cpu_utilization_percentage"' in spooled(), 60, "system metrics")
    tracker.end_run("old", "FAILED")
    assert tracker.close(60) is True

    run_id = tracker.run_ids()["old"]
    client = _client(tracking_uri(TrackingConfig(), store))
    run = client.get_run(run_id)
    assert run.info.status == "FAILED" and run.data.tags["mlflow.note.content"] == "**old** model"
    assert _points(client, run_id, "train/loss") == _expected(range(20), 1.0)
    assert run.data.metrics["nan"] != run.data.metrics["nan"] and run.data.metrics["inf"] > 1e300
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert [file.path for file in client.list_artifacts(run_id)] == ["here.txt"]
    for told in ("MLflow refused metrics of run 'old'", "missing.png of run 'old' is not there", "run 'nobody'"):
        assert caplog.text.count(told) == 1, told

    # The position is behind what MLflow holds, and training sends the same steps again, at another time.
    state = read_cursor(run_dir / "tracking.json") or {}
    write_cursor(run_dir / "tracking.json", {**state, "steps": {"old": {"train/loss": 5}}})
    tracker = Tracker(TrackingConfig(), run_dir, "two", store)
    for step in range(3, 20):
        tracker.log_metrics("old", {"train/loss": float(step)}, step)
    assert tracker.close(60) is True
    assert _points(client, run_id, "train/loss") == _expected(range(20), 1.0)

    # The run is deleted in MLflow, then training goes on: a new MLflow run gets the whole story.
    client.delete_run(run_id)
    tracker = Tracker(TrackingConfig(), run_dir, "two", store)
    tracker.start_run("old", "two/old")
    tracker.log_metrics("old", {"train/loss": 20.0}, 20)
    tracker.end_run("old")
    assert tracker.close(60) is True
    second_id = tracker.run_ids()["old"]
    assert second_id != run_id
    assert _points(client, second_id, "train/loss") == _expected(range(21), 1.0)

    # Another store gets it too, and the first one keeps its own.
    moved = TrackingConfig(uri=f"sqlite:///{tmp_path}/moved.db")
    tracker = Tracker(moved, run_dir, "two", store)
    assert tracker.close(60) is True
    client_moved = _client(moved.uri or "")
    assert _points(client_moved, tracker.run_ids()["old"], "train/loss") == _expected(range(21), 1.0)
    assert _points(client, second_id, "train/loss") == _expected(range(21), 1.0)


def test_artifact_storage_that_fails_does_not_hold_up_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, run_dir = tmp_path / "runs", tmp_path / "runs" / "three"
    store.mkdir()
    (store / "mlartifacts").write_text("a file where the folder should be")
    tracker = Tracker(TrackingConfig(), run_dir, "three", store)
    tracker.start_run("new", "three/new")
    tracker.log_text("new", "first", "note.txt")
    tracker.log_metrics("new", {"x": 1.0}, 1)
    tracker.log_text("new", "second", "note.txt")
    tracker.end_run("new")
    _until(lambda: tracker.pending() == 2, 60, "all but the two texts")
    assert "artifact storage does not take files" in caplog.text
    assert tracker.close(0.1) is False
    run_id = tracker.run_ids()["new"]
    client = _client(tracking_uri(TrackingConfig(), store))
    assert _points(client, run_id, "x") == [(1, 1.0)]

    (store / "mlartifacts").unlink()
    tracker = Tracker(TrackingConfig(), run_dir, "three", store)
    assert tracker.close(60) is True
    assert Path(client.download_artifacts(run_id, "note.txt", str(tmp_path))).read_text() == "second"


@contextmanager
def _answering(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>not MLflow</html>")

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port
        http.shutdown()


@pytest.mark.parametrize("status", [200, 401, 403, 404, 429, 500, 503])
def test_a_server_that_refuses_everybody_loses_nothing_and_shows_no_password(
    status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _answering(status) as port, caplog.at_level(logging.DEBUG, logger="lce_dist"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://anna:hunter2@127.0.0.1:{port}")
        tracker = Tracker(TrackingConfig(), tmp_path / "run", "run", tmp_path)
        tracker.start_run("new", "run/new")
        tracker.log_metrics("new", {"x": 1.0}, 1)
        _until(lambda: "does not take events" in caplog.text, 60, "the refusal is told")
        assert tracker.close(0.2) is False
        assert tracker.pending() == 2
    assert "anna:***@127.0.0.1" in caplog.text
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "hunter2" not in caplog.text + written


def test_redact_covers_addresses_query_strings_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok-123")
    text = "at postgresql://u:p@ss:w@db:5432/x?sslmode=off&password=zwei and http://h:1/a@b with tok-123"
    assert redact(text) == "at postgresql://u:***@db:5432/x?sslmode=off&password=*** and http://h:1/a@b with ***"


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(TrackingConfig(), tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(TrackingConfig(), tmp_path) == "http://mlflow:5000"
    assert tracking_uri(TrackingConfig(uri="https://other"), tmp_path) == "https://other"
    with pytest.raises(ConfigError, match="MLflow is at https://other"):
        ui_command(TrackingConfig(uri="https://other"), tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://u:p@env")
    with pytest.raises(ConfigError, match=r"MLflow is at https://u:\*\*\*@env"):
        ui_command(TrackingConfig(), tmp_path)
    with pytest.raises(ValidationError, match="holds a user or a password"):
        TrackingConfig(uri="https://u:p@other")
    for folder in ("./mlruns", f"file://{tmp_path}"):
        with pytest.raises(ConfigError, match=r"tracking\.uri is '.*'; must be http"):
            tracking_uri(TrackingConfig(uri=folder), tmp_path)
