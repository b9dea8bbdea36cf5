"""One chunk of class rows moves: its gradient, the alignment with old rows and the optimizer's rule in one place.

``update_rows`` says it in PyTorch; ``update_rows_fused`` runs head/kernels.py, which reads and writes each
row once. Both have one signature.
"""

from __future__ import annotations

import torch

from lce_dist.head.optimizer import SGD, AdamW, RowGradient, Rule
from lce_dist.head.rows import ClassRows, inverse_norm
from lce_dist.head.tables import HalfTable, PlainTable, Rows, SplitTable, Table


def update_rows(
    rows: ClassRows,
    rule: Rule,
    local: Rows,
    product_KD: torch.Tensor | None,
    scaled: bool,
    old_KD: torch.Tensor | None,
    align_K: torch.Tensor | None,
    extra_KD: torch.Tensor | None,
    lr: float,
    step: int,
) -> torch.Tensor | None:
    """Apply ``rule`` to rows ``local`` and return their cosines (K,) with ``old_KD`` before it.

    product_KD: sum over the batch of dL/dcos * e; ``scaled``: times the rows' inverse lengths already.
    align_K: weight of 1 - cos(row, old row). extra_KD: a further gradient with respect to the rows.
    """
    weight_KD, inv_K = rows.weight.load(local), rows.inv_norm_S[local]
    product_K: torch.Tensor | None = None
    along_K = torch.zeros_like(inv_K)
    if product_KD is not None:  # dL/dw = inv * (sum - its part along the unit row)
        along_K = -((product_KD * weight_KD).sum(1)) * inv_K**2
        if not scaled:
            product_K, along_K = inv_K, along_K * inv_K
    cos_K = old_K = None
    if old_KD is not None and align_K is not None:
        old_KD = old_KD.to(weight_KD.dtype)
        cos_K = (old_KD * weight_KD).sum(1) * inv_K
        old_K = -align_K * inv_K
        along_K = along_K + align_K * inv_K**2 * cos_K
    gradient = RowGradient(product_KD, product_K, along_K, old_KD, old_K, extra_KD)
    _apply(rows, rule, local, weight_KD, gradient, lr, step)
    return cos_K


def decay_rows(rows: ClassRows, rule: Rule, local: Rows, lr: float, step: int) -> None:
    """Apply ``rule`` to rows without a gradient: their momentum and decay go on."""
    _apply(rows, rule, local, rows.weight.load(local), None, lr, step)


def _apply(
    rows: ClassRows,
    rule: Rule,
    local: Rows,
    weight_KD: torch.Tensor,
    gradient: RowGradient | None,
    lr: float,
    step: int,
) -> None:
    state = {name: table.load(local) for name, table in rows.state.items()}
    rule.apply(weight_KD, state, gradient, lr, step)
    keep_rows(rows, local, weight_KD, state, 2 * step)


def keep_rows(
    rows: ClassRows, local: Rows, weight_KD: torch.Tensor, state: dict[str, torch.Tensor], noise_step: int
) -> None:
    """Store changed rows, their state and their inverse lengths; ``noise_step`` numbers the rounding."""
    rows.weight.store(local, weight_KD, noise_step)
    for name, table in rows.state.items():
        table.store(local, state[name], noise_step)
    rows.inv_norm_S[local] = inverse_norm(weight_KD)


def update_rows_fused(
    rows: ClassRows,
    rule: Rule,
    local: Rows,
    product_KD: torch.Tensor | None,
    scaled: bool,
    old_KD: torch.Tensor | None,
    align_K: torch.Tensor | None,
    extra_KD: torch.Tensor | None,
    lr: float,
    step: int,
) -> torch.Tensor | None:
    """As ``update_rows``, through one Triton kernel."""
    from lce_dist.head import kernels

    if product_KD is None:
        raise AssertionError("the fused update needs the product; the dense form has none")
    # a range is a view that starts at its own first row; chosen rows are looked up
    view: Rows = local if isinstance(local, slice) else slice(None)
    place_K = None if isinstance(local, slice) else local
    first_row = rows.first_class + (local.indices(rows.num_local)[0] if isinstance(local, slice) else 0)
    weight, lower = _weight(rows.weight, view)
    state = {name: _state(table, view) for name, table in rows.state.items()}
    keys = {name: table.key if isinstance(table, HalfTable) else 0 for name, table in rows.state.items()}
    inv_norm = rows.inv_norm_S[view]
    common = (inv_norm, product_KD, scaled, place_K, old_KD, align_K, extra_KD, lr)
    if isinstance(rule, SGD):
        return kernels.update_rows_sgd(
            weight,
            lower,
            state["momentum"],
            *common,
            rule.momentum,
            rule.weight_decay,
            keys["momentum"],
            2 * step,
            first_row,
        )
    if not isinstance(rule, AdamW):
        raise AssertionError(f"no kernel for {type(rule).__name__}")
    return kernels.update_rows_adamw(
        weight,
        lower,
        state["first"],
        state["second"],
        *common,
        rule.beta1,
        rule.beta2,
        rule.epsilon,
        rule.weight_decay,
        (keys["first"], keys["second"]),
        2 * step,
        step + 1,
        first_row,
    )


def _weight(table: Table, rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(table, SplitTable):
        return table.upper_SD[rows], table.lower_SD[rows]
    assert isinstance(table, PlainTable)
    return table.values_SD[rows], None


def _state(table: Table, rows: Rows) -> torch.Tensor:
    assert isinstance(table, PlainTable | HalfTable)
    return table.values_SD[rows]
