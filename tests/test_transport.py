"""Optimal transport: duality, closed forms, and that the three ways agree."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import ot
import pytest
import torch
from torch import Tensor

from oracles import GATEAUX_PRIOR, axis, grid
from oracles.gateaux import PRIOR, P, gateaux, nodes
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.density import Bank, Density, Empirical, Quadrature, Reweighted
from tiltflow.divergences import Wasserstein
from tiltflow.errors import (
    CapabilityError,
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from tiltflow.potential import Differentiable, Potential
from tiltflow.seed import Seed
from tiltflow.transport import Entropic, Ground, Power, Transport, exact, line, sinkhorn, thinned
from tiltflow.types import Access

powers = pytest.mark.parametrize("power", [1, 2])


def normal(count: int, dimension: int, *label: str | int) -> Tensor:
    generator = Seed(5).child(*label).generator()
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def bank(count: int, dimension: int, *label: str | int) -> Bank:
    """Normal points with unequal weights."""
    w = torch.rand(count, generator=Seed(6).child(*label).generator(), dtype=torch.float64)
    return Bank(normal(count, dimension, *label), w / w.sum())


def costs(x: Tensor, y: Tensor, power: int, metric: Sequence[float] = ()) -> Tensor:
    """d(x, y)^power, written out."""
    scales = torch.tensor(list(metric) or [1.0] * x.shape[1], dtype=torch.float64)
    difference = (x[:, None] - y[None]) * scales
    return difference.square().sum(-1).sqrt() ** power


def optimum(p: Bank, q: Bank, cost: Tensor) -> float:
    return float(ot.lp.emd2(p.weights.numpy(), q.weights.numpy(), cost.numpy()))


def require_dual_optimum(out: Transport, p: Bank, q: Bank, cost: Tensor, size: float) -> None:
    """Feasible potentials whose value is the cost: both are optimal (linear duality)."""
    f, g = out.first.value(p.points), out.second.value(q.points)
    # The constants of f and g are free: take the smallest slack as zero.
    slack = cost - f[:, None] - g
    shift = float(slack[p.weights > 0][:, q.weights > 0].min())
    dual = float(p.weights @ f + q.weights @ g) + shift
    assert dual == pytest.approx(out.cost, abs=1e-9 * size)


def require_gradient(potential: Potential, x: Tensor, tolerance: float = 1e-5) -> None:
    """The gradient is that of the value."""
    grad, h = potential.grad(x), 1e-6
    for d in range(x.shape[1]):
        e = torch.zeros(x.shape[1], dtype=x.dtype)
        e[d] = h
        numeric = (potential.value(x + e) - potential.value(x - e)) / (2 * h)
        torch.testing.assert_close(grad[:, d], numeric, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------- one dimension


def tied(count: int, label: str, case: str) -> Bank:
    """Weighted points on a line; some cases have ties of points, of levels, or zero weights."""
    out = bank(count, 1, label)
    if case == "points":
        return Bank((out.points * 2).round() / 2, out.weights)
    if case == "levels":
        return Bank.equal(out.points)
    if case == "zeros":
        w = out.weights * (torch.arange(1, count + 1) % 3 > 0)
        return Bank(out.points, w / w.sum())
    return out


@powers
@pytest.mark.parametrize("case", ["generic", "points", "levels", "zeros"])
@pytest.mark.parametrize("sizes", [(40, 40), (30, 60), (1, 7), (5, 1), (1, 1)])
def test_line_is_optimal(power: Power, case: str, sizes: tuple[int, int]) -> None:
    """Cost of the linear program; feasible potentials of that value; metrics are units."""
    p, q = tied(sizes[0], "p", case), tied(sizes[1], "q", case)
    q = Bank(1.5 * q.points + 0.3, q.weights)
    for metric in (None, (2.5,)):
        out = line(p, q, Ground(power, metric))
        cost = costs(p.points, q.points, power, metric or ())
        best = optimum(p, q, cost)
        assert out.cost == pytest.approx(best, rel=1e-9, abs=1e-12)
        require_dual_optimum(out, p, q, cost, best + 1)


@powers
def test_line_potential_beyond_the_points(power: Power) -> None:
    """It is continued with its last slope, and the gradient is that of the value everywhere."""
    p, q = bank(25, 1, "p"), bank(30, 1, "q")
    for potential in (line(p, q, Ground(power, (1.7,))).first, line(p, q, Ground(power)).second):
        x = torch.linspace(-6, 6, 97, dtype=torch.float64)[:, None] + 0.0123
        require_gradient(potential, x)
        far = potential.grad(torch.tensor([[-50.0], [-6.0], [6.0], [50.0]], dtype=torch.float64))
        torch.testing.assert_close(far[0], far[1])
        torch.testing.assert_close(far[2], far[3])


@powers
def test_line_weights_are_repetitions(power: Power) -> None:
    p, q = bank(12, 1, "p"), bank(15, 1, "q")
    counts = torch.arange(12) % 3 + 1
    weighted = line(Bank(p.points, counts.double() / counts.sum()), q, Ground(power))
    repeated = line(Bank.equal(p.points.repeat_interleave(counts, 0)), q, Ground(power))
    assert weighted.cost == pytest.approx(repeated.cost, rel=1e-12)
    x = normal(9, 1, "at")
    torch.testing.assert_close(weighted.first.grad(x), repeated.first.grad(x))


@powers
def test_line_envelope(power: Power) -> None:
    """Moving an atom changes the cost by its weight times the gradient there."""
    p, q, h = bank(20, 1, "p"), bank(33, 1, "q"), 1e-7
    out = line(p, q, Ground(power))
    checked = 0
    for i in range(20):
        step = torch.zeros_like(p.points)
        step[i] = h
        up, down = (line(Bank(p.points + s, p.weights), q, Ground(power)) for s in (step, -step))
        numeric = (up.cost - down.cost) / (2 * h)
        f = out.first
        around = torch.cat([f.grad(p.points[i : i + 1] + s) for s in (-1e-6, 1e-6)])
        if power == 1 and float(around.diff(dim=0).abs()) > 0:
            continue  # part of the atom goes left, part goes right
        at = float(f.grad(p.points[i : i + 1]))
        assert numeric == pytest.approx(float(p.weights[i]) * at, rel=1e-5, abs=1e-8)
        checked += 1
    assert checked > 10


@powers
def test_line_on_a_grid(power: Power) -> None:
    """Moved and scaled Gaussians: W_1 = |d|, W_2^2 = d^2 + (s - t)^2, and the map, far out."""
    d, s, t = 0.7, 0.9, 1.3
    p, q = grid(gaussian([d], s), -12, 12, 4001), grid(gaussian([0.0], t), -12, 12, 4001)
    shifted = grid(gaussian([d], t), -12, 12, 4001)
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)[:, None] * s + d
    if power == 1:
        assert Wasserstein(q).value(shifted).value == pytest.approx(d, rel=1e-6)
        torch.testing.assert_close(
            Wasserstein(q).first_variation(shifted).grad(x), torch.ones_like(x)
        )
        # F = G where (x - d) / s = x / t: between the two, mass moves outwards and inwards.
        crossing = d / (1 - s / t)
        grad = Wasserstein(q).first_variation(p).grad(x)
        torch.testing.assert_close(grad, torch.where(x < crossing, 1.0, -1.0).double())
    else:
        assert Wasserstein(q, power=2).value(p).value == pytest.approx(
            d**2 + (s - t) ** 2, rel=1e-6
        )
        to = t / s * (x - d)
        grad = Wasserstein(q, power=2).first_variation(p).grad(x)
        torch.testing.assert_close(grad, 2 * (x - to), rtol=0, atol=2e-3)
    require_gradient(Wasserstein(q, power=power).first_variation(p), x + 0.0007)


@powers
def test_gateaux_with_a_metric(power: Power) -> None:
    numeric, predicted = gateaux(Wasserstein(PRIOR, power=power, metric=(3.0,)))
    assert abs(predicted) > 1e-3
    assert numeric == pytest.approx(predicted, rel=1e-6)


@powers
def test_line_of_a_grid_and_samples(power: Power) -> None:
    """A grid against 10 000 samples, either way: the grids' value within 4.5 errors."""
    both = Wasserstein(PRIOR, power=power).value(P).value
    for p, prior in ((P, GATEAUX_PRIOR), (gaussian([-0.3], 0.9), PRIOR)):
        out = Wasserstein(prior, power=power).value(p)
        assert out.standard_error > 0
        assert abs(out.value - both) < 4.5 * out.standard_error


