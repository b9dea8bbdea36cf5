"""One cell of the study: train (or map) by the code of a real run, embed the unseen identities, compare.

Models that several cells share (old ones, and independent ones) are tasks of their own; their weights and the vectors
of all pictures lie beside the results.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.compatibility_data import Part, Pictures, Source, batches, embed, load_pictures, part_of, rounds_of
from benchmarks.compatibility_plan import FAR, CellJob, ModelJob
from benchmarks.compatibility_work import Perform, Result, Task
from launch.bridge import bridge_stage
from lce_dist.compat.artefact import read_card
from lce_dist.compat.boundaries import BoundaryPolicy
from lce_dist.compat.methods import MethodInputs, build_method
from lce_dist.compat.old_space import compute_old_space
from lce_dist.config import Config, NetConfig
from lce_dist.evaluation.bootstrap import count_by_identity, resampled_tars
from lce_dist.evaluation.metrics import EmbeddingSet, compare, far_key
from lce_dist.models.catalog import build_net
from lce_dist.models.weights import load_weights, save_weights
from lce_dist.training.loop import Stage, train_stage
from lce_dist.training.step import Compatibility
from lce_dist.world import World
from pipelines.order import derive_key, hash_ids

Vectors = npt.NDArray[np.float32]
_WORLD = World()
_DRAWS = 200  # of the test identities


def start(folders: dict[str, tuple[Source, Path]], models: Path) -> Perform:
    """Ready this process: one thread, a process group of one for DeepSpeed, the pictures."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    desk = Desk({name: load_pictures(source, folder) for name, (source, folder) in folders.items()}, models)

    def perform(task: Task) -> Result:
        if isinstance(task.job, ModelJob):
            return desk.model(task.key, task.job)
        return desk.cell(task.job)

    return perform


def _net_of(config: Config) -> NetConfig:
    section = config.new.trained
    assert section is not None, "every cell trains its network"
    return section


