"""The head in one process: float32 accuracy, margins against their definitions, awkward inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from lce_dist.head.chunked import chunked_margin_softmax
from lce_dist.head.dense import dense_margin_softmax
from lce_dist.head.layer import initial_rows
from lce_dist.head.margins import ArcFace, CosFace, PlainSoftmax
from lce_dist.world import World

MARGINS = [ArcFace(0.5), CosFace(0.35), PlainSoftmax()]


def run(emb, weight, labels, margin, scale, chunk):
    emb, weight = emb.clone().requires_grad_(), weight.clone().requires_grad_()
    row_weight = torch.full((len(labels),), 1.0 / len(labels), dtype=emb.dtype)
    if chunk is None:
        loss = dense_margin_softmax(emb, weight, labels, row_weight, margin, scale)
    else:
        unit = F.normalize(emb)
        loss = chunked_margin_softmax(unit, weight, labels, row_weight, 0, margin, scale, chunk, World())
    loss.backward()
    return loss.detach().double(), emb.grad.double(), weight.grad.double()


@pytest.mark.parametrize("margin", MARGINS)
def test_float32_is_as_close_to_the_truth_as_dense_float32(margin):
    torch.manual_seed(0)
    emb, weight, labels = torch.randn(64, 32), 0.01 * torch.randn(5000, 32), torch.randint(5000, (64,))
    emb[:8] = weight[labels[:8]] * 50 + 0.01 * torch.randn(8, 32)  # nearly solved rows
    truth = run(emb.double(), weight.double(), labels, margin, 64.0, None)
    naive = run(emb, weight, labels, margin, 64.0, None)
    ours = run(emb, weight, labels, margin, 64.0, 999)
    for t, n, o in zip(truth, naive, ours, strict=True):
        size = t.abs().max()
        assert (o - t).abs().max() <= 2 * (n - t).abs().max() + 2e-6 * size


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("cos", [-1.0, 1.0])
@pytest.mark.parametrize("scale", [16.0, 64.0, 80.0])
def test_no_nan_at_the_poles_and_for_equal_rows(margin, cos, scale):
    direction = F.normalize(torch.arange(1.0, 9.0), dim=0)
    weight = torch.stack([direction, direction, -direction])
    emb = (cos * direction).repeat(3, 1)
    loss, grad_emb, grad_weight = run(emb, weight, torch.tensor([0, 1, 2]), margin, scale, 2)
    assert torch.isfinite(loss) and torch.isfinite(grad_emb).all() and torch.isfinite(grad_weight).all()


def test_two_classes_worked_by_hand():
    # cos to class 0 is 0.6, to class 1 is 0.8; CosFace, m = 0.1, s = 10: z = (5, 8), loss = log(1 + e^3)
    emb, weight = torch.tensor([[0.6, 0.8]]), torch.eye(2) * 3
    loss, _, grad_weight = run(emb, weight, torch.tensor([0]), CosFace(0.1), 10.0, 1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(3.0)), rel=1e-6)
    # d loss / d cos_1 = 10 p_1; the row's tangent is (0.6, 0), its length 3
    p1 = math.exp(3.0) / (1 + math.exp(3.0))
    assert grad_weight[1].tolist() == pytest.approx([10 * p1 * 0.6 / 3, 0.0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("margin_rad", [0.0, 0.3, 0.5, 1.0])
def test_arcface_is_cos_theta_plus_m_with_its_derivative(margin_rad):
    cos = torch.linspace(-0.999, 0.999, 401, dtype=torch.float64, requires_grad=True)
    value, slope = ArcFace(margin_rad)(cos)
    theta = torch.acos(cos)
    inside = theta + margin_rad < math.pi
    torch.testing.assert_close(value[inside], torch.cos(theta + margin_rad)[inside], rtol=1e-10, atol=1e-12)
    (by_autograd,) = torch.autograd.grad(torch.cos(theta + margin_rad)[inside].sum(), cos)
    torch.testing.assert_close(slope[inside], by_autograd[inside], rtol=1e-8, atol=1e-10)
    assert (value.diff() > 0).all()  # monotone also past pi
    assert (slope > 0).all()


def test_gradient_matches_finite_differences():
    torch.manual_seed(1)
    emb = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    labels, row_weight = torch.tensor([0, 6, 6]), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    for margin in MARGINS[1:]:
        assert torch.autograd.gradcheck(
            lambda e, w, m=margin: chunked_margin_softmax(F.normalize(e), w, labels, row_weight, 0, m, 4.0, 3, World()),
            (emb, weight),
        )


def test_initial_rows_depend_on_the_class_alone():
    whole = initial_rows(0, 70_000, 5, seed=3)
    for first, last in ((0, 1), (17, 18), (65_530, 65_545), (69_999, 70_000), (4, 4)):
        assert torch.equal(initial_rows(first, last, 5, seed=3), whole[first:last])
    assert not torch.equal(initial_rows(0, 10, 5, seed=4), whole[:10])
    assert whole.std().item() == pytest.approx(0.01, rel=0.01)
    assert whole.mean().item() == pytest.approx(0.0, abs=1e-4)
