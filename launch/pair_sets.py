"""Public pair files beside a run's own held-out identities: packed once, embedded by every model, judged by LFW's rule."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lce_dist.errors import ConfigError, DataError
from lce_dist.evaluation.embeddings import EmbeddingSet
from lce_dist.evaluation.mates import Pair
from lce_dist.evaluation.metrics import far_key
from lce_dist.evaluation.scores import Cells
from lce_dist.evaluation.verification import accuracy_by_folds, roc_of_scores, score_pairs
from pipelines.manifest import PackedDataset, View
from pipelines.pack import as_jpeg, pack_images
from pipelines.pairs import read_pair_bin

Progress = Callable[[str, int, int], None]
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_. -]")  # of a metric in MLflow
_CELLS = ("old_old", "new_old", "new_new", "independent_new")


@dataclass(frozen=True, eq=False)
class PairSet:
    """2P images, pair after pair, each an identity of its own, and whether each pair is of one person (P,)."""

    name: str
    view: View
    is_genuine: npt.NDArray[np.bool_]
    fingerprint: str


def open_pair_sets(
    paths: Sequence[str], base_dir: Path, cache: Path, progress: Progress | None = None
) -> list[PairSet]:
    """The files as packed data sets, called by their stems; packed into ``cache`` the first time.

    Errors: DataError for a file that is absent, damaged or holds an image that cannot be decoded; ConfigError for two of one name.
    """
    names = [_NOT_IN_NAMES.sub("_", Path(path).stem) for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"evaluation.pairs are {list(paths)}; names must differ, they head the report's columns. Rename one"
        )
    return [_open(base_dir / path, name, cache, progress) for path, name in zip(paths, names, strict=True)]


def _open(path: Path, name: str, cache: Path, progress: Progress | None) -> PairSet:
    if not path.is_file():
        raise DataError(f"pair file {path} is not a file; evaluation.pairs names .bin files such as lfw.bin")
    digest = file_fingerprint(path)
    packed, answers = cache / f"pairs-{digest}", cache / f"pairs-{digest}.npy"
    if not (packed.exists() and answers.exists()):
        pairs = read_pair_bin(path)
        count = len(pairs.images)
        if count < 4 or pairs.is_genuine.all() or not pairs.is_genuine.any():
            raise DataError(f"pair file {path} holds {count // 2} pairs of one kind; must hold some of both")
        keys = [f"{number:09d}" for number in range(count)]

        def images() -> Iterator[tuple[str, str, bytes]]:
            for number, (key, image) in enumerate(zip(keys, pairs.images, strict=True)):
                yield key, key, as_jpeg(image, f"{number + 1} of {path}")

        cache.mkdir(parents=True, exist_ok=True)
        np.save(answers, pairs.is_genuine)
        shown = None if progress is None else lambda done, of: progress(f"packing {name}", done, of)
        pack_images(images(), keys, count, packed, "pairs", digest, progress=shown)
    dataset = PackedDataset.open(packed)
    is_genuine = np.load(answers, allow_pickle=False)
    try:  # now, not after the training
        accuracy_by_folds(np.zeros(len(is_genuine)), is_genuine, _folds_of(len(is_genuine)))
    except DataError as error:
        raise DataError(f"pair file {path}: {error}") from None
    return PairSet(name, dataset.select(dataset.identities), is_genuine, digest)


def file_fingerprint(path: Path) -> str:
    """16 hex digits over the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _folds_of(num_pairs: int) -> int:
    return min(10, num_pairs)


def pair_set_entries(pair_set: PairSet, cells: Mapping[str, Pair], fars: Sequence[float]) -> dict[str, Any]:
    """Accuracy over 10 folds, its spread, TAR at FAR and equal error rate of each cell; first images query, second are the gallery."""
    first_P = 2 * np.arange(len(pair_set.is_genuine))
    entries: dict[str, Any] = {}
    for key in _CELLS:
        if key in cells:
            query, gallery = (_in_order(one) for one in cells[key])
            scores = score_pairs(query, gallery, first_P, first_P + 1)
            roc = roc_of_scores(scores, pair_set.is_genuine)
            folds = accuracy_by_folds(scores, pair_set.is_genuine, _folds_of(len(scores)))
            tar_F, threshold_F = roc.at(fars)
            entries[key] = {
                "accuracy": folds.mean,
                "accuracy_std": folds.std,
                "equal_error_rate": roc.equal_error_rate,
                "tar_at_far": {far_key(far): float(tar) for far, tar in zip(fars, tar_F, strict=True)},
                "threshold_at_far": {far_key(far): float(at) for far, at in zip(fars, threshold_F, strict=True)},
                "num_pairs": len(scores),
            }
    return entries


def accuracy_cells(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Cells]:
    """Accuracies as test sets of the P-scores; sets without all four cells are left out."""
    return {
        name: Cells(*(entry[key]["accuracy"] for key in _CELLS))
        for name, entry in entries.items()
        if set(_CELLS) <= entry.keys()
    }


def _in_order(one: EmbeddingSet) -> EmbeddingSet:
    order = np.argsort(one.sample_ids_N)
    return EmbeddingSet(one.name, one.vectors_ND[order], one.labels_N[order], one.sample_ids_N[order])
