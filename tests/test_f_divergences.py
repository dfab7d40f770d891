"""Divergences made of the density ratio: closed forms, errors, and what they do to a loop."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiltflow.divergences
from oracles import FUNCTIONALS, GATEAUX_PRIOR, GATEAUX_REWARD, axis, grid, identity
from tiltflow.algorithms import mirror_descent
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.density import Bank, Density, Empirical, FlowDensity, Quadrature, Reweighted
from tiltflow.divergences import KL, ChiSquare, ForwardKL, Hellinger, JensenShannon, Renyi
from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, UnsupportedError
from tiltflow.functional import Functional, check
from tiltflow.potential import BlackBox, Differentiable
from tiltflow.ratio import ExactRatio, LogisticRatio, PathRatio
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import GridSolver
from tiltflow.training import Training
from tiltflow.types import Access, Estimate
from tiltflow.utilities import ExpectedReward

Make = Callable[[Density], Functional]
M, S, N, T = 0.4, 0.8, 0.1, 1.1  # p = N(M, S^2), prior = N(N, T^2)


def renyi(b: float, m: float = M, s: float = S, n: float = N, t: float = T) -> float:
    """Between Gaussians (van Erven and Harremoes, 2014, equation 10)."""
    v = b * t**2 + (1 - b) * s**2
    return math.log(t / s) + math.log(t**2 / v) / (2 * (b - 1)) + b * (m - n) ** 2 / (2 * v)


def kl(m: float = M, s: float = S, n: float = N, t: float = T) -> float:
    return math.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5


def jensen_shannon() -> float:
    """By its definition, on a grid."""
    p, q = (grid(gaussian([m], s), -12, 12, 8001) for m, s in ((M, S), (N, T)))
    a, b = p.probabilities, q.probabilities
    mid = (a + b) / 2
    parts = torch.special.xlogy(a, a / mid) + torch.special.xlogy(b, b / mid)
    return float(parts.sum()) / 2


CLOSED: dict[str, tuple[Make, float]] = {
    "KL": (KL, kl()),
    "ForwardKL": (ForwardKL, kl(N, T, M, S)),
    "ChiSquare": (ChiSquare, math.expm1(renyi(2.0))),
    "Hellinger": (Hellinger, -math.expm1(-0.5 * renyi(0.5))),
    "JensenShannon": (JensenShannon, jensen_shannon()),
} | {f"Renyi {b}": (lambda q, b=b: Renyi(q, b), renyi(b)) for b in (0.2, 0.5, 0.8, 1.5, 2.0)}
cases = pytest.mark.parametrize("name", list(CLOSED))


def law(mean: float, std: float, count: int, seed: int) -> GaussianMixture:
    return GaussianMixture([[mean]], std, num_samples=count, seed=Seed(seed))


@cases
def test_closed_forms(name: str) -> None:
    """Between Gaussians, on a grid to 1e-7 and on 20 000 samples within the error."""
    make, exact = CLOSED[name]
    p, q = (grid(gaussian([m], s), -9, 9, 8001) for m, s in ((M, S), (N, T)))
    assert make(q).value(p).value == pytest.approx(exact, abs=1e-7)
    assert make(q).value(p).standard_error == 0
    out = make(law(N, T, 20_000, 1)).value(law(M, S, 20_000, 2))
    assert abs(out.value - exact) < 4.5 * out.standard_error
    assert 0 < out.standard_error < 0.03


def tracked(count: int, seed: int) -> tuple[Density, Density]:
    """p = N(0.4, 1) recorded as a tilt of prior = N(0, 1), with a constant of 3."""
    log = BlackBox(lambda x: torch.full_like(x[:, 0], math.nan))  # must not be asked
    prior = Reweighted(Bank.equal(gaussian([0.0]).sample(count, Seed(seed))), log)
    psi = Differentiable(lambda x: 0.4 * x[:, 0] + 3)
    p = Reweighted(Bank.equal(gaussian([0.4]).sample(count, Seed(seed).child(1))), log + psi)
    return p, prior


SHIFTED: dict[str, tuple[Make, float]] = {
    "KL": (KL, 0.08),
    "ForwardKL": (ForwardKL, 0.08),
    "ChiSquare": (ChiSquare, math.expm1(0.16)),
    "Hellinger": (Hellinger, -math.expm1(-0.02)),
    "JensenShannon": (JensenShannon, math.nan),
} | {f"Renyi {b}": (lambda q, b=b: Renyi(q, b), b * 0.08) for b in (0.2, 0.8, 2.0)}


@pytest.mark.parametrize("name", list(SHIFTED))
@pytest.mark.parametrize("route", ["exact", "tracked"])
def test_standard_errors_are_calibrated(name: str, route: str) -> None:
    """Over 200 pairs of banks the spread of values is the reported error: within 4.5/sqrt(400).

    On the tracked route the ratio is known up to a constant, and the error of its normaliser,
    measured on the prior's bank, is correlated with what else is measured there.
    """
    make, exact = SHIFTED[name]
    found: list[Estimate] = []
    for i in range(200):
        if route == "exact":
            p, prior = law(0.4, 1, 400, 2 * i), law(0, 1, 400, 2 * i + 1)
            found.append(make(prior).value(p))
        else:
            p_tracked, prior_tracked = tracked(400, i)
            found.append(make(prior_tracked).value(p_tracked))
    values = torch.tensor([out.value for out in found])
    reported = math.sqrt(sum(out.standard_error**2 for out in found) / len(found))
    assert float(values.std()) / reported == pytest.approx(1, abs=4.5 / math.sqrt(400))
    # Plug-in values have a bias of order 1/n, about the error squared.
    if not math.isnan(exact):
        assert abs(float(values.mean()) - exact) < 4.5 * reported / math.sqrt(200) + reported**2


@pytest.mark.parametrize("name", list(SHIFTED))
@pytest.mark.parametrize("shared", [True, False])
def test_re_weighted_banks(name: str, shared: bool) -> None:
    """p is a bank of the prior's law with weights e^psi: one set of samples, with joint errors.

    The prior's own bank, if it is another one, is not looked at.
    """
    make, _ = SHIFTED[name]
    log, psi = gaussian([0.0]).log, Differentiable(lambda x: 0.4 * x[:, 0])
    found = []
    for i in range(200):
        own, other = (
            Reweighted(Bank.equal(gaussian([0.0]).sample(400, Seed(i).child(j))), log)
            for j in range(2)
        )
        found.append(make(own if shared else other).value(own.tilted(psi)))
    values = torch.tensor([out.value for out in found])
    reported = math.sqrt(sum(out.standard_error**2 for out in found) / len(found))
    assert float(values.std()) / reported == pytest.approx(1, abs=4.5 / math.sqrt(400))


def test_weights_count() -> None:
    """Integer weights are repetitions, on both banks."""
    points, counts = gaussian([0.2]).sample(300, Seed(1)), torch.arange(300) % 3 + 1
    log, psi = gaussian([0.0]).log, Linear(0.4)

    def of(bank: Bank) -> tuple[Density, Density]:
        return Reweighted(bank, log + psi), Reweighted(bank, log)

    once = of(Bank(points, counts.double() / counts.sum()))
    often = of(Bank.equal(points.repeat_interleave(counts, 0)))
    for make, _ in CLOSED.values():
        values = [make(prior).value(p).value for p, prior in (once, often)]
        assert values[0] == pytest.approx(values[1], rel=1e-10)


def test_objective_knows_which_bank_a_term_uses() -> None:
    """E r - 0.5 KL(prior || p): the second term does not move with the bank of p, so that its
    error is added in squares; as an influence on that bank it would count exp(-T)."""
    p, prior, r = law(0.4, 0.7, 2000, 1), law(0.0, 1.0, 2000, 2), Linear(1.0)
    f, d = ExpectedReward(r), ForwardKL(prior)
    parts = f.value(p).standard_error, 0.5 * d.value(p).standard_error
    objective = f - 0.5 * d
    assert objective.value(p).standard_error == pytest.approx(math.hypot(*parts), rel=1e-9)
    # That of a chi-square is exp(T), half of the first variation.
    alone = ChiSquare(prior).value(p).standard_error
    assert (1.0 * ChiSquare(prior)).value(p).standard_error == pytest.approx(alone, rel=1e-9)


def test_order_one_is_kl() -> None:
    """Values and first variations tend to KL's, linearly in b - 1, without loss of digits."""
    p, q = (grid(gaussian([m], s), -9, 9, 4001) for m, s in ((M, S), (N, T)))
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    exact, slope = KL(q).value(p).value, KL(q).first_variation(p).value(x)
    slope = slope - slope[3]
    for b in (1 - 1e-6, 1 + 1e-6):
        assert Renyi(q, b).value(p).value == pytest.approx(exact, abs=1e-6)
        found = Renyi(q, b).first_variation(p).value(x)
        torch.testing.assert_close(found - found[3], slope, rtol=0, atol=1e-5)


