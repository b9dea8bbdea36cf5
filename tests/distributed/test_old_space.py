"""Old space on 1 to 4 ranks: the same bits whatever their number, after an interruption on another number of them too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lce_dist.compat.boundaries import BoundaryPolicy
from lce_dist.compat.old_space import OldSpace, Partial, compute_old_space, load_old_space, save_old_space
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import CheckpointError, RunError
from lce_dist.head.identity import identity_tensor
from lce_dist.world import World, shard_bounds

CLASSES, DIM, IMAGES, BLOCK = 9, 5, 70, 4  # on 4 ranks shards of 3, 3, 3 and no class
POLICIES = [BoundaryPolicy("max"), BoundaryPolicy("percentile", 70.0, 0.05), BoundaryPolicy("iqr")]


class StoppedError(Exception):
    pass


def rounds_of(world: World, stop_after: int | None = None):
    """Passes that end in an error when so many rounds have come, all passes together."""
    generator = torch.Generator().manual_seed(9)
    # most images in the first classes, and one at least in each
    skewed = (CLASSES * torch.rand(IMAGES - CLASSES, generator=generator) ** 2).long()
    labels = torch.cat([skewed, torch.arange(CLASSES)])[torch.randperm(IMAGES, generator=generator)]
    vectors = F.normalize(torch.randn(IMAGES, DIM, generator=generator))
    served = []

    def rounds(first_image: int = 0) -> Iterator[EmbeddedRows]:
        for first in range(first_image, IMAGES, world.size * BLOCK):
            if len(served) == stop_after:
                raise StoppedError
            served.append(first)
            edges = [min(first + rank * BLOCK, IMAGES) for rank in range(world.size + 1)]
            own = slice(edges[world.rank], edges[world.rank + 1])
            rows = tuple(edges[rank + 1] - edges[rank] for rank in range(world.size))
            yield EmbeddedRows(vectors[own], labels[own], torch.arange(own.start, own.stop), rows)

    return rounds


def flags(world: World) -> torch.Tensor:
    return (torch.arange(CLASSES) % 4 != 1)[slice(*shard_bounds(CLASSES, world.rank, world.size))]


def keys(world: World) -> torch.Tensor:
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    return identity_tensor([f"person {number}" for number in range(first, last)], first, world)


def tensors(space: OldSpace) -> dict[str, torch.Tensor]:
    assert space.align_weight_S is not None
    return {
        "centre": space.centre_SD,
        "bound": space.cos_boundary_S,
        "count": space.count_S,
        "align": space.align_weight_S,
    }


def computed(
    world: World, policy: BoundaryPolicy, folder: str | None, stop_after: int | None
) -> dict[str, torch.Tensor] | None:
    partial = None if folder is None else Partial(Path(folder) / "space", 2, {"data": "d"})
    rounds = rounds_of(world, stop_after)
    try:
        return tensors(compute_old_space(rounds, CLASSES, DIM, world, policy, flags(world), partial))
    except StoppedError:
        return None


def whole(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_same_bits(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    for name in truth:
        assert torch.equal(found[name], truth[name]), name


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_any_number_of_ranks_gives_the_same_bits(run_distributed, policy):
    truth = whole(run_distributed(computed, 1, policy, None, None))
    assert (truth["bound"] > -1.0).sum() >= 3 and (truth["align"] == 0.0).any()
    for size in (2, 3, 4):
        assert_same_bits(whole(run_distributed(computed, size, policy, None, None)), truth)
    other = POLICIES[(POLICIES.index(policy) + 1) % len(POLICIES)]
    assert not torch.equal(whole(run_distributed(computed, 2, other, None, None))["bound"], truth["bound"])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("sizes", [(3, 2, 4, 1), (1, 4, 2, 3)], ids=str)
def test_interrupted_on_some_ranks_it_goes_on_on_others_with_the_same_bits(run_distributed, tmp_path, policy, sizes):
    truth = whole(run_distributed(computed, 1, policy, None, None))
    folder = str(tmp_path)
    first, second, third, last = sizes
    assert run_distributed(computed, first, policy, folder, 3) == [None] * first  # in the first pass
    assert (tmp_path / "space" / "sums").exists()
    blocks = -(-IMAGES // BLOCK)
    left_of_first_pass = -(-(blocks - 2 * first) // second)
    assert run_distributed(computed, second, policy, folder, left_of_first_pass + 3) == [None] * second
    assert (tmp_path / "space" / "centres").exists() and not (tmp_path / "space" / "sums").exists()
    assert (tmp_path / "space" / "cosines").exists()
    assert run_distributed(computed, third, policy, folder, 2) == [None] * third  # again
    assert_same_bits(whole(run_distributed(computed, last, policy, folder, None)), truth)


def stored(world: World, folder: str) -> dict[str, torch.Tensor]:
    space = compute_old_space(rounds_of(world), CLASSES, DIM, world, POLICIES[1], flags(world))
    save_old_space(space, Path(folder) / "space", {"policy": POLICIES[1].describe()}, world, keys(world))
    return tensors(space)


def loaded(world: World, folder: str, last_key: str, kind: str) -> dict[str, torch.Tensor] | str:
    first, last = shard_bounds(CLASSES, world.rank, world.size)
    names = [f"person {number}" for number in range(CLASSES - 1)] + [last_key]
    own = identity_tensor(names[first:last], first, world)
    state = {"policy": BoundaryPolicy(kind, 70.0, 0.05).describe()}  # type: ignore[arg-type]
    try:
        space = load_old_space(Path(folder) / "space", CLASSES, DIM, world, own, state)
    except CheckpointError as error:
        return str(error)
    assert space is not None
    return tensors(space)


def test_an_artefact_of_three_ranks_serves_any_number_and_refuses_other_identities_on_every_rank(
    run_distributed, tmp_path
):
    truth = whole(run_distributed(stored, 3, str(tmp_path)))
    for size in (1, 2, 4):
        parts = run_distributed(loaded, size, str(tmp_path), f"person {CLASSES - 1}", "percentile")
        assert_same_bits(whole(parts), truth)
    for message in run_distributed(loaded, 4, str(tmp_path), "another", "percentile"):
        assert "the first that differs is class 8 of 9" in message
    for message in run_distributed(loaded, 2, str(tmp_path), f"person {CLASSES - 1}", "iqr"):
        assert "was computed with policy" in message


def broken(world: World, what: str) -> str:
    rounds = rounds_of(world)
    passes = []

    def forgetful() -> Iterator[EmbeddedRows]:
        passes.append(1)
        found = list(rounds())
        yield from found if len(passes) == 1 else found[1:]

    classes = CLASSES + 1 if what == "empty" else CLASSES
    first, last = shard_bounds(classes, world.rank, world.size)
    seen = torch.zeros(last - first, dtype=torch.bool) if what == "unseen" else None
    try:
        compute_old_space(forgetful if what == "passes" else rounds, classes, DIM, world, seen_S=seen)
    except RunError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("empty", "class 9 has no image"),
        ("passes", "the second pass over the images saw"),
        ("unseen", "none of the 9 classes"),
    ],
)
def test_an_error_of_one_shard_is_the_error_of_every_rank(run_distributed, what, says):
    messages = run_distributed(broken, 3, what)
    assert len(set(messages)) == 1 and says in messages[0]
