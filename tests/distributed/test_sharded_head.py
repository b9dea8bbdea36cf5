"""The sharded, chunked, fused head equals the textbook in float64: losses, gradients, updates, on 1 to 4 ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lce_dist.collectives import gather_rows
from lce_dist.compat.lce import OldAnchor, alignment_loss, boundary_loss
from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.errors import DataError, RunError
from lce_dist.head.build import build_head, margin_of
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.layer import ShardedHead
from lce_dist.head.rows import initial_rows
from lce_dist.head.sampling import active_classes, drawn_flags
from lce_dist.world import World, shard_bounds

ROWS, DIM, SEED, DECAY = 11, 6, 5, 0.01


@dataclass(frozen=True)
class Case:
    head: HeadConfig
    classes: int = 13
    labels: str = "spread"
    uneven: bool = False
    parts: int = 1
    steps: int = 4
    anchored: bool = False
    apart: bool = False  # classes without a part in the alignment
    kept: bool = True
    early: bool = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=DECAY, momentum=0.9))


def cosface(**keys: object) -> HeadConfig:
    return HeadConfig.model_validate({"loss": "cosface", "margin_cos": 0.35, "scale": 64.0, "chunk_classes": 4} | keys)


def arcface(**keys: object) -> HeadConfig:
    return HeadConfig.model_validate({"loss": "arcface", "margin_rad": 0.5, "scale": 48.0, "chunk_classes": 3} | keys)


MAGFACE = {
    "loss": "magface",
    "margin_rad": 0.2,
    "margin_rad_upper": 0.6,
    "norm_lower": 1.0,
    "norm_upper": 4.0,
    "norm_weight": 2.0,
    "scale": 24.0,
    "chunk_classes": 3,
}
CASES = {
    "arcface, 10 classes: 3, 3, 3, 1": Case(arcface(), classes=10),
    "cosface, ragged": Case(cosface(), uneven=True),
    "softmax, fewer classes than ranks": Case(HeadConfig(loss="softmax", scale=16.0, chunk_classes=100), classes=3),
    "all labels on one shard": Case(cosface(), classes=9, labels="all on one shard", uneven=True),
    "arcface, an empty shard": Case(arcface(), classes=5, uneven=True),
    "one class": Case(cosface(), classes=1),
    "a scale that needs the offset": Case(cosface(scale=80.0)),
    "recomputed": Case(arcface(), kept=False),
    "recomputed, anchored": Case(cosface(scale=16.0), kept=False, anchored=True),
    "anchored": Case(arcface(scale=16.0), anchored=True, uneven=True),
    "anchored, some classes apart": Case(arcface(scale=16.0), anchored=True, apart=True, uneven=True),
    "sampled, anchored, some classes apart, recomputed": Case(
        cosface(sample_rate=0.3, sample_policy="lazy", scale=16.0), classes=40, anchored=True, apart=True, kept=False
    ),
    "three micro-batches": Case(arcface(scale=16.0), parts=3, anchored=True),
    "three micro-batches, recomputed": Case(arcface(scale=16.0), parts=3, kept=False),
    "updated while gradients travel": Case(cosface(scale=16.0), early=True, anchored=True, uneven=True),
    "three micro-batches, updated early, recomputed": Case(arcface(scale=16.0), parts=3, kept=False, early=True),
    "combined": Case(
        HeadConfig(loss="combined", margin_factor=1.2, margin_rad=0.2, margin_cos=0.1, scale=32.0, chunk_classes=4)
    ),
    "adaface": Case(HeadConfig(loss="adaface", margin_rad=0.4, scale=32.0, chunk_classes=4), uneven=True),
    "magface": Case(HeadConfig.model_validate(MAGFACE), uneven=True),
    "curricularface": Case(HeadConfig(loss="curricularface", margin_rad=0.5, scale=16.0, chunk_classes=4)),
    "curricularface, scale 64": Case(
        HeadConfig(loss="curricularface", margin_rad=0.5, scale=64.0, chunk_classes=4), kept=False
    ),
    "straight through": Case(arcface(straight_through=True)),
    "conflicts left out": Case(arcface(scale=16.0, conflict_cos=0.3)),
    "adamw": Case(cosface(optimizer="adamw", scale=16.0), anchored=True),
    "sampled, frozen": Case(cosface(sample_rate=0.3, sample_policy="freeze", scale=16.0), classes=40, anchored=True),
    "sampled, lazy": Case(cosface(sample_rate=0.3, sample_policy="lazy", scale=16.0), classes=40, steps=9),
    "sampled, lazy, micro-batches": Case(
        cosface(sample_rate=0.3, sample_policy="lazy", scale=16.0), classes=40, anchored=True, parts=2, kept=False
    ),
    "sampled, dense": Case(cosface(sample_rate=0.3, sample_policy="dense", scale=16.0), classes=40, anchored=True),
    "sampled, adamw": Case(
        cosface(sample_rate=0.5, sample_policy="dense", optimizer="adamw", scale=16.0), classes=40, labels="few"
    ),
    "dense": Case(arcface(implementation="dense", scale=16.0), anchored=True, uneven=True, parts=2),
    "dense, sampled": Case(cosface(implementation="dense", sample_rate=0.5, sample_policy="freeze"), classes=20),
}


def lr_of(step: int) -> float:
    return 0.02 * (step + 1)


def data(case: Case, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Raw embeddings (ROWS, DIM), labels, row weights of one step; float64 so that only real errors show."""
    generator = torch.Generator().manual_seed(case.classes * 100 + step)
    emb = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    chosen = torch.randint(case.classes, (ROWS,), generator=generator)
    if case.labels == "all on one shard":
        chosen = torch.full_like(chosen, case.classes - 1)
    elif case.labels == "few":
        chosen %= 3
    return emb, chosen, torch.rand(ROWS, generator=generator, dtype=torch.float64)


