from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles import axis, grid, moments
from tiltflow.analytic import GaussianMixture, gaussian, ring
from tiltflow.density import (
    Bank,
    Density,
    Empirical,
    FlowDensity,
    Mixture,
    Quadrature,
    require_log,
)
from tiltflow.errors import CapabilityError, ConfigError, ShapeError
from tiltflow.potential import ZERO
from tiltflow.rewards.points import Linear, Quadratic
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond

F64 = torch.float64
MIXTURE = GaussianMixture([[-1.0], [1.5]], [[0.6], [0.4]], [0.3, 0.7])


def first(x: Tensor, cond: Cond | None = None) -> Tensor:
    return x[:, 0]


def test_quadrature_of_a_gaussian() -> None:
    """Mass 1, mean m, variance s^2, entropy log(s sqrt(2 pi e)): 1e-9."""
    p = grid(gaussian([0.5], 0.7), -8, 9, 4001)
    assert float(p.probabilities.sum()) == pytest.approx(1, abs=1e-12)
    mean, std = moments(p)
    assert mean == pytest.approx(0.5, abs=1e-9)
    assert std == pytest.approx(0.7, rel=1e-9)
    entropy = -float(p.expect(p.log.value))
    assert entropy == pytest.approx(math.log(0.7 * math.sqrt(2 * math.pi * math.e)), rel=1e-9)
    assert p.estimate(first).standard_error == 0


def test_quadrature_normalises() -> None:
    """A log-density with any constant gives the same density, and normalised values."""
    p = Quadrature.of([axis(-8, 9, 2001)], lambda x: Quadratic(0.5, 2.0).value(x) + 17)
    exact = gaussian([0.5], 0.5**0.5)
    torch.testing.assert_close(p.log.value(p.nodes), exact.log.value(p.nodes), rtol=0, atol=1e-9)


def test_quadrature_in_two_dimensions() -> None:
    """Moments of a product of Gaussians on a plane; node (i, j) is (axis_1[i], axis_2[j])."""
    axes = [axis(-7, 7, 141), axis(-5, 6, 121)]
    p = Quadrature.of(axes, GaussianMixture([[0.4, -0.2]], [[0.9, 0.6]]).log)
    assert p.nodes.shape == (141 * 121, 2)
    assert torch.equal(p.nodes[121], torch.stack([axes[0][1], axes[1][0]]))
    for d, (m, s) in enumerate(((0.4, 0.9), (-0.2, 0.6))):
        mean = float(p.expect(lambda x, c, d=d: x[:, d]))
        assert mean == pytest.approx(m, abs=1e-9)
        square = float(p.expect(lambda x, c, d=d: (x[:, d] - mean) ** 2))  # noqa: B023
        assert square == pytest.approx(s**2, rel=1e-9)


def test_grid_potential() -> None:
    """Exact at (equal) nodes, interpolated between; gradients are second order in the cell."""
    errors = []
    for n in (401, 801):
        p = grid(MIXTURE, -6, 6, n)
        assert torch.equal(p.log.value(p.nodes.clone()), p.log.value(p.nodes))
        x = torch.linspace(-2, 3, 37, dtype=F64)[:, None]
        errors.append(float((p.log.grad(x) - MIXTURE.log.grad(x)).abs().max()))
        gap = float((p.log.value(x) - MIXTURE.log.value(x)).abs().max())
        assert gap < 2e-3 * (401 / n) ** 2
    assert 3 < errors[0] / errors[1] < 6


def test_total_variation() -> None:
    """TV of N(a, 1) and N(b, 1) is erf(|a - b| / (2 sqrt 2)); a distance from itself is 0."""
    p, q = (grid(gaussian([m], 1.0), -10, 10, 4001) for m in (0.0, 0.6))
    assert p.total_variation(q) == pytest.approx(math.erf(0.3 / math.sqrt(2)), abs=1e-6)
    assert p.total_variation(p) == 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 9)), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
)
def test_quantile(atoms: list[tuple[int, int]], level: float) -> None:
    """The smallest y with P(f <= y) >= level, by brute force over the atoms."""
    values = torch.tensor([[float(v)] for v, _ in atoms])
    weights = torch.tensor([float(w) for _, w in atoms], dtype=F64)
    p = Empirical(values, weights)
    y = float(p.quantile(first, level))
    mass = weights / weights.sum()
    reached = [v for v in sorted({float(v) for v, _ in atoms})
               if float(mass[values[:, 0] <= v].sum()) >= level * (1 - 1e-9)]  # fmt: skip
    assert y == reached[0]


