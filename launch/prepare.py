"""What happens before anything is spent: the data set is made or opened, split, and every rule is checked."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from launch.pair_sets import file_fingerprint, open_pair_sets
from launch.parts import Part, Parts, cache_settings, open_parts, shuffle_of, training_order
from launch.stored import check_against_vectors, open_stored
from lce_dist.compat.fit import LEAST_IDENTITIES
from lce_dist.compat.methods import METHODS, find_method
from lce_dist.compat.rotation import last_layers
from lce_dist.config import Config, DataConfig, InputConfig, NewConfig, OldConfig, SyntheticConfig
from lce_dist.errors import ConfigError, DataError
from lce_dist.head import classifier
from lce_dist.models.catalog import build_net
from lce_dist.models.old_model import FrozenModel, ModelFile, open_model
from lce_dist.models.preprocess import InputSpec
from lce_dist.training.plan import StagePlan, plan_stage
from lce_dist.vector_files import lines_of
from pipelines.attributes import Columns, attributes_of, drawn_attributes
from pipelines.cache import DEFAULT_CACHE, CacheSettings
from pipelines.manifest import IdentitySplit, PackedDataset, fetch_description, is_url
from pipelines.pack import pack_folder, pack_images, source_fingerprint
from pipelines.synthetic import identity_key, photos

Progress = Callable[[str, int, int], None]

_MIB = 1 << 20
_MOST_DRAWERS = 16  # inside a pod the whole host's processors are seen


@dataclass(frozen=True)
class Prepared:
    """The packed data set and who sees what of it."""

    dataset: PackedDataset
    parts: Parts
    plans: dict[str, StagePlan]
    old_weights: str | None  # fingerprint of weights and preprocessing, or of stored vectors
    new_weights: str | None  # fingerprint
    first_rows: str | None  # fingerprint of head.start_from
    old_identities: str | None  # fingerprint of those of old.identities that the new model is trained on
    pair_sets: tuple[str, ...]  # fingerprints of evaluation.pairs
    attributes: str | None  # fingerprint of evaluation.attributes

    @property
    def split(self) -> IdentitySplit:
        return self.parts.identities

    def identity(self, config: Config) -> dict[str, object]:
        """All that the trained weights depend on: settings, data, given weights and rows."""
        given: dict[str, object] = {"old_weights": self.old_weights, "new_weights": self.new_weights}
        given |= {"first_rows": self.first_rows, "split": self.parts.fingerprint, "old_identities": self.old_identities}
        values = config.training_values()
        # the same images read from elsewhere come in the same order
        values["data"]["shuffle"] = shuffle_of(config.data, self.dataset)
        return {**values, "data_content": self.dataset.fingerprint_in_use, **given}

    def examination(self, config: Config) -> dict[str, object]:
        """All that the report of trained weights depends on."""
        return {**config.evaluation_values(), "pair_sets": list(self.pair_sets), "attributes": self.attributes}


def prepare_data(
    config: DataConfig, cache: Path, progress: Progress, shards: CacheSettings = DEFAULT_CACHE
) -> PackedDataset:
    """The packed data set that the config names: opened, or packed once into ``cache``.

    Of one at a URL everything but the shards is brought there; ``shards`` says where those are kept. Errors: DataError and ConfigError, one line each.
    """
    if config.shards is not None:
        if not is_url(config.shards):
            return PackedDataset.open(Path(config.shards), shards, cache)
        with _one_at_a_time(cache):
            return PackedDataset.open(fetch_description(config.shards, cache), shards, cache)
    if config.images is not None:
        source = Path(config.images)
        out = cache / f"images-{source_fingerprint(source)}"
        with _one_at_a_time(cache):
            return pack_folder(source, out, "images", progress=lambda n, of: progress("packing", n, of))
    assert config.synthetic is not None
    with _one_at_a_time(cache):
        return draw_faces(config.synthetic, cache / f"faces-{_short_hash(config.synthetic)}", progress)


@contextlib.contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """Runs started side by side pack in turn; the later ones find the work done."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def draw_faces(config: SyntheticConfig, out: Path, progress: Progress) -> PackedDataset:
    """The embedded data set, drawn on all cores and packed into ``out``; opened when it is there already."""
    return pack_images(
        photos(config, num_processes=min(_MOST_DRAWERS, len(os.sched_getaffinity(0)))),
        [identity_key(number) for number in range(config.identities)],
        config.identities * config.photos_per_identity,
        out,
        "faces",
        _short_hash(config),
        progress=lambda n, of: progress("drawing faces", n, of),
    )


