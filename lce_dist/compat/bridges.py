"""Maps between two embedding spaces: (n, D_in) unit rows -> (n, D_out), whose lengths the caller takes off.

Each begins as a given matrix, exactly: what is nonlinear in it is a residual that starts at zero.
**Source**: the stacked blocks are those of figure 3 of Meng et al., "Learning Compatible Embeddings", ICCV 2021. There the
skip of a block is the identity: "paper" has that, and a matrix in the first block only where the dimensions differ; "stacked"
has the matrix always, so that it can begin as a closed form.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

Kind = Literal["stacked", "linear", "mlp", "orthogonal", "paper"]

_BLOCKS, _PATHS, _NARROW = 4, 4, 16  # figure 3
_RESIDUAL_SCALE = 0.1


class Bridge(nn.Module):
    """A matrix without bias, plus for some kinds a residual; ``start_from`` sets the one and silences the other.

    Of kind "paper" in equal dimensions the matrix is the identity, and stays it.
    """

    def __init__(self, kind: Kind, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.kind = kind
        self.dim_in, self.dim_out = dim_in, dim_out
        self.matrix: nn.Module = nn.Linear(dim_in, dim_out, bias=False)
        self.residual: nn.Module | None = None
        is_stacked = kind in ("stacked", "paper")
        if kind == "paper" and dim_in == dim_out:
            self.matrix = nn.Identity()
        elif kind == "orthogonal":
            self.matrix = parametrizations.orthogonal(self.matrix, orthogonal_map="matrix_exp")
        if kind == "mlp":
            self.residual = _Hidden(dim_in, 2 * max(dim_in, dim_out), dim_out)
        elif is_stacked:
            self.residual = _Paths(dim_in, dim_out)
        self.further = nn.ModuleList(_Paths(dim_out, dim_out) for _ in range(_BLOCKS - 1 if is_stacked else 0))
        self.start_from(_partial_identity(dim_in, dim_out))

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        mapped: torch.Tensor = self.matrix(rows_ND)
        if self.residual is not None:
            mapped = mapped + self.residual(rows_ND)
        for paths in self.further:
            mapped = mapped + paths(mapped)
        return mapped

    @torch.no_grad()
    def start_from(self, matrix_ED: torch.Tensor) -> None:
        """Become exactly rows_ND @ matrix_ED.T; an orthogonal bridge the nearest (semi-)orthogonal one."""
        if tuple(matrix_ED.shape) != (self.dim_out, self.dim_in):
            raise ValueError(f"matrix is {tuple(matrix_ED.shape)}; must be ({self.dim_out}, {self.dim_in})")
        if isinstance(self.matrix, nn.Identity):
            if not torch.equal(matrix_ED, torch.eye(self.dim_in, dtype=matrix_ED.dtype)):
                raise ValueError(
                    "a map of kind 'paper' begins as the identity where dimensions are equal; give that matrix"
                )
            self._silence()
            return
        if self.kind == "orthogonal":
            left, _, right = torch.linalg.svd(matrix_ED.double(), full_matrices=False)
            matrix_ED = left @ right
        weight = self.matrix.weight
        assert isinstance(weight, torch.Tensor)
        if self.kind == "orthogonal":
            self.matrix.weight = matrix_ED.to(weight.dtype)  # the parametrization finds its own numbers for it
        else:
            weight.copy_(matrix_ED)
        self._silence()

    def _silence(self) -> None:
        for path in self.modules():
            if isinstance(path, (_Path, _Hidden)):
                path.silence()


class _Hidden(nn.Module):
    """Linear GELU Linear; silent at first.

    Elements of unit rows are near 1 / sqrt(D), too small for a GELU to bend: they are scaled to about 1. What comes out
    is scaled down, so that a step of AdamW turns the map about as far through the residual as through the matrix.
    """

    def __init__(self, dim_in: int, width: int, dim_out: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim_in, width)
        self.out = nn.Linear(width, dim_out)
        self._scale_in = dim_in**0.5

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.out(F.gelu(self.hidden(self._scale_in * rows_ND)))
        return _RESIDUAL_SCALE * value

    def silence(self) -> None:
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class _Path(nn.Module):
    """Linear BN PReLU, three times through ``width``; silent at first."""

    def __init__(self, dim_in: int, width: int, dim_out: int) -> None:
        super().__init__()
        sizes = (dim_in, width, width, dim_out)
        self.layers = nn.Sequential(
            *(
                module
                for low, high in itertools.pairwise(sizes)
                for module in (nn.Linear(low, high, bias=False), nn.BatchNorm1d(high), nn.PReLU())
            )
        )

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.layers(rows_ND)
        return value

    def silence(self) -> None:
        last = self.layers[-2]
        assert isinstance(last, nn.BatchNorm1d)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class _Paths(nn.Module):
    """Four parallel paths, added."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(_Path(dim_in, _NARROW, dim_out) for _ in range(_PATHS))

    def forward(self, rows_ND: torch.Tensor) -> torch.Tensor:
        return torch.stack([path(rows_ND) for path in self.paths]).sum(0)


def build_bridge(kind: Kind, dim_in: int, dim_out: int, seed: int) -> Bridge:
    """A float32 bridge on the CPU that starts as the identity, cut or filled up with zeros where sizes differ.

    Initial weights depend on the arguments alone; the global random state is neither read nor changed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return Bridge(kind, dim_in, dim_out)


def _partial_identity(dim_in: int, dim_out: int) -> torch.Tensor:
    return torch.eye(max(dim_in, dim_out))[:dim_out, :dim_in]


def mapped(bridge: nn.Module, rows_ND: torch.Tensor) -> torch.Tensor:
    """``bridge`` of any number of rows: batch norms need two; with none its parameters still get a gradient of zero."""
    if rows_ND.shape[0] == 1:
        pair: torch.Tensor = bridge(rows_ND.expand(2, -1))
        return pair[:1]
    if rows_ND.shape[0] == 0:
        was_training = bridge.training
        bridge.eval()
        nothing: torch.Tensor = bridge(rows_ND)
        bridge.train(was_training)
        return nothing
    value: torch.Tensor = bridge(rows_ND)
    return value
