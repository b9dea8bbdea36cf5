"""How sure the numbers of a protocol are: identities are drawn again, and with them the pairs, probes or queries of its list.

As in bootstrap.py an identity that came w times counts w times: a genuine pair of identity i weighs w_i, an impostor pair of i and
j weighs w_i * w_j, a probe or query of i weighs w_i. Thresholds of a FAR (or FPIR) are looked for anew in each sample. Enrolled
people and galleries stay as they are.
**Source**: Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the subsets bootstrap", CVIU 2004.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lce_dist.errors import RunError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Weights = npt.NDArray[np.float32]

_SAMPLES, _FEWEST_SAMPLES = 1000, 200
_MOST_WEIGHED = 2_000_000_000  # entries of the list, over all samples


@dataclass(frozen=True, eq=False)
class Scored:
    """Entries of a list with a score each (P,), accepted from a threshold on: genuine or not, and one or two identities.

    first_P, second_P: numbers of identities from 0; the second is that of an impostor pair's other side, or equal to the first. A score
    of -inf is never accepted.
    """

    score_P: Floats
    genuine_P: Bools
    first_P: Ints
    second_P: Ints


def num_samples(num_entries: int) -> int:
    """1,000, and fewer for lists so long that they would take minutes; 200 at least."""
    return int(np.clip(_MOST_WEIGHED // max(1, num_entries), _FEWEST_SAMPLES, _SAMPLES))


def drawn_weights(num_identities: int, samples: int, seed: int = 0) -> Weights:
    """How often each identity came in each sample (samples, identities), float32. Errors: RunError for fewer than two."""
    if num_identities < 2:
        raise RunError(f"{num_identities} identity cannot be drawn again; intervals need two. Name more identities")
    draw = np.random.default_rng(seed)
    weights = np.empty((samples, num_identities), dtype=np.float32)
    for row in weights:
        row[:] = np.bincount(draw.integers(0, num_identities, num_identities), minlength=num_identities)
    return weights


def resampled_rates(scored: Scored, rates: Sequence[float], weight_BI: Weights) -> Floats:
    """Share of the genuine accepted at each rate of accepted impostors (F, B), the threshold chosen anew in each sample.

    nan where a sample holds no genuine or no impostor entry. **Memory**: 40 bytes an entry.
    """
    order_G, order_X = (
        chosen[np.argsort(-scored.score_P[chosen], kind="stable")]
        for chosen in (np.flatnonzero(scored.genuine_P), np.flatnonzero(~scored.genuine_P))
    )
    rising_G = -scored.score_P[order_G]
    score_X = scored.score_P[order_X]
    first_G, first_X, second_X = scored.first_P[order_G], scored.first_P[order_X], scored.second_P[order_X]
    alone = np.array_equal(first_X, second_X)
    found = np.full((len(rates), len(weight_BI)), np.nan)
    for sample, weight_I in enumerate(weight_BI):
        weight_X = weight_I[first_X] if alone else weight_I[first_X] * weight_I[second_X]
        below_X = np.cumsum(weight_X, dtype=np.float64)
        genuine_G = np.append(0.0, np.cumsum(weight_I[first_G], dtype=np.float64))
        if not len(below_X) or below_X[-1] == 0.0 or genuine_G[-1] == 0.0:
            continue
        for number, rate in enumerate(rates):
            # the highest impostor that is one too many; all weights are whole numbers, so sums are exact
            place = int(np.searchsorted(below_X, rate * below_X[-1] * (1.0 + 1e-12), side="right"))
            lowest = -score_X[place] if place < len(score_X) else np.inf
            accepted = int(np.searchsorted(rising_G, lowest, side="left"))
            found[number, sample] = genuine_G[accepted] / genuine_G[-1]
    return found


def resampled_means(value_NK: Floats, label_N: Ints, weight_BI: Weights) -> Floats:
    """Means (K, B) of values of entries (N, K), each as often as its identity came; nan where none came."""
    num_identities = weight_BI.shape[1]
    sum_IK = np.zeros((num_identities, value_NK.shape[1]))
    np.add.at(sum_IK, label_N, value_NK)
    count_I = np.bincount(label_N, minlength=num_identities).astype(np.float64)
    weights = weight_BI.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_BK: Floats = (weights @ sum_IK) / (weights @ count_I)[:, None]
    return means_BK.T


def pair_weight_sums(scored: Scored, value_PK: Floats, weight_BI: Weights) -> Floats:
    """Weighted sums (K, B) of values of pairs (P, K), which weigh as pairs do."""
    found = np.empty((value_PK.shape[1], len(weight_BI)))
    for sample, weight_I in enumerate(weight_BI):
        weight_P = np.where(scored.genuine_P, 1.0, weight_I[scored.second_P]) * weight_I[scored.first_P]
        found[:, sample] = weight_P @ value_PK
    return found


def linked(first_P: Ints, second_P: Ints, genuine_P: Bools) -> tuple[Ints, Ints]:
    """A number of the first's and of the second's identity (P,), where none is named: images that genuine pairs link are one.

    ``first_P``, ``second_P``: numbers of images, the same on both sides for the same image.
    """
    images, place = np.unique(np.concatenate([first_P, second_P]), return_inverse=True)
    parent = list(range(len(images)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    one_P, other_P = place[: len(first_P)], place[len(first_P) :]
    for one, other in zip(one_P[genuine_P].tolist(), other_P[genuine_P].tolist(), strict=True):
        parent[root(one)] = root(other)
    of_image = np.unique([root(node) for node in range(len(images))], return_inverse=True)[1].astype(np.int64)
    return of_image[one_P], of_image[other_P]


def interval_of(value: float, samples_B: Floats, level: float = 0.95) -> Mapping[str, float] | None:
    """value, low, high, level for JSON; None where no sample has the number."""
    known_B = samples_B[~np.isnan(samples_B)]
    if not len(known_B):
        return None
    low, high = np.quantile(known_B, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return {"value": value, "low": float(low), "high": float(high), "level": level}