def old_space(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(77)
    centre = F.normalize(torch.randn(case.classes, DIM, generator=generator, dtype=torch.float64))
    return centre, 2.0 * torch.rand(case.classes, generator=generator, dtype=torch.float64) - 0.5


def class_weights(case: Case) -> torch.Tensor | None:
    """Every third class has no part in the alignment, so that the others count for it."""
    if not case.apart:
        return None
    takes_part = torch.arange(case.classes) % 3 != 1
    return takes_part.double() * (case.classes / takes_part.sum())


def rows_of(size: int, uneven: bool) -> tuple[int, ...]:
    if uneven and size > 1:
        return (*(1 for _ in range(size - 2)), ROWS - (size - 2), 0)  # one row a rank, the rest, and an empty rank
    return tuple((r + 1) * ROWS // size - r * ROWS // size for r in range(size))


def float64_head(case: Case, world: World) -> ShardedHead:
    first, last = shard_bounds(case.classes, world.rank, world.size)
    anchor = None
    if case.anchored:
        centre, bound = old_space(case)
        weights = class_weights(case)
        own = None if weights is None else weights[first:last]
        anchor = OldAnchor(centre[first:last], bound[first:last], 3.0, 2.0, "cos", own)
    rows = initial_rows(first, last, DIM, SEED).double()
    head = build_head(case.head, case.optim, case.classes, DIM, SEED, world, lr_of, anchor, rows)
    kept = torch.float64 if case.kept else None
    head.settings = replace(head.settings, operand=torch.float64, kept=kept)
    return head


def sharded(world: World, case: Case) -> dict[str, list[torch.Tensor] | torch.Tensor]:
    head = float64_head(case, world)
    rows = rows_of(world.size, case.uneven)
    low = sum(rows[: world.rank])
    losses, grads, alignments = [], [], []
    for step in range(case.steps):
        emb, y, row_weights = data(case, step)
        head.begin_step(step, y, lr_of(step))
        total = 0.0
        parts = [
            [(low + p * n // case.parts, low + (p + 1) * n // case.parts) for low, n in _blocks(rows)]
            for p in range(case.parts)
        ]
        grad = torch.zeros(rows[world.rank], DIM, dtype=torch.float64)
        for number, part in enumerate(parts):
            own = slice(*part[world.rank])
            counts = tuple(b - a for a, b in part)
            local = emb[own].clone().requires_grad_()
            early = head.update_early if case.early and number == case.parts - 1 else None
            gathered = gather_rows(F.normalize(local), counts, world, None, early)
            norms = gather_rows(local.norm(dim=1), counts, world) if head.margin.uses_norms else None
            order = torch.cat([torch.arange(a, b) for a, b in part])
            terms = head(gathered, y[order], row_weights[order], norms, only_micro_batch=case.parts == 1)
            terms.total.backward()
            total += terms.total.item()
            grad[own.start - low : own.stop - low] = local.grad
        alignments.append(head.step())
        losses.append(torch.tensor(total, dtype=torch.float64))
        grads.append(grad)
    head.settle(case.steps)
    state = {name: table.load(slice(0, head.rows.num_local)) for name, table in head.rows.state.items()}
    norm = torch.linalg.vector_norm(head.rows.weight.load(slice(0, head.rows.num_local)), dim=1)
    torch.testing.assert_close(head.rows.inv_norm_S * norm, torch.ones_like(norm))
    weight = head.rows.weight.load(slice(0, head.rows.num_local))
    statistics = {name: value.clone() for name, value in head.margin.state().items()}
    return {"loss": losses, "emb": grads, "align": alignments, "weight": weight, "statistics": statistics, **state}


def _blocks(rows: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(sum(rows[:rank]), count) for rank, count in enumerate(rows)]


def textbook(case: Case) -> dict[str, object]:
    """One process, whole logits, autograd, torch.optim; a sampled step has the active rows alone."""
    config, alone = case.head, World()
    weight = initial_rows(0, case.classes, DIM, SEED).double().requires_grad_()
    if config.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=DECAY)
    else:
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, weight_decay=DECAY)
    margin, momentum = margin_of(config), torch.zeros_like(weight.detach())
    losses, grads, alignments = [], [], []
    for step in range(case.steps):
        emb, y, row_weights = data(case, step)
        emb.requires_grad_()
        drawn = torch.ones(case.classes, dtype=torch.bool)
        if config.sample_rate < 1.0:
            drawn = drawn_flags(SEED, step, config.sample_rate, 0, case.classes)
        active = torch.nonzero(drawn | torch.isin(torch.arange(case.classes), y)).squeeze(1)
        place = torch.searchsorted(active, y)
        loss = dense_margin_softmax(
            emb,
            weight[active],
            place,
            row_weights,
            emb.norm(dim=1) if margin.uses_norms else None,
            margin,
            config.scale,
            config.conflict_cos,
            alone,
        )
        align = torch.zeros((), dtype=torch.float64)
        if case.anchored:
            centre, bound = old_space(case)
            loss = loss + 2.0 * boundary_loss(F.normalize(emb), y, row_weights, centre, bound, 0, "cos", alone)
            count = case.classes * config.sample_rate
            weights = class_weights(case)
            align = alignment_loss(
                weight[drawn], centre[drawn], count, alone, None if weights is None else weights[drawn]
            )
        (loss + 3.0 * align).backward()
        losses.append(loss.detach())
        grads.append(emb.grad)
        alignments.append(align.detach())
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step)
        if config.sample_rate < 1.0 and config.sample_policy == "freeze":
            with torch.no_grad():
                momentum[active] = 0.9 * momentum[active] + weight.grad[active] + DECAY * weight[active]
                weight[active] -= lr_of(step) * momentum[active]
        else:
            optimizer.step()
        weight.grad = None
    found: dict[str, object] = {"loss": losses, "emb": grads, "align": alignments, "weight": weight.detach()}
    state = optimizer.state[weight]
    if config.optimizer == "adamw":
        found |= {"first": state["exp_avg"], "second": state["exp_avg_sq"]}
    else:
        found["momentum"] = state.get("momentum_buffer", momentum)
    return found | {"statistics": {name: value.clone() for name, value in margin.state().items()}}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_updates_equal_the_textbook(run_distributed, size, name):
    case = CASES[name]
    parts, truth = run_distributed(sharded, size, case), textbook(case)
    close = {"rtol": 1e-9, "atol": 1e-11}
    for part in parts:
        torch.testing.assert_close(part["loss"], truth["loss"], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(part["statistics"], truth["statistics"], **close)
    for step in range(case.steps):
        emb = torch.cat([part["emb"][step] for part in parts])
        torch.testing.assert_close(emb, truth["emb"][step], **close)
        if case.anchored:
            torch.testing.assert_close(sum(part["align"][step] for part in parts), truth["align"][step], **close)
    for key in set(truth) & {"weight", "momentum", "first", "second"}:
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), truth[key], **close)


