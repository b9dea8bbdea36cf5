"""BCT, L2, RACT and NCCL: against loops in float64, the same on 1 to 3 ranks, and they bring vectors together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lce_dist.collectives import gather_rows
from lce_dist.compat.frozen_rows import steady_margin
from lce_dist.compat.method import Method, MethodBatch
from lce_dist.compat.methods.bct import Bct
from lce_dist.compat.methods.l2 import L2
from lce_dist.compat.methods.nccl import Nccl
from lce_dist.compat.methods.ract import Ract
from lce_dist.compat.old_space import OldSpace
from lce_dist.config import HeadConfig, OptimConfig
from lce_dist.head.build import build_head
from lce_dist.head.layer import ShardedHead
from lce_dist.world import World, shard_bounds

CLASSES, DIM, ROWS, BANK = 7, 5, 13, 20
SCALE, MARGIN = 8.0, 0.2
HEAD = HeadConfig(loss="cosface", margin_cos=MARGIN, scale=SCALE, chunk_classes=2)
SPLITS = [(13,), (5, 8), (13, 0), (6, 0, 7), (1, 4, 8), (0, 13, 0)]  # rows of each rank: ragged, and empty
STEPS = 3  # NCCL's bank holds one and a half global batches
NAMES = ["bct", "l2", "ract", "nccl"]
WEIGHT = 1.5
# RACT's temperature of 0.01 would leave one negative of each row; the formula is the same at 0.2
TEMPERATURES = {"ract": 0.2, "nccl": 0.3}
# the head's margin softmax works in float32, the rest in the format of its input
TOLERANCE = {"bct": 2e-6}


def data(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New raw rows, old unit rows, labels of a global batch; one class has one row."""
    generator = torch.Generator().manual_seed(40 + step)
    labels = torch.cat([torch.randint(CLASSES - 1, (ROWS - 1,), generator=generator), torch.tensor([CLASSES - 1])])
    raw = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    old = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    return raw, F.normalize(old + centres()[labels]), labels


def centres() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return F.normalize(torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64))


def class_rows() -> torch.Tensor:
    return 3.0 * torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def weights() -> torch.Tensor:
    """Half of a global batch of two micro-batches; not all rows count alike, so that a forgotten weight shows."""
    return torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64) * 0.5 / ROWS


def space_of(world: World, dtype: torch.dtype = torch.float32) -> OldSpace:
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    shard = slice(first, last)
    bound, count = torch.zeros(CLASSES)[shard], torch.full((CLASSES,), 3)[shard]
    return OldSpace(centres()[shard].to(dtype), bound, count, CLASSES, first)


def method_of(name: str, world: World) -> Method:
    method: Method
    if name == "bct":
        method = Bct(space_of(world), steady_margin(HEAD), WEIGHT)
    elif name == "l2":
        method = L2(WEIGHT)
    elif name == "ract":
        method = Ract(WEIGHT)
    else:
        method = Nccl(DIM, WEIGHT, BANK, world).double()
    if name in TEMPERATURES:
        method.TEMPERATURE = TEMPERATURES[name]
    return method


def head_of(world: World, rows: torch.Tensor) -> ShardedHead:
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    return build_head(HEAD, OptimConfig(), CLASSES, DIM, 7, world, lambda step: 0.1, weight_SD=rows[first:last].clone())


def batch_of(
    world: World, splits: tuple[int, ...], raw_bD: torch.Tensor, step: int, head: ShardedHead, dtype: torch.dtype
) -> MethodBatch:
    _, old, labels = data(step)
    first = sum(splits[: world.rank])
    own = slice(first, first + splits[world.rank])
    unit_bD = F.normalize(raw_bD).to(dtype)
    old_bE = old[own].to(dtype)
    gathered = (unit_bD, gather_rows(unit_bD, splits, world), old_bE, gather_rows(old_bE, splits, world))
    ids = torch.arange(ROWS)[own]
    return MethodBatch(*gathered, labels, weights().to(dtype), own, splits, ids, step, world, head)


def losses_on_rank(
    world: World, name: str, splits: tuple[int, ...], forget_others: bool = False
) -> dict[str, torch.Tensor]:
    """Losses and gradients of some steps; the class rows change between them."""
    method = method_of(name, world)
    dtype = torch.float32 if name == "bct" else torch.float64
    first = sum(splits[: world.rank])
    found = {}
    for step in range(STEPS):
        head = head_of(world, class_rows() + step)
        raw_bD = data(step)[0][first : first + splits[world.rank]].clone().requires_grad_()
        batch = batch_of(world, splits, raw_bD, step, head, dtype)
        if forget_others:
            batch = replace(batch, new_GD=batch.new_GD.detach())
        loss = method.loss(batch)
        assert loss is not None
        (0.7 * loss).backward()
        found[f"loss {step}"], found[f"raw {step}"] = loss.detach(), raw_bD.grad
    return found


