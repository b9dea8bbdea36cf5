"""The command behind ``launch/mlflow.sh``: this machine's runs in MLflow's page, or a server that a team shares.

The shared server has a login, answers to its own names only, runs no jobs and hands out the artifacts itself, so that
clients need no key of the storage. Passwords come from the environment and stay there: no command line shows one.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import secrets
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lce_dist.config import TrackingConfig
from lce_dist.errors import ConfigError, LceError, SetupError
from lce_dist.mlflow_client import one_line, redact
from lce_dist.replay import artifact_root
from lce_dist.tracking import tracking_uri

# A tracking server needs no jobs, and its jobs interface ran foreign code without a login (CVE-2026-0545).
UI_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

_PASSWORD, _SECRET = "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"
_BACKEND, _ARTIFACTS = "MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION"
_AUTH_FILE = "MLFLOW_AUTH_CONFIG_PATH"
_SHORTEST_PASSWORD = 12
_CONNECT_S = 5
# MLflow reads these too; each would undo a part of what is promised here.
_UNDOING = (
    "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
    "MLFLOW_SERVE_ARTIFACTS",
    "MLFLOW_ARTIFACTS_ONLY",
    "MLFLOW_DEFAULT_ARTIFACT_ROOT",
    "MLFLOW_REGISTRY_STORE_URI",
    "MLFLOW_GUNICORN_OPTS",
    "MLFLOW_TRACKING_URI",
)
_EXAMPLES = """examples:
  launch/mlflow.sh                                      # the runs in ./runs, on this machine alone
  launch/mlflow.sh --port 5001 --dir /data/runs
  ssh -L 5000:127.0.0.1:5000 MACHINE                    # then open http://127.0.0.1:5000 on your own desk

  export MLFLOW_AUTH_ADMIN_PASSWORD=...  PGPASSWORD=...  AWS_ACCESS_KEY_ID=...  AWS_SECRET_ACCESS_KEY=...
  launch/mlflow.sh --server --backend postgresql://mlflow@db/mlflow --artifacts s3://models/mlflow \\
      --host 0.0.0.0 --allowed-hosts mlflow.example.org

  export MLFLOW_TRACKING_URI=http://mlflow.example.org:5000 MLFLOW_TRACKING_USERNAME=... MLFLOW_TRACKING_PASSWORD=...
  launch/train.sh --nodes 4                             # on a client

exit codes: 2 a flag or a variable is wrong, 4 the machine, the database or the storage lacks something"""


def main(argv: Sequence[str] | None = None) -> int:
    """Check what can be checked, then become MLflow's server; returns an exit code only when it does not."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.server:
            return _serve(arguments)
        return _show(parser, arguments)
    except LceError as error:
        sys.stderr.write(f"{parser.prog}: {redact(str(error))}\n")
        return error.exit_code


