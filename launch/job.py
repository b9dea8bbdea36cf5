"""The composition root: what every worker does, stage after stage, in one function that reads top to bottom."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from launch.bridge import bridge_stage, some_identities
from launch.pair_sets import accuracy_cells, open_pair_sets, pair_set_entries
from launch.parts import cache_settings, open_parts, training_order
from launch.preflight import check_gpu_memory
from launch.prepare import heldout_attributes, open_new_model, open_old_model, seen_identities
from launch.report import RunFacts, write_report
from launch.stored import StoredOld, open_stored
from lce_dist.batch import Batch
from lce_dist.collectives import all_agree, barrier
from lce_dist.compat.artefact import read_card
from lce_dist.compat.boundaries import BoundaryPolicy
from lce_dist.compat.bridges import Bridge
from lce_dist.compat.closed_form import PairSums
from lce_dist.compat.closed_form import procrustes as procrustes_of
from lce_dist.compat.methods import MethodInputs, build_method
from lce_dist.compat.old_space import OldSpace, Partial, compute_old_space, load_old_space, save_old_space
from lce_dist.compat.rotation import fold_rotation
from lce_dist.compat.vector_weights import vector_weights_for
from lce_dist.config import MARGIN_KEYS, Config, Manner, NetConfig
from lce_dist.embedding import EmbeddedRows, embed_batches, gather_all
from lce_dist.errors import RunError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.matrix import build_matrix, cells_of
from lce_dist.evaluation.upgrade import examine
from lce_dist.head.classifier import OldRows, save_classifier, turn
from lce_dist.head.identity import identity_tensor
from lce_dist.head.rows import local_classes
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import FrozenModel, freeze_net
from lce_dist.models.preprocess import OUR_INPUT
from lce_dist.models.weights import fingerprint, load_weights, save_weights
from lce_dist.storage import together
from lce_dist.training.fence import take_over
from lce_dist.training.loop import POINTS_FILE, Report, Stage, Trained, train_stage
from lce_dist.training.plan import plan_stage
from lce_dist.training.step import Compatibility
from lce_dist.training.step_log import points_after
from lce_dist.world import World
from pipelines.manifest import PackedDataset, View
from pipelines.order import hash_ids
from pipelines.stream import BadImages, ImageStream, block_plan, training_plan

# Embedding passes read in blocks of this many rows whatever the number of ranks: the same rows meet in the
# same matrix product, so vectors, centres and scores are the same on any number of ranks.
_BLOCK_ROWS = 128
_CACHE_BYTES = 2 << 30
BAD_IMAGES_FILE = "bad_images.tsv"  # in a run's directory: stage, shard, key, reason
_TELL_STEPS = 50  # between two numbers of how shards come
# of a new model that is trained and then turned into the old space
_NOT_TURNED, _ROWS_NOT_TURNED = "before_rotation.safetensors", "classifier_before_rotation"
_ROTATION_IMAGES = 20_000  # that the rotation beside the report is fitted to

OldModel = FrozenModel | StoredOld


@dataclass(frozen=True)
class Job:
    """Everything that a worker is told."""

    config: Config
    data_dir: Path
    run_dir: Path
    cache_dir: Path
    fingerprint: str  # of what the weights depend on: settings, data and given weights
    examination: str  # fingerprint of what the report depends on beside them
    base_dir: Path  # what relative paths in the config are relative to
    with_independent: bool
    mlflow_run_ids: dict[str, str | None]
    told_steps: dict[str, int]  # up to which step the driver has heard each stage's metrics
    code: str = ""  # version and commit
    attempt: str | None = None  # the driver's id in the run's directory; None: nobody else can be writing there


def run_job(job: Job, world: World, report: Report) -> None:
    """Train old, measure its space, train new (and independent), evaluate, write the report."""
    config = job.config
    dataset = PackedDataset.open(job.data_dir, cache_settings(config, world), job.cache_dir)
    parts = open_parts(config.data, job.base_dir, dataset, job.cache_dir)
    old_view, train_view, test_view = parts.view("old"), parts.view("train"), parts.view("heldout")

    if config.new.weights is None:
        check_gpu_memory(config, train_view.num_classes, train_view.num_samples, world)
    old: OldModel
    if config.old.weights is not None:
        old = open_old_model(config, job.base_dir, world.device)
        report({"type": "stage_skipped", "stage": "old", "why": f"weights given: {config.old.weights}"})
    elif config.old.vectors is not None:
        old = open_stored(job.base_dir / config.old.vectors, train_view, config.old.embedding_dim, job.cache_dir)
        all_heldout, test_view = test_view, old.covered(test_view)
        if test_view.num_samples < all_heldout.num_samples:
            text = f"old vectors exist for {test_view.num_samples} of {all_heldout.num_samples} held-out images: the report is of these"
            report({"type": "note", "stage": "evaluation", "text": text})
        what = f"vectors given, one an {old.by}: {config.old.vectors}"
        report({"type": "stage_skipped", "stage": "old", "why": what})
    else:
        assert config.old.net is not None, "the config was checked"
        section = NetConfig(net=config.old.net, embedding_dim=config.old.embedding_dim, epochs=config.old.epochs)
        old = _network(job, "old", section, old_view, None, world, report)
    compat = None
    if not config.compat.maps_only:
        compat = _compatibility(job, old, train_view, world, report)
    before = _weights_of(old)

    def same_old() -> None:
        refuse_changed(old, before)

    if config.new.weights is not None:
        new = open_new_model(config, job.base_dir, world.device)
        report({"type": "stage_skipped", "stage": "new", "why": f"weights given: {config.new.weights}"})
    else:
        new = _network(job, "new", _net_of(config), train_view, compat, world, report, same_old)
    nets: dict[str, tuple[OldModel, int]]
    nets = {"old": (old, config.old.embedding_dim), "new": (new, config.new.embedding_dim)}
    bridge = None
    if config.compat.maps_only or config.compat.manner != "direct":
        some = some_identities(train_view, config.run.seed)
        bridge = bridge_stage(
            job.run_dir / "bridge",
            config.compat,
            embedded(job, new, config.new.embedding_dim, some, world),
            embedded(job, old, config.old.embedding_dim, some, world),
            {str(way): found for way, found in compat.method.maps().items()} if compat is not None else {},
            _seed_of(config, "bridge"),
            job.fingerprint,
            (new.fingerprint, old.fingerprint),
            world,
            report,
        )
        if config.compat.manner == "direct":
            new = _turned(job, new, bridge, world, report)
            nets["new"] = (new, config.new.embedding_dim)
    if job.with_independent:
        independent = _network(job, "independent", _net_of(config), train_view, None, world, report)
        nets["independent"] = (independent, config.new.embedding_dim)

    # the models, what a rotation alone would give, the pairs, the report
    total_steps = len(nets) + 3
    steps = itertools.count(1)

    def step_done() -> None:
        event = {"type": "metrics", "stage": "evaluation", "step": next(steps), "total_steps": total_steps}
        report({**event, "metrics": {}, "eta_s": 0.0})

    report({"type": "stage_start", "stage": "evaluation", "total_steps": total_steps, "first_step": 0})
    sets: dict[str, EmbeddingSet] = {}
    for name, (net, dim) in nets.items():
        if isinstance(net, StoredOld) and net.by == "identity":
            rounds = net.identity_rounds(test_view, world)
        else:
            rounds = embedded(job, net, dim, test_view, world)
        vectors, labels, ids = gather_all(rounds(), world)
        sets[name] = EmbeddingSet(name, vectors.numpy(), labels.numpy(), ids.numpy())
        step_done()
    rotated = _rotated(job, nets, sets, train_view, world)
    step_done()
    cells = cells_of(sets["old"], sets["new"], sets.get("independent"), _crossing(sets, bridge, config.compat.manner))
    matrix = build_matrix(cells, config.evaluation.fars, world)
    procrustes = build_matrix(rotated, config.evaluation.fars, world)
    step_done()
    pairs = _pair_sets(job, nets, bridge, world)
    if world.is_first:
        # the rest is decided by few pairs
        columns = heldout_attributes(config, job.base_dir, dataset, sets["new"].sample_ids_N)
        others = accuracy_cells(pairs)
        upgrade = examine(matrix, cells, config.evaluation.criterion_far, columns, config.run.seed, others)
        card = None if bridge is None else read_card(job.run_dir / "bridge")
        spaces = new.fingerprint, old.fingerprint
        facts = RunFacts(
            job.fingerprint, job.examination, *spaces, _read_speeds(job.run_dir), world.size, world.num_nodes, card
        )
        write_report(job.run_dir, config, facts, upgrade, procrustes, pairs)
        step_done()
        report({"type": "stage_done", "stage": "evaluation"})


def _pair_sets(
    job: Job, nets: dict[str, tuple[OldModel, int]], bridge: nn.Module | None, world: World
) -> dict[str, dict[str, Any]]:
    """What every cell reaches on the pair files that the config names."""
    evaluation = job.config.evaluation
    found = {}
    for pair_set in open_pair_sets(evaluation.pairs, job.base_dir, job.cache_dir):
        sets = {}
        for name, (net, dim) in nets.items():
            vectors, labels, ids = gather_all(embedded(job, net, dim, pair_set.view, world)(), world)
            sets[name] = EmbeddingSet(name, vectors.numpy(), labels.numpy(), ids.numpy())
        crossing = _crossing(sets, bridge, job.config.compat.manner) or (sets["new"], sets["old"])
        cells = {"old_old": (sets["old"], sets["old"]), "new_old": crossing, "new_new": (sets["new"], sets["new"])}
        if "independent" in sets:
            cells["independent_new"] = (sets["independent"], sets["independent"])
        found[pair_set.name] = pair_set_entries(pair_set, cells, evaluation.fars)
    return found


def _rotated(
    job: Job, nets: dict[str, tuple[OldModel, int]], sets: dict[str, EmbeddingSet], view: View, world: World
) -> dict[str, tuple[EmbeddingSet, EmbeddingSet]]:
    """Cells of new models whose vectors are rotated onto the old ones' by Procrustes over some training images.

    What needs no compatible training at all; nothing where the old vectors are one an identity.
    """
    old, old_dim = nets["old"]
    if isinstance(old, StoredOld) and old.by == "identity":
        return {}
    some = some_identities(view, job.config.run.seed, _ROTATION_IMAGES)
    cells = {}
    for name in ("new", "independent"):
        if name in nets:
            net, dim = nets[name]
            passes = zip(
                embedded(job, net, dim, some, world)(), embedded(job, old, old_dim, some, world)(), strict=True
            )
            both = ((one.unit_bD[one.labels_b >= 0], other.unit_bD[other.labels_b >= 0]) for one, other in passes)
            sums = PairSums.over(both, dim, old_dim, world)
            turn_ED = procrustes_of(sums).to(torch.float32)
            one = sets[name]
            turned = F.normalize(torch.from_numpy(one.vectors_ND) @ turn_ED.T)
            mapped = EmbeddingSet(f"{name} rotated", turned.numpy(), one.labels_N, one.sample_ids_N)
            cells[f"{name}_old"] = (mapped, sets["old"])
    return cells


def _crossing(
    sets: dict[str, EmbeddingSet], bridge: nn.Module | None, manner: Manner
) -> tuple[EmbeddingSet, EmbeddingSet] | None:
    """Query and gallery of the cross-test, one of them through the map."""
    if bridge is None or manner == "direct":
        return None

    @torch.no_grad()
    def through(one: EmbeddingSet) -> EmbeddingSet:
        mapped = F.normalize(bridge.cpu()(torch.from_numpy(one.vectors_ND)))
        return EmbeddingSet(f"{one.name} mapped", mapped.numpy(), one.labels_N, one.sample_ids_N)

    if manner == "backward":
        return through(sets["new"]), sets["old"]
    return sets["new"], through(sets["old"])


def _compatibility(job: Job, old: OldModel, view: View, world: World, report: Report) -> Compatibility:
    """The method that the config names, over the old model's space."""
    config = job.config
    space = _old_space(job, old, view, world, report)
    centres = torch.float16 if config.compat.centres == "fp16" else torch.float32
    space = space.to(world.device, centres)
    plan = plan_stage(config, len(view.sample_ids), len(view.identities), config.new.epochs, world.size)
    inputs = MethodInputs(
        config=config.compat,
        head=config.head,
        space=space,
        old_vectors=embedded(job, old, config.old.embedding_dim, view, world),
        new_dim=config.new.embedding_dim,
        old_dim=config.old.embedding_dim,
        seed=_seed_of(config, "method"),
        steps=plan.total_steps,
        world=world,
    )
    method = build_method(config.compat.method, inputs)
    if config.compat.method == "lce" and config.compat.pair_weight is None:
        longer = max(inputs.new_dim, inputs.old_dim)
        pair = vector_weights_for(config.compat, config.head.scale, space.num_classes, longer).pair
        if pair > 0.0:
            text = f"{space.num_classes} classes are fewer than {longer} dimensions: compat.pair_weight is {pair:g}"
            report({"type": "note", "stage": "new", "text": text})

    def old_vectors(images: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        if isinstance(old, StoredOld):
            return old.of_images(sample_ids.cpu().numpy()).to(images.device)
        vectors: torch.Tensor = old(images)
        return vectors

    return Compatibility(method, space, old_vectors if method.uses_old_vectors else None)


def _seed_of(config: Config, name: str) -> int:
    return int(np.random.SeedSequence([config.run.seed, *name.encode()]).generate_state(1)[0])


def _network(
    job: Job,
    name: str,
    section: NetConfig,
    view: View,
    compat: Compatibility | None,
    world: World,
    report: Report,
    at_end: Callable[[], None] = lambda: None,
) -> FrozenModel:
    """The trained network of one stage: loaded when finished before (or given), trained to its end otherwise.

    Its fingerprint is the one that it has when its file is the old model of the next run.
    at_end: called by every rank before the trained weights are published; its error leaves them unpublished on all.
    """
    config = job.config
    directory, told_step = job.run_dir / name, job.told_steps.get(name, 0)
    seed = _seed_of(config, name)
    net = build_net(section.net, section.embedding_dim, config.data.image_size, seed)
    turns = name == "new" and config.compat.mode == "mapping-direct"
    weights = directory / (_NOT_TURNED if turns else "model.safetensors")
    finished = directory / "done.json"
    beside = compat.method if compat is not None and compat.method.state_dict() else None
    if all_agree(finished.exists() and weights.exists(), world):
        load_weights(net, weights)
        if beside is not None:
            load_weights(beside, directory / "method.safetensors")
        again = points_after(directory / POINTS_FILE, told_step) if world.is_first else []
        report({"type": "points", "stage": name, "points": again})
        report({"type": "stage_skipped", "stage": name, "why": "finished before"})
    else:
        plan = plan_stage(config, len(view.sample_ids), len(view.identities), section.epochs, world.size)
        order = training_order(config, view, seed)
        may_commit = _may_commit(job, world)
        stage = Stage(
            name,
            plan.num_classes,
            section.embedding_dim,
            plan.total_steps,
            seed,
            directory,
            job.fingerprint,
            job.mlflow_run_ids.get("parent"),
            view.identities[slice(*local_classes(plan.num_classes, world))],
            job.base_dir / config.head.start_from if name == "new" and config.head.start_from is not None else None,
            job.run_dir,
            told_step,
            may_commit,
            job.code,
        )

        @contextmanager
        def batches_from(step: int) -> Iterator[Iterator[Batch]]:
            planned = training_plan(order, world.rank, world.size, step, plan.total_steps)
            stream = ImageStream(
                view,
                planned,
                config.data.image_size,
                config.augment,
                seed,
                world.device,
                num_threads=config.cluster.reader_threads,
                bad_images=_bad_images(job, name, view, as_holes=False),
            )
            with stream:
                yield _told(iter(stream), view, name, step, plan.total_steps, report)

        trained = train_stage(stage, net, config, compat, batches_from, hash_ids, world, report)
        together(at_end, world, RunError)
        together(may_commit, world, RunError)
        card = _card_of(job, name, section)
        _save_classifier(
            directory / (_ROWS_NOT_TURNED if turns else "classifier"), trained, compat, config, card, world
        )
        if world.is_first:
            save_weights(net, weights, card)
            if beside is not None:
                save_weights(beside, directory / "method.safetensors", card)
            finished_partial = finished.with_suffix(".partial")
            finished_partial.write_text(json.dumps({"images_per_s": trained.images_per_s, "steps": plan.total_steps}))
            finished_partial.replace(finished)
        barrier(world)
        load_weights(net, weights)  # every rank goes on with the bytes that were published
        if beside is not None:
            load_weights(beside, directory / "method.safetensors")
        report({"type": "stage_done", "stage": name})
    return freeze_net(net.to(world.device), section.net, section.embedding_dim, OUR_INPUT)


def _net_of(config: Config) -> NetConfig:
    section = config.new.trained
    assert section is not None, "the config was checked"
    return section


def _card_of(job: Job, stage: str, section: NetConfig) -> dict[str, str]:
    """What a file of weights says of itself."""
    card = {"stage": stage, "net": section.net, "embedding_dim": str(section.embedding_dim)}
    return card | {"image_size": str(job.config.data.image_size), "fingerprint": job.fingerprint}


def _turned(job: Job, new: FrozenModel, bridge: Bridge, world: World, report: Report) -> FrozenModel:
    """The new model with the rotation among its weights: what is shipped, ``RUN/new/model.safetensors``."""
    section = _net_of(job.config)
    net, weights = copy.deepcopy(new.network), job.run_dir / "new" / "model.safetensors"
    report({"type": "stage_start", "stage": "new", "total_steps": 1, "first_step": 0})
    rotation = bridge.matrix.weight
    assert isinstance(rotation, torch.Tensor), "it is linear"
    fold_rotation(net, rotation)
    card = _card_of(job, "new rotated", section)
    if new.input != OUR_INPUT:
        card["input"] = json.dumps(asdict(new.input))

    def publish() -> None:
        rows = weights.parent / _ROWS_NOT_TURNED
        if rows.exists():  # trained here, and not by another run
            turn(rows, rotation, weights.parent / "classifier")
        save_weights(net, weights, card)

    together(lambda: publish() if world.is_first else None, world, RunError)
    barrier(world)
    load_weights(net, weights)  # every rank goes on with the bytes that were published
    report({"type": "stage_done", "stage": "new"})
    return freeze_net(net, section.net, section.embedding_dim, new.input)


def _may_commit(job: Job, world: World) -> Callable[[], None]:
    """On the rank that commits, a check that no other attempt has begun; the others write parts alone."""
    attempt = job.attempt
    check = together(
        lambda: take_over(job.run_dir, attempt) if attempt is not None and world.is_first else None, world, RunError
    )
    return check or (lambda: None)


def _bad_images(job: Job, stage: str, view: View, as_holes: bool) -> BadImages | None:
    """By the policy of the config; every rank adds what it meets to bad_images.tsv, one line an image."""
    data = job.config.data
    if data.bad_images == "stop":
        return None

    def tell(shard: str, key: str, reason: str) -> None:
        line = "\t".join((stage, shard, key, reason.replace("\t", " "))) + "\n"
        descriptor = os.open(job.run_dir / BAD_IMAGES_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())  # one write: lines of several ranks do not mix
        finally:
            os.close(descriptor)

    return BadImages(max(1, int(data.bad_images_limit * view.num_samples)), tell, as_holes)


def _told(
    batches: Iterator[Batch], view: View, stage: str, first_step: int, total_steps: int, report: Report
) -> Iterator[Batch]:
    """The same batches; of shards that lie at a URL it is reported how they come."""
    if not view.dataset.is_remote:
        yield from batches
        return
    fetched, start_s = view.dataset.cache.fetched, time.perf_counter()
    bytes_before, waited_before_s = fetched.bytes_fetched, fetched.waited_s
    for step, batch in enumerate(batches, start=first_step + 1):
        yield batch
        if step % _TELL_STEPS == 0:
            passed_s = time.perf_counter() - start_s
            metrics = {
                "data/fetched_mib_per_s": (fetched.bytes_fetched - bytes_before) / 2**20 / passed_s,
                "data/shard_wait_fraction": (fetched.waited_s - waited_before_s) / passed_s,
                "data/cache_hits": float(fetched.hits),
                "data/cache_misses": float(fetched.misses),
            }
            event = {"type": "metrics", "stage": stage, "step": step, "total_steps": total_steps}
            report({**event, "metrics": metrics, "eta_s": 0.0})
            start_s, bytes_before, waited_before_s = time.perf_counter(), fetched.bytes_fetched, fetched.waited_s


def _save_classifier(
    directory: Path, trained: Trained, compat: Compatibility | None, config: Config, card: dict[str, str], world: World
) -> None:
    """Leave rows, identities and old space beside the weights."""
    old = None
    if compat is not None:
        space = compat.old_space
        old = OldRows(space.centre_SD.float(), space.cos_boundary_S, space.count_S)
    margin = config.head.model_dump(include={"loss", "scale", *MARGIN_KEYS[config.head.loss]})
    model = {**card, "head": margin}
    save_classifier(directory, trained.head.rows, trained.identity_SL, old, model, world)


def _old_space(job: Job, old: OldModel, view: View, world: World, report: Report) -> OldSpace:
    """Centres and boundaries of the old model over the new training set, computed once for their fingerprints."""
    config, compat = job.config, job.config.compat
    dim, classes = config.old.embedding_dim, len(view.identities)
    first, last = local_classes(classes, world)
    policy = BoundaryPolicy(compat.boundary_policy, compat.boundary_percentile, compat.slack_rad, compat.single_image)
    state: dict[str, Any] = {"old_model": old.fingerprint, "data": view.fingerprint, **policy.describe()}
    state["image_size"] = config.data.image_size
    seen_S = None
    if compat.seen_only:
        parts = open_parts(config.data, job.base_dir, view.dataset, job.cache_dir)
        seen = seen_identities(config, job.base_dir, parts)
        state["seen"] = hashlib.sha256("\n".join(sorted(seen)).encode()).hexdigest()
        seen_S = torch.tensor([key in seen for key in view.identities[first:last]], device=world.device)
    name = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
    directory = job.cache_dir / f"old-space-{name}"
    identity_SL = identity_tensor(view.identities[first:last], first, world)
    report({"type": "stage_start", "stage": "centres", "total_steps": 1, "first_step": 0})
    cached = load_old_space(directory, classes, dim, world, identity_SL, state)
    if cached is not None:
        report({"type": "stage_skipped", "stage": "centres", "why": "cached for this old model and data"})
        return cached
    if isinstance(old, StoredOld) and old.by == "identity":
        rounds = old.identity_rounds(view, world)  # one vector a class: a centre without a boundary
    else:
        rounds = embedded(job, old, dim, view, world)
    partial = Partial(directory, config.checkpoint.every_rounds, state)
    space = compute_old_space(rounds, classes, dim, world, policy, seen_S, partial)
    save_old_space(space, directory, state, world, identity_SL)
    report({"type": "stage_done", "stage": "centres"})
    return space


def _weights_of(old: OldModel) -> str | None:
    """Hash of the weights as they are now; stored vectors have none."""
    return None if isinstance(old, StoredOld) else fingerprint(old)


def refuse_changed(old: OldModel, before: str | None) -> None:
    """Errors: RunError when the frozen old model's weights are not those that hashed to ``before``."""
    if (now := _weights_of(old)) != before:
        raise RunError(
            f"the old model's weights changed while the new model was trained: their hash was {before} and is {now}. It must be "
            "frozen, so the new model fits no gallery and is not published; a method or a network that trains it is at fault"
        )


def embedded(
    job: Job, net: nn.Module | StoredOld, dim: int, view: View, world: World
) -> Callable[..., Iterator[EmbeddedRows]]:
    """A pass over ``view`` that can be repeated, also from the middle; what fits in memory is computed once."""
    if isinstance(net, StoredOld):
        return net.image_rounds(view, world)
    fits = len(view.sample_ids) * dim * 4 // world.size <= _CACHE_BYTES
    kept: list[EmbeddedRows] = []

    def rounds(first_image: int = 0) -> Iterator[EmbeddedRows]:
        if kept and first_image == 0:
            yield from kept
            return
        planned = block_plan(len(view.sample_ids), world.rank, world.size, _BLOCK_ROWS, first_image)
        stream = ImageStream(
            view,
            planned,
            job.config.data.image_size,
            None,
            0,
            world.device,
            job.config.cluster.reader_threads,
            bad_images=_bad_images(job, "embedding", view, as_holes=True),
        )
        seen: list[EmbeddedRows] = []
        with stream:
            for rows in embed_batches(net, stream, dim):
                if fits and first_image == 0:
                    seen.append(rows)
                yield rows
        kept[:] = seen  # a pass that was broken off leaves nothing

    return rounds


def _read_speeds(run_dir: Path) -> dict[str, float]:
    speeds: dict[str, float] = {}
    for path in sorted(run_dir.glob("*/done.json")):
        speeds[path.parent.name] = float(json.loads(path.read_text())["images_per_s"])
    return speeds


def worker_arguments(job: Job) -> dict[str, Any]:
    """``job`` as plain values, for the trip to another process."""
    return {
        "config": job.config.model_dump(mode="json"),
        "data_dir": str(job.data_dir),
        "run_dir": str(job.run_dir),
        "cache_dir": str(job.cache_dir),
        "fingerprint": job.fingerprint,
        "examination": job.examination,
        "base_dir": str(job.base_dir),
        "with_independent": job.with_independent,
        "mlflow_run_ids": job.mlflow_run_ids,
        "told_steps": job.told_steps,
        "code": job.code,
        "attempt": job.attempt,
    }


def job_from_arguments(values: dict[str, Any]) -> Job:
    """The inverse of :func:`worker_arguments`."""
    return Job(
        Config.model_validate_json(json.dumps(values["config"])),
        Path(values["data_dir"]),
        Path(values["run_dir"]),
        Path(values["cache_dir"]),
        values["fingerprint"],
        values["examination"],
        Path(values["base_dir"]),
        values["with_independent"],
        values["mlflow_run_ids"],
        values["told_steps"],
        values["code"],
        values["attempt"],
    )
