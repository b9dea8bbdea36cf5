"""One vector a template: all images of a person's photos and video frames, as in IJB-B and IJB-C."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lce_dist.errors import DataError
from lce_dist.evaluation.embeddings import EmbeddingSet

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_BLOCK_ROWS = 1 << 14
_SHORTEST = 1e-9  # of a sum that still has a direction


def pool_templates(
    name: str,
    rows_ND: npt.NDArray[np.float32],
    row_R: Ints,
    template_R: Ints,
    media_R: Ints,
    weight_R: Floats | None = None,
    line_R: Ints | None = None,
) -> EmbeddingSet:
    """The unit vector of each template, in the order of their numbers, from R list entries (image row, template, media).

    An image's vector is multiplied by its weight (the detector's score); the images of one media of a template are
    averaged, by their count; the media are added up; the sum is brought to length 1. Vectors of any length may come: longer
    ones weigh more. Of the result both ``sample_ids_N`` and ``labels_N`` are template numbers: a list may know more.
    line_R: where each entry stands in a file, for errors; without it they are counted from 1.
    Errors: DataError for a template whose sum has no direction. **Memory**: of a block of entries and the templates.
    **Source**: insightface, recognition/arcface_torch/eval_ijbc.py, image2template_feature; Whitelam et al., "IARPA Janus
    Benchmark-B Face Dataset", CVPR Workshops 2017.
    """
    order_R = np.lexsort((media_R, template_R))
    template_T, start_T = np.unique(template_R[order_R], return_index=True)
    end_T = np.append(start_T[1:], len(order_R))
    pooled_TD = np.empty((len(template_T), rows_ND.shape[1]), dtype=np.float32)
    first = 0
    while first < len(template_T):
        # whole templates, as many as fit in a block, at least one
        last = max(first + 1, int(np.searchsorted(end_T, start_T[first] + _BLOCK_ROWS, side="right")))
        entries = order_R[start_T[first] : end_T[last - 1]]
        vector_RD = rows_ND[row_R[entries]].astype(np.float64)
        if weight_R is not None:
            vector_RD *= _scaled(weight_R[entries], start_T[first:last] - start_T[first])[:, None]
        template, media = template_R[entries], media_R[entries]
        start_M = np.flatnonzero(np.append(True, (template[1:] != template[:-1]) | (media[1:] != media[:-1])))
        media_MD = np.add.reduceat(vector_RD, start_M, axis=0) / np.diff(np.append(start_M, len(entries)))[:, None]
        sum_TD = np.add.reduceat(media_MD, np.searchsorted(start_M, start_T[first:last] - start_T[first]), axis=0)
        norm_T = np.linalg.norm(sum_TD, axis=1)
        wrong_T = np.flatnonzero(~(norm_T > _SHORTEST))
        if wrong_T.size:
            entry = int(order_R[start_T[first + wrong_T[0]]])
            line = entry + 1 if line_R is None else line_R[entry]
            raise DataError(
                f"the template of line {line} of the template list adds up to nothing ({wrong_T.size} such "
                "templates): its weights are 0, or its vectors cancel. Leave it out, or give it weights above 0"
            )
        pooled_TD[first:last] = sum_TD / norm_T[:, None]
        first = last
    return EmbeddingSet(name, pooled_TD, template_T.astype(np.int64), template_T.astype(np.int64))


def _scaled(weight_R: Floats, start_T: Ints) -> Floats:
    """Weights with the largest of each template in [0.5, 1): only what they are beside each other counts, and squares of very large
    ones overflow, as very small ones look like none. By a power of two, so that nothing is rounded."""
    exponent_T = np.frexp(np.maximum.reduceat(weight_R, start_T))[1]
    scaled_R: Floats = np.ldexp(weight_R, -np.repeat(exponent_T, np.diff(np.append(start_T, len(weight_R)))))
    return scaled_R
