"""Protocols by plain loops over images, in float64: what the fast ones are held against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lce_dist.errors import LceError
from lce_dist.evaluation.counting import count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.identification import identify
from lce_dist.evaluation.metrics import result_of
from lce_dist.evaluation.retrieval import retrieve
from lce_dist.evaluation.templates import pool_templates
from lce_dist.evaluation.verification import accuracy_by_folds

NUM_PEOPLE, EACH, DIM = 30, 6, 16


def people(seed: int, noise: float = 0.9, common: float = 0.0) -> EmbeddingSet:
    """Vectors of 30 people, 6 each, hard enough that every rate lies between 0 and 1; common: length of a direction all share."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(NUM_PEOPLE), EACH)
    rows = np.random.default_rng(0).normal(size=(NUM_PEOPLE, DIM))[labels] + noise * draw.normal(
        size=(len(labels), DIM)
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:, 0] += common
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return EmbeddingSet("people", rows.astype(np.float32), labels, np.arange(len(labels)))


def cosines(one: EmbeddingSet, other: EmbeddingSet) -> np.ndarray:
    return one.vectors_ND.astype(np.float64) @ other.vectors_ND.astype(np.float64).T


def slow_tpir(probe: EmbeddingSet, gallery: EmbeddingSet, fpir: float) -> float:
    """Share of mated probes whose mate is first and above all but FPIR of the non-mated probes' best."""
    score = cosines(probe, gallery)
    enrolled = sorted(set(gallery.labels_N.tolist()))
    mated, strangers = [], []
    for row, label in enumerate(probe.labels_N.tolist()):
        best = {who: score[row, gallery.labels_N == who].max() for who in enrolled}
        if label in best:
            mine = best.pop(label)
            mated.append(mine if mine > max(best.values()) else -np.inf)
        else:
            strangers.append(max(best.values()))
    setting = sorted(strangers, reverse=True)[int(fpir * len(strangers))]
    return float(np.mean([one > setting for one in mated]))


def slow_map(query: EmbeddingSet, gallery: EmbeddingSet) -> float:
    """Mean over queries of the mean, over mates, of (mates up to its place) / (images up to its place)."""
    score, found = cosines(query, gallery), []
    for row, (label, image) in enumerate(zip(query.labels_N, query.sample_ids_N, strict=True)):
        order = [one for one in np.argsort(-score[row]) if gallery.sample_ids_N[one] != image]
        hits = [place for place, one in enumerate(order, 1) if gallery.labels_N[one] == label]
        if hits:
            found.append(np.mean([number / place for number, place in enumerate(hits, 1)]))
    return float(np.mean(found))


def slow_folds(scores: np.ndarray, genuine: np.ndarray, num_folds: int) -> float:
    """Mean over blocks of the accuracy at the threshold that is right most often on the others, of equals the highest."""
    found = []
    for fold in np.array_split(np.arange(len(scores)), num_folds):
        others = np.setdiff1d(np.arange(len(scores)), fold)
        values = np.unique(scores[others])
        tried = [values[0] - 1.0, *((values[1:] + values[:-1]) / 2.0), values[-1] + 1.0]
        right = [np.mean((scores[others] >= at) == genuine[others]) for at in tried]
        best = max(at for at, share in zip(tried, right, strict=True) if share == max(right))
        found.append(np.mean((scores[fold] >= best) == genuine[fold]))
    return float(np.mean(found))


