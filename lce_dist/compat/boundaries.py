"""From the cosines of a class's images with its centre to the class's boundary, by a policy, for millions of classes.

**Source**: method.md section 2 of the project, after Meng et al., ICCV 2021. ``iqr`` leaves out what lies more than
1.5 interquartile ranges above the third quartile (Tukey's fences), as the re-run in AdvBCT (CVPR 2023) does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NEVER_CROSSED = -1.0  # the cosine of a boundary that leaves nothing outside
_FENCE = 1.5
_BLOCK_IMAGES = 1 << 20


@dataclass(frozen=True)
class BoundaryPolicy:
    """Where a class ends: at its farthest image, at a percentile of its angles, or at its farthest image but for outliers.

    percentile: of the angles, 0 to 100, for kind "percentile". slack_rad: added to every angle. single_image: a class of
    one image has no boundary ("align_only"), or one that is ``slack_rad`` wide ("slack").
    """

    kind: Literal["max", "percentile", "iqr"] = "max"
    percentile: float = 95.0
    slack_rad: float = 0.0
    single_image: Literal["align_only", "slack"] = "align_only"

    def describe(self) -> dict[str, Any]:
        """What enters a fingerprint: keys that have an effect, as plain values."""
        values = asdict(self)
        if self.kind != "percentile":
            del values["percentile"]
        return values


def boundary_angles(cos_P: Floats, count_S: Ints, policy: BoundaryPolicy) -> Floats:
    """Angle in radians (S,) at which each class ends, before slack; every class has at least one image.

    cos_P: cosines of all images, class after class, in any order within a class; count_S: images a class. Percentiles
    are those of ``numpy.percentile`` (linear), to the last bit. **Memory**: some 60 MiB beside what is given.
    """
    angle_S = np.empty(len(count_S))
    for classes, images in _blocks(count_S):
        angle_S[classes] = _angles_of_block(cos_P[images], count_S[classes], policy)
    return angle_S


def boundary_cosines(
    angle_S: Floats, count_S: Ints, policy: BoundaryPolicy, seen_S: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.float32]:
    """Cosines (S,) of the boundaries: slack is added, classes without a boundary get one that is never crossed."""
    single_S = count_S == 1
    angle_S = np.where(single_S, 0.0, angle_S) + policy.slack_rad
    cos_S = np.where(angle_S < np.pi, np.cos(angle_S), NEVER_CROSSED)
    if policy.single_image == "align_only":
        cos_S[single_S] = NEVER_CROSSED
    if seen_S is not None:
        cos_S[~seen_S] = NEVER_CROSSED
    return cos_S.astype(np.float32)


def angles_of(cos: Floats) -> Floats:
    """Radians; cosines of unit vectors may pass 1 by a rounding."""
    return np.arccos(np.clip(cos, -1.0, 1.0))


def _blocks(count_S: Ints) -> Iterator[tuple[slice, slice]]:
    """Runs of classes of about ``_BLOCK_IMAGES`` images together, at least one class each, and their images."""
    end_S = np.cumsum(count_S)
    first, begin = 0, 0
    while first < len(count_S):
        last = max(first + 1, int(np.searchsorted(end_S, begin + _BLOCK_IMAGES, side="right")))
        end = int(end_S[last - 1])
        yield slice(first, last), slice(begin, end)
        first, begin = last, end


def _angles_of_block(cos_P: Floats, count_S: Ints, policy: BoundaryPolicy) -> Floats:
    angle_P = angles_of(cos_P)
    begin_S = np.cumsum(count_S) - count_S
    if policy.kind == "max":
        return np.maximum.reduceat(angle_P, begin_S)
    angle_P = angle_P[np.lexsort((angle_P, np.repeat(np.arange(len(count_S)), count_S)))]
    if policy.kind == "percentile":
        return _quantile(angle_P, begin_S, count_S, policy.percentile / 100.0)
    lower_S, upper_S = (_quantile(angle_P, begin_S, count_S, share) for share in (0.25, 0.75))
    fence_S = upper_S + _FENCE * (upper_S - lower_S)
    inside_S = np.add.reduceat(angle_P <= np.repeat(fence_S, count_S), begin_S, dtype=np.int64)
    # rounding may leave the third quartile of equal angles a bit below them
    return angle_P[begin_S + np.maximum(inside_S, 1) - 1]


def _quantile(angle_P: Floats, begin_S: Ints, count_S: Ints, share: float) -> Floats:
    place_S = (count_S - 1) * share
    below_S = np.floor(place_S).astype(np.int64)
    part_S = place_S - below_S
    low_S = angle_P[begin_S + below_S]
    high_S = angle_P[begin_S + np.minimum(below_S + 1, count_S - 1)]
    # from the nearer end, as numpy.percentile does
    step_S = high_S - low_S
    return np.where(part_S >= 0.5, high_S - step_S * (1.0 - part_S), low_S + step_S * part_S)
