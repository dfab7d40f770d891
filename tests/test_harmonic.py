"""Conformer flows: harmonic priors are white noise in other coordinates; ETFlow's path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiltflow.adapters.harmonic import Bridge, HarmonicPrior, OfPositions, whitened
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Heun
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, ZeroMean
from tiltflow.types import Cond

CHAIN = HarmonicPrior([(0, 1), (1, 2), (2, 3), (3, 4)], 5, stiffness=2.0)
RING = HarmonicPrior([(0, 1), (1, 2), (2, 3), (3, 0), (1, 3), (3, 1)], 4)
PRIORS = pytest.mark.parametrize("prior", [CHAIN, RING], ids=["chain", "ring"])


def covariance(prior: HarmonicPrior) -> Tensor:
    """The pseudo-inverse of the precision, by another way than the class's."""
    n, edges = prior.atoms, {tuple(sorted(e)) for e in prior.edges}
    incidence = torch.zeros(len(edges), n, dtype=torch.float64)
    for row, (i, j) in enumerate(sorted(edges)):
        incidence[row, i], incidence[row, j] = 1, -1
    return torch.linalg.pinv(prior.stiffness * incidence.T @ incidence)


def zero_mean(count: int, atoms: int, seed: int = 0) -> Tensor:
    space = ZeroMean((atoms, 3))
    return space.noise(count, Seed(seed).generator(), dtype=torch.float64)


class Normal(nn.Module):
    """What a network learns of x_1 ~ N(0, data) from x_0 ~ N(0, noise), per coordinate."""

    def __init__(self, data: Tensor, noise: Tensor, predicts: str) -> None:
        super().__init__()
        self.data, self.noise, self.predicts = data, noise, predicts
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b = t[:, None, None], 1 - t[:, None, None]
        data, noise = self.data.to(x), self.noise.to(x)
        solved = torch.linalg.pinv(a**2 * data + b**2 * noise, hermitian=True) @ x
        outputs = {
            "endpoint": a * data @ solved,
            "noise": b * noise @ solved,
            "velocity": a * data @ solved - b * noise @ solved,
            "score": -solved,
        }
        return self.weight * outputs[self.predicts]


@PRIORS
def test_the_root_is_a_root(prior: HarmonicPrior) -> None:
    """L L^T = S, and L^+ undoes L on states of zero mean, which stay there."""
    z = zero_mean(3, prior.atoms)
    assert torch.allclose(prior.root @ prior.root.T, covariance(prior), atol=1e-12)
    assert torch.allclose(prior.whitened(prior.positions(z)), z, atol=1e-12)
    assert float(prior.positions(z).mean(1).abs().max()) < 1e-12


@PRIORS
def test_white_noise_becomes_harmonic(prior: HarmonicPrior) -> None:
    """Every entry of the covariance of 20,000 samples, within 4.5 standard errors."""
    x = prior.positions(zero_mean(20_000, prior.atoms))
    samples = x.permute(0, 2, 1).reshape(-1, prior.atoms)
    exact = covariance(prior)
    products = samples[:, :, None] * samples[:, None]
    error = products.std(0) / len(samples) ** 0.5
    assert bool(((products.mean(0) - exact).abs() < 4.5 * error).all())


def test_bonds_of_a_tree_have_the_length_that_is_said() -> None:
    difference = (
        covariance(CHAIN)[[0, 0, 1, 1], [0, 1, 0, 1]] @ torch.tensor([1.0, -1, -1, 1]).double()
    )
    assert float(3 * difference) == pytest.approx(3 / CHAIN.stiffness)


@pytest.mark.parametrize("predicts", ["endpoint", "noise", "velocity", "score"])
@PRIORS
def test_predictions_in_white_coordinates(prior: HarmonicPrior, predicts: str) -> None:
    """All kinds of networks are one model: E[z_1 | z_t] = L^+ E[x_1 | x_t], at its samples the
    law of the data."""
    mixing = torch.randn(prior.atoms, prior.atoms, generator=Seed(4).generator()).double()
    centre = torch.eye(prior.atoms).double() - 1 / prior.atoms
    data = centre @ mixing @ mixing.T @ centre
    net = Normal(data, covariance(prior), predicts)
    model = whitened(net, Linear(), prior, predicts=predicts)
    z, t = zero_mean(6, prior.atoms, 1), torch.linspace(0.1, 0.9, 6).double()
    x = prior.positions(z)
    with torch.no_grad():
        end = Normal(data, covariance(prior), "endpoint")(x, t)
        assert torch.allclose(model.endpoint(z, t), prior.whitened(end), atol=1e-8)
        back = t[:, None, None] * model.endpoint(z, t) + (1 - t)[:, None, None] * model.noise(z, t)
        assert torch.allclose(back, z, atol=1e-8)


