"""Nodes that go and come, and a worker that hangs, in one run on real Ray nodes with raylets of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from launch.job import _seed_of
from launch.parts import open_parts, training_order
from launch.starts import read_starts
from lce_dist.config import load_config
from lce_dist.training.checkpoint import committed_steps
from pipelines.manifest import PackedDataset
from pipelines.order import hash_ids
from tests.integration.conftest import Workplace, wait_for, workers_of

MEMORY = {"object_store_memory": 80 << 20}
FOLLOWED = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without processors and two nodes of one each."""
    for key in FOLLOWED:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MEMORY})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **MEMORY)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


def training_workers(near: str) -> list[psutil.Process]:
    """Workers of Ray Train on this machine whose raylet belongs to the cluster at ``near``."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" not in " ".join(process.info["cmdline"] or []):
            continue
        try:
            parent = process.parent()
            if parent is not None and near in " ".join(parent.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:  # of another cluster, that ends just now
            continue
    return found


def test_a_worker_hangs_a_node_is_lost_and_another_comes(workplace: Workplace, nodes: Cluster) -> None:
    settings = [
        "new.epochs=2000.0",
        "faults.stall_note_s=20",
        "faults.collective_timeout_s=20",
        "checkpoint.every_steps=40",
    ]
    config = load_config(workplace.folder / "gn.toml", settings)
    said = workplace.folder / "elastic.log"
    run = workplace.folder / "runs" / "elastic"
    log = run / "new" / "batch_ids.tsv"
    arguments = ["job", "--config", "gn.toml", "--name", "elastic", "--nodes", "1:2"]
    for setting in settings:
        arguments += ["--set", setting]
    environment = {**workplace.environment(), "RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"}
    with said.open("w") as to:
        process = subprocess.Popen(
            workplace.command(*arguments),
            cwd=workplace.folder,
            env=environment,
            stdout=to,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:

        def steps() -> int:
            return len(log.read_text().splitlines()) if log.exists() else 0

        def until(words: str, more: int, times: int = 1) -> None:
            """Until it is said so often, and so many steps are done after that."""
            wait_for(lambda: len(re.findall(words, said.read_text())) >= times, process, 300)
            done = steps()
            wait_for(lambda: steps() > done + more or steps() < done, process, 300)

        wait_for(lambda: steps() > 60, process, 200)
        frozen = training_workers(nodes.address)[-1]
        os.kill(frozen.pid, signal.SIGSTOP)
        until(rf"\(.*pid {frozen.pid}\) is ended: no step for", 0)
        assert re.findall(r"pid (\d+)\) is ended", said.read_text()) == [str(frozen.pid)], "an innocent worker"
        named = rf"no step for \d+ s: rank \d \(.*pid {frozen.pid}\) has not been heard of"
        assert re.search(named, said.read_text()), said.read_text()
        until("a worker was lost; all of them were restarted", 30)

        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        until("now 1 worker", 30)
        nodes.add_node(num_cpus=1, **MEMORY)
        until("now 2 workers, after 1", 30)

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 5, said.read_text()
    finally:
        process.kill()
        process.wait()
    data = PackedDataset.open(next((workplace.folder / "runs" / ".cache").glob("faces-*/manifest.json")).parent)
    view = open_parts(config.data, Path(), data, None).view("train")
    order = training_order(config, view, _seed_of(config, "new"))
    lines = log.read_text().splitlines()
    assert len(lines) > 150
    truth = [view.sample_ids[order.batch(step)] for step in range(len(lines))]
    assert lines == [f"{step}\t{len(ids)}\t{hash_ids(ids)}" for step, ids in enumerate(truth)]
    points = workplace.losses("elastic", "new")
    assert set(range(10, max(points) + 1, 10)) <= points.keys(), "a gap in the metrics"


def test_failures_end_a_run_only_without_a_new_checkpoint_between(workplace: Workplace) -> None:
    """Each kill falls after the workers of an attempt are up: before that it would be a failure to place them."""
    settings = ("--set", "cluster.max_failures=1", "--set", "old.epochs=1.0", "--set", "new.epochs=4000.0")
    settings += ("--set", "checkpoint.every_steps=300")  # seconds, so that the last kills leave no time for one
    run = workplace.folder / "runs" / "often"
    process = workplace.start("train", "--config", "gn.toml", "--name", "often", *settings)

    def told(what: str) -> int:
        return sum(one["what"] == what for one in read_starts(run))

    def newest() -> int:
        return max(committed_steps(run / "new" / "checkpoints"), default=0)

    try:
        for failures in (1, 2):  # each after a checkpoint of its own
            before = newest()
            wait_for(lambda before=before: newest() > before, process, 300)
            attempts = told("workers_up")
            for worker in workers_of(process):
                worker.kill()
            wait_for(lambda failures=failures: told("failure") == failures, process, 300)
            wait_for(lambda attempts=attempts: told("workers_up") > attempts, process, 300)
        last = newest()
        for worker in workers_of(process):  # the second in a row
            worker.kill()
        output = process.communicate(timeout=300)[0]
        assert newest() == last, "a checkpoint was written between the last two failures"
        assert process.returncode == 1, output
        assert "failed 2 times without a new checkpoint between (cluster.max_failures is 1)" in output, output
    finally:
        process.kill()
        process.wait()
