"""Who sees what in a run: by the config's shares of the identities, or by the split that it names (``data.split``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lce_dist.config import Config, DataConfig
from lce_dist.errors import ConfigError
from lce_dist.world import World
from pipelines.cache import CacheSettings
from pipelines.identities import Chosen
from pipelines.manifest import Choice, IdentitySplit, PackedDataset, View, shard_edges, split_identities
from pipelines.order import BlockOrder, EpochOrder, Order
from pipelines.sampling import BalancedOrder, ImagesOfClasses, PKOrder
from pipelines.splits import OpenSplit, open_split, select_samples
from pipelines.views import stored_split, stored_view

Part = Literal["old", "train", "heldout"]


@dataclass(frozen=True, eq=False)
class Parts:
    """The identities of each part and, where a split names single images, those.

    ``train`` is what the new model sees; with a split the old model's identities need not be among them.
    drawn_by: what the split depends on beside the data set. cache: where lists are kept; None: nowhere.
    """

    dataset: PackedDataset
    identities: IdentitySplit
    by_samples: OpenSplit | None
    drawn_by: tuple[object, ...]
    cache: Path | None

    def view(self, part: Part) -> View:
        """The images that the old model, the new one, or neither is trained on."""

        def make() -> Choice | View:
            if self.by_samples is not None:
                return select_samples(self.dataset, self.by_samples.split.part("new" if part == "train" else part))
            keys = getattr(self.identities, part)
            assert isinstance(keys, Chosen), "drawn from the data set's identities"
            return self.dataset.choose(keys.place_C)

        if self.cache is not None:
            return stored_view(self.cache, (*self.drawn_by, part), self.dataset, make)
        made = make()
        return made if isinstance(made, View) else made.view()

    @property
    def fingerprint(self) -> str | None:
        """Of the split's file; None without one: then the settings say all."""
        return None if self.by_samples is None else self.by_samples.fingerprint


def open_parts(data: DataConfig, base_dir: Path, dataset: PackedDataset, cache: Path | None) -> Parts:
    """Errors: DataError for too few identities, and for a split that is damaged or of another data set.

    cache: a folder where lists of identities and samples are kept for the next process that asks, and mapped from.
    """
    if data.split is not None:
        found = open_split(base_dir / data.split, dataset, cache)
        return Parts(dataset, found.identities, found, (found.fingerprint,), cache)
    drawn_by = (data.heldout_identities, data.old_identities, data.split_seed)

    def draw() -> IdentitySplit:
        return split_identities(dataset.identities, *drawn_by)

    people = draw() if cache is None else stored_split(cache, drawn_by, dataset, draw)
    return Parts(dataset, people, None, drawn_by, cache)


def cache_settings(config: Config, world: World | None = None) -> CacheSettings:
    """Where shards are kept that lie at a URL. world: whose ranks share them; None: this process alone reads."""
    folder, ranks = config.cluster.cache_dir, 1 if world is None else -(-world.size // world.num_nodes)
    return CacheSettings(None if folder is None else Path(folder), config.cluster.cache_gib, ranks)


def shuffle_of(data: DataConfig, dataset: PackedDataset) -> Literal["global", "blocks"]:
    """What data.shuffle = "auto" means for a data set."""
    if data.shuffle != "auto":
        return data.shuffle
    return "blocks" if dataset.is_remote and data.sampling == "uniform" else "global"


def training_order(config: Config, view: View, seed: int) -> Order:
    """In which order a stage sees the images of a view. Errors: ConfigError for too few identities."""
    data, batch = config.data, config.optim.global_batch
    if data.sampling == "uniform":
        if shuffle_of(data, view.dataset) == "blocks":
            return BlockOrder(shard_edges(view), batch, seed, data.shuffle_lanes, data.shuffle_window)
        return EpochOrder(view.num_samples, batch, seed)
    images = ImagesOfClasses.of(np.asarray(view.labels), view.num_classes)
    if data.sampling == "balanced":
        return BalancedOrder(images, batch, seed)
    needed = batch // data.images_per_identity
    if needed > view.num_classes:
        raise ConfigError(
            f"data.sampling is 'pk', and a batch holds {needed} identities (optim.global_batch / data.images_per_identity); the "
            f"training set has {view.num_classes}. Lower optim.global_batch or raise data.images_per_identity"
        )
    return PKOrder(images, batch, seed, data.images_per_identity)
