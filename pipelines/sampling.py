"""Orders for methods that care who meets in a batch: classes equally often, or P identities with K images each.

Both are arithmetic on the number of the step, as in pipelines/order.py: the same global batch on any number of ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.order import Int64Array, UInt64Array, derive_key, mix64, permute, permute_each

_CLASSES, _IMAGES = 1, 2  # of the two uses of one seed


@dataclass(frozen=True, eq=False)
class ImagesOfClasses:
    """The samples of each class: those of class c are ``position_N[first_C[c] : first_C[c + 1]]``.

    **Memory**: 8 bytes a sample and a class.
    """

    position_N: Int64Array
    first_C: Int64Array

    @classmethod
    def of(cls, label_N: npt.NDArray[np.int64], num_classes: int) -> ImagesOfClasses:
        """From each sample's class; every class must have a sample."""
        counts = np.bincount(label_N, minlength=num_classes)
        first_C = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(np.argsort(label_N, kind="stable").astype(np.int64), first_C)

    @property
    def num_classes(self) -> int:
        return len(self.first_C) - 1

    def sizes(self, class_B: Int64Array) -> Int64Array:
        """How many samples each class has."""
        return self.first_C[class_B + 1] - self.first_C[class_B]

    def at(self, class_B: Int64Array, place_B: Int64Array) -> Int64Array:
        """Positions of the samples at these places within their classes."""
        return self.position_N[self.first_C[class_B] + place_B]


@dataclass(frozen=True)
class _Sampled:
    images: ImagesOfClasses
    global_batch: int
    seed: int
    steps_per_epoch: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        steps = -(-len(self.images.position_N) // self.global_batch)
        object.__setattr__(self, "steps_per_epoch", steps)

    def epoch_of(self, step: int) -> int:
        """Every step draws its own augmentation: an image may come again in the next one."""
        return step

    def _image_keys(self, class_B: Int64Array, pass_B: Int64Array) -> UInt64Array:
        key = np.uint64(derive_key(self.seed, _IMAGES))
        return mix64(mix64(class_B.astype(np.uint64) ^ key) ^ pass_B.astype(np.uint64))


@dataclass(frozen=True)
class BalancedOrder(_Sampled):
    """Every class once before any comes again, and of a class every image before one is repeated.

    An epoch is as long as one that holds every sample once.
    """

    def batch(self, step: int) -> Int64Array:
        """The (G,) sample positions of global batch ``step``."""
        draw_B = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        num_classes = self.images.num_classes
        round_B, turn_B = np.divmod(draw_B, num_classes)
        class_B = np.empty_like(draw_B)
        for number in np.unique(round_B).tolist():
            at = round_B == number
            class_B[at] = permute(turn_B[at], num_classes, derive_key(self.seed, _CLASSES, number))
        size_B = self.images.sizes(class_B)
        pass_B, place_B = np.divmod(round_B, size_B)  # in round r a class gives its r-th image
        return self.images.at(class_B, permute_each(place_B, size_B, self._image_keys(class_B, pass_B)))


@dataclass(frozen=True)
class PKOrder(_Sampled):
    """``global_batch / images_per_identity`` different identities a batch, of each ``images_per_identity`` images.

    The images of an identity in a batch differ where it has as many; one with fewer gives each as often as the others, but
    for one. Of its images every one comes before one is repeated, but for those left over when their number is no multiple
    of ``images_per_identity``; who is left over changes from pass to pass, for identities likewise.
    """

    images_per_identity: int = 4

    def batch(self, step: int) -> Int64Array:
        """The (G,) sample positions of global batch ``step``; images of one identity are neighbours."""
        num_classes, per_identity = self.images.num_classes, self.images_per_identity
        identities = self.global_batch // per_identity
        round_, turn = divmod(step, num_classes // identities)
        turn_P = np.arange(turn * identities, (turn + 1) * identities, dtype=np.int64)
        class_P = permute(turn_P, num_classes, derive_key(self.seed, _CLASSES, round_))
        class_B = np.repeat(class_P, per_identity)
        image_B = np.tile(np.arange(per_identity, dtype=np.int64), identities)
        size_B = self.images.sizes(class_B)
        groups_B = np.maximum(1, size_B // per_identity)
        pass_B, group_B = np.divmod(np.int64(round_), groups_B)
        place_B = (group_B * per_identity + image_B) % size_B
        return self.images.at(class_B, permute_each(place_B, size_B, self._image_keys(class_B, pass_B)))
