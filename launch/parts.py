"""Who sees what in a run: by the config's shares of the identities, or by the split that it names (``data.split``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lce_dist.config import DataConfig
from pipelines.manifest import IdentitySplit, PackedDataset, View, split_identities
from pipelines.splits import OpenSplit, open_split, select_samples

Part = Literal["old", "train", "heldout"]


@dataclass(frozen=True, eq=False)
class Parts:
    """The identities of each part and, where a split names single images, those.

    ``train`` is what the new model sees; with a split the old model's identities need not be among them.
    """

    dataset: PackedDataset
    identities: IdentitySplit
    by_samples: OpenSplit | None

    def view(self, part: Part) -> View:
        """The images that the old model, the new one, or neither is trained on."""
        if self.by_samples is None:
            return self.dataset.select(getattr(self.identities, part))
        return select_samples(self.dataset, self.by_samples.split.part("new" if part == "train" else part))

    @property
    def fingerprint(self) -> str | None:
        """Of the split's file; None without one: then the settings say all."""
        return None if self.by_samples is None else self.by_samples.fingerprint


def open_parts(data: DataConfig, base_dir: Path, dataset: PackedDataset) -> Parts:
    """Errors: DataError for too few identities, and for a split that is damaged or of another data set."""
    if data.split is not None:
        found = open_split(base_dir / data.split, dataset)
        return Parts(dataset, found.identities, found)
    people = split_identities(dataset.identities, data.heldout_identities, data.old_identities, data.split_seed)
    return Parts(dataset, people, None)
