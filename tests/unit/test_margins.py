"""Margins against their published formulas, written out again in float64, and autograd's derivatives of them."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lce_dist.head.margins import AdaFace, ArcFace, Combined, CosFace, CurricularFace, MagFace, Margin, PlainSoftmax

PI = math.pi
NORMS = (10.0, 110.0, 0.45, 0.8, 35.0)  # MagFace as published


def fresh(**keys):
    """One margin of each kind, in its usual setting."""
    return {
        "plain": PlainSoftmax(**keys),
        "arcface": ArcFace(0.5, **keys),
        "cosface": CosFace(0.35, **keys),
        "combined": Combined(1.35, 0.2, 0.1, **keys),
        "adaface": AdaFace(0.4, **keys),
        "magface": MagFace(*NORMS, **keys),
        "curricularface": CurricularFace(0.5, **keys),
    }


KINDS = list(fresh())


def line_past_pi(theta, m):
    """ArcFace in float64: cos(theta + m), then cos(theta) - m sin(m); autograd can follow."""
    return torch.where(
        theta + m <= PI,
        torch.cos(theta + m),
        torch.cos(theta) - m * torch.sin(torch.as_tensor(PI - m, dtype=torch.float64)),
    )


def written_out(kind, cos, norm):
    """The published formula of each of ``fresh``, for differentiable float64 tensors."""
    theta = torch.acos(cos)
    if kind == "plain":
        return cos
    if kind in ("arcface", "curricularface"):
        return line_past_pi(theta, 0.5)
    if kind == "cosface":
        return cos - 0.35
    if kind == "combined":
        border = (PI - 0.2) / 1.35
        line = torch.cos(theta) - (PI - border) * math.sin(border)
        return torch.where(1.35 * theta + 0.2 <= PI, torch.cos(1.35 * theta + 0.2), line) - 0.1
    if kind == "adaface":  # nothing observed: mean 20, std 100
        z = (0.333 * (norm.clamp(0.001, 100.0) - 20.0) / (100.0 + 0.001)).clamp(-1.0, 1.0).detach()
        return torch.cos((theta - 0.4 * z).clamp(0.0, PI)) - (0.4 + 0.4 * z)
    assert kind == "magface"
    return line_past_pi(theta, 0.45 + (0.8 - 0.45) / (110.0 - 10.0) * (norm.clamp(10.0, 110.0) - 10.0))


def grid(dtype=torch.float64):
    """Cosines over nearly all of [-1, 1], each with norms below, between and above all bounds."""
    cos = torch.linspace(-0.9999, 0.9999, 401, dtype=torch.float64)
    norm = torch.tensor([0.0, 0.0005, 3.0, 12.0, 57.3, 99.0, 500.0], dtype=torch.float64)
    both = torch.cartesian_prod(cos, norm).to(dtype)
    return both[:, 0], both[:, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_slopes_are_the_published_formula_and_its_derivatives(kind):
    cos, norm = (t.requires_grad_() for t in grid())
    expected = written_out(kind, cos, norm)
    by_cos, by_norm = torch.autograd.grad(expected.sum(), (cos, norm), materialize_grads=True)
    term = fresh()[kind].target(cos.detach(), norm.detach())
    torch.testing.assert_close(term.value_O, expected.detach(), rtol=0.0, atol=1e-13)
    torch.testing.assert_close(term.slope_O, by_cos, rtol=1e-9, atol=1e-10)
    if kind == "magface":
        assert by_norm.abs().max() > 1e-3
        torch.testing.assert_close(term.norm_slope_O, by_norm, rtol=1e-9, atol=1e-12)
    else:
        assert term.norm_slope_O is None and not by_norm.any()


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_float64_formula_rounded_once(kind):
    cos, norm = grid(torch.float32)
    cos = torch.cat([cos, 1 - 2.0 ** -torch.arange(10.0, 23.0), torch.tensor([1 - 2.0**-24])])
    norm = torch.cat([norm, torch.full((14,), 30.0)])
    wide = cos.double().requires_grad_()
    expected = written_out(kind, wide, norm.double())
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    term = fresh()[kind].target(cos, norm)
    assert term.value_O.dtype == term.slope_O.dtype == torch.float32
    torch.testing.assert_close(term.value_O.double(), expected.detach(), rtol=2.0**-24, atol=1e-13)
    torch.testing.assert_close(term.slope_O[:-1].double(), slope[:-1], rtol=1e-7, atol=1e-10)
    # one step below 1 the slope is held at its value four steps below 1, where sin is twice as large
    assert term.slope_O[-1] == pytest.approx(float(slope[-1]), rel=0.5 + 1e-3)


def test_the_pole_of_arcface_is_held():
    cos = torch.tensor([1.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24, 1.0 - 2.0**-22, 1.0 - 2.0**-20])
    term = ArcFace(0.5).target(cos, None)
    value, slope = term.value_O, term.slope_O
    held = math.cos(0.5) + math.sin(0.5) * (1 - 2.0**-22) / math.sqrt(1 - (1 - 2.0**-22) ** 2)
    assert slope[:4].tolist() == pytest.approx([held] * 4, rel=1e-6)
    assert slope[0].item() == pytest.approx(695.2, abs=0.1)
    assert slope[4] < slope[3]
    assert value[:2].tolist() == pytest.approx([math.cos(0.5)] * 2, rel=1e-7)  # the value is not held
    assert (value[2:].diff() < 0).all() and value[2] < value[1]


def test_worked_by_hand():
    half = torch.tensor([0.5], dtype=torch.float64)  # theta = 60 degrees
    arc = ArcFace(PI / 6).target(half, None)
    assert arc.value_O.item() == pytest.approx(0.0, abs=1e-15)
    assert arc.slope_O.item() == pytest.approx(2 / math.sqrt(3))  # sin 90 / sin 60
    double = Combined(2.0, 0.0, 0.0).target(half, None)  # cos 2 theta = 2 cos^2 - 1
    assert (double.value_O.item(), double.slope_O.item()) == pytest.approx((-0.5, 2.0))
    # all three count: cos(pi / 3 + 0.3) - 0.2
    assert Combined(1.0, 0.3, 0.2).target(half, None).value_O.item() == pytest.approx(0.0217, abs=5e-5)
    # multiplying theta has the finite slope m1^2 at theta = 0
    assert Combined(2.0, 0.0, 0.0).target(torch.ones(1), None).slope_O.item() == pytest.approx(4.0, rel=1e-5)


def test_combined_contains_the_others():
    cos, _ = grid()
    for three, alone in [
        ((1.0, 0.5, 0.0), ArcFace(0.5)),
        ((1.0, 0.0, 0.35), CosFace(0.35)),
        ((1.0, 0.0, 0.0), PlainSoftmax()),
    ]:
        ours, theirs = Combined(*three).target(cos, None), alone.target(cos, None)
        torch.testing.assert_close(ours.value_O, theirs.value_O, rtol=0.0, atol=1e-15)
        torch.testing.assert_close(ours.slope_O, theirs.slope_O, rtol=1e-12, atol=0.0)


RISING = [ArcFace(m) for m in (0.0, 1e-4, 0.5, 1.0, 2.0, 2.5, 3.1)] + [
    Combined(*three) for three in [(1.0, 2.5, 0.3), (1.35, 0.0, 0.0), (2.0, 0.3, 0.1), (4.0, 0.0, 0.2), (4.0, 3.1, 0.0)]
]


@pytest.mark.parametrize(
    "margin", [*RISING, CosFace(0.4), PlainSoftmax(), CurricularFace(0.5), MagFace(*NORMS)], ids=str
)
def test_a_larger_cosine_is_never_worth_less(margin):
    cos = torch.linspace(-1.0, 1.0, 20001, dtype=torch.float64)
    for norm in (1.0, 60.0, 200.0):
        term = margin.target(cos, torch.full_like(cos, norm))
        assert (term.value_O.diff() > 0).all()
        assert (term.slope_O >= 0).all()


@pytest.mark.parametrize("margin", RISING, ids=str)
def test_past_pi_the_value_is_below_all_others_and_rises_as_the_cosine(margin):
    m1, m2, m3 = (margin.m1, margin.m2, margin.m3) if isinstance(margin, Combined) else (1.0, margin.margin_rad, 0.0)
    border = math.cos(min((PI - m2) / m1, PI))
    cos = torch.linspace(-1.0, border - 1e-9, 300, dtype=torch.float64)
    term = margin.target(cos, None)
    past = m1 * torch.acos(cos) + m2 > PI
    assert past[:-1].all() or (m2 == 0.0 and m1 == 1.0)
    assert (term.value_O[past] <= -1.0 - m3 + 1e-9).all()
    assert (term.slope_O[past] == 1.0).all()
    torch.testing.assert_close(term.value_O[past].diff(), cos[past].diff())


def test_adaface_never_falls_and_is_flat_where_the_angle_is_clipped():
    margin = AdaFace(0.4)
    margin.state()["norm_mean"].fill_(20.0)
    margin.state()["norm_std"].fill_(1.0)
    cos = torch.linspace(-1.0, 1.0, 2001, dtype=torch.float64)
    for norm, z in ((90.0, 1.0), (2.0, -1.0), (20.0, 0.0)):
        term = margin.target(cos, torch.full_like(cos, norm))
        assert (term.value_O.diff() >= 0).all()
        angle = torch.acos(cos) - 0.4 * z
        assert torch.equal(term.slope_O == 0, (angle < 0) | (angle > PI))
        assert term.value_O.max().item() == pytest.approx(math.cos(max(-0.4 * z, 0.0)) - 0.4 - 0.4 * z)


def authors_adaface(cos, norms, mean, std, m=0.4, h=0.333, eps=1e-3):
    """The target's value by the authors' steps, one row at a time, with their guards."""
    out = []
    for c, a in zip(cos, norms, strict=True):
        z = max(-1.0, min(1.0, h * (max(0.001, min(100.0, a)) - mean) / (std + eps)))
        theta = math.acos(max(-1 + eps, min(1 - eps, c)))
        out.append(math.cos(max(eps, min(PI - eps, theta - m * z))) - (m + m * z))
    return out


def test_adaface_as_published_over_three_batches():
    generator = torch.Generator().manual_seed(5)
    margin, mean, std = AdaFace(0.4), 20.0, 100.0
    for low, high in ((0.0, 40.0), (20.0, 25.0), (5.0, 300.0)):
        norm = torch.empty(16, dtype=torch.float64).uniform_(low, high, generator=generator)
        cos = torch.empty(16, dtype=torch.float64).uniform_(-0.998, 0.998, generator=generator)
        margin.observe(norm, None, torch.full((16,), 1 / 16))
        clipped = [max(0.001, min(100.0, a)) for a in norm.tolist()]
        mean = 0.99 * mean + 0.01 * statistics.mean(clipped)
        std = 0.99 * std + 0.01 * statistics.stdev(clipped)
        assert margin.state()["norm_mean"].item() == pytest.approx(mean, rel=1e-12)
        assert margin.state()["norm_std"].item() == pytest.approx(std, rel=1e-12)
        expected = authors_adaface(cos.tolist(), norm.tolist(), mean, std)
        assert margin.target(cos, norm).value_O.tolist() == pytest.approx(expected, abs=6e-7)  # 1 - cos(0.001) = 5e-7


def test_adaface_reads_quality_from_the_norm():
    margin = AdaFace(0.4, decay=0.0)
    margin.observe(torch.tensor([10.0, 20.0, 30.0]), None, torch.ones(3))  # mean 20, std 10
    cos = torch.full((2,), 0.3, dtype=torch.float64)
    value = margin.target(cos, torch.tensor([100.0, 1e-9])).value_O.tolist()
    low = max(-1.0, 0.333 * (0.001 - 20) / 10.001)
    assert value[0] == pytest.approx(math.cos(math.acos(0.3) - 0.4) - 0.8)  # z = 1
    assert value[1] == pytest.approx(math.cos(math.acos(0.3) - 0.4 * low) - 0.4 - 0.4 * low)


def values_of(margin):
    return {name: value.item() for name, value in margin.state().items()}


def observed(margin, rows, weights):
    """``rows`` serve as norms or, a hundredth of them, as target cosines."""
    margin.observe(rows, rows / 100, weights)
    return values_of(margin)


@pytest.mark.parametrize("make", [lambda: AdaFace(0.4), lambda: CurricularFace(0.5)], ids=["adaface", "curricularface"])
def test_what_statistics_depend_on(make):
    rows, ones = torch.tensor([3.0, 50.0, 7.0, 90.0, 21.0]), torch.ones(5)
    whole = observed(make(), rows, ones)
    assert whole != values_of(make())
    # not on the order of rows, nor on the size of their weights
    order = torch.tensor([4, 2, 0, 1, 3])
    assert observed(make(), rows[order], ones) == pytest.approx(whole, rel=1e-14)
    assert observed(make(), rows, torch.tensor([0.1, 1e-9, 3.0, 0.2, 0.2])) == whole
    # not on rows of weight 0, whatever they hold
    for rubbish in (0.0, -5.0, math.inf, math.nan):
        padded, weights = torch.cat([rows, torch.full((3,), rubbish)]), torch.cat([ones, torch.zeros(3)])
        assert observed(make(), padded, weights) == whole
    # on the cut into micro-batches, since each one takes its share
    margin = make()
    observed(margin, rows[:2], ones[:2])
    assert observed(margin, rows[2:], ones[2:]) != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batches_without_a_deviation_or_without_rows(dtype):
    margin = AdaFace(0.4)
    margin.observe(torch.tensor([70.0], dtype=dtype), None, torch.ones(1))
    assert values_of(margin) == pytest.approx({"norm_mean": 20.5, "norm_std": 100.0})  # one row has no deviation
    margin.observe(torch.tensor([70.0, 3.0], dtype=dtype), None, torch.tensor([0.0, 0.0]))
    margin.observe(torch.empty(0, dtype=dtype), None, torch.empty(0))
    assert values_of(margin) == pytest.approx({"norm_mean": 20.5, "norm_std": 100.0})
    margin.observe(torch.tensor([70.0, 3.0, 70.0], dtype=dtype), None, torch.tensor([1.0, 0.0, 1.0]))
    assert values_of(margin) == pytest.approx({"norm_mean": 20.995, "norm_std": 99.0})
    curricular = CurricularFace(0.5)
    curricular.observe(None, torch.empty(0, dtype=dtype), torch.empty(0))
    curricular.observe(None, torch.ones(3, dtype=dtype), torch.zeros(3))
    assert values_of(curricular) == {"t": 0.0}
    curricular.observe(None, torch.tensor([0.5, 7.0], dtype=dtype), torch.ones(2))  # 7 counts as 1
    assert values_of(curricular) == pytest.approx({"t": 0.0075})


def test_observing_needs_no_gradient_and_leaves_none():
    norm = torch.tensor([10.0, 30.0], requires_grad=True)
    margin = AdaFace(0.4)
    margin.observe(norm, None, torch.ones(2))
    assert not margin.state()["norm_mean"].requires_grad
    assert not margin.target(torch.tensor([0.1, 0.2]), norm).value_O.requires_grad


def test_magface_between_and_beyond_its_bounds():
    margin, cos = MagFace(*NORMS), torch.full((5,), 0.2, dtype=torch.float64)
    norm = torch.tensor([0.0, 9.0, 60.0, 111.0, 1e6], dtype=torch.float64)
    term = margin.target(cos, norm)
    rads = [0.45, 0.45, 0.625, 0.8, 0.8]
    assert term.value_O.tolist() == pytest.approx([math.cos(math.acos(0.2) + m) for m in rads])
    expected = [0.0, 0.0, -0.0035 * math.sin(math.acos(0.2) + 0.625), 0.0, 0.0]
    assert term.norm_slope_O.tolist() == pytest.approx(expected)
    value, slope = margin.regulariser(norm)
    assert value[0].item() == pytest.approx(35 * (10 / 110**2 + 1 / 10))
    assert value[2].item() == pytest.approx(35 * (60 / 110**2 + 1 / 60))
    assert slope.tolist() == pytest.approx([0.0, 0.0, 35 * (1 / 110**2 - 1 / 60**2), 0.0, 0.0])


def test_magface_pulls_norms_up_as_autograd_says():
    norm = torch.linspace(10.5, 109.5, 50, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((35 * (norm / 110**2 + 1 / norm)).sum(), norm)
    value, slope = MagFace(*NORMS).regulariser(norm)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0.0)
    assert (slope < 0).all() and (value.diff() < 0).all() and not value.requires_grad
    in_half, _ = MagFace(*NORMS).regulariser(norm.detach().half())
    assert in_half.dtype == torch.float32


def test_magface_norm_slope_past_pi_is_the_derivative_of_the_line():
    for upper in (0.8, 3.0):  # 3.0: margins on both pieces of the line
        norm = torch.linspace(11.0, 109.0, 400, dtype=torch.float64)
        cos, step = torch.full_like(norm, -0.9999), 1e-6
        margin = MagFace(10.0, 110.0, 0.45, upper, 0.0)
        rise = margin.target(cos, norm + step).value_O - margin.target(cos, norm - step).value_O
        torch.testing.assert_close(margin.target(cos, norm).norm_slope_O, rise / (2 * step), rtol=1e-5, atol=1e-8)


def authors_curricularface(cos, labels, t, m=0.5):
    """(new t, logits at scale 1) by the authors' steps, entry by entry."""
    t = 0.99 * t + 0.01 * statistics.mean(cos[i][y] for i, y in enumerate(labels))
    out = []
    for row, y in zip(cos, labels, strict=True):
        turned = math.cos(math.acos(row[y]) + m)
        new = [c * (t + c) if c > turned else c for c in row]
        new[y] = turned if row[y] > math.cos(PI - m) else row[y] - m * math.sin(PI - m)
        out.append(new)
    return t, out


