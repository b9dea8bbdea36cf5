"""The classification layer: class rows cut over all ranks, their loss, and their update chunk by chunk.

It lives outside DeepSpeed, which takes every parameter for a replica and would overwrite the shards with
rank 0's. A step is ``begin_step``, then ``forward`` and backward for each micro-batch, then ``step``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from lce_dist.collectives import sum_over_ranks
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.margins import Margin
from lce_dist.head.optimizer import SGD, Rule
from lce_dist.head.rows import ClassRows
from lce_dist.head.sampling import active_classes, decay_over
from lce_dist.head.softmax import Anchor, Chunk, HeadLoss, HeadTerms, MicroBatch, Settings, check_labels
from lce_dist.head.tables import Rows
from lce_dist.head.update import decay_rows, keep_rows
from lce_dist.world import World


@dataclass(frozen=True)
class Sampling:
    """A share ``rate`` of the classes takes part in a step, besides its positives.

    policy: what happens to the others' rows: ``freeze`` nothing; ``lazy`` their momentum and decay, when
    they are next touched; ``dense`` the same at once. lr_of gives a step's learning rate, for ``lazy``.
    """

    rate: float
    policy: Literal["freeze", "lazy", "dense"]
    seed: int
    lr_of: Callable[[int], float]


class ShardedHead:
    """``rows`` under a margin softmax.

    implementation: "chunked" (PyTorch or Triton, see ``Settings.exp_cosines``) or "dense", the textbook form.
    **Memory** in a step: B * chunk_classes values, and with ``settings.kept`` B values a class.
    """

    def __init__(
        self,
        rows: ClassRows,
        margin: Margin,
        rule: Rule,
        settings: Settings,
        chunk_classes: int,
        world: World,
        anchor: Anchor | None = None,
        sampling: Sampling | None = None,
        implementation: Literal["chunked", "dense"] = "chunked",
    ) -> None:
        self.rows = rows
        self.margin = margin
        self.rule = rule
        self.settings = settings
        self.chunk_classes = chunk_classes
        self.world = world
        self.anchor = anchor
        self.sampling = sampling
        self.implementation = implementation
        self._step = 0
        self._micro: list[MicroBatch] = []
        self._dense_rows: list[torch.Tensor] = []
        self._kept: list[list[torch.Tensor]] = []
        self._extra: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._updated = False
        self._left_out = False
        self._margin_before: dict[str, torch.Tensor] = {}
        self._lr = 0.0
        self._aligned = rows.inv_norm_S.new_zeros(())
        self._begin(None, None)

    def begin_step(self, step: int, labels_G: torch.Tensor, lr: float) -> None:
        """Choose the classes of ``step`` (from 0) and bring their rows up to it.

        ``labels_G``: the labels of the whole global batch, so that every micro-batch sees the same classes.
        """
        self._step, self._lr = step, lr
        self._margin_before = {name: value.clone() for name, value in self.margin.state().items()}
        if self.sampling is None:
            self._begin(None, None)
            return
        sampling, rows = self.sampling, self.rows
        active_N, drawn_N = active_classes(
            sampling.seed, step, sampling.rate, rows.first_class, rows.last_class, labels_G
        )
        self._begin(active_N, drawn_N)
        if sampling.policy == "lazy":
            for chunk in self._chunks:
                self._catch_up(chunk.rows, step)

    def forward(
        self,
        emb_BD: torch.Tensor,
        labels_B: torch.Tensor,
        row_weight_B: torch.Tensor,
        norm_B: torch.Tensor | None = None,
        only_micro_batch: bool = False,
    ) -> HeadTerms:
        """Global loss of one gathered micro-batch; emb_BD has unit rows, ``norm_B`` their former lengths.

        Gradients: the rows' are complete, the embeddings' are this shard's part (``gather_rows`` sums them).
        only_micro_batch: the step has no other, so that without stored exponentials rows are updated during
        backward, which saves computing them a third time.
        **Collectives**: one all-reduce of 3B floats, and one of B for margins that act on negatives.
        """
        if self.implementation == "dense":
            return self._dense(emb_BD, labels_B, row_weight_B, norm_B)
        kept = self._keep(emb_BD) if self.settings.kept is not None else None
        micro = MicroBatch(
            self.rows,
            self._chunks,
            self._active_N,
            self.margin,
            self.settings,
            self.anchor,
            kept,
            self.world,
            emb_BD,
            labels_B,
            row_weight_B,
        )
        self._micro.append(micro)
        self._updated = only_micro_batch and kept is None and not self._extra
        on_chunk = self._update if self._updated else None
        total, classification, boundary = HeadLoss.apply(emb_BD, norm_B, micro, on_chunk)
        return HeadTerms(total, classification, boundary)

    __call__ = forward

    def add_row_gradient(self, local_N: torch.Tensor, grad_ND: torch.Tensor) -> None:
        """Add a gradient with respect to rows ``local_N`` (unique, active) to the step, before rows are updated."""
        self._extra.append((local_N, grad_ND))

    @torch.no_grad()
    def leave_out(self) -> None:
        """Let rows and margin be what they were before this step, whatever its backward and ``step`` say.

        For a loss that is not finite; called before its backward. Rows that a lazy policy brought up to the step stay so.
        """
        self._left_out = True
        for name, value in self.margin.state().items():
            value.copy_(self._margin_before[name])

    @torch.no_grad()
    def update_early(self) -> None:
        """Update the rows as soon as the last micro-batch's embeddings have their gradient, before ``step``.

        For ``gather_rows``: the rows move while that gradient travels. The textbook form waits for ``step``.
        """
        if self.implementation == "chunked":
            self._update_all()

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """End the step after the last backward, rows updated; returns this shard's part of the alignment loss.

        The rows' gradient is the sum over micro-batches, so their number changes nothing but rounding.
        """
        self._update_all()
        if self.sampling is not None and self._active_N is not None:
            if self.sampling.policy == "lazy" and self.rows.touched_S is not None:
                self.rows.touched_S[self._active_N] = self._step + (0 if self._left_out else 1)
            elif self.sampling.policy == "dense" and not self._left_out:
                self._decay_others(self._active_N)
        aligned = self._aligned
        self._begin(None, None)
        return aligned

    @torch.no_grad()
    def settle(self, step: int) -> None:
        """Bring all rows up to ``step`` (lazy decay), before they are exported or measured."""
        if self.sampling is not None and self.sampling.policy == "lazy":
            for low in range(0, self.rows.num_local, self.chunk_classes):
                rows = slice(low, min(low + self.chunk_classes, self.rows.num_local))
                self._catch_up(rows, step)
                assert self.rows.touched_S is not None
                self.rows.touched_S[rows] = step

    def tensors(self) -> dict[str, torch.Tensor]:
        """The class-sharded tensors by name."""
        return self.rows.tensors()

    def _update_all(self) -> None:
        if self._updated or self._left_out:
            return
        for number, chunk in enumerate(self._chunks):
            parts = [self._dense_gradient(weight_ND, chunk) for weight_ND in self._dense_rows]
            parts += [micro.row_gradient(number, chunk) for micro in self._micro]
            self._update(chunk, sum(parts[1:], start=parts[0]))
        self._updated = True

    def _begin(self, active_N: torch.Tensor | None, drawn_N: torch.Tensor | None) -> None:
        self._active_N, self._drawn_N = active_N, drawn_N
        self._micro, self._dense_rows, self._extra, self._updated = [], [], [], False
        self._left_out = False
        self._aligned = self.rows.inv_norm_S.new_zeros(())
        count = self.rows.num_local if active_N is None else active_N.shape[0]
        self._chunks = []
        for low in range(0, count, self.chunk_classes):
            high = min(low + self.chunk_classes, count)
            rows: Rows = slice(low, high) if active_N is None else active_N[low:high]
            self._chunks.append(Chunk(rows, low, high))

    def _keep(self, emb_BD: torch.Tensor) -> list[torch.Tensor]:
        """Storage for one micro-batch's exponentials, used again in the next step when it fits."""
        number, batch = len(self._micro), emb_BD.shape[0]
        if number == len(self._kept):
            self._kept.append([])
        kept, dtype = self._kept[number], self.settings.kept
        assert dtype is not None
        del kept[len(self._chunks) :]
        for place, chunk in enumerate(self._chunks):
            shape = (batch, chunk.high - chunk.low)
            if place < len(kept) and kept[place].shape == shape:
                continue
            buffer = torch.empty(shape, dtype=dtype, device=emb_BD.device)
            kept[place : place + 1] = [buffer]
        return list(kept)

    @staticmethod
    def _dense_gradient(weight_ND: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        assert weight_ND.grad is not None, "step before backward"
        return weight_ND.grad[chunk.low : chunk.high]

    def _dense(
        self, emb_BD: torch.Tensor, labels_B: torch.Tensor, row_weight_B: torch.Tensor, norm_B: torch.Tensor | None
    ) -> HeadTerms:
        rows = self.rows
        check_labels(labels_B, rows.num_classes)
        active = slice(0, rows.num_local) if self._active_N is None else self._active_N
        weight_ND = rows.weight.load(active).detach().clone().requires_grad_()
        self._dense_rows.append(weight_ND)
        local_B = labels_B - rows.first_class
        owned_O = torch.nonzero((local_B >= 0) & (local_B < rows.num_local)).squeeze(1)
        local_O = local_B[owned_O]
        place_O = local_O if self._active_N is None else torch.searchsorted(self._active_N, local_O)
        place_B = torch.full_like(local_B, -1).index_copy(0, owned_O, place_O)
        settings = self.settings
        classification = dense_margin_softmax(
            emb_BD,
            weight_ND,
            place_B,
            row_weight_B,
            norm_B,
            self.margin,
            settings.scale,
            settings.conflict_cos,
            self.world,
        )
        total, boundary = classification, classification.new_zeros(())
        if self.anchor is not None:
            emb_OD = emb_BD[owned_O]
            value_O, grad_OD = self.anchor.outside(emb_OD.detach(), local_O)
            value_O = value_O + ((emb_OD - emb_OD.detach()) * grad_OD).sum(1)
            boundary = sum_over_ranks((value_O * row_weight_B[owned_O]).sum(), self.world)
            total = total + self.anchor.boundary_weight * boundary
        return HeadTerms(total, classification.detach(), boundary.detach())

    def _update(self, chunk: Chunk, product_KD: torch.Tensor) -> None:
        """Move one chunk's rows, given the sum of dL/dcos * e (times the operand's column factor), or dL/dw."""
        if self._left_out:
            return
        rows, local = self.rows, chunk.rows
        scaled = rows.column_factor(local, self.settings.product) is not None
        old_KD = align_K = None
        if self.anchor is not None and self.anchor.align_weight > 0.0:
            share_K = torch.full_like(rows.inv_norm_S[local], 1.0 / rows.num_classes)
            if self._drawn_N is not None and self.sampling is not None:
                # only drawn rows count, for all that were not: the expectation is the mean over all classes
                share_K *= self._drawn_N[chunk.low : chunk.high].to(share_K.dtype) / self.sampling.rate
            class_weight_K = self.anchor.class_weight(local)
            if class_weight_K is not None:
                share_K *= class_weight_K
            old_KD, align_K = self.anchor.old_rows(local), self.anchor.align_weight * share_K
        extra_KD = self._extra_of(chunk)
        if self.implementation == "dense":
            extra_KD = product_KD if extra_KD is None else product_KD + extra_KD
        cos_K = self.settings.update_rows(
            rows,
            self.rule,
            local,
            None if self.implementation == "dense" else product_KD,
            scaled,
            old_KD,
            align_K,
            extra_KD,
            self._lr,
            self._step,
        )
        if cos_K is not None and align_K is not None and self.anchor is not None:
            self._aligned += ((1.0 - cos_K) * align_K).sum() / self.anchor.align_weight

    def _extra_of(self, chunk: Chunk) -> torch.Tensor | None:
        if not self._extra:
            return None
        first_ND = self._extra[0][1]
        sum_KD = first_ND.new_zeros((chunk.high - chunk.low, first_ND.shape[1]))
        for local_N, grad_ND in self._extra:
            place_N = local_N if self._active_N is None else torch.searchsorted(self._active_N, local_N)
            inside = (place_N >= chunk.low) & (place_N < chunk.high)
            sum_KD.index_add_(0, place_N[inside] - chunk.low, grad_ND[inside].to(sum_KD.dtype))
        return sum_KD

    def _catch_up(self, local: Rows, step: int) -> None:
        assert self.sampling is not None and self.rows.touched_S is not None and isinstance(self.rule, SGD)
        gaps_K = step - self.rows.touched_S[local]
        if gaps_K.numel() == 0 or int(gaps_K.max()) == 0:
            return
        maps = decay_over(gaps_K, step, self.sampling.lr_of, self.rule.momentum, self.rule.weight_decay)
        weight_KD, momentum_KD = self.rows.weight.load(local), self.rows.state["momentum"].load(local)
        maps = maps.to(weight_KD.dtype)
        moved_KD = maps[:, 0, 0, None] * weight_KD + maps[:, 0, 1, None] * momentum_KD
        slowed_KD = maps[:, 1, 0, None] * weight_KD + maps[:, 1, 1, None] * momentum_KD
        keep_rows(self.rows, local, moved_KD, {"momentum": slowed_KD}, 2 * step - 1)

    def _decay_others(self, active_N: torch.Tensor) -> None:
        rest = torch.ones(self.rows.num_local, dtype=torch.bool, device=active_N.device)
        rest[active_N] = False
        for local in torch.nonzero(rest).squeeze(1).split(self.chunk_classes):
            decay_rows(self.rows, self.rule, local, self._lr, self._step)
