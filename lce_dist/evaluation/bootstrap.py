"""How sure a TAR at a FAR is: identities, not images or pairs, are drawn again.

The estimator. Identities are drawn with replacement, as many as there are; w_i says how often identity i came. In the
sample so drawn a genuine pair of i counts w_i times, an impostor pair of i and j counts w_i * w_j times (two copies of
one identity are no impostors). The threshold for the FAR is looked for anew in each sample, and TAR read off there; an
interval is between percentiles of those TARs. All pairs that share an identity move together, which is what makes pairs
depend on each other. Thresholds are taken from a fixed set of candidates around the FAR, so images are scored once.
**Source**: Efron, "Bootstrap methods", 1979; Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the
subsets bootstrap", CVIU 2004, which draws subsets that are independent of each other, here identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError
from lce_dist.evaluation.metrics import EmbeddingSet, compare
from lce_dist.evaluation.scores import score_blocks

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_STEPS_PER_UNIT = 1 << 20
# Candidates reach from an eighth of the FAR to eight times it; neighbours are 2 % of a FAR apart.
_REACH = 8.0
_NUM_CANDIDATES = 210
_NEAR = 2.0  # most samples find their threshold among pairs above that of twice the FAR
_MERGE_AT = 1 << 22


@dataclass(frozen=True, eq=False)
class IdentityCounts:
    """One (query, gallery) pair of models, counted by identity (I,) and candidate threshold (K,), lowest first.

    threshold_K: the candidates, as scores in units of 2^-20. genuine_I and genuine_from_IK: genuine pairs of an identity, and
    those at or above each candidate. queries_I, galleries_I: its images. Impostor pairs (E,): two identities, the highest candidate that they reach (rising), and how
    many. near: a candidate at which about twice the FAR are accepted.
    """

    far: float
    identities_I: Ints
    threshold_K: Ints
    genuine_I: Ints
    genuine_from_IK: npt.NDArray[np.int32]
    queries_I: Ints
    galleries_I: Ints
    first_E: Ints
    second_E: Ints
    candidate_E: Ints
    count_E: Ints
    near: int

    def tar(self, weight_I: Floats) -> float:
        """TAR at the FAR when identity i counts ``weight_I[i]`` times; nan where no genuine or impostor pair is left."""
        return self.tar_and_chosen(weight_I)[0]

    def tar_and_chosen(self, weight_I: Floats) -> tuple[float, int]:
        """That TAR, and the candidate that was the threshold for it (the last one where there is no TAR)."""
        genuine = float(weight_I @ self.genuine_I)
        impostor = float(
            (weight_I @ self.queries_I) * (weight_I @ self.galleries_I)
            - weight_I**2 @ (self.queries_I * self.galleries_I)
        )
        if genuine == 0.0 or impostor == 0.0:
            return float("nan"), len(self.threshold_K) - 1
        share_K = self._impostors_from(self.near, weight_I) / impostor
        if share_K[self.near] <= self.far and self.near > 0:  # a lower candidate may do
            share_K = self._impostors_from(0, weight_I) / impostor
        chosen = int(np.argmax(share_K <= self.far))  # the last candidate is above every impostor
        return float(weight_I @ self.genuine_from_IK[:, chosen]) / genuine, chosen

    def _impostors_from(self, candidate: int, weight_I: Floats) -> Floats:
        """Weighted impostor pairs at or above each candidate (K,); below ``candidate``, those from it on."""
        part = slice(int(np.searchsorted(self.candidate_E, candidate)), None)
        pairs_E = weight_I[self.first_E[part]] * weight_I[self.second_E[part]] * self.count_E[part]
        reached_K = np.bincount(self.candidate_E[part], pairs_E, self.genuine_from_IK.shape[1])
        return np.cumsum(reached_K[::-1], dtype=np.float64)[::-1]


@dataclass(frozen=True)
class Interval:
    """An estimate, and the range that holds the true value in about ``level`` of all samples of identities."""

    value: float
    low: float
    high: float
    level: float


def count_by_identity(query: EmbeddingSet, gallery: EmbeddingSet, far: float) -> IdentityCounts:
    """Score all pairs once and keep what :meth:`IdentityCounts.tar` needs.

    Errors: RunError of ``compare``. **Memory**: a block of scores, ``compare``'s counts, 4 bytes per identity and
    candidate (210), and 32 bytes for each two identities and candidate among the 8 * FAR highest impostor pairs.
    """
    shares = np.geomspace(far / _REACH, min(0.999, far * _REACH), _NUM_CANDIDATES)
    # the FAR itself is among them, so that with every weight 1 the TAR is that of ``compare``
    fars = [np.finfo(np.float64).tiny, far, *shares.tolist()]
    found = compare(query, gallery, fars)
    threshold_K = np.unique(np.rint(np.array(list(found.threshold_at_far.values())) * _STEPS_PER_UNIT).astype(np.int64))
    identities_I = np.union1d(query.labels_N, gallery.labels_N)
    count, num_candidates = len(identities_I), len(threshold_K)
    of_query_N = np.searchsorted(identities_I, query.labels_N)
    of_gallery_N = np.searchsorted(identities_I, gallery.labels_N)
    genuine_I = np.zeros(count, dtype=np.int64)
    highest_IK = np.zeros(count * (num_candidates + 1), dtype=np.int32)
    keys, counts, waiting = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for block in score_blocks(query, gallery):
        row_P, column_P = np.nonzero(block.mate_BN & ~block.same_image_BN)
        identity_P = of_query_N[block.rows][row_P]
        reached_P = np.searchsorted(threshold_K, block.level_BN[row_P, column_P], side="right")
        genuine_I += np.bincount(identity_P, minlength=count)
        highest_IK += np.bincount(identity_P * (num_candidates + 1) + reached_P, minlength=len(highest_IK)).astype(
            np.int32
        )
        row_P, column_P = np.nonzero(~block.mate_BN & (block.level_BN >= threshold_K[0]))
        reached_P = np.searchsorted(threshold_K, block.level_BN[row_P, column_P], side="right") - 1
        ends = of_query_N[block.rows][row_P], of_gallery_N[column_P]
        pair_P = np.minimum(*ends) * count + np.maximum(*ends)  # (i, j) and (j, i) weigh the same
        keys.append(reached_P * count**2 + pair_P)
        counts.append(np.ones(len(pair_P), dtype=np.int64))
        waiting += len(pair_P)
        if waiting > _MERGE_AT:
            keys, counts, waiting = *_merged(keys, counts), 0
    keys, counts = _merged(keys, counts)
    candidate_E, pair_E = np.divmod(keys[0], count**2)
    first_E, second_E = np.divmod(pair_E, count)
    # impostors above a candidate, from the lowest candidate up: falling
    above_K = np.cumsum(np.bincount(candidate_E, counts[0], num_candidates)[::-1])[::-1]
    near = int(np.searchsorted(-above_K, -_NEAR * far * found.num_impostor))
    from_IK = np.cumsum(highest_IK.reshape(count, -1)[:, ::-1], axis=1, dtype=np.int32)[:, ::-1][:, 1:]
    return IdentityCounts(
        far,
        identities_I,
        threshold_K,
        genuine_I,
        from_IK,
        np.bincount(of_query_N, minlength=count),
        np.bincount(of_gallery_N, minlength=count),
        first_E,
        second_E,
        candidate_E,
        counts[0],
        min(near, num_candidates - 1),
    )


@dataclass(frozen=True, eq=False)
class Resampled:
    """B samples of identities: how often each came (B, I), and each cell's TAR and threshold's candidate in them (C, B)."""

    weight_BI: npt.NDArray[np.float32]
    tar_CB: Floats
    chosen_CB: Ints


def resample(counts: Sequence[IdentityCounts], num_samples: int = 1000, seed: int = 0) -> Resampled:
    """All cells in the same samples of identities, so that differences of cells can be judged too.

    Errors: RunError when the cells are not of the same identities. **Memory**: 4 bytes a sample and identity.
    """
    identities_I = counts[0].identities_I
    for each in counts[1:]:
        if not np.array_equal(each.identities_I, identities_I):
            raise RunError(
                f"cells of {len(identities_I)} and {len(each.identities_I)} identities, or of others, cannot be drawn "
                "together. Embed the same view of the data with every model"
            )
    random = np.random.default_rng(seed)
    weight_BI = np.empty((num_samples, len(identities_I)), dtype=np.float32)
    tar_CB = np.empty((len(counts), num_samples))
    chosen_CB = np.empty((len(counts), num_samples), dtype=np.int64)
    for sample in range(num_samples):
        drawn = random.integers(0, len(identities_I), len(identities_I))
        weight_I = np.bincount(drawn, minlength=len(identities_I)).astype(np.float64)
        weight_BI[sample] = weight_I
        for cell, each in enumerate(counts):
            tar_CB[cell, sample], chosen_CB[cell, sample] = each.tar_and_chosen(weight_I)
    return Resampled(weight_BI, tar_CB, chosen_CB)


def resampled_tars(counts: Sequence[IdentityCounts], num_samples: int = 1000, seed: int = 0) -> Floats:
    """TARs (cells, num_samples) of :func:`resample`, with its errors."""
    return resample(counts, num_samples, seed).tar_CB


def interval(value: float, samples_B: Floats, level: float = 0.95) -> Interval:
    """The range between the outer percentiles of ``samples_B``, such as a row, or a difference of rows, of resampled TARs.

    Samples without a TAR (nan) are left out. Errors: RunError when none is left.
    """
    known_B = samples_B[~np.isnan(samples_B)]
    if not len(known_B):
        raise RunError("no sample of identities holds both a genuine and an impostor pair. Hold out more identities")
    low, high = np.quantile(known_B, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(value, float(low), float(high), level)


def tar_interval(
    query: EmbeddingSet,
    gallery: EmbeddingSet,
    far: float,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """TAR at ``far`` with its interval; for several cells of one data set use :func:`resampled_tars`.

    Errors: RunError of ``compare``.
    """
    counts = count_by_identity(query, gallery, far)
    value = counts.tar(np.ones(len(counts.identities_I)))
    return interval(value, resampled_tars([counts], num_samples, seed)[0], level)


def _merged(keys: list[Ints], counts: list[Ints]) -> tuple[list[Ints], list[Ints]]:
    """One of each key, with the sum of its counts."""
    unique, place = np.unique(np.concatenate(keys), return_inverse=True)
    summed = np.zeros(len(unique), dtype=np.int64)
    np.add.at(summed, place, np.concatenate(counts))
    return [unique], [summed]