def test_the_comparison_can_fail(run_distributed):
    parts = run_distributed(sharded, 2, CASES["cosface, ragged"])
    truth = textbook(replace(CASES["cosface, ragged"], head=arcface()))
    assert not torch.allclose(torch.cat([part["weight"] for part in parts]), truth["weight"], rtol=1e-3)


@pytest.mark.parametrize(("num_classes", "size"), [(10, 3), (3, 4), (1, 1), (7, 7)])
def test_shards_cover_every_class_once(num_classes, size):
    bounds = [shard_bounds(num_classes, rank, size) for rank in range(size)]
    assert [c for low, high in bounds for c in range(low, high)] == list(range(num_classes))
    chunks = [len(chunk) for chunk in torch.arange(num_classes).chunk(size)]
    assert [high - low for low, high in bounds if high > low] == chunks


def test_any_cut_draws_the_same_classes():
    labels = torch.tensor([5, 99, 5, 0])
    whole, drawn = active_classes(3, 7, 0.2, 0, 100, labels)
    cut = [active_classes(3, 7, 0.2, low, high, labels) for low, high in ((0, 1), (1, 40), (40, 40), (40, 100))]
    starts = (0, 1, 40, 40)
    assert torch.cat([part + low for (part, _), low in zip(cut, starts, strict=True)]).tolist() == whole.tolist()
    assert torch.cat([flags for _, flags in cut]).tolist() == drawn.tolist()
    assert {0, 5, 99} <= set(whole.tolist())


