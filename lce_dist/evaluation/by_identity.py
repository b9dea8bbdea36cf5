"""The share of each identity's genuine pairs that are accepted, at one threshold for all."""

from __future__ import annotations

import numpy as np
import torch

_MOST_ROWS = 4096  # of either side: 64 MiB of scores


def tar_by_identity(
    query_ND: torch.Tensor, gallery_ND: torch.Tensor, label_N: torch.Tensor, far: float
) -> torch.Tensor:
    """TAR (I,) of each identity with two images or more, at the threshold that accepts ``far`` of all impostor pairs.

    Rows of both are unit vectors of the same images; an image is not compared with itself. Of more than 4,096 rows as many
    identities are drawn as fit, the same ones for the same labels: I is the number that was scored.
    """
    chosen = _that_fit(label_N)
    query, gallery, label = query_ND[chosen], gallery_ND[chosen], label_N[chosen]
    cos_NN = query @ gallery.T
    same_NN = label[:, None] == label[None, :]
    impostor_P = cos_NN[~same_NN]
    allowed = int(far * impostor_P.numel())
    threshold = torch.topk(impostor_P, allowed + 1).values[-1]
    genuine_NN = same_NN & ~torch.eye(len(label), dtype=torch.bool)
    _, place_N = torch.unique(label, return_inverse=True)
    pairs_I = torch.zeros(int(place_N.max()) + 1).index_add_(0, place_N, genuine_NN.sum(1).float())
    accepted_N = ((cos_NN > threshold) & genuine_NN).sum(1).float()
    accepted_I = torch.zeros_like(pairs_I).index_add_(0, place_N, accepted_N)
    return accepted_I[pairs_I > 0] / pairs_I[pairs_I > 0]


def _that_fit(label_N: torch.Tensor) -> torch.Tensor:
    """Rows, rising, of identities that fit together; all where they do."""
    if len(label_N) <= _MOST_ROWS:
        return torch.arange(len(label_N))
    _, place_N, count_C = torch.unique(label_N, return_inverse=True, return_counts=True)
    able = torch.nonzero(count_C > 1).squeeze(1)
    order = able[torch.from_numpy(np.random.default_rng(len(able)).permutation(len(able)))]
    drawn = order[torch.cumsum(count_C[order], 0) <= _MOST_ROWS]
    if len(drawn) > 1:
        return torch.nonzero(torch.isin(place_N, drawn)).squeeze(1)
    few = able[torch.argsort(count_C[able], stable=True)[:2]]  # identities of thousands of images: some images of two
    return torch.cat([torch.nonzero(place_N == one).squeeze(1)[: _MOST_ROWS // 2] for one in few]).sort().values
