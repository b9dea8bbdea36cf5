"""Alignment through maps: a cycle of subsets is the mean over all classes, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lce_dist.compat.transformed import rotating_subset, transformed_alignment

CLASSES, OLD, NEW = 23, 4, 6


def maps() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return nn.Linear(OLD, NEW).double(), nn.Sequential(nn.Linear(NEW, 5), nn.Tanh(), nn.Linear(5, OLD)).double()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(CLASSES, NEW).double(), F.normalize(torch.randn(CLASSES, OLD).double())


@pytest.mark.parametrize("period", [1, 2, 5])
def test_every_class_has_one_turn_in_a_cycle_and_any_cut_agrees(period):
    for cycle in range(3):
        steps = range(cycle * period, (cycle + 1) * period)
        turns = [rotating_subset(9, step, period, 0, CLASSES) for step in steps]
        assert sorted(torch.cat(turns).tolist()) == list(range(CLASSES))
        for step, turn in zip(steps, turns, strict=True):
            cut = [rotating_subset(9, step, period, low, high) + low for low, high in ((0, 7), (7, 7), (7, CLASSES))]
            assert torch.cat(cut).tolist() == turn.tolist()
    if period > 1:
        assert (
            rotating_subset(9, 0, period, 0, CLASSES).tolist()
            != rotating_subset(9, period, period, 0, CLASSES).tolist()
        )


def test_a_cycle_of_subsets_is_the_mean_over_all_classes():
    weight, old = inputs()
    weight.requires_grad_()
    there, back = maps()
    loop = torch.zeros((), dtype=torch.float64)
    for j in range(CLASSES):
        row = weight[j] / weight[j].norm()
        forward, backward = there(old[j]), back(row)
        loop = loop + 0.5 * (1 - forward @ row / forward.norm()) + 0.5 * (1 - backward @ old[j] / backward.norm())
    loop = loop / CLASSES
    loop.backward()
    wanted = [weight.grad.clone(), *(p.grad.clone() for p in (*there.parameters(), *back.parameters()))]

    period = 4
    for parameter in (weight, *there.parameters(), *back.parameters()):
        parameter.grad = None
    mean = 0.0
    for step in range(period):
        for low, high in ((0, 10), (10, CLASSES)):  # two shards
            chosen = rotating_subset(9, step, period, low, high) + low
            part = transformed_alignment(weight[chosen], old[chosen], there, back, CLASSES, period) / period
            part.backward()
            mean += part.item()
    assert mean == pytest.approx(loop.item(), rel=1e-12)
    found = [weight.grad, *(p.grad for p in (*there.parameters(), *back.parameters()))]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
