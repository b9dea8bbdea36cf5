"""Numbers about a packed data set: images per identity, bytes, pixels, brightness, and what cannot be decoded."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.images import to_rgb
from pipelines.manifest import PackedDataset
from pipelines.order import Int64Array, derive_key, permute
from pipelines.parallel import over_parts
from pipelines.verify import samples_by_shard

SAMPLE = 10_000
_PART = 2_000  # images a piece of work
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was counted over all samples, and what was looked at in ``looked_at`` of them.

    images_per_identity (C,), bytes (N,); width, height, brightness (0 to 255, mean of grey) of the images that decode, upright;
    kinds: how many have each format and mode; undecodable: sample and reason.
    """

    dataset: PackedDataset
    images_per_identity: Int64Array
    num_bytes: npt.NDArray[np.int32]
    looked_at: int
    width: Int64Array
    height: Int64Array
    brightness: npt.NDArray[np.float64]
    kinds: dict[str, int]
    undecodable: tuple[tuple[int, str], ...]

    def as_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        per_identity, times = np.unique(self.images_per_identity, return_counts=True)
        sizes = Counter(zip(self.width.tolist(), self.height.tolist(), strict=True))
        share = len(self.undecodable) / self.looked_at
        return {
            "data_set": str(self.dataset.directory),
            "samples": self.dataset.num_samples,
            "identities": len(self.images_per_identity),
            "shards": len(self.dataset.manifest.shards),
            "quarantined": len(self.dataset.quarantined),
            "images_per_identity": _spread(self.images_per_identity)
            | {"identities_with": {str(k): v for k, v in zip(per_identity.tolist(), times.tolist(), strict=True)}},
            "bytes": _spread(self.num_bytes) | {"sum": int(self.num_bytes.sum(dtype=np.int64))},
            "looked_at": self.looked_at,
            "undecodable": {
                "number": len(self.undecodable),
                "share": share,
                "samples": [{"sample": sample, "reason": reason} for sample, reason in self.undecodable],
            },
            "width": _spread(self.width),
            "height": _spread(self.height),
            "sizes": [{"width": w, "height": h, "number": n} for (w, h), n in sizes.most_common(20)],
            "brightness": _spread(self.brightness),
            "kinds": self.kinds,
        }


def measure(
    dataset: PackedDataset,
    num_looked_at: int | None = SAMPLE,
    seed: int = 1,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Count over the index, and decode a seeded sample of ``num_looked_at`` images (None: all of them).

    Errors: DataError when the shards are at a URL. **Memory**: 50 bytes a sample.
    """
    num = dataset.num_samples
    if num_looked_at is None or num_looked_at >= num:
        chosen = np.arange(num, dtype=np.int64)
    else:
        chosen = np.sort(permute(np.arange(num_looked_at, dtype=np.int64), num, derive_key(seed, num)))
    parts = list(_parts(dataset, chosen))
    seen: list[_Seen] = []
    for done, found in enumerate(over_parts(_look, iter(parts), len(parts), num_workers)):
        seen.append(found)
        if progress is not None:
            progress(done + 1, len(parts))
    kinds: Counter[str] = Counter()
    for one in seen:
        kinds += one.kinds
    undecodable = sorted(pair for one in seen for pair in one.undecodable)
    return Statistics(
        dataset,
        np.bincount(dataset.index["label"], minlength=len(dataset.identities)),
        np.asarray(dataset.index["size"]),
        len(chosen),
        np.array([w for one in seen for w in one.width], dtype=np.int64),
        np.array([h for one in seen for h in one.height], dtype=np.int64),
        np.array([b for one in seen for b in one.brightness]),
        dict(kinds.most_common()),
        tuple(undecodable),
    )


@dataclass(frozen=True, eq=False)
class _Part:
    path: Path
    samples: Int64Array
    offsets: Int64Array
    sizes: Int64Array


@dataclass(frozen=True, eq=False)
class _Seen:
    width: list[int]
    height: list[int]
    brightness: list[float]
    kinds: Counter[str]
    undecodable: list[tuple[int, str]]


def _parts(dataset: PackedDataset, chosen: Int64Array) -> Iterator[_Part]:
    rows = np.asarray(dataset.index[chosen])
    for shard, places in enumerate(samples_by_shard(rows, len(dataset.manifest.shards))):
        for first in range(0, len(places), _PART):
            part = places[first : first + _PART]
            path = dataset.shard_path(shard)
            yield _Part(path, chosen[part], rows["offset"][part], rows["size"][part].astype(np.int64))


def _look(part: _Part) -> _Seen:
    seen = _Seen([], [], [], Counter(), [])
    with open(part.path, "rb") as file:
        for sample, offset, size in zip(part.samples.tolist(), part.offsets.tolist(), part.sizes.tolist(), strict=True):
            payload = os.pread(file.fileno(), size, offset)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with Image.open(io.BytesIO(payload)) as image:
                        kind = f"{image.format} {image.mode}"
                        upright = to_rgb(image) if image.mode != "L" or image.getexif() else image
                        width, height = upright.size
                        mean = float(np.asarray(upright.convert("L")).mean())
            except Exception as error:  # noqa: BLE001 (Pillow raises whatever its decoders meet first)
                reason = str(error).split("\n", 1)[0].split(" <_io", 1)[0] or type(error).__name__
                seen.undecodable.append((sample, reason))
                continue
            seen.kinds[kind] += 1
            seen.width.append(width)
            seen.height.append(height)
            seen.brightness.append(mean)
    return seen


def _spread(values: npt.NDArray[Any]) -> dict[str, Any]:
    """Mean and quantiles; nothing of no values."""
    if not len(values):
        return {}
    quantiles = np.quantile(values, _QUANTILES).tolist()
    named = {f"p{100 * q:g}": float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)}
    return {"mean": float(values.mean()), **named}
