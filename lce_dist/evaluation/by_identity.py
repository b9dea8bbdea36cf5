"""The share of each identity's genuine pairs that are accepted, at one threshold for all."""

from __future__ import annotations

import torch

_MOST_ROWS = 4096  # of either side: 64 MiB of scores


def tar_by_identity(
    query_ND: torch.Tensor, gallery_ND: torch.Tensor, label_N: torch.Tensor, far: float
) -> torch.Tensor:
    """TAR (I,) of each identity with two images or more, at the threshold that accepts ``far`` of all impostor pairs.

    Rows of both are unit vectors of the same images; an image is not compared with itself. Identities beyond the
    first 4,096 rows are left out.
    """
    query, gallery, label = query_ND[:_MOST_ROWS], gallery_ND[:_MOST_ROWS], label_N[:_MOST_ROWS]
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
