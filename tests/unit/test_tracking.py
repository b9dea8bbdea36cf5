"""A tracker over a SQLite store whose own disk fails, and one that comes back after a power cut."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lce_dist import tracking
from lce_dist.config import TrackingConfig
from lce_dist.spool import Spool
from lce_dist.tracking import Tracker


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def opened(store: Path) -> Tracker:
    return Tracker(TrackingConfig(), store / "run", "run", store)


def points(store: Path, name: str) -> list[tuple[int, float]]:
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lce-dist").experiment_id])
    return sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_cannot_be_synced_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fdatasync", full_disk)
    monkeypatch.setattr(tracking, "_SYNC_EVERY_S", 0.0)
    monkeypatch.setattr(tracking, "_GATHER_S", 0.0)
    with caplog.at_level(logging.WARNING):
        tracker = opened(tmp_path)
        tracker.start_run("new", "new")
        for step in range(3):
            tracker.log_metrics("new", {"loss/total": float(step)}, step)
            until = time.monotonic() + 60.0
            while tracker.pending() and time.monotonic() < until:
                time.sleep(0.02)
        assert tracker.close(30.0)
    assert points(tmp_path, "loss/total") == [(step, float(step)) for step in range(3)]
    told = [record.message for record in caplog.records if "does not reach its disk" in record.message]
    assert len(told) == 1 and "No space left" in told[0] and "\n" not in told[0]


def test_a_spool_is_closed_whatever_its_disk_says(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "s.jsonl")
    descriptors = (spool._fd, spool._lock_fd)
    monkeypatch.setattr(os, "fdatasync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        spool.close()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    spool.close()


def test_what_a_power_cut_took_is_not_waited_for(tmp_path, caplog):
    tracker = opened(tmp_path)
    tracker.start_run("new", "new")
    tracker.log_metrics("new", {"loss/total": 1.0}, 1)
    assert tracker.close(60.0)
    spool, cursor = tmp_path / "run" / "tracking.jsonl", tmp_path / "run" / "tracking.json"
    size = spool.stat().st_size
    spool.write_bytes(spool.read_bytes() + b"\0\0\0\n")  # of the last line, length alone reached the disk
    state = json.loads(cursor.read_text())
    cursor.write_text(json.dumps(state | {"offset": size + 5000, "deferred": [size, size + 4, size + 300]}))
    with caplog.at_level(logging.WARNING):
        tracker = opened(tmp_path)
        tracker.log_metrics("new", {"loss/total": 2.0}, 2)
        assert tracker.close(20.0)
    assert points(tmp_path, "loss/total") == [(1, 1.0), (2, 2.0)]
    assert json.loads(cursor.read_text())["deferred"] == []
    assert "skipped a line that is damaged" in caplog.text and "does not take events" not in caplog.text
