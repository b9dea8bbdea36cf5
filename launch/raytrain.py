"""Ray: local nodes or a given cluster, one TorchTrainer for all stages, and the events that come back.

The door to ray. Ray supervises the workers and restarts them; what they resume from is our own verified
checkpoint, so each attempt of Ray Train gets a name of its own and its snapshot is never read again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import Job, job_from_arguments, run_job, worker_arguments
from lce_dist.errors import LceError, RunError, SetupError

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")

_OBJECT_STORE_BYTES = 80 << 20  # nothing large travels through Ray
_POLL_S = 0.2
_BESIDE_CPUS = 4  # at most, for a look at a checkpoint
_PLACEMENT_ATTEMPTS = 5  # of a minute each; Ray would wait for ever, in silence


@dataclass(frozen=True)
class Placement:
    """How many nodes, how many workers on each, and whether each has a GPU."""

    nodes: int
    workers_per_node: int
    use_gpu: bool

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.workers_per_node


def local_gpus() -> int:
    """GPUs that this machine offers to torch."""
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def local_nodes(placement: Placement) -> Iterator[None]:
    """Start ``placement.nodes`` raylets on this machine and connect; they end with this process, however it ends."""
    import ray
    from ray.cluster_utils import Cluster

    _quiet()
    node = {
        "num_cpus": placement.workers_per_node,
        "num_gpus": placement.workers_per_node if placement.use_gpu else 0,
        "object_store_memory": _OBJECT_STORE_BYTES,
    }
    head = {**node, **_own_gpus(placement, 0), "include_dashboard": False}
    with contextlib.ExitStack() as started:
        with _own_signals():
            cluster = Cluster(initialize_head=True, head_node_args=head)
            started.callback(cluster.shutdown)
            for number in range(1, placement.nodes):
                cluster.add_node(wait=False, **node, **_own_gpus(placement, number))
            cluster.wait_for_nodes()
            started.callback(ray.shutdown)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray's nodes and ray.init take SIGTERM over; whoever asked to be told of signals gets them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    # a signal in between is Ray's; it ends this process, and the nodes with it
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _own_gpus(placement: Placement, node: int) -> dict[str, Any]:
    """Each raylet on this machine sees its own GPUs alone; otherwise all of them would hand out the first."""
    if not placement.use_gpu:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(local_gpus())]
    first = node * placement.workers_per_node
    return {"env_vars": {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + placement.workers_per_node])}}


@contextlib.contextmanager
def given_cluster(placement: Placement, address: str = "auto") -> Iterator[None]:
    """Connect to a running cluster and check that it has the nodes and devices asked for."""
    import ray

    _quiet()
    try:
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise SetupError(f"Ray cluster {address} does not answer: {error}. Check RAY_ADDRESS") from None
    try:
        resource = "GPU" if placement.use_gpu else "CPU"
        fitting = _nodes_with(resource, placement)
        if fitting < placement.nodes:
            raise SetupError(
                f"--nodes is {placement.nodes}; the cluster has {fitting} nodes with at least "
                f"{placement.workers_per_node} {resource}. Use --nodes {fitting} or add nodes"
            )
        yield
    finally:
        ray.shutdown()


def cluster_has_gpus(placement: Placement) -> bool:
    """Whether enough nodes of the connected cluster have a GPU for each of their workers."""
    return _nodes_with("GPU", placement) >= placement.nodes


def _nodes_with(resource: str, placement: Placement) -> int:
    import ray

    return sum(n["Alive"] and n["Resources"].get(resource, 0) >= placement.workers_per_node for n in ray.nodes())


def train_on_ray(job: Job, placement: Placement) -> Iterator[dict[str, Any]]:
    """Run the job's workers and yield their events until they end.

    A worker or node that dies is restarted, all workers together, up to ``cluster.max_failures`` times.
    Errors: our own errors from a worker as they are (never retried); RunError for anything else.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    shutil.rmtree(job.run_dir / "ray", ignore_errors=True)  # of earlier attempts; nothing is read from it
    # on the driver's node: it must not go when a worker's node goes
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote
    mailbox = remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()
    arguments = {**worker_arguments(job), "mailbox": mailbox, "use_gpu": placement.use_gpu, "nodes": placement.nodes}
    trainer = TorchTrainer(
        _worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(backend="nccl" if placement.use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=placement.num_ranks,
            use_gpu=placement.use_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if placement.use_gpu else {})},
            placement_strategy="STRICT_SPREAD" if placement.workers_per_node == 1 else "PACK",
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:12]}",
            storage_path=str(job.run_dir / "ray"),
            failure_config=FailureConfig(
                max_failures=job.config.cluster.max_failures,
                controller_failure_limit=_PLACEMENT_ATTEMPTS,  # type: ignore[call-arg]
            ),
            worker_runtime_env={"env_vars": _worker_environment(placement)},
        ),
    )
    outcome: queue.Queue[BaseException | None] = queue.Queue()

    def fit() -> None:
        try:
            trainer.fit()
            outcome.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that can act on it
            outcome.put(error)

    beside = _Beside(job, placement)
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    fatal: LceError | None = None
    while True:
        ended = not thread.is_alive()
        for event in ray.get(mailbox.take.remote()):
            if event["type"] == "fatal":
                fatal = _error_of(event)
            else:
                yield event
                yield from beside.tell(event)
        yield from beside.results()
        if fatal is not None:
            raise fatal
        if ended:
            break
        time.sleep(_POLL_S)
    beside.stop()
    error = outcome.get()
    if error is not None:
        log = job.run_dir / "failure.log"
        log.write_text(str(error))
        raise RunError(
            f"the workers could not be placed, or failed more than cluster.max_failures "
            f"({job.config.cluster.max_failures}) times: {_last_line(error)}. All of it is in {log}; "
            "the same command goes on from the last checkpoint"
        )