def test_relations() -> None:
    """Order 2 is log(1 + chi-square), order 1/2 is -2 log(1 - Hellinger); orders increase."""
    p, q = (grid(gaussian([m], s), -9, 9, 4001) for m, s in ((M, S), (N, T)))
    assert Renyi(q, 2.0).value(p).value == pytest.approx(
        math.log1p(ChiSquare(q).value(p).value), abs=1e-12
    )
    assert Renyi(q, 0.5).value(p).value == pytest.approx(
        -2 * math.log1p(-Hellinger(q).value(p).value), abs=1e-12
    )
    values = [Renyi(q, b).value(p).value for b in (0.3, 0.8, 1.2, 3.0)]
    assert values == sorted(values)
    assert JensenShannon(q).value(p).value == pytest.approx(JensenShannon(p).value(q).value)
    assert Hellinger(q).value(p).value == pytest.approx(Hellinger(p).value(q).value)


def test_curvature_and_names() -> None:
    """Renyi is convex below order 1, and claims nothing above."""
    prior = gaussian([0.0])
    assert Renyi(prior, 0.7).curvature == "convex"
    assert Renyi(prior, 1.3).curvature == "neither"
    for make in (KL, ForwardKL, ChiSquare, Hellinger, JensenShannon):
        assert make(prior).curvature == "convex"
        assert make(prior).priors == (prior,)
        assert str(make(prior)) == f"{make.__name__}(GaussianMixture)"
    assert str(Renyi(prior, 2.0)) == "Renyi(GaussianMixture, order=2)"