class Conditional(nn.Module):
    """Moves all end points towards what the condition says."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x + torch.as_tensor(cond["towards"])


def test_networks_with_conditions() -> None:
    model = whitened(Conditional(), Linear(), CHAIN, predicts="endpoint", takes_cond=True)
    z, towards = zero_mean(2, 5), zero_mean(2, 5, 1)
    end = CHAIN.positions(model.endpoint(z, 0.5, {"towards": towards}))
    assert torch.allclose(end, CHAIN.positions(z) + towards, atol=1e-12)


def test_samples_have_the_law_of_the_data() -> None:
    """By the ODE in white coordinates, read in positions."""
    data = 0.5 * covariance(HarmonicPrior([(0, 2), (2, 4), (4, 1), (1, 3)], 5))
    model = whitened(
        Normal(data, covariance(CHAIN), "velocity"), Linear(), CHAIN, predicts="velocity"
    )
    z = Sampler(Heun(), 40).sample(model, 4000, seed=Seed(2), dtype=torch.float64)
    samples = CHAIN.positions(z).permute(0, 2, 1).reshape(-1, 5)
    products = samples[:, :, None] * samples[:, None]
    error = products.std(0) / len(samples) ** 0.5
    assert bool(((products.mean(0) - data).abs() < 4.5 * error).all())


def test_rewards_of_positions() -> None:
    """The gradient in white coordinates, by central differences along it."""
    reward = OfPositions(Quadratic(0.3, 2.0), CHAIN)
    z = zero_mean(4, 5)
    value, grad = reward.value_and_grad(z)
    assert torch.allclose(value, Quadratic(0.3, 2.0).value(CHAIN.positions(z)))
    assert torch.equal(reward.value(z), value)
    assert torch.equal(reward.grad(z), grad)
    step = 1e-5 * grad
    slope = (reward.value(z + step) - reward.value(z - step)) / 2e-5
    assert torch.allclose(slope, grad.square().sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("edges", "atoms", "stiffness", "match"),
    [
        ([(0, 1), (2, 3)], 4, 1.0, "do not connect all atoms"),
        ([(0, 1)], 3, 1.0, "do not connect all atoms"),
        ([(0, 0), (0, 1)], 2, 1.0, r"edge \(0, 0\) is not a pair"),
        ([(0, 2)], 2, 1.0, r"edge \(0, 2\) is not a pair"),
        ([], 1, 1.0, "atoms >= 2"),
        ([(0, 1)], 2, 0.0, "stiffness > 0"),
    ],
)
def test_wrong_graphs_are_refused(
    edges: list[tuple[int, int]], atoms: int, stiffness: float, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        HarmonicPrior(edges, atoms, stiffness)


# --- ETFlow's path ------------------------------------------------------------------------------


class ETFlowVelocity(nn.Module):
    """E[x_1 - x_0 + (s sqrt(t (1 - t)))' n | x_t] of x_1 ~ N(0, variance), x_0 and n white."""

    def __init__(self, variance: float, noise: float) -> None:
        super().__init__()
        self.variance, self.noise = variance, noise

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        width = self.noise * (t * (1 - t)).sqrt()
        slope = self.noise * (1 - 2 * t) / (2 * (t * (1 - t)).sqrt())
        shared = t * self.variance - (1 - t) + slope * width
        return shared / (t**2 * self.variance + (1 - t) ** 2 + width**2) * x


def test_the_path_of_etflow() -> None:
    """Derivatives by differences; its velocity network gives the posterior mean of the data."""
    schedule, t = Bridge(0.3), torch.linspace(0.01, 0.95, 40).double()
    h = 1e-6
    slope = (schedule.beta(t + h) - schedule.beta(t - h)) / (2 * h)
    assert torch.allclose(schedule.d_beta(t), slope, atol=1e-6)
    ends = schedule.beta(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [1, 0]
    assert torch.allclose(Bridge(0.0).beta(t), Linear().beta(t))
    model = FlowModel(ETFlowVelocity(2.5, 0.3), schedule, Euclidean((1,)), predicts="velocity")
    x = torch.linspace(-2, 2, 40).double()[:, None]
    total = t**2 * 2.5 + schedule.beta(t) ** 2
    assert torch.allclose(model.endpoint(x, t)[:, 0], t * 2.5 / total * x[:, 0], atol=1e-10)
    with pytest.raises(ConfigError, match="must not be negative"):
        Bridge(-0.1)
