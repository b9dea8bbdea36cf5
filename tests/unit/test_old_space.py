"""Old space on one rank: boundaries against numpy class by class and by hand; interruptions; what an artefact refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_dist.compat import boundaries
from lce_dist.compat.boundaries import BoundaryPolicy, boundary_angles, boundary_cosines
from lce_dist.compat.old_space import OldSpace, Partial, compute_old_space, load_old_space, save_old_space
from lce_dist.embedding import EmbeddedRows
from lce_dist.errors import CheckpointError, RunError
from lce_dist.head.identity import identity_tensor
from lce_dist.world import World

ALONE = World()
CLASSES, DIM, BLOCK = 9, 6, 4


def angle_in_words(angles: npt.NDArray[np.float64], policy: BoundaryPolicy) -> float:
    if policy.kind == "percentile":
        return float(np.percentile(angles, policy.percentile))
    if policy.kind == "iqr":
        lower, upper = np.percentile(angles, [25, 75])
        kept = [angle for angle in angles if lower - 1.5 * (upper - lower) <= angle <= upper + 1.5 * (upper - lower)]
        return max(kept, default=float(angles.min()))
    return float(angles.max())


groups = st.lists(
    st.lists(st.one_of(st.floats(-1.0, 1.0), st.sampled_from([0.5, 0.9])), min_size=1, max_size=12),
    min_size=1,
    max_size=8,
)
policies = st.one_of(
    st.builds(BoundaryPolicy, st.just("percentile"), st.floats(0.01, 100.0)),
    st.builds(BoundaryPolicy, st.sampled_from(["max", "iqr"])),
)


@settings(max_examples=150, deadline=None)
@given(groups, policies, st.sampled_from([1, 5, 1 << 20]))
def test_boundaries_are_numpys_to_the_last_bit(cosines: list[list[float]], policy: BoundaryPolicy, block: int) -> None:
    kept, boundaries._BLOCK_IMAGES = boundaries._BLOCK_IMAGES, block
    try:
        counts = np.array([len(group) for group in cosines])
        found = boundary_angles(np.concatenate(cosines), counts, policy)
    finally:
        boundaries._BLOCK_IMAGES = kept
    assert found.tolist() == [angle_in_words(np.arccos(np.array(group)), policy) for group in cosines]


def test_an_outlier_is_left_out_by_iqr_and_cut_by_a_percentile() -> None:
    degrees = np.array([10.0, 12.0, 14.0, 16.0, 80.0])  # quartiles 12 and 16; the fence is at 16 + 1.5 * 4 = 22
    cos, count = np.cos(np.radians(degrees)), np.array([5])
    for policy, expected in (
        (BoundaryPolicy("max"), 80.0),
        (BoundaryPolicy("iqr"), 16.0),
        (BoundaryPolicy("percentile", 75.0), 16.0),
        (BoundaryPolicy("percentile", 90.0), 54.4),  # at place 3.6 of 0 ... 4
    ):
        assert np.degrees(boundary_angles(cos, count, policy))[0] == pytest.approx(expected)


def test_slack_widens_every_boundary_up_to_never_crossed_and_single_images_have_one_when_asked() -> None:
    angles, counts = np.radians([20.0, 170.0, 3e-6]), np.array([4, 2, 1])
    slack = BoundaryPolicy(slack_rad=float(np.radians(15.0)))
    found = boundary_cosines(angles, counts, slack)
    assert found[0] == pytest.approx(np.cos(np.radians(35.0)))
    assert found[1:].tolist() == [-1.0, -1.0]
    wide = BoundaryPolicy(slack_rad=float(np.radians(15.0)), single_image="slack")
    assert boundary_cosines(angles, counts, wide)[2] == pytest.approx(np.cos(np.radians(15.0)))
    unseen = boundary_cosines(angles, counts, wide, np.array([False, True, True]))
    assert unseen[0] == -1.0 and unseen[2] == boundary_cosines(angles, counts, wide)[2]


def test_a_policy_describes_what_has_an_effect() -> None:
    assert BoundaryPolicy("iqr", 90.0).describe() == BoundaryPolicy("iqr", 95.0).describe()
    assert BoundaryPolicy("percentile", 90.0).describe() != BoundaryPolicy("percentile", 95.0).describe()


def images(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(CLASSES), torch.randint(CLASSES - 1, (60,), generator=generator)])  # the last: one
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(CLASSES, DIM, generator=generator)
    return F.normalize(centres[labels] + 0.6 * torch.randn(len(labels), DIM, generator=generator)), labels


def rounds(first_image: int = 0) -> Iterator[EmbeddedRows]:
    vectors, labels = images()
    for low in range(first_image, len(labels), BLOCK):
        part = slice(low, min(low + BLOCK, len(labels)))
        yield EmbeddedRows(vectors[part], labels[part], torch.arange(part.start, part.stop), (part.stop - part.start,))


def same(left: OldSpace, right: OldSpace) -> bool:
    pairs = zip(
        (left.centre_SD, left.cos_boundary_S, left.count_S),
        (right.centre_SD, right.cos_boundary_S, right.count_S),
        strict=True,
    )
    weights = [space.align_weight_S for space in (left, right)]
    equal = weights[0] is weights[1] if None in weights else torch.equal(*weights)  # type: ignore[arg-type]
    return equal and all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("kind", ["max", "percentile", "iqr"])
def test_the_space_is_the_definition(kind: str) -> None:
    policy = BoundaryPolicy(kind, 80.0, slack_rad=0.1)  # type: ignore[arg-type]
    space = compute_old_space(rounds, CLASSES, DIM, ALONE, policy)
    vectors, labels = images()
    for number in range(CLASSES):
        members = vectors[labels == number].double()
        centre = F.normalize(members.mean(0), dim=0)
        torch.testing.assert_close(space.centre_SD[number].double(), centre, rtol=0, atol=1e-7)
        angles = np.arccos((members @ centre).numpy().clip(-1.0, 1.0))
        expected = np.cos(angle_in_words(angles, policy) + 0.1) if len(members) > 1 else -1.0
        assert space.cos_boundary_S[number].item() == pytest.approx(expected, abs=1e-6)
        assert space.count_S[number] == len(members)


def test_centres_do_not_depend_on_the_order_of_images() -> None:
    vectors, labels = images()

    def shuffled() -> Iterator[EmbeddedRows]:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
        for part in order.split(7):
            yield EmbeddedRows(vectors[part], labels[part], part, (len(part),))

    for policy in (BoundaryPolicy(), BoundaryPolicy("iqr")):
        assert same(
            compute_old_space(shuffled, CLASSES, DIM, ALONE, policy),
            compute_old_space(rounds, CLASSES, DIM, ALONE, policy),
        )


class StoppedError(Exception):
    pass


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(["max", "percentile", "iqr"]),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 5),
)
def test_an_interrupted_computation_goes_on_and_ends_with_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, kind: str, lives: list[int], every: int
) -> None:
    policy = BoundaryPolicy(kind, 70.0)  # type: ignore[arg-type]
    directory = tmp_path_factory.mktemp("space") / "old-space"
    partial = Partial(directory, every, {"old_model": "a"})
    read = []

    def until(rounds_to_live: int | None):
        def interrupted(first_image: int = 0) -> Iterator[EmbeddedRows]:
            for rows in rounds(first_image):
                if rounds_to_live is not None and len(read) - begun >= rounds_to_live:
                    raise StoppedError
                read.append(int(rows.sample_ids_b[0]))
                yield rows

        begun = len(read)
        return interrupted

    for life in lives:
        with pytest.raises(StoppedError):
            compute_old_space(until(life), CLASSES, DIM, ALONE, policy, partial=partial)
        if (directory / "centres").exists() and (directory / "cosines").exists():
            break  # near the end; the next life could be its last
    before = len(read)
    found = compute_old_space(until(None), CLASSES, DIM, ALONE, policy, partial=partial)
    assert same(found, compute_old_space(rounds, CLASSES, DIM, ALONE, policy))
    whole = 2 * -(-len(images()[1]) // BLOCK)
    assert len(read) - before <= whole - max(life // every * every for life in lives)
    assert load_old_space(directory, CLASSES, DIM, ALONE) is None  # unfinished is not finished
    save_old_space(found, directory, {}, ALONE)
    assert not (directory / "cosines").exists()
    loaded = load_old_space(directory, CLASSES, DIM, ALONE)
    assert loaded is not None and same(loaded, found)


def test_what_was_kept_for_another_old_model_or_is_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    def stops(first_image: int = 0) -> Iterator[EmbeddedRows]:
        for number, rows in enumerate(rounds(first_image)):
            if number == 9:
                raise StoppedError
            yield rows

    seen: list[int] = []

    def watched(first_image: int = 0) -> Iterator[EmbeddedRows]:
        seen.append(first_image)
        yield from rounds(first_image)

    def first_images(old_model: str) -> list[int]:
        with pytest.raises(StoppedError):
            compute_old_space(stops, CLASSES, DIM, ALONE, partial=Partial(tmp_path, 4, {"old_model": "a"}))
        if old_model == "damaged":
            file = next((tmp_path / "sums").glob("*.safetensors"))
            file.write_bytes(file.read_bytes()[:-1] + b"?")
            old_model = "a"
        seen.clear()
        found = compute_old_space(watched, CLASSES, DIM, ALONE, partial=Partial(tmp_path, 4, {"old_model": old_model}))
        assert same(found, compute_old_space(rounds, CLASSES, DIM, ALONE))
        for kept in ("centres", "cosines"):
            (tmp_path / kept).rename(tmp_path / f"{kept}-{old_model}-{len(list(tmp_path.iterdir()))}")
        return list(seen)

    assert first_images("a") == [8 * BLOCK, 0]
    assert first_images("b") == [0, 0]
    assert first_images("damaged") == [0, 0]


def test_seen_classes_alone_take_part_and_count_for_all() -> None:
    seen = torch.arange(CLASSES) % 3 == 0
    everybody = compute_old_space(rounds, CLASSES, DIM, ALONE, BoundaryPolicy("iqr"))
    space = compute_old_space(rounds, CLASSES, DIM, ALONE, BoundaryPolicy("iqr"), seen)
    assert torch.equal(space.centre_SD, everybody.centre_SD)
    assert torch.equal(space.cos_boundary_S[seen], everybody.cos_boundary_S[seen])
    assert (space.cos_boundary_S[~seen] == -1.0).all()
    assert space.align_weight_S is not None
    assert space.align_weight_S.tolist() == [3.0, 0.0, 0.0] * 3
    assert space.to(torch.device("cpu"), torch.float16).align_weight_S is not None
    with pytest.raises(RunError, match="none of the 9 classes"):
        compute_old_space(rounds, CLASSES, DIM, ALONE, seen_S=torch.zeros(CLASSES, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["max", "iqr"])
@pytest.mark.parametrize("change", ["more", "fewer"])
def test_passes_that_differ_are_refused(kind: str, change: str) -> None:
    passes = []

    def changing() -> Iterator[EmbeddedRows]:
        passes.append(1)
        found = list(rounds())
        yield from found
        if (change == "more") == (len(passes) == 2):
            yield found[0]

    with pytest.raises(RunError, match="the second pass over the images saw"):
        compute_old_space(changing, CLASSES, DIM, ALONE, BoundaryPolicy(kind))  # type: ignore[arg-type]


def test_an_artefact_of_other_identities_or_of_another_policy_is_one_error(tmp_path: Path) -> None:
    names = [f"person {number}" for number in range(CLASSES)]
    keys = identity_tensor(names, 0, ALONE)
    policy = BoundaryPolicy("percentile", 90.0)
    space = compute_old_space(rounds, CLASSES, DIM, ALONE, policy, torch.arange(CLASSES) < 4)
    state = {"old_model": "a", "data": "b", "policy": policy.describe()}
    directory = tmp_path / "space"
    save_old_space(space, directory, state, ALONE, keys)
    loaded = load_old_space(directory, CLASSES, DIM, ALONE, keys, state)
    assert loaded is not None and same(loaded, space)
    others = identity_tensor([*names[:6], "somebody else", *names[7:]], 0, ALONE)
    with pytest.raises(CheckpointError, match="class 6 of 9") as raised:
        load_old_space(directory, CLASSES, DIM, ALONE, others, state)
    assert "somebody" not in str(raised.value)
    with pytest.raises(CheckpointError, match="holds 9 classes; this run has 8"):
        load_old_space(directory, CLASSES - 1, DIM, ALONE, keys[:-1], state)
    for key, value in (("policy", BoundaryPolicy().describe()), ("old_model", "another")):
        with pytest.raises(CheckpointError, match=f"was computed with {key}"):
            load_old_space(directory, CLASSES, DIM, ALONE, keys, state | {key: value})
    save_old_space(space, directory, state, ALONE)
    with pytest.raises(CheckpointError, match="holds no identity keys"):
        load_old_space(directory, CLASSES, DIM, ALONE, keys, state)
