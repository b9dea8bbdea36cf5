"""UniBCT, AdvBCT, MixBCT and RBT: against loops in float64, the same on 1 to 3 ranks, and they make vectors comparable."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.collectives import gather_rows
from lce_dist.compat.frozen_rows import softmax_over_frozen, steady_margin
from lce_dist.compat.method import Method, MethodBatch
from lce_dist.compat.methods.advbct import AdvBct
from lce_dist.compat.methods.mixbct import MixBct, find_distrusted
from lce_dist.compat.methods.rbt import Rbt
from lce_dist.compat.methods.unibct import (
    UniBct,
    diffusion_shares,
    iterated_shares,
    refined_prototypes,
)
from lce_dist.compat.old_space import OldSpace, compute_old_space
from lce_dist.config import CompatConfig, HeadConfig, OptimConfig
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import ConfigError
from lce_dist.head.build import build_head
from lce_dist.head.layer import ShardedHead
from lce_dist.head.margins import ArcFace, CosFace
from lce_dist.world import World

CLASSES, DIM, ROWS, SEED = 9, 6, 14, 11
SCALE, MARGIN = 8.0, 0.2
HEAD = HeadConfig(loss="cosface", margin_cos=MARGIN, scale=SCALE, chunk_classes=2)
SPLITS = [(14,), (5, 9), (14, 0), (6, 0, 8), (1, 4, 9)]  # rows of each rank: ragged, and empty
STEP, STEPS = 700, 4000


@dataclass(frozen=True)
class Inputs:
    """What a builder is given."""

    config: CompatConfig
    head: HeadConfig
    space: OldSpace
    old_vectors: Callable[[], Iterable[EmbeddedRows]] | None
    new_dim: int
    old_dim: int
    seed: int
    steps: int
    world: World


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All training images' old vectors, labels and ids, which are neither dense nor in order; class 8 has one image."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.cat([torch.arange(CLASSES - 1).repeat(6), torch.full((31,), 3), torch.tensor([8])])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(CLASSES, DIM, generator=generator)
    vectors = F.normalize(centres[labels] + 0.9 * torch.randn(len(labels), DIM, generator=generator))
    return vectors, labels, 3 * torch.randperm(len(labels), generator=generator) + 5


def rounds_of(world: World, block: int = 7) -> list[EmbeddedRows]:
    vectors, labels, ids = data()
    blocks = [slice(low, min(low + block, len(labels))) for low in range(0, len(labels), block)]
    rounds = []
    for first in range(0, len(blocks), world.size):
        taken = blocks[first : first + world.size]
        taken += [slice(0, 0)] * (world.size - len(taken))
        mine = taken[world.rank]
        rows = tuple(part.stop - part.start for part in taken)
        rounds.append(EmbeddedRows(vectors[mine], labels[mine], ids[mine], rows))
    return rounds


def inputs_of(world: World, **config: object) -> Inputs:
    space = compute_old_space(lambda: rounds_of(world), CLASSES, DIM, world)
    compat = CompatConfig.model_validate({"method": "x"} | config)
    return Inputs(compat, HEAD, space, lambda: rounds_of(world, 5), DIM, DIM, SEED, STEPS, world)


def head_of(world: World, head: HeadConfig = HEAD) -> ShardedHead:
    return build_head(head, OptimConfig(), CLASSES, DIM, 7, world, lambda step: 0.1)


def batch_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """New raw rows, old unit rows, labels, sample ids of one global batch."""
    vectors, labels, ids = data()
    raw = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(4))
    taken = torch.cat([torch.arange(ROWS - 1), torch.nonzero(labels == CLASSES - 1)[0]])  # the class of one image too
    return raw + vectors[taken], vectors[taken], labels[taken], ids[taken]


def blocks(inputs: int, outputs: int) -> nn.Module:
    """A small map with batch statistics, as the residual bottleneck transformation has."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(inputs, 5), nn.BatchNorm1d(5), nn.PReLU(5), nn.Linear(5, outputs))


def method_of(name: str, inputs: Inputs) -> Method:
    if name == "unibct":
        return UniBct.build(inputs)
    if name == "advbct":
        return AdvBct.build(inputs)
    if name == "mixbct":
        return MixBct.build(inputs)
    return Rbt(name.partition("-")[2], 1.5, blocks(DIM, DIM), inputs.space, inputs.head)