def test_gaussian_quantile() -> None:
    """The 0.8-quantile of N(.5, .7^2) within a cell of the grid."""
    p = grid(gaussian([0.5], 0.7), -8, 9, 4001)
    exact = 0.5 + 0.7 * 0.8416212335729143
    assert float(p.quantile(first, 0.8)) == pytest.approx(exact, abs=17 / 4000)


def test_empirical() -> None:
    """Weighted means with their standard error; weights are normalised; log p is unknown."""
    x = torch.tensor([[0.0], [1.0], [2.0]])
    p = Empirical(x, torch.tensor([2.0, 1.0, 1.0]))
    assert float(p.expect(first)) == 0.75
    out = p.estimate(first)
    w, f = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, 1.0, 2.0])
    assert out.standard_error == pytest.approx(float((w * (f - 0.75)).norm()))
    assert out.count == 3
    assert p.bank.effective_size == pytest.approx(1 / 0.375)
    assert p.log.offers is Access.NONE
    assert float(Empirical(x).expect(first)) == pytest.approx(1.0)


def test_mixture() -> None:
    """Of densities with logs: log, score, bank and moments are those of the Gaussian mixture."""
    parts = [gaussian([-1.0], 0.6), gaussian([1.5], 0.4)]
    p = Mixture(parts, [3, 7])
    x = torch.linspace(-3, 3, 50, dtype=F64)[:, None]
    torch.testing.assert_close(p.log.value(x), MIXTURE.log.value(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.log.grad(x), MIXTURE.log.grad(x), rtol=1e-10, atol=1e-10)
    assert float(p.bank.weights.sum()) == pytest.approx(1)
    on_grids = Mixture([grid(q, -8, 8, 2001) for q in parts], [0.3, 0.7])
    assert on_grids.bank.exact
    assert float(on_grids.expect(first)) == pytest.approx(0.3 * -1 + 0.7 * 1.5, abs=1e-9)


def test_mixture_needs_values() -> None:
    """The score of a mixture needs responsibilities: of score-only parts nothing is offered."""
    parts = [FlowDensity(gaussian([m]).flow(hidden=())) for m in (0.0, 1.0)]
    assert Mixture(parts).log.offers is Access.NONE


def test_flow_density() -> None:
    """The bank is drawn once, from its seed; the score is the model's, near t = 1."""
    p = FlowDensity(MIXTURE.flow(hidden=()), num_samples=500, sampler=Sampler(num_steps=5))
    assert "bank" not in p.__dict__
    assert p.bank is p.bank
    assert p.bank.points.shape == (500, 1)
    again = FlowDensity(p.model, num_samples=500, sampler=p.sampler)
    assert torch.equal(again.bank.points, p.bank.points)
    assert p.log.offers is Access.GRAD
    x = torch.linspace(-2, 2, 20, dtype=F64)[:, None]
    errors = [
        float((FlowDensity(p.model, score_time=t).log.grad(x) - MIXTURE.log.grad(x)).abs().max())
        for t in (0.99, 0.999)
    ]
    assert errors[0] < 0.5
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.15)  # first order in 1 - score_time


def test_with_log_shares_the_bank() -> None:
    """A better log-density changes log p and nothing else: not one sample is drawn again."""
    p = FlowDensity(MIXTURE.flow(hidden=()), num_samples=50, sampler=Sampler(num_steps=5))
    undrawn = p.with_log(MIXTURE.log)
    assert "bank" not in undrawn.__dict__
    bank = p.bank
    known = p.with_log(MIXTURE.log)
    assert known.bank is bank
    assert torch.equal(undrawn.bank.points, bank.points)
    assert known.log is MIXTURE.log
    assert p.log.offers is Access.GRAD


def test_conditional_bank() -> None:
    """Conditions are drawn with the bank, from its seed, and stay beside the points."""

    class Labels:
        def draw(self, count: int, seed: Seed) -> Cond:
            return {"y": torch.randint(3, (count,), generator=seed.generator())}

    p = FlowDensity(
        MIXTURE.flow(hidden=()), num_samples=20, sampler=Sampler(num_steps=3), conditions=Labels()
    )
    cond = p.bank.cond
    assert cond is not None
    assert set(cond["y"].tolist()) == {0, 1, 2}  # type: ignore[union-attr]
    out = p.expect(lambda x, c: (c["y"] == 1).double())  # type: ignore[index]
    assert 0 < float(out) < 1


