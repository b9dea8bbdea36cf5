"""A plan of sample positions becomes a stream of batches on the device, read and decoded ahead of the consumer.

plan -> [reader thread: pread by offset, draw parameters] -> [DALI threads: decode, augment] -> Batch
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lce_dist.batch import Batch
from lce_dist.config import AugmentConfig
from lce_dist.errors import DataError
from pipelines.augment import augment_table
from pipelines.dali import DecodeFailureError, Decoder, EncodedBatch
from pipelines.manifest import View
from pipelines.order import Int64Array, Order, derive_key, rank_rows, rank_slice
from pipelines.reading import ShardReader

_FAR = 64  # batches whose shards are fetched ahead, where they lie at a URL


@dataclass(frozen=True, eq=False)
class PlannedBatch:
    """One rank's share of one global batch: (B,) positions into a view, and every rank's row count."""

    epoch: int
    positions: Int64Array
    rows_per_rank: tuple[int, ...]


def training_plan(order: Order, rank: int, num_ranks: int, first_step: int, last_step: int) -> Iterator[PlannedBatch]:
    """This rank's batches of the global steps first_step up to, not including, last_step."""
    for step in range(first_step, last_step):
        positions = order.batch(step)
        mine = positions[rank_slice(len(positions), rank, num_ranks)]
        yield PlannedBatch(order.epoch_of(step), mine, rank_rows(len(positions), num_ranks))


