"""LCE terms and the old space: against loops in float64, and the same on every number of ranks."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lce_dist.collectives import gather_rows
from lce_dist.compat.lce import OldAnchor, alignment_loss, boundary_loss
from lce_dist.compat.old_space import compute_old_space, load_old_space, save_old_space
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import RunError
from lce_dist.world import World, shard_bounds

CLASSES, DIM, ROWS = 7, 5, 23


def values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64),
        "centre": F.normalize(torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)),
        "bound": torch.tensor([0.9, 0.5, -1.0, 0.2, 0.99, -0.3, 0.7], dtype=torch.float64),
        "emb": torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64),
        "labels": torch.randint(CLASSES, (ROWS,), generator=generator),
    }


def sharded_terms(world: World, kind: str) -> dict[str, torch.Tensor]:
    v = values()
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    rows = tuple((r + 1) * ROWS // world.size - r * ROWS // world.size for r in range(world.size))
    low = sum(rows[: world.rank])
    local = v["emb"][low : low + rows[world.rank]].clone().requires_grad_()
    weight = v["weight"][first:last].clone().requires_grad_()
    emb_GD = gather_rows(F.normalize(local), rows, world)
    centre, bound = v["centre"][first:last], v["bound"][first:last]
    row_weight = torch.full((ROWS,), 1.0 / ROWS, dtype=torch.float64)
    align = alignment_loss(weight, centre, CLASSES, world)
    boundary = boundary_loss(emb_GD, v["labels"], row_weight, centre, bound, first, kind, world)
    (align + boundary).backward()
    return {"align": align.detach(), "boundary": boundary.detach(), "weight": weight.grad, "emb": local.grad}


def loop_terms(kind: str) -> dict[str, torch.Tensor]:
    v = values()
    emb, weight = v["emb"].clone().requires_grad_(), v["weight"].clone().requires_grad_()
    align = sum(1 - weight[c] @ v["centre"][c] / weight[c].norm() for c in range(CLASSES)) / CLASSES
    boundary = torch.zeros((), dtype=torch.float64)
    for i in range(ROWS):
        y = int(v["labels"][i])
        cos = emb[i] @ v["centre"][y] / emb[i].norm()
        outside = v["bound"][y] - cos if kind == "cos" else torch.acos(cos) - math.acos(v["bound"][y])
        if outside > 0:
            boundary = boundary + outside / ROWS
    (align + boundary).backward()
    return {"align": align.detach(), "boundary": boundary.detach(), "weight": weight.grad, "emb": emb.grad}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["cos", "angle"])
def test_terms_and_gradients_equal_the_loop(run_distributed, size, kind):
    parts, truth = run_distributed(sharded_terms, size, kind), loop_terms(kind)
    assert truth["boundary"] > 0
    for part in parts:
        for key in ("align", "boundary"):
            torch.testing.assert_close(part[key], truth[key], rtol=1e-10, atol=1e-12)
    for key in ("weight", "emb"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), truth[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["cos", "angle"])
def test_what_the_head_uses_of_the_boundary_has_the_twins_value_and_gradient(kind):
    v = values()
    unit = F.normalize(v["emb"]).requires_grad_()
    weights = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    boundary_loss(unit, v["labels"], weights, v["centre"], v["bound"], 0, kind, World()).backward()
    anchor = OldAnchor(v["centre"], v["bound"], 1.0, 1.0, kind)
    value, grad = anchor.outside(unit.detach(), v["labels"])
    twin = boundary_loss(unit, v["labels"], weights, v["centre"], v["bound"], 0, kind, World())
    torch.testing.assert_close((value * weights).sum(), twin.detach())
    torch.testing.assert_close(weights[:, None] * grad, unit.grad)
    poles = OldAnchor(v["centre"], torch.full((CLASSES,), 0.9, dtype=torch.float64), 1.0, 1.0, kind)
    value, grad = poles.outside(torch.cat([v["centre"], -v["centre"]]), torch.arange(CLASSES).repeat(2))
    assert torch.isfinite(value).all() and torch.isfinite(grad).all() and (value[:CLASSES] == 0).all()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    labels = torch.cat(
        [torch.arange(CLASSES - 1).repeat(3), torch.tensor([CLASSES - 1])]
    )  # the last class has one image
    return F.normalize(torch.randn(len(labels), DIM, generator=generator)), labels


def rounds_of(world: World, block: int) -> list[EmbeddedRows]:
    vectors, labels = images()
    blocks = [slice(low, min(low + block, len(labels))) for low in range(0, len(labels), block)]
    rounds = []
    for first in range(0, len(blocks), world.size):
        taken = blocks[first : first + world.size]
        taken += [slice(0, 0)] * (world.size - len(taken))
        mine = taken[world.rank]
        rows = tuple(part.stop - part.start for part in taken)
        rounds.append(EmbeddedRows(vectors[mine], labels[mine], torch.arange(mine.start, mine.stop), rows))
    return rounds


def old_space(world: World, folder: str | None = None) -> dict[str, torch.Tensor]:
    space = compute_old_space(lambda: rounds_of(world, 4), CLASSES, DIM, world)
    if folder is not None:
        save_old_space(space, Path(folder) / "space", {"why": "test"}, world)
    return {"centre": space.centre_SD, "bound": space.cos_boundary_S, "count": space.count_S}


def test_old_space_equals_the_definition_and_is_bitwise_the_same_on_all_world_sizes(run_distributed):
    vectors, labels = images()
    wholes = []
    for size in (1, 2, 3, 4):
        parts = run_distributed(old_space, size)
        wholes.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    for whole in wholes[1:]:
        assert all(torch.equal(whole[key], wholes[0][key]) for key in whole)
    for c in range(CLASSES):
        members = vectors[labels == c].double()
        centre = F.normalize(members.mean(0), dim=0)
        torch.testing.assert_close(wholes[0]["centre"][c].double(), centre, rtol=0, atol=1e-7)
        expected = min(float(m @ centre) for m in members) if len(members) > 1 else -1.0
        assert wholes[0]["bound"][c].item() == pytest.approx(expected, abs=1e-6)
        assert wholes[0]["count"][c] == len(members)


def loaded(world: World, folder: str) -> dict[str, torch.Tensor] | None:
    space = load_old_space(Path(folder) / "space", CLASSES, DIM, world)
    return None if space is None else {"centre": space.centre_SD, "bound": space.cos_boundary_S, "count": space.count_S}


def test_old_space_saved_on_two_ranks_loads_on_three_and_one_and_not_when_damaged(run_distributed, tmp_path):
    saved = run_distributed(old_space, 2, str(tmp_path))
    for size in (3, 1):
        parts = run_distributed(loaded, size, str(tmp_path))
        for key in ("centre", "bound", "count"):
            assert torch.equal(torch.cat([p[key] for p in parts]), torch.cat([p[key] for p in saved]))
    file = next((tmp_path / "space").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run_distributed(loaded, 2, str(tmp_path)) == [None, None]


def empty_class(world: World) -> str:
    try:
        compute_old_space(lambda: rounds_of(world, 4), CLASSES + 1, DIM, world)
    except RunError as error:
        return str(error)
    return "no error"


def test_a_class_without_images_is_named(run_distributed):
    assert "class 7 has no image" in run_distributed(empty_class, 1)[0]
