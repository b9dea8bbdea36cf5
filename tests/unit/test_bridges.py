"""Maps between spaces: closed forms against planted and library answers, exact starts, and the choice between them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch.bridge import read_bridge, read_card
from lce_dist.compat.bridges import build_bridge
from lce_dist.compat.closed_form import PairSums, least_squares, procrustes
from lce_dist.compat.fit import Pairs, fit_bridge, train_bridge
from lce_dist.errors import CheckpointError, RunError
from lce_dist.evaluation.by_identity import tar_by_identity
from lce_dist.evaluation.metrics import EmbeddingSet, compare
from lce_dist.models.weights import save_weights

KINDS = ("stacked", "linear", "mlp", "orthogonal")


def rotation(dim: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64)).Q


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)))


def score(mapped: torch.Tensor, other: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return tar_by_identity(mapped, other, label, 1e-2)


@pytest.mark.parametrize(("dim_in", "dim_out"), [(6, 6), (8, 5), (5, 8)])
def test_procrustes_finds_a_planted_rotation(dim_in, dim_out):
    wide = max(dim_in, dim_out)
    planted = rotation(wide, 1)[:dim_out, :dim_in]
    x = unit(400, dim_in, 2).double()
    found = procrustes(PairSums.of(x[:150], x[:150] @ planted.T) + PairSums.of(x[150:], x[150:] @ planted.T))
    narrow = found @ found.T if dim_out <= dim_in else found.T @ found
    torch.testing.assert_close(narrow, torch.eye(min(dim_in, dim_out), dtype=torch.float64))
    if dim_in <= dim_out == wide and dim_in == dim_out:
        torch.testing.assert_close(found, planted)
    # no other matrix of its kind brings x closer to y
    target = x @ planted.T
    for seed in range(20):
        other = rotation(wide, 100 + seed)[:dim_out, :dim_in]
        left, _, right = torch.linalg.svd(other, full_matrices=False)
        assert ((x @ found.T) * target).sum() >= ((x @ (left @ right).T) * target).sum()


def test_least_squares_equals_numpy():
    x, y = unit(300, 7, 1), unit(300, 4, 2)
    found = least_squares(PairSums.of(x, y), 0.0)
    truth, *_ = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)
    np.testing.assert_allclose(found.numpy(), truth.T, atol=1e-10)
    ridge = 0.3 * float((x.double() ** 2).sum(0).mean())
    more = np.vstack([x.double().numpy(), np.sqrt(ridge) * np.eye(7)])
    truth, *_ = np.linalg.lstsq(more, np.vstack([y.double().numpy(), np.zeros((7, 4))]), rcond=None)
    np.testing.assert_allclose(least_squares(PairSums.of(x, y), 0.3).numpy(), truth.T, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim_in", "dim_out"), [(6, 6), (6, 4), (4, 6)])
def test_a_bridge_starts_exactly_as_its_matrix_and_learns(kind, dim_in, dim_out):
    bridge = build_bridge(kind, dim_in, dim_out, seed=3)
    twin = build_bridge(kind, dim_in, dim_out, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(bridge.parameters(), twin.parameters(), strict=True))
    matrix = torch.randn(dim_out, dim_in, generator=torch.Generator().manual_seed(1))
    if kind == "orthogonal":
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left @ right
    bridge.start_from(matrix)
    x = unit(32, dim_in, 4)
    for training in (True, False):
        torch.testing.assert_close(bridge.train(training)(x), x @ matrix.T, atol=1e-6, rtol=1e-5)
    target = unit(32, dim_out, 5)
    optimizer = torch.optim.AdamW(bridge.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (1.0 - (F.normalize(bridge(x)) * target).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.01
    if kind == "orthogonal":
        weight = bridge.matrix.weight
        gram = weight @ weight.T if dim_out <= dim_in else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(min(dim_in, dim_out)), atol=1e-5, rtol=0)


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"must be \(4, 6\)"):
        build_bridge("linear", 6, 4, 0).start_from(torch.zeros(6, 4))


def curved_pairs(identities: int, images: int, dim: int, bend: float) -> Pairs:
    """Two views of identities: the second is a rotation of the first, bent by ``bend``, both with noise."""
    draw = torch.Generator().manual_seed(9)
    centre = torch.randn(identities, dim, generator=draw)
    label = torch.arange(identities).repeat_interleave(images)
    latent = centre[label] + 0.5 * torch.randn(len(label), dim, generator=draw)
    turned = latent @ rotation(dim, 5).float()
    turned = turned + bend * (turned @ rotation(dim, 6).float()).abs()
    noise = 0.2 * torch.randn(len(label), dim, generator=draw)
    return Pairs(F.normalize(latent), F.normalize(turned + noise), label)


def test_the_choice_prefers_the_closed_form_unless_a_trained_map_is_really_better():
    straight = fit_bridge(curved_pairs(120, 6, 12, 0.0), score, "auto", 0.25, seed=1)
    best_closed = max(c.score for c in straight.candidates if not c.name.startswith("trained"))
    assert straight.chosen.score >= best_closed - 1e-9
    names = [candidate.name for candidate in straight.candidates]
    assert names[0] == "procrustes" and "trained stacked" in names and straight.num_heldout_identities == 30
    bent = fit_bridge(curved_pairs(300, 8, 12, 1.5), score, "auto", 0.25, seed=1)
    closed = max(c.score for c in bent.candidates if not c.name.startswith("trained"))
    assert bent.chosen.name.startswith("trained") and bent.chosen.score > closed


def test_a_given_map_wins_when_it_is_better_and_a_named_kind_is_taken():
    pairs = curved_pairs(100, 6, 12, 1.5)
    cheat = build_bridge("linear", 12, 12, 0)
    cheat.start_from(least_squares(PairSums.of(pairs.source_ND, pairs.target_NE), 1e-3).float())
    assert fit_bridge(pairs, score, "procrustes", 0.25, 1, {"mine": cheat}).chosen.name in ("given mine", "procrustes")
    chosen = fit_bridge(pairs, score, "least_squares", 0.25, 1).chosen
    assert chosen.name.startswith("least_squares") and chosen.bridge.kind == "linear"
    for kind in ("mlp", "orthogonal"):
        assert fit_bridge(pairs, score, kind, 0.25, 1).chosen.bridge.kind == kind


def test_fitting_repeats_bit_for_bit_and_needs_identities():
    pairs = curved_pairs(40, 4, 8, 0.5)
    start = build_bridge("linear", 8, 8, 0)
    first, second = (train_bridge("stacked", start, pairs, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    few = pairs.of(pairs.label_N < 15)
    with pytest.raises(RunError, match="15 identities have pairs"):
        fit_bridge(few, score, "auto", 0.2, 1)


def test_tar_by_identity_is_the_matrix_tar_when_identities_have_equal_pairs():
    pairs = curved_pairs(30, 5, 12, 0.5)
    tar_I = tar_by_identity(pairs.source_ND, pairs.target_NE, pairs.label_N, 1e-2)
    sets = [EmbeddingSet(name, rows.numpy(), pairs.label_N.numpy(), np.arange(150)) for name, rows in
            (("a", pairs.source_ND), ("b", pairs.target_NE))]  # fmt: skip
    truth = compare(sets[0], sets[1], [1e-2]).tar_at_far["0.01"]
    assert float(tar_I.mean()) == pytest.approx(truth, abs=2e-3) and tar_I.shape == (30,)


def test_a_stored_bridge_comes_back_and_a_damaged_one_is_refused(tmp_path: Path):
    bridge = build_bridge("stacked", 6, 4, 1).eval()
    save_weights(bridge, tmp_path / "bridge.safetensors", {})
    card = {"kind": "stacked", "dim_in": 6, "dim_out": 4, "direction": "new_to_old"}
    (tmp_path / "bridge.json").write_text(json.dumps(card))
    x = unit(9, 6, 1)
    assert torch.equal(read_bridge(tmp_path)(x), bridge(x)) and read_card(tmp_path)["direction"] == "new_to_old"
    for text, words in (("{", "is damaged"), ("{}", "no bridge's card")):
        (tmp_path / "bridge.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_bridge(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_card(tmp_path / "elsewhere")
