"""One model's unit vectors of a set of images, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError

Counts = npt.NDArray[np.int64]

_NORM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class EmbeddingSet:
    """One model's unit vectors (N, D) float32 of N images, with their identities and image numbers (N,) int64.

    Errors: RunError when a shape or type is wrong, a value is not finite, a norm is off 1 by more than 1e-3, or an
    image occurs twice (a padded batch would count pairs twice).
    """

    name: str
    vectors_ND: npt.NDArray[np.float32]
    labels_N: Counts
    sample_ids_N: Counts

    def __post_init__(self) -> None:
        shape = self.vectors_ND.shape
        if len(shape) != 2 or 0 in shape or self.vectors_ND.dtype != np.float32:
            raise RunError(
                f"vectors of model {self.name!r} are {self.vectors_ND.dtype} of shape {shape}; "
                "must be float32 of shape (images, dimensions), both at least 1. Cast and reshape them"
            )
        for kind, column in (("labels", self.labels_N), ("sample ids", self.sample_ids_N)):
            if column.shape != shape[:1] or column.dtype != np.int64:
                raise RunError(
                    f"{kind} of model {self.name!r} are {column.dtype} of shape {column.shape}; "
                    f"must be int64 of shape ({shape[0]},), one a vector. Pass one for each vector"
                )
        # A sum of squares is not finite when any element is not, so one pass finds both faults.
        norm_N = np.sqrt(np.einsum("nd,nd->n", self.vectors_ND, self.vectors_ND))
        wrong_N = np.flatnonzero(~(np.abs(norm_N - 1.0) <= _NORM_TOLERANCE))
        if wrong_N.size:
            row = int(wrong_N[0])
            raise RunError(
                f"vector of image {self.sample_ids_N[row]} of model {self.name!r} has norm {norm_N[row]:.6g} "
                f"({wrong_N.size} of {shape[0]} such vectors); must be finite and within {_NORM_TOLERANCE} of 1. "
                "Normalise the vectors, and look for a diverged training when they are not finite"
            )
        unique, times = np.unique(self.sample_ids_N, return_counts=True)
        if len(unique) != shape[0]:
            raise RunError(
                f"image {unique[times > 1][0]} occurs {times.max()} times among the {shape[0]} vectors of model "
                f"{self.name!r}; each image must occur once. Drop padded rows before building the set"
            )

    def rows(self, rows_M: Counts) -> EmbeddingSet:
        """The set of some of its images, in the order of ``rows_M`` (M,)."""
        return EmbeddingSet(self.name, self.vectors_ND[rows_M], self.labels_N[rows_M], self.sample_ids_N[rows_M])


def whole_identities(one: EmbeddingSet, most_images: int, seed: int) -> Counts:
    """Rows (M,), rising, of all images of identities drawn while they fit into ``most_images``; of two at least."""
    identities, count_I = np.unique(one.labels_N, return_counts=True)
    taken: list[np.int64] = []
    room = most_images
    for place in np.random.default_rng(seed).permutation(len(identities)):
        if count_I[place] <= room or len(taken) < 2:  # one that is too large does not keep the others out
            taken.append(identities[place])
            room -= int(count_I[place])
    return np.flatnonzero(np.isin(one.labels_N, taken))