@powers
def test_empty_cells(power: Power) -> None:
    """Nodes whose mass is zero in floating point do no harm."""
    axes = [axis(-60, 60, 1201)]
    p, q = (Quadrature.of(axes, gaussian([m], 1.0).log) for m in (-3.0, 3.0))
    assert float(p.probabilities.min()) == 0
    out = Wasserstein(q, power=power).value(p).value
    assert out == pytest.approx(6.0**power, rel=1e-4)
    grad = Wasserstein(q, power=power).first_variation(p).grad(p.nodes[500:700])
    torch.testing.assert_close(grad, torch.full_like(grad, -1.0 if power == 1 else -12.0))


# ------------------------------------------------------------------------------- exact


@powers
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("metric", [None, (1.0, 7.0, 0.5)])
def test_exact_is_optimal(power: Power, equal: bool, metric: tuple[float, ...] | None) -> None:
    """Feasible potentials of the plan's cost, extended as the c-transform."""
    p, q = bank(60, 3, "p"), bank(60 if equal else 45, 3, "q")
    if equal:
        p, q = Bank.equal(p.points), Bank.equal(q.points)
    cost = costs(p.points, q.points, power, metric or ())
    out = exact(p, q, Ground(power, metric))
    assert out.cost == pytest.approx(optimum(p, q, cost), rel=1e-9)
    require_dual_optimum(out, p, q, cost, out.cost)
    g, x = out.second.value(q.points), normal(5, 3, "at")
    f = (costs(x, q.points, power, metric or ()) - g).min(1).values
    torch.testing.assert_close(out.first.value(x), f)
    require_gradient(out.first, x)


