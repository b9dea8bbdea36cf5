"""An alias that a gate moves is where the gate says it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from lce_dist.errors import RunError
from lce_dist.registry import give_alias, set_model_alias


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, MlflowClient, list[str]]:
    """Two versions of one model, of two runs; "champion" is the second."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("faces", artifact_location=tmp_path.as_uri())
    client.create_registered_model("faces")
    run_ids = []
    for number in range(2):
        run_ids.append(client.create_run(experiment).info.run_id)
        client.create_model_version("faces", str(tmp_path), run_ids[-1], tags={"lce.key": f"{number}"})
    client.set_registered_model_alias("faces", "champion", "2")
    return uri, client, run_ids


def test_an_alias_moves_though_another_machines_clock_is_ahead(store):
    uri, client, run_ids = store
    ahead = "2999-01-01T00:00:00.000+00:00"
    client.set_model_version_tag("faces", "1", "lce.alias.champion", ahead)
    assert set_model_alias(uri, "faces", run_ids[0], "champion", replace=True) == 1
    assert int(client.get_model_version_by_alias("faces", "champion").version) == 1
    # what was said before that is still not said again
    client.set_registered_model_alias("faces", "champion", "2")
    give_alias(client, "faces", 1, "champion", 1_000_000)
    assert int(client.get_model_version_by_alias("faces", "champion").version) == 2
    assert client.get_model_version("faces", "1").tags["lce.alias.champion"] == ahead


def test_an_alias_that_does_not_move_is_an_error(store, monkeypatch):
    uri, _, run_ids = store
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", lambda *_: None)
    with pytest.raises(RunError, match=r"faces@champion is version 2 after it was moved to 1; .*same command again"):
        set_model_alias(uri, "faces", run_ids[0], "champion", replace=True)
