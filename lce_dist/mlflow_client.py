"""How we speak to MLflow: short waits, nothing sent a second time behind our back, no password in any text.

MLflow's own client sends a request again when the answer is missing or 500, also one that makes something: a run whose
creation was taken but not answered then exists twice. So it gets no retries here; the caller looks first, then retries.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_REQUEST_TIMEOUT_S, _LONGEST_TIMEOUT_S = 5, 60
_UPLOAD_BYTES_PER_S = 2_000_000
# Answers in the 4xx range that another try can change: login, permission, time-out, conflict, too many, cancelled.
_PASSING_STATUS = (401, 403, 408, 409, 425, 429, 499)
# MLflow answers BAD_REQUEST to every error of its database but OperationalError. These pass: no free connection, a lost one, a
# session or transaction that an error before left behind, an error of the database that has no kind. SQLAlchemy ends a text so.
_PASSING_DATABASE = re.compile(r"sqlalche\.me/e/\w+/(?:3o7r|rvf5|8s2b|7s2a|2j85|4xp6)\)\s*$")
_ENVIRONMENT = {
    _TIMEOUT: str(_REQUEST_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def prepare_mlflow() -> None:
    """Settings that MLflow reads from the environment, then its import: seconds, so never in the training's thread."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    import mlflow  # noqa: F401

    # Database errors are ours to report, in one line; MLflow would print a traceback for each try.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def connect(uri: str) -> Any:
    """MLflow's client for ``uri``; a server is first asked by the first call."""
    prepare_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def get_run(client: Any, run_id: str) -> Any:
    """The run, or None when it was deleted or never was in this store."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def upload(client: Any, run_id: str, path: Path, folder: str | None) -> None:
    """Store a file, or a folder with its name, among the run's artifacts; a large one may take its time."""
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,)
    with _patience(max((file.stat().st_size for file in files), default=0)):
        client.log_artifact(run_id, str(path), folder)


def is_refused(error: Exception) -> bool:
    """True when sending the same thing again cannot help."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # An unknown path is a proxy or another service in the server's place, not a verdict on the event.
        is_away = error.error_code == "ENDPOINT_NOT_FOUND" or (
            error.error_code == "BAD_REQUEST" and _PASSING_DATABASE.search(str(error))
        )
        status = 503 if is_away else error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, (TypeError, ValueError, LookupError, AttributeError)) and not isinstance(
            error, OSError
        )
    return 400 <= status < 500 and status not in _PASSING_STATUS


def wait_longer_after(error: Exception) -> None:
    """Double the wait for answers, to a minute, if that was what failed: a slow server must get through some day."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, TimeoutError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        wait_s = int(os.environ[_TIMEOUT])
        os.environ[_TIMEOUT] = str(max(wait_s, min(2 * wait_s, _LONGEST_TIMEOUT_S)))


def redact(text: str) -> str:
    """The text with the password of every address in it, and MLflow's own secrets, as ***."""
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    # Up to the last @ of the address part, so that a password with a bare @ or : does not show its end.
    text = re.sub(r"(://[^\s/:@]*):[^\s/]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|token)=)[^&\s'\"]+", r"\1***", text)


def one_line(error: Exception) -> str:
    """The error's root in one line: a refused connection comes wrapped four times, 500 characters long."""
    root: BaseException = error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            root = cause
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(root).split())
    return f"{type(root).__name__}: {text[:300]}"


@contextmanager
def _patience(num_bytes: int) -> Iterator[None]:
    # A server answers an upload only when its own storage has the whole file, so the wait grows with the size.
    before = os.environ[_TIMEOUT]
    os.environ[_TIMEOUT] = str(int(before) + num_bytes // _UPLOAD_BYTES_PER_S)
    try:
        yield
    finally:
        os.environ[_TIMEOUT] = before
