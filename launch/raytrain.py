"""Ray: local nodes or a given cluster, one TorchTrainer for all stages, and the events that come back.

The door to ray. Ray supervises the workers and restarts them; what they resume from is our own verified
checkpoint, so each attempt of Ray Train gets a name of its own and its snapshot is never read again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import queue
import secrets
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.failures import InARow
from launch.job import Job, job_from_arguments, run_job, worker_arguments
from launch.pulse import Place, Pulse, Stall, missing, whom_it_waits_for
from launch.starts import Starts
from lce_dist.errors import Interrupted, LceError, RunError, SetupError
from lce_dist.training.checkpoint import committed_steps
from lce_dist.training.requests import SAVE_FILE

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")

_OBJECT_STORE_BYTES = 80 << 20  # nothing large travels through Ray
_NODES_UP_S = 120.0
_POLL_S = 0.2
_DRAIN_POLL_S = 2.0
_RESIZE_S = 30.0  # between two looks for nodes that have come, in an elastic run
_BESIDE_CPUS = 4  # at most, for a look at a checkpoint
_BESIDE_FAILURES = 3  # in a row, and no more looks
_ELASTIC_START_S, _ELASTIC_TIMES = 20, 3
_LOOPBACK = "127.0.0.1"
# Ray's own switch for systems whose firewalls ask: nothing of it listens elsewhere, and an address of the loopback stays one
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_PLACEMENT_ATTEMPTS = 5  # of a minute each; Ray would wait for ever, in silence


GAUGES = {
    "lce_step": "steps of the stage that are done",
    "lce_total_steps": "steps of the stage",
    "lce_step_seconds": "mean time of a step",
    "lce_busy_seconds": "mean time of a step that is neither waiting for data nor in collectives",
    "lce_data_wait_seconds": "mean time a step waited for its batch",
    "lce_communication_seconds": "mean time of a step in collectives, waiting for other ranks included",
    "lce_memory_bytes": "peak memory: of the GPU, or resident where there is none",
    "lce_images_per_second": "images of all ranks, since the stage was started or gone on with",
    "lce_steps_lost": "steps left out because they were not finite",
    "lce_loss_total": "loss of a global batch",
    "lce_loss_classification": "its classification part",
    "lce_loss_alignment": "its alignment part, before its weight",
    "lce_loss_boundary": "its boundary part, before its weight",
}


@dataclass(frozen=True)
class Placement:
    """How many nodes (at least and at most), how many workers on each, and whether each has a GPU."""

    nodes: int
    workers_per_node: int
    use_gpu: bool
    min_nodes: int | None = None  # where a run may go on with fewer
    on_loopback: bool = False  # all of it on this machine

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.workers_per_node

    @property
    def least_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @property
    def is_elastic(self) -> bool:
        return self.least_nodes < self.nodes


def local_gpus() -> int:
    """GPUs that this machine offers to torch."""
    import torch

    return torch.cuda.device_count()


@contextlib.contextmanager
def local_nodes(placement: Placement) -> Iterator[None]:
    """Start ``placement.nodes`` raylets on this machine and connect; they end with this process, however it ends.

    All of it listens on the loopback alone and asks for a token that nobody else has: who reaches Ray can run code as this user.
    Errors: SetupError when they do not come up in time; Interrupted for a signal that comes meanwhile.
    """
    with contextlib.ExitStack() as started:
        started.enter_context(_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_token(), **_ON_LOOPBACK))
        import ray
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        ray_constants.ENABLE_RAY_CLUSTER = False  # what the environment says, where ray was imported before
        _quiet()
        node: dict[str, Any] = {
            "num_cpus": placement.workers_per_node,
            "num_gpus": placement.workers_per_node if placement.use_gpu else 0,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "node_ip_address": _LOOPBACK,
        }
        cluster = Cluster()
        with _own_signals() as signals:
            started.callback(cluster.shutdown)
            try:
                cluster.add_node(**node, **_own_gpus(placement, 0), include_dashboard=False)
                for number in range(1, placement.nodes):
                    if not signals:
                        cluster.add_node(wait=False, **node, **_own_gpus(placement, number))
                if not signals:
                    cluster.wait_for_nodes(_NODES_UP_S)
            except Exception as error:  # Ray has no kind of its own for a node that comes too late
                raise SetupError(
                    f"{placement.nodes} Ray nodes did not start on this machine: {_last_line(error)} Its load is "
                    f"{os.getloadavg()[0]:.0f} on {os.cpu_count()} processors: try again when it is less, or with fewer --nodes"
                ) from error
            if not signals:
                started.callback(ray.shutdown)
                _connect(cluster.address)
        yield


@functools.cache
def _token() -> str:
    """One a process: Ray reads it once."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """``values`` in the environment, for all that is started in the block; a token's file of the user's own is left out."""
    before = {name: os.environ.get(name) for name in (*values, "RAY_AUTH_TOKEN_PATH")}
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _own_signals() -> Iterator[list[int]]:
    """Ray's nodes and ray.init take SIGTERM over: in the block they cannot, and signals are kept in the list that comes with it.

    At its end whoever asked to be told of signals gets them back, with those that came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    setter = signal.signal
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        setter(number, lambda number, frame: came.append(number))
    signal.signal = lambda number, handler: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield came
    except Exception:
        if not came:  # what went wrong then may be by the signal
            raise
    finally:
        signal.signal = setter
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
    if came:
        handler = handlers[signal.Signals(came[0])]
        if callable(handler):
            handler(came[0], None)
        raise Interrupted(
            f"stopped by {signal.Signals(came[0]).name}; the same command goes on from the last checkpoint"
        )