class _Beside:
    """Evaluations of checkpoints, one at a time, as Ray tasks that never hold up the training; the newest one counts."""

    def __init__(self, job: Job, placement: Placement) -> None:
        self._job, self._placement = job, placement
        self._mode = job.config.checkpoint.evaluate if not job.config.compat.maps_only else "off"
        self._running: Any = None
        self._due: int | None = None
        self._seen = 0

    def tell(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Take note of a checkpoint; start a look at it when none is under way."""
        if self._mode == "off" or event["type"] != "checkpoint" or event["stage"] != "new":
            return
        self._seen += 1
        if (self._seen - 1) % self._job.config.checkpoint.evaluate_every == 0:
            self._due = event["step"]
            yield from self._start()

    def results(self) -> Iterator[dict[str, Any]]:
        """Events of looks that have ended."""
        import ray

        if self._running is None or not ray.wait([self._running], timeout=0)[0]:
            return
        running, self._running = self._running, None
        try:
            found = ray.get(running)
        except ray.exceptions.RayError as error:
            self._mode = "off"  # whatever it is, it would come again
            yield {"type": "warning", "text": f"no more evaluation beside the training: {_last_line(error)}"}
            return
        if found is not None:
            yield {"type": "beside", "stage": "new", **found}
        yield from self._start()

    def stop(self) -> None:
        """End what is still under way: the run's own evaluation has said more."""
        import ray

        if self._running is not None:
            ray.cancel(self._running, force=True)

    def _start(self) -> Iterator[dict[str, Any]]:
        import ray

        if self._due is None or self._running is not None:
            return
        free = int(ray.available_resources().get("CPU", 0))
        if self._mode == "auto" and free < 1:
            self._mode = "off"
            yield {
                "type": "note",
                "stage": "new",
                "text": "checkpoints are not evaluated beside the training: no processor is free "
                '(checkpoint.evaluate = "always" shares one)',
            }
            return
        step, self._due = self._due, None
        num_cpus = min(free, _BESIDE_CPUS) if self._mode == "auto" else 0
        environment = {**_worker_environment(self._placement), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        remote: Any = ray.remote
        task = remote(num_cpus=num_cpus, max_retries=0, runtime_env={"env_vars": environment})(_look)
        self._running = task.remote(worker_arguments(self._job), step, max(1, num_cpus))


def _look(arguments: dict[str, Any], step: int, num_threads: int) -> dict[str, Any] | None:
    """Runs in a process of its own: one checkpoint, evaluated at the lowest priority."""
    import torch

    from launch.beside import look

    os.nice(19)
    torch.set_num_threads(num_threads)
    found = look(job_from_arguments(arguments), step)
    return None if found is None else {"step": step, "metrics": found.metrics(), "warning": found.warning}


class _Mailbox:
    """An actor that holds events until the driver takes them; writers never wait for it."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


def _worker(arguments: dict[str, Any]) -> None:
    """Runs in each worker process: makes the World, runs the job, sends what the first rank reports."""
    import ray
    import ray.train
    import torch

    from lce_dist.world import World

    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if arguments["use_gpu"] else torch.device("cpu")
    world = World(context.get_world_rank(), context.get_world_size(), arguments["nodes"], device)
    mailbox = arguments["mailbox"]

    def report(event: dict[str, Any]) -> None:
        if world.is_first:
            mailbox.put.remote(event)

    report({"type": "workers_up", "num_ranks": world.size})
    try:
        run_job(job_from_arguments(arguments), world, report)
    except LceError as error:
        # retrying cannot help: the driver is told first, then this attempt ends for all ranks
        fatal = {"type": "fatal", "name": type(error).__name__, "text": str(error)}
        ray.get(mailbox.put.remote(fatal))
        raise


def _error_of(event: dict[str, Any]) -> LceError:
    import lce_dist.errors

    error: LceError = getattr(lce_dist.errors, event["name"], RunError)(event["text"])
    return error


def _worker_environment(placement: Placement) -> dict[str, str]:
    values = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        "PYTHONWARNINGS": "ignore",
    }
    if not placement.use_gpu:
        values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return values


def _quiet() -> None:
    for name in ("ray", "ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