def slow_template(rows: np.ndarray, media: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted vectors averaged over each media, added up, and brought to length 1."""
    total = np.zeros(rows.shape[1])
    for one in sorted(set(media.tolist())):
        chosen = np.flatnonzero(media == one)
        total += sum(weight[row] * rows[row].astype(np.float64) for row in chosen) / len(chosen)
    return total / np.linalg.norm(total)


def differences() -> dict[str, float]:
    """The largest difference of each protocol from its loop, and the rates themselves, none of which is 0 or 1."""
    one, other = people(1), people(2)
    probe = one.rows(np.flatnonzero(np.arange(len(one.labels_N)) % 2 == 0))
    gallery = other.rows(np.flatnonzero((np.arange(len(one.labels_N)) % 2 == 1) & (one.labels_N < 20)))
    fpirs = [0.05, 0.2, 0.5]
    tpir_F, _ = identify(probe, gallery, "best").tpir_at(fpirs)
    slow_F = [slow_tpir(probe, gallery, fpir) for fpir in fpirs]
    score = cosines(one, other)
    first, second = (part.ravel() for part in np.indices(score.shape))
    some = np.random.default_rng(4).permutation(np.flatnonzero(first < second))[:600]
    genuine = one.labels_N[first[some]] == one.labels_N[second[some]]
    value = score.ravel()[some]
    draw = np.random.default_rng(5)
    template_R = np.arange(len(one.labels_N)) // 3
    media_R, weight_R = draw.integers(0, 2, len(template_R)) + 2 * template_R, draw.random(len(template_R)) + 0.1
    rows_R = np.arange(len(template_R))
    pooled = pool_templates("t", one.vectors_ND, rows_R, template_R, media_R, weight_R, rows_R + 2)
    slow_TD = np.stack(
        [slow_template(one.vectors_ND[at], media_R[at], weight_R[at]) for at in np.split(rows_R, len(rows_R) // 3)]
    )
    precision = retrieve(one, other).mean_average_precision
    rates = [*slow_F, precision, slow_folds(value, genuine, 10)]
    if not all(0.0 < rate < 1.0 for rate in rates):
        raise AssertionError(f"rates {rates} judge nothing")
    return {
        "TPIR at FPIR": float(np.abs(tpir_F - slow_F).max()),
        "mAP": abs(precision - slow_map(one, other)),
        "accuracy over folds": abs(accuracy_by_folds(value, genuine, 10).mean - slow_folds(value, genuine, 10)),
        "templates (float32)": float(np.abs(pooled.vectors_ND - slow_TD).max()),
    }


def rounding() -> tuple[float, float]:
    """How far TAR at FAR is from that of scores in float64, less what is said of it; and the largest such distance."""
    beyond, moved, fars = -1.0, 0.0, [0.05, 0.01, 0.001]
    for common in (0.0, 30.0, 100.0, 300.0):
        one = people(3, common=common)
        result = result_of(count_pairs(one, one, fars), fars)
        score = cosines(one, one)
        same = one.labels_N[:, None] == one.labels_N
        impostor = np.sort(score[~same])[::-1]
        for far in fars:
            setting = impostor[int(far * len(impostor))]
            truth = float(np.mean(score[same & ~np.eye(len(score), dtype=bool)] > setting))
            off = abs(result.tar_at_far[repr(far)] - truth)
            beyond, moved = max(beyond, off - result.tar_error[repr(far)]), max(moved, off)
    return beyond, moved


def refusals() -> dict[str, bool]:
    """Whether what cannot be measured is refused by one of our own errors."""
    one = people(1)
    broken = one.vectors_ND.copy()
    broken[3, 2] = np.nan
    cases: dict[str, Callable[[], object]] = {
        "no genuine pair": lambda: _counted(EmbeddingSet("s", one.vectors_ND, one.sample_ids_N, one.sample_ids_N)),
        "one identity": lambda: _counted(EmbeddingSet("o", one.vectors_ND, 0 * one.labels_N, one.sample_ids_N)),
        "not a number": lambda: EmbeddingSet("n", broken, one.labels_N, one.sample_ids_N),
        "an image twice": lambda: EmbeddingSet("t", one.vectors_ND, one.labels_N, 0 * one.sample_ids_N),
        "not of length 1": lambda: EmbeddingSet("l", 2 * one.vectors_ND, one.labels_N, one.sample_ids_N),
    }
    found = {}
    for name, attempt in cases.items():
        try:
            attempt()
            found[name] = False
        except LceError:
            found[name] = True
    return found


def _counted(one: EmbeddingSet) -> object:
    return count_pairs(one, one, [0.01])