def _connect(address: str) -> None:
    """In a block of ``_own_signals``: Ray's core sets handlers by itself, so signals wait until that block has ended."""
    import ray

    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


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
            _connect(address)
    except ConnectionError as error:
        raise SetupError(f"Ray cluster {address} does not answer: {error}. Check RAY_ADDRESS") from None
    try:
        resource = "GPU" if placement.use_gpu else "CPU"
        fitting = _nodes_with(resource, placement)
        if fitting < placement.least_nodes:
            raise SetupError(
                f"--nodes asks for {placement.least_nodes}; nodes of the cluster with at least "
                f"{placement.workers_per_node} {resource}: {fitting}. Add nodes"
                + (f" or use --nodes {fitting}" if fitting else "")
            )
        yield
    finally:
        ray.shutdown()


def cluster_has_gpus(placement: Placement) -> bool:
    """Whether enough nodes of the connected cluster have a GPU for each of their workers."""
    return _nodes_with("GPU", placement) >= placement.least_nodes


def cluster_gpu_kinds(placement: Placement) -> set[str]:
    """Ray's names of the GPUs of nodes that have enough of them, as far as the nodes say."""
    names = {name for node in _fitting_nodes("GPU", placement) for name in node["Resources"]}
    return {name.removeprefix("accelerator_type:") for name in names if name.startswith("accelerator_type:")}


def _nodes_with(resource: str, placement: Placement) -> int:
    return len(_fitting_nodes(resource, placement))


def _fitting_nodes(resource: str, placement: Placement) -> list[dict[str, Any]]:
    import ray

    return [n for n in ray.nodes() if n["Alive"] and n["Resources"].get(resource, 0) >= placement.workers_per_node]


