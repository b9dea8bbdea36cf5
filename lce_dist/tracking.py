"""What callers say to MLflow: every call goes to a local spool at once and reaches MLflow whenever it answers.

Measured with MLflow 3.17: a dead server blocks each client call for about 247 s with its default settings, and its
asynchronous logging loses points in silence. So the caller only appends to a :class:`~lce_dist.spool.Spool`; one
background thread hands the spool to :class:`~lce_dist.replay.Replayer`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lce_dist.config import TrackingConfig
from lce_dist.errors import ConfigError
from lce_dist.mlflow_client import one_line, prepare_mlflow, redact
from lce_dist.replay import Replayer
from lce_dist.spool import Spool, read_cursor

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_GATHER_S = 0.3  # how long to let events come together into one request
_SYNC_EVERY_S = 5.0
_DIGEST_LENGTH = 36  # what MLflow keeps of a data set's digest


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


@dataclasses.dataclass(frozen=True)
class Heard:
    """Of one run: the last step that losses were logged at, and whether it was ended since it was started last."""

    last_step: int
    has_ended: bool


Shapes = Mapping[str, Sequence[int]]


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
        self._replayer = Replayer(
            config.experiment, self._uri, default_store, self._spool, cursor_path, birth["uuid"], first_offset
        )
        self._keys: set[str] = set()
        self._monitors: dict[str, threading.Event] = {}
        self._wake, self._closing, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._cannot_write = self._cannot_sync = False
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

    def log_metrics(self, key: str, metrics: dict[str, float], step: int, time_ms: int | None = None) -> None:
        """Log numbers at ``step``, measured now or at ``time_ms``; names with a slash become sections in MLflow's page."""
        values = {name: float(value) for name, value in metrics.items()}
        self._add("metrics", key, step=int(step), metrics=values, **({} if time_ms is None else {"time_ms": time_ms}))

    def log_file(self, key: str, path: Path, artifact_folder: str | None = None) -> None:
        """Upload a file (or folder) later; it must stay where it is until then."""
        self._add("file", key, path=os.path.relpath(path, self._spool.path.parent), folder=artifact_folder)

    def log_text(self, key: str, text: str, artifact_file: str) -> None:
        """Store ``text`` as the artifact ``artifact_file`` ("config/resolved.toml")."""
        self._add("text", key, text=text, artifact_file=artifact_file)

    def log_input(
        self,
        key: str,
        name: str,
        digest: str,
        context: str,
        source: str,
        profile: dict[str, Any],
        tags: dict[str, Any] | None = None,
    ) -> None:
        """Show a data set on the run's page: where it is (``source``), what is in it (``profile``), what it was for.

        MLflow keeps one input for each (name, digest) of a run, and 36 characters of a digest.
        """
        facts = json.dumps(profile, default=str)
        self._add(
            "input",
            key,
            name=name,
            digest=digest[:_DIGEST_LENGTH],
            context=context,
            source=str(source),
            profile=facts,
            tags={tag: str(value) for tag, value in (tags or {}).items()},
        )

    def register_model(
        self,
        key: str,
        model_name: str,
        artifact_folder: str,
        inputs: Shapes,
        outputs: Shapes,
        description: str = "",
        tags: dict[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Make the files logged under ``artifact_folder`` a version of a registered model: one version a run.

        ``inputs`` and ``outputs`` are the float32 tensors of its signature by name, -1 for any length:
        ``{"images": (-1, 3, 112, 112)}``, ``{"vectors": (-1, 512)}``. Said again, it updates tags and description; an
        alias is given with the first saying only, so that it does not come back after it moved on.
        """
        self._add(
            "model",
            key,
            model=model_name,
            folder=artifact_folder,
            inputs={name: list(shape) for name, shape in inputs.items()},
            outputs={name: list(shape) for name, shape in outputs.items()},
            description=description,
            tags={tag: str(value) for tag, value in (tags or {}).items()},
            aliases=list(aliases),
        )

    def set_alias(self, key: str, model_name: str, alias: str, version: int | None = None) -> None:
        """Give ``alias`` to ``version``, or to the one that ``key`` registered; whoever had it loses it."""
        self._add("alias", key, model=model_name, alias=alias, version=version)

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

    def heard(self) -> dict[str, Heard]:
        """What this folder's spool holds of each key, from earlier processes and this one."""
        found: dict[str, Heard] = {}
        for event, _ in self._spool.read_from(0):
            kind, key = event.get("kind"), event.get("key")
            before = found.get(str(key), Heard(0, False))
            if kind == "start":
                found[str(key)] = dataclasses.replace(before, has_ended=False)
            elif kind == "end":
                found[str(key)] = dataclasses.replace(before, has_ended=True)
            elif kind == "metrics" and any(name.startswith("loss/") for name in event["metrics"]):
                found[str(key)] = dataclasses.replace(before, last_step=max(before.last_step, event["step"]))
        return found

    def pending(self) -> int:
        """How many events MLflow has not taken yet."""
        return self._replayer.pending()

    def close(self, timeout_s: float) -> bool:
        """Deliver what can be delivered in ``timeout_s``; True when nothing is left for the next start."""
        for stop in self._monitors.values():
            stop.set()
        self._replayer.hurry()
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        self._abandoned.set()
        self._replayer.release()
        try:
            self._spool.close()
        except OSError as error:
            self._warn_of_disk(error)
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
                self._replayer.disconnect(error)
                if not is_away:
                    _LOG.warning(
                        "%s",
                        redact(
                            f"MLflow at {self._uri} does not take events ({one_line(error)}); "
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
                self._sync()
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

    def _sync(self) -> None:
        try:
            self._spool.sync()
            self._cannot_sync = False
        except OSError as error:
            self._warn_of_disk(error)

    def _warn_of_disk(self, error: OSError) -> None:
        if not self._cannot_sync:
            _LOG.warning(
                "%s does not reach its disk (%s); a power cut can lose the last events, training goes on. See to the disk",
                self._spool.path,
                error,
            )
        self._cannot_sync = True

    def _sense(self, key: str, stop: threading.Event, interval_s: float) -> None:
        try:
            prepare_mlflow()
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
                _LOG.warning("no system metrics for run %r: %s", key, redact(one_line(error)))


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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
