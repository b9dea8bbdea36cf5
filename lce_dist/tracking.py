"""The only door to MLflow: events go to a local spool at once and reach MLflow whenever it answers.

Measured with MLflow 3.17: a dead server blocks each client call for about 247 s with its default settings, its
asynchronous logging loses points in silence, and a step that is logged twice is kept twice. So the caller only
appends to a :class:`~lce_dist.spool.Spool`; one background thread replays the spool, in order, and remembers in
``tracking.json`` how far it came. A (run, metric, step) is sent once: steps at or below the last one of that metric
are dropped, and after any doubt (a new process, an unanswered call) the last steps are read back from MLflow first.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lce_dist.config import TrackingConfig
from lce_dist.errors import ConfigError
from lce_dist.spool import Spool, read_cursor, write_cursor

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_GATHER_S = 0.3  # how long to let events come together into one request
_SYNC_EVERY_S = 5.0
_POINTS_PER_REQUEST = 1000  # MLflow's limit for one log_batch
_ARTIFACT_KINDS = ("file", "text")
# Answers in the 4xx range that another try can change: login, permission, time-out, conflict, too many, cancelled.
_PASSING_STATUS = (401, 403, 408, 409, 425, 429, 499)
_CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
# A tracking server needs no jobs, and its jobs interface ran foreign code without a login (CVE-2026-0545).
UI_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def tracking_uri(config: TrackingConfig, default_store: Path) -> str:
    """Where MLflow is: the config, else MLFLOW_TRACKING_URI, else a SQLite file in ``default_store``.

    Errors: ConfigError for a plain folder, which MLflow no longer takes as a store.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{default_store.resolve()}/mlflow.db"
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        origin = "tracking.uri" if config.uri else "the environment's MLFLOW_TRACKING_URI"
        raise ConfigError(
            f"{origin} is {redact(uri)!r}; must be http(s)://HOST:PORT or a database (sqlite:///FILE.db): MLflow has "
            "no folder store any more. Remove it to use the SQLite store beside the runs"
        )
    return uri