def train_on_ray(job: Job, placement: Placement) -> Iterator[dict[str, Any]]:
    """Run the job's workers and yield their events until they end.

    A worker or node that dies is restarted, all workers together, up to ``cluster.max_failures`` times without a new checkpoint
    between.
    Errors: our own errors from a worker as they are (never retried); RunError for anything else.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    shutil.rmtree(job.run_dir / "ray", ignore_errors=True)  # of earlier attempts; nothing is read from it
    _log_to(job.run_dir / "ray.log")
    if placement.is_elastic:  # Ray first tries with as many nodes as before
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_ELASTIC_START_S))
    # on the driver's node: it must not go when a worker's node goes
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote
    mailbox = remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()
    arguments = {**worker_arguments(job), "mailbox": mailbox, "use_gpu": placement.use_gpu}
    arguments["workers_per_node"] = placement.workers_per_node
    least = placement.least_nodes * placement.workers_per_node
    workers: Any = (least, placement.num_ranks) if placement.is_elastic else placement.num_ranks
    trainer = TorchTrainer(
        _worker,
        train_loop_config=arguments,
        torch_config=(_loopback_config() if placement.on_loopback else TorchConfig)(
            backend="nccl" if placement.use_gpu else "gloo", timeout_s=job.config.faults.collective_timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=_RESIZE_S,  # type: ignore[call-arg]
            use_gpu=placement.use_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if placement.use_gpu else {})},
            placement_strategy="STRICT_SPREAD"
            if placement.workers_per_node == 1 and not placement.is_elastic
            else "PACK",
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:12]}",
            storage_path=str(job.run_dir / "ray"),
            failure_config=FailureConfig(
                max_failures=-1,  # counted here, where progress is seen
                controller_failure_limit=_PLACEMENT_ATTEMPTS * (_ELASTIC_TIMES if placement.is_elastic else 1),  # type: ignore[call-arg]
            ),
            worker_runtime_env={"env_vars": _worker_environment(placement)},
            callbacks=[_failures_to(mailbox)],
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
    watch = _Watch(job, mailbox)
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    fatal: LceError | None = None
    failures, starts = InARow(job.config.cluster.max_failures), Starts(job.run_dir, 0.0)
    saved = _newest_steps(job.run_dir)
    while True:
        ended = not thread.is_alive()
        for event in ray.get(mailbox.take.remote()):
            if event["type"] == "fatal":
                fatal = _error_of(event)
            elif event["type"] == "failure":
                starts.see(event)
                # on the disk: workers that die may not have told of a checkpoint any more
                if (now := _newest_steps(job.run_dir)) != saved:
                    saved = now
                    failures.progressed()
                if failures.failed() and fatal is None:
                    fatal = _given_up(job, event["text"], failures.count)
            else:
                if event["type"] == "stage_done":
                    failures.progressed()
                watch.see(event)
                yield event
                yield from beside.tell(event)
        yield from beside.results()
        yield from watch.notes()
        if fatal is not None:
            raise fatal
        if ended:
            break
        time.sleep(_POLL_S)
    beside.stop()
    error = outcome.get()
    if error is not None:
        log = job.run_dir / "failure.log"
        log.write_text(str(error), encoding="utf-8")
        if watch.drained:
            raise Interrupted(
                f"nodes of this run were drained and no others came in {_PLACEMENT_ATTEMPTS} min; the same command goes on from "
                "the last checkpoint when there are nodes again"
            )
        raise RunError(
            f"the workers could not be placed: {_last_line(error)}. All of it is in {log}; the same command goes on from the "
            "last checkpoint"
        )


def _newest_steps(run_dir: Path) -> dict[str, int]:
    """The newest checkpoint of each stage that has one."""
    found = {path.parent.name: committed_steps(path) for path in run_dir.glob("*/checkpoints")}
    return {stage: steps[0] for stage, steps in found.items() if steps}


def _given_up(job: Job, text: str, count: int) -> RunError:
    log = job.run_dir / "failure.log"
    log.write_text(text, encoding="utf-8")
    return RunError(
        f"the workers failed {count} times without a new checkpoint between (cluster.max_failures is "
        f"{job.config.cluster.max_failures}): {_last_line(text)}. All of it is in {log}; the same command goes on from the last "
        "checkpoint"
    )


def _failures_to(mailbox: Any) -> Any:
    """Tells the driver what ended a group of workers."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            text = "\n".join(f"rank {rank}: {error}" for rank, error in sorted(worker_exceptions.items()))
            mailbox.put.remote({"type": "failure", "text": text})

    return Failures()


class _Beside:
    """Evaluations of checkpoints, one at a time, as Ray tasks that never hold up the training; the newest one counts."""

    def __init__(self, job: Job, placement: Placement) -> None:
        self._job, self._placement = job, placement
        self._mode = job.config.checkpoint.evaluate if not job.config.compat.maps_only else "off"
        self._running: Any = None
        self._due: int | None = None
        self._seen = 0
        self._failures = InARow(_BESIDE_FAILURES - 1)
        self._told_busy = False

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
            if self._failures.failed():
                self._mode = "off"
                what = f"no more evaluation beside the training, after {self._failures.count} failures in a row"
            else:
                what = "a checkpoint was not evaluated beside the training; the next one will be"
            yield {"type": "warning", "text": f"{what}: {_last_line(error)}"}
            return
        self._failures.progressed()
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
            if not self._told_busy:  # it may be otherwise at the next checkpoint
                self._told_busy = True
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