def test_draws_have_the_rate_and_do_not_repeat():
    draws = torch.stack([drawn_flags(1, step, 0.1, 0, 20_000) for step in range(20)]).double()
    assert abs(draws.mean().item() - 0.1) < 4 * (0.09 / draws.numel()) ** 0.5
    together = (draws[0] * draws[1]).mean().item()
    assert abs(together - 0.01) < 4 * (0.01 / 20_000) ** 0.5


def _counted(world: World, classes: int) -> list[tuple[str, int]]:
    """Names and bytes of all that a 16-bit step sends, by watching torch.distributed itself."""
    calls: list[tuple[str, int]] = []
    originals = {
        name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    }

    def watch(name: str):
        def call(*args, **keys):
            calls.append((name, args[0].numel() * args[0].element_size()))
            return originals[name](*args, **keys)

        return call

    case = Case(cosface(operands="bf16"), classes=classes)
    head = build_head(case.head, case.optim, classes, DIM, SEED, world, lr_of)
    per_rank = tuple(4 for _ in range(world.size))
    local = torch.randn(4, DIM, requires_grad=True)
    labels = torch.arange(4 * world.size) % classes
    try:
        for name in originals:
            setattr(dist, name, watch(name))
        head.begin_step(0, labels, 0.1)
        gathered = gather_rows(F.normalize(local), per_rank, world, torch.float16)
        head(gathered, labels, torch.ones(len(labels)), only_micro_batch=True).total.backward()
        head.step()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