@pytest.mark.parametrize("order", [0.0, 1.0, -0.5, math.inf, math.nan])
def test_bad_order(order: float) -> None:
    with pytest.raises(ConfigError, match="order"):
        Renyi(gaussian([0.0]), order)


@pytest.mark.parametrize("name", list(CLOSED))
def test_gradients(name: str) -> None:
    """grad delta D as the tables of the methods give it, from scores and ratio."""
    make, _ = CLOSED[name]
    p, q = (grid(gaussian([m], s), -9, 9, 8001) for m, s in ((M, S), (N, T)))
    x = torch.tensor([[-0.7], [0.3], [1.2]], dtype=torch.float64)
    laws = gaussian([M], S), gaussian([N], T)
    t = laws[0].log.value(x) - laws[1].log.value(x)
    slope = (laws[0].log.grad(x) - laws[1].log.grad(x))[:, 0]
    order = float(name.split()[1]) if " " in name else 0.0
    weight = {
        "KL": torch.ones_like(t),
        "ForwardKL": (-t).exp(),
        "ChiSquare": 2 * t.exp(),
        "Hellinger": (-t / 2).exp() / 4,
        "JensenShannon": 0.5 / (1 + t.exp()),
    }.get(name, order * ((order - 1) * t).exp() / math.exp((order - 1) * renyi(order or 2.0)))
    found = make(law(N, T, 200_000, 1)).first_variation(law(M, S, 200_000, 2)).grad(x)[:, 0]
    torch.testing.assert_close(found, weight * slope, rtol=0.02, atol=1e-4)
    assert make(q).first_variation(p).offers is Access.BOTH


# ------------------------------------------------------------------------------------ abilities


