"""NCCL: a new vector is drawn to all old vectors of its class, to each by how near it is to its own image's old vector.

loss_i = -1/|P| sum_(p in P) w_p log( e^(s_ip / T) / sum_q e^(s_iq / T) ), w_p = (1 + o_i o_p) / 2. q runs over the old vectors
of the global batch and of the BANK rows before it, P are those of i's class; the mean over i. Twice: s = n_i o_q in the
space of vectors, and in that of classes, the cosine of the new classifier's logits for n_i and for o_q.
**Source**: Wu et al., "Neighborhood Consensus Contrastive Learning for Backward-Compatible Representation", AAAI 2022
(arXiv 2108.03372), whose full text could not be read; formulas from the re-run github.com/yuleung/MixBCT (NCCL/).
Differences: logits without margin and scaled to unit length (there raw products, weighed 0.01), so that banks of logits
are not needed: with W^T W of the class rows, <W a, W b> = a^T (W^T W) b. The filter of old vectors by entropy is left
out, as in the re-run, which found almost all of MS1Mv3's credible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lce_dist.collectives import all_reduce_sum, sum_over_ranks
from lce_dist.compat.method import Card, Method, MethodBatch
from lce_dist.head.layer import ShardedHead
from lce_dist.world import World

if TYPE_CHECKING:
    from lce_dist.compat.methods import MethodInputs

_NO_CLASS = -1  # of a row of the bank that is not filled yet


class Nccl(Method):
    """``bank``, ``bank_labels``: the latest old vectors of all ranks, newest first, the same on every rank."""

    WEIGHT = 1.0  # of the space of vectors (the re-run's alpha)
    CLASSES = 1.0  # of the space of classes, times WEIGHT; ours, see above
    # in both; of supervised contrastive learning (Khosla et al., NeurIPS 2020), whose loss this is with weights w. The
    # paper's own could not be read. The re-run's 1.0 stands beside logits of scale 64; cosines it leaves nearly alone
    TEMPERATURE = 0.1
    BANK = 8192  # rows, the re-run's queue_size

    card = Card(
        "NCCL: drawn to all old vectors of the class, weighed by neighbourhood, in two spaces",
        "Wu et al., Neighborhood Consensus Contrastive Learning for Backward-Compatible Representation, AAAI 2022, "
        "arXiv 2108.03372",
        frozenset({"batch"}),
        frozenset({"direct"}),
        "n identities: a product of n E^2 multiplications in each step over all ranks, and an all-reduce of 4 E^2 bytes. "
        "m images: the old model on the batch in each step; a bank of the latest 8,192 old vectors, whatever m is, 32,768 E "
        "bytes on every rank (16 MiB at E = 512); 3 (G + 8,192) cosines for each of a rank's b rows of a global batch of G",
    )

    def __init__(self, dim: int, weight: float, bank_rows: int, world: World) -> None:
        super().__init__()
        self._weight = weight
        self._gram: tuple[int, torch.Tensor] | None = None
        # state of a run, not of a model: in checkpoints of the engine, not among exported weights
        self.register_buffer("bank", torch.zeros(bank_rows, dim, device=world.device), persistent=False)
        labels = torch.full((bank_rows,), _NO_CLASS, device=world.device)
        self.register_buffer("bank_labels", labels, persistent=False)
        self.bank: torch.Tensor
        self.bank_labels: torch.Tensor

    @classmethod
    def build(cls, inputs: MethodInputs) -> Nccl:
        """An empty bank."""
        weight = inputs.config.method_weight
        return cls(inputs.old_dim, cls.WEIGHT if weight is None else weight, cls.BANK, inputs.world)

    def loss(self, batch: MethodBatch) -> torch.Tensor | None:
        """The rows of ``batch`` enter the bank. **Memory**: b * (G + BANK) values, about six times."""
        if self._weight == 0.0:
            return None
        assert batch.old_bE is not None and batch.old_GE is not None
        new_bD, old_bD = batch.new_bD, batch.old_bE
        known_QD = torch.cat([batch.old_GE, self.bank.to(batch.old_GE.dtype)])
        labels_Q = torch.cat([batch.labels_G, self.bank_labels])
        share_bQ = self._shares(old_bD @ known_QD.T, batch.labels_G[batch.own], labels_Q)
        empty_Q = labels_Q == _NO_CLASS
        gram_DD = self._gram_of(batch.head, batch.step, batch.world).to(new_bD.dtype)
        near_b = _drawn(new_bD @ known_QD.T / self.TEMPERATURE, share_bQ, empty_Q)
        cos_bQ = _length(new_bD, gram_DD)[:, None] * (new_bD @ gram_DD @ known_QD.T) * _length(known_QD, gram_DD)
        alike_b = _drawn(cos_bQ / self.TEMPERATURE, share_bQ, empty_Q)
        self._enter(known_QD, labels_Q)
        loss_b = near_b + self.CLASSES * alike_b
        return self._weight * sum_over_ranks((loss_b * batch.weight_G[batch.own]).sum(), batch.world)

    def _shares(self, cos_bQ: torch.Tensor, labels_b: torch.Tensor, labels_Q: torch.Tensor) -> torch.Tensor:
        """w / |P| of each positive; every row is a positive of its own."""
        same_bQ = (labels_b[:, None] == labels_Q[None, :]).to(cos_bQ.dtype)
        return same_bQ * (1.0 + cos_bQ) / (2.0 * same_bQ.sum(1, keepdim=True))

    def _enter(self, known_QD: torch.Tensor, labels_Q: torch.Tensor) -> None:
        self.bank.copy_(known_QD[: len(self.bank)])
        self.bank_labels.copy_(labels_Q[: len(self.bank)])

    @torch.no_grad()
    def _gram_of(self, head: ShardedHead, step: int, world: World) -> torch.Tensor:
        """W^T W (D, D) of all unit class rows, once a step: its micro-batches see the same rows."""
        if self._gram is not None and self._gram[0] == step:
            return self._gram[1]
        rows = head.rows
        parts = [slice(low, low + head.chunk_classes) for low in range(0, rows.num_local, head.chunk_classes)]
        gram_DD = torch.zeros_like(rows.unit(slice(0, 0)).T @ rows.unit(slice(0, 0)))
        for part in parts:
            unit_KD = rows.unit(part)
            gram_DD.addmm_(unit_KD.T, unit_KD)
        self._gram = (step, all_reduce_sum(gram_DD, world))
        return gram_DD


def _length(rows_ND: torch.Tensor, gram_DD: torch.Tensor) -> torch.Tensor:
    """1 / |W row| (N,); rows of zeros, of an empty bank, get a finite number."""
    return ((rows_ND @ gram_DD) * rows_ND).sum(1).clamp_min(1e-12).rsqrt()


def _drawn(logits_bQ: torch.Tensor, share_bQ: torch.Tensor, empty_Q: torch.Tensor) -> torch.Tensor:
    """-sum_q share * log softmax (b,), without empty rows."""
    log_sum_b = torch.logsumexp(logits_bQ.masked_fill(empty_Q, -torch.inf), dim=1)
    return (share_bQ * (log_sum_b[:, None] - logits_bQ)).sum(1)