def ui_command(config: TrackingConfig, default_store: Path, port: int = 5000) -> list[str]:
    """The argv that shows the local store on 127.0.0.1; run it with :data:`UI_ENVIRONMENT`.

    Errors: ConfigError when the runs are kept by another server, which has its own page.
    """
    uri = tracking_uri(config, default_store)
    if not uri.startswith("sqlite:///"):
        raise ConfigError(
            f"MLflow is at {redact(uri)} (tracking.uri or MLFLOW_TRACKING_URI), not in a local store; "
            "open that server's page, or unset the variable"
        )
    argv = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    argv += ["--artifacts-destination", artifact_root(default_store)]
    return [*argv, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


@dataclass(frozen=True)
class Shared:
    """A shared server as it was asked for, checked for sense; ``backend`` has no password."""

    backend: str
    backend_password: str | None
    artifacts: str
    host: str
    port: int
    hosts: tuple[str, ...]

    def argv(self) -> list[str]:
        """The command; the backend is not in it, since it comes from the environment."""
        # MLflow takes a page's own name for a foreign origin too, unless it is listed.
        origins = [f"{scheme}://{name}" for name in self.hosts for scheme in ("http", "https")]
        return [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
            *("--artifacts-destination", self.artifacts, "--host", self.host, "--port", str(self.port)),
            *("--allowed-hosts", ",".join(self.hosts), "--cors-allowed-origins", ",".join(origins)),
        ]

    def environment(self) -> dict[str, str]:
        """What MLflow's process gets on top of (or in place of) ours."""
        values = {**UI_ENVIRONMENT, _BACKEND: self.backend}
        if self.backend_password:
            values["PGPASSWORD"] = self.backend_password
        # It guards the sign-up form alone; a set of servers under one name needs one that they share.
        values[_SECRET] = os.environ.get(_SECRET) or secrets.token_hex(32)
        return values


def shared_server(arguments: argparse.Namespace, environment: dict[str, str]) -> Shared:
    """The server that flags and environment ask for. Errors: ConfigError."""
    host = arguments.host or environment.get("MLFLOW_HOST") or "127.0.0.1"
    port_origin = "--port" if arguments.port else "MLFLOW_PORT"
    port = _port(arguments.port or environment.get("MLFLOW_PORT") or "5000", port_origin)
    password = environment.get(_PASSWORD, "")
    if not password:
        raise ConfigError(f"{_PASSWORD} is not set; the first start makes the login 'admin' with it. Export it")
    if len(password) < _SHORTEST_PASSWORD or password == "password1234":  # noqa: S105 - MLflow's old default
        raise ConfigError(
            f"{_PASSWORD} is too weak; must have {_SHORTEST_PASSWORD} characters or more and not be MLflow's old "
            "default. For example: openssl rand -base64 18"
        )
    backend, backend_password = _backend(arguments.backend, environment)
    return Shared(
        backend,
        backend_password,
        _artifacts(arguments.artifacts, environment),
        host,
        port,
        _hosts(arguments.allowed_hosts, environment, host, port),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlflow.sh",
        description="Serves the MLflow store in RUNS_DIR on http://127.0.0.1:PORT until Ctrl-C, for this machine alone;\n"
        "or, with --server, runs a server for a team: PostgreSQL, S3, logins.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--port", help="default: 5000")
    parser.add_argument("--dir", type=Path, metavar="RUNS_DIR", help="where the runs are (run.dir); default: ./runs")
    server = parser.add_argument_group("a shared server", "A flag may also be the variable that is named with it.")
    server.add_argument("--server", action="store_true", help="serve a team instead of showing RUNS_DIR")
    server.add_argument(
        "--backend",
        metavar="URI",
        help=f"postgresql://USER@HOST/DB, its password in PGPASSWORD; or sqlite:////FILE.db ({_BACKEND})",
    )
    server.add_argument(
        "--artifacts",
        metavar="PLACE",
        help=f"s3://BUCKET/PREFIX, keys in AWS_*, endpoint in MLFLOW_S3_ENDPOINT_URL; or a folder ({_ARTIFACTS})",
    )
    server.add_argument("--host", help="address to listen on; default: 127.0.0.1 (MLFLOW_HOST; MLFLOW_PORT for --port)")
    server.add_argument(
        "--allowed-hosts",
        metavar="NAMES",
        help="names that clients use for it, with commas; any other is answered 403 (MLFLOW_SERVER_ALLOWED_HOSTS)",
    )
    server.add_argument(
        "--dry-run", action="store_true", help="print the command and the variables' names, start nothing"
    )
    return parser


def _show(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    for flag in ("backend", "artifacts", "host", "allowed_hosts", "dry_run"):
        if getattr(arguments, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is for a shared server; add --server")
    runs, port = arguments.dir or Path("runs"), _port(arguments.port or "5000", "--port")
    if not (runs / "mlflow.db").is_file():
        raise ConfigError(
            f"no MLflow store at {runs / 'mlflow.db'}; train first, or name the folder of the runs with --dir"
        )
    _check_address("127.0.0.1", port)
    # A remote MLFLOW_TRACKING_URI is for training; this page shows the local store.
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    sys.stdout.write(f'MLflow: http://127.0.0.1:{port} (choose "Model training" at the top left; Ctrl-C ends it)\n')
    sys.stdout.flush()
    argv = ui_command(TrackingConfig(), runs, port)
    os.execve(argv[0], argv, {**os.environ, **UI_ENVIRONMENT})  # noqa: S606 - our own interpreter


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.dir is not None:
        raise ConfigError("--dir is for the page of local runs; a shared server has --backend and --artifacts")
    shared = shared_server(arguments, dict(os.environ))
    argv, extra = shared.argv(), shared.environment()
    if arguments.dry_run:
        names = sorted(
            {*extra, _PASSWORD, _AUTH_FILE, *(name for name in os.environ if name.startswith(("AWS_", "PG")))}
        )
        sys.stdout.write(f"{shlex.join(argv)}\nenvironment: {' '.join(names)}\n")
        return 0
    _check_packages(shared)
    _check_address(shared.host, shared.port)
    _check_backend(shared)
    _check_artifacts(shared.artifacts)
    environment = {name: value for name, value in os.environ.items() if name not in _UNDOING} | extra
    environment.setdefault(_AUTH_FILE, _auth_file(shared.backend))
    login = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
    sys.stdout.write(
        f"MLflow: http://{shared.hosts[0]} for {', '.join(shared.hosts)}; runs in {shared.backend}, files in "
        f"{shared.artifacts}; login {login!r} with {_PASSWORD}; Ctrl-C ends it\n"
    )
    sys.stdout.flush()
    os.execve(argv[0], argv, environment)  # noqa: S606 - our own interpreter


def _port(text: str, origin: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise ConfigError(f"{origin} is {text!r}; must be a number from 1 to 65535")
    return int(text)


def _backend(flag: str | None, environment: dict[str, str]) -> tuple[str, str | None]:
    """The backend without its password, and the password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    origin = "--backend" if flag else _BACKEND
    text = flag or environment.get(_BACKEND)
    if not text:
        raise ConfigError(f"--backend is missing; for example --backend postgresql://mlflow@db/mlflow (or {_BACKEND})")
    try:
        url = make_url(text)
    except ArgumentError:
        raise ConfigError(f"{origin} is no address; must be postgresql://USER@HOST/DB or sqlite:////FILE.db") from None
    if url.drivername == "sqlite" and url.database and Path(url.database).is_absolute():
        return text, None
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ConfigError(
            f"{origin} is {redact(text)!r}; must be postgresql://USER@HOST/DB, or sqlite:////FILE.db for a small team"
        )
    password = url.password or url.query.get("password")
    if password and flag:
        raise ConfigError(
            f"--backend holds a password, which ps shows to everybody on this machine; set PGPASSWORD or {_BACKEND}"
        )
    url = url.set(drivername="postgresql+psycopg", password=None).difference_update_query(["password"])
    return url.render_as_string(hide_password=False), str(password) if password else None


def _artifacts(flag: str | None, environment: dict[str, str]) -> str:
    place = flag or environment.get(_ARTIFACTS)
    if not place:
        raise ConfigError(f"--artifacts is missing; for example --artifacts s3://models/mlflow (or {_ARTIFACTS})")
    parts = urlsplit(place)
    if parts.scheme == "s3" and parts.netloc:
        return place
    if parts.scheme not in ("", "file"):
        raise ConfigError(
            f"--artifacts is {redact(place)!r}; must be s3://BUCKET/PREFIX or a folder (MLFLOW_S3_ENDPOINT_URL names a "
            "storage that is not Amazon's)"
        )
    return Path(parts.path).absolute().as_uri()


def _hosts(flag: str | None, environment: dict[str, str], host: str, port: int) -> tuple[str, ...]:
    """What a Host header may say: each name with and without the port, and this machine itself."""
    text = flag or environment.get("MLFLOW_SERVER_ALLOWED_HOSTS") or ""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names and host not in ("127.0.0.1", "localhost"):
        raise ConfigError(
            f"--host is {host}, and --allowed-hosts is missing; name the server as its clients do, for example "
            "--allowed-hosts mlflow.example.org (any other Host header is answered 403)"
        )
    for name in names:
        if "*" in name or "/" in name:
            raise ConfigError(
                f"--allowed-hosts has {name!r}; must be names like mlflow.example.org or mlflow.example.org:443, without "
                "* or http://: a page of somebody else could otherwise reach the server through a browser"
            )
    own = [form for name in names for form in ((name,) if ":" in name else (f"{name}:{port}", name))]
    return tuple(dict.fromkeys([*own, f"127.0.0.1:{port}", f"localhost:{port}"]))


def _check_packages(shared: Shared) -> None:
    needed = {"flask_wtf": "Flask-WTF"}
    if shared.backend.startswith("postgresql"):
        needed["psycopg"] = "psycopg[binary]"
    if shared.artifacts.startswith("s3://"):
        needed["boto3"] = "boto3"
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SetupError(f"a shared server needs {' and '.join(missing)}; pip install 'lce-dist[server]'")


def _check_address(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            return
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            other = port + 1 if port < 65535 else 5000
            raise ConfigError(f"port {port} is in use; choose another one: --port {other}") from None
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); see --host and --port"
        ) from None


def _check_backend(shared: Shared) -> None:
    import sqlalchemy

    is_file = shared.backend.startswith("sqlite")
    if is_file and not Path(shared.backend.removeprefix("sqlite:///")).parent.is_dir():
        raise ConfigError(f"--backend is {shared.backend}, and its folder is not there; make it")
    options: dict[str, Any] = {"timeout" if is_file else "connect_timeout": _CONNECT_S}
    if shared.backend_password:
        options["password"] = shared.backend_password
    try:
        sqlalchemy.create_engine(shared.backend, connect_args=options).connect().close()
    except sqlalchemy.exc.SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise SetupError(
            f"the database {shared.backend} does not let us in ({' '.join(str(cause).split())[:300]}); check its "
            "address, that the database exists (createdb), and PGPASSWORD"
        ) from None


def _check_artifacts(place: str) -> None:
    if not place.startswith("s3://"):
        folder = Path(urlsplit(place).path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"cannot make the artifacts' folder {folder} ({error.strerror})") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SetupError(f"cannot write to the artifacts' folder {folder}; give it to this user")
        return
    import boto3
    import botocore.config
    import botocore.exceptions

    bucket, endpoint = urlsplit(place).netloc, os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    config = botocore.config.Config(
        connect_timeout=_CONNECT_S, read_timeout=_CONNECT_S, retries={"total_max_attempts": 1}
    )
    try:
        boto3.client("s3", endpoint_url=endpoint, config=config).head_bucket(Bucket=bucket)
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, ValueError) as error:
        raise SetupError(
            f"the bucket {bucket!r} at {redact(endpoint or 'Amazon S3')} is not reachable ({one_line(error)}); check that "
            "it exists, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and MLFLOW_S3_ENDPOINT_URL"
        ) from None


def _auth_file(backend: str) -> str:
    """MLflow wants the logins' database in a file: one in memory, without a password, read by its workers."""
    text = (
        "[mlflow]\n"
        # Everybody with a login writes to the shared experiments; deleting and sharing is for owner and admin.
        "default_permission = EDIT\n"
        f"database_uri = {backend.replace('%', '%%')}\n"
        "admin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    file = os.memfd_create("basic_auth.ini", 0)
    os.write(file, text.encode())
    # By process id, since the workers are children that do not inherit it; execve keeps the id.
    return f"/proc/{os.getpid()}/fd/{file}"


if __name__ == "__main__":
    sys.exit(main())