def test_curricularface_as_published():
    generator = torch.Generator().manual_seed(2)
    margin, t = CurricularFace(0.5), 0.0
    for _ in range(3):
        cos = torch.empty((9, 11), dtype=torch.float64).uniform_(-0.85, 0.99, generator=generator)
        labels = torch.randint(11, (9,), generator=generator)
        target_cos = cos[torch.arange(9), labels]
        t, expected = authors_curricularface(cos.tolist(), labels.tolist(), t)
        margin.observe(None, target_cos, torch.ones(9))
        hard = margin.negatives(target_cos)
        assert hard.shift == pytest.approx(t, rel=1e-12)
        ours = torch.where(cos > hard.threshold_B[:, None], cos * (hard.shift + cos), cos)
        ours[torch.arange(9), labels] = margin.target(target_cos, None).value_O
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-13)


def test_curricularface_thresholds_go_on_past_pi():
    margin, cos = CurricularFace(0.5), torch.linspace(-1.0, 1.0, 501)
    hard = margin.negatives(cos)
    assert (hard.threshold_B.diff() > 0).all()
    assert torch.equal(hard.threshold_B, margin.target(cos, None).value_O)
    assert hard.threshold_B[0].item() == pytest.approx(-1 - 0.5 * math.sin(0.5))  # every negative of such a row is hard


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_exceeds_the_declared_top(kind):
    margin, (cos, norm) = fresh()[kind], grid()
    for _ in range(2000):  # statistics far into training, all targets solved
        margin.observe(norm[:7], torch.ones(7), torch.ones(7))
    assert margin.target(cos, norm).value_O.max() <= margin.top
    hard = margin.negatives(torch.full((3,), 0.5, dtype=torch.float64))
    assert (hard is not None) == margin.acts_on_negatives
    if hard is not None:
        assert margin.top >= 1.0 * (hard.shift + 1.0) > 1.9