@pytest.mark.parametrize("density", [MIXTURE, gaussian([0.5, -1.0], [0.7, 1.2])])
def test_gaussian_mixture_is_normalised(density: GaussianMixture) -> None:
    """The integral of exp(log p) is 1, and grid moments equal those of exact samples."""
    d = density.means.shape[1]
    axes = [axis(-10, 10, 2001 if d == 1 else 201)] * d
    p = Quadrature.of(axes, density.log)
    cell = float(axes[0][1] - axes[0][0]) ** d
    assert float(density.log.value(p.nodes).exp().sum()) * cell == pytest.approx(1, abs=1e-9)
    n = 40_000
    x = density.sample(n, Seed(3))
    mean = float(p.expect(first))
    std = math.sqrt(float(p.expect(lambda x, c: (x[:, 0] - mean) ** 2)))
    assert abs(float(x[:, 0].mean()) - mean) < 4.5 * std / math.sqrt(n)


@pytest.mark.parametrize(("slope", "curvature"), [(0.8, 0.0), (0.3, 1.5), (-0.5, -0.5)])
def test_tilt(slope: float, curvature: float) -> None:
    """p e^{a x - c x^2 / 2} / Z, and log Z, equal the tilt on a grid: 1e-9."""
    tilted, log_z = MIXTURE.tilted(slope, curvature)
    nodes = axis(-10, 10, 8001)[:, None]
    log = MIXTURE.log.value(nodes) + slope * nodes[:, 0] - 0.5 * curvature * nodes[:, 0] ** 2
    assert log_z == pytest.approx(float(torch.logsumexp(log, 0)) + math.log(20 / 8000), abs=1e-9)
    p = Quadrature([nodes[:, 0]], log)
    torch.testing.assert_close(p.table.exp(), tilted.log.value(nodes).exp(), rtol=0, atol=1e-10)


def test_impossible_tilt() -> None:
    """A tilt that outgrows the Gaussian tails has no normaliser."""
    with pytest.raises(ConfigError, match="not integrable"):
        MIXTURE.tilted(0.0, -4.0)


def test_ring() -> None:
    """Eight components at distance 2, the first at angle 0."""
    p = ring()
    torch.testing.assert_close(p.means.norm(dim=1), torch.full((8,), 2.0, dtype=F64))
    torch.testing.assert_close(p.means[0], torch.tensor([2.0, 0.0], dtype=F64))


def test_missing_log_is_named() -> None:
    """The message says who needs what, which density lacks it, and what to use instead."""
    with pytest.raises(CapabilityError, match=r"Renyi needs VALUE.*FlowDensity offers GRAD"):
        require_log(FlowDensity(MIXTURE.flow(hidden=())), Access.VALUE, "Renyi")
    require_log(MIXTURE, Access.BOTH, "Renyi")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Bank(torch.zeros(3, 1), torch.ones(2)), ShapeError, "3 points"),
        (lambda: Empirical(torch.zeros(2, 1), torch.tensor([1.0, -1.0])), ConfigError, "weights"),
        (lambda: Empirical(torch.zeros(2, 1), torch.zeros(2)), ConfigError, "weights"),
        (lambda: Mixture([]), ConfigError, "positive weight"),
        (lambda: Mixture([MIXTURE], [0.5, 0.5]), ConfigError, "positive weight"),
        (lambda: Quadrature([axis(0, 1, 5)], torch.zeros(4)), ShapeError, "one axis"),
        (lambda: Quadrature([axis(0, 1, 2)] * 3, torch.zeros(2, 2, 2)), ShapeError, "at most two"),
        (lambda: GaussianMixture([0.0]), ConfigError, "components"),  # type: ignore[arg-type]
        (lambda: GaussianMixture([[0.0]], -1.0), ConfigError, "positive"),
        (lambda: FlowDensity(MIXTURE.flow(), score_time=1.0), ConfigError, "score_time"),
    ],
)
def test_bad_densities(make: object, error: type[Exception], match: str) -> None:
    """Impossible densities are refused at construction."""
    with pytest.raises(error, match=match):
        make()  # type: ignore[operator]


def test_exact_densities_offer_both() -> None:
    """Quadrature and analytic logs have values and gradients; so has the zero potential."""
    densities: list[Density] = [MIXTURE, grid(MIXTURE, -5, 5, 101)]
    assert all(p.log.offers is Access.BOTH for p in densities)
    assert ZERO.offers is Access.BOTH
    assert Linear(1.0).offers is Access.BOTH