def whole(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Losses, which are equal on all ranks, and gradients side by side."""
    found = {}
    for key in parts[0]:
        if key.startswith("loss"):
            assert all(torch.equal(part[key], parts[0][key]) for part in parts)
            found[key] = parts[0][key]
        else:
            found[key] = torch.cat([part[key] for part in parts])
    return found


# --- slow, obvious twins in float64: sums over rows of what each weighs ---


def twin_bct(unit: torch.Tensor, step: int, margin: float = MARGIN) -> torch.Tensor:
    labels, total = data(step)[2], unit.new_zeros(())
    for i in range(ROWS):
        logits = [SCALE * (unit[i] @ centres()[c] - (margin if c == labels[i] else 0.0)) for c in range(CLASSES)]
        total = total + weights()[i] * (torch.logsumexp(torch.stack(logits), 0) - logits[int(labels[i])])
    return total


def twin_l2(unit: torch.Tensor, step: int, power: int = 2) -> torch.Tensor:
    old, total = data(step)[1], unit.new_zeros(())
    for i in range(ROWS):
        total = total + weights()[i] * sum((unit[i][d] - old[i][d]) ** 2 for d in range(DIM)) ** (power / 2)
    return total


def twin_ract(unit: torch.Tensor, step: int, all_rows: bool = False) -> torch.Tensor:
    _, old, labels = data(step)
    temperature, total = TEMPERATURES["ract"], unit.new_zeros(())
    for i in range(ROWS):
        own = torch.exp(unit[i] @ old[i] / temperature)
        against = own
        for k in range(ROWS):
            if labels[k] != labels[i] or (all_rows and k != i):
                against = (
                    against + torch.exp(unit[i] @ old[k] / temperature) + torch.exp(unit[i] @ unit[k] / temperature)
                )
        total = total - weights()[i] * torch.log(own / against)
    return total


def twin_nccl(unit: torch.Tensor, step: int, bank: int = BANK) -> torch.Tensor:
    _, old, labels = data(step)
    known, known_labels = list(old), labels.tolist()
    banked = []
    for earlier in range(step - 1, -1, -1):
        banked += list(zip(data(earlier)[1], data(earlier)[2].tolist(), strict=True))
    for vector, label in banked[:bank]:
        known.append(vector)
        known_labels.append(label)
    temperature, total = TEMPERATURES["nccl"], unit.new_zeros(())
    rows = F.normalize(class_rows() + step)
    for i in range(ROWS):
        for space in ("vectors", "classes"):
            if space == "vectors":
                cos = [unit[i] @ q for q in known]
            else:
                cos = [F.cosine_similarity(rows @ unit[i], rows @ q, dim=0) for q in known]
            against = sum(torch.exp(c / temperature) for c in cos)
            positives = [p for p in range(len(known)) if known_labels[p] == labels[i]]
            for p in positives:
                share = 0.5 * (1.0 + old[i] @ known[p]) / len(positives)
                total = total - weights()[i] * share * torch.log(torch.exp(cos[p] / temperature) / against)
    return total


TWINS: dict[str, Callable[..., torch.Tensor]] = {
    "bct": twin_bct,
    "l2": twin_l2,
    "ract": twin_ract,
    "nccl": twin_nccl,
}
# what a slip would look like: no margin, the distance itself, same-class rows as negatives, a bank too short
SLIPS: dict[str, dict[str, object]] = {
    "bct": {"margin": 0.0},
    "l2": {"power": 1},
    "ract": {"all_rows": True},
    "nccl": {"bank": BANK - 1},
}


def truth_of(name: str, **slip: object) -> dict[str, torch.Tensor]:
    truth = {}
    for step in range(STEPS):
        raw = data(step)[0].requires_grad_()
        loss = WEIGHT * TWINS[name](F.normalize(raw), step, **slip)
        (0.7 * loss).backward()
        truth[f"loss {step}"], truth[f"raw {step}"] = loss.detach(), raw.grad
    return truth


def difference(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest, as a share of each tensor's largest value."""
    assert found.keys() == truth.keys()
    shares = []
    for key, value in truth.items():
        assert found[key].shape == value.shape and float(value.abs().max()) > 0, key
        shares.append(float((found[key].double() - value).abs().max() / value.abs().max()))
    return max(shares)


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_equal_the_loops_on_any_number_of_ranks(run_distributed, name):
    truth, slip = truth_of(name), truth_of(name, **SLIPS[name])
    tolerance = TOLERANCE.get(name, 1e-11)
    for splits in SPLITS:
        found = whole(run_distributed(losses_on_rank, len(splits), name, splits))
        assert difference(found, truth) < tolerance, splits
        assert difference(found, slip) > 1000 * tolerance, splits


def test_ract_needs_the_gradient_that_other_ranks_have_for_own_rows(run_distributed):
    found = whole(run_distributed(losses_on_rank, 2, "ract", (5, 8), True))
    assert difference(found, truth_of("ract")) > 0.01


def test_nccl_by_hand():
    """Two rows of two classes at right angles, new = old: shares 1, cosines 1 and 0 in both spaces."""
    method, world = Nccl(2, 1.0, 4, World()), World()
    head = build_head(HEAD, OptimConfig(), 2, 2, 7, world, lambda step: 0.1, weight_SD=torch.eye(2))
    unit, labels, half = torch.eye(2), torch.arange(2), torch.full((2,), 0.5)
    batch = MethodBatch(unit, unit, unit, unit, labels, half, slice(0, 2), (2,), labels, 0, world, head)
    expected = 2.0 * math.log(1.0 + math.exp(-1.0 / Nccl.TEMPERATURE))
    assert float(method.loss(batch)) == pytest.approx(expected, abs=1e-6)
    # the two rows are in the bank now: each old vector counts twice, for and against
    again = 2.0 * (math.log(2.0) + math.log(1.0 + math.exp(-1.0 / Nccl.TEMPERATURE)))
    assert float(method.loss(replace(batch, step=1))) == pytest.approx(again, rel=1e-6)
    assert method.bank_labels.tolist() == [0, 1, 0, 1] and torch.equal(method.bank, unit.repeat(2, 1))


def test_ract_by_hand():
    """One positive at cos 0.6; against it an old vector at 0.5 and a new one at 0.59, of another class."""
    world = World()
    head = head_of(world, class_rows())
    new = torch.tensor([[1.0, 0.0], [0.59, math.sqrt(1 - 0.59**2)]], dtype=torch.float64)
    old = torch.tensor([[0.6, 0.8], [0.5, -math.sqrt(0.75)]], dtype=torch.float64)
    labels, only_first = torch.arange(2), torch.tensor([1.0, 0.0], dtype=torch.float64)
    batch = MethodBatch(new, new, old, old, labels, only_first, slice(0, 2), (2,), labels, 0, world, head)
    expected = math.log(1.0 + math.exp(-10.0) + math.exp(-1.0))
    assert float(Ract(1.0).loss(batch)) == pytest.approx(expected, rel=1e-9)


def test_bct_of_a_vector_on_its_old_centre_by_hand():
    """Centres at right angles: logits s (1 - m) and 0."""
    world = World()
    space = OldSpace(torch.eye(3), torch.zeros(3), torch.ones(3, dtype=torch.int64), 3, 0)
    head = build_head(HEAD, OptimConfig(), 3, 3, 7, world, lambda step: 0.1)
    unit, labels, third = torch.eye(3), torch.arange(3), torch.full((3,), 1.0 / 3)
    batch = MethodBatch(unit, unit, None, None, labels, third, slice(0, 3), (3,), labels, 0, world, head)
    expected = math.log(math.exp(SCALE * (1 - MARGIN)) + 2.0) - SCALE * (1 - MARGIN)
    assert float(Bct(space, steady_margin(HEAD), 1.0).loss(batch)) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(space.centre_SD, torch.eye(3))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_zero_adds_nothing(name):
    method = method_of(name, World())
    method._weight = 0.0
    batch = batch_of(World(), (ROWS,), data(0)[0], 0, head_of(World(), class_rows()), torch.float64)
    assert method.loss(batch) is None


# --- they bring vectors together ---


def cross_cosines(unit: torch.Tensor, old: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cosines of new vectors with old ones of other images: of the same class, and of other classes."""
    cos = unit @ old.T
    same = (labels[:, None] == labels[None, :]) & ~torch.eye(len(labels), dtype=torch.bool)
    return float(cos[same].mean()), float(cos[labels[:, None] != labels[None, :]].mean())


@pytest.mark.parametrize("name", NAMES)
def test_cross_similarity_of_a_class_rises_above_that_of_others(name):
    world, generator = World(), torch.Generator().manual_seed(9)
    labels = torch.arange(6).repeat_interleave(5)
    means = F.normalize(torch.randn(6, 8, generator=generator))
    old = F.normalize(means[labels] + 0.15 * torch.randn(30, 8, generator=generator))
    centre = F.normalize(torch.stack([old[labels == c].mean(0) for c in range(6)]))
    space = OldSpace(centre, torch.zeros(6), torch.full((6,), 5), 6, 0)
    head = build_head(HEAD, OptimConfig(), 6, 8, 7, world, lambda step: 0.1, weight_SD=centre.clone())
    makers: dict[str, Callable[[], Method]] = {
        "bct": lambda: Bct(space, steady_margin(HEAD), Bct.WEIGHT),
        "l2": lambda: L2(L2.WEIGHT),
        "ract": lambda: Ract(Ract.WEIGHT),
        "nccl": lambda: Nccl(8, Nccl.WEIGHT, Nccl.BANK, world),
    }
    method = makers[name]()
    raw = torch.randn(30, 8, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    before = cross_cosines(F.normalize(raw).detach(), old, labels)
    assert abs(before[0] - before[1]) < 0.2
    share, everyone, ids = torch.full((30,), 1.0 / 30), slice(0, 30), torch.arange(30)
    for step in range(80):
        unit = F.normalize(raw)
        loss = method.loss(MethodBatch(unit, unit, old, old, labels, share, everyone, (30,), ids, step, world, head))
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = cross_cosines(F.normalize(raw).detach(), old, labels)
    # RACT stops pulling where a positive is ahead of all negatives; the others pull on
    assert after[0] > 0.5 and after[0] > before[0] + 0.4 and after[0] > after[1] + 0.5