@pytest.mark.parametrize("kind", KINDS)
def test_straight_through_changes_slopes_only(kind):
    cos, norm = grid(torch.float32)
    exact, through = fresh()[kind].target(cos, norm), fresh(straight_through=True)[kind].target(cos, norm)
    assert torch.equal(exact.value_O, through.value_O)
    assert torch.equal(through.slope_O, torch.ones_like(cos))
    assert through.norm_slope_O is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_answered_in_float32(kind, dtype):
    cos, norm = grid(dtype)
    narrow, wide = fresh()[kind].target(cos, norm), fresh()[kind].target(cos.float(), norm.float())
    assert narrow.value_O.dtype == torch.float32
    assert torch.equal(narrow.value_O, wide.value_O) and torch.equal(narrow.slope_O, wide.slope_O)
    if kind == "magface":
        assert torch.equal(narrow.norm_slope_O, wide.norm_slope_O)


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
COS = st.one_of(
    st.floats(-1.01, 1.01),
    st.sampled_from([-1.0, 1.0, 0.0, -0.0]),
    st.floats(0.0, 1e-5).map(lambda d: 1.0 - d),
    st.floats(0.0, 1e-5).map(lambda d: d - 1.0),
)
ANGLE = st.floats(0.0, 3.139)


@settings(max_examples=400, deadline=None)
@given(
    rows=st.lists(st.tuples(COS, st.floats(0.0, 6e4), st.sampled_from([0.0, 0.25, 1.0])), max_size=6),
    dtype=DTYPES,
    angle=ANGLE,
    factor=st.floats(1.0, 4.0),
    by=st.floats(0.0, 1.99),
    upper=ANGLE,
    through=st.booleans(),
)
def test_all_answers_are_finite(rows, dtype, angle, factor, by, upper, through):
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
    cos, norm, weight = table[:, 0].to(dtype), table[:, 1].to(dtype), table[:, 2].float()
    margins: list[Margin] = [
        PlainSoftmax(straight_through=through),
        ArcFace(angle, straight_through=through),
        CosFace(by, straight_through=through),
        Combined(factor, angle, by, straight_through=through),
        AdaFace(angle, straight_through=through),
        MagFace(1e-3, 200.0, angle, upper, 35.0, straight_through=through),
        CurricularFace(angle, straight_through=through),
    ]
    for margin in margins:
        margin.observe(norm, cos, weight)
        term, hard, penalty = margin.target(cos, norm), margin.negatives(cos), margin.regulariser(norm)
        found = [term.value_O, term.slope_O, *margin.state().values()]
        found += [term.norm_slope_O] if term.norm_slope_O is not None else []
        found += [hard.threshold_B, torch.tensor(hard.shift)] if hard is not None else []
        found += list(penalty) if penalty is not None else []
        assert all(torch.isfinite(t).all() for t in found), margin
        assert term.value_O.shape == term.slope_O.shape == cos.shape
        assert (term.slope_O >= 0.0).all(), margin
        assert (term.value_O <= 1.0).all(), margin


def test_state_is_read_and_written_in_place():
    assert {kind: sorted(margin.state()) for kind, margin in fresh().items() if margin.state()} == {
        "adaface": ["norm_mean", "norm_std"],
        "curricularface": ["t"],
    }
    cos, norm = grid()
    for kind in ("adaface", "curricularface"):
        margin, other = fresh()[kind], fresh()[kind]
        margin.observe(norm[:7], cos[-7:], torch.ones(7))
        assert values_of(other) == values_of(fresh()[kind]) != values_of(margin)  # margins share no state
        held = other.state()
        for name, saved in margin.state().items():
            assert saved.shape == () and saved.dtype == torch.float64
            held[name].view(1).copy_(saved.view(1))  # as a checkpoint does
        assert torch.equal(other.target(cos, norm).value_O, margin.target(cos, norm).value_O)
        for each in (margin, other):
            each.observe(norm[:5], cos[:5], torch.ones(5))
        assert values_of(other) == values_of(margin)
        assert {name: value.item() for name, value in held.items()} == values_of(other)  # still the same tensors
        if kind == "curricularface":
            assert other.negatives(cos).shift == margin.negatives(cos).shift != 0.0