def test_offers_before_samples() -> None:
    """Values of both logs are needed; a tracked ratio and a learned one need neither."""
    prior = FlowDensity(gaussian([0.0]).flow(hidden=()), num_samples=10)
    p = FlowDensity(gaussian([0.5]).flow(hidden=()), num_samples=10)
    divergence = Renyi(prior, 2.0)
    assert divergence.offers(Access.BOTH) is Access.NONE
    assert divergence.offers_at(p) is Access.NONE
    assert divergence.offers_at(p.with_log(prior.log + Linear(0.5))) is Access.BOTH
    black = BlackBox(lambda x: x[:, 0])
    assert divergence.offers_at(p.with_log(prior.log + black)) is Access.VALUE
    assert Renyi(prior, 2.0, LogisticRatio()).offers(Access.NONE) is Access.BOTH
    assert Renyi(prior, 2.0, PathRatio()).offers_at(p) is Access.BOTH
    assert ForwardKL(gaussian([0.0])).offers(Access.GRAD) is Access.NONE
    assert ForwardKL(gaussian([0.0])).offers(Access.BOTH) is Access.BOTH
    with pytest.raises(CapabilityError, match=r"Renyi.*offers nothing"):
        check(divergence, p, Access.GRAD, "AdjointMatching")
    with pytest.raises(CapabilityError, match=r"Renyi\(.*needs values.*PathRatio.*LogisticRatio"):
        divergence.value(p)
    with pytest.raises(CapabilityError, match="PathRatio"):
        divergence.first_variation(p)
    assert "bank" not in p.__dict__
    assert "bank" not in prior.__dict__


def test_ratio_is_made_once() -> None:
    """Value, error and first variation share one ratio, as a loop needs for a trained one."""
    p, prior = (Empirical(gaussian([m]).sample(300, Seed(i))) for i, m in enumerate((0.5, 0.0)))
    divergence = JensenShannon(prior, LogisticRatio(training=Training(num_updates=50)))
    out = divergence.value(p)
    assert divergence.log_ratio(p) is divergence.log_ratio(p)
    assert divergence.first_variation(p).source is divergence.log_ratio(p)
    assert 0 < out.value < math.log(2)
    assert divergence.samples_needed == 2000
    assert JensenShannon(prior).samples_needed == 2


def test_kl_of_samples() -> None:
    """KL with a learned ratio: between samples whose densities are unknown, 0.125 within 0.05."""
    p, prior = (Empirical(gaussian([m]).sample(5000, Seed(i))) for i, m in enumerate((0.5, 0.0)))
    assert KL(prior, LogisticRatio()).value(p).value == pytest.approx(0.125, abs=0.05)


def test_likelihoods_give_values() -> None:
    """Renyi of two flow models by PathRatio, which without it is refused."""
    p, prior = (
        FlowDensity(gaussian([m]).flow(hidden=()), num_samples=2000, seed=Seed(i))
        for i, m in enumerate((0.5, 0.0))
    )
    out = Renyi(prior, 2.0, PathRatio(num_steps=20)).value(p)
    # The samples are those of 40 steps of Euler-Maruyama, whose variance is 1.2 % too large.
    assert abs(out.value - 0.25) < 4.5 * out.standard_error + 0.01


# --------------------------------------------------------------------------------------- errors


def test_overflow_of_a_value() -> None:
    """A ratio beyond exp(709): an error with remedies, not an infinity; logs do not overflow."""
    p, prior = law(60.0, 1.0, 100, 1), law(0.0, 0.5, 100, 2)
    with pytest.raises(NonFiniteError, match=r"ratios up to exp.*clip"):
        ChiSquare(prior).value(p)
    assert Renyi(prior, 3.0).value(p).value > 1000
    assert KL(prior).value(p).value == pytest.approx(7200, rel=0.05)
    assert JensenShannon(prior).value(p).value == pytest.approx(math.log(2))
    assert Hellinger(prior).value(p).value == pytest.approx(1)


def test_overflow_of_a_first_variation() -> None:
    """exp(-T) where p has no mass: an error that names the remedies."""
    p, prior = law(0.0, 0.1, 100, 1), law(0.0, 2.0, 100, 2)
    variation = ForwardKL(prior).first_variation(p)
    far = torch.full((2, 1), 10.0, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"ForwardKL.*ratios up to exp.*covers.*clip"):
        variation.grad(far)
    bounded = ForwardKL(prior, ExactRatio(clip=5.0)).first_variation(p)
    assert bounded.value(far).tolist() == pytest.approx([-math.exp(5)] * 2)


