"""How vectors move, and when a run has settled."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.errors import LearningError
from trainer.stopping import DeterministicVariance
from trainer.updates import AdamW, Moments, SphericalDescent, Update, shortened

DIM = 12


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def vectors(count: int = 2) -> Tensor:
    return torch.randn(count, DIM, generator=generator())


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def run(update: Update, start: Tensor, gradients: Tensor, rate: float) -> Tensor:
    moved, moments = start, Moments.zeros_like(start)
    for step, gradient in enumerate(gradients, start=1):
        moved, moments = update(moved, gradient, moments, step=step, rate=rate)
    return moved


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_adamw_is_that_of_torch(weight_decay: float) -> None:
    start = vectors()
    gradients = torch.randn(25, *start.shape, generator=generator())
    parameter = start.clone().requires_grad_(True)
    reference = torch.optim.AdamW([parameter], lr=5e-3, weight_decay=weight_decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        reference.step()
    moved = run(AdamW(weight_decay=weight_decay), start, gradients, 5e-3)
    # 25 float32 steps of size 5e-3 in another order of operations.
    torch.testing.assert_close(moved, parameter.detach(), rtol=0, atol=1e-6)


def test_adamw_with_a_limit_is_never_longer_and_may_be_shorter() -> None:
    start = shortened(vectors(), 0.4)
    gradients = torch.randn(40, *start.shape, generator=generator())
    update, moments = AdamW(max_norm=0.4), Moments.zeros_like(start)
    moved, lengths = start, []
    for step, gradient in enumerate(gradients, start=1):
        moved, moments = update(moved, gradient, moments, step=step, rate=0.05)
        lengths.append(moved.norm(dim=1))
    assert float(torch.stack(lengths).max()) <= 0.4 * (1 + 1e-6)  # float32 rounding
    assert float(torch.stack(lengths).min()) < 0.39


def test_a_spherical_step_turns_each_vector_by_the_rate_and_keeps_its_length() -> None:
    start = 0.37 * unit(vectors())
    update = SphericalDescent(prior=unit(vectors()), norm=0.37)
    for scale in (1e-6, 1.0, 1e6):  # however long the gradient is
        gradient = scale * torch.randn(start.shape, generator=torch.Generator().manual_seed(7))
        moved = run(update, start, gradient[None], 0.02)
        torch.testing.assert_close(moved.norm(dim=1), torch.full((2,), 0.37), rtol=1e-6, atol=0)
        angles = torch.acos((unit(moved) * unit(start)).sum(dim=1).double())
        # A step of length r along the tangent turns by atan(r); float32 cosines near 1 are
        # good to 6e-8, their angles near 0.02 to 3e-6.
        assert angles.tolist() == pytest.approx([math.atan(0.02)] * 2, abs=1e-5)


def test_a_spherical_step_goes_downhill() -> None:
    """Of a loss that falls towards a known direction."""
    goal = unit(vectors(1))
    start = unit(torch.randn(1, DIM, generator=torch.Generator().manual_seed(9)))
    update = SphericalDescent(prior=start, norm=1.0, kappa=0.0)
    moved, moments = start, Moments.zeros_like(start)
    for step in range(1, 200):
        moved, moments = update(moved, -goal, moments, step=step, rate=0.02)
    # It ends circling the goal at a distance of about one step.
    assert float((moved * goal).sum()) > math.cos(0.03)


def test_without_a_gradient_the_pull_leads_back_to_the_prior() -> None:
    prior = unit(vectors(1))
    start = unit(torch.randn(1, DIM, generator=torch.Generator().manual_seed(9)))
    still = torch.zeros(200, 1, DIM)
    back = run(SphericalDescent(prior=prior, norm=1.0), start, still, 0.02)
    assert float((back * prior).sum()) > math.cos(0.03)
    unpulled = run(SphericalDescent(prior=prior, norm=1.0, kappa=0.0), start, still, 0.02)
    torch.testing.assert_close(unpulled, start, rtol=0, atol=1e-6)


def test_the_pull_weighs_as_much_as_its_kappa_says() -> None:
    """Balance: where norm x gradient and kappa x prior cancel, nothing moves along the sphere."""
    prior = unit(vectors(1))
    start = unit(torch.randn(1, DIM, generator=torch.Generator().manual_seed(9)))
    update = SphericalDescent(prior=prior, norm=0.5, kappa=0.2)
    opposed = 0.2 / 0.5 * prior
    more, less = (
        run(update, 0.5 * start, (factor * opposed)[None], 0.01) for factor in (1.01, 0.99)
    )
    before = float((start * prior).sum())
    assert float((unit(more) * prior).sum()) < before < float((unit(less) * prior).sum())


def test_short_vectors_are_left_as_they_are() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(shortened(rows, 1.0), expected)
    torch.testing.assert_close(shortened(rows, math.inf), rows)


def falling(count: int, level: float = 0.3, time: float = 8.0) -> list[float]:
    return [level + 0.2 * math.exp(-step / time) for step in range(count)]


def test_a_run_settles_when_its_loss_stops_falling() -> None:
    rule = DeterministicVariance(window=10, threshold=0.15)
    settled = [rule.settled(falling(count)) for count in range(60)]
    assert not any(settled[:11]) and settled[-1]
    first = settled.index(True)
    assert all(settled[first:])
    # By the definition, with numpy's population variance.
    for count in (first, first - 1):
        losses = np.array(falling(count))
        assert (np.var(losses[-10:]) < 0.15 * np.var(losses)) is np.bool_(count == first)


def test_a_constant_or_straight_falling_loss_does_not_settle() -> None:
    rule = DeterministicVariance(window=10)
    assert not rule.settled([0.3] * 50)  # nothing was learned: not the same as done
    # The variance of the last 10 of n points on a line is (10 / n)^2 of the whole: 0.15 at 26.
    line = [1.0 - 0.01 * step for step in range(25)]
    assert not rule.settled(line)


@pytest.mark.parametrize(("window", "threshold"), [(1, 0.15), (0, 0.15), (10, 0.0), (10, 1.0)])
def test_impossible_rules_are_refused(window: int, threshold: float) -> None:
    with pytest.raises(LearningError, match=str(threshold) if window > 1 else str(window)):
        DeterministicVariance(window=window, threshold=threshold)
