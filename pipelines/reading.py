"""Byte ranges of a packed data set's shards, read by sample number."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from pipelines.manifest import PackedDataset
from pipelines.order import Int64Array

MAX_OPEN_SHARDS = 128


class ShardReader:
    """Reads JPEG payloads by their byte range; keeps at most ``MAX_OPEN_SHARDS`` shards open. Not thread-safe."""

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, sample_ids: Int64Array) -> list[npt.NDArray[np.uint8]]:
        """The JPEG bytes of each sample.

        Errors: DataError when a shard vanished or shrank since the data set was opened.
        """
        rows = self._dataset.rows[sample_ids]
        shards, offsets, sizes = (rows[field].tolist() for field in ("shard", "offset", "size"))
        payloads = []
        for sample_id, shard, offset, size in zip(sample_ids.tolist(), shards, offsets, sizes, strict=True):
            payload = os.pread(self._descriptor(shard), size, offset)
            if len(payload) != size:
                raise DataError(
                    f"shard {self._dataset.shard_location(shard)} gave {len(payload)} bytes of sample {sample_id} at byte "
                    f"{offset}; the index says {size}, so it shrank after it was opened. Restore it or pack again"
                )
            payloads.append(np.frombuffer(payload, dtype=np.uint8))
        return payloads

    def prefetch(self, sample_ids: Int64Array) -> None:
        """Begin to fetch the shards of samples that will be read, where they lie at a URL."""
        if self._dataset.is_remote:
            for shard in np.unique(self._dataset.rows[sample_ids]["shard"]).tolist():
                if shard not in self._descriptors:
                    self._dataset.cache.prefetch(self._dataset.remote_shard(shard))

    def close(self) -> None:
        if self._dataset.is_remote:
            self._dataset.cache.forget()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            self._descriptors.move_to_end(shard)
            return descriptor
        if self._dataset.is_remote:
            descriptor = self._dataset.cache.open(self._dataset.remote_shard(shard))
        else:
            path = self._dataset.shard_path(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"shard {path} cannot be opened ({error.strerror}); restore it or pack again") from None
        self._descriptors[shard] = descriptor
        if len(self._descriptors) > MAX_OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        return descriptor
