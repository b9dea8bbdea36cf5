"""Intervals beside the numbers of ``lce evaluate``: lines of the table and entries for JSON, identities drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.protocol_files import PairList, TemplateList
from lce_dist.evaluation.identification import Identification
from lce_dist.evaluation.list_intervals import (
    Scored,
    drawn_weights,
    interval_of,
    linked,
    num_samples,
    pair_weight_sums,
    resampled_means,
    resampled_rates,
)
from lce_dist.evaluation.metrics import far_key
from lce_dist.evaluation.retrieval import Retrieval
from lce_dist.evaluation.verification import roc_of_scores

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Rows = list[tuple[str, str]]

_NAMED = "identities"
_LINKED = "groups of images that genuine pairs link"


@dataclass(frozen=True, eq=False)
class DrawnPairs:
    """Scored pairs, and what is drawn again: so many identities that are named, or groups of images where none are."""

    scored: Scored
    drawn: str
    count: int


def drawn_pairs(
    score_P: Floats,
    listed: PairList,
    first_names: Sequence[str | None] | None,
    second_names: Sequence[str | None] | None,
    images: tuple[Ints, Ints],
) -> DrawnPairs:
    """first_names, second_names: who is on each row of the two sides; images: a number for each row, the same for the same image."""
    names = [
        None if known is None else [known[row] for row in row_P.tolist()]
        for known, row_P in ((first_names, listed.first_P), (second_names, listed.second_P))
    ]
    words = [word for some in names if some is not None for word in some]
    if None in names or None in words:
        first_P, second_P = linked(images[0][listed.first_P], images[1][listed.second_P], listed.genuine_P)
        drawn = _LINKED
    else:
        _, place = np.unique(np.asarray(words, dtype=str), return_inverse=True)
        first_P, second_P = place[: len(score_P)].astype(np.int64), place[len(score_P) :].astype(np.int64)
        drawn = _NAMED
    count = int(max(first_P.max(), second_P.max())) + 1
    return DrawnPairs(Scored(score_P, listed.genuine_P, first_P, second_P), drawn, count)


def people_of_templates(
    listed: TemplateList, row_of: dict[str, int], identities: Sequence[str] | None
) -> list[str | None] | None:
    """Who each template is of, by its first image that has a vector; None for one without, or where nobody is named."""
    if identities is None:
        return None
    people: list[str | None] = [None] * len(listed.number_of)
    for template, key in zip(listed.template_R.tolist(), listed.keys, strict=True):
        row = row_of.get(key)
        if people[template] is None and row is not None:
            people[template] = identities[row]
    return people


def right_by_folds(score_P: Floats, genuine_P: Bools, threshold_K: Floats, fold_P: Ints | None) -> tuple[Bools, Ints]:
    """Which pairs (P,) are decided right at the threshold of their fold, and the fold of each, as ``accuracy_by_folds`` cuts."""
    if fold_P is None:
        fold_P = np.repeat(
            np.arange(len(threshold_K)), [len(part) for part in np.array_split(score_P, len(threshold_K))]
        )
    else:
        fold_P = np.unique(fold_P, return_inverse=True)[1]
    return (score_P >= threshold_K[fold_P]) == genuine_P, fold_P


def pair_intervals(
    rows: Rows,
    numbers: dict[str, Any],
    pairs: DrawnPairs,
    fars: Sequence[float],
    right: tuple[Bools, Ints] | None = None,
    old_P: Floats | None = None,
) -> None:
    """Add intervals of TARs and of the accuracy, its thresholds kept; with ``old_P``, the old scores of the pairs, also flips."""
    scored = pairs.scored
    samples = num_samples(len(scored.score_P))
    found: dict[str, Any] = _about(pairs.drawn, pairs.count, samples)
    if pairs.count < 2:
        return
    weight_BI = drawn_weights(pairs.count, samples)
    tar_FB = resampled_rates(scored, fars, weight_BI)
    found["tar_at_far"] = {
        far_key(far): interval_of(numbers["tar_at_far"][far_key(far)], tar_B)
        for far, tar_B in zip(fars, tar_FB, strict=True)
    }
    for far in fars:
        _widen(rows, f"TAR at FAR {far_key(far)}", found["tar_at_far"][far_key(far)])
    if right is not None:
        found["accuracy"] = interval_of(numbers["accuracy"]["mean"], _accuracies(scored, *right, weight_BI))
        _widen(rows, f"accuracy, {int(right[1].max()) + 1} folds", found["accuracy"])
    if old_P is not None:
        _flips(rows, numbers, found, scored, old_P, fars, weight_BI)
    _tell_drawn(rows, found)
    numbers["intervals"] = found


def _accuracies(scored: Scored, right_P: Bools, fold_P: Ints, weight_BI: npt.NDArray[np.float32]) -> Floats:
    """Mean over folds of the accuracy in each sample (B,). A fold keeps its shares of genuine and impostor pairs.

    They are of the list, not of the people: as impostor pairs weigh a product, a few of them would have the word in small folds,
    and the interval could lie beside the accuracy. A kind that a sample leaves out of a fold is left out of its mean.
    """
    strata = [fold_P == fold for fold in range(int(fold_P.max()) + 1)]
    strata = [here_P & kind_P for kind_P in (scored.genuine_P, ~scored.genuine_P) for here_P in strata]
    here_PS = np.stack([here_P for here_P in strata if here_P.any()], axis=1)
    size_S = here_PS.sum(axis=0) / np.bincount(fold_P)[fold_P[here_PS.argmax(axis=0)]]  # of its fold
    values_PK = np.concatenate([here_PS & right_P[:, None], here_PS], axis=1).astype(np.float64)
    right_SB, all_SB = np.split(pair_weight_sums(scored, values_PK, weight_BI), 2)
    known_SB = all_SB > 0.0
    share_SB = np.divide(right_SB, all_SB, out=np.zeros_like(all_SB), where=known_SB)
    with np.errstate(invalid="ignore"):  # nothing is known: no number
        mean_B: Floats = (size_S @ share_SB) / (size_S @ known_SB)
    return mean_B


def _flips(
    rows: Rows,
    numbers: dict[str, Any],
    found: dict[str, Any],
    scored: Scored,
    old_P: Floats,
    fars: Sequence[float],
    weight_BI: npt.NDArray[np.float32],
) -> None:
    """Genuine pairs that the old model accepts and these do not, and the reverse, each at its own threshold."""
    genuine_P = scored.genuine_P
    old_tar_F, old_threshold_F = roc_of_scores(old_P, genuine_P).at(fars)
    numbers["old"], numbers["flips"], found["negative_flips"] = {}, {}, {}
    for far, old_tar, old_threshold in zip(fars, old_tar_F.tolist(), old_threshold_F.tolist(), strict=True):
        key = far_key(far)
        was_P, is_P = old_P >= old_threshold, scored.score_P >= numbers["threshold_at_far"][key]
        lost_P, won_P = was_P & ~is_P & genuine_P, ~was_P & is_P & genuine_P
        total = int(np.count_nonzero(genuine_P))
        numbers["old"][key] = {"tar": old_tar, "threshold": old_threshold}
        numbers["flips"][key] = {
            "negative": int(lost_P.sum()),
            "positive": int(won_P.sum()),
            "num_genuine": total,
            "negative_rate": float(lost_P.sum() / total),
        }
        sums_KB = pair_weight_sums(scored, np.stack([lost_P, genuine_P], axis=1).astype(np.float64), weight_BI)
        with np.errstate(invalid="ignore", divide="ignore"):
            found["negative_flips"][key] = interval_of(float(lost_P.sum() / total), sums_KB[0] / sums_KB[1])
        rows.append((f"old model: TAR at FAR {key}", f"{old_tar:.5f} (threshold {old_threshold:.5f})"))
        rows.append((f"accepted before, rejected now, at FAR {key}", f"{lost_P.sum() / total:.5f}"))
        _widen(rows, rows[-1][0], found["negative_flips"][key])
        rows.append((f"the other way round, at FAR {key}", f"{won_P.sum() / total:.5f}"))


def identification_intervals(
    rows: Rows,
    numbers: dict[str, Any],
    result: Identification,
    label_N: Ints,
    fpirs: Sequence[float],
    ranks: Sequence[int],
) -> None:
    """Add intervals of TPIR and rank-k: the people of the probes are drawn again, the enrolled stay."""
    _, person_N = np.unique(label_N, return_inverse=True)
    count, samples = int(person_N.max()) + 1, num_samples(len(label_N))
    weight_BI = drawn_weights(count, samples)
    scored = Scored(result.score_N, result.mated_N, person_N, person_N)
    found = _about("identities of the probes", count, samples)
    tpir_FB = resampled_rates(scored, fpirs, weight_BI)
    found["tpir_at_fpir"] = {
        far_key(fpir): interval_of(numbers["tpir_at_fpir"][far_key(fpir)], tpir_B)
        for fpir, tpir_B in zip(fpirs, tpir_FB, strict=True)
    }
    for fpir in fpirs:
        _widen(rows, f"TPIR at FPIR {far_key(fpir)}", found["tpir_at_fpir"][far_key(fpir)])
    first_MK = (result.rank_M[:, None] <= np.asarray(ranks)).astype(np.float64)
    _ranks(rows, numbers, found, ranks, resampled_means(first_MK, person_N[result.mated_N], weight_BI))
    _tell_drawn(rows, found)
    numbers["intervals"] = found


def retrieval_intervals(
    rows: Rows, numbers: dict[str, Any], result: Retrieval, label_N: Ints, ranks: Sequence[int]
) -> None:
    """Add intervals of mAP, MAP@R and rank-k: the people of the queries are drawn again, the gallery stays."""
    _, person_Q = np.unique(label_N[result.query_Q], return_inverse=True)
    count, samples = int(person_Q.max()) + 1, num_samples(len(person_Q))
    if count < 2:
        return
    first_QK = (result.first_rank_Q[:, None] <= np.asarray(ranks)).astype(np.float64)
    value_QK = np.column_stack([result.average_precision_Q, result.precision_at_r_Q, first_QK])
    mean_KB = resampled_means(value_QK, person_Q, drawn_weights(count, samples))
    found = _about("identities of the queries", count, samples)
    for name, key, mean_B in (("mAP", "mean_average_precision", mean_KB[0]), ("MAP@R", "map_at_r", mean_KB[1])):
        found[key] = interval_of(numbers[key], mean_B)
        _widen(rows, name, found[key])
    _ranks(rows, numbers, found, ranks, mean_KB[2:])
    _tell_drawn(rows, found)
    numbers["intervals"] = found


def _ranks(rows: Rows, numbers: dict[str, Any], found: dict[str, Any], ranks: Sequence[int], mean_KB: Floats) -> None:
    found["rank"] = {
        str(k): interval_of(numbers["rank"][str(k)], mean_B) for k, mean_B in zip(ranks, mean_KB, strict=True)
    }
    for k in ranks:
        _widen(rows, f"rank-{k}", found["rank"][str(k)])


def _about(drawn: str, count: int, samples: int) -> dict[str, Any]:
    return {"level": 0.95, "drawn": drawn, "num_drawn": count, "num_samples": samples}


def _widen(rows: Rows, name: str, interval: Any) -> None:
    """Put the interval behind the number of that line."""
    if interval is not None:
        place = next(place for place, (each, _) in enumerate(rows) if each == name)
        rows[place] = (name, f"{rows[place][1]}  [{interval['low']:.5f}, {interval['high']:.5f}]")


def _tell_drawn(rows: Rows, found: dict[str, Any]) -> None:
    rows.append(("95 % intervals over", f"{found['num_drawn']:,} {found['drawn']}"))