class Desk:
    """Performs tasks over pictures in memory; what models left behind lies in ``models``/KEY."""

    def __init__(self, pictures: dict[str, Pictures], models: Path) -> None:
        self.pictures = pictures
        self.models = models

    def model(self, key: str, job: ModelJob) -> Result:
        """Train an old or independent model; leave its weights and its vectors of all pictures."""
        pictures = self.pictures[job.source]
        part = part_of(pictures, job.side.share, job.seed)
        section = _net_of(job.config)
        net, speed = _train(job.config, section, pictures, part, job.steps, _seed(job.seed, job.role), None)
        vectors = embed(net, pictures, np.arange(len(pictures.identity_N)))
        folder = self.models / key
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(net, folder / "net.safetensors", {"net": section.net})
        partial = folder / "vectors.partial"
        with partial.open("wb") as file:
            np.save(file, vectors)
        partial.replace(folder / "vectors.npy")
        tested = _tested(job.role, pictures, vectors[pictures.tested])
        numbers = {"self": _numbers(tested, tested)}
        about = {"images": len(part.positions), "classes": part.num_classes, "images_per_s": speed}
        line = f"TAR {numbers['self']['tar']:.3f}, {speed:.0f} images/s"
        return {"numbers": numbers, "about": about, "line": line}

    def cell(self, job: CellJob) -> Result:
        """One contestant: its new model's (or maps') vectors of unseen identities against the old model's."""
        pictures = self.pictures[job.source]
        old_ND, independent_ND = (self._vectors(key) for key in (job.old, job.independent))
        old = _tested("old", pictures, old_ND[pictures.tested])
        if job.contestant.kind == "none":
            new = _tested("new", pictures, independent_ND[pictures.tested])
            crossed = (new, old) if job.scenario.old.dim == job.scenario.new.dim else None
            return _result(None, crossed, {})
        if job.contestant.kind == "mapping":
            return self._mapped(job, pictures, old_ND, independent_ND)
        return self._trained(job, pictures, old, old_ND)

    def _trained(self, job: CellJob, pictures: Pictures, old: EmbeddingSet, old_ND: Vectors) -> Result:
        config, side = job.config, job.scenario.new
        part = part_of(pictures, side.share, job.seed)
        compat = self._compatibility(job, part, old_ND)
        net, speed = _train(config, _net_of(config), pictures, part, job.steps, _seed(job.seed, "new"), compat)
        about: dict[str, Any] = {"images_per_s": speed}
        new = _tested("new", pictures, embed(net, pictures, pictures.tested))
        if config.compat.manner == "direct":
            return _result(new, (new, old), about)
        maps = compat.method.eval().maps()
        joint = maps["old_to_new" if config.compat.manner == "forward" else "new_to_old"]
        crossed = _crossed(config, joint, new, old)
        if config.compat.method != "lce":  # rivals are taken with the map that they trained
            return _result(new, crossed, about)
        about["jointly trained"] = _numbers(*crossed)["tar"]
        new_ND = np.zeros((len(pictures.identity_N), config.new.embedding_dim), dtype=np.float32)
        new_ND[part.positions] = embed(net, pictures, part.positions)
        bridge = self._bridge(job, part, old_ND, new_ND, {str(name): one for name, one in maps.items()}, about)
        return _result(new, _crossed(config, bridge, new, old), about)

    def _mapped(self, job: CellJob, pictures: Pictures, old_ND: Vectors, new_ND: Vectors) -> Result:
        """Both models are frozen: the map alone is fitted, to the new model's training images."""
        about: dict[str, Any] = {}
        part = part_of(pictures, job.scenario.new.share, job.seed)
        bridge = self._bridge(job, part, old_ND, new_ND, {}, about)
        old, new = (
            _tested(name, pictures, vectors[pictures.tested]) for name, vectors in (("old", old_ND), ("new", new_ND))
        )
        return _result(None, _crossed(job.config, bridge, new, old), about)

    def _bridge(
        self,
        job: CellJob,
        part: Part,
        old_ND: Vectors,
        new_ND: Vectors,
        trained: dict[str, nn.Module],
        about: dict[str, Any],
    ) -> nn.Module:
        """The map as a run fits and chooses it, on identities held out of the training ones."""
        with tempfile.TemporaryDirectory() as folder:
            bridge = bridge_stage(
                Path(folder),
                job.config.compat,
                rounds_of(new_ND, part),
                rounds_of(old_ND, part),
                trained,
                _seed(job.seed, "bridge") >> 32,
                "study",
                ("new", job.old),
                _WORLD,
                lambda event: None,
            )
            card = read_card(Path(folder))
        about |= {"map": card["chosen"], "candidates": card["candidates"]}
        return bridge

    def _compatibility(self, job: CellJob, part: Part, old_ND: Vectors) -> Compatibility:
        config = job.config
        rounds = rounds_of(old_ND, part)
        asked = config.compat
        policy = BoundaryPolicy(asked.boundary_policy, asked.boundary_percentile, asked.slack_rad, asked.single_image)
        space = compute_old_space(rounds, part.num_classes, job.scenario.old.dim, _WORLD, policy)
        inputs = MethodInputs(
            config=config.compat,
            head=config.head,
            space=space,
            old_vectors=rounds,
            new_dim=config.new.embedding_dim,
            old_dim=config.old.embedding_dim,
            seed=_seed(job.seed, "method"),
            steps=job.steps,
            world=_WORLD,
        )
        method = build_method(config.compat.method, inputs)
        if not method.uses_old_vectors:
            return Compatibility(method, space)
        old = build_net(job.scenario.old.net, job.scenario.old.dim, config.data.image_size, 0)
        load_weights(old, self.models / job.old / "net.safetensors")
        old.eval().requires_grad_(False)

        def old_vectors(images: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = old(images)
            return vectors

        return Compatibility(method, space, old_vectors)

    def _vectors(self, key: str) -> Vectors:
        vectors: Vectors = np.load(self.models / key / "vectors.npy", mmap_mode="r", allow_pickle=False)
        return vectors


def _train(
    config: Config,
    section: NetConfig,
    pictures: Pictures,
    part: Part,
    steps: int,
    seed: int,
    compat: Compatibility | None,
) -> tuple[nn.Module, float]:
    """A network trained as in a run, in eval mode, and images per second."""
    net = build_net(section.net, section.embedding_dim, pictures.image_size, seed)
    batches_from = batches(pictures, part, config.optim.global_batch, steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(
            "new",
            part.num_classes,
            section.embedding_dim,
            steps,
            seed,
            Path(folder),
            "study",
            None,
            part.identities,
            None,
        )
        trained = train_stage(stage, net, config, compat, batches_from, hash_ids, _WORLD, lambda event: None)
    return net.eval().requires_grad_(False), trained.images_per_s


def _crossed(
    config: Config, bridge: nn.Module, new: EmbeddingSet, old: EmbeddingSet
) -> tuple[EmbeddingSet, EmbeddingSet]:
    """Query and gallery as deployed, one of them through the map."""
    if config.compat.manner == "forward":
        return new, replace(old, vectors_ND=_through(bridge, old.vectors_ND))
    return replace(new, vectors_ND=_through(bridge, new.vectors_ND)), old


@torch.no_grad()
def _through(bridge: nn.Module, vectors_ND: Vectors) -> Vectors:
    mapped: Vectors = F.normalize(bridge(torch.from_numpy(np.ascontiguousarray(vectors_ND)))).numpy()
    return mapped


def _tested(name: str, pictures: Pictures, vectors_MD: Vectors) -> EmbeddingSet:
    return EmbeddingSet(name, np.ascontiguousarray(vectors_MD), pictures.identity_N[pictures.tested], pictures.tested)


def _result(
    new: EmbeddingSet | None, crossed: tuple[EmbeddingSet, EmbeddingSet] | None, about: dict[str, Any]
) -> Result:
    """new: None where it is the independent model, whose own task has M(n, n)."""
    numbers = {}
    if new is not None:
        numbers["self"] = _numbers(new, new)
    if crossed is not None:
        numbers["cross"] = _numbers(*crossed)
    line = ", ".join(f"{name} {value['tar']:.3f}" for name, value in numbers.items())
    return {"numbers": numbers, "about": about, "line": line}


def _numbers(query: EmbeddingSet, gallery: EmbeddingSet) -> dict[str, Any]:
    """Plain values; ``draws`` are of the same identities in every comparison on a data set."""
    result = compare(query, gallery, (FAR,))
    (drawn,) = resampled_tars([count_by_identity(query, gallery, FAR)], _DRAWS)
    draws = [round(value, 6) for value in drawn.tolist()]
    return {"tar": result.tar_at_far[far_key(FAR)], "rank1": result.rank1, "draws": draws}


def _seed(seed: int, purpose: str) -> int:
    return derive_key(seed, *purpose.encode()) >> 2  # a run's seeds have 62 bits
