"""A look at the new model while it trains: a checkpoint is evaluated beside the training, ranked, and a fall is told early.

Checkpoints are ranked by the joint score, the harmonic mean of M(n,o) and M(n,n): a model that is good alone and cannot read the
old gallery does not come first. The network of the best one is kept as ``best.safetensors``; what is shipped is still the last.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from launch.bridge import some_identities
from launch.job import Job, OldModel, embedded
from launch.parts import Parts, cache_settings, open_parts
from launch.prepare import open_old_model
from launch.stored import StoredOld, open_stored
from lce_dist.compat.closed_form import PairSums, least_squares
from lce_dist.embedding import gather_all
from lce_dist.errors import CheckpointError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.metrics import compare, far_key
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import freeze_net
from lce_dist.models.preprocess import OUR_INPUT
from lce_dist.models.weights import load_weights, save_weights
from lce_dist.training.checkpoint import load_network
from lce_dist.world import World
from pipelines.manifest import PackedDataset, View

RANKING = "ranking.json"
BEST = "best.safetensors"
_FALL = 0.05  # of the best M(n,o) so far: a fall that is told
_RIDGE = 0.1


@dataclass(frozen=True)
class Look:
    """What one checkpoint reached at the criterion's FAR; warning: one line when the cross-test fell."""

    step: int
    old_old: float | None
    new_old: float
    new_new: float
    joint: float
    warning: str | None

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        values = {"old_old": self.old_old, "new_old": self.new_old, "new_new": self.new_new, "joint": self.joint}
        return {f"beside/{name}": value for name, value in values.items() if value is not None}


def joint_score(new_old: float, new_new: float) -> float:
    """The harmonic mean of cross-test and self-test."""
    return 2.0 * new_old * new_new / (new_old + new_new) if new_old + new_new > 0.0 else 0.0


def look(job: Job, step: int) -> Look | None:
    """Evaluate the new model's checkpoint of ``step`` over some held-out identities; None when it was removed meanwhile.

    Through maps the cross-test stands on a least-squares map that is fitted to other images here and now: what a map can do, not what
    the trained one does. Leaves the ranking and, when this one is the best, its network. One process at a time.
    """
    config, alone = job.config, World()
    directory = job.run_dir / "new"
    assert config.new.net is not None, "it is trained"
    net = build_net(config.new.net, config.new.embedding_dim, config.data.image_size, seed=0)
    try:
        load_network(directory / "checkpoints" / f"step-{step:08d}", net)
    except (CheckpointError, OSError):
        return None
    net.eval().requires_grad_(False)
    dataset = PackedDataset.open(job.data_dir, cache_settings(job.config), job.cache_dir)
    parts = open_parts(config.data, job.base_dir, dataset, job.cache_dir)
    heldout = parts.view("heldout")
    if config.old.weights is None and config.old.vectors is not None:
        heldout = _stored(job, parts).covered(heldout)
    test = some_identities(heldout, config.run.seed, config.checkpoint.evaluate_images)
    new = _set(job, "new", net, config.new.embedding_dim, test, alone)
    old = _old_set(job, dataset, test, alone, "test")
    query, gallery = new, old
    if config.compat.manner != "direct":
        fitted_on = some_identities(parts.view("train"), config.run.seed, config.checkpoint.evaluate_images)
        new_fit = _set(job, "new", net, config.new.embedding_dim, fitted_on, alone)
        old_fit = _old_set(job, dataset, fitted_on, alone, "train")
        if config.compat.manner == "backward":
            query = _through(new_fit, old_fit, new)
        else:
            gallery = _through(old_fit, new_fit, old)
    far = config.evaluation.criterion_far
    tar = {
        name: compare(*pair, [far]).tar_at_far[far_key(far)]
        for name, pair in (("new_old", (query, gallery)), ("new_new", (new, new)), ("old_old", (old, old)))
        if name != "old_old" or len(np.unique(old.labels_N)) < len(old.labels_N)
    }
    joint = joint_score(tar["new_old"], tar["new_new"])
    ranking = read_ranking(directory)
    before = [one for one in ranking if one["step"] < step]
    found = Look(
        step, tar.get("old_old"), tar["new_old"], tar["new_new"], joint, _warning(before, step, tar["new_old"])
    )
    if joint >= max((one["joint"] for one in before), default=-1.0):
        save_weights(
            net, directory / BEST, {"step": str(step), "joint": f"{joint:.6f}", "fingerprint": job.fingerprint}
        )
    rows = [*(one for one in ranking if one["step"] != step), {"step": step, **tar, "joint": joint}]
    partial = directory / f"{RANKING}.partial"
    partial.write_text(json.dumps(sorted(rows, key=lambda one: -one["joint"]), indent=1) + "\n")
    partial.replace(directory / RANKING)
    return found


