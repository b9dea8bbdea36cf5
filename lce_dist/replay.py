"""What MLflow is told, exactly once: a spool's events are sent in order, and a doubt is settled by reading back.

Measured with MLflow 3.17: a step that is logged twice is kept twice. A (run, metric, step) is sent once: steps at or
below the last one of that metric are dropped, and after any doubt (a new process, an unanswered call) the last steps
are read back from MLflow first. How far MLflow follows the spool is in ``tracking.json``.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lce_dist.mlflow_client import connect, get_run, is_refused, one_line, redact, upload, wait_longer_after
from lce_dist.registry import find_version, give_alias, register_version
from lce_dist.spool import Spool, read_cursor, write_cursor

_LOG = logging.getLogger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0  # of what artifact storage or registry did not take
_POINTS_PER_REQUEST = 1000  # MLflow's limit for one log_batch
_FILE_KINDS = ("file", "text")
_REGISTRY_KINDS = ("model", "alias")
_WAITING_KINDS = _FILE_KINDS + _REGISTRY_KINDS  # they may wait for artifact storage or registry; metrics do not


@dataclasses.dataclass
class Cursor:
    """How far MLflow follows the spool; tracking.json is this and nothing else."""

    uuid: str
    target: str
    offset: int
    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    steps: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    deferred: list[int] = dataclasses.field(default_factory=list)


class Replayer:
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
        self._retry_deferred_s, self._wait_s = 0.0, _FIRST_WAIT_S
        self._warned: set[tuple[str, ...]] = set()
        self._is_released = False
        self._save_lock = threading.Lock()
        # Another server or experiment gets the whole story from the beginning.
        fresh = Cursor(run_uuid, f"{redact(uri)} {experiment}", first_offset)
        self.cursor = _load_cursor(cursor_path, fresh)
        # After a power cut the position may be newer than the spool; what is gone is gone.
        self.cursor.offset = min(self.cursor.offset, spool.size_bytes())
        self.cursor.deferred = [offset for offset in self.cursor.deferred if offset < self.cursor.offset]

    def pending(self) -> int:
        return self._spool.count_from(self.cursor.offset) + len(self.cursor.deferred)

    def release(self) -> None:
        """Stop saving the position: the next process may own the folder from here on."""
        with self._save_lock:
            self._is_released = True

    def hurry(self) -> None:
        """Try what waits for artifact storage or registry now, not when its pause is over."""
        self._retry_deferred_s = 0.0

    def disconnect(self, error: Exception) -> None:
        """Forget the client; the next replay connects anew and reads the last steps back first."""
        self._client = None
        wait_longer_after(error)

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
        if self._uri.startswith("sqlite:///"):
            self._store.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(self._store / "mlflow.db.lock", self._uri.startswith("sqlite:///")):
            client = connect(self._uri)
            self._experiment_id = self._find_experiment(client)
        for key, run_id in list(self.cursor.runs.items()):
            run = get_run(client, run_id)
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
            root = None if is_server else artifact_root(self._store)
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
            if not is_refused(error):
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
        if kind in _WAITING_KINDS and self.cursor.deferred:
            self.cursor.deferred.append(offset)  # behind the waiting ones, so that a newer version stays the newer one
            return
        try:
            self._deliver(event)
        except Exception as error:
            if is_refused(error):
                self._warn_refused(event, error)
            elif kind in _WAITING_KINDS and self._answers(key):
                # The server is well and its artifact storage or registry is not: metrics must not wait for it.
                self._warn_waiting(event, error)
                self.cursor.deferred.append(offset)
                self._wait_with_deferred()
            else:
                raise

    def _send_deferred(self) -> None:
        """Try the waiting events in order; files need not wait for the registry, a model waits for its files."""
        waiting: tuple[str, ...] = ()
        for offset in tuple(self.cursor.deferred):
            event, _ = next(self._spool.read_from(offset))
            kind = event.get("kind")  # none where the line is damaged: skipped with a warning, as in order
            if kind in waiting:
                continue
            try:
                self._deliver(event)
            except Exception as error:
                if not is_refused(error):
                    self._wait_with_deferred()
                    if not self._answers(event["key"]):
                        raise
                    self._warn_waiting(event, error)
                    waiting = _WAITING_KINDS if kind in _FILE_KINDS else _REGISTRY_KINDS
                    continue
                self._warn_refused(event, error)
            self.cursor.deferred.remove(offset)
            self._wait_s = _FIRST_WAIT_S
            self._save()

    def _wait_with_deferred(self) -> None:
        self._retry_deferred_s = time.monotonic() + self._wait_s
        self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)

    def _answers(self, key: str) -> bool:
        try:
            return get_run(self._client, self.cursor.runs[key]) is not None
        except Exception:  # noqa: BLE001 - the question is only whether it answers
            return False

    def _deliver(self, event: dict[str, Any]) -> None:
        kind, key = event.get("kind"), event.get("key", "")
        run_id = self.cursor.runs.get(key)
        if kind == "start":
            self._start(event)
        elif kind not in ("params", "tags", "input", "end", *_WAITING_KINDS):
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
        elif kind == "input":
            self._send_input(run_id, event)
        elif kind == "model":
            register_version(self._client, run_id, self._label(key), event)
        elif kind == "alias":
            self._send_alias(key, run_id, event)
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
            upload(self._client, run_id, path, event["folder"])

    def _start(self, event: dict[str, Any]) -> None:
        key, tags = event["key"], dict(event["tags"])
        parent_id = self.cursor.runs.get(event["parent"] or "")
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        if key not in self.cursor.runs:
            label = self._label(key)
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

    def _label(self, key: str) -> str:
        """What names the run of ``key`` for ever, whatever MLflow calls it."""
        return f"{self.cursor.uuid}:{key}"

    def _send_input(self, run_id: str, event: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, scheme = event["source"], event["source"].partition("://")[0]
        place = {"url": source} if scheme in ("http", "https") else {"uri": source}
        kind = {"http": "http", "https": "http", "s3": "s3"}.get(scheme, "local")
        # MLflow keeps one input for each (name, digest) of a run, so that sending it again changes nothing.
        data = Dataset(event["name"], event["digest"], kind, json.dumps(place), profile=event["profile"])
        tags = [InputTag(name, value) for name, value in event["tags"].items()]
        self._client.log_inputs(
            run_id, [DatasetInput(data, [InputTag("mlflow.data.context", event["context"]), *tags])]
        )

    def _send_alias(self, key: str, run_id: str, event: dict[str, Any]) -> None:
        model_name, version = event["model"], event["version"]
        if version is None:
            version = find_version(self._client, model_name, run_id)
        if version is None:
            self._warn(
                ("no version", key, model_name),
                f"alias {event['alias']} is skipped: run {key!r} has no version of {model_name!r}; "
                "call register_model first",
            )
            return
        give_alias(self._client, model_name, version, event["alias"], event["time_ms"])

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
            if not is_refused(error):
                raise
        held = get_run(self._client, run_id)
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
                    if not is_refused(error):
                        raise
                    self._warn(
                        ("param", key, name),
                        f"MLflow refused param {name} of run {key!r} ({one_line(error)}); skipped",
                    )

    def _warn_waiting(self, event: dict[str, Any], error: Exception) -> None:
        kind = event["kind"]
        if kind in _FILE_KINDS:
            text = f"MLflow's artifact storage does not take files ({one_line(error)}); trying again later"
        else:
            text = f"MLflow does not take the {kind} {event['model']!r} ({one_line(error)}); trying again later"
        self._warn(("waiting", kind), text)

    def _warn_refused(self, event: dict[str, Any], error: Exception) -> None:
        kind, key, text = event["kind"], event["key"], one_line(error)
        self._warn(("refused", kind, key, text), f"MLflow refused {kind} of run {key!r} ({text}); skipped")

    def _warn(self, once: tuple[str, ...], text: str) -> None:
        if once not in self._warned:
            self._warned.add(once)
            _LOG.warning("%s", redact(text))

    def _save(self) -> None:
        with self._save_lock:
            if not self._is_released:
                write_cursor(self._cursor_path, dataclasses.asdict(self.cursor))


def _load_cursor(path: Path, fresh: Cursor) -> Cursor:
    state = read_cursor(path) or {}
    if (state.get("uuid"), state.get("target")) != (fresh.uuid, fresh.target):
        return fresh
    try:
        return Cursor(**state)
    except TypeError:
        return fresh


@contextmanager
def _one_process_at_a_time(path: Path, is_needed: bool) -> Iterator[None]:
    """Two processes that make the tables of one new SQLite file at the same time would both fail."""
    if not is_needed:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def artifact_root(default_store: Path) -> str:
    return (default_store.resolve() / "mlartifacts").as_uri()
