"""Several components that specialise: mutual information, and the loop that raises it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from oracles import axis, grid, identity
from tiltflow.algorithms import discover_modes
from tiltflow.algorithms.modes import far_apart
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.density import Empirical, FlowDensity, Quadrature
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.potential import BlackBox, Differentiable
from tiltflow.problem import Solution
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.solvers.exact import GridSolver
from tiltflow.types import Estimate
from tiltflow.utilities import ExpectedReward, MutualInformation

TWO = GaussianMixture([[-2.0], [2.0]], 0.4)


def line(p: GaussianMixture, count: int = 401) -> Quadrature:
    return grid(p, -6, 6, count)


def test_of_separated_components() -> None:
    """Disjoint components of weights w have I = -sum w log w; equal ones have 0."""
    a, b = line(gaussian([-3.0], 0.2)), line(gaussian([3.0], 0.2))
    exact = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert MutualInformation((b,), (0.3, 0.7)).value(a).value == pytest.approx(exact, abs=1e-9)
    assert MutualInformation((a,)).value(line(gaussian([-3.0], 0.2))).value == pytest.approx(0)


def test_is_symmetric() -> None:
    """It is one number of all components, whichever moves."""
    a, b, c = line(gaussian([0.0], 1.0)), line(gaussian([1.0], 0.7)), line(TWO)
    first = MutualInformation((b, c), (0.2, 0.3, 0.5)).value(a).value
    assert MutualInformation((c, a), (0.3, 0.5, 0.2)).value(b).value == pytest.approx(first)
    # Second route: H(mixture) - sum w H(component), by sums over the nodes.
    parts, weights = (a, b, c), (0.2, 0.3, 0.5)
    p = torch.stack([x.probabilities for x in parts])
    mixture = (torch.tensor(weights, dtype=torch.float64)[:, None] * p).sum(0)
    entropies = [-torch.special.xlogy(q, q).sum() for q in (*p, mixture)]
    exact = entropies[-1] - sum(w * h for w, h in zip(weights, entropies[:-1], strict=True))
    assert first == pytest.approx(float(exact), abs=1e-12)


def test_on_samples() -> None:
    """From banks with known logs, within 4.5 of the reported errors."""
    a, b = gaussian([0.0], 1.0), gaussian([1.0], 0.7)
    out = MutualInformation((b,), (0.4, 0.6)).value(a)
    exact = MutualInformation((line(b),), (0.4, 0.6)).value(line(a)).value
    assert out.standard_error > 0
    assert abs(out.value - exact) < 4.5 * out.standard_error


def test_separated_components_by_what_they_are_tilts_of() -> None:
    """Their own samples do not know the normaliser of their ratio; those of the prior do."""
    prior, slope = FlowDensity(TWO.flow(hidden=())), Linear(6.0)
    # The tilt by 6 x moves the right one of the two Gaussians by 6 * 0.4^2.
    a, b = (
        FlowDensity(gaussian([sign * 2.96], 0.4).flow(hidden=()), log=prior.log + sign * slope)
        for sign in (1, -1)
    )
    with pytest.raises(UnsupportedError, match="normaliser"):
        MutualInformation((b,)).value(a)
    out = MutualInformation((b,), (0.3, 0.7), reference=prior).value(a)
    assert out.value == pytest.approx(-(0.3 * math.log(0.3) + 0.7 * math.log(0.7)), abs=1e-3)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="at least one other"):
        MutualInformation(())
    with pytest.raises(ConfigError, match="2 positive numbers"):
        MutualInformation((TWO,), (0.5, 0.2, 0.3))
    with pytest.raises(CapabilityError, match="MutualInformation needs values"):
        MutualInformation((TWO,)).value(Empirical(torch.zeros(5, 1)))


def discover(
    p: Quadrature, count: int, rates: list[float], **options: object
) -> tuple[list[Solution[Quadrature]], list[float]]:
    seen: list[float] = []

    def note(number: int, objective: Estimate) -> None:
        seen.append(objective.value)

    out = discover_modes(
        p, count, GridSolver(), rates, prior=p, density=identity, context=Context(),
        on_iterate=note, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return out, seen


def test_two_components_share_two_modes() -> None:
    """At anchor a the optimum is (1 - a) log 2: a mode each, their mixture the prior."""
    prior = line(TWO)
    out, seen = discover(prior, 2, [0.5] * 60, anchor=0.5)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(seen))
    assert seen[-1] == pytest.approx(0.5 * math.log(2), rel=1e-3)
    means = sorted(float(s.model.expect(lambda x, c: x[:, 0])) for s in out)
    assert means == pytest.approx([-2, 2], abs=0.02)
    mixture = 0.5 * (out[0].model.probabilities + out[1].model.probabilities)
    assert float((mixture - prior.probabilities).abs().sum()) / 2 < 0.01


def test_three_components_in_two_dimensions() -> None:
    """Three of the six modes of a ring can be told apart by two each: I near log 3."""
    angle = torch.arange(6, dtype=torch.float64) * math.pi / 3
    ring = GaussianMixture(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.25)
    nodes = axis(-3.2, 3.2, 41)
    _, seen = discover(Quadrature.of([nodes, nodes], ring.log), 3, [0.5] * 60, anchor=0.3)
    assert 0.9 * 0.7 * math.log(3) < seen[-1] <= 0.7 * math.log(3) + 1e-9


def test_with_a_utility() -> None:
    """A common reward moves all components, and they still part."""
    prior = line(gaussian([0.0], 1.0))
    right = ExpectedReward(Differentiable(lambda x: x[:, 0]))
    plain, _ = discover(prior, 2, [0.4] * 30, anchor=0.5)
    moved, _ = discover(prior, 2, [0.4] * 30, anchor=0.5, utility=right)

    def mean(solutions: list[Solution[Quadrature]]) -> float:
        return sum(float(s.model.expect(lambda x, c: x[:, 0])) for s in solutions) / 2

    assert mean(moved) > mean(plain) + 0.5
    centres = [float(s.model.expect(lambda x, c: x[:, 0])) for s in moved]
    assert abs(centres[0] - centres[1]) > 0.5


def test_starts_are_far_apart() -> None:
    """Every component of a ring's start is drawn to a mode of its own."""
    prior = line(TWO)
    tilts = far_apart(prior, 2, Seed(0))
    x = torch.tensor([[-2.0], [2.0]], dtype=torch.float64)
    preferred = [int(t.value(x).argmax()) for t in tilts]
    assert sorted(preferred) == [0, 1]


def test_bad_arguments() -> None:
    prior = line(TWO)
    with pytest.raises(ConfigError, match="1 components"):
        discover(prior, 1, [0.5])
    with pytest.raises(ConfigError, match="3 positive numbers"):
        discover(prior, 3, [0.5], weights=[0.5, 0.5])
    gradless = [BlackBox(lambda x: x[:, 0])] * 2

    from tiltflow.solvers import AdjointMatching

    with pytest.raises(CapabilityError, match="AdjointMatching needs"):
        discover_modes(
            TWO.flow(), 2, AdjointMatching(), [0.5], prior=TWO, density=lambda m, s: TWO,
            context=Context(), apart=gradless,
        )  # fmt: skip
