"""Who gains and who loses: the upgrade for each group of images, at thresholds that hold for everybody.

A group is one value of an attribute column. Its TAR is over genuine pairs whose query image is in it, its FAR over impostor
pairs with both images in it, both at the pair of models' own threshold for all images, because a deployed system has one.
**Source**: update gain: method.md section 7 of the project; FAR within a group: Grother et al., NISTIR 8280, 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.evaluation.counting import count_part, level_of
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.mates import Flips, Pair, flips_at, mates
from lce_dist.world import World

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.str_]


@dataclass(frozen=True)
class Slice:
    """One value of one column; tar and far by cell. far is None where a group has no impostor pair.

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
    world: World | None = None,
) -> list[Slice]:
    """Every value of every column, in the order of columns and values; groups without a genuine pair are left out.

    cells: query and gallery by cell, all of the same images in the same order. columns: a value an image (N,). changes: names of
    flips, and the cells before and after. Errors: those of ``mates``. **Memory**: of ``mates``; **Collectives**: of ``count_pairs``.
    """
    query = next(iter(cells.values()))[0]
    found = []
    for column, value_N in columns.items():
        values, group_N = np.unique(value_N, return_inverse=True)
        accepted = {name: np.zeros(len(values), dtype=np.int64) for name in cells}
        genuine_G = np.zeros(len(values), dtype=np.int64)
        changed = {name: [Flips(0, 0, 0)] * len(values) for name in changes}
        for some in mates(cells):
            group_P = group_N[some.query_P]
            genuine_G += np.bincount(group_P, minlength=len(values))
            for name, level_P in some.level_P.items():
                accepted[name] += np.bincount(group_P[level_P >= level_of(thresholds[name])], minlength=len(values))
            for name, (before, after) in changes.items():
                for group in np.unique(group_P):
                    changed[name][group] += flips_at(some.only(group_P == group), before, after, thresholds)
        for group, value in enumerate(values.tolist()):
            if genuine_G[group] == 0:
                continue
            rows = np.flatnonzero(group_N == group)
            found.append(
                Slice(
                    column,
                    value,
                    len(rows),
                    len(np.unique(query.labels_N[rows])),
                    int(genuine_G[group]),
                    {name: float(count_G[group] / genuine_G[group]) for name, count_G in accepted.items()},
                    {name: _far(pair, rows, thresholds[name], world) for name, pair in cells.items()},
                    {name: changed[name][group] for name in changes},
                )
            )
    return found


def _far(pair: Pair, rows: Ints, threshold: float, world: World | None) -> float | None:
    """Share of impostor pairs with both images among ``rows`` that reach the threshold."""
    query, gallery = (_rows(one, rows) for one in pair)
    if pair[0] is pair[1]:
        gallery = query
    counts = count_part(query, gallery, 1e-2, world)
    return None if counts.num_impostor == 0 else counts.far_from(threshold)


def _rows(one: EmbeddingSet, rows: Ints) -> EmbeddingSet:
    return EmbeddingSet(one.name, one.vectors_ND[rows], one.labels_N[rows], one.sample_ids_N[rows])