def test_normaliser_without_samples() -> None:
    """The tilt has left the prior's bank: refused by all, but a KL of flows has its paths."""
    log = gaussian([0.0]).log
    prior = Reweighted(Bank.equal(gaussian([0.0]).sample(1000, Seed(0))), log)
    p = Reweighted(Bank.equal(gaussian([7.0]).sample(1000, Seed(1))), log + Linear(7.0))
    for make, _ in CLOSED.values():
        with pytest.raises(UnsupportedError, match="effective samples"):
            make(prior).value(p)
    flow = FlowDensity(gaussian([0.0]).flow(hidden=()), num_samples=500)
    other = FlowDensity(gaussian([5.0]).flow(hidden=()), num_samples=500, seed=Seed(1))
    # The path KL, an upper bound that at 40 steps is a few per cent above.
    value = KL(flow).value(other.with_log(flow.log + Linear(5.0))).value
    assert 12.4 < value < 14


# ---------------------------------------------------------------------------------- in a loop


def test_forward_kl_against_its_optimum() -> None:
    """max E f - A KL(q || p): p* = A q / (v - f), and E_{p*} f = v - A (methods, section 5.2)."""
    prior = grid(gaussian([0.0], 1.2), -6, 6, 1201)
    reward, weight = Differentiable(lambda x: x[:, 0].sin()), 1.5
    objective = ExpectedReward(reward) - weight * ForwardKL(prior)
    out = mirror_descent(
        objective, prior, GridSolver(), [0.4] * 40,
        density=identity, context=Context(),
    )  # fmt: skip
    f, q = reward.value(prior.nodes), prior.probabilities
    low, high = 1.0, 10.0
    for _ in range(80):
        v = (low + high) / 2
        low, high = (v, high) if float((weight * q / (v - f)).sum()) > 1 else (low, v)
    exact = Quadrature(prior.axes, (weight * q / (v - f)).log())
    assert exact.total_variation(out.model) < 1e-6
    assert float(out.model.expect(reward.value)) == pytest.approx(v - weight, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda q: Renyi(q, 2.0), 0.25), (lambda q: Renyi(q, 0.5), 0.6), (ChiSquare, 0.1),
        (JensenShannon, 1.0), (Hellinger, 1.0),
    ],
)  # fmt: skip
def test_a_loop_finds_a_stationary_point(make: Make, rate: float) -> None:
    """delta (F - D) becomes constant under p by mirror descent on a grid."""
    from tiltflow.algorithms.mirror_descent import stationarity

    prior = grid(gaussian([0.0], 1.2), -6, 6, 601)
    objective = ExpectedReward(Differentiable(lambda x: 0.3 * x[:, 0].sin())) - 2.0 * make(prior)
    out = mirror_descent(
        objective, prior, GridSolver(), [rate] * 40,
        density=identity, context=Context(),
    )  # fmt: skip
    assert stationarity(objective, out.model) < 1e-4
    assert objective.value(out.model).value > objective.value(prior).value


def test_grid_axis_of_these_tests() -> None:
    """The grids resolve their densities: less than 1e-9 of mass in a cell at the end."""
    p = grid(gaussian([M], S), -9, 9, 8001)
    assert float(axis(-9, 9, 8001)[1] - axis(-9, 9, 8001)[0]) < 0.01 * S
    assert float(p.probabilities[[0, -1]].max()) < 1e-9


def test_every_divergence_has_a_row_with_its_curvature() -> None:
    """The page of divergences names all of them, with the shape that they claim."""
    page = Path(__file__).resolve().parent.parent / "docs" / "divergences.md"
    table = [
        [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in page.read_text(encoding="utf-8").split("## Values")[0].splitlines()
        if line.startswith("| `")
    ]
    named = {row[0][1:].split("(")[0] for row in table}
    assert named == set(tiltflow.divergences.__all__)
    for name, make in FUNCTIONALS.items():
        if name.split()[0] in named:
            shape = make(GATEAUX_REWARD, GATEAUX_PRIOR).curvature
            assert any(shape in row[4] for row in table if row[0][1:].startswith(name.split()[0]))