@powers
def test_exact_gradient_at_samples(power: Power) -> None:
    """Equal weights: the gradient at a sample is that of its cost to the one it is sent to."""
    x, y, h = normal(40, 2, "p"), normal(40, 2, "q") + 0.5, 1e-6
    ground, metric = Ground(power, (1.0, 2.0)), torch.tensor([1.0, 2.0], dtype=torch.float64)
    out = exact(Bank.equal(x), Bank.equal(y), ground)
    plan = torch.as_tensor(ot.lp.emd([], [], costs(x, y, power, (1.0, 2.0)).numpy()))
    to = y[plan.argmax(1)]
    grad = 2 * metric**2 * (x - to)
    if power == 1:
        grad = grad / (2 * ((x - to) * metric).norm(dim=1, keepdim=True))
    torch.testing.assert_close(out.first.grad(x), grad)
    for d in range(2):  # and this is how the cost changes
        step = torch.zeros_like(x)
        step[7, d] = h
        up, down = (exact(Bank.equal(x + s), Bank.equal(y), ground).cost for s in (step, -step))
        assert (up - down) / (2 * h) == pytest.approx(float(grad[7, d]) / 40, rel=1e-5)


@powers
def test_exact_potentials_are_in_the_middle(power: Power) -> None:
    """Without transport both potentials vanish at the samples, whatever vertex POT returns."""
    p = bank(50, 2, "p")
    out = exact(p, p, Ground(power))
    assert out.cost == pytest.approx(0, abs=1e-12)
    for potential in (out.first, out.second):
        torch.testing.assert_close(
            potential.value(p.points), torch.zeros_like(p.weights), rtol=0, atol=1e-12
        )


