"""What a run needs beside config, data and models, looked at before anything is spent: storage, MLflow, memory of a GPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from launch.parts import shuffle_of
from launch.plan import refusal
from launch.prepare import Prepared
from lce_dist import planning
from lce_dist.config import Config
from lce_dist.errors import ConfigError, SetupError
from lce_dist.mlflow_client import redact
from lce_dist.tracking import tracking_uri
from lce_dist.world import World
from pipelines.manifest import PackedDataset

_ANSWER_S = 5.0
_GIB = 2**30
# Ray's names of what lce plan knows; its plain "A100" has 40 or 80 GB
_RAY_KINDS = {"H200": "h200", "H100": "h100", "A100-80G": "a100", "L4": "l4"}


def check_writable(root: Path) -> None:
    """Whether runs can be kept below ``root``, which is made. Errors: SetupError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SetupError(
            f"run.dir is {root}; it cannot be written: {error.strerror or error}. Use another --run-dir"
        ) from None


def check_space(config: Config, prepared: Prepared, run_dir: Path) -> None:
    """Whether the checkpoints to come find room. Errors: SetupError."""
    need = checkpoint_bytes(config, prepared) * (config.checkpoint.keep + 1)
    there = sum(path.stat().st_size for path in run_dir.glob("*/checkpoints/*/*") if path.is_file())
    free = shutil.disk_usage(run_dir.parent).free
    if free + there < need:
        raise SetupError(
            f"{run_dir.parent} has {free / _GIB:.1f} GiB free; {config.checkpoint.keep} checkpoints (checkpoint.keep) and the "
            f"one that is being written take {need / _GIB:.1f} GiB. Free space, or use another --run-dir"
        )


def checkpoint_bytes(config: Config, prepared: Prepared) -> int:
    """Of the largest stage: weights and momentum in float32, of the network and of the rows."""
    largest = 0
    for name, plan in prepared.plans.items():
        section = config.old if name == "old" else config.new
        assert section.net is not None, "a stage that is trained has a net"
        rows = plan.num_classes * section.embedding_dim
        cost = planning.net_cost(section.net, section.embedding_dim, config.data.image_size)
        states = 3 if config.head.optimizer == "adamw" else 2
        largest = max(largest, int(8 * cost.num_parameters + 4 * states * rows))
    return largest


def unreachable_tracking(uri: str) -> str | None:
    """Why the tracking server at ``uri`` does not answer now, or None; files and databases are not asked."""
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_ANSWER_S):  # noqa: S310 - http(s) alone
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in (401, 403, 404) else f"it answers {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What is known of the GPUs that ranks would get; of several kinds the smallest."""

    name: str
    memory_bytes: float


def gpu_here() -> Gpu | None:
    """The smallest GPU of this machine; None where there is none."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    smallest = min(found, key=lambda device: device.total_memory, default=None)
    return None if smallest is None else Gpu(smallest.name, float(smallest.total_memory))


def gpu_of_kind(kind: str) -> Gpu:
    """A kind by its name in ``lce plan``. Errors: ConfigError."""
    if kind not in planning.MACHINES:
        raise ConfigError(f"--gpu is {kind!r}; must be one of {', '.join(planning.MACHINES)}")
    return Gpu(kind, planning.MACHINES[kind].memory_bytes)


def gpu_of_cluster(kinds: Iterable[str]) -> Gpu | None:
    """By Ray's names of accelerators (H100, A100-80G); None where one of them says nothing of its memory, or there is no name."""
    known = [_RAY_KINDS.get(kind) for kind in kinds]
    if not known or None in known:
        return None
    return min((gpu_of_kind(kind) for kind in known if kind is not None), key=lambda gpu: gpu.memory_bytes)


def check_plan(
    config: Config, num_classes: int, num_images: int, gpu: Gpu, num_nodes: int, ranks_per_node: int
) -> float:
    """Bytes of a rank's GPU that ``lce plan`` says the new model's training needs. Errors: SetupError when it has fewer."""
    machine = dataclasses.replace(
        planning.MACHINES["h200"], memory_bytes=gpu.memory_bytes
    )  # its rates are of no account
    where = (config, num_classes, num_images, machine, num_nodes, ranks_per_node)
    made = planning.plan(*where)
    if made.peak_bytes > gpu.memory_bytes:  # what only just fits is tried
        raise refusal(dataclasses.replace(made, machine=gpu.name), planning.fixes(*where))
    return made.peak_bytes


def check_gpu_memory(config: Config, num_classes: int, num_images: int, world: World) -> None:
    """Whether this rank's GPU holds what ``lce plan`` says of the new model's training. Errors: SetupError."""
    if world.device.type != "cuda":
        return
    device = torch.cuda.get_device_properties(world.device)
    gpu = Gpu(device.name, float(device.total_memory))
    check_plan(config, num_classes, num_images, gpu, world.num_nodes, max(1, world.size // world.num_nodes))


def memory_note(
    config: Config, sizes: tuple[int, int] | None, uses_gpus: bool, gpu: Gpu | None, num_nodes: int, ranks_per_node: int
) -> str:
    """What can be said of GPU memory before a GPU is taken; sizes: identities and images of the new training set.

    Errors: SetupError when the plan does not fit.
    """
    if not uses_gpus:
        return "GPU memory: no GPU is used"
    if config.new.weights is not None:
        return "GPU memory: nothing is trained, since new.weights is given"
    if gpu is None:
        return "GPU memory: not known, and looked at when the workers have their GPUs; --gpu KIND names what they are"
    if sizes is None:
        return "GPU memory: not known, since the data cannot be counted from here; lce plan says it for --classes and --images"
    need = check_plan(config, *sizes, gpu, num_nodes, ranks_per_node)
    return f"GPU memory: a rank needs {need / 1e9:.1f} GB by lce plan; {gpu.name} has {gpu.memory_bytes / 1e9:.1f} GB"


def notes(config: Config, default_store: Path, dataset: PackedDataset) -> Iterator[str]:
    """What a person should know and the run does without. Errors: ConfigError for a store of no kind."""
    uri = tracking_uri(config.tracking, default_store)
    why = unreachable_tracking(uri)
    if why is not None:
        yield (
            f"MLflow at {redact(uri)} does not answer ({redact(why)}); what it should know is kept in the run and sent when "
            "it does"
        )
    if shuffle_of(config.data, dataset) == "blocks" and dataset.manifest.shuffled is False:
        yield (
            f"data.shuffle is blocks, and {dataset.directory} lies in an order of its own (shuffled: false in its manifest), so "
            f"that a batch mixes neighbours of {config.data.shuffle_lanes} x {config.data.shuffle_window} shards: few identities. "
            "Import or merge it into shards of our own, or take data.shuffle = 'global'"
        )
    if dataset.is_remote and config.data.sampling != "uniform":
        yield (
            f"data.sampling is {config.data.sampling!r}, which reads all shards at random, and they lie at a URL: give "
            f"cluster.cache_gib ({config.cluster.cache_gib:g}) room for all of them, or shards are fetched again and again"
        )
