"""A contact sheet of a packed data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.contact_sheet import contact_sheet
from pipelines.manifest import PackedDataset
from pipelines.pixels import decode_sample


def sheet_of(dataset: PackedDataset, identities: int, photos: int, tile: int) -> Any:
    """A contact sheet (PIL image) of the first identities of a packed data set."""
    rows = []
    labels = dataset.index["label"]
    for label, key in enumerate(dataset.identities[:identities]):
        ids = np.flatnonzero(labels == label)[:photos]
        rows.append((key, [decode_sample(dataset, int(sample)) for sample in ids]))
    return contact_sheet(rows, tile, f"{dataset.num_samples:,} images of {len(dataset.identities):,} identities")
