"""Maps between spaces: closed forms against planted and library answers, exact starts, and the choice between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lce_dist.compat.artefact import card_of, map_rows, read_bridge, read_card, save_bridge
from lce_dist.compat.bridges import build_bridge
from lce_dist.compat.closed_form import PairSums, class_centres, least_squares, procrustes
from lce_dist.compat.fit import RECIPES, RIDGES, ClassTable, Pairs, Terms, fit_bridge, map_loss, train_bridge
from lce_dist.compat.rotation import fold_rotation
from lce_dist.errors import CheckpointError, ConfigError, DataError, RunError
from lce_dist.evaluation.by_identity import tar_by_identity
from lce_dist.evaluation.metrics import EmbeddingSet, compare
from lce_dist.models.catalog import build_net
from lce_dist.models.weights import load_weights, save_weights

KINDS = ("stacked", "linear", "mlp", "orthogonal")  # that begin as any matrix


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
        losses.append(loss.item())
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
    straight = fit_bridge(curved_pairs(64, 5, 12, 0.0), score, "auto", 0.25, seed=1)
    names = [candidate.name for candidate in straight.candidates]
    assert names[0] == "procrustes" and "least_squares 0.01 to centres" in names and names[-1] == "trained mlp"
    # four folds of 16 identities: all are judged once
    assert straight.num_heldout_identities == 64
    best_closed = max(c.score for c in straight.candidates if not c.name.startswith("trained"))
    if straight.chosen.name.startswith("trained"):
        assert straight.chosen.score > best_closed
    else:
        assert straight.chosen.score == best_closed
    for candidate in straight.candidates:
        assert candidate.low <= candidate.score <= candidate.high
        # the bootstrap of a mean is, nearly, its normal interval
        assert candidate.high - candidate.low == pytest.approx(2 * 1.96 * candidate.score_error, rel=0.2)
    bent = fit_bridge(curved_pairs(200, 8, 12, 1.5), score, "auto", 0.25, seed=1)
    closed = max(c.score for c in bent.candidates if not c.name.startswith("trained"))
    assert bent.chosen.name == "trained mlp" and bent.chosen.score > closed


def test_a_trained_map_that_is_better_by_less_than_the_noise_is_not_chosen():
    """Scores of a planted table: the trained map has the better mean, by one identity of 16."""
    pairs = curved_pairs(16, 2, 6, 0.0)
    seen: list[int] = []

    def planted(mapped: torch.Tensor, other: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        seen.append(len(torch.unique(label)))
        folds = 2
        is_trained = len(seen) > (1 + 2 * len(RIDGES)) * folds  # behind the closed forms
        value_I = torch.full((seen[-1],), 0.5)
        if is_trained and len(seen) % folds == 0:
            value_I[0] = 1.0
        return value_I

    fitted = fit_bridge(pairs, planted, "auto", 0.5, seed=1)
    scores = {candidate.name: candidate.score for candidate in fitted.candidates}
    assert scores["trained linear"] > scores["procrustes"] and fitted.chosen.name == "procrustes"
    assert seen == [8] * (2 * len(fitted.candidates))


def test_a_given_map_wins_when_it_is_better_and_a_named_kind_is_taken():
    pairs = curved_pairs(100, 6, 12, 1.5)
    cheat = build_bridge("linear", 12, 12, 0)
    cheat.start_from(least_squares(PairSums.of(pairs.source_ND, pairs.target_NE), 1e-3).float())
    assert fit_bridge(pairs, score, "procrustes", 0.25, 1, {"mine": cheat}).chosen.name in ("given mine", "procrustes")
    chosen = fit_bridge(pairs, score, "least_squares", 0.25, 1).chosen
    assert chosen.name.startswith("least_squares") and chosen.bridge.kind == "linear"
    for kind in ("mlp", "orthogonal", "fct"):
        fitted = fit_bridge(pairs, score, kind, 0.25, 1)
        assert fitted.chosen.name == f"trained {kind}" and fitted.chosen.bridge.kind == RECIPES[kind].kind
        assert fitted.candidates[0].name == "procrustes"  # printed beside it


def test_fitting_repeats_bit_for_bit_and_needs_identities():
    pairs = curved_pairs(40, 4, 8, 0.5)
    start = build_bridge("linear", 8, 8, 0)
    first, second = (train_bridge("stacked", start, pairs, seed=4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    few = pairs.of(pairs.label_N < 15)
    with pytest.raises(DataError, match="15 of 15 identities have two images or more"):
        fit_bridge(few, score, "auto", 0.2, 1)


def test_identities_of_one_image_are_fitted_to_and_never_held_out():
    pairs = curved_pairs(32, 4, 8, 0.3)
    alone = Pairs(unit(30, 8, 1), unit(30, 8, 2), torch.arange(100, 130))
    both = Pairs(
        torch.cat([pairs.source_ND, alone.source_ND]),
        torch.cat([pairs.target_NE, alone.target_NE]),
        torch.cat([pairs.label_N, alone.label_N]),
    )
    fitted = fit_bridge(both, score, "procrustes", 0.25, 1)
    assert (fitted.num_heldout_identities, fitted.num_scored_identities) == (32, 32)


def test_more_rows_than_fit_are_drawn_by_identity_and_counted(monkeypatch):
    monkeypatch.setattr("lce_dist.evaluation.by_identity._MOST_ROWS", 60)
    pairs = curved_pairs(40, 4, 8, 0.3)
    rows = (pairs.source_ND, pairs.target_NE, pairs.label_N)
    tar_I = tar_by_identity(*rows, 1e-2)
    assert len(tar_I) == 15  # of 4 images each
    assert torch.equal(tar_I, tar_by_identity(*rows, 1e-2))
    reordered = torch.arange(159, -1, -1)  # not the first rows: the same identities in any order
    again_I = tar_by_identity(*(column[reordered] for column in rows), 1e-2)
    assert torch.equal(tar_I, again_I)
    monkeypatch.setattr("lce_dist.evaluation.by_identity._MOST_ROWS", 6)
    assert len(tar_by_identity(*rows, 1e-2)) == 2  # three images of two
    monkeypatch.setattr("lce_dist.evaluation.by_identity._MOST_ROWS", 60)
    fitted = fit_bridge(pairs, score, "procrustes", 0.5, 1)
    card = card_of(fitted, "old_to_new", 1e-2, {})
    assert card["heldout_identities"] == 40 and card["scored_identities"] == fitted.num_scored_identities < 40


@pytest.mark.parametrize(("dim_in", "dim_out"), [(6, 6), (6, 4), (4, 6)])
def test_the_papers_blocks_have_the_identity_on_their_skips(dim_in, dim_out):
    """Figure 3 by hand: x + sum of four paths, four times; one projection, and only where dimensions differ."""
    bridge = build_bridge("paper", dim_in, dim_out, seed=3)
    sizes = [(16 * wide + 16 * 16 + dim_out * 16) * 4 for wide in (dim_in, dim_out, dim_out, dim_out)]
    matrices = sum(p.numel() for p in bridge.parameters() if p.ndim == 2)
    assert matrices == sum(sizes) + (0 if dim_in == dim_out else dim_in * dim_out)
    x = unit(16, dim_in, 4)
    eye = torch.eye(6)[:dim_out, :dim_in]
    torch.testing.assert_close(bridge(x), x @ eye.T)
    draw = torch.Generator().manual_seed(5)
    for name, tensor in bridge.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0.0, 0.3, generator=draw)
        elif ".layers." in name and tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=draw)
    bridge.eval()
    state = {name: tensor.double().numpy() for name, tensor in bridge.state_dict().items()}
    value = x.double().numpy()
    for number, block in enumerate(("residual", "further.0", "further.1", "further.2")):
        total = value if number or dim_in == dim_out else value @ state["matrix.weight"].T
        for path in range(4):
            rows = value
            for layer in (0, 3, 6):
                at = f"{block}.paths.{path}.layers."
                rows = rows @ state[f"{at}{layer}.weight"].T
                spread = np.sqrt(state[f"{at}{layer + 1}.running_var"] + 1e-5)
                rows = (rows - state[f"{at}{layer + 1}.running_mean"]) / spread * state[f"{at}{layer + 1}.weight"]
                rows = rows + state[f"{at}{layer + 1}.bias"]
                rows = np.where(rows > 0, rows, state[f"{at}{layer + 2}.weight"] * rows)
            total = total + rows
        value = total
    with torch.no_grad():
        np.testing.assert_allclose(bridge(x).numpy(), value, rtol=1e-4, atol=1e-4)
    if dim_in == dim_out:
        with pytest.raises(ValueError, match="begins as the identity"):
            bridge.start_from(2 * torch.eye(6))


def test_class_terms_given_to_the_papers_map_are_those_it_is_trained_by(monkeypatch):
    seen: list[Terms] = []

    def told(kind, start, pairs, seed, terms):
        seen.append(terms)
        return train_bridge(kind, start, pairs, seed, terms)

    monkeypatch.setattr("lce_dist.compat.fit.train_bridge", told)
    monkeypatch.setattr("lce_dist.compat.fit._MOST_STEPS", 4)
    pairs, terms = curved_pairs(16, 4, 6, 0.3), Terms(align=0.5, boundary=3.0, hinge="angle")
    first = fit_bridge(pairs, score, "paper", 0.5, 1, class_terms=terms).chosen
    second = fit_bridge(pairs, score, "paper", 0.5, 1).chosen
    assert seen[0] == terms and seen[-1] == RECIPES["paper"].terms
    assert first.bridge.kind == "paper" and not torch.equal(
        first.bridge(pairs.source_ND), second.bridge(pairs.source_ND)
    )


def test_tar_by_identity_is_the_matrix_tar_when_identities_have_equal_pairs():
    pairs = curved_pairs(30, 5, 12, 0.5)
    tar_I = tar_by_identity(pairs.source_ND, pairs.target_NE, pairs.label_N, 1e-2)
    sets = [EmbeddingSet(name, rows.numpy(), pairs.label_N.numpy(), np.arange(150)) for name, rows in
            (("a", pairs.source_ND), ("b", pairs.target_NE))]  # fmt: skip
    truth = compare(sets[0], sets[1], [1e-2]).tar_at_far["0.01"]
    assert float(tar_I.mean()) == pytest.approx(truth, abs=2e-3) and tar_I.shape == (30,)


def test_centres_are_unit_means_and_regression_to_them_is_numpys():
    x, y = unit(60, 5, 1), unit(60, 4, 2)
    place = torch.arange(60) % 7
    centre = class_centres(y, place, 7)
    for number in range(7):
        mean = y[place == number].double().mean(0)
        torch.testing.assert_close(centre[number], (mean / mean.norm()).float())
    truth, *_ = np.linalg.lstsq(x.double().numpy(), centre[place].double().numpy(), rcond=None)
    np.testing.assert_allclose(least_squares(PairSums.of(x, centre[place]), 0.0).numpy(), truth.T, atol=1e-9)


def test_too_few_pairs_without_a_ridge_are_refused():
    with pytest.raises(RunError, match="do not span 7 dimensions"):
        least_squares(PairSums.of(torch.eye(7)[:3], unit(3, 4, 2)), 0.0)
    with pytest.raises(RunError, match="0 pairs"):
        procrustes(PairSums.of(torch.zeros(0, 3), torch.zeros(0, 3)))


@pytest.mark.parametrize("hinge", ["cos", "angle"])
def test_the_loss_equals_a_slow_one_in_float64(hinge):
    pairs = curved_pairs(6, 3, 5, 0.5)
    pairs = pairs.of(torch.arange(17))  # the last identity has two images
    bridge = build_bridge("mlp", 5, 5, 1).double()
    bridge.start_from(rotation(5, 3))
    double = Pairs(pairs.source_ND.double(), pairs.target_NE.double(), pairs.label_N)
    classes = ClassTable.of(double)
    chosen = torch.tensor([0, 1, 5, 9, 16, 12])
    terms = Terms(pair=3.0, contrast=0.7, align=2.0, boundary=1.5, temperature=0.1, hinge=hinge)
    with torch.no_grad():
        found = map_loss(bridge, double, classes, chosen, terms, torch.Generator().manual_seed(4)).item()
        partner = classes.another(chosen, torch.Generator().manual_seed(4)).tolist()
    x, y, label = double.source_ND.numpy(), double.target_NE.numpy(), pairs.label_N.numpy()
    matrix = rotation(5, 3).numpy()

    def turned(row: np.ndarray) -> np.ndarray:
        value = matrix @ row
        return value / np.linalg.norm(value)

    def centre(rows: np.ndarray, one: int) -> np.ndarray:
        mean = rows[label == label[one]].mean(0)
        return mean / np.linalg.norm(mean)

    batch = chosen.tolist()
    logits = np.array([[turned(x[i]) @ y[partner[b]] / 0.1 for b in range(6)] for i in batch])
    for a, i in enumerate(batch):
        assert label[partner[a]] == label[i] and partner[a] != i
        for b, j in enumerate(batch):
            if a != b and label[i] == label[j]:
                logits[a, b] = -np.inf
    truth = 0.0
    for a, i in enumerate(batch):
        target = centre(y, i)
        bound = min(y[k] @ target for k in range(17) if label[k] == label[i])
        truth += 3.0 * (1 - turned(x[i]) @ y[i]) + 2.0 * (1 - turned(centre(x, i)) @ target)
        outside = (
            np.arccos(turned(x[i]) @ target) - np.arccos(bound) if hinge == "angle" else bound - turned(x[i]) @ target
        )
        truth += 1.5 * max(0.0, outside)
        for row in (logits[a], logits[:, a]):
            truth += 0.7 * 0.5 * (np.log(np.exp(row).sum()) - row[a])
    assert found == pytest.approx(truth / 6, rel=1e-9)


def test_an_identity_of_one_image_is_its_own_partner():
    pairs = Pairs(unit(4, 3, 1), unit(4, 3, 2), torch.tensor([7, 7, 3, 9]))
    partner = ClassTable.of(pairs).another(torch.tensor([0, 1, 2, 3]), torch.Generator().manual_seed(1))
    assert partner.tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("name", ["tiny8", "mobilefacenet", "iresnet18"])
def test_a_rotation_becomes_part_of_a_net_and_the_net_stays_what_it_is(name, tmp_path: Path):
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    net = build_net(name, 8, 32, seed=1).eval()
    draw = torch.Generator().manual_seed(2)
    for key, tensor in net.state_dict().items():  # as after training: no part of the end is trivial
        if key.endswith("running_var"):
            tensor.uniform_(0.3, 3.0, generator=draw)
        elif key.endswith(("running_mean", "bias")) or (name == "mobilefacenet" and key == "features.layers.3.weight"):
            tensor.normal_(0.5, 0.3, generator=draw)
    turn = rotation(8, 4)
    with torch.no_grad():
        before = net(images)
        fold_rotation(net, turn)
        save_weights(net, tmp_path / "model.safetensors", {})
        again = build_net(name, 8, 32, seed=2).eval()
        load_weights(again, tmp_path / "model.safetensors")
        expected = before.double() @ turn.T
        scale = float(expected.abs().max())
        assert float((again(images) - expected).abs().max()) < 2e-5 * scale
        assert float((before - expected).abs().max()) > 0.1 * scale  # the comparison can fail
        units = [F.normalize(rows.double()) for rows in (before, again(images))]
        torch.testing.assert_close(units[1] @ units[1].T, units[0] @ units[0].T, atol=1e-4, rtol=0)


def test_a_net_that_ends_in_something_else_takes_no_rotation():
    with pytest.raises(ConfigError, match=r"TinyNet ends in Linear and GroupNorm, must end in Linear and BatchNorm1d"):
        fold_rotation(build_net("tiny8-gn", 8, 32, seed=1), torch.eye(8))


@pytest.mark.parametrize("kind", [*KINDS, "paper"])
def test_a_stored_bridge_comes_back_bit_for_bit(kind, tmp_path: Path):
    pairs = curved_pairs(20, 4, 6, 0.5)
    pairs = Pairs(pairs.source_ND, pairs.target_NE[:, :4], pairs.label_N)
    bridge = train_bridge(kind, None, pairs, seed=1)
    save_bridge(tmp_path, bridge, {"kind": kind, "dim_in": 6, "dim_out": 4, "direction": "new_to_old"})
    found = read_bridge(tmp_path)
    with torch.no_grad():
        assert torch.equal(found(pairs.source_ND), bridge(pairs.source_ND))
    torch.testing.assert_close(map_rows(found, 3.0 * pairs.source_ND).norm(dim=1), torch.ones(80))


def test_the_card_says_all_and_damage_is_refused(tmp_path: Path):
    fitted = fit_bridge(curved_pairs(16, 3, 6, 0.0), score, "procrustes", 0.5, 1)
    card = card_of(fitted, "old_to_new", 1e-2, {"old_model": "abc"})
    save_bridge(tmp_path, fitted.chosen.bridge, card)
    found = read_card(tmp_path)
    assert found["chosen"] == "procrustes" and found["old_model"] == "abc" and found["direction"] == "old_to_new"
    assert found["candidates"][0]["tar_at_far_0.01"] == pytest.approx(fitted.chosen.score, abs=1e-6)
    whole = (tmp_path / "bridge.json").read_text()
    other = build_bridge("linear", 6, 6, 3)
    save_weights(other, tmp_path / "bridge.safetensors", {})  # a new map whose card never came
    with pytest.raises(CheckpointError, match=r"is not what bridge\.json was written for"):
        read_bridge(tmp_path)
    for text, words in (
        ("{", "is damaged"),
        ("{}", "no bridge's card"),
        (whole.replace('"kind": "linear"', '"kind": "cubic"'), "kind 'cubic'"),
        (whole.replace('"dim_in": 6', '"dim_in": "6"'), "dim_in '6'"),
    ):
        (tmp_path / "bridge.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_bridge(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_card(tmp_path / "elsewhere")
