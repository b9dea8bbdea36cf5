"""Does the number of nodes change a run? The same config on 1 to 4 Ray nodes: batches, losses, distances.

    python -m benchmarks.invariance [--quick] [--out DIR]

For a net without batch statistics the loss curves must lie on each other but for rounding; for one with
batch norm per rank the distance is measured and plotted. Takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import Mark, write_record
from lce_dist.evaluation.figures import loss_overlay

CONFIG = """
[run]
name = "invariance"
[data]
image_size = 48
heldout_identities = 20
[data.synthetic]
identities = 120
photos_per_identity = 12
[old]
net = "NET"
embedding_dim = 128
epochs = 2.0
[new]
net = "NET"
embedding_dim = 128
epochs = 8.0
[head]
loss = "cosface"
scale = 24.0
margin_cos = 0.2
[optim]
global_batch = 96
[tracking]
every_steps = 1
"""
NETS = {"group norm (no batch statistics)": "tiny8-gn", "batch norm per rank": "tiny8"}


def run(folder: Path, net: str, nodes: int) -> tuple[dict[int, float], str]:
    """The new model's total loss by step, and the hashes of all its global batches."""
    (folder / f"{net}.toml").write_text(CONFIG.replace("NET", net))
    name = f"{net}-{nodes}"
    command = [sys.executable, "-m", "launch.cli", "train", "--config", f"{net}.toml", "--name", name]
    subprocess.run([*command, "--nodes", str(nodes)], cwd=folder, check=True, capture_output=True)
    losses: dict[int, float] = {}
    for line in (folder / "runs" / name / "tracking.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "metrics" and event["key"] == "new":
            losses[event["step"]] = event["metrics"]["loss/total"]
    return losses, (folder / "runs" / name / "new" / "batch_ids.tsv").read_text()


def distance(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Relative difference of two loss curves, step by step."""
    return [abs(other[step] - one[step]) / one[step] for step in sorted(one)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 nodes, the net without batch statistics alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    nets = dict(list(NETS.items())[:1]) if arguments.quick else NETS
    counts = (1, 2) if arguments.quick else (1, 2, 3, 4)

    marks: list[Mark] = []
    raw: dict[str, Any] = {}
    hashes: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        for title, net in nets.items():
            curves = {}
            for nodes in counts:
                curves[nodes], ids = run(Path(name), net, nodes)
                hashes.add(ids)
                print(f"{net} on {nodes} node(s): last loss {list(curves[nodes].values())[-1]:.6f}", flush=True)
            raw[net] = curves
            shown = {f"{nodes} node{'s' * (nodes > 1)}": sorted(curve.items()) for nodes, curve in curves.items()}
            figure = loss_overlay(shown, f"New model's loss, {title}")
            figure.savefig(arguments.out / f"invariance-{net}.png", dpi=150)
            apart = [max(distance(curves[1], curves[nodes])) for nodes in counts[1:]]
            mean = [sum(d) / len(d) for nodes in counts[1:] for d in [distance(curves[1], curves[nodes])]]
            print(f"{net}: largest relative distance to 1 node {max(apart):.2e}, mean {max(mean):.2e}")
            if net.endswith("-gn"):
                marks.append(
                    Mark(f"{net}: mean relative distance of loss curves", max(mean), "<= 0.005", max(mean) <= 5e-3)
                )
            else:
                raw[f"{net} mean distance by nodes"] = dict(zip(counts[1:], mean, strict=True))
    marks.append(Mark("different orders of global batches", float(len(hashes)), "== 1", len(hashes) == 1))
    return write_record("invariance", arguments.out, marks, raw)


if __name__ == "__main__":
    sys.exit(main())
