"""``lce doctor`` over things that are really well or really not: servers, files, limits."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launch import doctor
from launch.cli import main
from launch.doctor import Finding, examine_machine
from lce_dist.config import Config, load_config

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.toml"


class Server(BaseHTTPRequestHandler):
    """Says what the path asks for: /401/..., /500/..., /late/... (a clock a minute off), /token/... (200 with the right one)."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        code = {"401": 401, "500": 500}.get(kind, 200)
        if kind == "token" and self.headers.get("Authorization") != "Bearer right":
            code = 401
        self.send_response_only(code)
        self.send_header("Date", self.date_time_string(1e9 if kind == "late" else None))  # type: ignore[arg-type]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_port}"
        one.shutdown()


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_RAY_CLUSTER_FILE", tmp_path / "ray_current_cluster")
    monkeypatch.setenv("HOME", str(tmp_path))


def config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(QUICKSTART, [f'run.dir="{tmp_path}/runs"', *overrides])


def found(tmp_path: Path, *overrides: str) -> dict[str, Finding]:
    return {one.name: one for one in examine_machine(config(tmp_path, *overrides))}


def test_a_machine_that_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--set", f'run.dir="{tmp_path}/runs"', "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    states = {one["name"]: one["state"] for one in told}
    assert "bad" not in states.values()
    assert states["DALI on cpu"] == states["packages"] == states["run.dir"] == states["MLflow"] == "ok"
    assert all(one["remedy"] for one in told if one["state"] != "ok")
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob(".lce-doctor*"))


@pytest.mark.parametrize(
    ("path", "state", "words"),
    [
        ("", "ok", "answers"),
        ("/401", "bad", "asks for a login"),
        ("/500", "bad", "answers 500"),
        ("/late", "warn", "its clock is"),
    ],
)
def test_mlflow(tmp_path: Path, server: str, path: str, state: str, words: str) -> None:
    one = found(tmp_path, f'tracking.uri="{server}{path}"')["MLflow"]
    assert one.state == state and words in one.value
    assert bool(one.remedy) == (state != "ok")


def test_what_does_not_answer_or_shows_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@127.0.0.1:9")
    one = found(tmp_path)["MLflow"]
    assert one.state == "bad" and "canary" not in one.value


def test_ray(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:9")
    stale = found(tmp_path)["Ray here"]
    assert stale.state == "bad" and "nothing answers" in stale.value and stale.remedy.startswith("rm ")
    (tmp_path / "ray_current_cluster").write_text(server.removeprefix("http://"))
    assert found(tmp_path)["Ray here"].state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", f"{server}/token")
    without = found(tmp_path)["RAY_ADDRESS"]
    assert without.state == "bad" and without.remedy == "set RAY_AUTH_TOKEN"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    assert found(tmp_path)["RAY_ADDRESS"].state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert found(tmp_path)["RAY_ADDRESS"].state == "bad"


def test_storage_data_limits_and_a_look_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        assert found(tmp_path)["open files"].state == "warn"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found(tmp_path, 'run.dir="/proc/runs"')["run.dir"].state == "bad"
    missing = found(tmp_path, "data.synthetic=none", 'data.images="nowhere"')["data.images"]
    assert missing.state == "bad" and "nowhere does not exist" in missing.value
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: 1 / 0)
    every = found(tmp_path)
    assert every["open files"].state == "ok" and every["storage"].state == "bad" and every["MLflow"].state == "ok"
    assert main(["doctor", "--set", f'run.dir="{tmp_path}/runs"']) == 4
    assert "things are bad" in capsys.readouterr().err
