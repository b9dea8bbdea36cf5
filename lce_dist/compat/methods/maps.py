"""Cards of the maps over two frozen models: no methods of training, but rivals of those to whoever has both models.

They are kinds of ``compat.bridge``, fitted by compat/fit.py; "backward" maps new queries, "forward" the stored gallery.
"""

from __future__ import annotations

from lce_dist.compat.fit import RIDGES
from lce_dist.compat.method import Card

_PAIRS = "n identities: nothing, but at least 16 must have pairs. m images: both models' vectors of at most 200,000 of them, "

MAPS: dict[str, Card] = {
    "procrustes": Card(
        "Procrustes: the rotation that brings one model's vectors nearest to the other's",
        "Schoenemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 31, 1966",
        frozenset({"all"}),
        frozenset({"direct", "backward", "forward"}),
        _PAIRS
        + "4 (D + E) bytes each, summed to a matrix of D E numbers; one singular value decomposition. Deployed: D E "
        "multiplications a mapped vector, and none in the direct manner; equal dimensions only",
    ),
    "least_squares": Card(
        "Least squares: the matrix of least squared error, to vectors or to class centres, with a ridge",
        "Hoerl and Kennard, Ridge regression: biased estimation for nonorthogonal problems, Technometrics 12, 1970",
        frozenset({"all"}),
        frozenset({"backward", "forward"}),
        _PAIRS
        + f"4 (D + E) bytes each, summed to matrices of D D and D E numbers; {2 * len(RIDGES)} systems of D equations, of "
        "which the best on held-out identities is taken. Deployed: D E multiplications a mapped vector",
    ),
    "fct": Card(
        "FCT: an MLP that regresses the new model's vectors, without side information",
        "Ramanujan et al., Forward Compatible Training for Large-Scale Embedding Retrieval Systems, CVPR 2022, arXiv 2112.02805",
        frozenset({"all"}),
        frozenset({"backward", "forward"}),
        _PAIRS
        + "4 (D + E) bytes each, seen in at most 2,000 steps of 512. Deployed: D E + 2 max(D, E) (D + E) multiplications "
        "a mapped vector. In the paper the map also sees a vector that was stored with the old one for this purpose, which a "
        "gallery that exists does not have",
    ),
    "paper": Card(
        "LCE's T: four stacked blocks, trained by its class terms alone",
        "Meng et al., Learning Compatible Embeddings, ICCV 2021, arXiv 2108.01958, figure 3",
        frozenset({"centres", "all"}),
        frozenset({"backward", "forward"}),
        "n identities: centres in both spaces, 4 n (D + E) bytes. m images: both models' vectors of at most 200,000 of them, "
        "4 (D + E) bytes each, seen in at most 2,000 steps of 512. Deployed: about D E + 64 (D + 7 E) multiplications a mapped "
        "vector",
    ),
}
