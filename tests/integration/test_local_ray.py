"""Ray's nodes of a local run: reached from this machine alone and with the run's token alone; a signal while they start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import CHECKOUT, Workplace, wait_for, workers_of

STRANGER = """
import os, sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
    print("ran", ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote()))
except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
    print("refused", type(error).__name__)
"""


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    driver = psutil.Process(process.pid)
    return [driver, *driver.children(recursive=True)]


def part_of(process: subprocess.Popen[str], word: str) -> psutil.Process | None:
    for one in family_of(process):
        try:
            if any(word in part for part in one.cmdline()[:1]):
                return one
        except psutil.NoSuchProcess:
            continue
    return None


def listeners(process: subprocess.Popen[str]) -> dict[tuple[str, int], str]:
    """Address and port of all that the run's processes listen on, and whose it is."""
    found = {}
    for one in family_of(process):
        try:
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.ip, connection.laddr.port] = one.name()
        except psutil.NoSuchProcess:
            continue
    return found


def stranger(address: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, address],
        env={**kept, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_who_has_no_token_or_is_elsewhere_reaches_nothing(workplace: Workplace, tmp_path: Path) -> None:
    # a home that cannot be written: the token needs no file in it
    process = workplace.start(
        "train",
        "--config",
        "gn.toml",
        "--nodes",
        "2",
        "--name",
        "alone",
        "--set",
        "new.epochs=4000.0",
        HOME="/proc/self",
    )
    try:
        log = workplace.folder / "runs" / "alone" / "old" / "batch_ids.tsv"
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 2, process, 200)
        heard = listeners(process)
        assert len(workers_of(process)) == 2
        assert "gcs_server" in heard.values() and len(heard) > 10
        assert {ip for ip, _ in heard} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, heard
        port = next(port for (_, port), name in heard.items() if name == "gcs_server")
        raylet = part_of(process, "raylet/raylet")
        assert raylet is not None
        token = raylet.environ()["RAY_AUTH_TOKEN"]
        address = f"127.0.0.1:{port}"
        for environment in (
            {"RAY_AUTH_MODE": "disabled"},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "e" * 64},
            {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)},
        ):
            said = stranger(address, **environment)
            assert "refused" in said and "ran " not in said, said
        assert "ran " in stranger(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token), "or the test shows nothing"
        assert token not in "".join(
            path.read_text(errors="replace") for path in log.parents[1].rglob("*") if path.is_file()
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 5
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after", ["gcs_server", "raylet/raylet"])
def test_a_signal_while_ray_starts_is_one_line_and_5(workplace: Workplace, number: signal.Signals, after: str) -> None:
    process = workplace.start("train", "--config", "gn.toml", "--nodes", "2", "--name", "early")
    wait_for(lambda: part_of(process, after) is not None, process, 200)
    started = family_of(process)[1:]
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 5, output
    assert (
        output.splitlines()[-1] == f"lce: stopped by {number.name}; the same command goes on from the last checkpoint"
    )
    assert "Traceback" not in output and "***" not in output
    assert psutil.wait_procs(started, timeout=20)[1] == []


LOOKS = """
import sys, time
from pathlib import Path
import ray
from launch.job import Job
from launch.raytrain import Placement, _Beside
from lce_dist import storage
from lce_dist.config import parse_config
from lce_dist.models.catalog import build_net
from lce_dist.world import World

folder = Path(sys.argv[1])
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
values = {
    "data": {"synthetic": {"identities": 8, "photos_per_identity": 3}, "image_size": 32, "heldout_identities": 2},
    "old": {"net": "tiny8", "embedding_dim": 8},
    "new": {"net": "tiny8", "embedding_dim": 8},
    "head": {"loss": "softmax"},
    "checkpoint": {"evaluate": "always"},
}
config = parse_config(values, "looks", json_mode=True)
job = Job(config, folder / "no data", folder, folder, "f", "e", folder, False, {}, {})
net = build_net("tiny8", 8, 32, seed=3)
tensors = {f"net.weight.{name}": value.detach() for name, value in net.named_parameters()}
tensors |= {f"net.buffer.{name}": value.detach() for name, value in net.named_buffers()}
beside = _Beside(job, Placement(1, 1, False, on_loopback=True))
for step in (1, 2, 3, 4, 5, 6):
    if step != 2:  # one that was removed meanwhile: nothing is looked at, and nothing failed
        storage.save(folder / "new" / "checkpoints" / f"step-{step:08d}", tensors, {"step": step}, World())
    events = list(beside.tell({"type": "checkpoint", "stage": "new", "step": step}))
    begun = beside._running is not None
    while beside._running is not None:
        events += beside.results()
        time.sleep(0.05)
    print(step, begun, [event["text"].partition(":")[0] for event in events], flush=True)
"""


def test_looks_at_checkpoints_that_fail_are_given_up_after_three_in_a_row(tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LOOKS, str(tmp_path)],
        env={**kept, "PYTHONPATH": str(CHECKOUT), "RAY_DISABLE_IMPORT_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    once = "['a checkpoint was not evaluated beside the training; the next one will be']"
    assert done.stdout.splitlines() == [
        f"1 True {once}",
        "2 True []",
        f"3 True {once}",
        f"4 True {once}",
        "5 True ['no more evaluation beside the training, after 3 failures in a row']",
        "6 False []",
    ], done.stdout + done.stderr
