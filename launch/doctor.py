"""What is wrong with this machine before a run finds out: one line a thing, with the remedy."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import os
import re
import resource
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from lce_dist.config import Config
from lce_dist.mlflow_client import redact
from lce_dist.tracking import tracking_uri

State = Literal["ok", "warn", "bad"]
_GIB = 1 << 30
_LEAST_SHM_BYTES, _LEAST_DISK_BYTES = 1 * _GIB, 5 * _GIB
_LEAST_FILES = 4096
_FULL_DISK = 0.95  # above it Ray refuses to store objects
_CLOCK_S = 2.0
_ANSWER_S = 5.0
_LONGEST_VALUE = 160
_RAY_CLUSTER_FILE = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - where Ray keeps it
_PACKAGES = ("torch", "deepspeed", "ray", "nvidia-dali-cuda130", "webdataset", "mlflow", "triton", "numpy")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; remedy is empty when it is well."""

    name: str
    state: State
    value: str
    remedy: str = ""


def examine_machine(config: Config) -> Iterator[Finding]:
    """Look at one thing after the other; a look that fails itself is a finding, too. Takes seconds."""
    looks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("packages", _packages),
        ("GPU", lambda: _gpus(config)),
        ("DALI", _dali),
        ("memory", _memory),
        ("files", _limits),
        ("storage", lambda: _storage(config)),
        ("data", lambda: _data(config)),
        ("Ray", _ray),
        ("MLflow", lambda: _mlflow(config)),
    )
    for name, look in looks:
        try:
            yield from look()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are still looked at
            words = redact(str(error).strip().partition("\n")[0]) or type(error).__name__
            yield Finding(name, "bad", words[:_LONGEST_VALUE], "the look itself failed; mend that and run it again")


def _packages() -> Iterator[Finding]:
    asked: list[str] = []
    wanted: dict[str, str] = {}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout that was not installed
        asked = importlib.metadata.requires("lce-dist") or []
    for line in asked:
        requirement, _, marker = line.partition(";")
        found = re.fullmatch(r"([A-Za-z0-9_.-]+)(\[[^\]]*\])?\s*>=\s*([0-9.]+).*", requirement.strip())
        if found and "extra" not in marker:
            wanted[found[1].lower()] = found[3]
    told, missing, old = [], [], []
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        told.append(f"{name} {version}")
        if name in wanted and _numbers(version) < _numbers(wanted[name]):
            old.append(f"{name} {version}, asked {wanted[name]}")
    if missing or old:
        yield Finding(
            "packages", "bad", "; ".join([*(f"{name} is missing" for name in missing), *old]), "launch/setup.sh"
        )
    else:
        yield Finding("packages", "ok", ", ".join(told))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _gpus(config: Config) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(number)}, {torch.cuda.mem_get_info(number)[0] / _GIB:.0f} GiB free"
            for number in range(torch.cuda.device_count())
        ]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        yield Finding("GPU", "ok", f"{'; '.join(names)}; CUDA {torch.version.cuda}, NCCL {nccl}")
    elif shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        built = torch.version.cuda or "none: a build for CPUs"
        yield Finding(
            "GPU",
            "bad",
            f"there is one, and torch {torch.__version__} does not see it (built for CUDA {built})",
            "install a torch for the driver's CUDA (requirements/torch.txt); in a container ask for nvidia.com/gpu",
        )
    elif config.cluster.device == "gpu":
        yield Finding(
            "GPU",
            "bad",
            "none, and cluster.device is 'gpu'",
            'set cluster.device = "auto", or go to a machine with one',
        )
    else:
        yield Finding("GPU", "ok", "none; everything runs on the CPU")


def _dali() -> Iterator[Finding]:
    import numpy as np
    import torch
    from PIL import Image

    from pipelines.dali import Decoder, EncodedBatch

    held = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 60, 20)).save(held, "JPEG", quality=95)
    jpeg = np.frombuffer(held.getvalue(), dtype=np.uint8)
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        batches = iter([EncodedBatch([jpeg], None), None])
        decoder = Decoder(functools.partial(next, batches), 1, 32, None, torch.device(device), 1, 1)
        try:
            images = decoder.next()
        finally:
            decoder.close()
        assert images is not None
        red = float((images[0, 0].float().mean().cpu() + 1.0) * 127.5)
        well = abs(red - 200.0) < 4.0
        yield Finding(
            f"DALI on {device}",
            "ok" if well else "bad",
            "decodes a JPEG as it is" if well else f"a JPEG of red 200 comes out as {red:.0f}",
            "" if well else "install the nvidia-dali that requirements/lock.txt names",
        )


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit, cores = _cgroup_memory(), len(os.sched_getaffinity(0))
    total = min(memory.total, limit or memory.total)
    yield Finding("memory", "ok", f"{total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} free; {cores} processors")
    if not Path("/dev/shm").is_dir():  # noqa: S108 - Linux's shared memory
        return
    shared = shutil.disk_usage("/dev/shm")  # noqa: S108
    words = f"{shared.total / _GIB:.2f} GiB in /dev/shm, {shared.free / _GIB:.2f} free"
    if shared.free < _LEAST_SHM_BYTES:
        remedy = "in Kubernetes mount an emptyDir with medium Memory there; docker run --shm-size=8g"
        yield Finding("shared memory", "warn", words, remedy)
    else:
        yield Finding("shared memory", "ok", words)


def _cgroup_memory() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return None


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        remedy = f"ulimit -n {min(65536, hard) if hard != resource.RLIM_INFINITY else 65536}"
        yield Finding("open files", "warn", f"{soft} at most (ulimit -n)", remedy)
    else:
        yield Finding("open files", "ok", f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} at most")