class _Watch:
    """Tells of steps that have ceased, and asks for a checkpoint when a node of this run is about to go."""

    def __init__(self, job: Job, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._save_file = job.run_dir / SAVE_FILE
        self._grace_s = job.config.checkpoint.grace_s
        self._stall = Stall(float(job.config.faults.stall_note_s))
        self._restart_s = float(job.config.faults.collective_timeout_s)
        self._killed: set[int] = set()
        self._ending: dict[Any, str] = {}  # tasks that end a worker, and what to say when one has
        self._asked: dict[str, int] = {}  # node that drains: how often a checkpoint was asked for
        self._polled_s = 0.0
        self.drained = False

    def see(self, event: dict[str, Any]) -> None:
        """Take note of what the first rank reports."""
        self._stall.see(event, time.monotonic())
        if event["type"] == "workers_up":
            self._asked.clear()

    def notes(self) -> Iterator[dict[str, Any]]:
        """What there is to tell now."""
        import ray

        now_s = time.monotonic()
        if self._stall.is_new(now_s):
            whom = whom_it_waits_for(_places(ray.get(self._mailbox.places.remote())))
            yield {"type": "warning", "text": f"no step for {self._stall.seconds(now_s):.0f} s: {whom}"}
        if self._stall.seconds(now_s) > self._restart_s:
            self._restart(now_s)
        yield from self._ended()
        if now_s - self._polled_s >= _DRAIN_POLL_S:
            self._polled_s = now_s
            yield from self._drains()

    def _restart(self, now_s: float) -> None:
        """End the workers that the others wait for; Ray Train then starts all of them again.

        Time-outs of the collectives themselves do not reach those that DeepSpeed makes, nor a process that is frozen.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote: Any = ray.remote
        for place in missing(_places(ray.get(self._mailbox.places.remote()))):
            if place.pid not in self._killed:
                self._killed.add(place.pid)
                there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
                task = remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_end_worker).remote(place.pid)
                text = f"{place.name()} is ended: no step for {self._stall.seconds(now_s):.0f} s (faults.collective_timeout_s)"
                self._ending[task] = text

    def _ended(self) -> Iterator[dict[str, Any]]:
        import ray

        for task in ray.wait([*self._ending], num_returns=len(self._ending), timeout=0)[0] if self._ending else []:
            text = self._ending.pop(task)
            with contextlib.suppress(ray.exceptions.RayError):  # its node has gone, and it with it
                if ray.get(task):
                    yield {"type": "warning", "text": text}

    def _drains(self) -> Iterator[dict[str, Any]]:
        import ray

        draining = _draining_nodes()
        if not draining:
            return
        places = [place for place, _ in _places(ray.get(self._mailbox.places.remote())).values()]
        for node, deadline_ms in draining.items():
            ranks = sorted(place.rank for place in places if place.node_id == node)
            left_s = deadline_ms / 1000.0 - time.time() if deadline_ms else None
            asked = self._asked.get(node, 0)
            # at once, and, where the notice is long, once more near its end
            if not ranks or asked == 2 or (asked == 1 and (left_s is None or not 0.0 < left_s < 2 * self._grace_s)):
                continue
            self._asked[node] = asked + 1
            self.drained = True
            self._save_file.touch()
            if asked == 0:
                until = "" if left_s is None else f" in {max(0.0, left_s):.0f} s"
                host = next(place.host for place in places if place.node_id == node)
                yield {
                    "type": "warning",
                    "text": f"node {host} of rank {ranks[0]} goes{until}: saving a checkpoint now",
                }


def _end_worker(pid: int) -> bool:
    """Whether there was a worker of that number to end."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():  # the number may be somebody else's by now
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def _places(told: dict[int, tuple[dict[str, Any], float]]) -> dict[int, tuple[Place, float]]:
    return {rank: (Place(**place), age_s) for rank, (place, age_s) in told.items()}


def _draining_nodes() -> dict[str, int]:
    """Ids of nodes that were told to go, and when they will be gone (ms since 1970; 0: not said)."""
    import ray

    try:
        # what Ray Train itself asks; there is no public way
        found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    except Exception:  # noqa: BLE001 - the cluster's head does not answer now; training does not depend on it
        return {}
    return found


class _Mailbox:
    """An actor that holds events until the driver takes them, and each worker's place; writers never wait for it."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._places: dict[int, tuple[dict[str, Any], float]] = {}

    def here(self, place: dict[str, Any]) -> None:
        self._places[place["rank"]] = place, time.monotonic()

    def places(self) -> dict[int, tuple[dict[str, Any], float]]:
        return {rank: (place, time.monotonic() - told_s) for rank, (place, told_s) in self._places.items()}

    def put(self, event: dict[str, Any]) -> None:
        if event["type"] == "workers_up":
            self._places.clear()  # of workers that are no more
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


def _worker(arguments: dict[str, Any]) -> None:
    """Runs in each worker process: makes the World, runs the job, sends what the first rank reports."""
    import psutil
    import ray
    import ray.train
    import torch

    from lce_dist.world import World

    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if arguments["use_gpu"] else torch.device("cpu")
    size = context.get_world_size()
    world = World(context.get_world_rank(), size, -(-size // arguments["workers_per_node"]), device)
    mailbox = arguments["mailbox"]

    starts = Starts(Path(arguments["run_dir"]), psutil.Process().create_time())
    gauges = _Gauges(job_from_arguments(arguments).config.run.name, world.rank)

    def report(event: dict[str, Any]) -> None:
        gauges.set(event)
        if world.is_first:
            starts.see(event)
            mailbox.put.remote({key: value for key, value in event.items() if key != "own"})

    report({"type": "workers_up", "num_ranks": world.size})
    node_id = ray.get_runtime_context().get_node_id()
    try:
        with Pulse(world.rank, node_id, lambda place: mailbox.here.remote(place) and None):
            run_job(job_from_arguments(arguments), world, report)
    except LceError as error:
        # retrying cannot help: the driver is told first, then this attempt ends for all ranks
        fatal = {"type": "fatal", "name": type(error).__name__, "text": str(error)}
        ray.get(mailbox.put.remote(fatal))
        raise


class _Gauges:
    """What Prometheus may read of one rank, from Ray's agent on the node, as ``ray_lce_...``."""

    def __init__(self, run: str, rank: int) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run, "rank": str(rank)}
        self._gauges = {
            name: Gauge(name, description=text, tag_keys=("run", "rank", "stage")) for name, text in GAUGES.items()
        }

    def set(self, event: dict[str, Any]) -> None:
        """Take over what an event of the training loop says of this rank."""
        own = event.get("own")
        if own is None:
            return
        values = {
            "lce_step": event["step"],
            "lce_total_steps": event["total_steps"],
            "lce_step_seconds": own.step_s,
            "lce_busy_seconds": own.busy_s,
            "lce_data_wait_seconds": own.data_wait_s,
            "lce_communication_seconds": own.communication_s,
            "lce_memory_bytes": own.memory_bytes,
        }
        if self._tags["rank"] == "0":  # global: one rank tells
            told = event["metrics"]
            values["lce_images_per_second"] = told["speed/images_per_s"]
            values["lce_steps_lost"] = told.get("faults/steps_lost", 0.0)
            values |= {
                f"lce_loss_{name[5:]}": value for name, value in told.items() if f"lce_loss_{name[5:]}" in GAUGES
            }
        for name, value in values.items():
            self._gauges[name].set(value, tags={**self._tags, "stage": event["stage"]})


