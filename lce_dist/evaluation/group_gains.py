"""How sure each group's gain M(n,o) - M(o,o) is, when many groups are looked at together.

Identities are drawn again, as in bootstrap.py; a group's gain in a sample is that of its genuine pairs, each as often as its identity
came. Of up to 8,192 images the two thresholds are looked for anew in each sample, in the very samples of the matrix's
intervals; of more they stay (over so many impostor pairs they hardly move), and identities come as often as Poisson's law with
mean 1 says. The worst of many groups is low by chance alone, so the intervals hold for all groups at once: the largest deviation
over groups, each in units of its own standard error, is within them in 95 % of samples.
**Source**: Romano, Wolf, "Exact and approximate stepdown methods for multiple hypothesis testing", JASA 2005 (the max
statistic, here in one step).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.evaluation.bootstrap import IdentityCounts, Interval, Resampled
from lce_dist.evaluation.counting import STEPS_PER_UNIT, level_of
from lce_dist.evaluation.mates import Pair, mates

FEWEST_IDENTITIES = 10  # of fewer, samples say too little of how others would do
LEVEL = 0.95
_CELLS = ("old_old", "new_old")
_BLOCK_IDENTITIES = 4096

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Words = npt.NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Draw:
    """The samples that thresholds were looked for in: their weights, and by cell the candidates and those chosen (B,)."""

    resampled: Resampled
    counts: Mapping[str, IdentityCounts]
    chosen_B: Mapping[str, Ints]


def group_gains(
    cells: Mapping[str, Pair],
    thresholds: Mapping[str, float],
    columns: Mapping[str, Words],
    draw: Draw | None,
    num_samples: int,
    seed: int,
) -> dict[tuple[str, str], Interval]:
    """The gain of each (column, value) with genuine pairs of at least 10 identities, and its interval among all of them.

    cells: "old_old" and "new_old", of the same images. draw: of the samples over all of these images; None: thresholds stay.
    Errors: those of ``mates``. **Memory**: 8 bytes an image, column and threshold (213 of ``draw``, else 1).
    """
    identity_I = np.unique(cells["old_old"][0].labels_N)
    levels, chosen = {}, {}
    for name in _CELLS:
        if draw is None:
            levels[name], chosen[name] = np.array([level_of(thresholds[name])]), np.zeros(num_samples, dtype=np.int64)
        else:
            used_U, chosen[name] = np.unique(draw.chosen_B[name], return_inverse=True)
            levels[name] = draw.counts[name].threshold_K[used_U] + STEPS_PER_UNIT
    tables = [_Table.of(column, word_N, cells, identity_I, levels) for column, word_N in columns.items()]
    point = {name: int(level_of(thresholds[name])) for name in _CELLS}
    for some in mates({name: cells[name] for name in _CELLS}) if tables else ():
        for table in tables:
            table.count(some.query_P, some.level_P, levels, point)
    return _intervals(
        [group for table in tables for group in table.groups()],
        chosen,
        _drawn(identity_I, draw, num_samples, seed),
        num_samples,
    )


def _drawn(identity_I: Ints, draw: Draw | None, num_samples: int, seed: int) -> Iterator[tuple[int, Weights]]:
    """Weights (B, i) of identities that follow each other, and the place of the first."""
    if draw is not None:
        yield 0, draw.resampled.weight_BI
        return
    random = np.random.default_rng(seed)
    for first in range(0, len(identity_I), _BLOCK_IDENTITIES):
        count = min(_BLOCK_IDENTITIES, len(identity_I) - first)
        yield first, random.poisson(1.0, (num_samples, count)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Group:
    """One value: the identities (M,) on its genuine pairs, how many pairs (M,), and those from each threshold on (M, K) by cell."""

    name: tuple[str, str]
    identity_M: Ints
    genuine_M: npt.NDArray[np.float32]
    from_MK: dict[str, npt.NDArray[np.float32]]
    gain: float


@dataclass(frozen=True, eq=False)
class _Table:
    """One column: each (identity, value) that images have, and counts of its genuine pairs."""

    column: str
    value_V: Words
    identity_M: Ints
    value_M: Ints
    place_N: Ints
    genuine_M: Ints
    reached_MK: dict[str, npt.NDArray[np.int32]]
    at_V: dict[str, Ints]

    @classmethod
    def of(
        cls, column: str, word_N: Words, cells: Mapping[str, Pair], identity_I: Ints, levels: Mapping[str, Ints]
    ) -> _Table:
        value_V, value_N = np.unique(word_N, return_inverse=True)
        code_N = np.searchsorted(identity_I, cells["old_old"][0].labels_N) * len(value_V) + value_N
        code_M, place_N = np.unique(code_N, return_inverse=True)
        identity_M, value_M = np.divmod(code_M, len(value_V))
        reached = {name: np.zeros((len(code_M), len(levels[name]) + 1), dtype=np.int32) for name in _CELLS}
        at_V = {name: np.zeros(len(value_V), dtype=np.int64) for name in _CELLS}
        return cls(column, value_V, identity_M, value_M, place_N, np.zeros(len(code_M), dtype=np.int64), reached, at_V)

    def count(
        self,
        query_P: Ints,
        level_P: Mapping[str, npt.NDArray[np.int32]],
        levels: Mapping[str, Ints],
        point: Mapping[str, int],
    ) -> None:
        place_P = self.place_N[query_P]
        self.genuine_M[:] += np.bincount(place_P, minlength=len(self.genuine_M))
        for name in _CELLS:
            table = self.reached_MK[name]
            reached_P = np.searchsorted(levels[name], level_P[name], side="right")
            table += np.bincount(place_P * table.shape[1] + reached_P, minlength=table.size).reshape(table.shape)
            accepted_P = level_P[name] >= point[name]
            self.at_V[name][:] += np.bincount(self.value_M[place_P[accepted_P]], minlength=len(self.value_V))

    def groups(self) -> Iterator[_Group]:
        from_MK = {
            name: np.cumsum(table[:, ::-1], axis=1)[:, ::-1][:, 1:].astype(np.float32)
            for name, table in self.reached_MK.items()
        }
        for value, word in enumerate(self.value_V):
            rows = np.flatnonzero((self.value_M == value) & (self.genuine_M > 0))
            if len(rows) >= FEWEST_IDENTITIES:
                gain = int(self.at_V["new_old"][value] - self.at_V["old_old"][value]) / int(self.genuine_M[rows].sum())
                yield _Group(
                    (self.column, str(word)),
                    self.identity_M[rows],
                    self.genuine_M[rows].astype(np.float32),
                    {name: table[rows] for name, table in from_MK.items()},
                    gain,
                )


def _intervals(
    groups: list[_Group], chosen: Mapping[str, Ints], drawn: Iterator[tuple[int, Weights]], num_samples: int
) -> dict[tuple[str, str], Interval]:
    if not groups:
        return {}
    more_GB, genuine_GB = (np.zeros((len(groups), num_samples)) for _ in range(2))
    for first, weight_Bi in drawn:
        for row, group in enumerate(groups):
            low, high = np.searchsorted(group.identity_M, [first, first + weight_Bi.shape[1]])
            weight_MB = weight_Bi[:, group.identity_M[low:high] - first].T
            genuine_GB[row] += group.genuine_M[low:high] @ weight_MB
            for name, sign in (("new_old", 1.0), ("old_old", -1.0)):
                accepted_MB = group.from_MK[name][low:high][:, chosen[name]]
                more_GB[row] += sign * np.einsum("mb,mb->b", weight_MB, accepted_MB)
    with np.errstate(invalid="ignore"):
        off_GB = more_GB / genuine_GB - np.array([[group.gain] for group in groups])
    count_G = np.array([len(group.identity_M) for group in groups])
    # of n identities drawn again, the spread is sqrt((n - 1) / n) of what it is among others
    error_G = np.sqrt(np.nanmean(off_GB**2, axis=1) * count_G / (count_G - 1))
    moving = error_G > 0.0
    times = 0.0
    if moving.any():
        times = float(np.quantile(np.nanmax(np.abs(off_GB[moving]) / error_G[moving, None], axis=0), LEVEL))
    return {
        group.name: Interval(group.gain, group.gain - times * float(error), group.gain + times * float(error), LEVEL)
        for group, error in zip(groups, error_G, strict=True)
    }
