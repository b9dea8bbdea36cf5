"""The command ``lce plan``: what a run would need and how long it would take, before anything is spent."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.parts import open_parts
from lce_dist import planning
from lce_dist.config import Config
from lce_dist.errors import ConfigError, SetupError
from lce_dist.models.catalog import build_net
from lce_dist.planning import Fix, Machine, Plan, SamplingGain
from pipelines.manifest import MANIFEST_FILE, PackedDataset, fetch_description, is_url
from pipelines.pack import source_fingerprint

GPU_KINDS = (*planning.MACHINES, "cpu")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What was typed: sizes of data sets (empty: the config's own), and where it is to run."""

    classes: Sequence[int]
    images: Sequence[int]
    num_nodes: int
    ranks_per_node: int
    gpu: str
    calibrate: bool
    as_json: bool


def plan_text(config: Config, asked: Asked) -> tuple[str, SetupError | None]:
    """What to print, and what to raise afterwards when a plan does not fit.

    One size gives a page, several a table. Errors: ConfigError for a number that is not one, or a data set
    that is not there to be counted.
    """
    sizes = _sizes(config, asked)
    machine = _machine(config, asked)
    plans, gains, fixes = [], [], []
    for classes, images in sizes:
        where = (config, classes, images, machine, asked.num_nodes, asked.ranks_per_node)
        plans.append(planning.plan(*where))
        gains.append(planning.sampling_gain(*where))
        fixes.append([] if plans[-1].fits else planning.fixes(*where))
    if asked.as_json:
        entries = [_json(*entry) for entry in zip(plans, gains, fixes, strict=True)]
        text = json.dumps(entries[0] if len(entries) == 1 else entries, indent=2)
    elif len(plans) == 1:
        text = "\n".join(_page(plans[0], gains[0], fixes[0], machine))
    else:
        text = "\n".join(_table(plans, gains, fixes))
    return text, next((refusal(made, fix) for made, fix in zip(plans, fixes, strict=True) if not made.fits), None)


def _sizes(config: Config, asked: Asked) -> list[tuple[int, int]]:
    for flag, values in (
        ("--classes", asked.classes),
        ("--images", asked.images),
        ("--nodes", [asked.num_nodes]),
        ("--ranks-per-node", [asked.ranks_per_node]),
    ):
        if values and min(values) < 1:
            raise ConfigError(f"{flag} is {min(values)}; must be at least 1")
    if bool(asked.classes) != bool(asked.images):
        given, missing = ("--classes", "--images") if asked.classes else ("--images", "--classes")
        raise ConfigError(
            f"{given} is given without {missing}; a plan needs both, or neither to count the config's data"
        )
    if not asked.classes:
        return [counted(config)]
    if len(asked.classes) != len(asked.images):
        raise ConfigError(
            f"--classes has {len(asked.classes)} numbers and --images {len(asked.images)}; must be as many, in one order"
        )
    return list(zip(asked.classes, asked.images, strict=True))


def counted(config: Config) -> tuple[int, int]:
    """Identities and images that the new model trains on, from the packed data set that the config names."""
    data = config.data
    if data.synthetic is not None:
        identities = data.synthetic.identities - data.heldout_identities
        if identities < 1:
            raise ConfigError(
                f"data.heldout_identities is {data.heldout_identities}; must be below data.synthetic.identities "
                f"({data.synthetic.identities})"
            )
        return identities, identities * data.synthetic.photos_per_identity
    if data.shards is not None and is_url(data.shards):
        directory = fetch_description(data.shards, Path(config.run.dir) / ".cache")
    elif data.shards is not None:
        directory = Path(data.shards)
    else:
        assert data.images is not None
        directory = Path(config.run.dir) / ".cache" / f"images-{source_fingerprint(Path(data.images))}"
    if not (directory / MANIFEST_FILE).exists():
        raise ConfigError(
            f"{data.shards or data.images} is not packed yet, so its identities cannot be counted; "
            "give --classes and --images, or pack it with 'lce data pack'"
        )
    dataset = PackedDataset.open(directory)
    view = open_parts(data, Path(), dataset, None).view("train")
    return view.num_classes, view.num_samples


