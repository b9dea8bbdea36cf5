"""One run, seen from the driver: prepare, start Ray, follow the events into terminal and MLflow, print the result."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.gate import conclude_gate, judged_before
from launch.job import BAD_IMAGES_FILE, Job
from launch.preflight import (
    check_space,
    check_writable,
    checkpoint_bytes,
    gpu_here,
    gpu_of_cluster,
    gpu_of_kind,
    memory_note,
    notes,
)
from launch.prepare import Prepared, claim_run_dir, fingerprint_of, prepare
from launch.progress import RunProgress
from launch.raytrain import (
    Placement,
    cluster_gpu_kinds,
    cluster_has_gpus,
    given_cluster,
    local_gpus,
    local_nodes,
    train_on_ray,
)
from launch.report import VERSION, open_report, pairs_table, read_report, result_table
from launch.run_tracking import RunTracking, draw_curves
from launch.runs import LOG_FILE, write_launch
from launch.version import code_version
from lce_dist.config import Config
from lce_dist.errors import ConfigError, Interrupted, LceError, SetupError
from lce_dist.spool import Spool
from lce_dist.tracking import Tracker
from lce_dist.training.fence import begin_attempt
from lce_dist.training.requests import PROFILE_FILE, SAVE_FILE, STOP_FILE

_TOLD = "tracked"  # left in the run directory when MLflow has everything


@dataclass(frozen=True)
class TrainOptions:
    """What the command line adds to a config. min_nodes: with how few the run may go on (None: it needs
    all). check_only: look at everything, train nothing. gpu: what kind the GPUs are, where the cluster does not say it.
    """

    nodes: int
    workers_per_node: int
    with_independent: bool
    fresh: bool
    on_cluster: bool
    min_nodes: int | None = None
    check_only: bool = False
    gpu: str | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--nodes", self.nodes), ("--workers-per-node", self.workers_per_node)):
            if value < 1:
                raise ConfigError(f"{flag} is {value}; must be at least 1")
        if self.min_nodes is not None and not 1 <= self.min_nodes <= self.nodes:
            raise ConfigError(f"--nodes is {self.nodes_text}; the first must be at least 1 and at most the second")

    @property
    def nodes_text(self) -> str:
        """As on the command line."""
        return str(self.nodes) if self.min_nodes is None else f"{self.min_nodes}:{self.nodes}"

    @property
    def possible_ranks(self) -> range:
        """Numbers of ranks that the run may have."""
        least = (self.min_nodes or self.nodes) * self.workers_per_node
        return range(least, self.nodes * self.workers_per_node + 1)

    def placement(self, use_gpu: bool) -> Placement:
        return Placement(self.nodes, self.workers_per_node, use_gpu, self.min_nodes)


def train(config: Config, options: TrainOptions, console: Console) -> dict[str, Any]:
    """Run (or go on with, or just show) the upgrade that ``config`` describes; returns the report.

    Errors: those of ``prepare`` and ``train_on_ray``; Interrupted on Ctrl-C and SIGTERM.
    """
    started_s = time.monotonic()
    root = Path(config.run.dir).resolve()
    config.with_absolute_places()  # refuses places that nothing here could name
    check_writable(root)
    config, run_dir = _settle_run(config, options, root, console)
    num_ranks = options.nodes * options.workers_per_node
    with RunProgress(console) as progress, _Stopping(config.checkpoint.grace_s, progress.note) as stopping:
        prepared = prepare(config, num_ranks, options.with_independent, root / ".cache", progress.count)
        check_space(config, prepared, run_dir)
        for text in notes(config, root, prepared.dataset):
            progress.note(text)
        if options.check_only:
            _tell_checked(config, options, prepared, progress)
            return {}
        if options.fresh:
            _forget(run_dir)
        going_on = claim_run_dir(prepared.identity(config), run_dir)
        progress.keep_in(run_dir / LOG_FILE)
        finished = _is_finished(run_dir / "report.json", options, fingerprint_of(prepared.examination(config)))
        if finished:
            progress.note(f"run {run_dir} finished before; to train it again use --fresh, or another --name")
        elif going_on:
            progress.note(f"going on with run {run_dir}: what is trained stays, the rest is done")
        if not (finished and (run_dir / _TOLD).exists() and _is_judged(run_dir, config)):
            _run(config, options, prepared, run_dir, progress, stopping, finished)
    return _conclude(config, run_dir, console, None if finished else time.monotonic() - started_s)


def _tell_checked(config: Config, options: TrainOptions, prepared: Prepared, progress: RunProgress) -> None:
    split = prepared.split
    progress.note(
        f"data: {len(split.train)} identities to train on, {len(split.heldout)} held out; "
        + "; ".join(f"{name} model: {plan.total_steps} steps" for name, plan in prepared.plans.items())
    )
    size = checkpoint_bytes(config, prepared) / 2**20
    progress.note(f"storage: {config.run.dir} can be written; a checkpoint takes {size:,.0f} MiB")
    if options.on_cluster:
        with _cluster(config, options, progress) as placement:
            progress.note(_memory(config, options, prepared, placement))
    else:
        progress.note(_memory(config, options, prepared, _here(config, options)))
    progress.note("checked: nothing was trained; the same command without --check trains")


def _run(
    config: Config,
    options: TrainOptions,
    prepared: Prepared,
    run_dir: Path,
    progress: RunProgress,
    stopping: _Stopping,
    finished: bool,
) -> None:
    """Train what is left, judge, and tell MLflow; of a finished run only what MLflow has not heard yet."""
    (run_dir / _TOLD).unlink(missing_ok=True)
    (run_dir / "failure.log").unlink(missing_ok=True)
    tracking = RunTracking(Tracker(config.tracking, run_dir, config.run.name, run_dir.parent), run_dir)
    status = "FAILED"
    write_launch(run_dir, config, options.nodes_text, options.workers_per_node, options.with_independent)
    try:
        tracking.open(config, prepared, options.nodes, options.nodes * options.workers_per_node)
        if not finished:
            with _cluster(config, options, progress) as placement:
                _memory(config, options, prepared, placement)
                job = Job(
                    config,
                    prepared.dataset.directory.resolve(),
                    run_dir,
                    run_dir.parent / ".cache",
                    fingerprint_of(prepared.identity(config)),
                    fingerprint_of(prepared.examination(config)),
                    Path.cwd(),
                    options.with_independent,
                    tracking.tracker.run_ids(),
                    tracking.told_steps,
                    code_version(),
                    begin_attempt(run_dir),
                )
                for name in (SAVE_FILE, PROFILE_FILE):  # asked of an earlier driver
                    (run_dir / name).unlink(missing_ok=True)
                with stopping.by(run_dir / STOP_FILE):
                    for event in train_on_ray(job, placement):
                        progress.show(event)
                        tracking.follow(event)
        draw_curves(run_dir)
        _, gate = conclude_gate(run_dir, config, open_report(run_dir))
        tracking.results(config, gate)
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    except LceError as error:
        if not (run_dir / "failure.log").exists():
            (run_dir / "failure.log").write_text(f"{error}\n")
        raise
    finally:
        if tracking.close(status):
            if status == "FINISHED":
                (run_dir / _TOLD).touch()
        else:
            progress.note("MLflow has not taken everything yet; the rest is sent when this run is started again")


def _settle_run(config: Config, options: TrainOptions, root: Path, console: Console) -> tuple[Config, Path]:
    """The run's directory; a finished run asked for on other ranks gets a neighbour and stays as it is."""
    run_dir = root / config.run.name
    num_ranks = options.nodes * options.workers_per_node
    report = None if options.fresh else read_report(run_dir / "report.json")
    if report is not None and report.get("num_ranks", num_ranks) not in options.possible_ranks:
        name = f"{config.run.name}-{options.nodes}x{options.workers_per_node}"
        console.print(
            f"run {run_dir} finished on {report['num_ranks']} ranks and is kept; this one, on {num_ranks}, is {name}"
        )
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        run_dir = root / name
    return config, run_dir