def _short_hash(config: SyntheticConfig) -> str:
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare(config: Config, num_ranks: int, with_independent: bool, cache: Path, progress: Progress) -> Prepared:
    """Make or open the data set, split it, and check everything that can be known before training."""
    check_method(config)
    if config.new.net is not None:
        net = build_net(config.new.net, config.new.embedding_dim, config.data.image_size, seed=0)
        if config.compat.mode == "mapping-direct":
            last_layers(net)
    elif with_independent:
        raise ConfigError(
            "--with-independent trains new.net without compatibility; new.weights brings its own network and new.net is not "
            "set. Leave it out"
        )
    new_weights = None
    if config.new.weights is not None:
        new_weights = open_new_model(config, Path(), torch.device("cpu")).fingerprint
    old_model = None
    if config.old.weights is not None:
        old_model = open_old_model(config, Path(), torch.device("cpu"))
    elif config.old.net is not None:
        build_net(config.old.net, config.old.embedding_dim, config.data.image_size, seed=0)
    first_rows = None
    if config.head.start_from is not None:
        card = classifier.read_card(Path(config.head.start_from))
        if card.dim != config.new.embedding_dim:
            raise ConfigError(
                f"head.start_from is {config.head.start_from}, whose rows have {card.dim} values; must be "
                f"new.embedding_dim ({config.new.embedding_dim}). Name another classifier"
            )
        first_rows = classifier.fingerprint(Path(config.head.start_from), in_mib(progress, "reading rows"))
    dataset = prepare_data(config.data, cache, progress, cache_settings(config))
    old_weights = None if old_model is None else old_model.fingerprint
    parts = open_parts(config.data, Path(), dataset, cache)
    heldout = parts.view("heldout")
    if config.old.vectors is not None:
        vectors = Path(config.old.vectors)
        if old_model is None:
            stored = open_stored(vectors, parts.view("train"), config.old.embedding_dim, cache)
            old_weights, heldout = stored.fingerprint, stored.covered(heldout)
        else:
            check_against_vectors(old_model, vectors, dataset, config.data.image_size, cache)
    if config.compat.maps_only or config.compat.manner != "direct":
        judging = int((parts.view("train").count_C > 1).sum())
        if judging < LEAST_IDENTITIES:
            raise DataError(
                f"{judging} training identities have two images or more; compat.mode {config.compat.mode!r} chooses a map, "
                f"which needs at least {LEAST_IDENTITIES} of these. Bring more images, or hold out fewer identities"
            )
    seen = None
    if config.old.identities is not None:
        seen = hashlib.sha256("\n".join(sorted(seen_identities(config, Path(), parts))).encode()).hexdigest()[:16]
    heldout_attributes(config, Path(), dataset, np.asarray(heldout.sample_ids))
    if config.evaluation.pairs and config.old.weights is None and config.old.vectors is not None:
        raise ConfigError(
            f"evaluation.pairs names {len(config.evaluation.pairs)} pair files, whose images have no stored old vectors "
            "(old.vectors). Remove it, or give the old model itself (old.weights)"
        )
    pair_sets = open_pair_sets(config.evaluation.pairs, Path(), cache, progress)
    if heldout.count_C.max() < 2:
        raise DataError(
            f"none of the {heldout.num_classes} held-out identities has 2 images; evaluation compares images of one "
            "identity. Raise data.heldout_identities, change data.split_seed, or bring more images"
        )
    plans: dict[str, StagePlan] = {}
    networks: dict[str, tuple[Part, OldConfig | NewConfig]]
    networks = {"old": ("old", config.old), "new": ("train", config.new)}
    if with_independent:
        networks["independent"] = ("train", config.new)
    for name, (part, section) in networks.items():
        is_given = section.weights is not None and name != "independent"
        if not is_given and not (name == "old" and config.old.vectors is not None):
            view = parts.view(part)
            plans[name] = plan_stage(config, view.num_samples, view.num_classes, section.epochs, num_ranks)
            if config.data.sampling == "pk":
                training_order(config, view, 0)  # refuses batches of more identities than there are
    fingerprints = tuple(one.fingerprint for one in pair_sets)
    named = config.evaluation.attributes
    attributes = None if named is None else file_fingerprint(Path(named))
    return Prepared(dataset, parts, plans, old_weights, new_weights, first_rows, seen, fingerprints, attributes)


def open_old_model(config: Config, base_dir: Path, device: torch.device) -> FrozenModel:
    """The old model that the config names as a file; a dimension that does not fit is an error."""
    return _open_given(config.old, config, base_dir, device)