def method_batch(
    world: World, splits: tuple[int, ...], raw_bD: torch.Tensor, head: ShardedHead, method: Method
) -> MethodBatch:
    _, old, labels, ids = batch_rows()
    first = sum(splits[: world.rank])
    own = slice(first, first + splits[world.rank])
    unit_bD = F.normalize(raw_bD)
    old_bE = old[own] if method.uses_old_vectors else None
    return MethodBatch(
        unit_bD,
        gather_rows(unit_bD, splits, world),
        old_bE,
        gather_rows(old_bE, splits, world) if old_bE is not None else None,
        labels,
        torch.full((ROWS,), 0.5 / ROWS),  # half of a global batch of two micro-batches
        own,
        splits,
        ids[own],
        STEP,
        world,
        head,
    )


def loss_on_rank(world: World, name: str, splits: tuple[int, ...]) -> dict[str, torch.Tensor]:
    head = head_of(world)
    method = method_of(name, inputs_of(world))
    first = sum(splits[: world.rank])
    raw_bD = batch_rows()[0][first : first + splits[world.rank]].clone().requires_grad_()
    batch = method_batch(world, splits, raw_bD, head, method)
    loss = method.loss(batch)
    assert loss is not None
    loss.backward()
    grads = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    assert raw_bD.grad is not None
    return {"loss": loss.detach(), "raw": raw_bD.grad, **grads}