def _machine(config: Config, asked: Asked) -> Machine:
    if asked.gpu != "cpu":
        if asked.calibrate:
            raise ConfigError(
                f"--calibrate measures this processor; it says nothing of --gpu {asked.gpu}. Use --gpu cpu"
            )
        return planning.MACHINES[asked.gpu]
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    cores = len(os.sched_getaffinity(0))
    rates = measured_rates(config) if asked.calibrate else ()
    return planning.cpu_machine(memory, cores, asked.ranks_per_node, *rates)


def measured_rates(config: Config) -> tuple[float, float, float]:
    """FLOP/s of a matrix product, bytes/s of a copy (read plus written), and the network's share of the former.

    On one core, in a few seconds: the config's new network is trained on 16 images of its size.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, classes, dim = 256, 1024, config.new.embedding_dim
        emb_BD, weight_KD = torch.randn(rows, dim), torch.randn(classes, dim)

        def chunk() -> None:  # the three products of a chunk of the head
            cos_BK = emb_BD @ weight_KD.T
            cos_BK @ weight_KD
            cos_BK.T @ emb_BD

        product = 6.0 * rows * classes * dim / _typical(chunk)
        source = torch.randn(1 << 24)
        target = torch.empty_like(source)
        copy = 8.0 * source.numel() / _typical(lambda: target.copy_(source))
        section, size = planning.trained_new(config), config.data.image_size
        net = build_net(section.net, section.embedding_dim, size, seed=0).train()
        images = torch.randn(16, 3, size, size)
        flop = 3.0 * 16 * planning.net_cost(section.net, section.embedding_dim, size).forward_flop
        return product, copy, flop / _typical(lambda: net(images).sum().backward(), repeats=5) / product
    finally:
        torch.set_num_threads(threads)


def _typical(work: Callable[[], Any], repeats: int = 15) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def _page(made: Plan, gain: SamplingGain, fixes: list[Fix], machine: Machine) -> list[str]:
    lines = [
        f"{made.num_classes:,} identities, {made.num_images:,} images; {made.num_ranks} ranks of {made.machine} on "
        f"{made.num_nodes} node(s); global batch {made.global_batch:,}; exponentials {made.exponentials}",
        "times are calculated from rates" + (", not measured" if machine.is_gpu else ""),
        "",
        "memory of a rank (GB)",
    ]
    lines += [f"  {part:34}{size / 1e9:10.2f}" for part, size in made.memory_bytes.items()]
    lines += [
        f"  {'largest at once, in a step':34}{made.step_bytes / 1e9:10.2f}",
        f"  {'largest at once, at the start':34}{made.start_bytes / 1e9:10.2f}",
        f"  {'usable':34}{made.usable_bytes / 1e9:10.2f}   {'fits' if made.fits else 'DOES NOT FIT'}",
        "",
        "received by a rank in a step (MB)",
    ]
    lines += [f"  {part:34}{size / 1e6:10.2f}" for part, size in made.wire_bytes.items()]
    lines += [
        "",
        "operations of a rank in a step (TFLOP)",
        f"  {'network':34}{made.net_flop / 1e12:10.3f}",
        f"  {'head':34}{made.head_flop / 1e12:10.3f}",
        "",
        "time of a step (ms)",
    ]
    lines += [f"  {part:34}{seconds * 1e3:10.2f}" for part, seconds in made.time_s.items()]
    lines += [
        f"  {'sum':34}{made.step_s * 1e3:10.2f}   {made.step_s / made.floor_s:.2f} times the floor "
        f"({made.floor_s * 1e3:.2f}: operations alone)",
        "",
        f"bottleneck: {made.bottleneck} ({made.time_s[made.bottleneck] / made.step_s:.0%} of a step)",
        f"speed: {made.images_per_s:,.0f} images/s; reading takes about "
        f"{math.ceil(made.images_per_s / made.num_nodes * planning.DECODE_S)} cores of each node",
        f"epoch: {made.steps_per_epoch:,} steps, {_duration(made.epoch_s)}; all {made.num_epochs:g} epochs: "
        f"{_duration(made.epoch_s * made.num_epochs)}",
        f"with a tenth of the negatives (head.sample_rate = 0.1): {_gain_text(gain)}",
    ]
    if not made.fits:
        lines += ["", "what would make it fit:"]
        lines += [f"  {_fix_text(fix)}" for fix in fixes] or ["  nothing that is a setting, on up to 4,096 nodes"]
    return lines


def _table(plans: Sequence[Plan], gains: Sequence[SamplingGain], fixes: Sequence[list[Fix]]) -> list[str]:
    columns = (
        "identities", "GPUs", "batch", "GB a rank", "of it rows, state, old", "exponentials (GB)", "network ms",
        "head ms", "links ms", "step ms", "x floor", "images/s", "epoch", "bottleneck", "rate 0.1", "fits",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for made, gain, fix in zip(plans, gains, fixes, strict=True):
        memory = made.memory_bytes
        tables = sum(memory[p] for p in ("class rows", "optimizer state of the rows", "old centres and boundaries"))
        parts = [sum(s for part, s in made.time_s.items() if part.startswith(w)) for w in ("network", "head", "links")]
        cells = (
            f"{made.num_classes:,}",
            f"{made.num_ranks}",
            f"{made.global_batch:,}",
            f"{made.peak_bytes / 1e9:.1f}",
            f"{tables / 1e9:.1f}",
            f"{memory['exponentials'] / 1e9:.1f}" if made.exponentials == "kept" else made.exponentials,
            *(f"{seconds * 1e3:.1f}" for seconds in parts),
            f"{made.step_s * 1e3:.1f}",
            f"{made.step_s / made.floor_s:.2f}",
            f"{made.images_per_s:,.0f}",
            _duration(made.epoch_s),
            made.bottleneck,
            f"{gain.speed_up:.2f} x",
            "yes" if made.fits else "no: " + ("; ".join(_fix_text(each) for each in fix) or "no setting helps"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _gain_text(gain: SamplingGain) -> str:
    saved = (gain.full.peak_bytes - gain.sampled.peak_bytes) / 1e9
    verdict = "not needed for speed" if gain.speed_up < 1.2 else "worth trying for speed"
    return (
        f"{gain.sampled.step_s * 1e3:.2f} ms a step against {gain.full.step_s * 1e3:.2f} ms with all, "
        f"{gain.speed_up:.2f} times as fast, {abs(saved):.2f} GB {'less' if saved >= 0.0 else 'more'}: {verdict}"
    )


def _fix_text(fix: Fix) -> str:
    ways = [f"--set {key}={value}" for key, value in fix.settings.items()] or [f"--nodes {fix.num_nodes}"]
    return f"{' '.join(ways)} ({fix.peak_bytes / 1e9:.1f} GB, {fix.step_s * 1e3:.1f} ms a step)"


def refusal(made: Plan, fixes: list[Fix]) -> SetupError:
    """The error for a plan that does not fit, with the best of what would."""
    fix = f"Use {_fix_text(fixes[0])}" if fixes else "No setting and no number of nodes up to 4,096 is enough"
    return SetupError(
        f"the plan for {made.num_classes:,} identities needs {made.peak_bytes / 1e9:.1f} GB a rank; "
        f"a rank of {made.machine} can use {made.usable_bytes / 1e9:.1f} GB. {fix}"
    )


def _duration(seconds: float) -> str:
    for limit, size, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400.0:.1f} d"


def _json(made: Plan, gain: SamplingGain, fixes: list[Fix]) -> dict[str, Any]:
    derived = ("fits", "peak_bytes", "step_s", "epoch_s", "images_per_s", "bottleneck")
    return {
        **dataclasses.asdict(made),
        **{name: getattr(made, name) for name in derived},
        "times_are": "calculated",
        "sampling_at_0.1": {"step_s": gain.sampled.step_s, "speed_up": gain.speed_up},
        "fixes": [dataclasses.asdict(fix) for fix in fixes],
    }
