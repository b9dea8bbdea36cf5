"""A plan of sample positions becomes a stream of batches on the device, read and decoded ahead of the consumer.

plan -> [reader thread: pread by offset, draw parameters] -> [DALI threads: decode, augment] -> Batch
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import threading
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
from pipelines.dali import DecodeFailureError, Decoder, EncodedBatch, header_problem
from pipelines.images import grey_jpeg
from pipelines.manifest import View
from pipelines.order import Int64Array, Order, derive_key, rank_rows, rank_slice
from pipelines.reading import ShardReader

_PLACEHOLDER = np.frombuffer(grey_jpeg(), dtype=np.uint8)  # decoded where an image cannot be; nobody sees it
_FAR, _MORE = 2048, 16  # batches whose shards are fetched ahead, where they lie at a URL: at most, and more at a time


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
    """What becomes of images that cannot be decoded: others take their places, and ``tell`` hears of each once.

    most: how many different ones a stream may meet. tell: shard, key, reason. as_holes: nothing takes their places: their
    rows are there, of no meaning, with label and sample id -1.
    """

    most: int
    tell: Callable[[str, str, str], None]
    as_holes: bool = False


@dataclass(frozen=True, eq=False)
class _Read:
    """A planned batch whose bytes are in memory. holes: rows that hold no image; error: why there are no bytes."""

    planned: PlannedBatch
    encoded: EncodedBatch
    holes: tuple[int, ...] = ()
    error: DataError | None = None


class ImageStream:
    """Iterates :class:`lce_dist.batch.Batch` over a plan, once; augmented when ``augment`` is given.

    Pixels of a sample depend on (seed, epoch, sample id) only: not on its batch, the ranks or the threads.
    Use it as a context manager, or close it, to stop its threads before the plan ends.
    bad_images: None: one that cannot be decoded ends the stream. Otherwise another of the view, drawn by (seed, epoch,
    position), takes its place with its label and id, or a hole, so that every rank keeps the rows that it has planned.
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
        self._bad_lock = threading.Lock()
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
            error = None if self._again else self._ahead[0][1].result().error
            if error is not None:
                raise error
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
                first = self._without_bad(self._decoding.popleft(), str(error))
                self._again = deque([first, *self._decoding])
                self._decoding.clear()
                return  # DALI's pipeline is of no further use; the next one goes on
            if images is None:
                return
            read = self._decoding.popleft()
            yield self._batch(read.planned, images, read.holes)

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
        read = future.result()
        if read.error is not None:  # raised when the batches before it have been handed out
            return None
        self._ahead.popleft()
        self._decoding.append(read)
        self._read_ahead(pool)
        return read.encoded

    def _read_ahead(self, pool: ThreadPoolExecutor) -> bool:
        """Keep ``prefetch`` batches being read; False when the plan is used up."""
        dataset = self._view.dataset
        more = _MORE if dataset.is_remote and len(self._planned) < _FAR and dataset.cache.has_room_ahead() else 0
        while not self._planned or more > 0:
            planned = next(self._plan, None)
            if planned is None:
                break
            if dataset.is_remote:
                pool.submit(self._reader.prefetch, self._view.sample_ids[planned.positions])
            self._planned.append(planned)
            more -= 1
        while len(self._ahead) < self._prefetch and self._planned:
            planned = self._planned.popleft()
            self._ahead.append((planned, pool.submit(self._read, planned)))
        return bool(self._ahead)

    def _read(self, planned: PlannedBatch) -> _Read:
        try:
            return self._readable(planned)
        except DataError as error:
            return _Read(planned, EncodedBatch([], None), error=error)

    def _readable(self, planned: PlannedBatch) -> _Read:
        """The batch's bytes, with others, or holes, where the headers of an image cannot be read.

        Errors: DataError for such an image where the policy is to stop, and for too many of them.
        """
        while True:
            known = self._replaced(planned)
            sample_ids = self._view.sample_ids[known.positions]
            encoded = self._reader.read(sample_ids)
            holes = []
            for row, sample_id in enumerate(sample_ids.tolist()):
                if sample_id in self._known_bad:  # only where they stay as holes
                    holes.append(row)
                elif (problem := header_problem(encoded[row])) is not None:
                    self._take_note(sample_id, problem)
                    holes.append(row)
            if self._bad_images is None or self._bad_images.as_holes or not holes:
                break  # otherwise read anew: what takes a place may be bad too
        for row in holes:
            encoded[row] = _PLACEHOLDER
        table = None
        if self._augment is not None:
            table = augment_table(self._augment, self._seed, planned.epoch, sample_ids)
        return _Read(known, EncodedBatch(encoded, table), tuple(holes))

    def _take_note(self, sample_id: int, problem: str) -> None:
        """One more image is known to be bad. Errors: DataError where that ends the stream."""
        dataset, policy = self._view.dataset, self._bad_images
        shard = dataset.shard_location(int(dataset.index[sample_id]["shard"]))
        key = dataset.sample_key(sample_id)
        if policy is None:
            raise DataError(
                f"shard {shard}: image {key} (sample {sample_id}) cannot be decoded ({problem}); every image must be a whole "
                "JPEG. Restore the shard or pack again without it"
            )
        with self._bad_lock:
            if sample_id in self._known_bad:
                return
            self._known_bad.add(sample_id)
        policy.tell(shard, key, problem)
        if len(self._known_bad) > min(policy.most, self._view.num_samples - 1):
            raise DataError(
                f"{len(self._known_bad)} images of {dataset.directory} cannot be decoded; data.bad_images_limit allows "
                f"{policy.most}. Look at bad_images.tsv in the run, or at lce data verify --decode"
            )

    def _replaced(self, planned: PlannedBatch) -> PlannedBatch:
        """The batch with other positions where images are known to be bad; the same whenever they became known."""
        if not self._known_bad or (self._bad_images is not None and self._bad_images.as_holes):
            return planned
        positions = planned.positions.copy()
        for row, position in enumerate(positions.tolist()):
            found, attempt = position, 0
            while int(self._view.sample_ids[found]) in self._known_bad:
                found = derive_key(self._seed, planned.epoch, position, attempt) % self._view.num_samples
                attempt += 1
            positions[row] = found
        return dataclasses.replace(planned, positions=positions)

    def _without_bad(self, read: _Read, reason: str) -> _Read:
        """The batch that DALI refused, read anew with others, or holes, in the places of those that cannot be decoded.

        Errors: DataError when they are too many, or none is to be found.
        """
        sample_ids = self._view.sample_ids[read.planned.positions].tolist()
        # read ahead, before they became known
        known = {row for row, sample_id in enumerate(sample_ids) if sample_id in self._known_bad} - {*read.holes}
        found = self._undecodable(read.encoded.jpegs, known | {*read.holes})
        if not known and not found:
            raise self._culprit(read, reason)
        for row, problem in found.items():
            self._take_note(sample_ids[row], problem)
        return self._readable(read.planned)

    def _undecodable(self, jpegs: list[npt.NDArray[np.uint8]], known: set[int]) -> dict[int, str]:
        """Rows that cannot be decoded, and why: by Pillow, or else, where it finds none, by DALI, half by half."""
        rows = [row for row in range(len(jpegs)) if row not in known]
        problems = {row: _decode_problem(jpegs[row].tobytes()) for row in rows}
        found = {row: problem for row, problem in problems.items() if problem is not None}
        if found or not rows:
            return found
        suspects = [rows]
        while suspects:
            part = suspects.pop()
            if part and self._was_refused([jpegs[row] for row in part]):
                if len(part) == 1:
                    found[part[0]] = "DALI refuses it, although Pillow decodes it"
                else:
                    suspects += [part[: len(part) // 2], part[len(part) // 2 :]]
        return found

    def _was_refused(self, jpegs: list[npt.NDArray[np.uint8]]) -> bool:
        """Whether DALI cannot decode these images."""
        feed = iter([EncodedBatch(jpegs, None)])
        alone = Decoder(
            lambda: next(feed, None), len(jpegs), self._image_size, None, self._device, self._num_threads, 1
        )
        try:
            alone.next()
        except DecodeFailureError:
            return True
        finally:
            alone.close()
        return False

    def _batch(self, planned: PlannedBatch, images: torch.Tensor, holes: tuple[int, ...] = ()) -> Batch:
        labels, sample_ids = self._view.labels[planned.positions], self._view.sample_ids[planned.positions]
        labels[[*holes]] = sample_ids[[*holes]] = -1
        return Batch(
            images=images,
            labels=torch.from_numpy(labels).to(self._device, non_blocking=True),
            sample_ids=torch.from_numpy(sample_ids),
            rows_per_rank=planned.rows_per_rank,
        )

    def _empty(self, planned: PlannedBatch) -> Batch:
        return self._batch(planned, torch.empty((0, 3, self._image_size, self._image_size), device=self._device))

    def _culprit(self, read: _Read, reason: str) -> DataError:
        """Decode a refused batch image by image, so that the message can name the one that is broken."""
        dataset = self._view.dataset
        sample_ids = self._view.sample_ids[read.planned.positions].tolist()
        for row, problem in sorted(self._undecodable(read.encoded.jpegs, set()).items()):
            shard = dataset.shard_location(int(dataset.index[sample_ids[row]]["shard"]))
            return DataError(
                f"shard {shard}: image {dataset.sample_key(sample_ids[row])} (sample {sample_ids[row]}) cannot be decoded "
                f"({problem}); every image must be a whole JPEG. Restore the shard or pack again without it"
            )
        return DataError(
            f"data set {dataset.directory}: DALI refuses a batch ({reason}) and takes each of its {len(sample_ids)} images by "
            f"itself: samples {min(sample_ids)} to {max(sample_ids)}. Run again; if it comes again, lower optim.global_batch"
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
