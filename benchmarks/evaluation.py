"""Are the numbers of evaluation right, and what do all pairs of very many images cost?

    python -m benchmarks.evaluation [--quick] [--out DIR]

Scores with ties, of one kind, with one genuine pair, against scikit-learn; TPIR, mAP, folds and templates against plain loops; what
rounding does against float64; what must be refused; pairs that are counted a square at a time against every pair counted the obvious
way; then TAR at FAR 1e-6 over 25,000 to 100,000 images of 512 values (with a GPU: to 1.6 million), each size in
a process of its own: seconds (the median of five, of large sizes one), the floor, and peak memory. The floor is the plain product
of as many blocks of the same vectors at the best rate seen, half of it where one model is counted against itself.
About eight minutes on two cores; writes a JSON record and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from benchmarks.evaluation_oracles import differences, refusals, rounding
from benchmarks.record import Mark, file_stem, write_record
from lce_dist.evaluation.counting import count_at_all_levels, count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.verification import roc_of_scores, tar_at_far
from lce_dist.world import World

NAME = "evaluation"
FAR = 1e-6
FARS = (1e-6, 1e-4, 1e-3, 0.01, 0.1, 0.5)
DIM = 512
_ROUNDS, _MOST_REPEATED = 5, 25_000
MOST_SECONDS, MOST_BYTES, PAIRS_ASKED = 120.0, 2 << 30, 100_000**2


def score_sets(draw: np.random.Generator, num: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Names of hard cases, and their scores and kinds."""
    genuine = draw.random(num) < 0.1
    apart = draw.normal(size=num) + 2.0 * genuine
    one = np.zeros(num, dtype=bool)
    one[num // 3] = True
    return {
        "random": (apart, genuine),
        "many ties": (np.round(apart, 1), genuine),
        "two values": ((apart > 1.0).astype(float), genuine),
        "all equal": (np.full(num, 0.25), genuine),
        "one genuine pair": (apart, one),
        "one impostor pair": (apart, ~one),
        "upside down": (-apart, genuine),
        "tiny differences": (1.0 + 1e-12 * np.round(apart * 5), genuine),
        "infinitely large and small": (np.where(draw.random(num) < 0.01, np.sign(apart) * 1e300, apart), genuine),
    }


def slow_tar(scores: np.ndarray, genuine: np.ndarray, far: float) -> float:
    """By scikit-learn's curve: the largest TAR that it shows at a FAR of at most ``far``."""
    far_P, tar_P, _ = roc_curve(genuine, scores, drop_intermediate=False)
    return float(tar_P[far_P <= far].max())


def equality(draw: np.random.Generator, num: int) -> dict[str, float]:
    """The largest difference of TAR at FAR, and of the whole curve, from scikit-learn's, by case."""
    worst = {}
    for name, (scores, genuine) in score_sets(draw, num).items():
        tar_F, _ = tar_at_far(scores, genuine, FARS)
        differences = [abs(tar - slow_tar(scores, genuine, far)) for tar, far in zip(tar_F, FARS, strict=True)]
        far_P, tar_P, _ = roc_curve(genuine, scores, drop_intermediate=False)
        ours = roc_of_scores(scores, genuine)
        differences += [curve_distance(ours.far_P, ours.tar_P, far_P, tar_P)]
        worst[name] = float(max(differences))
    return worst


def curve_distance(far_P: np.ndarray, tar_P: np.ndarray, other_far_Q: np.ndarray, other_tar_Q: np.ndarray) -> float:
    """Largest difference of two curves' points after (0, 0), in order; infinite when they have other numbers of points."""
    one, other = (
        {(float(f), float(t)) for f, t in zip(*pair, strict=True)}
        for pair in ((far_P, tar_P), (other_far_Q, other_tar_Q))
    )
    one, other = one - {(0.0, 0.0)}, other - {(0.0, 0.0)}
    if len(one) != len(other):
        return math.inf
    return max(abs(a - b) for p, q in zip(sorted(one), sorted(other), strict=True) for a, b in zip(p, q, strict=True))


def models(num: int, dim: int, exact: bool = False) -> tuple[EmbeddingSet, EmbeddingSet]:
    """Two models' vectors of the same images, ten an identity; exact: rows of +-1/8 in 64 dimensions."""
    draw = np.random.default_rng(1)
    labels = draw.permutation(np.arange(num) // 10)
    ids = np.arange(num)
    if exact:
        likes = draw.choice(np.array([-1, 1], np.int8), (num // 10 + 1, 64))[labels]
        both = [
            (np.where(draw.random((num, 64)) < share, -likes, likes) / 8.0).astype(np.float32) for share in (0.25, 0.3)
        ]
    else:
        likes = draw.standard_normal((num // 10 + 1, dim), dtype=np.float32)
        both = []
        for noise in (1.7, 2.0):
            rows = draw.standard_normal((num, dim), dtype=np.float32)
            rows *= noise
            for first in range(0, num, 8192):
                rows[first : first + 8192] += likes[labels[first : first + 8192]]
                rows[first : first + 8192] /= np.linalg.norm(rows[first : first + 8192], axis=1, keepdims=True)
            both.append(rows)
    return EmbeddingSet("new", both[0], labels, ids), EmbeddingSet("old", both[1], labels, ids)


def counted_equal(num: int) -> float:
    """The largest difference of TAR and threshold between squares and the obvious way, over more than 2^26 pairs."""
    new, old = models(num, 64, exact=True)
    worst = 0.0
    for gallery in (old, new):
        fast, slow = count_pairs(new, gallery, [0.01]), count_at_all_levels(new, gallery)
        assert fast.exact_from > 0, "the obvious way was taken"
        for one, other in zip(fast.operating_points(FARS[:4]), slow.operating_points(FARS[:4]), strict=True):
            worst = max(worst, float(np.abs(one - other).max()))
    return worst


def measure(num: int) -> dict[str, Any]:
    """One size, in this process: seconds of new against old and of new against itself, the floor, peak memory."""
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    new, old = models(num, DIM)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    count_pairs(_first(new, 2000), _first(old, 2000), [FAR], world)
    rates = _product_rates(new, old, world)
    samples: dict[str, list[float]] = {}
    for name, gallery in (("new_old", old), ("new_new", new)):
        for _ in range(_ROUNDS if num <= _MOST_REPEATED else 1):
            started = time.perf_counter()
            counts = count_pairs(new, gallery, [FAR], world)
            samples.setdefault(name, []).append(time.perf_counter() - started)
        tar, threshold = counts.operating_points([FAR])
    rates += _product_rates(new, old, world)  # the machine may have got faster meanwhile
    floor_s = 2.0 * num * num * DIM / max(rates)
    return {
        "images": num,
        "samples_s": samples,
        "seconds": {name: float(np.median(each)) for name, each in samples.items()},
        "floor_s": {"new_old": floor_s, "new_new": floor_s / 2.0},
        "product_gflops": [rate / 1e9 for rate in rates],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_bytes_before": before,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0,
        "tar": float(tar[0]),
        "threshold": float(threshold[0]),
    }


def _first(one: EmbeddingSet, num: int) -> EmbeddingSet:
    return EmbeddingSet(one.name, one.vectors_ND[:num], one.labels_N[:num], one.sample_ids_N[:num])


def _product_rates(new: EmbeddingSet, old: EmbeddingSet, world: World) -> list[float]:
    """Operations a second of plain products of blocks of the same vectors, into memory that is there."""
    rates = []
    for side in (2048, 4096) if world.device.type == "cpu" else (16384,):
        one, other = (torch.from_numpy(each.vectors_ND[:side]).to(world.device) for each in (new, old))
        product = torch.empty(len(one), len(other), device=world.device)
        for _ in range(6):
            started = time.perf_counter()
            torch.mm(one, other.T, out=product)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            rates.append(2.0 * product.numel() * DIM / (time.perf_counter() - started))
    return rates


def in_own_process(num: int) -> dict[str, Any]:
    """``measure`` where nothing else has used memory yet."""
    command = [sys.executable, "-m", "benchmarks.evaluation", "--one-size", str(num)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def picture(sizes: list[dict[str, Any]]) -> Figure:
    """Seconds over pairs, both logarithmic, with the floor."""
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    pairs = [one["images"] ** 2 for one in sizes]
    axes.loglog(pairs, [one["seconds"]["new_old"] for one in sizes], "o-", color="#d55e00", label="new against old")
    axes.loglog(pairs, [one["seconds"]["new_new"] for one in sizes], "o-", color="#0072b2", label="new against itself")
    floors = [one["floor_s"]["new_old"] for one in sizes]
    axes.loglog(pairs, floors, "--", color="#4d4d4d", label="a plain product of the vectors")
    axes.set_xlabel("pairs of images")
    axes.set_ylabel("seconds")
    axes.set_title(f"TAR at FAR {FAR:g} over all pairs, {DIM} values an image")
    axes.grid(color="0.9")
    axes.legend(frameon=False)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to 10,000 images; judges numbers, not growth and time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one-size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_size:
        print(json.dumps(measure(arguments.one_size)))
        return 0
    started = time.perf_counter()
    draw = np.random.default_rng(3)
    cases = equality(draw, 20_000)
    for name, value in cases.items():
        print(f"scores, {name}: {value:.1e} from scikit-learn")
    marks = [
        Mark(
            "TAR, ROC: largest difference from scikit-learn",
            max(cases.values()),
            "<= 1e-9",
            max(cases.values()) <= 1e-9,
        )
    ]
    loops = differences()
    for name, value in loops.items():
        bound = 1e-6 if "float32" in name else 1e-9
        marks.append(Mark(f"{name}: largest difference from plain loops", value, f"<= {bound:g}", value <= bound))
    beyond, moved = rounding()
    marks.append(Mark("rounding: TAR is off by more than is said", beyond, "<= 1e-12", beyond <= 1e-12))
    marks.append(Mark("rounding: and it can be seen, at cosines near 1", moved, "> 1e-3", moved > 1e-3))
    refused = refusals()
    for name, was in refused.items():
        marks.append(Mark(f"refused: {name}", was, "true", was))
    squares = counted_equal(9_000)
    marks.append(Mark("pairs by squares: largest difference", squares, "<= 1e-9", squares <= 1e-9))
    numbers = [2_500, 5_000, 7_500, 10_000] if arguments.quick else [25_000, 50_000, 75_000, 100_000]
    if torch.cuda.is_available() and not arguments.quick:
        numbers += [400_000, 1_600_000]
    sizes = []
    for num in numbers:
        sizes.append(in_own_process(num))
        one = sizes[-1]
        told = [
            f"{name} {one['seconds'][name]:.2f} s ({min(each):.2f} to {max(each):.2f}; floor {one['floor_s'][name]:.2f})"
            for name, each in one["samples_s"].items()
        ]
        print(
            f"{num:>9,} images: {', '.join(told)}, TAR {one['tar']:.3f}, peak {one['peak_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )
    hardest = min(one["tar"] for one in sizes)
    marks.append(Mark("vectors are hard: lowest TAR at FAR 1e-6", hardest, "0.1 to 0.99", 0.1 <= hardest <= 0.99))
    if not arguments.quick:  # a sample of fixed size weighs on the smallest
        logs = [(math.log(one["images"] ** 2), math.log(one["seconds"]["new_old"])) for one in sizes]
        over, seconds = zip(*logs, strict=True)
        slope = float(np.polyfit(over, seconds, 1)[0])
        marks.append(Mark("growth: slope of log seconds over log pairs", slope, "0.9 to 1.1", 0.9 <= slope <= 1.1))
    for one in sizes:
        if one["images"] ** 2 == PAIRS_ASKED:
            seconds = one["seconds"]["new_old"]
            marks.append(
                Mark(
                    "100k x 100k, TAR at FAR 1e-6: seconds", seconds, f"<= {MOST_SECONDS:.0f}", seconds <= MOST_SECONDS
                )
            )
            peak = one["peak_bytes"]
            marks.append(Mark("100k x 100k: peak memory, GiB", peak / 2**30, "<= 2", peak <= MOST_BYTES))
    raw = {"scores": cases, "loops": loops, "refused": refused, "squares": squares, "sizes": sizes}
    if arguments.quick:
        took_s = time.perf_counter() - started
        marks.append(Mark("--quick: seconds", took_s, "<= 60", took_s <= 60.0))
    stem = file_stem(NAME + ("-quick" if arguments.quick else ""))
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture(sizes).savefig(arguments.out / f"{stem}.png")
    return write_record(NAME, arguments.out, marks, raw, stem)


if __name__ == "__main__":
    sys.exit(main())
