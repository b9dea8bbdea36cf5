"""Registered models: a run's folder of files as one version with a signature, and what a gate tells MLflow at once.

A version is found again by its run and our tag, so a run has exactly one, however often it is told. The MLmodel file
has a signature and no flavour: MLflow shows what goes in and comes out and has nothing that it could execute.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lce_dist.errors import ConfigError, LceError, RunError
from lce_dist.mlflow_client import connect, is_refused, one_line, redact, upload

_LABEL = "lce.key"
_DESCRIPTION_LENGTH = 5000  # a longer one is refused by the database of a shared server


def register_version(client: Any, run_id: str, label: str, event: dict[str, Any]) -> None:
    """Register the run's files in ``event["folder"]``, or update the version that the run has already.

    ``event`` has folder, model, inputs, outputs, description, tags, aliases and time_ms (:class:`Tracker`).
    """
    model_name, folder, tags = event["model"], event["folder"], {**event["tags"], _LABEL: label}
    description = event["description"][:_DESCRIPTION_LENGTH]
    with tempfile.TemporaryDirectory() as beside:
        file = Path(beside) / "MLmodel"
        file.write_text(_model_file(run_id, label, event), encoding="utf-8")
        upload(client, run_id, file, folder)
    version = _only_version(client, model_name, run_id)
    if version is None:
        _create_model(client, model_name)
        # Not runs:/, from which MLflow's server cannot show the MLmodel file when it hands out the artifacts itself.
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        made = client.create_model_version(
            model_name, source, run_id, tags=tags, description=description, await_creation_for=0
        )
        version = _only_version(client, model_name, run_id) or int(made.version)
    else:
        for name, value in tags.items():
            client.set_model_version_tag(model_name, str(version), name, value)
        client.update_model_version(model_name, str(version), description)
    held = client.get_model_version(model_name, str(version)).tags
    for alias in event["aliases"]:
        if _alias_tag(alias) not in held:
            give_alias(client, model_name, version, alias, event["time_ms"])


def find_version(client: Any, model_name: str, run_id: str) -> int | None:
    """The version of ``model_name`` that was registered from the run; None when there is none."""
    return min(_versions(client, model_name, run_id), default=None)


def give_alias(client: Any, model_name: str, version: int, alias: str, time_ms: int) -> None:
    """Move ``alias`` to ``version``, unless this version heard so at ``time_ms`` or later: said twice is done once."""
    tags = client.get_model_version(model_name, str(version)).tags
    if tags.get(_alias_tag(alias), "") < _said(time_ms):
        client.set_registered_model_alias(model_name, alias, str(version))
        client.set_model_version_tag(model_name, str(version), _alias_tag(alias), _said(time_ms))


def _move_alias(client: Any, model_name: str, version: int, alias: str) -> None:
    """Move ``alias`` to ``version`` whenever it heard so before: another machine's clock may be ahead. Errors: RunError."""
    tag, held = _alias_tag(alias), client.get_model_version(model_name, str(version)).tags
    client.set_registered_model_alias(model_name, alias, str(version))
    client.set_model_version_tag(
        model_name, str(version), tag, max(held.get(tag, ""), _said(time.time_ns() // 1_000_000))
    )
    holder = client.get_registered_model(model_name).aliases.get(alias)
    if holder is None or int(holder) != version:
        raise RunError(
            f"{model_name}@{alias} is version {holder or 'none'} after it was moved to {version}; somebody else moves it too. "
            "Run the same command again"
        )


def set_model_alias(uri: str, model_name: str, run_id: str, alias: str, replace: bool = False) -> int:
    """Move ``alias`` to the version that was registered from the run, now, and return the version.

    Errors: RunError when MLflow does not answer, has no such version, or the alias is another's right after; ConfigError where
    another version has the alias whose tag "space" is not this one's "parent_space", unless ``replace``: this one was measured
    against another old model.
    """
    with _speaking(uri) as client:
        version = find_version(client, model_name, run_id)
        if version is None:
            raise RunError(
                f"run {run_id} has no version of the registered model {model_name!r} at {redact(uri)}; "
                "run its training command again, which sends what MLflow has not taken"
            )
        holder = client.get_registered_model(model_name).aliases.get(alias)
        if holder is not None and int(holder) != version and not replace:
            deployed = client.get_model_version(model_name, str(holder)).tags.get("space")
            measured = client.get_model_version(model_name, str(version)).tags.get("parent_space")
            if deployed != measured:
                raise ConfigError(
                    f"{model_name}@{alias} is version {holder}, of space {deployed or 'not known'}; version {version} was measured "
                    f"against an old model of space {measured or 'not known'}, which is not the one deployed. Train against "
                    "that one, or move the alias all the same with --replace"
                )
        _move_alias(client, model_name, version, alias)
        return version


def describe_version(uri: str, model_name: str, run_id: str, description: str) -> None:
    """Describe the version that was registered from the run, where there is one. Errors: RunError when MLflow does not answer."""
    with _speaking(uri) as client:
        version = find_version(client, model_name, run_id)
        if version is not None:
            client.update_model_version(model_name, str(version), description[:_DESCRIPTION_LENGTH])


def tag_run(uri: str, run_id: str, tags: dict[str, Any]) -> None:
    """Set tags of the run now. Errors: RunError when MLflow does not answer or has no such run."""
    with _speaking(uri) as client:
        from mlflow.entities import RunTag

        client.log_batch(run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()], synchronous=True)


def log_run_file(uri: str, run_id: str, path: Path, folder: str | None = None) -> None:
    """Store a file among the run's artifacts now. Errors: RunError when MLflow does not take it or it is not there."""
    if not path.is_file():
        raise RunError(f"{path} is not a file; nothing to store in MLflow")
    with _speaking(uri) as client:
        upload(client, run_id, path, folder)


@contextmanager
def _speaking(uri: str) -> Iterator[Any]:
    """A client for a few calls by somebody who waits: short time-outs, and any failure is one line."""
    place = redact(uri)
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).is_file():
        raise RunError(f"no MLflow store at {place}; name the folder of the runs, or set tracking.uri")
    try:
        yield connect(uri)
    except LceError:
        raise
    except Exception as error:
        text = redact(one_line(error))
        if is_refused(error):
            raise RunError(f"MLflow at {place} refuses ({text})") from error
        raise RunError(
            f"MLflow at {place} does not answer as it should ({text}); start it or see to the login, then run the "
            "same command again"
        ) from error


def _versions(client: Any, model_name: str, run_id: str) -> list[int]:
    found = client.search_model_versions(f"run_id = '{run_id}'")
    return [int(one.version) for one in found if one.name == model_name and _LABEL in one.tags]


def _only_version(client: Any, model_name: str, run_id: str) -> int | None:
    """The run's version; when a call that seemed to fail made a second one, the later goes."""
    versions = sorted(_versions(client, model_name, run_id))
    for version in versions[1:]:
        client.delete_model_version(model_name, str(version))
    return versions[0] if versions else None


def _create_model(client: Any, model_name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _model_file(run_id: str, label: str, event: dict[str, Any]) -> str:
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(shapes: dict[str, list[int]]) -> Schema:
        return Schema([TensorSpec(np.dtype("float32"), tuple(shape), name) for name, shape in shapes.items()])

    signature = ModelSignature(schema(event["inputs"]), schema(event["outputs"]))
    made = datetime.fromtimestamp(event["time_ms"] / 1000, UTC).replace(tzinfo=None)
    return Model(
        event["folder"], run_id, utc_time_created=made, signature=signature, model_uuid=label.replace(":", "-")
    ).to_yaml()


def _said(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def _alias_tag(alias: str) -> str:
    return f"lce.alias.{alias}"