def _forget(run_dir: Path) -> None:
    """Set what this run has done aside, then remove it; a directory that is no run is not touched."""
    if not run_dir.exists():
        return
    if not (run_dir / "config.json").exists():
        raise ConfigError(f"--fresh: {run_dir} holds no config.json, so it is not a run; remove it by hand")
    # the spool's lock is held by a driver that is at work
    Spool(run_dir / "tracking.jsonl").close()
    aside = run_dir.with_name(f"{run_dir.name}.removed-{os.getpid()}")
    run_dir.rename(aside)
    shutil.rmtree(aside)


def _is_finished(report_path: Path, options: TrainOptions, examination: str) -> bool:
    report = read_report(report_path)
    if report is None or (report.get("version"), report.get("examination")) != (VERSION, examination):
        return False  # what is trained stays; it is evaluated anew
    return "independent_new" in report or not options.with_independent


def _is_judged(run_dir: Path, config: Config) -> bool:
    """Whether the verdict that lies there is by the config as it is now, and by nothing else."""
    before = judged_before(run_dir) or {}
    return before.get("gate") == config.gate.model_dump(mode="json") and not before.get("overridden")


@contextmanager
def _cluster(config: Config, options: TrainOptions, progress: RunProgress) -> Iterator[Placement]:
    wanted = config.cluster.device
    nodes: AbstractContextManager[None]
    if options.on_cluster:
        nodes = given_cluster(options.placement(use_gpu=wanted == "gpu"))
        with nodes:
            use_gpu = wanted == "gpu" or (wanted == "auto" and cluster_has_gpus(options.placement(use_gpu=True)))
            yield options.placement(use_gpu)
        return
    placement = _here(config, options)
    progress.note(f"starting {options.nodes} Ray nodes, {options.workers_per_node} worker(s) each, on this machine")
    with local_nodes(placement):
        yield placement


