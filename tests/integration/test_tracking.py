"""A real MLflow is killed, stopped, emptied and replaced under a tracker: nothing is lost, nothing comes twice."""

from __future__ import annotations

import http.client
import json
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
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launch.cli import main
from launch.mlflow_server import UI_ENVIRONMENT, ui_command
from lce_dist.config import TrackingConfig, load_config
from lce_dist.errors import ConfigError, RunError
from lce_dist.mlflow_client import redact
from lce_dist.registry import log_run_file, set_model_alias, tag_run
from lce_dist.spool import read_cursor, write_cursor
from lce_dist.tracking import Tracker, tracking_uri

BLOCKED_S = 0.020
ROOT = Path(__file__).resolve().parents[2]


QUICKSTART = ROOT / "configs" / "quickstart.toml"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that no test kills."""
    server = Server(tmp_path_factory.mktemp("running"))
    server.start()
    server.wait()
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


class Proxy:
    """A real HTTP proxy before the real server: slow, refusing, or answering otherwise than the server did.

    ``always`` is what happens to every request with these words in its path, ``once`` to the next one: "slow3" waits
    3 s, a number is answered in the server's place, "taken" hands the request on and answers 500, "cut" hands it on
    and answers nothing.
    """

    def __init__(self, server: Server) -> None:
        self.always, self.once = dict[str, str](), dict[str, str]()
        self.seen: list[tuple[str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = next((fault for words, fault in proxy.always.items() if words in self.path), "")
                for words in [words for words in proxy.once if words in self.path]:
                    fault = proxy.once.pop(words)
                proxy.seen.append((fault, self.path))
                if fault.isdigit():
                    self._answer(int(fault), b"<html>somebody else</html>")
                    return
                if fault.startswith("slow"):
                    time.sleep(float(fault.removeprefix("slow")))
                there = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "accept-encoding"}
                there.request(self.command, self.path, body, {**headers, "Host": f"127.0.0.1:{server.port}"})
                answer = there.getresponse()
                text = answer.read()
                there.close()
                if fault == "cut":
                    self.close_connection = True
                elif fault == "taken":
                    self._answer(500, b"{}")
                else:
                    self._answer(answer.status, text)

            def _answer(self, status: int, text: bytes) -> None:
                with suppress(BrokenPipeError):  # the client waits no longer
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _history(uri: str, run_id: str | None, name: str) -> list[tuple[int, float]]:
    """Every point that MLflow's REST interface has, in its own order of arrival; two equal ones stay two."""
    query = f"run_id={run_id}&metric_key={name}&max_results=25000"
    with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/metrics/get-history?{query}", timeout=30) as answer:
        return [(int(point.get("step", 0)), float(point["value"])) for point in json.load(answer)["metrics"]]


def _log_steps(tracker: Tracker, steps: range, call_s: list[float], pause_s: float = 0.002) -> None:
    for step in steps:
        start = time.perf_counter()
        tracker.log_metrics("new", {"train/loss": 1.0 / (step + 1), "train/images_per_s": 2.0 * step}, step)
        call_s.append(time.perf_counter() - start)
        time.sleep(pause_s)


def _register(tracker: Tracker, run_dir: Path, aliases: tuple[str, ...] = (), model_name: str = "faces") -> None:
    weights = run_dir / "model.safetensors"
    weights.write_bytes(b"weights")
    tracker.log_file("new", weights, "model")
    tracker.register_model(
        "new",
        model_name,
        "model",
        {"images": (-1, 3, 112, 112)},
        {"vectors": (-1, 512)},
        description="**new** model",
        tags={"lce.space": "s2", "lce.parent_space": "s1", "lce.threshold": 0.43},
        aliases=aliases,
    )