def read_ranking(directory: Path) -> list[dict[str, Any]]:
    """Looks so far, best first; none where there is no file."""
    path = directory / RANKING
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    except (OSError, ValueError):  # it is a help, and what was cut off is not worth the run
        return []
    return rows


def _warning(before: list[dict[str, Any]], step: int, new_old: float) -> str | None:
    if not before:
        return None
    best = max(before, key=lambda one: float(one["new_old"]))
    if new_old >= (1.0 - _FALL) * best["new_old"]:
        return None
    return (
        f"M(n,o) fell to {new_old:.4f} at step {step} from {best['new_old']:.4f} at step {best['step']}: compatibility is being "
        "lost. If it goes on, raise compat.align_weight or lower optim.lr"
    )


def _set(job: Job, name: str, net: nn.Module | StoredOld, dim: int, view: View, world: World) -> EmbeddingSet:
    vectors, labels, ids = gather_all(embedded(job, net, dim, view, world)(), world)
    return EmbeddingSet(name, vectors.numpy(), labels.numpy(), ids.numpy())


def _old_set(job: Job, dataset: PackedDataset, view: View, world: World, part: str) -> EmbeddingSet:
    """The old model's vectors, embedded by the first look and kept for the next ones."""
    kept = job.run_dir / "new" / f"beside-old-{part}-{view.fingerprint[:12]}.npz"
    if not _readable(kept):
        config = job.config
        old = _old_model(job, dataset)
        if isinstance(old, StoredOld) and old.by == "identity":
            vectors, labels, ids = gather_all(old.identity_rounds(view, world)(), world)
            found = EmbeddingSet("old", vectors.numpy(), labels.numpy(), ids.numpy())
        else:
            found = _set(job, "old", old, config.old.embedding_dim, view, world)
        partial = kept.with_suffix(".partial.npz")
        partial.touch(mode=0o600)  # templates of people
        np.savez(partial, vectors=found.vectors_ND, labels=found.labels_N, ids=found.sample_ids_N)
        partial.replace(kept)
    with np.load(kept, allow_pickle=False) as arrays:
        return EmbeddingSet("old", arrays["vectors"], arrays["labels"], arrays["ids"])


def _readable(kept: Path) -> bool:
    try:
        with np.load(kept, allow_pickle=False) as arrays:
            return len(arrays["vectors"]) == len(arrays["labels"]) == len(arrays["ids"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return False


def _old_model(job: Job, dataset: PackedDataset) -> OldModel:
    config = job.config
    if config.old.weights is not None:
        return open_old_model(config, job.base_dir, torch.device("cpu"))
    if config.old.vectors is not None:
        return _stored(job, open_parts(config.data, job.base_dir, dataset, job.cache_dir))
    assert config.old.net is not None, "the config was checked"
    net: nn.Module = build_net(config.old.net, config.old.embedding_dim, config.data.image_size, seed=0)
    load_weights(net, job.run_dir / "old" / "model.safetensors")
    return freeze_net(net, config.old.net, config.old.embedding_dim, OUR_INPUT)


def _stored(job: Job, parts: Parts) -> StoredOld:
    old = job.config.old
    assert old.vectors is not None
    return open_stored(job.base_dir / old.vectors, parts.view("train"), old.embedding_dim, job.cache_dir)


def _through(source: EmbeddingSet, target: EmbeddingSet, one: EmbeddingSet) -> EmbeddingSet:
    """``one`` through the least-squares map from ``source`` to ``target``, paired row by row."""
    x, y = (torch.from_numpy(each.vectors_ND) for each in (source, target))
    map_ED = least_squares(PairSums.of(x, y), _RIDGE).to(torch.float32)
    mapped = F.normalize(torch.from_numpy(one.vectors_ND) @ map_ED.T)
    return EmbeddingSet(f"{one.name} mapped", mapped.numpy(), one.labels_N, one.sample_ids_N)
