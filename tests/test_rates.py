"""Step sizes of the outer loop, and its refusal of wrong arguments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from oracles import grid
from oracles.loops import Recorder, run
from tiltflow.algorithms import Fixed, PathKLBound
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.divergences import KL
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.problem import Solution
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.solvers.exact import GaussianSolver, GridSolver
from tiltflow.utilities import Entropy, ExpectedReward, RightCVaR

X = Linear(1.0)


@pytest.mark.parametrize("bound", [0.002, 0.02, 0.1])
def test_path_kl_bound_is_kept(bound: float) -> None:
    """Every step of an exact solver moves at most `bound` nats, and as much as it may at first."""
    q = grid(gaussian([0.5], 0.7), -6, 9, 2001)
    rule = PathKLBound(bound=bound, initial=0.5, max_rate=1.0)
    objective = RightCVaR(X, 0.8) - KL(q)
    _, its = run(objective, q, GridSolver(), rule, num_iterations=12, form="successive")
    assert all(i.step_kl <= bound * (1 + 1e-9) for i in its)
    assert its[0].step_kl == pytest.approx(bound, rel=1e-6)
    assert all(b.rate <= 2 * a.rate + 1e-12 for a, b in itertools.pairwise(its))
    assert its[-1].objective.value > its[0].objective.value


def test_path_kl_bound_growth_and_cap() -> None:
    """Where the bound does not bind, rates grow by the factor up to max_rate."""
    q = gaussian([0.0], 1.0)
    rule = PathKLBound(bound=100.0, initial=0.01, max_rate=0.05, growth=2.0)
    _, its = run(ExpectedReward(X) - KL(q), q, GaussianSolver(), rule, num_iterations=4)
    assert [i.rate for i in its] == pytest.approx([0.01, 0.02, 0.04, 0.05])


def test_path_kl_bound_solves_again() -> None:
    """A step that measures too much is solved again at rate * sqrt(0.8 bound / kl), elsewhere."""
    q, recorder = gaussian([0.0], 1.0), Recorder()

    def measured(new: GaussianMixture, old: GaussianMixture, seed: Seed) -> float:
        # Twice the true KL, so that the prediction is always too optimistic.
        return float((new.means - old.means) ** 2)

    rule = PathKLBound(bound=0.02, initial=1.0, max_rate=1.0)
    _, its = run(ExpectedReward(X) - KL(q), q, recorder, rule, num_iterations=1, step_kl=measured)
    # Predicted 0.5 r^2 = 0.02 at r = 0.2 (on samples); measured twice that; then r sqrt(0.4).
    first, second = (float(c[0].terminal.value(torch.ones(1, 1))) for c in recorder.calls)
    assert first == pytest.approx(0.2, rel=0.05)
    ratio = math.sqrt(0.8 * 0.02 / first**2)
    assert second == pytest.approx(first * ratio, rel=1e-5)
    assert its[0].step_kl <= 0.02
    assert its[0].rate == pytest.approx(second, rel=1e-5)
    paths = [c[1].seed.path for c in recorder.calls]
    assert paths == [("iteration", "0"), ("iteration", "0", "attempt", "1")]


@pytest.mark.parametrize("kl", [math.nan, 5.0])
def test_path_kl_bound_gives_up(kl: float) -> None:
    """A KL that cannot be measured, or does not fall with the rate, ends in a sentence."""
    q = gaussian([0.0], 1.0)
    rule = PathKLBound(bound=0.02, initial=0.1, max_rate=1.0, max_retries=3)
    with pytest.raises(UnsupportedError, match="PathKLBound"):
        run(
            ExpectedReward(X) - KL(q), q, GaussianSolver(), rule, num_iterations=1,
            step_kl=lambda *a: kl,
        )  # fmt: skip


def test_a_constant_rate() -> None:
    """Fixed(r) is r for ever, and needs a number of iterations."""
    q = gaussian([0.0], 1.0)
    objective = ExpectedReward(X) - KL(q)
    _, its = run(objective, q, GaussianSolver(), Fixed(0.3), num_iterations=3)
    assert [i.rate for i in its] == [0.3] * 3
    with pytest.raises(ConfigError, match="num_iterations"):
        run(objective, q, GaussianSolver(), Fixed(0.3))


Q0 = gaussian([0.0], 1.0)


def go(rates: object, **options: object) -> object:
    return run(Entropy(), Q0, GaussianSolver(), rates, **options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: go([]), "empty"),
        (lambda: go([0.1, -0.2]), "positive"),
        (lambda: go([math.nan]), "positive"),
        (lambda: go([0.1], num_iterations=2), "num_iterations=2"),
        (lambda: go([0.1], num_iterations=0), "num_iterations=0"),
        (lambda: go([0.1], form="both"), "form='both'"),
        (lambda: go([0.1], completed=[Solution(Q0)] * 2), "2 completed"),
        (
            lambda: run(
                Entropy(), Q0, GaussianSolver(), PathKLBound(bound=1.0, initial=0.1, max_rate=1.0),
                num_iterations=2, completed=[Solution(Q0)],
            ),
            "no 'rate'",
        ),
        (lambda: PathKLBound(bound=0.0, initial=0.1, max_rate=1.0), "bound"),
        (lambda: PathKLBound(bound=0.1, initial=2.0, max_rate=1.0), "initial <= max_rate"),
        (lambda: PathKLBound(bound=0.1, initial=0.1, max_rate=1.0, growth=0.5), "growth"),
        (lambda: Fixed(-1.0), "positive"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Callable[[], object], match: str) -> None:
    """Wrong arguments are named before any work."""
    with pytest.raises(ConfigError, match=match):
        make()