def _storage(config: Config) -> Iterator[Finding]:
    folder = Path(config.run.dir).resolve()
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    probe = there / f".lce-doctor-{uuid.uuid4().hex}"
    try:
        before = time.time()
        with probe.open("wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        written_s, renamed = probe.stat().st_mtime, probe.with_suffix(".renamed")
        after = time.time()
        probe.rename(renamed)
        renamed.unlink()
    except OSError as error:
        probe.unlink(missing_ok=True)
        yield Finding(
            "run.dir", "bad", f"{there} cannot be written ({error.strerror})", "choose another run.dir, or its owner"
        )
        return
    free = shutil.disk_usage(there)
    words = f"{folder} can be written, {free.free / _GIB:.0f} GiB free"
    full = free.free < _LEAST_DISK_BYTES
    yield Finding("run.dir", "warn" if full else "ok", words, "make room: runs, caches (runs/.cache)" if full else "")
    skew_s = max(before - written_s, written_s - after, 0.0)
    if skew_s > _CLOCK_S:
        yield Finding("clock of run.dir", "warn", f"{skew_s:.0f} s off this machine's", "run NTP on both machines")
    ray_disk = shutil.disk_usage("/tmp")  # noqa: S108 - where Ray keeps its sessions
    used = 1.0 - ray_disk.free / ray_disk.total
    if used > _FULL_DISK:
        yield Finding(
            "disk of /tmp",
            "bad",
            f"{100.0 * used:.0f} % used; Ray stops storing at 95 %",
            "make room, or set RAY_TMPDIR",
        )


def _data(config: Config) -> Iterator[Finding]:
    from lce_dist.config import PLACES

    values = config.model_dump(mode="json")
    for section, key in PLACES:
        value = values[section][key]
        for path in value if isinstance(value, list) else [value]:
            if path is None or "://" in path:
                continue
            if Path(path).exists():
                yield Finding(f"{section}.{key}", "ok", path)
            else:
                yield Finding(f"{section}.{key}", "bad", f"{path} does not exist", "mount it, or correct the config")


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        token = _ray_token()
        yield _answers(
            "RAY_ADDRESS", f"{address.rstrip('/')}/api/version", {"Authorization": f"Bearer {token}"} if token else {}
        )
    elif address:
        yield _connects("RAY_ADDRESS", address)
    if _RAY_CLUSTER_FILE.exists():
        there = _RAY_CLUSTER_FILE.read_text().strip()
        alive = _connects("Ray here", there)
        if alive.state == "ok":
            yield Finding("Ray here", "ok", f"a cluster runs at {there}")
        else:
            yield Finding(
                "Ray here",
                "bad",
                f"{_RAY_CLUSTER_FILE} names {there}, where nothing answers",
                f"rm {_RAY_CLUSTER_FILE}",
            )
    import psutil

    lost = [one for one in psutil.process_iter(["name", "ppid", "uids"]) if _is_lost_raylet(one)]
    if lost:
        numbers = " ".join(str(one.pid) for one in lost)
        yield Finding("Ray here", "warn", f"{len(lost)} raylets whose driver is gone", f"kill {numbers}")
    elif not address and not _RAY_CLUSTER_FILE.exists():
        yield Finding("Ray", "ok", "no cluster given; runs start their own nodes here")


def _is_lost_raylet(process: object) -> bool:
    facts = process.info  # type: ignore[attr-defined]
    return (
        facts["name"] == "raylet"
        and facts["ppid"] == 1
        and facts["uids"].real == os.getuid()
        and not _RAY_CLUSTER_FILE.exists()
    )


def _ray_token() -> str | None:
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return None


def _connects(name: str, address: str) -> Finding:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host or "127.0.0.1", int(port)), timeout=_ANSWER_S):
            return Finding(name, "ok", f"{address} answers")
    except (OSError, ValueError) as error:
        return Finding(name, "bad", f"{address} does not answer ({error})", "start it, or correct the address")


def _mlflow(config: Config) -> Iterator[Finding]:
    uri = tracking_uri(config.tracking, Path(config.run.dir))
    if not uri.startswith(("http://", "https://")):
        yield Finding("MLflow", "ok", f"{redact(uri)}, a database; no server is needed")
        return
    yield _answers("MLflow", f"{uri.rstrip('/')}/health", {})


def _answers(name: str, url: str, headers: dict[str, str]) -> Finding:
    """Whether a server answers, and how far its clock is from ours."""
    shown = redact(url)
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_ANSWER_S) as answer:  # noqa: S310 - http(s) by the callers
            said = answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        words = {401: "asks for a login", 403: "refuses this login"}.get(error.code, f"answers {error.code}")
        remedy = (
            "set RAY_AUTH_TOKEN"
            if name == "RAY_ADDRESS"
            else "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
        return Finding(
            name, "bad", f"{shown} {words}", remedy if error.code in (401, 403) else "look at the server's log"
        )
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(
            name, "bad", f"{shown} does not answer ({redact(str(reason))})", "start it, or correct the address"
        )
    if said is not None:
        skew_s = abs(parsedate_to_datetime(said).timestamp() - time.time())
        if skew_s > _CLOCK_S + 1.0:  # its clock is told in whole seconds
            return Finding(
                name, "warn", f"{shown} answers; its clock is {skew_s:.0f} s off", "run NTP on both machines"
            )
    return Finding(name, "ok", f"{shown} answers")
