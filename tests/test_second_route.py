"""Every value on a grid by a second route, written from the formulas without the library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oracles import axis, values
from oracles.values import Nodes, Value
from tiltflow import divergences, utilities
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Quadrature
from tiltflow.features import FeatureMap
from tiltflow.functional import Functional
from tiltflow.potential import Differentiable

AXIS = axis(-4, 4, 81)
P = Quadrature.of([AXIS], GaussianMixture([[-1.0], [1.2]], [0.6, 0.5], [0.4, 0.6]).log)
PRIOR = Quadrature.of([AXIS], gaussian([0.2], 1.1).log)
X = AXIS[:, None]
PHI = FeatureMap(lambda x: torch.stack([x[:, 0], x[:, 0].cos()], 1))
R = Differentiable(lambda x: x[:, 0].sin() + 0.3 * x[:, 0])
ON = Nodes(X, 0.1, R.value(X), PHI.value(X))
Q = PRIOR.probabilities

PAIRS: dict[str, tuple[Functional, Value]] = {
    "mean": (utilities.ExpectedReward(R), values.expected_reward(ON)),
    "left tail": (utilities.LeftCVaR(R, 0.23), values.left_cvar(ON, 0.23)),
    "right tail": (utilities.RightCVaR(R, 0.77), values.right_cvar(ON, 0.77)),
    "mean less variance": (utilities.MeanVariance(R, 0.7), values.mean_variance(ON, 0.7)),
    "entropic risk": (utilities.EntropicRisk(R, -0.8), values.entropic_risk(ON, -0.8)),
    "entropy": (utilities.Entropy(), values.entropy(ON)),
    "barrier": (utilities.LogBarrier(R, lower=-1.5), values.log_barrier(ON, -1.5)),
    "D": (utilities.OptimalDesign(PHI, "D", 0.1), values.design(ON, "D", 0.1)),
    "A": (utilities.OptimalDesign(PHI, "A", 0.1), values.design(ON, "A", 0.1)),
    "E": (utilities.OptimalDesign(PHI, "E", 0.1), values.design(ON, "E", 0.1)),
    "KL": (divergences.KL(PRIOR), values.kl(ON, Q)),
    "forward KL": (divergences.ForwardKL(PRIOR), values.forward_kl(ON, Q)),
    "Renyi": (divergences.Renyi(PRIOR, 0.5), values.renyi(ON, Q, 0.5)),
    "chi-square": (divergences.ChiSquare(PRIOR), values.chi_square(ON, Q)),
    "Hellinger": (divergences.Hellinger(PRIOR), values.hellinger(ON, Q)),
    "Jensen-Shannon": (divergences.JensenShannon(PRIOR), values.jensen_shannon(ON, Q)),
    "W1": (divergences.Wasserstein(PRIOR), values.wasserstein(ON, Q)),
    "energy": (divergences.EnergyDistance(PRIOR), values.energy_distance(ON, Q)),
}
pairs = pytest.mark.parametrize(("functional", "value"), PAIRS.values(), ids=PAIRS)


@pairs
def test_value(functional: Functional, value: Value) -> None:
    assert functional.value(P).value == pytest.approx(float(value(P.probabilities, 0.0)), rel=1e-9)


SMOOTH = [n for n in PAIRS if n not in ("left tail", "right tail", "W1")]


@pytest.mark.parametrize("name", SMOOTH)
def test_first_variation_is_the_gradient(name: str) -> None:
    """Autograd through the second route, up to a constant: 1e-8 of its spread."""
    functional, value = PAIRS[name]
    p = P.probabilities.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(p, 0.0), p)
    variation = functional.first_variation(P).value(P.nodes)
    weights: Callable[[torch.Tensor], torch.Tensor] = lambda f: (f * P.probabilities).sum()  # noqa: E731
    difference = (gradient - weights(gradient)) - (variation - weights(variation))
    spread = float(weights((variation - weights(variation)) ** 2).sqrt())
    assert float(weights(difference**2).sqrt()) < 1e-8 * max(spread, 1.0)