GRID = [axis(-4, 4, 20)] * 2


def square(mean: Sequence[float], std: float) -> Quadrature:
    return Quadrature.of(GRID, gaussian(list(mean), std).log)


@powers
@pytest.mark.parametrize("method", ["auto", "sinkhorn"])
def test_gateaux_on_a_square(power: Power, method: str) -> None:
    """20 x 20 nodes: the derivative along a mixture is that of the potential at the nodes.

    The exact cost is piecewise linear in the weights, so that the step is small.
    """
    p, q = square([0.5, -0.3], 0.9), square([1.0, 0.5], 0.6)
    prior = square([0.0, 0.0], 1.1)

    def mixed(t: float) -> Quadrature:
        return Quadrature(GRID, ((1 - t) * p.table.exp() + t * q.table.exp()).log())

    h = 1e-6
    w = Wasserstein(prior, power, (1.0, 3.0), method, tolerance=1e-10)  # type: ignore[arg-type]
    numeric = (w.value(mixed(0.5 + h)).value - w.value(mixed(0.5 - h)).value) / (2 * h)
    middle = mixed(0.5)
    variation = w.first_variation(middle).value(middle.nodes)
    predicted = float((variation * (q.probabilities - p.probabilities)).sum())
    assert abs(predicted) > 1e-2
    assert numeric == pytest.approx(predicted, rel=1e-6)
    same = square([0.0, 0.0], 1.1)
    assert w.value(same).value == pytest.approx(0, abs=1e-12)
    assert float(w.first_variation(same).value(same.nodes).std()) < 1e-9


