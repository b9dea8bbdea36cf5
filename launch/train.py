"""One run, seen from the driver: prepare, start Ray, follow the events into terminal and MLflow, print the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from launch.job import Job
from launch.prepare import Prepared, claim_run_dir, fingerprint_of, prepare
from launch.progress import RunProgress
from launch.raytrain import Placement, cluster_has_gpus, given_cluster, local_gpus, local_nodes, train_on_ray
from launch.report import result_table
from lce_dist.config import Config
from lce_dist.errors import ConfigError, Interrupted, SetupError
from lce_dist.evaluation.figures import training_curves
from lce_dist.spool import Spool
from lce_dist.tracking import Tracker
from pipelines.contact_sheet import contact_sheet
from pipelines.manifest import PackedDataset
from pipelines.pixels import decode_sample

_TRACKING_CLOSE_S = 60.0
_TOLD = "tracked"  # left in the run directory when MLflow has everything


@dataclass(frozen=True)
class TrainOptions:
    """What the command line adds to a config."""

    nodes: int
    workers_per_node: int
    with_independent: bool
    fresh: bool
    on_cluster: bool

    def __post_init__(self) -> None:
        for flag, value in (("--nodes", self.nodes), ("--workers-per-node", self.workers_per_node)):
            if value < 1:
                raise ConfigError(f"{flag} is {value}; must be at least 1")


def train(config: Config, options: TrainOptions, console: Console) -> dict[str, Any]:
    """Run (or go on with, or just show) the upgrade that ``config`` describes; returns the report.

    Errors: those of ``prepare`` and ``train_on_ray``; Interrupted on Ctrl-C and SIGTERM.
    """
    started_s = time.monotonic()
    root = Path(config.run.dir).resolve()
    config, run_dir = _settle_run(config, options, root, console)
    num_ranks = options.nodes * options.workers_per_node
    with _interruptible(), RunProgress(console) as progress:
        prepared = prepare(config, num_ranks, options.with_independent, root / ".cache", progress.count)
        if options.fresh:
            _forget(run_dir)
        going_on = claim_run_dir(prepared.identity(config), run_dir)
        finished = _is_finished(run_dir / "report.json", options)
        if finished:
            progress.note(f"run {run_dir} finished before; to train it again use --fresh, or another --name")
        elif going_on:
            progress.note(f"going on with run {run_dir}")
        if not (finished and (run_dir / _TOLD).exists()):
            _run(config, options, prepared, run_dir, progress, finished)
    return _conclude(config, run_dir, console, None if finished else time.monotonic() - started_s)


def _run(
    config: Config, options: TrainOptions, prepared: Prepared, run_dir: Path, progress: RunProgress, finished: bool
) -> None:
    """Train what is left, and tell MLflow; of a finished run only what MLflow has not heard yet."""
    tracking = _Tracking(Tracker(config.tracking, run_dir, config.run.name, run_dir.parent), run_dir)
    status = "FAILED"
    try:
        tracking.open(config, options, prepared)
        if not finished:
            with _cluster(config, options, progress) as placement:
                job = Job(
                    config,
                    prepared.dataset.directory.resolve(),
                    run_dir,
                    run_dir.parent / ".cache",
                    fingerprint_of(prepared.identity(config)),
                    Path.cwd(),
                    options.with_independent,
                    tracking.tracker.run_ids(),
                )
                for event in train_on_ray(job, placement):
                    progress.show(event)
                    tracking.follow(event)
        tracking.results(config)
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
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
    report = None if options.fresh else _read_report(run_dir / "report.json")
    if report is not None and report["num_ranks"] != num_ranks:
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


def _is_finished(report_path: Path, options: TrainOptions) -> bool:
    report = _read_report(report_path)
    return report is not None and ("independent_old" in report or not options.with_independent)


def _read_report(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise ConfigError(f"{path} is damaged; remove it and run the same command again") from None
    return report


@contextmanager
def _cluster(config: Config, options: TrainOptions, progress: RunProgress) -> Iterator[Placement]:
    ranks = options.nodes * options.workers_per_node
    wanted = config.cluster.device
    nodes: AbstractContextManager[None]
    if options.on_cluster:
        nodes = given_cluster(Placement(options.nodes, options.workers_per_node, use_gpu=wanted == "gpu"))
        with nodes:
            use_gpu = wanted == "gpu" or (
                wanted == "auto" and cluster_has_gpus(Placement(options.nodes, options.workers_per_node, use_gpu=True))
            )
            yield Placement(options.nodes, options.workers_per_node, use_gpu)
        return
    gpus = local_gpus() if wanted != "cpu" else 0
    if wanted == "gpu" and gpus < ranks:
        raise SetupError(f"cluster.device is 'gpu'; this machine has {gpus} GPUs and {ranks} workers need one each")
    placement = Placement(options.nodes, options.workers_per_node, use_gpu=gpus >= ranks)
    progress.note(f"starting {options.nodes} Ray nodes, {options.workers_per_node} worker(s) each, on this machine")
    with local_nodes(placement):
        yield placement


class _Tracking:
    """What of a run goes to MLflow: one run a stage under one parent."""

    def __init__(self, tracker: Tracker, run_dir: Path) -> None:
        self.tracker = tracker
        self._run_dir = run_dir
        self._open_stages: set[str] = set()

    def open(self, config: Config, options: TrainOptions, prepared: Prepared) -> None:
        tracker, split, dataset = self.tracker, prepared.split, prepared.dataset
        tracker.start_run(
            "parent", config.run.name, tags={"lce.fingerprint": fingerprint_of(prepared.identity(config))}
        )
        num_ranks = options.nodes * options.workers_per_node
        tracker.set_tags("parent", {"lce.num_nodes": options.nodes, "lce.num_ranks": num_ranks})
        tracker.log_params("parent", _flat(config.result_values()))
        tracker.log_params(
            "parent",
            {
                "data.num_images": dataset.num_samples,
                "data.num_train_identities": len(split.train),
                "data.num_old_identities": len(split.old),
                "data.num_heldout_identities": len(split.heldout),
                "data.fingerprint": dataset.fingerprint[:16],
            },
        )
        resolved = self._run_dir / "resolved.json"
        resolved.write_text(json.dumps(config.model_dump(mode="json"), indent=2))
        tracker.log_file("parent", resolved, "config")
        tracker.monitor("parent")
        sheet = self._run_dir / "figures" / "contact_sheet.png"
        if config.data.synthetic is not None and not sheet.exists():
            # drawn faces belong to nobody; people's own images are not copied into MLflow
            sheet.parent.mkdir(exist_ok=True)
            sheet_of(dataset, 8, 8, 64).save(sheet)
            tracker.log_file("parent", sheet, "figures")

    def follow(self, event: dict[str, Any]) -> None:
        kind, stage = event["type"], event.get("stage")
        if stage is None:
            return
        if kind == "stage_start":
            self.tracker.start_run(stage, stage, parent="parent")
            self._open_stages.add(stage)
        elif kind == "metrics" and event["metrics"]:
            self.tracker.log_metrics(stage, event["metrics"], event["step"])
        elif kind in ("stage_done", "stage_skipped") and stage in self._open_stages:
            model = self._run_dir / stage / "model.safetensors"
            if model.exists():
                self.tracker.log_file(stage, model, "model")
            self.tracker.end_run(stage)
            self._open_stages.remove(stage)

    def results(self, config: Config) -> None:
        report = _read_report(self._run_dir / "report.json")
        if report is None:
            raise AssertionError("the workers ended without a report")
        met = report["criterion_met"]
        metrics: dict[str, float] = {} if met is None else {"result/criterion_met": float(met)}
        for key in ("old_old", "new_old", "new_new", "independent_old", "independent_new"):
            if key in report:
                metrics[f"rank1/{key}"] = report[key]["rank1"]
                for far, value in report[key]["tar_at_far"].items():
                    metrics[f"tar_at_far_{far}/{key}"] = value
        self.tracker.log_metrics("parent", metrics, 0)
        self.tracker.set_tags("parent", {"mlflow.note.content": _description(report, config)})
        _draw_curves(self._run_dir)
        for figure in sorted((self._run_dir / "figures").glob("*.png")):
            if figure.name != "contact_sheet.png":
                self.tracker.log_file("parent", figure, "figures")
        self.tracker.log_file("parent", self._run_dir / "report.json")

    def close(self, status: str) -> bool:
        """End every open run; whether MLflow has everything."""
        for stage in (*self._open_stages, "parent"):
            self.tracker.end_run(stage, status)
        return self.tracker.close(_TRACKING_CLOSE_S if status == "FINISHED" else 5.0)


def _draw_curves(run_dir: Path) -> None:
    """Loss terms of each trained stage, read back from the events that were kept for MLflow."""
    series: dict[str, dict[str, dict[int, float]]] = {}
    with (run_dir / "tracking.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                event = json.loads(line)
                if event.get("kind") == "metrics":
                    for name, value in event["metrics"].items():
                        if name.startswith("loss/"):
                            points = series.setdefault(event["key"], {}).setdefault(name.removeprefix("loss/"), {})
                            points[event["step"]] = value
    for stage, curves in series.items():
        # the two terms of compatibility are a hundredth of the classification loss: a picture of their own
        for suffix, names in (("", ("total", "classification")), ("_compatibility", ("alignment", "boundary"))):
            shown = {name: sorted(curves[name].items()) for name in names if name in curves}
            if shown:
                figure = training_curves(shown, f"{stage} model: {' and '.join(shown)}", "loss")
                figure.savefig(run_dir / "figures" / f"losses_{stage}{suffix}.png", dpi=150)


_VERDICTS: dict[bool | None, tuple[str, str]] = {
    True: ("met", "green"),
    False: ("not met", "red"),
    None: ("not judged", "yellow"),
}


def _description(report: dict[str, Any], config: Config) -> str:
    far = f"{report['criterion_far']:g}"
    rows = [
        f"| {query} | {gallery} | {report[key]['tar_at_far'][far]:.3f} | {report[key]['rank1']:.3f} |"
        for key, query, gallery in (("old_old", "old", "old"), ("new_old", "new", "old"), ("new_new", "new", "new"))
        if key in report
    ]
    verdict = f"**{_VERDICTS[report['criterion_met']][0]}**"
    old = config.old.net or config.old.weights or config.old.vectors
    head = f"Upgrade `{old}` to `{config.new.net}`: the compatibility criterion is {verdict}."
    table = [f"| query model | gallery model | TAR at FAR {far} | rank-1 |", "|---|---|---|---|", *rows]
    return "\n".join([head, "", *table, "", *report["reasons"]])


def _conclude(config: Config, run_dir: Path, console: Console, took_s: float | None) -> dict[str, Any]:
    report = _read_report(run_dir / "report.json")
    if report is None:
        raise AssertionError("the workers ended without a report")
    console.print(result_table(report))
    word, colour = _VERDICTS[report["criterion_met"]]
    console.print(
        f"criterion [{colour}]{word}[/{colour}]: {' '.join(report['reasons'])}", highlight=False, soft_wrap=True
    )
    if took_s is not None:
        minutes, seconds = divmod(round(took_s), 60)
        console.print(
            f"took {minutes} min {seconds} s; the new model trained at {report['images_per_s']:.0f} images/s",
            highlight=False,
        )
    console.print(f"run: {run_dir}", highlight=False, soft_wrap=True)
    console.print(f"MLflow: launch/mlflow.sh --dir {run_dir.parent}", highlight=False, soft_wrap=True)
    return report


def sheet_of(dataset: PackedDataset, identities: int, photos: int, tile: int) -> Any:
    """A contact sheet (PIL image) of the first identities of a packed data set."""
    rows = []
    labels = dataset.index["label"]
    for label, key in enumerate(dataset.identities[:identities]):
        ids = np.flatnonzero(labels == label)[:photos]
        rows.append((key, [decode_sample(dataset, int(sample)) for sample in ids]))
    return contact_sheet(rows, tile, f"{dataset.num_samples:,} images of {len(dataset.identities):,} identities")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run cleanly and say how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(
            f"stopped by {signal.Signals(number).name}; the same command goes on from the last checkpoint"
        )

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
