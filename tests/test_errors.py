"""Bad input is refused at the boundary, in a sentence that says what was wrong and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tiltflow.errors as errors
from oracles import grid, identity
from tiltflow.algorithms import mirror_descent
from tiltflow.analytic import gaussian
from tiltflow.context import Context
from tiltflow.density import Empirical, FlowDensity
from tiltflow.divergences import KL
from tiltflow.errors import (
    CapabilityError,
    ConfigError,
    NonFiniteError,
    ShapeError,
    TiltflowError,
    UnsupportedError,
)
from tiltflow.flow import FlowModel
from tiltflow.potential import BlackBox, Decoded, Differentiable, Hinge, Potential
from tiltflow.problem import ControlProblem
from tiltflow.rewards.points import Distance, Linear, Norm, Quadratic
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear as LinearPath
from tiltflow.seed import Seed
from tiltflow.solvers.exact import GaussianSolver, GridSolver
from tiltflow.space import Euclidean
from tiltflow.types import Access
from tiltflow.utilities import Entropy, ExpectedReward, LeftCVaR, RightCVaR

Q = gaussian([0.0], 1.0)
GRID = grid(Q, -6, 6, 201)
SAMPLES = Empirical(torch.randn(500, 1, generator=Seed(0).generator()))


def nan_above(x: Tensor) -> Tensor:
    return torch.where(x[:, 0] > 1.0, math.nan, x[:, 0])


def test_hierarchy() -> None:
    """Everything raised on purpose is a TiltflowError: one `except` catches the library."""
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) >= 7
    assert all(issubclass(e, TiltflowError) for e in kinds)


def test_non_finite_error_says_where() -> None:
    """Stage, step, quantity and remedy are attributes and words of the message."""
    error = NonFiniteError("adjoint matching", 7, "the loss", "Lower the rate.")
    assert (error.stage, error.step, error.quantity) == ("adjoint matching", 7, "the loss")
    assert str(error) == "adjoint matching, step 7: the loss is not finite. Lower the rate."


@pytest.mark.parametrize(
    "functional", [ExpectedReward, lambda r: LeftCVaR(r, 0.2), lambda r: RightCVaR(r, 0.8)]
)
def test_nan_rewards(functional: Callable[[Potential], ExpectedReward]) -> None:
    """A NaN reward is never averaged, sorted or thresholded away: value and loop raise."""
    objective = functional(Differentiable(nan_above)) - 0.5 * KL(GRID)
    with pytest.raises(NonFiniteError, match=r"Differentiable.*samples: value"):
        objective.value(GRID)
    with pytest.raises(NonFiniteError, match=r"Differentiable.*samples: value"):
        mirror_descent(objective, GRID, GridSolver(), [0.1], density=identity, context=Context())


def test_nan_behind_a_decoder_or_a_hinge() -> None:
    """Wrapping does not hide it: the innermost potential is named."""
    x = torch.tensor([[0.0], [2.0]])
    for wrapped in (
        Hinge(Differentiable(nan_above), 0.0, 1.0, "above"),
        Decoded(Differentiable(nan_above), lambda y: 2 * y),
        0.5 * Differentiable(nan_above) + Linear(1.0),
    ):
        with pytest.raises(NonFiniteError, match="Differentiable, step 1 of 2 samples"):
            wrapped.value(x)
        with pytest.raises(NonFiniteError):
            wrapped.grad(x)


@pytest.mark.parametrize(
    "reward",
    [
        Differentiable(lambda x: x),
        Differentiable(lambda x: x.mean()),
        BlackBox(lambda x: x[:, :1]),
        BlackBox(lambda x: [0.0] * len(x)),
    ],
)
def test_wrong_reward_shapes(reward: Potential) -> None:
    """(B, 1) would broadcast against (B,) into (B, B) without a word: refused everywhere."""
    for use in (
        lambda: reward.value(SAMPLES.bank.points),
        lambda: ExpectedReward(reward).value(SAMPLES),
        lambda: LeftCVaR(reward, 0.2).first_variation(SAMPLES),
        lambda: (ExpectedReward(reward) + Entropy()).first_variation(GRID).value(GRID.nodes),
    ):
        with pytest.raises(ShapeError, match="one number per sample"):
            use()


@pytest.mark.parametrize(
    "reward", [Linear([1.0, 2.0]), Quadratic([0.0, 1.0]), Distance([0.0, 0.0])]
)
def test_rewards_of_another_dimension(reward: Potential) -> None:
    """Two coefficients for one-dimensional states are an error, not a broadcast."""
    with pytest.raises(ShapeError, match=r"2.*numbers, but states have shape \(1,\)"):
        reward.value(SAMPLES.bank.points)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Linear(math.nan), "Linear: slope"),
        (lambda: Linear("steep"), "Linear: slope"),  # type: ignore[arg-type]
        (lambda: Quadratic(0.0, [1.0, math.inf]), "Quadratic: curvature"),
        (lambda: Distance([math.nan]), "Distance: center"),
        (lambda: Norm(math.inf), "Norm: scale"),
    ],
)
def test_bad_numbers(make: Callable[[], object], name: str) -> None:
    """Constructors refuse what is not a finite number, and name the argument."""
    with pytest.raises(ConfigError, match=name):
        make()


def test_no_gradient() -> None:
    """A value-only reward has no gradient: potential, tail and check say who lacks what."""
    black = BlackBox(lambda x: x[:, 0])
    with pytest.raises(CapabilityError, match="BlackBox, which offers VALUE"):
        black.grad(torch.zeros(2, 1))
    assert LeftCVaR(black, 0.2).offers(Access.BOTH) is Access.VALUE
    with pytest.raises(CapabilityError, match="differentiable reward"):
        LeftCVaR(black, 0.2).first_variation(SAMPLES).require(Access.GRAD, "AdjointMatching")


def test_no_value() -> None:
    """A gradient-only reward has no mean, no tail and no grid tilt."""

    class Force(Potential):
        @property
        def offers(self) -> Access:
            return Access.GRAD

    for use in (
        lambda: ExpectedReward(Force()).value(SAMPLES),
        lambda: LeftCVaR(Force(), 0.2).first_variation(SAMPLES),
        lambda: GridSolver().solve(ControlProblem(GRID, Force()), Context()),
    ):
        with pytest.raises(CapabilityError, match="Force, which offers GRAD"):
            use()


def test_missing_log() -> None:
    """Samples have no log-density: entropy and KL neither estimate nor differentiate one."""
    for functional in (Entropy(), KL(GRID)):
        assert functional.offers_at(SAMPLES) is Access.NONE
        with pytest.raises(CapabilityError, match="log"):
            functional.value(SAMPLES)
        with pytest.raises(CapabilityError, match=r"log Empirical|ratio of Empirical"):
            functional.first_variation(SAMPLES).grad(SAMPLES.bank.points)


def test_missing_log_in_a_loop() -> None:
    """The loop refuses before it draws or solves anything."""

    def explode(*_: object) -> None:
        raise AssertionError("nothing may be solved")

    class Counting:
        needs = Access.VALUE
        solve = explode

    p = FlowDensity(Q.flow(hidden=()))
    with pytest.raises(CapabilityError, match=r"Entropy offers GRAD.*Counting needs VALUE"):
        mirror_descent(
            Entropy(), Q, Counting(), [0.1],  # type: ignore[arg-type]
            density=lambda m, s: p, context=Context(),
        )  # fmt: skip
    assert "bank" not in p.__dict__


def test_networks_of_another_shape() -> None:
    """A network that returns another shape is named, with both shapes."""

    class Flat(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.flatten()

    model = FlowModel(Flat(), LinearPath(), Euclidean((2,)), predicts="velocity")
    with pytest.raises(ShapeError, match=r"Flat returned \(8,\) for states of shape \(4, 2\)"):
        Sampler(num_steps=2).sample(model, 4, seed=Seed(0))


def test_impossible_tilts() -> None:
    """A quadratic reward that outgrows the model's tails has no optimum; neither has a spline."""
    with pytest.raises(ConfigError, match="not integrable"):
        GaussianSolver().solve(ControlProblem(Q, Quadratic(0.0, -1.5)), Context())
    with pytest.raises(UnsupportedError, match="Use Quadrature with GridSolver"):
        GaussianSolver().solve(ControlProblem(Q, Norm()), Context())