def test_exact_without_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence with the command that helps."""
    monkeypatch.setitem(sys.modules, "ot.lp", None)
    with pytest.raises(CapabilityError, match=r"needs POT.*tiltflow\[ot\].*sinkhorn"):
        exact(bank(5, 2, "p"), bank(5, 2, "q"), Ground())


def test_exact_that_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("tiltflow.transport.exact"), "PIVOTS", 1)
    with (
        pytest.warns(UserWarning, match="numItermax"),
        pytest.raises(UnsupportedError, match="stopped"),
    ):
        exact(bank(50, 2, "p"), bank(50, 2, "q"), Ground())


# ------------------------------------------------------------------------------- Sinkhorn


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_sinkhorn_of_a_translation(epsilon: float) -> None:
    """Power 2 and q a translate of p: |A d|^2 and 2 A^2 d at every epsilon, exactly."""
    x, shift, metric = normal(80, 2, "p"), [0.8, -0.3], (1.0, 2.0)
    d = torch.tensor(shift, dtype=torch.float64)
    out = sinkhorn(Bank.equal(x + d), Bank.equal(x), Ground(2, metric), Entropic(epsilon, 1e-10))
    assert out.cost == pytest.approx(0.64 + 4 * 0.09, rel=1e-8)
    grad = out.first.grad(normal(20, 2, "at") + d)
    torch.testing.assert_close(grad, (2 * d * torch.tensor([1.0, 4.0])).expand(20, 2))


def entropic(s: float, t: float, d: float, epsilon: float) -> float:
    """OT of N(d, s^2) and N(0, t^2) with cost |x - y|^2 and entropy KL(plan || p x q)
    (Janati et al., 2020, theorem 1)."""
    v = epsilon / 2
    root = math.sqrt(4 * s**2 * t**2 + v**2)
    return d**2 + s**2 + t**2 - root + v * (1 - math.log(2 * v)) + v * math.log(root + v)


def test_sinkhorn_of_gaussians() -> None:
    """The divergence of two Gaussians in closed form, on a grid."""
    d, s, t = 0.6, 0.8, 1.2
    p, q = grid(gaussian([d], s), -8, 8, 241), grid(gaussian([0.0], t), -8, 8, 241)
    out = Wasserstein(q, 2, method="sinkhorn", epsilon=0.4, tolerance=1e-10).value(p)
    # The median of |X - Y|^2 for X, Y ~ N(0, t^2), on the nodes.
    distance = torch.linspace(0, 16, 241, dtype=torch.float64)
    pairs = (-(distance**2) / (4 * t**2)).exp().cumsum(0)
    pairs = pairs - 1  # different nodes only
    median = float(distance[int(torch.searchsorted(pairs, float(pairs[-1]) / 2))])
    epsilon = 0.4 * median**2
    exact = entropic(s, t, d, epsilon) - 0.5 * (
        entropic(s, s, 0, epsilon) + entropic(t, t, 0, epsilon)
    )
    assert out.value == pytest.approx(exact, rel=1e-6)
    assert out.standard_error == 0


@powers
def test_small_epsilon_is_exact(power: Power) -> None:
    """The three ways agree on a line as epsilon falls."""
    p, q = bank(60, 1, "p"), bank(70, 1, "q")
    q = Bank(q.points + 0.8, q.weights)
    best = line(p, q, Ground(power)).cost
    assert exact(p, q, Ground(power)).cost == pytest.approx(best, rel=1e-9)
    errors = [
        abs(sinkhorn(p, q, Ground(power), Entropic(e, 1e-5)).cost - best) / best
        for e in (0.3, 0.03, 0.003)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@powers
def test_sinkhorn_gradients(power: Power) -> None:
    """The gradient is that of the value; times the weight, how the divergence changes."""
    p, q, h = bank(25, 2, "p"), bank(30, 2, "q"), 1e-5
    ground, how = Ground(power, (1.0, 3.0)), Entropic(0.1, 1e-11)
    out = sinkhorn(p, q, ground, how)
    require_gradient(out.first, normal(7, 2, "at"))
    require_gradient(out.second, normal(7, 2, "at"))
    grad = out.first.grad(p.points)
    for d in range(2):
        step = torch.zeros_like(p.points)
        step[3, d] = h
        up, down = (
            sinkhorn(Bank(p.points + s, p.weights), q, ground, how).cost for s in (step, -step)
        )
        exact_change = float(p.weights[3] * grad[3, d])
        assert (up - down) / (2 * h) == pytest.approx(exact_change, rel=1e-4, abs=1e-7)


@powers
def test_sinkhorn_is_symmetric(power: Power) -> None:
    """Exchanging p and q keeps the cost and exchanges the potentials, up to constants.

    The banks are mirror images, so that both have one scale of epsilon.
    """
    p, how, x = bank(40, 2, "p"), Entropic(0.1, 1e-10), normal(8, 2, "at")
    q = Bank(0.3 - p.points, p.weights)
    one, two = sinkhorn(p, q, Ground(power), how), sinkhorn(q, p, Ground(power), how)
    assert one.cost > 0.01
    assert two.cost == pytest.approx(one.cost, rel=1e-7)
    torch.testing.assert_close(two.second.grad(x), one.first.grad(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.first.grad(x), one.second.grad(x), rtol=1e-5, atol=1e-6)


@powers
def test_sinkhorn_without_transport(power: Power) -> None:
    """0 at p = q, and flat everywhere."""
    p, x = bank(40, 2, "p"), normal(8, 2, "at")
    out = sinkhorn(p, Bank(p.points.clone(), p.weights.clone()), Ground(power), Entropic())
    assert out.cost == 0
    assert float(out.first.grad(x).abs().max()) == 0


def test_sinkhorn_that_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named: how far off it is, and what to change."""
    monkeypatch.setattr(importlib.import_module("tiltflow.transport.sinkhorn"), "ROUNDS", 1)
    with pytest.raises(UnsupportedError, match=r"after 1 rounds .* Raise epsilon"):
        sinkhorn(bank(30, 2, "p"), bank(30, 2, "q"), Ground(2), Entropic(0.01, 1e-8))


