"""Who gains and who loses: the upgrade for each group of images, at thresholds that hold for everybody.

A group is one value of an attribute column. Its TAR is over genuine pairs whose query image is in it, its FAR over impostor
pairs with both images in it (of more than 8,192 images, over so many of them), both at the pair of models' own threshold for
all images, because a deployed system has one.
**Source**: update gain: method.md section 7 of the project; FAR within a group: Grother et al., NISTIR 8280, 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lce_dist.evaluation.bootstrap import Interval
from lce_dist.evaluation.counting import count_at_all_levels, level_of
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.mates import Flips, Pair, mates

_MOST_IMAGES = 8192  # squared: the pairs that are counted at all levels
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Slice:
    """One value of one column; tar and far by cell. far is None where a group has no impostor pair.

    gain: M(n,o) - M(o,o) and the interval that it has among all groups (group_gains.py); None of too few identities.
    update_gain: of M(n,o) on the way from M(o,o) to M(*,*); None where it is not defined or M(*,*) unknown.
    """

    column: str
    value: str
    num_images: int
    num_identities: int
    num_genuine: int
    tar: dict[str, float]
    far: dict[str, float | None]
    flips: dict[str, Flips]
    gain: Interval | None = None

    @property
    def loses(self) -> bool:
        """Whether it is sure that shipping takes from this group."""
        return self.gain is not None and self.gain.high < 0.0

    @property
    def update_gain(self) -> float | None:
        """(M(n,o) - M(o,o)) / (M(*,*) - M(o,o)) of this group."""
        if not {"old_old", "new_old", "independent_new"} <= self.tar.keys():
            return None
        way = self.tar["independent_new"] - self.tar["old_old"]
        return (self.tar["new_old"] - self.tar["old_old"]) / way if way > 0.0 else None


def slices(
    cells: Mapping[str, Pair],
    thresholds: Mapping[str, float],
    columns: Mapping[str, Words],
    changes: Mapping[str, tuple[str, str]],
) -> list[Slice]:
    """Every value of every column, in the order of columns and values; groups without a genuine pair are left out.

    cells: query and gallery by cell, all of the same images in the same order. columns: a value an image (N,). changes: names of
    flips, and the cells before and after. Errors: those of ``mates``. **Memory**: of ``mates``.
    """
    query = next(iter(cells.values()))[0]
    groupings = [_Grouping.of(column, value_N, list(cells), list(changes)) for column, value_N in columns.items()]
    for some in mates(cells) if groupings else ():
        accepted = {name: level_P >= level_of(thresholds[name]) for name, level_P in some.level_P.items()}
        changed = {}
        for name, (before, after) in changes.items():
            changed[name] = accepted[before] & ~accepted[after], ~accepted[before] & accepted[after]
        for grouping in groupings:
            grouping.count(some.query_P, accepted, changed)
    return [one for grouping in groupings for one in grouping.slices(query.labels_N, cells, thresholds)]


def with_gains(groups: list[Slice], gains: Mapping[tuple[str, str], Interval]) -> list[Slice]:
    """The groups, each with its gain where that is known."""
    return [replace(one, gain=gains.get((one.column, one.value))) for one in groups]


@dataclass(frozen=True, eq=False)
class _Grouping:
    """One column: its values (V,), the value of each image (N,), and counts of genuine pairs by value."""

    column: str
    value_V: Words
    group_N: Ints
    genuine_V: Ints
    accepted_V: dict[str, Ints]
    changed_V: dict[str, tuple[Ints, Ints]]

    @classmethod
    def of(cls, column: str, value_N: Words, cells: list[str], changes: list[str]) -> _Grouping:
        value_V, group_N = np.unique(value_N, return_inverse=True)

        def none() -> Ints:
            return np.zeros(len(value_V), dtype=np.int64)

        changed = {name: (none(), none()) for name in changes}
        return cls(column, value_V, group_N, none(), {name: none() for name in cells}, changed)

    def count(self, query_P: Ints, accepted: Mapping[str, Bools], changed: Mapping[str, tuple[Bools, Bools]]) -> None:
        group_P = self.group_N[query_P]
        self._add(self.genuine_V, group_P)
        for name, accepted_P in accepted.items():
            self._add(self.accepted_V[name], group_P[accepted_P])
        for name, both in changed.items():
            for count_V, changed_P in zip(self.changed_V[name], both, strict=True):
                self._add(count_V, group_P[changed_P])

    def _add(self, count_V: Ints, group_P: Ints) -> None:
        count_V += np.bincount(group_P, minlength=len(count_V))

    def slices(self, label_N: Ints, cells: Mapping[str, Pair], thresholds: Mapping[str, float]) -> Iterator[Slice]:
        for group in np.flatnonzero(self.genuine_V):
            rows = np.flatnonzero(self.group_N == group)
            some_rows = np.sort(np.random.default_rng(0).permutation(rows)[:_MOST_IMAGES])
            genuine = int(self.genuine_V[group])
            yield Slice(
                self.column,
                str(self.value_V[group]),
                len(rows),
                len(np.unique(label_N[rows])),
                genuine,
                {name: float(count_V[group] / genuine) for name, count_V in self.accepted_V.items()},
                {name: _far(pair, some_rows, thresholds[name]) for name, pair in cells.items()},
                {
                    name: Flips(int(lost_V[group]), int(won_V[group]), genuine)
                    for name, (lost_V, won_V) in self.changed_V.items()
                },
            )


def _far(pair: Pair, rows: Ints, threshold: float) -> float | None:
    """Share of impostor pairs with both images among ``rows`` that reach the threshold."""
    counts = count_at_all_levels(*(_rows(one, rows) for one in pair))
    return None if counts.num_impostor == 0 else counts.far_from(threshold)


def _rows(one: EmbeddingSet, rows: Ints) -> EmbeddingSet:
    return EmbeddingSet(one.name, one.vectors_ND[rows], one.labels_N[rows], one.sample_ids_N[rows])
