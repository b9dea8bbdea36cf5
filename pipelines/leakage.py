"""What two sets of images have in common and should not: people, the same image, nearly the same image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.duplicates import Hashes, confirmed, near_pairs
from pipelines.manifest import PackedDataset
from pipelines.order import Int64Array
from pipelines.verify import reader_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Side:
    """Some samples (rising rows) of a data set, under a name, and the hashes of all of its images."""

    name: str
    dataset: PackedDataset
    samples: Int64Array
    hashes: Hashes

    def place(self, sample: int) -> str:
        """Shard and tar member of a sample."""
        shard = self.dataset.manifest.shards[int(self.dataset.index[sample]["shard"])].file
        return f"{shard}:{self.dataset.sample_key(sample)}"

    def identity(self, sample: int) -> str:
        return self.dataset.identities[int(self.dataset.index[sample]["label"])]


@dataclass(frozen=True)
class Leak:
    """One thing that is on both sides: ``identity``, ``image`` (the same bytes) or ``look-alike``."""

    kind: str
    one: str
    other: str
    same_identity: bool

    def __str__(self) -> str:
        if self.kind == "identity":
            return f"identity: {self.one!r} is on both sides"
        whose = "one identity" if self.same_identity else "two identities"
        return f"{self.kind}: {self.one} and {self.other} ({whose})"


def find_leaks(one: Side, other: Side, images_only: bool = False, progress: Progress | None = None) -> list[Leak]:
    """Everything of ``one`` that ``other`` has too; of several images that are equal, or whose looks
    have one hash, the first of each side is told.

    images_only: people may be on both sides.
    """
    count = progress or (lambda what, done, total: None)
    leaks = []
    if not images_only:
        labels = [np.unique(side.dataset.index["label"][side.samples]) for side in (one, other)]
        keys = [
            {side.dataset.identities[int(label)] for label in own}
            for side, own in zip((one, other), labels, strict=True)
        ]
        leaks = [Leak("identity", key, key, True) for key in sorted(keys[0] & keys[1])]
    told: set[tuple[int, int]] = set()
    for left, right in _equal(one, other):
        told.add((left, right))
        leaks.append(_leak("image", one, other, left, right))
    mine, theirs = (side.samples[side.hashes.decoded_N[side.samples]] for side in (one, other))
    mine, theirs = _first_of_looks(one, mine), _first_of_looks(other, theirs)
    looks = np.concatenate((one.hashes.looks_N[mine], other.hashes.looks_N[theirs]))
    pairs = near_pairs(looks, progress=lambda done, of: count("comparing looks", done, of))
    pairs = pairs[(pairs[:, 0] < len(mine)) & (pairs[:, 1] >= len(mine))]
    readers = reader_of(one.dataset), reader_of(other.dataset)

    def read(place: int) -> bytes:
        return readers[0](int(mine[place])) if place < len(mine) else readers[1](int(theirs[place - len(mine)]))

    sure = confirmed(pairs, read, progress=lambda done, of: count("comparing pixels", done, of))
    for first, second in sure.tolist():
        left, right = int(mine[first]), int(theirs[second - len(mine)])
        if (one.hashes.exact_N2[left] != other.hashes.exact_N2[right]).any():
            leaks.append(_leak("look-alike", one, other, left, right))
    return leaks


def _leak(kind: str, one: Side, other: Side, left: int, right: int) -> Leak:
    places = f"{one.name} {one.place(left)}", f"{other.name} {other.place(right)}"
    return Leak(kind, *places, one.identity(left) == other.identity(right))


def _equal(one: Side, other: Side) -> list[tuple[int, int]]:
    """Pairs of samples with the same bytes, the first of each side, in the order of ``one``."""
    mine, theirs = _first_of_equals(one, one.samples), _first_of_equals(other, other.samples)
    halves = np.dtype([("a", "<u8"), ("b", "<u8")])
    left = np.ascontiguousarray(one.hashes.exact_N2[mine]).view(halves).ravel()
    right = np.ascontiguousarray(other.hashes.exact_N2[theirs]).view(halves).ravel()
    _, at_left, at_right = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    return sorted(zip(mine[at_left].tolist(), theirs[at_right].tolist(), strict=True))


def _first_of_equals(side: Side, samples: Int64Array) -> Int64Array:
    """Of samples with the same bytes the first; those that could not be read are left out."""
    exact = side.hashes.exact_N2[samples]
    samples, exact = samples[exact.any(axis=1)], exact[exact.any(axis=1)]
    _, first = np.unique(exact, axis=0, return_index=True)
    return samples[np.sort(first)]


def _first_of_looks(side: Side, samples: Int64Array) -> Int64Array:
    """Of samples whose looks have one hash the first."""
    _, first = np.unique(side.hashes.looks_N[samples], return_index=True)
    return samples[np.sort(first)]