def whole(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Equal losses, rows side by side, parameters' gradients summed over ranks."""
    for part in parts:
        torch.testing.assert_close(part["loss"], parts[0]["loss"], rtol=0, atol=0)
    keys = {key for part in parts for key in part} - {"loss", "raw"}
    summed = {key: torch.stack([part[key] for part in parts if key in part]).sum(0) for key in keys}
    return {"loss": parts[0]["loss"], "raw": torch.cat([part["raw"] for part in parts]), **summed}


def close(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert found.keys() == truth.keys()
    for key in truth:
        scale = float(truth[key].abs().max())
        assert scale > 0, key
        torch.testing.assert_close(found[key].double(), truth[key].double(), rtol=2e-5, atol=2e-6 * scale, msg=key)


# --- slow, obvious twins in float64 ---


def members(label: int) -> torch.Tensor:
    vectors, labels, ids = data()
    chosen = labels == label
    return vectors[chosen][torch.argsort(ids[chosen])].double()


def twin_prototype(member: torch.Tensor) -> torch.Tensor:
    """The refined vectors (1 - L)(I - L P)^-1 V, one by one, then their mean."""
    num = len(member)
    if num == 1:
        return F.normalize(member[0], dim=0)
    transition = torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        for j in range(num):
            if i != j:
                transition[i, j] = math.exp(float(member[i] @ member[j]) / 0.05)
        transition[i] /= transition[i].sum()
    refined = 0.1 * torch.inverse(torch.eye(num, dtype=torch.float64) - 0.9 * transition) @ member
    return F.normalize(refined.mean(0), dim=0)


def twin_softmax(unit: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over half of a global batch: CosFace, row by row."""
    total = unit.new_zeros(())
    for i in range(len(unit)):
        logits = [SCALE * (unit[i] @ rows[c] - (MARGIN if c == labels[i] else 0.0)) for c in range(len(rows))]
        total = total + torch.logsumexp(torch.stack(logits), 0) - logits[int(labels[i])]
    return 0.5 * total / len(unit)


def twin_centres() -> torch.Tensor:
    return torch.stack([F.normalize(members(c).mean(0), dim=0) for c in range(CLASSES)])


def twin_unibct() -> dict[str, torch.Tensor]:
    raw, _, labels, _ = batch_rows()
    raw = raw.double().requires_grad_()
    loss = twin_softmax(F.normalize(raw), torch.stack([twin_prototype(members(c)) for c in range(CLASSES)]), labels)
    loss.backward()
    return {"loss": loss.detach(), "raw": raw.grad}


def twin_advbct() -> dict[str, torch.Tensor]:
    raw, old, labels, _ = batch_rows()
    raw, old = raw.double().requires_grad_(), old.double()
    method = copy.deepcopy(AdvBct.build(inputs_of(World()))).double()
    centres = twin_centres()
    unit = F.normalize(raw)

    def log_probabilities(rows: torch.Tensor) -> torch.Tensor:
        hidden = rows @ method.enter.weight.T + method.enter.bias
        normal = F.batch_norm(hidden, None, None, method.gain, method.shift, training=True, eps=1e-5)
        return torch.log_softmax(torch.relu(normal) @ method.leave.weight.T + method.leave.bias, 1)

    fooled = -(1.0 - STEP / STEPS) * (log_probabilities(unit)[:, 0].mean() + log_probabilities(old)[:, 1].mean())
    excesses = []
    for i in range(ROWS):
        y = int(labels[i])
        if len(members(y)) == 1:
            continue
        farthest = max(float((m - centres[y]).norm()) for m in members(y))
        radius = farthest + (0.4 - farthest) / (1.0 + torch.exp(-method.elastic[y]))
        excess = (unit[i] - centres[y]).norm() - radius
        if excess > 0:
            excesses.append(excess)
    assert 0 < len(excesses) < ROWS - 1
    boundary = torch.stack(excesses).mean()
    names = [name for name, _ in method.named_parameters()]
    values = list(method.parameters())
    to_network = torch.autograd.grad(fooled, raw, retain_graph=True)[0]
    inward = torch.autograd.grad(boundary, raw, retain_graph=True)[0]
    learned = torch.autograd.grad(fooled + boundary, values)
    alpha = 2.0 / (1.0 + math.exp(-10.0 * STEP / STEPS)) - 1.0
    half = 4.0 * 0.5
    grads = {name: half * grad for name, grad in zip(names, learned, strict=True)}
    return {"loss": half * (fooled + boundary).detach(), "raw": half * (inward - alpha * to_network), **grads}


def twin_rbt(manner: str) -> dict[str, torch.Tensor]:
    raw, old, labels, _ = batch_rows()
    raw, old = raw.double().requires_grad_(), old.double()
    bridge = blocks(DIM, DIM).double()
    unit = F.normalize(raw)
    mapped = F.normalize(bridge(unit if manner == "backward" else old))
    rows = twin_centres()
    if manner == "forward":
        rows = F.normalize(head_of(World()).rows.weight.load(slice(None)).double())
    other = old if manner == "backward" else unit
    loss = 1.5 * (twin_softmax(mapped, rows, labels) + 10.0 * 0.5 * (1.0 - (mapped * other).sum(1)).mean())
    loss.backward()
    grads = {f"bridge.{key}": p.grad for key, p in bridge.named_parameters()}
    return {"loss": loss.detach(), "raw": raw.grad, **grads}


TWINS = {
    "unibct": twin_unibct,
    "advbct": twin_advbct,
    "rbt-backward": lambda: twin_rbt("backward"),
    "rbt-forward": lambda: twin_rbt("forward"),
}


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_losses_and_gradients_equal_the_loops_on_any_number_of_ranks(run_distributed, name, splits):
    truth = {key: value for key, value in TWINS[name]().items() if key != "bridge.0.bias"}
    found = whole(run_distributed(loss_on_rank, len(splits), name, splits))
    bias = found.pop("bridge.0.bias", None)  # ahead of a batch norm: no gradient but rounding
    assert bias is None or float(bias.abs().max()) < 1e-6
    if name == "advbct":
        for part in (truth, found):
            assert float(part.pop("enter.bias").abs().max()) < 1e-6
    close(found, truth)


# --- UniBCT ---


def prototypes_on_rank(world: World, budget_bytes: int) -> torch.Tensor:
    inputs = inputs_of(world)
    assert inputs.old_vectors is not None
    return refined_prototypes(inputs.old_vectors, inputs.space, 0.9, 0.05, world, budget_bytes)


def test_refined_prototypes_are_bitwise_the_same_on_any_number_of_ranks_and_passes(run_distributed):
    truth = torch.stack([twin_prototype(members(c)) for c in range(CLASSES)])
    first = None
    for size in (1, 2, 3):
        for budget_bytes in (1, 4 * DIM * 12, 1 << 30):  # a class a pass; two classes; all
            found = torch.cat(run_distributed(prototypes_on_rank, size, budget_bytes))
            torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-6)
            first = found if first is None else first
            assert torch.equal(found, first)
    assert float((truth * twin_centres()).sum(1).min()) < 0.999  # refined: not the plain means


def test_a_mislabelled_image_counts_for_less_than_in_a_mean_and_iteration_agrees_with_the_solution():
    generator = torch.Generator().manual_seed(1)
    centre = F.normalize(torch.randn(DIM, generator=generator, dtype=torch.float64), dim=0)
    member = F.normalize(centre + 0.2 * torch.randn(30, DIM, generator=generator, dtype=torch.float64))
    member[7] = -centre
    share = diffusion_shares(member, 0.9, 0.05)
    assert float(share.sum()) == pytest.approx(1.0, abs=1e-12)
    assert 0.1 / 30 <= float(share[7]) < 0.15 / 30  # little more than where the walk starts anew
    for block in (1, 7, 30):
        torch.testing.assert_close(iterated_shares(member, 0.9, 0.05, block), share, rtol=0, atol=1e-10)


def test_frozen_rows_are_classified_as_they_were_when_the_head_moved_its_rows_before_backward():
    head, world = head_of(World()), World()
    raw, _, labels, _ = batch_rows()
    weights = torch.full((ROWS,), 1.0 / ROWS)
    grads = []
    for moved in (False, True):
        unit = F.normalize(raw).requires_grad_()
        loss = softmax_over_frozen(unit, labels, weights, head.rows, CosFace(MARGIN), head, world)
        if moved:
            head.rows.tensors()["weight"].mul_(-1.0)
        loss.backward()
        grads.append(unit.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize(
    ("config", "twin"),
    [
        ({"loss": "adaface", "margin_rad": 0.4}, CosFace(0.4)),
        ({"loss": "curricularface", "margin_rad": 0.4}, ArcFace(0.4)),
        (
            {
                "loss": "magface",
                "margin_rad": 0.3,
                "margin_rad_upper": 0.6,
                "norm_lower": 1.0,
                "norm_upper": 4.0,
                "norm_weight": 2.0,
            },
            ArcFace(0.3),
        ),
        ({"loss": "arcface", "margin_rad": 0.5, "straight_through": True}, ArcFace(0.5, straight_through=True)),
    ],
)
def test_margins_with_statistics_act_by_their_constant_part_on_frozen_rows(config, twin):
    found = steady_margin(HeadConfig.model_validate(config))
    cos = torch.linspace(-1.0, 1.0, 21, dtype=torch.float64)
    for part in ("value_O", "slope_O"):
        assert torch.equal(getattr(found.target(cos, None), part), getattr(twin.target(cos, None), part))


# --- MixBCT ---


def splitmix(word: int) -> int:
    """The finalizer of splitmix64 in Python's integers."""
    mask = 2**64 - 1
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & mask
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & mask
    return word ^ (word >> 31)


def twin_distrusted(trust: float) -> set[int]:
    vectors, labels, ids = data()
    centres = twin_centres()
    bad: set[int] = set()
    for c in range(CLASSES):
        own = [i for i in range(len(labels)) if labels[i] == c]
        own.sort(key=lambda i: float((vectors[i].double() - centres[c]).norm()))
        bad |= {int(ids[i]) for i in own[math.ceil(trust * len(own)) :]}
    return bad


def mixed_on_rank(world: World, splits: tuple[int, ...], steps: int) -> dict[str, torch.Tensor]:
    method = method_of("mixbct", inputs_of(world, method_weight=0.5))
    raw, old, _, ids = batch_rows()
    first = sum(splits[: world.rank])
    own = slice(first, first + splits[world.rank])
    seen = [method.head_input(F.normalize(raw)[own], old[own], ids[own], step) for step in range(steps)]
    return {"seen": torch.stack(seen, 1)}


@pytest.mark.parametrize("trust", [0.9, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_distrusted_images_are_those_farthest_from_their_centre(run_distributed, size, trust):
    bad = twin_distrusted(trust)
    assert (len(bad) > 0) == (trust < 1.0)
    for ids, trusted in run_distributed(distrusted_on_rank, size, trust):
        assert ids.tolist() == sorted(bad)
        assert trusted == pytest.approx(1.0 - len(bad) / len(data()[1]))


def distrusted_on_rank(world: World, trust: float) -> tuple[torch.Tensor, float]:
    inputs = inputs_of(world)
    assert inputs.old_vectors is not None
    return find_distrusted(inputs.old_vectors, inputs.space, trust, world)


def test_rows_are_replaced_by_seed_step_and_id_alone_on_any_number_of_ranks(run_distributed):
    steps, bad = 40, twin_distrusted(0.9)
    raw, old, _, ids = batch_rows()
    rate = 0.5 / (1.0 - len(bad) / len(data()[1]))
    unit, truth = F.normalize(raw), torch.zeros(ROWS, steps, DIM)
    replaced = 0
    for step in range(steps):
        key = splitmix((splitmix((SEED ^ (0x6D6978 << 32)) & (2**64 - 1)) + step) & (2**64 - 1))
        for i, number in enumerate(ids.tolist()):
            drawn = (splitmix((number * 0x9E3779B97F4A7C15 + key) & (2**64 - 1)) >> 11) * 2.0**-53 < rate
            truth[i, step] = old[i] if drawn and number not in bad else unit[i]
            replaced += drawn and number not in bad
    assert bad & set(ids.tolist()) and 0.3 < replaced / (ROWS * steps) < 0.7
    for splits in SPLITS:
        parts = run_distributed(mixed_on_rank, len(splits), splits, steps)
        assert torch.equal(torch.cat([part["seen"] for part in parts]), truth)


def test_the_share_of_old_rows_is_the_papers_and_they_send_no_gradient_to_the_network():
    method = MixBct(torch.arange(0, 100_000, 10), 0.9, MixBct.WEIGHT, SEED)
    ids = torch.arange(100_000)
    replaced = method.replaced(ids, 3)
    assert float(replaced.double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 1e5))
    assert not replaced[::10].any()
    again = method.replaced(ids, 4)
    both = float((replaced & again).double().mean())
    assert both == pytest.approx(0.9 * (0.3 / 0.9) ** 2, abs=0.007)  # steps are independent
    new = torch.randn(2000, DIM).requires_grad_()
    old = torch.randn(2000, DIM)
    seen = method.head_input(new, old, ids[:2000], 3)
    seen.sum().backward()
    assert torch.equal(seen.detach()[replaced[:2000]], old[replaced[:2000]])
    assert torch.equal(new.grad[:, 0] == 0.0, replaced[:2000])


def test_a_share_beyond_what_is_trusted_is_refused():
    with pytest.raises(ConfigError, match="at most the share of trusted"):
        MixBct.build(inputs_of(World(), method_weight=0.99))


# --- they make vectors comparable ---

PEOPLE, UNSEEN, PHOTOS, TRAIT = 60, 20, 6, 14


def photos(first: int, people: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + first)
    traits = torch.randn(people, TRAIT, generator=generator)
    labels = torch.arange(people).repeat_interleave(PHOTOS)
    return traits[labels] + 0.25 * torch.randn(len(labels), TRAIT, generator=generator), labels


def old_model(images: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(TRAIT, 8, generator=torch.Generator().manual_seed(8))
    return F.normalize(images @ weight)


def cross_rank_one(name: str) -> float:
    """Share of unseen people's new vectors whose nearest old vector (of another photo) is of the same person."""
    world, manner = World(), name.partition("-")[2] or "direct"
    images, labels = photos(0, PEOPLE)
    old, ids = old_model(images), torch.arange(len(labels))
    rounds = [EmbeddedRows(old, labels, ids, (len(labels),))]
    space = compute_old_space(lambda: rounds, PEOPLE, 8, world)
    head_config = HeadConfig(loss="cosface", margin_cos=0.2, scale=16.0)
    head = build_head(head_config, OptimConfig(), PEOPLE, 8, 7, world, lambda step: 0.1)
    inputs = Inputs(CompatConfig(), head_config, space, lambda: rounds, 8, 8, SEED, STEPS, world)
    makers = {"unibct": UniBct.build, "advbct": AdvBct.build, "mixbct": MixBct.build}
    torch.manual_seed(3)
    method: Method = Method()
    if name in makers:
        method = makers[name](inputs)
    elif name != "none":
        method = Rbt(manner, 1.0, nn.Linear(8, 8), space, head_config)
    net = nn.Sequential(nn.Linear(TRAIT, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.SGD([*net.parameters(), *method.parameters()], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(6)
    for step in range(500):
        rows = torch.randint(len(labels), (64,), generator=generator)
        unit = F.normalize(net(images[rows]))
        weights = torch.full((64,), 1.0 / 64)
        head.begin_step(step, labels[rows], 0.005)
        seen = method.head_input(unit, old[rows], ids[rows], step)
        loss = head(seen, labels[rows], weights).total
        own = (unit, unit, old[rows], old[rows], labels[rows], weights, slice(0, 64), (64,), ids[rows], step)
        added = method.loss(MethodBatch(*own, world, head)) if name != "none" else None
        loss = loss if added is None else loss + added
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        head.step()
    images, labels = photos(PEOPLE, UNSEEN)
    with torch.no_grad():
        query, gallery = F.normalize(net(images)), old_model(images)
        maps = method.maps()
        if "new_to_old" in maps:
            query = F.normalize(maps["new_to_old"](query))
        if "old_to_new" in maps:
            gallery = F.normalize(maps["old_to_new"](gallery))
    cos = (query @ gallery.T).fill_diagonal_(-2.0)
    return float((labels[cos.argmax(1)] == labels).double().mean())


def test_without_a_method_new_vectors_do_not_find_old_ones():
    assert cross_rank_one("none") < 0.15


@pytest.mark.parametrize("name", ["unibct", "advbct", "mixbct", "rbt-backward", "rbt-forward"])
def test_new_vectors_find_the_old_ones_of_unseen_people(name):
    assert cross_rank_one(name) > 0.6