def block_plan(
    num_samples: int, rank: int, num_ranks: int, block_rows: int, first_sample: int = 0
) -> Iterator[PlannedBatch]:
    """A pass over all samples in rounds: of round k, rank r takes block k * num_ranks + r.

    first_sample: where to begin, a multiple of ``block_rows``.
    Blocks are cut the same whatever the number of ranks, so the same rows meet in the same matrix products.
    All ranks have as many rounds; in the last one some may have few rows or none.
    """
    blocks = -(-num_samples // block_rows)
    for first in range(first_sample // block_rows, blocks, num_ranks):
        edges = [min(block * block_rows, num_samples) for block in range(first, first + num_ranks + 1)]
        rows = tuple(end - start for start, end in itertools.pairwise(edges))
        yield PlannedBatch(0, np.arange(edges[rank], edges[rank + 1], dtype=np.int64), rows)


@dataclass(frozen=True)
class BadImages:
    """What becomes of training images that cannot be decoded: others take their places, and ``tell`` hears of each once.

    most: how many different ones a stream may meet. tell: shard, key, reason.
    """

    most: int
    tell: Callable[[str, str, str], None]


@dataclass(frozen=True, eq=False)
class _Read:
    """A planned batch whose bytes are in memory."""

    planned: PlannedBatch
    encoded: EncodedBatch


class ImageStream:
    """Iterates :class:`lce_dist.batch.Batch` over a plan, once; augmented when ``augment`` is given.

    Pixels of a sample depend on (seed, epoch, sample id) only: not on its batch, the ranks or the threads.
    Use it as a context manager, or close it, to stop its threads before the plan ends.
    bad_images: None: one that cannot be decoded ends the stream. Otherwise another of the view, drawn by (seed, epoch,
    position), takes its place with its label and id, so that every rank keeps the rows that it has planned.
    Errors: DataError naming shard and sample when an image cannot be read or decoded.
    **Memory**: 2 * prefetch encoded and prefetch + 1 decoded batches.
    """

    def __init__(
        self,
        view: View,
        plan: Iterable[PlannedBatch],
        image_size: int,
        augment: AugmentConfig | None,
        seed: int,
        device: torch.device,
        num_threads: int = 1,
        prefetch: int = 2,
        bad_images: BadImages | None = None,
    ) -> None:
        self._view = view
        self._plan = iter(plan)
        self._image_size = image_size
        self._augment = augment
        self._seed = seed
        self._device = device
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._reader = ShardReader(view.dataset)
        self._planned: deque[PlannedBatch] = deque()
        self._ahead: deque[tuple[PlannedBatch, Future[_Read]]] = deque()
        self._decoding: deque[_Read] = deque()
        self._again: deque[_Read] = deque()  # read, and to be decoded by the next decoder
        self._bad_images = bad_images
        self._known_bad: set[int] = set()
        self._batches = self._generate()

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and decoding; batches handed out stay valid."""
        self._batches.close()

    def _generate(self) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shard-reader")
        try:
            yield from self._decode(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._reader.close()
            self._ahead.clear()
            self._decoding.clear()
            self._again.clear()

    def _decode(self, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        """Decode batch after batch; a batch that outgrows the decoder ends it and the next one has room."""
        max_rows = 0
        while self._again or self._read_ahead(pool):
            next_planned = self._again[0].planned if self._again else self._ahead[0][0]
            if len(next_planned.positions) == 0:
                self._ahead.popleft()
                yield self._empty(next_planned)
                continue
            # Batches of one plan differ by a row at most, so that this decoder usually serves all of them.
            max_rows = max(max_rows, len(next_planned.positions), max(next_planned.rows_per_rank) + 1)
            decoder = Decoder(
                functools.partial(self._next_encoded, pool, max_rows),
                max_rows,
                self._image_size,
                self._augment,
                self._device,
                self._num_threads,
                self._prefetch,
            )
            try:
                yield from self._drain(decoder)
            finally:
                decoder.close()

    def _drain(self, decoder: Decoder) -> Iterator[Batch]:
        while True:
            try:
                images = decoder.next()
            except DecodeFailureError as error:
                if self._bad_images is None:
                    raise self._culprit(self._decoding[0], str(error)) from None
                first = self._without_bad(self._bad_images, self._decoding.popleft(), str(error))
                self._again = deque([first, *self._decoding])
                self._decoding.clear()
                return  # DALI's pipeline is of no further use; the next one goes on
            if images is None:
                return
            read = self._decoding.popleft()
            yield self._batch(read.planned, images)

    def _next_encoded(self, pool: ThreadPoolExecutor, max_rows: int) -> EncodedBatch | None:
        """What the decoder gets next; None at the end, and before a batch that it must not or cannot take."""
        if self._again:
            self._decoding.append(self._again.popleft())
            return self._decoding[-1].encoded
        if not self._read_ahead(pool):
            return None
        planned, future = self._ahead[0]
        if not 0 < len(planned.positions) <= max_rows:
            return None
        self._ahead.popleft()
        read = future.result()
        self._decoding.append(read)
        self._read_ahead(pool)
        return read.encoded

    def _read_ahead(self, pool: ThreadPoolExecutor) -> bool:
        """Keep ``prefetch`` batches being read; False when the plan is used up."""
        far = _FAR if self._view.dataset.is_remote else 1
        while len(self._planned) < far:
            planned = next(self._plan, None)
            if planned is None:
                break
            if far > 1:
                pool.submit(self._reader.prefetch, self._view.sample_ids[planned.positions])
            self._planned.append(planned)
        while len(self._ahead) < self._prefetch and self._planned:
            planned = self._planned.popleft()
            self._ahead.append((planned, pool.submit(self._read, planned)))
        return bool(self._ahead)

    def _read(self, planned: PlannedBatch) -> _Read:
        if self._known_bad:
            planned = self._replaced(planned)
        sample_ids = self._view.sample_ids[planned.positions]
        table = None
        if self._augment is not None:
            table = augment_table(self._augment, self._seed, planned.epoch, sample_ids)
        return _Read(planned, EncodedBatch(self._reader.read(sample_ids), table))

    def _replaced(self, planned: PlannedBatch) -> PlannedBatch:
        """The batch with other positions where images are known to be bad; the same whenever they became known."""
        positions = planned.positions.copy()
        for row, position in enumerate(positions.tolist()):
            found, attempt = position, 0
            while int(self._view.sample_ids[found]) in self._known_bad:
                found = derive_key(self._seed, planned.epoch, position, attempt) % self._view.num_samples
                attempt += 1
            positions[row] = found
        return dataclasses.replace(planned, positions=positions)

    def _without_bad(self, policy: BadImages, read: _Read, reason: str) -> _Read:
        """The batch that DALI refused, read anew with other images in the places of those that cannot be decoded.

        Errors: DataError when they are too many, or none is to be found.
        """
        dataset, met = self._view.dataset, False
        while True:
            sample_ids = self._view.sample_ids[read.planned.positions].tolist()
            worse = False
            for sample_id, jpeg in zip(sample_ids, read.encoded.jpegs, strict=True):
                is_known = sample_id in self._known_bad  # read before it became known
                problem = None if is_known else self._problem(jpeg)
                met, worse = met or is_known or problem is not None, worse or is_known or problem is not None
                if problem is not None:
                    self._known_bad.add(sample_id)
                    shard = dataset.shard_location(int(dataset.index[sample_id]["shard"]))
                    policy.tell(shard, dataset.sample_key(sample_id), problem)
            if not met:
                raise self._culprit(read, reason)
            if len(self._known_bad) > min(policy.most, self._view.num_samples - 1):
                raise DataError(
                    f"{len(self._known_bad)} images of {dataset.directory} cannot be decoded; data.bad_images_limit allows "
                    f"{policy.most}. Look at bad_images.tsv in the run, or at lce data verify --decode"
                )
            if not worse:
                return read
            read = self._read(read.planned)  # what takes a place may be bad too

    def _problem(self, jpeg: npt.NDArray[np.uint8]) -> str | None:
        """Why an image cannot be decoded, by Pillow or else by DALI alone."""
        problem = _decode_problem(jpeg.tobytes())
        if problem is not None:
            return problem
        feed = iter([EncodedBatch([jpeg], None)])
        alone = Decoder(lambda: next(feed, None), 1, self._image_size, None, self._device, 1, 1)
        try:
            alone.next()
        except DecodeFailureError as error:
            return str(error)
        finally:
            alone.close()
        return None

    def _batch(self, planned: PlannedBatch, images: torch.Tensor) -> Batch:
        return Batch(
            images=images,
            labels=torch.from_numpy(self._view.labels[planned.positions]).to(self._device, non_blocking=True),
            sample_ids=torch.from_numpy(self._view.sample_ids[planned.positions]),
            rows_per_rank=planned.rows_per_rank,
        )

    def _empty(self, planned: PlannedBatch) -> Batch:
        return self._batch(planned, torch.empty((0, 3, self._image_size, self._image_size), device=self._device))

    def _culprit(self, read: _Read, reason: str) -> DataError:
        """Decode a refused batch image by image, so that the message can name the one that is broken."""
        dataset = self._view.dataset
        sample_ids = self._view.sample_ids[read.planned.positions].tolist()
        for sample_id, jpeg in zip(sample_ids, read.encoded.jpegs, strict=True):
            problem = _decode_problem(jpeg.tobytes())
            if problem is not None:
                shard = dataset.shard_location(int(dataset.index[sample_id]["shard"]))
                return DataError(
                    f"shard {shard}: image {dataset.sample_key(sample_id)} (sample {sample_id}) cannot be decoded "
                    f"({problem}); every image must be a whole JPEG. Restore the shard or pack again without it"
                )
        places = sorted({(int(dataset.index[i]["shard"]), dataset.sample_key(i)) for i in sample_ids})
        named = ", ".join(f"{dataset.manifest.shards[shard].file}:{key}" for shard, key in places)
        return DataError(
            f"data set {dataset.directory}: DALI refuses a batch ({reason}) although Pillow decodes each of its "
            f"{len(sample_ids)} images: {named}. Halve the batch to find the image, and pack again without it"
        )


def _decode_problem(jpeg: bytes) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(jpeg)) as image:
                image.load()
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise whatever they meet first)
        return str(error).split("\n", 1)[0].split(" <_io", 1)[0] or type(error).__name__
    return None