def test_sinkhorn_needs_a_scale() -> None:
    """A prior at one point has no median distance; the exact way can take it."""
    prior = Empirical(torch.zeros(30, 2))
    p = Empirical(normal(30, 2, "p"))
    with pytest.raises(ConfigError, match="all alike"):
        Wasserstein(prior, 2).value(p)
    out = Wasserstein(prior, 2, method="exact").value(p)
    assert out.value == pytest.approx(float(p.bank.points.square().sum(1).mean()), rel=1e-9)


@pytest.mark.parametrize("stage", [0.25, 0.01])
def test_relaxation_does_not_change_the_solution(
    monkeypatch: pytest.MonkeyPatch, stage: float
) -> None:
    """However the solver gets there: with and without over-relaxation, in few or many stages."""
    module = importlib.import_module("tiltflow.transport.sinkhorn")
    p, q, x = bank(50, 2, "p"), bank(60, 2, "q"), normal(9, 2, "at")
    first = sinkhorn(p, q, Ground(2), Entropic(0.02, 1e-9))
    monkeypatch.setattr(module, "_relaxation", lambda *_: 1.0)
    monkeypatch.setattr(module, "STAGE", stage)
    plain = sinkhorn(p, q, Ground(2), Entropic(0.02, 1e-9))
    assert first.cost == pytest.approx(plain.cost, rel=1e-7)
    torch.testing.assert_close(first.first.grad(x), plain.first.grad(x), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- the functional


@pytest.mark.parametrize(("power", "method"), [(1, "exact"), (2, "exact"), (2, "sinkhorn")])
@pytest.mark.parametrize("metric", [None, (1.0, 3.0)])
def test_translated_gaussian(
    power: Power, method: str, metric: tuple[float, float] | None
) -> None:
    """Moved by d: W_1 = |A d| and W_2^2 = |A d|^2."""
    z, d = normal(700, 2, "z"), torch.tensor([1.5, 0.5], dtype=torch.float64)
    p, prior = Empirical(z + d), Empirical(normal(700, 2, "q"))
    out = Wasserstein(prior, power, metric, method).value(p)  # type: ignore[arg-type]
    exact = math.hypot(1.5, 0.5 * (metric or (1, 1))[1]) ** power
    assert out.count == 700
    assert abs(out.value - exact) < 4.5 * out.standard_error
    assert out.standard_error < 0.15 * exact


@dataclass(frozen=True)
class Case:
    """Functionals to calibrate, on samples of N(d e_1, I) and N(0, I)."""

    power: Power
    method: str
    dimension: int


@pytest.mark.parametrize(
    "case",
    [Case(1, "exact", 1), Case(2, "exact", 1), Case(1, "exact", 2), Case(2, "sinkhorn", 2)],
    ids=str,
)
def test_standard_errors_are_calibrated(case: Case) -> None:
    """Over 80 pairs of banks the spread of costs is the error (known to 8 %)."""
    origin = [0.0] * case.dimension
    p, q = gaussian([1.0, *origin[1:]], 1.0), gaussian(origin, 1.0)
    out = []
    for k in range(80):
        prior = Empirical(q.sample(150, Seed(k).child("q")))
        w = Wasserstein(prior, case.power, method=case.method)  # type: ignore[arg-type]
        out.append(w.value(Empirical(p.sample(100, Seed(k).child("p")))))
    reported = math.sqrt(sum(o.standard_error**2 for o in out) / 80)
    spread = float(torch.tensor([o.value for o in out]).std())
    assert 0.72 < reported / spread < 1.4


@pytest.mark.parametrize("dimension", [1, 2])
def test_standard_error_of_a_tilt_of_the_prior(dimension: int) -> None:
    """One sample with two weights has one noise; without a tilt there is none."""
    q, psi = gaussian([0.0] * dimension, 1.0), Differentiable(lambda x: 0.5 * x[:, 0])
    out = []
    for k in range(80):
        prior = Empirical(q.sample(150, Seed(k)))
        w = Wasserstein(prior, 2)
        out.append(w.value(Reweighted(prior.bank, prior.log, psi)))
        same = w.value(Reweighted(prior.bank, prior.log))
        assert same.value == pytest.approx(0, abs=1e-12)
        assert same.standard_error < 1e-9
    reported = math.sqrt(sum(o.standard_error**2 for o in out) / 80)
    assert 0.65 < reported / float(torch.tensor([o.value for o in out]).std()) < 1.4


def test_thinning() -> None:
    """Points keep their weights; banks of one size lose the same points; grids lose none."""
    p, q = bank(50, 2, "p"), bank(50, 2, "q")
    seed = Seed(3)
    small, other = thinned(p, 20, seed), thinned(Bank(p.points, q.weights), 20, seed)
    assert torch.equal(small.points, other.points)
    index = [int((p.points == point).all(1).nonzero()) for point in small.points]
    assert len(set(index)) == 20
    torch.testing.assert_close(small.weights, p.weights[index] / p.weights[index].sum())
    assert thinned(p, 50, seed) is p
    with pytest.raises(ConfigError, match="grid of 400 nodes"):
        Wasserstein(square([0.0, 0.0], 1.0), max_points=100).value(square([0.5, 0.0], 1.0))
    gone = next(i for i in range(50) if i not in index)
    hollow = Bank(p.points, torch.eye(50, dtype=torch.float64)[gone])
    with pytest.raises(ConfigError, match="no weight at all"):
        thinned(hollow, 20, seed)


@powers
def test_large_banks_are_thinned(power: Power) -> None:
    """The count and the error are those of what is left."""
    p, prior = Empirical(normal(2000, 2, "p")), Empirical(normal(3000, 2, "q") - 1)
    out = Wasserstein(prior, power, max_points=300).value(p)
    assert out.count == 300
    assert abs(out.value - 2 ** (power / 2)) < 4.5 * out.standard_error
    again = Wasserstein(prior, power, max_points=300).value(p)
    assert again.value == out.value
    other = Wasserstein(prior, power, max_points=300, seed=Seed(9)).value(p)
    assert other.value != out.value


def test_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and first variation at one density share the work, in either order."""
    module, calls = importlib.import_module("tiltflow.divergences.wasserstein"), []
    monkeypatch.setattr(
        module,
        "sinkhorn",
        lambda *a: calls.append(a) or sinkhorn(*a),  # type: ignore[func-returns-value]
    )
    p, w = Empirical(normal(30, 2, "p")), Wasserstein(Empirical(normal(30, 2, "q")), 2)
    assert w.first_variation(p) is w.first_variation(p)
    w.value(p)
    assert len(calls) == 1
    w.value(Empirical(normal(30, 2, "p")))
    assert len(calls) == 2


def test_single_precision_and_shapes() -> None:
    """States of any shape and precision; gradients have theirs."""
    p, q = normal(60, 4, "p").view(60, 1, 2, 2), normal(50, 4, "q").view(50, 1, 2, 2)
    for method in ("exact", "sinkhorn"):
        w = Wasserstein(Empirical(q.float()), 2, (1.0, 2.0, 1.0, 1.0), method)  # type: ignore[arg-type]
        flat = Wasserstein(Empirical(q.flatten(1)), 2, (1.0, 2.0, 1.0, 1.0), method)  # type: ignore[arg-type]
        assert w.value(Empirical(p.float())).value == pytest.approx(
            flat.value(Empirical(p.flatten(1))).value, rel=1e-4
        )
        x = normal(5, 4, "at").view(5, 1, 2, 2)
        grad = w.first_variation(Empirical(p.float())).grad(x.float())
        assert grad.shape == (5, 1, 2, 2)
        assert grad.dtype is torch.float32
        exact = flat.first_variation(Empirical(p.flatten(1))).grad(x.flatten(1))
        torch.testing.assert_close(grad.flatten(1).double(), exact, rtol=1e-3, atol=1e-3)


class Plane:
    """A critic that knows: the projection on the first axis."""

    def fit(self, p: Density, q: Density) -> Potential:
        return Differentiable(lambda x: x[:, 0])


def test_critic() -> None:
    """The cost of a learned potential, with the errors of both banks."""
    p, prior = Empirical(normal(300, 2, "p") + 1), Empirical(normal(400, 2, "q"))
    w = Wasserstein(prior, method="critic", critic=Plane())
    x, y = p.bank.points[:, 0], prior.bank.points[:, 0]
    out = w.value(p)
    assert out.value == pytest.approx(float(x.mean() - y.mean()), rel=1e-9)
    error = math.hypot(float(x.std()) / math.sqrt(300), float(y.std()) / math.sqrt(400))
    assert out.standard_error == pytest.approx(error, rel=1e-2)
    torch.testing.assert_close(
        w.first_variation(p).grad(p.bank.points[:3]),
        torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64),
    )


@pytest.mark.slow
@pytest.mark.parametrize("metric", [None, (1.0, 3.0)])
def test_trained_critic(metric: tuple[float, float] | None) -> None:
    """A trained critic finds the exact cost within 10 %, under an anisotropic metric too."""
    p, prior = Empirical(normal(1500, 2, "p") + 1), Empirical(normal(1500, 2, "q"))
    best = Wasserstein(prior, metric=metric).value(p).value
    learned = Wasserstein(prior, metric=metric, method="critic").value(p).value
    assert learned == pytest.approx(best, rel=0.1)


def test_what_it_is() -> None:
    prior = GaussianMixture([[0.0, 0.0]])
    w = Wasserstein(prior)
    assert w.curvature == "convex"
    assert w.priors == (prior,)
    assert w.offers(Access.NONE) is Access.BOTH
    assert str(w) == "Wasserstein(GaussianMixture)"
    assert str(Wasserstein(prior, 2)) == "Wasserstein^2(GaussianMixture)"


def test_convex() -> None:
    """W_2^2 lies below its chords along mixtures."""
    ends = [grid(gaussian([m], 0.7), -8, 8, 1001) for m in (-1.0, 1.5)]
    middle = Quadrature(ends[0].axes, torch.logaddexp(ends[0].table, ends[1].table))
    for power in (1, 2):
        w = Wasserstein(nodes(gaussian([0.2], 1.0)), power)  # type: ignore[arg-type]
        chord = sum(w.value(end).value for end in ends) / 2
        assert w.value(middle).value < chord - 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"power": 3}, "power=3 must be 1 or 2"),
        ({"metric": (1.0, -1.0)}, "must be positive scales"),
        ({"metric": (1.0, math.nan)}, "must be positive scales"),
        ({"method": "magic"}, "method='magic'"),
        ({"method": "critic", "power": 2}, "W_1 only"),
        ({"critic": Plane()}, "method='critic'"),
        ({"epsilon": 0.0}, r"epsilon=0\.0 must be positive"),
        ({"tolerance": 1.0}, r"tolerance=1\.0"),
        ({"max_points": 1}, "max_points=1"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wasserstein(gaussian([0.0]), **arguments)  # type: ignore[arg-type]


def test_states_must_fit() -> None:
    """p, the prior and the metric live in one space."""
    prior, p = Empirical(normal(9, 2, "q")), Empirical(normal(9, 1, "p"))
    with pytest.raises(ShapeError, match=r"shape \(1,\).*prior \(2,\)"):
        Wasserstein(prior).value(p)
    with pytest.raises(ShapeError, match="3 scales, but a state has 2 entries"):
        Wasserstein(prior, metric=(1.0, 1.0, 1.0)).value(prior)
    with pytest.raises(NonFiniteError, match="a state"):
        Wasserstein(prior).value(Empirical(torch.full((3, 2), math.nan)))