def open_new_model(config: Config, base_dir: Path, device: torch.device) -> FrozenModel:
    """As ``open_old_model``, the new model of a run that trains none."""
    return _open_given(config.new, config, base_dir, device)


def input_of(asked: InputConfig) -> InputSpec:
    """[old.input] or [new.input] as models take it."""
    return InputSpec(asked.size, asked.channels, asked.mean, asked.std, asked.flip_average)


def _open_given(section: OldConfig | NewConfig, config: Config, base_dir: Path, device: torch.device) -> FrozenModel:
    assert section.weights is not None
    file = ModelFile(base_dir / section.weights, section.net, section.embedding_dim, input_of(section.input))
    return open_model(file, config.data.image_size, device)


def seen_identities(config: Config, base_dir: Path, parts: Parts) -> frozenset[str]:
    """Identities of the new training set that the old model was trained on: as old.identities, or as the split says.

    Errors: DataError where the file is absent or names none of them.
    """
    trained = parts.view("train").identities
    if config.old.identities is None:
        return frozenset(parts.identities.old).intersection(trained)
    path = base_dir / config.old.identities
    if not path.is_file():
        raise DataError(f"old.identities {path} is not a file; write the old model's identity keys into it, one a line")
    found = frozenset(lines_of(path)).intersection(trained)
    if not found:
        raise DataError(
            f"old.identities {path} names none of the {len(trained)} training identities; write keys as the data set has them "
            "(identities.txt in it), one a line"
        )
    return found


def heldout_attributes(
    config: Config, base_dir: Path, dataset: PackedDataset, sample_ids: npt.NDArray[np.int64]
) -> Columns:
    """By what images are grouped in the report: the file that the config names, or what the embedded faces were drawn with."""
    if config.evaluation.attributes is not None:
        return attributes_of(base_dir / config.evaluation.attributes, dataset, sample_ids)
    return {} if config.data.synthetic is None else drawn_attributes(config.data.synthetic, sample_ids)


def check_method(config: Config) -> None:
    """Refuse a method that is unknown, or cannot do what the mode asks. Errors: ConfigError."""
    compat = config.compat
    method = find_method(compat.method)
    if compat.maps_only:
        if compat.method != "lce":
            raise ConfigError(
                f"compat.method is {compat.method!r}, and compat.mode is {compat.mode!r}, in which no model is trained. "
                "Remove compat.method; compat.bridge chooses the map"
            )
        return
    unless_set = config.compat_unless_set()
    for key in sorted(frozenset.union(*(one.card.keys for one in METHODS.values())) - method.card.keys):
        value = getattr(compat, key)
        if value != unless_set[key]:
            raise ConfigError(f"compat.{key} is {value}; compat.method {compat.method!r} does not use it. Remove it")
    manners = method.card.manners
    if compat.manner not in manners:
        modes = ", ".join(repr(f"training-{manner}") for manner in sorted(manners))
        raise ConfigError(
            f"compat.method {compat.method!r} has no manner {compat.manner!r}; compat.mode must be {modes}. "
            "'lce' has all three"
        )


def in_mib(progress: Progress, what: str) -> Callable[[int, int], None]:
    """Progress in bytes, shown in MiB; the last one is shown when all bytes are done, and only then."""

    def show(done: int, total: int) -> None:
        shown = -(-total // _MIB)
        progress(f"{what}, MiB", shown if done == total else done // _MIB, shown)

    return show


def fingerprint_of(identity: dict[str, object]) -> str:
    """16 hex digits over ``Prepared.identity`` or ``Prepared.examination``."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def claim_run_dir(values: dict[str, object], run_dir: Path) -> bool:
    """Bind ``run_dir`` to ``Prepared.identity``; returns whether an earlier attempt is being continued.

    Errors: ConfigError listing the keys that differ from those that the run was started with.
    """
    path = run_dir / "config.json"
    if path.exists():
        try:
            started = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise ConfigError(f"{path} is damaged; remove {run_dir} or choose another run.name") from None
        differing = sorted(_differing(started, values))
        if differing:
            raise ConfigError(
                f"run {run_dir} was started with other settings ({'; '.join(differing)}). "
                "Choose another run.name (--name), or remove that directory"
            )
        return True
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2))
    partial.replace(path)
    return False


def _differing(started: object, now: object, prefix: str = "") -> list[str]:
    if isinstance(started, dict) and isinstance(now, dict):
        keys = sorted(started.keys() | now.keys())
        return [line for key in keys for line in _differing(started.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if started == now else [f"{prefix[:-1]} {started!r} then, {now!r} now"]