def _loopback_config() -> Any:
    """TorchConfig, with the store at which ranks meet on the loopback alone; torch's own listens everywhere."""
    from ray.train.torch import TorchConfig

    backend: Any = TorchConfig().backend_cls

    class OnLoopback(backend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_store_on_loopback)
            super().on_start(worker_group, backend_config)

    class LoopbackConfig(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return OnLoopback

    return LoopbackConfig


def _store_on_loopback() -> None:
    """In a worker: the store's server gets a socket that listens on the address it is given."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # a function hides it by that name
    store = rendezvous.TCPStore

    def bound(host_name: str, port: int, is_master: bool, **more: Any) -> Any:
        if is_master:
            more["master_listen_fd"] = socket.create_server((host_name, port), backlog=128).detach()
        return store(host_name=host_name, port=port, is_master=is_master, **more)

    rendezvous.TCPStore = bound


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
    if placement.on_loopback:
        values |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if not placement.use_gpu:
        values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return values


def _quiet() -> None:
    for name in ("ray", "ray.train", "ray.data", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _log_to(path: Path) -> None:
    """What Ray tells of lost nodes and workers, dozens of lines each, goes into a file instead of the terminal."""
    import ray._private.worker as ray_worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    def keep(data: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in data["lines"])

    ray_worker._worker_logs_enabled = False
    global_worker_stdstream_dispatcher.add_handler("lce", keep)


def _last_line(error: BaseException | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
