"""A team's server on a real PostgreSQL and an S3 store: logins, names, no jobs, no secret in sight; it survives kill -9."""

from __future__ import annotations

import base64
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.mlflow_server import main
from lce_dist.config import TrackingConfig
from lce_dist.errors import RunError
from lce_dist.registry import set_model_alias
from lce_dist.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]
ADMIN, DATABASE = "correct horse battery", "p@ss:w/rd %41"
PASSWORDS = (ADMIN, DATABASE, "s3-secret-key")
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
POSTGRES = "postgresql://mlflow@127.0.0.1:1/mlflow"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _main(flags: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "PG", "AWS_")):
            monkeypatch.delenv(name)
    for name, value in {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN, **variables}.items():
        monkeypatch.setenv(name, value)
    return main(flags.split())


@pytest.mark.parametrize(
    ("flags", "variables", "code", "told"),
    [
        ("--server", {}, 2, "--backend is missing"),
        (f"--server --backend {POSTGRES}", {}, 2, "--artifacts is missing"),
        ("--server --backend mysql://h/d --artifacts a", {}, 2, "--backend is 'mysql://h/d'; must be postgresql://"),
        ("--server --backend sqlite:///relative.db --artifacts a", {}, 2, "sqlite:////FILE.db"),
        ("--server --backend runs --artifacts a", {}, 2, "--backend is no address"),
        ("--server --backend postgresql://u:geheim@h/d --artifacts a", {}, 2, "--backend holds a password"),
        ("--server --backend postgresql://u@h/d?password=geheim --artifacts a", {}, 2, "--backend holds a password"),
        (f"--server --backend {POSTGRES} --artifacts gs://b", {}, 2, "must be s3://BUCKET/PREFIX or a folder"),
        (f"--server --backend {POSTGRES} --artifacts a", {"MLFLOW_AUTH_ADMIN_PASSWORD": ""}, 2, "PASSWORD is not set"),
        (f"--server --backend {POSTGRES} --artifacts a", {"MLFLOW_AUTH_ADMIN_PASSWORD": "short"}, 2, "is too weak"),
        (f"--server --backend {POSTGRES} --artifacts a --host 0.0.0.0", {}, 2, "--allowed-hosts is missing"),
        (f"--server --backend {POSTGRES} --artifacts a --allowed-hosts a,*", {}, 2, "--allowed-hosts has '*'"),
        (f"--server --backend {POSTGRES} --artifacts a --port 70000", {}, 2, "--port is '70000'"),
        (f"--server --backend {POSTGRES} --artifacts a", {"MLFLOW_PORT": "tcp://x"}, 2, "MLFLOW_PORT is 'tcp://x'"),
        (f"--server --backend {POSTGRES} --artifacts a --dir runs", {}, 2, "--dir is for the page of local runs"),
        (
            f"--server --backend {POSTGRES} --artifacts a --host 203.0.113.9 --allowed-hosts a",
            {},
            2,
            "cannot listen on",
        ),
        (f"--server --backend {POSTGRES} --artifacts a --port PORT", {}, 4, "@127.0.0.1:1/mlflow does not let us in"),
        ("--server --backend sqlite:////nowhere/m.db --artifacts a --port PORT", {}, 2, "its folder is not there"),
        ("--server --backend sqlite:////tmp/m.db --artifacts /proc/a --port PORT", {}, 4, "cannot make the artifacts'"),
        ("--backend postgresql://u@h/d", {}, 2, "--backend is for a shared server; add --server"),
        ("--dir nowhere", {}, 2, "no MLflow store at nowhere/mlflow.db"),
    ],
)
def test_refusals_are_one_line_with_the_fix(
    flags: str,
    variables: dict[str, str],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(flags.replace("PORT", str(_free_port())), variables, monkeypatch) == code
    output = capsys.readouterr()
    assert told in output.err and output.err.count("\n") == 1 and output.out == ""
    assert "geheim" not in output.err


def test_a_port_in_use_is_told_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        assert _main(f"--port {port} --dir {tmp_path}", {}, monkeypatch) == 2
        assert f"port {port} is in use; choose another one: --port {port + 1}" in capsys.readouterr().err


def test_a_bucket_that_is_away_or_missing_is_told(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--server --backend sqlite:///{tmp_path}/m.db --artifacts s3://BUCKET/x --port {_free_port()}"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}
    away = f"http://127.0.0.1:{_free_port()}"
    for bucket, endpoint, told in (("nobody", storage, "Not Found"), ("models", away, "Connection refused")):
        variables = {**keys, "MLFLOW_S3_ENDPOINT_URL": endpoint}
        assert _main(flags.replace("BUCKET", bucket), variables, monkeypatch) == 4
        error = capsys.readouterr().err
        assert f"the bucket {bucket!r} at {endpoint} is not reachable" in error and told in error
        assert error.count("\n") == 1 and "s3-secret-key" not in error


def test_a_dry_run_shows_the_command_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {
        "MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow:p%40ss%3Aw%2Frd%20%2541@db/mlflow?sslmode=require",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://models/x",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.example.org, tls.example.org:443",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "static-secret",
        "AWS_SECRET_ACCESS_KEY": "s3-secret-key",
    }
    assert _main("--server --host 0.0.0.0 --dry-run", variables, monkeypatch) == 0
    command, names = capsys.readouterr().out.splitlines()
    for secret in (*PASSWORDS, "static-secret", "p%40ss", "db/mlflow"):
        assert secret not in command + names
    hosts = "mlflow.example.org:5000,mlflow.example.org,tls.example.org:443,127.0.0.1:5000,localhost:5000"
    assert f"--app-name basic-auth --artifacts-destination s3://models/x --host 0.0.0.0 --port 5000 --allowed-hosts {hosts} " in command  # fmt: skip
    assert "https://mlflow.example.org," in command
    assert {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "AWS_SECRET_ACCESS_KEY"} <= set(names.split())


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """An S3 store with the bucket "models"; its address."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=_free_port(), verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "s3-secret-key", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="models")
    yield address
    server.stop()


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """A PostgreSQL with the user and the database mlflow; its port. It refuses to run as root, so as somebody else."""
    if not BINARIES:
        pytest.skip("no PostgreSQL here: no /usr/lib/postgresql/*/bin/initdb")
    pytest.importorskip("psycopg")
    programs, port = BINARIES[-1].parent, _free_port()
    somebody: dict[str, Any] = {}
    # Not below pytest's own folder, which nobody else may enter.
    folder = Path(tempfile.mkdtemp(prefix="lce-postgres-"))
    if os.geteuid() == 0:
        user = next(name for name in ("postgres", "nobody") if name in {one.pw_name for one in pwd.getpwall()})
        somebody = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        shutil.chown(folder, user)
    somebody |= {"cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    (folder / "password").write_text(DATABASE)
    (folder / "password").chmod(0o644)
    make = [
        programs / "initdb",
        "-D",
        "data",
        "-U",
        "mlflow",
        "--auth=scram-sha-256",
        "--pwfile=password",
        "-E",
        "UTF8",
    ]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, **somebody)
    settings = [f"unix_socket_directories={folder}", "listen_addresses=127.0.0.1", "fsync=off"]
    command = [
        programs / "postgres",
        "-D",
        "data",
        "-p",
        str(port),
        *(word for one in settings for word in ("-c", one)),
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **somebody)
    try:
        create = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        somebody["env"]["PGPASSWORD"] = DATABASE
        deadline = time.monotonic() + 60
        while subprocess.run(create, check=False, capture_output=True, **somebody).returncode != 0:
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)
        shutil.rmtree(folder)


class Shared:
    """``launch/mlflow.sh --server`` in its own process group, so that kill -9 reaches its workers too."""

    def __init__(self, backend: str, artifacts: str, variables: dict[str, str], folder: Path) -> None:
        self.port, self.log = _free_port(), folder / "server.log"
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "launch.mlflow_server", "--server", "--backend", backend]
        self._command += ["--artifacts", artifacts, "--port", str(self.port), "--allowed-hosts", "mlflow.example.org"]
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PG", "AWS_"))
        }
        own = {"PYTHONPATH": str(ROOT), "MLFLOW_WORKERS": "1", "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN}
        # Variables that would undo a promise are not obeyed.
        own |= {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true", "MLFLOW_SERVE_ARTIFACTS": "false"}
        self._environment = {**inherited, **own, **variables}
        self._folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while self.ask("/health")[0] != 200:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def command_lines(self) -> str:
        """What ps shows of every process of the server."""
        assert self.process is not None
        texts = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == self.process.pid:
                    texts.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (ProcessLookupError, FileNotFoundError):
                continue
        assert len(texts) >= 2
        return "\n".join(texts)

    def ask(
        self, path: str, login: str = "", send: dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, dict[str, Any] | str]:
        """Status and answer of one request; ``send`` makes it a POST."""
        request = urllib.request.Request(self.uri + path, None if send is None else json.dumps(send).encode())
        request.add_header("Content-Type", "application/json")
        if login:
            request.add_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        except OSError:
            return 0, ""
        return status, json.loads(text) if text.startswith("{") else text


def _log(tracker: Tracker, run_dir: Path, steps: range) -> str:
    """What a training run logs; the MLflow run's id."""
    tracker.start_run("new", "upgrade/new")
    tracker.log_input("new", "faces", "d1", "training", "s3://faces/manifest.json", {"num_images": 7})
    for step in steps:
        tracker.log_metrics("new", {"train/loss": 1.0 / (step + 1)}, step)
    weights, figure = run_dir / "model.safetensors", run_dir / "roc.svg"
    weights.write_bytes(b"weights")
    figure.write_text("<svg/>")
    tracker.log_file("new", weights, "model")
    tracker.log_file("new", figure, "figures")
    shapes: dict[str, Any] = {"inputs": {"images": (-1, 3, 112, 112)}, "outputs": {"vectors": (-1, 512)}}
    # Longer than the database's column; a description is cut, never a reason to lose the model.
    tracker.register_model("new", "faces", "model", **shapes, description="ü" * 6000, aliases=("candidate",))
    tracker.end_run("new")
    assert tracker.close(90) is True
    return str(tracker.run_ids()["new"])


def _check(server: Shared, run_id: str, num_steps: int, folder: Path) -> None:
    """Everything of :func:`_log` is there once."""
    admin = f"admin:{ADMIN}"
    query = f"run_id={run_id}&metric_key=train/loss"
    points = server.ask(f"/api/2.0/mlflow/metrics/get-history?{query}", admin)[1]["metrics"]  # type: ignore[index]
    found = [(int(point.get("step", 0)), point["value"]) for point in points]
    assert sorted(found) == [(step, 1.0 / (step + 1)) for step in range(num_steps)]
    run = server.ask(f"/api/2.0/mlflow/runs/get?run_id={run_id}", admin)[1]["run"]  # type: ignore[index]
    assert run["info"]["status"] == "FINISHED" and run["info"]["artifact_uri"].startswith("mlflow-artifacts:/")
    assert [one["dataset"]["name"] for one in run["inputs"]["dataset_inputs"]] == ["faces"]
    (version,) = server.ask("/api/2.0/mlflow/model-versions/search", admin)[1]["model_versions"]  # type: ignore[index]
    assert version["run_id"] == run_id and version["description"] == "ü" * 5000
    # What the page of the version asks for: the signature, from the server's own storage.
    shown = server.ask(f"/model-versions/get-artifact?path=MLmodel&name=faces&version={version['version']}", admin)
    assert shown[0] == 200 and '"shape": [-1, 3, 112, 112]' in shown[1]
    stored = server.ask(f"/get-artifact?path=figures/roc.svg&run_id={run_id}", admin)
    assert stored == (200, "<svg/>")


def test_a_team_server_on_postgresql_and_s3(
    postgres: int, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}
    variables = {**keys, "MLFLOW_S3_ENDPOINT_URL": storage, "PGPASSWORD": DATABASE}
    backend, folder = f"postgresql://mlflow@127.0.0.1:{postgres}/mlflow", tmp_path / "cwd"
    folder.mkdir()
    server, admin = Shared(backend, "s3://models/mlflow", variables, folder), f"admin:{ADMIN}"
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "AWS_"))]:
        monkeypatch.delenv(name)  # a client has no key of the storage
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    try:
        server.start()
        config = TrackingConfig(uri=server.uri, experiment="team")
        run_dir = tmp_path / "runs" / "one"
        # Without a login nothing is taken and nothing lost; then the login comes, and the same folder goes on.
        tracker = Tracker(config, run_dir, "one", tmp_path / "runs")
        tracker.start_run("new", "upgrade/new")
        assert tracker.close(2) is False
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
        run_id = _log(Tracker(config, run_dir, "one", tmp_path / "runs"), run_dir, range(300))
        _check(server, run_id, 300, tmp_path)

        search, jobs = "/api/2.0/mlflow/experiments/search?max_results=5", "/ajax-api/3.0/jobs/"
        assert server.ask(search)[0] == 401 and server.ask(search, "admin:wrong")[0] == 401
        assert server.ask(f"/get-artifact?path=figures/roc.svg&run_id={run_id}")[0] == 401
        assert server.ask(search, admin)[0] == 200
        assert server.ask(search, admin, Host="evil.example")[0] == 403
        for name in ("mlflow.example.org", f"mlflow.example.org:{server.port}", f"localhost:{server.port}"):
            assert server.ask(search, admin, Host=name)[0] == 200
        runs, query = "/api/2.0/mlflow/runs/search", {"experiment_ids": ["1"]}
        assert server.ask(runs, admin, query, Origin="https://evil.example")[0] == 403
        for origin in ("https://mlflow.example.org", f"http://mlflow.example.org:{server.port}"):
            assert server.ask(runs, admin, query, Origin=origin)[0] == 200
        job = {"job_name": "optimize_prompts", "params": {}}
        assert server.ask(jobs, "", job)[0] == 401
        status, answer = server.ask(jobs, admin, job)
        assert status >= 400 and "job execution feature is not enabled" in str(answer)

        # Another login of the team adds to the shared experiment; it may not delete it.
        new_user = {"username": "bea", "password": "another long one"}
        assert server.ask("/api/2.0/mlflow/users/create", admin, new_user)[0] == 200
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bea")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another long one")
        tracker = Tracker(config, tmp_path / "runs" / "two", "two", tmp_path / "runs")
        tracker.start_run("new", "bea")
        tracker.log_metrics("new", {"x": 1.0}, 1)
        assert tracker.close(60) is True
        delete = "/api/2.0/mlflow/experiments/delete"
        assert server.ask(delete, "bea:another long one", {"experiment_id": "1"})[0] == 403

        for text in (server.command_lines(), server.log.read_text()):
            assert not [secret for secret in PASSWORDS if secret in text]
        server.kill()
        with pytest.raises(RunError, match="does not answer as it should"):
            set_model_alias(server.uri, "faces", run_id, "champion")
        server.start()
        _check(server, run_id, 300, tmp_path)
        assert set_model_alias(server.uri, "faces", run_id, "champion") == 1
    finally:
        server.kill()
    assert [file.name for file in folder.iterdir()] == ["server.log"]  # no mlruns, no logins' database, no secret


def test_a_small_team_server_on_sqlite_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flask_wtf")
    folder = tmp_path / "cwd"
    folder.mkdir()
    server = Shared(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts"), {}, folder)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
    try:
        server.start()
        run_dir = tmp_path / "runs" / "one"
        config = TrackingConfig(uri=server.uri)
        run_id = _log(Tracker(config, run_dir, "one", tmp_path / "runs"), run_dir, range(20))
        _check(server, run_id, 20, tmp_path)
        assert server.ask("/api/2.0/mlflow/experiments/search?max_results=5")[0] == 401
    finally:
        server.kill()
    assert [file.name for file in (tmp_path / "artifacts").glob("*/*/artifacts/model/*.safetensors")]