def redact(text: str) -> str:
    """The text with the password of every address in it, and MLflow's own secrets, as ***."""
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    # Up to the last @ of the address part, so that a password with a bare @ or : does not show its end.
    text = re.sub(r"(://[^\s/:@]*):[^\s/]*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|token)=)[^&\s'\"]+", r"\1***", text)


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
    argv += ["--artifacts-destination", _artifact_root(default_store)]
    return [*argv, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


class Tracker:
    """One run folder's way to MLflow; every logging method returns at once and survives any state of the server.

    ``run_dir`` keeps the spool (tracking.jsonl) and the position (tracking.json); the same folder continues the same
    MLflow runs. ``key`` is our name of a run ("new", "old", ...). Steps of one metric must grow; a step that was sent
    already is dropped, so training may send steps again after a resume.
    Errors: ConfigError (store), RunError when another process writes to the folder.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, run_name: str, default_store: Path) -> None:
        self._uri = tracking_uri(config, default_store)
        self._run_name = run_name
        self._spool = Spool(run_dir / "tracking.jsonl")
        cursor_path = run_dir / "tracking.json"
        birth, first_offset = self._birth(cursor_path)
        self._born_ms: int = birth["time_ms"]
        self._commit = _git_commit()
        self._replayer = _Replayer(
            config.experiment, self._uri, default_store, self._spool, cursor_path, birth["uuid"], first_offset
        )
        self._keys: set[str] = set()
        self._monitors: dict[str, threading.Event] = {}
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._cannot_write = False
        self._thread = threading.Thread(target=self._work, name="mlflow-replay", daemon=True)
        self._thread.start()

    def start_run(self, key: str, name: str, parent: str | None = None, tags: dict[str, Any] | None = None) -> None:
        """Create the MLflow run of ``key``, or continue it (status RUNNING) when it exists; ``parent`` is a key."""
        self._keys.add(key)
        all_tags = {"lce.run": self._run_name, **({"mlflow.source.git.commit": self._commit} if self._commit else {})}
        all_tags |= {tag: str(value) for tag, value in (tags or {}).items()}
        self._add("start", key, name=name, parent=parent, tags=all_tags)

    def log_params(self, key: str, params: dict[str, Any]) -> None:
        """Log parameters; one that MLflow holds with another value stays, and the new value becomes a tag."""
        self._add("params", key, params={name: str(value) for name, value in params.items()})

    def log_metrics(self, key: str, metrics: dict[str, float], step: int) -> None:
        """Log numbers at ``step``; names with a slash become sections in MLflow's page."""
        self._add("metrics", key, step=int(step), metrics={name: float(value) for name, value in metrics.items()})

    def log_file(self, key: str, path: Path, artifact_folder: str | None = None) -> None:
        """Upload a file (or folder) later; it must stay where it is until then."""
        self._add("file", key, path=os.path.relpath(path, self._spool.path.parent), folder=artifact_folder)

    def log_text(self, key: str, text: str, artifact_file: str) -> None:
        """Store ``text`` as the artifact ``artifact_file`` ("config/resolved.toml")."""
        self._add("text", key, text=text, artifact_file=artifact_file)

    def set_tags(self, key: str, tags: dict[str, Any]) -> None:
        """Set tags; ``mlflow.note.content`` is the run's description in Markdown."""
        self._add("tags", key, tags={tag: str(value) for tag, value in tags.items()})

    def end_run(self, key: str, status: str = "FINISHED") -> None:
        """End the run of ``key`` as FINISHED, FAILED or KILLED, and its system metrics with it."""
        if key in self._monitors:
            self._monitors.pop(key).set()
        self._add("end", key, status=status)

    def monitor(self, key: str, interval_s: float = 10.0) -> None:
        """Log this machine's load (system/...) to ``key`` until its end; the step is in seconds since the run began."""
        if key not in self._monitors:
            stop = self._monitors[key] = threading.Event()
            threading.Thread(
                target=self._sense, args=(key, stop, interval_s), name="system-metrics", daemon=True
            ).start()

    def run_ids(self) -> dict[str, str | None]:
        """MLflow's id for each key that was started; None while MLflow has not heard of it."""
        return {
            key: self._replayer.cursor.runs.get(key) for key in sorted(self._keys | set(self._replayer.cursor.runs))
        }

    def pending(self) -> int:
        """How many events MLflow has not taken yet."""
        return self._replayer.pending()

    def close(self, timeout_s: float) -> bool:
        """Deliver what can be delivered in ``timeout_s``; True when nothing is left for the next start."""
        for stop in self._monitors.values():
            stop.set()
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._abandoned.set()
        self._replayer.release()
        self._spool.close()
        left = self.pending()
        if left:
            _LOG.warning(
                "%s",
                redact(
                    f"MLflow at {self._uri} has not taken {left} events; they wait in {self._spool.path} "
                    "and are sent when this run is started again"
                ),
            )
        return left == 0

    def _birth(self, cursor_path: Path) -> tuple[dict[str, Any], int]:
        # The first line names the folder for ever: MLflow runs are found again by it even when tracking.json is lost.
        for event, next_offset in self._spool.read_from(0):
            if event.get("kind") == "birth":
                return event, next_offset
            break
        known = (read_cursor(cursor_path) or {}).get("uuid")
        event = {"kind": "birth", "uuid": known or uuid.uuid4().hex, "time_ms": _now_ms()}
        self._spool.append(event)
        return event, self._spool.size_bytes() if self._spool.count_from(0) == 1 else 0

    def _add(self, kind: str, key: str, **fields: Any) -> None:
        try:
            self._spool.append({"kind": kind, "key": key, "time_ms": _now_ms(), **fields})
            self._cannot_write = False
        except OSError as error:
            if not self._cannot_write:
                _LOG.warning(
                    "%s cannot be written (%s); metrics are lost until it can, training goes on",
                    self._spool.path,
                    error,
                )
            self._cannot_write = True
        self._wake.set()

    def _work(self) -> None:
        pause_s, is_away, synced_s = _FIRST_PAUSE_S, False, time.monotonic()
        while not self._abandoned.is_set():
            self._wake.clear()
            try:
                is_busy = self._replayer.replay()
            except Exception as error:  # noqa: BLE001 - whatever MLflow or a storage library raises, training goes on
                self._replayer.disconnect()
                if not is_away:
                    _LOG.warning(
                        "%s",
                        redact(
                            f"MLflow at {self._uri} does not take events ({_one_line(error)}); "
                            f"{self.pending()} wait in {self._spool.path}, training goes on"
                        ),
                    )
                is_away = True
                # A close cuts the pause short once; after that it tries at the first pause's pace.
                if self._closing.is_set():
                    self._abandoned.wait(_FIRST_PAUSE_S)
                else:
                    self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if is_away:
                _LOG.warning("%s", redact(f"MLflow at {self._uri} is back; {self.pending()} events to send"))
            pause_s, is_away = _FIRST_PAUSE_S, False
            if time.monotonic() - synced_s > _SYNC_EVERY_S:
                self._spool.sync()
                synced_s = time.monotonic()
            if is_busy:
                continue
            if self._closing.is_set():
                if self.pending() == 0:
                    return
                self._abandoned.wait(_FIRST_PAUSE_S)
            else:
                self._wake.wait(_LONGEST_PAUSE_S)
                self._closing.wait(_GATHER_S)

    def _sense(self, key: str, stop: threading.Event, interval_s: float) -> None:
        try:
            _prepare_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # Its sensors only: its own loop calls MLflow directly and ends at the first error.
            sensors = SystemMetricsMonitor(run_id="", tracking_uri=self._uri)
            while not stop.is_set():
                sensors.collect_metrics()
                if stop.wait(interval_s):
                    return
                values = {f"system/{name}": value for name, value in sensors.aggregate_metrics().items()}
                for sensor in sensors.monitors:
                    sensor.clear_metrics()
                self.log_metrics(key, values, step=(_now_ms() - self._born_ms) // 1000)
        except Exception as error:  # noqa: BLE001 - a sensor library must never end a run
            if not stop.is_set():
                _LOG.warning("no system metrics for run %r: %s", key, redact(_one_line(error)))


@dataclasses.dataclass
class _Cursor:
    """How far MLflow follows the spool; tracking.json is this and nothing else."""

    uuid: str
    target: str
    offset: int
    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    deferred: list[int] = dataclasses.field(default_factory=list)


class _Replayer:
    """MLflow's side: takes events off the spool in order and sends each until MLflow took or refused it."""

    def __init__(
        self,
        experiment: str,
        uri: str,
        default_store: Path,
        spool: Spool,
        cursor_path: Path,
        run_uuid: str,
        first_offset: int,
    ) -> None:
        self._experiment, self._uri = experiment, uri
        self._store = default_store.resolve()
        self._spool, self._cursor_path, self._first_offset = spool, cursor_path, first_offset
        self._client: Any = None
        self._experiment_id = ""
        self._retry_deferred_s = 0.0
        self._warned: set[tuple[str, ...]] = set()
        self._is_released = False
        self._save_lock = threading.Lock()
        # Another server or experiment gets the whole story from the beginning.
        fresh = _Cursor(run_uuid, f"{redact(uri)} {experiment}", first_offset)
        self.cursor = _load_cursor(cursor_path, fresh)
        # After a power cut the position may be newer than the spool; what is gone is gone.
        self.cursor.offset = min(self.cursor.offset, spool.size_bytes())

    def pending(self) -> int:
        return self._spool.count_from(self.cursor.offset) + len(self.cursor.deferred)

    def release(self) -> None:
        """Stop saving the position: the next process may own the folder from here on."""
        with self._save_lock:
            self._is_released = True

    def disconnect(self) -> None:
        """Forget the client; the next replay connects anew and reads the last steps back first."""
        self._client = None

    def replay(self) -> bool:
        """Send the next event or batch; False when nothing is left to send now.

        Errors: whatever MLflow raises for a state that may pass; the event is then still pending.
        """
        events, next_offset = self._next_unit()
        has_deferred = bool(self.cursor.deferred) and time.monotonic() >= self._retry_deferred_s
        if not events and not has_deferred:
            return False
        if self._client is None:
            self._connect()
            return True  # the position may have changed
        if has_deferred:
            self._send_deferred()
        if not events:
            return False
        start = self.cursor.offset
        if events[0].get("kind") == "metrics":
            self._send_metrics(events)
        else:
            self._send_one(events[0], start)
        self.cursor.offset = next_offset
        self._save()
        return True

    def _next_unit(self) -> tuple[list[dict[str, Any]], int]:
        """A run of metrics events that fits one request, or one event of another kind."""
        events: list[dict[str, Any]] = []
        end, num_points = self.cursor.offset, 0
        for event, next_offset in self._spool.read_from(end):
            num_points += len(event.get("metrics", ()))
            if events and (event.get("kind") != "metrics" or num_points > _POINTS_PER_REQUEST):
                break
            events.append(event)
            end = next_offset
            if event.get("kind") != "metrics":
                break
        return events, end

    def _connect(self) -> None:
        _prepare_mlflow()
        from mlflow import MlflowClient

        if self._uri.startswith("sqlite:///"):
            self._store.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(self._store / "mlflow.db.lock", self._uri.startswith("sqlite:///")):
            client = MlflowClient(self._uri)
            self._experiment_id = self._find_experiment(client)
        for key, run_id in list(self.cursor.runs.items()):
            run = _get_run(client, run_id)
            if run is None:
                self._warn(("gone", key), f"run {run_id} ({key}) is gone from MLflow; everything is sent again")
                self.cursor = dataclasses.replace(
                    self.cursor, offset=self._first_offset, runs={}, steps={}, deferred=[]
                )
                break
            self._adopt(key, run)
        self._client = client

    def _find_experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            # A server knows where its artifacts go; a bare database would put them under the current folder.
            is_server = self._uri.startswith(("http://", "https://"))
            root = None if is_server else _artifact_root(self._store)
            try:
                return str(client.create_experiment(self._experiment, artifact_location=root))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(self._experiment)
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _adopt(self, key: str, run: Any) -> None:
        """Take over MLflow's run, and its last step of each metric: MLflow may know more than the position says."""
        self.cursor.runs[key] = run.info.run_id
        steps = self.cursor.steps.setdefault(key, {})
        for metric in run.data.to_proto().metrics:
            steps[metric.key] = max(metric.step, steps.get(metric.key, metric.step))

    def _send_metrics(self, events: list[dict[str, Any]]) -> None:
        for key in dict.fromkeys(event["key"] for event in events):
            self._send_points(key, [event for event in events if event["key"] == key])

    def _send_points(self, key: str, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        run_id = self.cursor.runs.get(key)
        if run_id is None:
            self._warn(
                ("no run", key), f"metrics of run {key!r} are skipped: it has no MLflow run; call start_run first"
            )
            return
        steps = dict(self.cursor.steps.get(key, {}))
        points = []
        for event in events:
            for name, value in event["metrics"].items():
                if name not in steps or event["step"] > steps[name]:
                    # The time of the event, not of the sending: an equal point sent twice is one row in MLflow.
                    points.append(Metric(name, value, event["time_ms"], event["step"]))
                    steps[name] = event["step"]
        try:
            if points:
                self._client.log_batch(run_id, metrics=points, synchronous=True)
        except Exception as error:
            if not _is_refused(error):
                raise
            if len(events) > 1:
                for event in events:
                    self._send_points(key, [event])
            else:
                self._warn_refused(events[0], error)
            return
        self.cursor.steps[key] = steps

    def _send_one(self, event: dict[str, Any], offset: int) -> None:
        kind, key = event.get("kind"), event.get("key", "")
        if kind in _ARTIFACT_KINDS and self.cursor.deferred:
            self.cursor.deferred.append(offset)  # behind the waiting ones, so that a newer version stays the newer one
            return
        try:
            self._deliver(event)
        except Exception as error:
            if _is_refused(error):
                self._warn_refused(event, error)
            elif kind in _ARTIFACT_KINDS and self._answers(key):
                # The server is well and its artifact storage is not: metrics must not wait for it.
                self._warn(
                    ("deferred",),
                    f"MLflow's artifact storage does not take files ({_one_line(error)}); trying again later",
                )
                self.cursor.deferred.append(offset)
                self._retry_deferred_s = time.monotonic() + _LONGEST_PAUSE_S
            else:
                raise

    def _send_deferred(self) -> None:
        while self.cursor.deferred:
            event, _ = next(self._spool.read_from(self.cursor.deferred[0]))
            try:
                self._deliver(event)
            except Exception as error:
                if not _is_refused(error):
                    self._retry_deferred_s = time.monotonic() + _LONGEST_PAUSE_S
                    if self._answers(event["key"]):
                        return
                    raise
                self._warn_refused(event, error)
            self.cursor.deferred.pop(0)
            self._save()

    def _answers(self, key: str) -> bool:
        try:
            return _get_run(self._client, self.cursor.runs[key]) is not None
        except Exception:  # noqa: BLE001 - the question is only whether it answers
            return False

    def _deliver(self, event: dict[str, Any]) -> None:
        kind, key = event.get("kind"), event.get("key", "")
        run_id = self.cursor.runs.get(key)
        if kind == "start":
            self._start(event)
        elif kind not in ("params", "tags", "end", *_ARTIFACT_KINDS):
            self._warn(
                ("line", str(kind)),
                f"{self._spool.path}: skipped a line that is damaged or of an unknown kind ({kind})",
            )
        elif run_id is None:
            self._warn(("no run", key), f"{kind} of run {key!r} is skipped: it has no MLflow run; call start_run first")
        elif kind == "params":
            self._send_params(key, run_id, event["params"])
        elif kind == "tags":
            self._send_tags(run_id, event["tags"])
        elif kind == "end":
            self._client.set_terminated(run_id, event["status"], event["time_ms"])
        elif kind == "text":
            self._client.log_text(run_id, event["text"], event["artifact_file"])
        else:
            path = self._spool.path.parent / event["path"]
            if not os.access(path, os.R_OK):
                self._warn(
                    ("file", str(path)),
                    f"{path} of run {key!r} is not there or not readable any more; not sent to MLflow",
                )
                return
            self._client.log_artifact(run_id, str(path), event["folder"])

    def _start(self, event: dict[str, Any]) -> None:
        key, tags = event["key"], dict(event["tags"])
        parent_id = self.cursor.runs.get(event["parent"] or "")
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        if key not in self.cursor.runs:
            label = f"{self.cursor.uuid}:{key}"
            # The oldest, should a call that seemed to fail have made a second one.
            found = self._client.search_runs(
                [self._experiment_id],
                f"tags.`lce.key` = '{label}'",
                max_results=1,
                order_by=["attributes.start_time ASC"],
            )
            if not found:
                tags["lce.key"] = label
                run = self._client.create_run(self._experiment_id, event["time_ms"], tags, run_name=event["name"])
                self._adopt(key, run)
                return
            self._adopt(key, found[0])
        self._client.update_run(self.cursor.runs[key], status="RUNNING")
        self._send_tags(self.cursor.runs[key], tags)

    def _send_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)

    def _send_params(self, key: str, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        try:
            self._client.log_batch(
                run_id, params=[Param(name, value) for name, value in params.items()], synchronous=True
            )
            return
        except Exception as error:
            if not _is_refused(error):
                raise
        held = _get_run(self._client, run_id)
        held_params = held.data.params if held else {}
        for name, value in params.items():
            if name in held_params and held_params[name] != value:
                self._warn(
                    ("param", key, name),
                    f"param {name} of run {key!r} is {held_params[name]!r} in MLflow and now {value!r}; "
                    f"MLflow keeps the first, the new value is the tag lce.changed.{name}",
                )
                self._send_tags(run_id, {f"lce.changed.{name}": value})
            elif name not in held_params:
                try:
                    self._client.log_batch(run_id, params=[Param(name, value)], synchronous=True)
                except Exception as error:
                    if not _is_refused(error):
                        raise
                    self._warn(
                        ("param", key, name),
                        f"MLflow refused param {name} of run {key!r} ({_one_line(error)}); skipped",
                    )

    def _warn_refused(self, event: dict[str, Any], error: Exception) -> None:
        kind, key, text = event["kind"], event["key"], _one_line(error)
        self._warn(("refused", kind, key, text), f"MLflow refused {kind} of run {key!r} ({text}); skipped")

    def _warn(self, once: tuple[str, ...], text: str) -> None:
        if once not in self._warned:
            self._warned.add(once)
            _LOG.warning("%s", redact(text))

    def _save(self) -> None:
        with self._save_lock:
            if not self._is_released:
                write_cursor(self._cursor_path, dataclasses.asdict(self.cursor))


def _load_cursor(path: Path, fresh: _Cursor) -> _Cursor:
    state = read_cursor(path) or {}
    if (state.get("uuid"), state.get("target")) != (fresh.uuid, fresh.target):
        return fresh
    try:
        return _Cursor(**state)
    except TypeError:
        return fresh


def _get_run(client: Any, run_id: str) -> Any:
    """The run, or None when it was deleted or never was in this store."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _is_refused(error: Exception) -> bool:
    """True when sending the same thing again cannot help."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        # An unknown path is a proxy or another service in the server's place, not a verdict on the event.
        status = 503 if error.error_code == "ENDPOINT_NOT_FOUND" else error.get_http_status_code()
    elif isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return isinstance(error, (TypeError, ValueError, LookupError, AttributeError)) and not isinstance(
            error, OSError
        )
    return 400 <= status < 500 and status not in _PASSING_STATUS


def _prepare_mlflow() -> None:
    """Settings that MLflow reads from the environment, then its import: seconds, so only in our threads."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    # Database errors are ours to report, in one line; MLflow would print a traceback for each try.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


@contextmanager
def _one_process_at_a_time(path: Path, is_needed: bool) -> Iterator[None]:
    """Two processes that make the tables of one new SQLite file at the same time would both fail."""
    if not is_needed:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _artifact_root(default_store: Path) -> str:
    return (default_store.resolve() / "mlartifacts").as_uri()


def _git_commit() -> str | None:
    """The commit of the checkout that holds this file; None for an installed package."""
    package = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(  # noqa: S603 - fixed words and our own folder
            ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"],  # noqa: S607 - git is where PATH says
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    return lines[1] if answer.returncode == 0 and Path(lines[0]) == package.parent else None


def _one_line(error: Exception) -> str:
    # A refused connection comes wrapped four times, 500 characters long; its root says it in four words.
    root: BaseException = error
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            root = cause
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(root).split())
    return f"{type(root).__name__}: {text[:300]}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