def test_a_run_with_the_server_killed_twice_has_the_points_of_an_undisturbed_one(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, call_s = TrackingConfig(uri=server.uri, experiment="twice"), list[float]()
    _client(server.uri)
    server.start()
    server.wait()
    ids = {}
    for name in ("undisturbed", "disturbed"):
        run_dir = tmp_path / "runs" / name
        tracker = Tracker(config, run_dir, name, tmp_path / "runs")
        tracker.start_run("new", name)
        tracker.log_input("new", "faces", "d1", "training", "s3://bucket/faces", {"num_images": 7})
        for kill in range(2):
            writer = threading.Thread(target=_log_steps, args=(tracker, range(400 * kill, 400 * (kill + 1)), call_s))
            writer.start()
            if name == "disturbed":
                time.sleep(0.5)
                server.kill()  # SIGKILL, in the middle of the stream
            writer.join()
            if name == "disturbed":
                told = kill + 1
                _until(lambda: caplog.text.count("does not take events") == told, 60, "the outage is told")  # noqa: B023
                assert tracker.pending() > 0
                server.start()
                server.wait()
                _until(lambda: tracker.pending() == 0, 60, "delivery after the outage")  # noqa: B023
        _register(tracker, run_dir)
        tracker.end_run("new")
        assert tracker.close(60) is True
        ids[name] = tracker.run_ids()["new"]

    for metric in ("train/loss", "train/images_per_s"):
        undisturbed = _history(server.uri, ids["undisturbed"], metric)
        disturbed = _history(server.uri, ids["disturbed"], metric)
        assert len(undisturbed) == 800 and sorted(disturbed) == sorted(undisturbed)
    client = _client(server.uri)
    assert sorted(str(one.run_id) for one in client.search_model_versions("name = 'faces'")) == sorted(
        map(str, ids.values())
    )
    for run_id in ids.values():
        assert len(client.get_run(run_id).inputs.dataset_inputs) == 1
    assert len(client.search_runs([client.get_experiment_by_name("twice").experiment_id])) == 2
    assert sorted(call_s)[len(call_s) // 2] < 0.005  # the median; MLflow's own call waits 247 s for a dead server


def test_sync_sends_what_waits_without_training(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "runs" / "late"
    run_dir.mkdir(parents=True)
    config = load_config(QUICKSTART, ["run.name=late", f'tracking.uri="{server.uri}"'])
    (run_dir / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["sync", str(run_dir)]) == 2
    assert "holds no tracking.jsonl" in capsys.readouterr().err
    tracker = Tracker(config.tracking, run_dir, "late", tmp_path / "runs")
    tracker.start_run("new", "new")
    for step in range(5):
        tracker.log_metrics("new", {"loss/total": float(step)}, step)
    tracker.end_run("new")
    assert not tracker.close(0.2)
    assert main(["sync", str(run_dir), "--timeout", "2"]) == 4
    caught = capsys.readouterr().err.splitlines()[-1]
    assert f"has not taken 7 of 7 events of {run_dir}" in caught
    server.start()
    server.wait()
    assert main(["sync", str(run_dir)]) == 0
    assert "7 events sent" in capsys.readouterr().out
    run_id = json.loads((run_dir / "tracking.json").read_text())["runs"]["new"]
    assert _points(_client(server.uri), run_id, "loss/total") == [(step, float(step)) for step in range(5)]
    assert main(["sync", str(run_dir)]) == 0
    assert "0 events sent" in capsys.readouterr().out


def test_a_server_that_is_slow_refuses_or_takes_without_saying_so_gets_everything_once(
    running: Server, tmp_path: Path
) -> None:
    _client(running.uri)
    proxy, call_s, run_dir = Proxy(running), list[float](), tmp_path / "runs" / "one"
    # Of everything that makes something, the first request is taken by the server and its answer lost.
    proxy.once = {
        "experiments/create": "cut",
        "runs/create": "cut",
        "runs/log-batch": "cut",
        "runs/log-inputs": "taken",
    }
    proxy.once |= {"registered-models/create": "taken", "model-versions/create": "cut"}
    tracker = Tracker(TrackingConfig(uri=proxy.uri, experiment="proxy"), run_dir, "one", tmp_path / "runs")
    tracker.start_run("new", "one/new")
    tracker.log_input("new", "faces", "d1", "training", "s3://bucket/faces", {"num_images": 7})
    _log_steps(tracker, range(200), call_s)
    _register(tracker, run_dir, ("candidate",))
    _until(lambda: tracker.pending() == 0, 90, "delivery after lost answers")
    assert proxy.once == {}

    first = 200
    for fault in ("slow3", "401", "500", "taken", "cut"):
        proxy.always, num_seen = {"/": fault}, len(proxy.seen)
        _log_steps(tracker, range(first, first + 100), call_s)
        _until(lambda: len(proxy.seen) > num_seen, 60, f"a request while {fault}")  # noqa: B023
        proxy.always = {}
        _log_steps(tracker, range(first + 100, first + 150), call_s)
        _until(lambda: tracker.pending() == 0, 60, f"delivery after {fault}")
        first += 150
    tracker.end_run("new")
    assert tracker.close(60) is True
    proxy.close()

    run_id, client = tracker.run_ids()["new"], _client(running.uri)
    for metric, value_of in (("train/loss", lambda n: 1.0 / (n + 1)), ("train/images_per_s", lambda n: 2.0 * n)):
        assert sorted(_history(running.uri, run_id, metric)) == [(n, value_of(n)) for n in range(first)]
    assert len(client.search_runs([client.get_experiment_by_name("proxy").experiment_id])) == 1
    assert len(client.get_run(run_id).inputs.dataset_inputs) == 1
    (version,) = client.search_model_versions("name = 'faces'")
    assert (
        version.run_id == run_id and client.get_model_version_by_alias("faces", "candidate").version == version.version
    )
    slow = [path for fault, path in proxy.seen if fault == "slow3"]
    assert any("log-batch" in path for path in slow)
    assert sorted(call_s)[len(call_s) // 2] < 0.005


def test_a_registry_that_refuses_the_login_and_a_slow_store_hold_up_no_file(
    running: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    proxy, run_dir = Proxy(running), tmp_path / "runs" / "one"
    config = TrackingConfig(uri=proxy.uri)
    tracker = Tracker(config, run_dir, "one", tmp_path / "runs")
    tracker.start_run("new", "one/new")
    _until(lambda: tracker.pending() == 0, 60, "the run")
    # Answers come later than a request's 2 s, every one of them: the wait grows until they are heard.
    proxy.always = {"/": "slow2.5"}
    tracker.log_metrics("new", {"slow": 1.0}, 1)
    _until(lambda: tracker.pending() == 0, 60, "a point through a slow server")
    proxy.always = {}
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    # A server answers an upload when its own store has the file; one of 6 MB may take 2 s + 3 s.
    large = run_dir / "large.bin"
    large.write_bytes(bytes(6_000_000))
    proxy.once = {"large.bin": "slow3.5"}
    tracker.log_file("new", large)
    _until(lambda: tracker.pending() == 0, 60, "the large file")
    assert [path for fault, path in proxy.seen if "large.bin" in path and fault != "slow3.5"] == []

    proxy.always = {"registered-models/create": "403"}
    _register(tracker, run_dir, ("candidate",), "guarded")
    tracker.set_alias("new", "guarded", "champion")
    tracker.log_text("new", "later", "later.txt")
    tracker.log_metrics("new", {"x": 1.0}, 1)
    _until(lambda: 2 <= tracker.pending() <= 3, 60, "all but the model and its alias")
    assert "MLflow does not take the model 'guarded'" in caplog.text
    assert tracker.close(3) is False
    assert tracker.pending() == 2
    run_id, client = tracker.run_ids()["new"], _client(running.uri)
    assert Path(client.download_artifacts(run_id, "later.txt", str(tmp_path))).read_text() == "later"
    assert client.search_model_versions("name = 'guarded'") == []

    proxy.always = {}
    tracker = Tracker(config, run_dir, "one", tmp_path / "runs")
    assert tracker.close(60) is True
    proxy.close()
    for alias in ("candidate", "champion"):
        assert client.get_model_version_by_alias("guarded", alias).run_id == run_id


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
    _register(tracker, run_dir, ("candidate",))
    tracker.end_run("new")
    _until(lambda: tracker.pending() == 4, 60, "all but the two texts, the weights and their version")
    assert "artifact storage does not take files" in caplog.text
    assert tracker.close(0.1) is False
    run_id = tracker.run_ids()["new"]
    client = _client(tracking_uri(TrackingConfig(), store))
    assert _points(client, run_id, "x") == [(1, 1.0)]

    (store / "mlartifacts").unlink()
    tracker = Tracker(TrackingConfig(), run_dir, "three", store)
    assert tracker.close(60) is True
    assert Path(client.download_artifacts(run_id, "note.txt", str(tmp_path))).read_text() == "second"
    assert client.get_model_version_by_alias("faces", "candidate").run_id == run_id


def test_inputs_and_models_come_once_whatever_is_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mlflow.models import Model

    store, uri = tmp_path / "runs", f"sqlite:///{tmp_path}/runs/mlflow.db"
    ids = {}
    for name in ("first", "second", "first", "first without its position"):
        run_dir = store / name.split()[0]
        if "without" in name:
            (run_dir / "tracking.json").unlink()
        tracker = Tracker(TrackingConfig(), run_dir, name.split()[0], store)
        tracker.start_run("new", name.split()[0])
        profile = {"num_images": 7, "at": Path("faces")}
        tracker.log_input("new", "faces", "d" * 64, "training", "s3://b/faces", profile, {"lce.split": "train"})
        tracker.log_input("new", "pairs", "e1", "evaluation", "https://example.org/pairs", {})
        tracker.log_input("new", "faces", "d" * 64, "training", "s3://b/faces", profile)
        _register(tracker, run_dir, ("candidate",))
        tracker.end_run("new")
        assert tracker.close(60) is True
        ids[name.split()[0]] = str(tracker.run_ids()["new"])

    client = _client(uri)
    versions = {one.run_id: one for one in client.search_model_versions("name = 'faces'")}
    assert sorted(versions) == sorted(ids.values()) and len(client.search_model_versions()) == 2
    # The second run took the alias; saying the first run's story again does not give it back.
    assert client.get_model_version_by_alias("faces", "candidate").run_id == ids["second"]
    version = versions[ids["first"]]
    tags = {name: value for name, value in version.tags.items() if not name.startswith(("lce.key", "lce.alias"))}
    assert tags == {"lce.space": "s2", "lce.parent_space": "s1", "lce.threshold": "0.43"}
    assert version.description == "**new** model"
    assert version.source == f"{client.get_run(ids['first']).info.artifact_uri}/model"
    folder = Path(client.download_artifacts(ids["first"], "model", str(tmp_path)))
    assert sorted(file.name for file in folder.iterdir()) == ["MLmodel", "model.safetensors"]
    model = Model.load(str(folder / "MLmodel"))
    assert model.flavors == {} and model.run_id == ids["first"]
    (image,), (vector,) = model.signature.inputs.inputs, model.signature.outputs.inputs
    assert (image.name, image.shape, str(image.type)) == ("images", (-1, 3, 112, 112), "float32")
    assert (vector.name, vector.shape, str(vector.type)) == ("vectors", (-1, 512), "float32")

    inputs = {one.dataset.name: one for one in client.get_run(ids["first"]).inputs.dataset_inputs}
    assert len(client.get_run(ids["first"]).inputs.dataset_inputs) == 2
    data = inputs["faces"].dataset
    assert (data.digest, data.source_type, json.loads(data.source)) == ("d" * 36, "s3", {"uri": "s3://b/faces"})
    assert json.loads(data.profile) == {"num_images": 7, "at": "faces"} and data.schema is None
    assert {tag.key: tag.value for tag in inputs["faces"].tags} == {
        "mlflow.data.context": "training",
        "lce.split": "train",
    }
    assert json.loads(inputs["pairs"].dataset.source) == {"url": "https://example.org/pairs"}

    # A creation that was taken unheard and came late left a second version; what somebody else registered stays.
    copies = [{"lce.key": version.tags["lce.key"]}, {"made": "by hand"}]
    late, other = (client.create_model_version("faces", version.source, ids["first"], tags=tags) for tags in copies)
    tracker = Tracker(TrackingConfig(), store / "first", "first", store)
    _register(tracker, store / "first")
    assert tracker.close(60) is True
    left = [one.version for one in client.search_model_versions(f"run_id = '{ids['first']}'")]
    assert sorted(left) == sorted([version.version, other.version]) and late.version not in left

    # What a gate does at once.
    assert set_model_alias(uri, "faces", ids["first"], "champion") == int(version.version)
    tag_run(uri, ids["first"], {"lce.gate": "passed", "lce.gate.floor": 0.9})
    (tmp_path / "gate.json").write_text("{}")
    log_run_file(uri, ids["first"], tmp_path / "gate.json", "gate")
    assert client.get_model_version_by_alias("faces", "champion").run_id == ids["first"]
    assert client.get_run(ids["first"]).data.tags["lce.gate.floor"] == "0.9"
    assert [file.path for file in client.list_artifacts(ids["first"], "gate")] == ["gate/gate.json"]
    with pytest.raises(RunError, match=r"run 0{32} has no version of the registered model 'faces'"):
        set_model_alias(uri, "faces", "0" * 32, "champion")
    with pytest.raises(RunError, match=r"refuses.*not found"):
        tag_run(uri, "0" * 32, {"a": 1})
    with pytest.raises(RunError, match=r"gone\.json is not a file"):
        log_run_file(uri, ids["first"], tmp_path / "gone.json")
    with pytest.raises(RunError, match=r"no MLflow store at sqlite:///.*/nowhere\.db"):
        tag_run(f"sqlite:///{tmp_path}/nowhere.db", ids["first"], {"a": 1})
    assert not (tmp_path / "nowhere.db").exists()
    # Said through the spool, before there is a version.
    tracker = Tracker(TrackingConfig(), store / "third", "third", store)
    tracker.start_run("new", "third")
    tracker.set_alias("new", "faces", "champion")
    tracker.set_alias("new", "faces", "shadow", version=int(versions[ids["second"]].version))
    assert tracker.close(60) is True
    assert "alias champion is skipped: run 'new' has no version of 'faces'" in caplog.text
    assert client.get_model_version_by_alias("faces", "shadow").run_id == ids["second"]


def test_a_gate_hears_within_seconds_that_mlflow_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # takes the connection and never answers
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        start = time.monotonic()
        with pytest.raises(RunError, match=r"anna:\*\*\*@127.0.0.1.*does not answer as it should") as caught:
            tag_run(f"http://anna:hunter2@127.0.0.1:{silent.getsockname()[1]}", "0" * 32, {"a": 1})
        assert time.monotonic() - start < 30
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    with _answering(401) as port, pytest.raises(RunError, match="see to the login"):
        set_model_alias(f"http://127.0.0.1:{port}", "faces", "0" * 32, "champion")


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
