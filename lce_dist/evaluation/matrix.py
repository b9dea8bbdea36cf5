"""May the new model be deployed before the gallery is re-encoded: the old/new matrix and its verdict.

M(query model, gallery model) is a TAR at a FAR. M(old, old) is what is deployed today, M(new, old) what is
deployed next, M(new, new) what a full re-encoding gives, and the independent model (same data and network,
trained without the old one) shows what compatibility costs and what happens without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lce_dist.errors import RunError
from lce_dist.evaluation.counting import count_pairs
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.metrics import PairResult, far_key, result_of
from lce_dist.world import World

# Key of a cell -> (query model, gallery model). "independent_new" is the paragon's self-test, M(*,*) in the paper.
PAIRS: dict[str, tuple[str, str]] = {
    "old_old": ("old", "old"),
    "new_old": ("new", "old"),
    "new_new": ("new", "new"),
    "independent_old": ("independent", "old"),
    "independent_new": ("independent", "independent"),
}


@dataclass(frozen=True)
class Verdict:
    """Whether M(new, old) > M(old, old), plain sentences with the numbers, and the share of the upgrade reached.

    met: None where M(old, old) could not be measured.
    update_gain = (M(new, old) - M(old, old)) / (M(*,*) - M(old, old)); None when M(*,*) is unknown or not the higher.
    """

    met: bool | None
    reasons: tuple[str, ...]
    update_gain: float | None


def cells_of(
    old: EmbeddingSet,
    new: EmbeddingSet,
    independent: EmbeddingSet | None,
    crossing: tuple[EmbeddingSet, EmbeddingSet] | None = None,
) -> dict[str, tuple[EmbeddingSet, EmbeddingSet]]:
    """Query and gallery of each cell; keys and their meaning are ``PAIRS``, the last two only with ``independent``.

    crossing: those of "new_old" where a map stands between the models (None: as they are). Where dimensions differ an
    independent model has no cross-test. An old set of one vector an identity has no pairs of its own: "old_old" is left out.
    """
    models = {"old": old, "new": new}
    if independent is not None:
        models["independent"] = independent
    sides = {key: (models[query], models[gallery]) for key, (query, gallery) in PAIRS.items() if query in models}
    if crossing is not None:
        sides["new_old"] = crossing
    if len(np.unique(old.labels_N)) == len(old.labels_N):
        del sides["old_old"]
    if independent is not None and independent.vectors_ND.shape[1] != old.vectors_ND.shape[1]:
        del sides["independent_old"]
    return sides


def build_matrix(
    cells: Mapping[str, tuple[EmbeddingSet, EmbeddingSet]], fars: Sequence[float], world: World | None = None
) -> dict[str, PairResult]:
    """Compare cell by cell; ``kept`` is what a cell reaches at the thresholds of "old_old", where that is among them.

    Errors, **Collectives**: of :func:`~lce_dist.evaluation.counting.count_pairs`. **Memory**: of one comparison at a time.
    """
    found: dict[str, PairResult] = {}
    for key, pair in sorted(cells.items(), key=lambda cell: cell[0] != "old_old"):
        thresholds = found["old_old"].threshold_at_far if "old_old" in found else {}
        # thresholds that are kept may lie below those of this cell
        counts = count_pairs(*pair, fars, world, min(thresholds.values(), default=None))
        found[key] = result_of(counts, fars, thresholds)
    return {key: found[key] for key in cells}


def criterion(matrix: Mapping[str, PairResult], far: float) -> Verdict:
    """Judge the matrix by TAR at ``far``: met when M(new, old) > M(old, old), strictly.

    Errors: RunError when ``far`` was not asked of :func:`build_matrix`.
    **Source**: Meng et al., "Learning Compatible Embeddings", ICCV 2021 (arXiv 2108.01958).
    """
    tar = {key: _tar(key, result, far) for key, result in matrix.items()}
    if "old_old" not in tar:
        told = f"TAR at FAR {far_key(far)}: new/old {tar['new_old']:.4f}, new/new {tar['new_new']:.4f}"
        return Verdict(None, (f"{told}; the old vectors are one an identity, so old/old cannot be measured.",), None)
    old_old, new_old = tar["old_old"], tar["new_old"]
    shift = _compared("new/old", new_old, "old/old", old_old)
    reasons = [f"TAR at FAR {far_key(far)}: {shift}; the criterion asks for new/old > old/old."]
    scarce = [key for key in ("old_old", "new_old") if far * matrix[key].num_impostor < 1]
    if scarce:
        reasons.append(
            f"FAR {far_key(far)} is below 1 / impostor pairs (1 / {matrix[scarce[0]].num_impostor}), so the TARs are "
            "those with no false accept at all and hang on a single pair; hold out more identities or ask a larger FAR."
        )
    coarse = [key for key in ("old_old", "new_old", "new_new") if far_key(far) in matrix[key].coarse_at()]
    if coarse:
        worst = max(matrix[key].tar_error[far_key(far)] for key in coarse)
        reasons.append(
            f"Scores of {', '.join(coarse)} lie so close together that float32 hardly tells them apart: TAR may be off by {worst:.2g}. "
            "Take the common direction out of the vectors."
        )
    update_gain = None
    if "independent_new" in tar:
        paragon, name = tar["independent_new"], "independent/independent"
        if paragon > old_old:
            update_gain = (new_old - old_old) / (paragon - old_old)
            reasons.append(f"Update gain {update_gain:+.3f}: share of the step from old/old to {name} {paragon:.4f}.")
        else:
            reasons.append(f"Update gain is not defined: {_compared(name, paragon, 'old/old', old_old)}.")
        reasons.append(f"After re-encoding the gallery, {_compared('new/new', tar['new_new'], name, paragon)}.")
    if "independent_old" in tar:
        reasons.append(
            f"Without compatible training, {_compared('independent/old', tar['independent_old'], 'old/old', old_old)}."
        )
    return Verdict(new_old > old_old, tuple(reasons), update_gain)


def report_entries(matrix: Mapping[str, PairResult]) -> dict[str, dict[str, Any]]:
    """The matrix as plain numbers for a JSON report, without curves and histograms."""
    return {
        key: {
            "tar_at_far": dict(result.tar_at_far),
            "rank1": result.rank1,
            "threshold_at_far": dict(result.threshold_at_far),
            "num_genuine": result.num_genuine,
            "num_impostor": result.num_impostor,
            "exact_up_to_far": result.exact_up_to_far,
            "tar_error_at_far": dict(result.tar_error),
            "far_error_at_far": dict(result.far_error),
        }
        for key, result in matrix.items()
    }


def _tar(key: str, result: PairResult, far: float) -> float:
    if far_key(far) not in result.tar_at_far:
        raise RunError(
            f"FAR {far_key(far)} was not measured for {key}; must be one of {', '.join(result.tar_at_far)}. "
            "Add it to evaluation.fars"
        )
    return result.tar_at_far[far_key(far)]


def _compared(left_name: str, left: float, right_name: str, right: float) -> str:
    if left == right:
        return f"{left_name} {left:.4f} equals {right_name} {right:.4f}"
    word = "above" if left > right else "below"
    return f"{left_name} {left:.4f} is {word} {right_name} {right:.4f} (by {abs(left - right):.2g})"
