"""Byte ranges of a packed data set's shards, read by sample number."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from pipelines.manifest import PackedDataset
from pipelines.order import Int64Array
from pipelines.preads import Preads

MAX_OPEN_SHARDS = 128


class ShardReader:
    """Reads JPEG payloads by their byte range; keeps at most ``MAX_OPEN_SHARDS`` shards open. Not thread-safe.

    Where reads take long (network file systems, cold disks) those of a batch are made side by side.
    """

    def __init__(self, dataset: PackedDataset) -> None:
        self._dataset = dataset
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._preads = Preads()

    def read(self, sample_ids: Int64Array) -> list[npt.NDArray[np.uint8]]:
        """The JPEG bytes of each sample.

        Errors: DataError when a shard vanished or shrank since the data set was opened.
        """
        rows = self._dataset.rows[sample_ids]
        shards, offsets, sizes = (rows[field].tolist() for field in ("shard", "offset", "size"))
        places = zip(shards, sizes, offsets, strict=True)
        if len(set(shards)) <= self._may_stay_open:
            payloads = self._preads.read([(self._descriptor(shard), size, offset) for shard, size, offset in places])
        else:  # some are closed again on the way
            payloads = [os.pread(self._descriptor(shard), size, offset) for shard, size, offset in places]
        for row, payload in enumerate(payloads):
            if len(payload) != sizes[row]:
                raise DataError(
                    f"shard {self._dataset.shard_location(shards[row])} gave {len(payload)} bytes of sample {sample_ids[row]} at "
                    f"byte {offsets[row]}; the index says {sizes[row]}, so it shrank after it was opened. Restore it or pack again"
                )
        return [np.frombuffer(payload, dtype=np.uint8) for payload in payloads]

    def prefetch(self, sample_ids: Int64Array) -> None:
        """Begin to fetch the shards of samples that will be read, where they lie at a URL."""
        for shard in np.unique(self._dataset.rows[sample_ids]["shard"]).tolist():
            if shard not in self._descriptors:
                self._dataset.cache.prefetch(self._dataset.remote_shard(shard))

    def close(self) -> None:
        self._preads.close()
        if self._dataset.is_remote:
            self._dataset.cache.forget()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            self._descriptors.move_to_end(shard)
            return descriptor
        while len(self._descriptors) >= self._may_stay_open:  # first, so that it can make room
            os.close(self._descriptors.popitem(last=False)[1])
        if self._dataset.is_remote:
            descriptor = self._dataset.cache.open(self._dataset.remote_shard(shard))
        else:
            path = self._dataset.shard_path(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"shard {path} cannot be opened ({error.strerror}); restore it or pack again") from None
        self._descriptors[shard] = descriptor
        return descriptor

    @functools.cached_property
    def _may_stay_open(self) -> int:
        """Shards; those of a URL lie on this machine's disk, where what is open cannot make room for others."""
        if not self._dataset.is_remote:
            return MAX_OPEN_SHARDS
        largest = max(record.size_bytes for record in self._dataset.manifest.shards)
        return max(1, min(MAX_OPEN_SHARDS, self._dataset.cache.holds_bytes // largest))