def _here(config: Config, options: TrainOptions) -> Placement:
    """Where workers of this machine would be. Errors: SetupError where GPUs are asked for that it does not have."""
    ranks, wanted = options.nodes * options.workers_per_node, config.cluster.device
    gpus = local_gpus() if wanted != "cpu" else 0
    if wanted == "gpu" and gpus < ranks:
        raise SetupError(f"cluster.device is 'gpu'; this machine has {gpus} GPUs and {ranks} workers need one each")
    return replace(options.placement(use_gpu=gpus >= ranks), on_loopback=True)


def _memory(config: Config, options: TrainOptions, prepared: Prepared, placement: Placement) -> str:
    """What is known of GPU memory before a worker has a GPU. Errors: SetupError when the plan does not fit."""
    gpu = None
    if options.gpu is not None:
        gpu = gpu_of_kind(options.gpu)
    elif placement.use_gpu:
        gpu = gpu_of_cluster(cluster_gpu_kinds(placement)) if options.on_cluster else gpu_here()
    plan = prepared.plans.get("new")
    sizes = None if plan is None else (plan.num_classes, plan.num_samples)
    return memory_note(config, sizes, placement.use_gpu, gpu, placement.nodes, placement.workers_per_node)


_VERDICTS: dict[bool | None, tuple[str, str]] = {
    True: ("met", "green"),
    False: ("not met", "red"),
    None: ("not judged", "yellow"),
}


def _conclude(config: Config, run_dir: Path, console: Console, took_s: float | None) -> dict[str, Any]:
    report = open_report(run_dir)
    console.print(result_table(report))
    if (pairs := pairs_table(report)) is not None:
        console.print(pairs)
    word, colour = _VERDICTS[report["criterion_met"]]
    console.print(
        f"criterion [{colour}]{word}[/{colour}]: {' '.join(report['reasons'])}", highlight=False, soft_wrap=True
    )
    _show_gate(run_dir, console)
    if took_s is not None:
        minutes, seconds = divmod(round(took_s), 60)
        console.print(
            f"took {minutes} min {seconds} s; the new model trained at {report['images_per_s']:.0f} images/s",
            highlight=False,
        )
    bad = run_dir / BAD_IMAGES_FILE
    if bad.exists():
        count = len({tuple(line.split("\t")[1:3]) for line in bad.read_text(encoding="utf-8").splitlines()})
        console.print(
            f"{count} training images cannot be decoded; others took their places: {bad}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"run: {run_dir}, its report: {run_dir / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"MLflow: launch/mlflow.sh --dir {run_dir.parent}", highlight=False, soft_wrap=True)
    return report


def _show_gate(run_dir: Path, console: Console) -> None:
    """The answers of the gate, as they were when the run ended or ``lce gate`` was asked last."""
    gate = judged_before(run_dir)
    if gate is not None:
        colour = "green" if gate["passed"] else "red"
        for question, answer in gate["answers"].items():
            console.print(f"[{colour}]{question}[/{colour}] {answer}", highlight=False, soft_wrap=True)


class _Stopping:
    """Ctrl-C and SIGTERM: while workers train, ask them to save and end; otherwise, or asked again, or too late, end at once."""

    def __init__(self, grace_s: int, note: Callable[[str], None]) -> None:
        self._grace_s, self._note = grace_s, note
        self._file: Path | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stopping:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.alarm(0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def by(self, file: Path) -> Iterator[None]:
        """In here a first signal makes ``file``, for the workers to see."""
        file.unlink(missing_ok=True)
        self._file = file
        try:
            yield
        finally:
            self._file = None
            signal.alarm(0)
            file.unlink(missing_ok=True)

    def _stop(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self._file is None or number == signal.SIGALRM or self._file.exists():
            how = f"{self._grace_s} s after it was asked to" if number == signal.SIGALRM else f"by {name}"
            raise Interrupted(f"stopped {how}; the same command goes on from the last checkpoint")
        self._file.touch()
        signal.alarm(self._grace_s)
        self._note(f"{name}: saving a checkpoint, for at most {self._grace_s} s; asked again, the run ends at once")
