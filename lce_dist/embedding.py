"""Images to unit vectors: a frozen network in eval mode over a stream of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.batch import Batch
from lce_dist.collectives import gather_rows
from lce_dist.world import World


@dataclass(frozen=True)
class EmbeddedRows:
    """One round of a pass over the data: this rank's unit rows (b, D), labels and sample ids (b,), every rank's b.

    A row whose label is -1 is of no image.
    """

    unit_bD: torch.Tensor
    labels_b: torch.Tensor
    sample_ids_b: torch.Tensor
    rows_per_rank: tuple[int, ...]


@torch.no_grad()
def embed_batches(net: nn.Module, batches: Iterable[Batch], embedding_dim: int) -> Iterator[EmbeddedRows]:
    """Unit vectors, float32, of each batch in turn; batch statistics are not touched."""
    was_training = net.training
    net.eval()
    try:
        for batch in batches:
            if batch.images.shape[0] == 0:
                unit_bD = batch.images.new_zeros((0, embedding_dim))
            else:
                unit_bD = F.normalize(net(batch.images).float())
            ids = batch.sample_ids.to(batch.labels.device)
            yield EmbeddedRows(unit_bD, batch.labels, ids, batch.rows_per_rank)
    finally:
        net.train(was_training)


def gather_all(rounds: Iterable[EmbeddedRows], world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every rank's rows of images, all rounds: (N, D) vectors, (N,) labels, (N,) sample ids, on the CPU, on every rank.

    **Collectives**: a gather a round. **Memory**: 4 * N * D bytes on every rank; for evaluation sets.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    for rows in rounds:
        columns = (rows.unit_bD, rows.labels_b, rows.sample_ids_b)
        parts.append(tuple(gather_rows(column, rows.rows_per_rank, world).cpu() for column in columns))
    vectors, labels, sample_ids = (torch.cat(column) for column in zip(*parts, strict=True))
    if bool((labels < 0).any()):
        vectors, labels, sample_ids = (column[labels >= 0] for column in (vectors, labels, sample_ids))
    return vectors, labels, sample_ids