@pytest.mark.parametrize("classes", [6, 600])
def test_a_step_sends_embeddings_in_16_bits_and_one_reduction_and_nothing_that_grows_with_classes(
    run_distributed, classes
):
    batch = 4 * 3
    for calls in run_distributed(_counted, 3, classes):
        assert calls == [
            ("all_gather_into_tensor", 2 * batch * DIM),
            ("all_reduce", 3 * 4 * batch),
            ("reduce_scatter_tensor", 4 * batch // 3 * DIM),  # the own rows' sums, float32
        ]


def _in_flight(world: World) -> list[str]:
    """What happens around the reduce-scatter of a step that keeps its exponentials."""
    seen: list[str] = []
    original = dist.reduce_scatter_tensor

    class Watched:
        def __init__(self, work: dist.Work) -> None:
            self.work = work

        def wait(self) -> None:
            seen.append("waited for")
            self.work.wait()

    def watch(*args, **keys):
        assert keys["async_op"]
        seen.append("sent")
        return Watched(original(*args, **keys))

    case = Case(cosface())
    head = build_head(case.head, case.optim, case.classes, DIM, SEED, world, lr_of)
    assert head.settings.kept is not None
    before = head.rows.weight.load(slice(None)).clone()

    def update() -> None:
        assert torch.equal(head.rows.weight.load(slice(None)), before)
        head.update_early()
        seen.append("rows moved" if not torch.equal(head.rows.weight.load(slice(None)), before) else "nothing moved")

    labels = torch.arange(4 * world.size) % case.classes
    local = torch.randn(4, DIM, requires_grad=True)
    head.begin_step(0, labels, 0.1)
    gathered = gather_rows(F.normalize(local), (4,) * world.size, world, None, update)
    total = head(gathered, labels, torch.ones(len(labels)), only_micro_batch=True).total
    try:
        dist.reduce_scatter_tensor = watch
        total.backward()
    finally:
        dist.reduce_scatter_tensor = original
    moved = head.rows.weight.load(slice(None)).clone()
    head.step()
    assert torch.equal(head.rows.weight.load(slice(None)), moved)
    return seen


def test_rows_move_while_the_gradient_of_the_embeddings_travels(run_distributed):
    for seen in run_distributed(_in_flight, 2):
        assert seen == ["sent", "rows moved", "waited for"]


def _poisoned(world: World, what: str) -> tuple[str, bool]:
    case = Case(cosface())
    head = float64_head(case, world)
    emb, y, row_weights = data(case, 0)
    emb = F.normalize(emb)
    if what == "embedding":
        emb[3, 1] = torch.nan
    elif what == "row" and world.rank == world.size - 1:
        head.rows.weight.values_SD[0, 0] = torch.inf
    elif what == "label":
        y[2] = case.classes
    elif what == "negative label":
        y[2] = -1
    before = {name: tensor.clone() for name, tensor in head.tensors().items()}
    head.begin_step(0, y, 0.1)
    try:
        head(emb.requires_grad_(), y, row_weights, only_micro_batch=True).total.backward()
        message = "no error"
    except (DataError, RunError) as error:
        message = str(error)
    return message, all(torch.equal(before[name], tensor) for name, tensor in head.tensors().items())


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("embedding", "1 of 11 embeddings are not finite (the first is row 3"),
        ("row", "class rows are not finite"),
        ("label", "label 13 (row 2 of the global batch) is no class; labels must be in [0, 13)"),
        ("negative label", "label -1 (row 2"),
    ],
)
def test_what_cannot_be_trained_on_is_one_error_on_every_rank_and_changes_nothing(run_distributed, what, says):
    answers = run_distributed(_poisoned, 3, what)
    assert len({message for message, _ in answers}) == 1
    assert says in answers[0][0]
    assert all(unchanged for _, unchanged in answers)
