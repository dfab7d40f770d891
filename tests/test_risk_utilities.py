"""Spectral risks and barriers."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import GATEAUX_P, GATEAUX_REWARD, axis, grid
from oracles.gateaux import P, Q, mixed
from tiltflow.analytic import gaussian
from tiltflow.config import interpret
from tiltflow.density import Density, Empirical, Quadrature
from tiltflow.divergences import KL
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.functional import Functional, error_of, influence
from tiltflow.potential import BlackBox, Potential
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.types import Access
from tiltflow.utilities import ExpectedReward, LeftCVaR, LogBarrier, RightCVaR, SpectralRisk
from tiltflow.utilities.spectral_risk import PiecewiseLinear

X = Linear(1.0)
R = GATEAUX_REWARD


def weighted(count: int = 400, seed: int = 0) -> Empirical:
    """A weighted bank in float64."""
    generator = Seed(seed).generator()
    points = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return Empirical(points, torch.rand(count, generator=generator) + 0.1)


def by_hand(r: Tensor, w: Tensor, levels: tuple[float, ...], slopes: tuple[float, ...]) -> float:
    """int s(u) q_u du / int s, sample by sample: each holds the levels between two sums of w."""
    order = r.argsort()
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), w[order].cumsum(0)])
    bounds = torch.tensor([0.0, *levels, 1.0], dtype=torch.float64)
    total = mass = 0.0
    for s, a, b in zip(slopes, bounds[:-1], bounds[1:], strict=True):
        share = (torch.minimum(ends[1:], b) - torch.maximum(ends[:-1], a)).clamp(min=0)
        total += float(s * (share * r[order]).sum())
        mass += s * float(b - a)
    return total / mass


# ------------------------------------------------------------------------------ spectral risks


@pytest.mark.parametrize("p", [P, GATEAUX_P, weighted()], ids=["grid", "samples", "weights"])
@pytest.mark.parametrize("level", [0.1, 0.37, 0.9])
def test_special_cases(p: Density, level: float) -> None:
    """CVaRs are spectral risks with two pieces: values, errors, gradients, curvature, samples."""
    for spectral, cvar in (
        (SpectralRisk(R, (level,), (2.0, 0.0)), LeftCVaR(R, level)),
        (SpectralRisk(R, (level,), (0.0, 0.3)), RightCVaR(R, level)),
    ):
        a, b = spectral.value(p), cvar.value(p)
        assert a.value == pytest.approx(b.value, rel=1e-12)
        assert a.standard_error == pytest.approx(b.standard_error, rel=1e-9)
        assert a.count == b.count
        x = torch.linspace(-2, 2, 31, dtype=torch.float64)[:, None]
        ours, theirs = spectral.first_variation(p), cvar.first_variation(p)
        torch.testing.assert_close(ours.grad(x), theirs.grad(x))
        assert torch.equal(ours.active(x), theirs.active(x))
        offset = ours.value(x) - theirs.value(x)
        torch.testing.assert_close(offset, offset[:1].expand(31))
        assert spectral.curvature == cvar.curvature
        assert spectral.samples_needed == cvar.samples_needed


def test_fractional_boundaries() -> None:
    """The integral of s(u) q_u over a bank, sample by sample, with weights and with ties."""
    levels, slopes = (0.05, 0.31, 0.77, 0.9), (3.0, 0.5, 1.0, 0.0, 2.5)
    for seed in range(5):
        p = weighted(seed=seed)
        rounded = BlackBox(lambda x: (2 * x[:, 0]).round() / 2)
        for reward in (R, rounded):
            risk = SpectralRisk(reward, levels, slopes)
            exact = by_hand(reward.value(p.bank.points), p.bank.weights, levels, slopes)
            assert risk.value(p).value == pytest.approx(exact, rel=1e-12)


def test_equal_slopes_are_the_mean() -> None:
    """Value, gradient and curvature of the mean; no tail, so that three samples are enough."""
    risk = SpectralRisk(X, (0.2, 0.9), (2.0, 2.0, 2.0))
    p = Empirical(torch.tensor([[1.0], [2.0], [6.0]], dtype=torch.float64))
    assert risk.value(p).value == pytest.approx(3)
    assert risk.curvature == "linear"
    assert risk.samples_needed == 2
    x = torch.linspace(0, 9, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(risk.first_variation(p).grad(x), torch.ones_like(x))


@pytest.mark.parametrize("shift", [-1.0, 0.5])
def test_wang_of_a_gaussian(shift: float) -> None:
    """N(0, 1), r = x: each piece is phi(z_a) - phi(z_b) times its slope; the limit is -shift."""
    normal = NormalDist()

    def density(u: float) -> float:
        return 0.0 if u in (0.0, 1.0) else normal.pdf(normal.inv_cdf(u))

    p = grid(gaussian([0.0], 1.0), -9, 9, 20_001)
    risk = SpectralRisk.wang(X, shift)
    exact = sum(s * (density(i / 32) - density((i + 1) / 32)) for i, s in enumerate(risk.spectrum))
    assert risk.value(p).value == pytest.approx(exact, abs=1e-6)
    coarse, fine = (abs(SpectralRisk.wang(X, shift, n).value(p).value + shift) for n in (32, 512))
    assert fine < coarse / 8 < 0.04 / 8
    assert risk.curvature == ("convex" if shift > 0 else "concave")
    assert SpectralRisk.wang(X, 0.0).curvature == "linear"


@pytest.mark.parametrize(("exponent", "best"), [(1, 0.0), (2, 1.0), (3, 1.5)])
def test_power_is_the_best_of_several(exponent: int, best: float) -> None:
    """E max of n standard normals: 0, 1/sqrt(pi), 3/(2 sqrt(pi))."""
    p = grid(gaussian([0.0], 1.0), -9, 9, 20_001)
    value = SpectralRisk.power(X, exponent, 256).value(p).value
    assert value == pytest.approx(best / math.sqrt(math.pi), abs=2e-4)
    assert SpectralRisk.power(X, exponent).curvature == ("linear" if exponent == 1 else "concave")
    assert SpectralRisk.power(X, 0.4).curvature == "convex"


def test_curvature_is_what_is_said() -> None:
    """F at the middle of p and q is above (concave) or below (convex) the mean of the ends."""
    for slopes, shape in (((0.1, 1, 3), "concave"), ((3, 1, 0), "convex"), ((0, 1, 0), "neither")):
        risk = SpectralRisk(R, (0.3, 0.6), slopes)
        middle = risk.value(mixed(0.5)).value
        excess = middle - (risk.value(P).value + risk.value(Q).value) / 2
        assert risk.curvature == shape
        assert shape == "neither" or (excess > 1e-4 if shape == "concave" else excess < -1e-4)


def test_samples_of_the_smallest_tail() -> None:
    """100 in the smallest tail: both ends of a valley, the far sides of a trimmed mean."""
    assert SpectralRisk.wang(X, 0.5).samples_needed == 3200
    assert SpectralRisk(X, (0.1, 0.95), (1, 0, 1)).samples_needed == 2000
    assert SpectralRisk(X, (0.01, 0.99), (0, 1, 0)).samples_needed == 102
    assert SpectralRisk(X, (0.01, 0.1), (1, 1, 0)).samples_needed == 1000


def test_too_few_tail_samples() -> None:
    """Refused like CVaR, before quantiles that are noise are used."""
    p = Empirical(gaussian([0.0], 1.0).sample(300, Seed(0)))
    with pytest.raises(ConfigError, match=r"SpectralRisk.*9\.4 are in the tail.*>= 3200"):
        SpectralRisk.wang(X, 0.5).value(p)
    SpectralRisk.wang(X, 0.5, pieces=30).value(p)


@pytest.mark.parametrize(
    ("levels", "slopes", "match"),
    [
        ((), (1.0,), "levels"),
        ((0.0,), (1.0, 2.0), "levels"),
        ((0.5, 0.5), (1.0, 2.0, 3.0), "levels"),
        ((0.5, 0.2), (1.0, 2.0, 3.0), "levels"),
        ((math.nan,), (1.0, 2.0), "levels"),
        ((0.5,), (1.0,), "one per piece"),
        ((0.5,), (1.0, -1.0), "slopes"),
        ((0.5,), (0.0, 0.0), "slopes"),
        ((0.5,), (math.nan, 1.0), "slopes"),
    ],
)
def test_bad_spectra(levels: tuple[float, ...], slopes: tuple[float, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SpectralRisk(X, levels, slopes)
    with pytest.raises(ConfigError, match="width"):
        SpectralRisk(X, (0.5,), (1.0, 0.0), width=-1.0)


@pytest.mark.parametrize("p", [P, weighted()], ids=["grid", "weights"])
def test_rounded_hinges(p: Density) -> None:
    """T changes by at most width log 2, the sharp risk is the limit, and F is a mean of its first
    variation; on samples every one has a gradient."""
    levels, slopes = (0.2, 0.7), (3.0, 0.0, 1.0)
    sharp = SpectralRisk(R, levels, slopes)
    changes = sum(abs(b - a) for a, b in zip(sharp.spectrum, sharp.spectrum[1:], strict=False))
    for width in (0.5, 0.05, 1e-3, 1e-6):
        soft = SpectralRisk(R, levels, slopes, width)
        difference = abs(soft.value(p).value - sharp.value(p).value)
        assert difference <= changes * width * math.log(2) + 1e-12
        if width == 0.5:
            assert bool((soft.first_variation(p).applied(R.value(p.bank.points))[1] > 0).all())
    assert bool((sharp.first_variation(p).applied(R.value(p.bank.points))[1] == 0).any())
    x = torch.linspace(-2, 2, 31, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        soft.first_variation(p).value(x), sharp.first_variation(p).value(x), atol=1e-5, rtol=0.0
    )


def test_what_is_rounded() -> None:
    """Falling spectra in part of the reward's spread; concave ones stay themselves, as do sums."""
    risk = LeftCVaR(2 * X, 0.2).rounded(grid(gaussian([0.0], 0.5), -3, 3, 301), 0.3)
    assert risk.width == pytest.approx(0.3, rel=1e-3)
    assert (risk.levels, risk.slopes) == ((0.2,), (1.0, 0.0))
    safe = RightCVaR(X, 0.2) - KL(P) + SpectralRisk(X, (0.5,), (1.0, 2.0))
    assert safe.rounded(P, 0.3) is safe


def test_bad_distortions() -> None:
    with pytest.raises(ConfigError, match="shift"):
        SpectralRisk.wang(X, math.inf)
    with pytest.raises(ConfigError, match="exponent"):
        SpectralRisk.power(X, 0.0)
    with pytest.raises(ConfigError, match="pieces"):
        SpectralRisk.power(X, 2.0, pieces=1)


def test_a_bank_is_rewarded_once() -> None:
    """However many levels: one evaluation for the quantiles, one for the mean."""
    calls = []
    reward = BlackBox(lambda x: calls.append(len(x)) or x[:, 0])
    risk, p = SpectralRisk.wang(reward, 0.5), weighted(1000)
    risk.value(p)
    risk.first_variation(p)
    assert calls == [1000, 1000]


def test_standard_error_of_a_spectral_risk() -> None:
    """Over 200 banks the spread of estimates is the reported error, within 4.5/sqrt(400) twice."""
    risk = SpectralRisk(R, (0.2, 0.8), (2.0, 0.0, 1.0))
    out = [risk.value(Empirical(GATEAUX_P.sample(600, Seed(1).child(i)))) for i in range(200)]
    values = torch.tensor([o.value for o in out], dtype=torch.float64)
    reported = sum(o.standard_error for o in out) / len(out)
    assert float(values.std()) / reported == pytest.approx(1, abs=2 * 4.5 / math.sqrt(400))
    assert abs(float(values.mean()) - risk.value(P).value) < 4.5 * reported / math.sqrt(200) + 0.01


def test_piecewise_linear() -> None:
    """Slopes between the knots, the smaller one at them, also where two knots coincide."""
    knots, slopes = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 5.0, 2.0])
    f = PiecewiseLinear(X, knots.double(), slopes.double(), 3.0)
    x = torch.tensor([[-2.0], [0.0], [0.5], [1.0], [4.0]])
    assert f.value(x).tolist() == [1.0, 3.0, 3.0, 3.0, 9.0]
    assert f.grad(x)[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]
    assert f.active(x).tolist() == [True, False, False, False, True]
    assert f.offers is Access.BOTH
    assert str(f) == "PiecewiseLinear(Linear(1.0), 4 pieces)"


# ------------------------------------------------------------------------------------ barriers


def test_barrier_of_a_gaussian() -> None:
    """log(m - lower) and log(upper - m) at N(m, s^2), with the error s / (sqrt N margin)."""
    lower, upper = LogBarrier(X, lower=-1.0), LogBarrier(X, upper=0.2)
    assert lower.value(P).value == pytest.approx(math.log(0.7), abs=1e-9)
    assert upper.value(P).value == pytest.approx(math.log(0.5), abs=1e-9)
    assert lower.margin(P).value == pytest.approx(0.7, abs=1e-9)
    for barrier in (lower, upper):
        out = barrier.value(GATEAUX_P)
        assert out.standard_error == pytest.approx(
            error_of(influence(barrier.first_variation(GATEAUX_P), GATEAUX_P), GATEAUX_P)
        )
        assert abs(out.value - barrier.value(P).value) < 4.5 * out.standard_error
    x = torch.tensor([[0.3]], dtype=torch.float64)
    assert float(lower.first_variation(P).grad(x)) == pytest.approx(1 / 0.7)
    assert float(upper.first_variation(P).grad(x)) == pytest.approx(-1 / 0.5)


def test_optimum_under_a_barrier() -> None:
    """max E(-x) + w log E x - KL(. || N(0, 1)) is at N(a, 1) with w/a - 1 - a = 0: stationary."""
    weight = 0.3
    a = (math.sqrt(1 + 4 * weight) - 1) / 2
    prior, p = gaussian([0.0], 1.0), gaussian([a], 1.0)
    objective = ExpectedReward(-X) + weight * LogBarrier(X, lower=0.0) - KL(prior)
    assert objective.curvature == "concave"
    on_grid = Quadrature.of([axis(-7, 8, 2001)], p.log)
    values = objective.first_variation(on_grid).value(on_grid.nodes)
    inside = on_grid.nodes[:, 0].abs() < 5
    assert float(values[inside].std()) < 1e-4  # log p of the grid is normalised on the grid
    elsewhere = Quadrature.of([axis(-7, 8, 2001)], gaussian([a + 0.1], 1.0).log)
    assert objective.value(elsewhere).value < objective.value(on_grid).value


def test_outside_the_bound() -> None:
    """Minus infinity, also in an objective; and a sentence where a direction is asked for."""
    barrier = LogBarrier(X, lower=0.5)
    objective = ExpectedReward(X) + 0.1 * barrier
    assert barrier.value(P).value == -math.inf
    assert barrier.value(P).standard_error == 0
    assert objective.value(P).value == -math.inf
    out = objective.value(GATEAUX_P)
    assert out.value == -math.inf
    assert out.standard_error == math.inf
    assert out.count == 10_000
    with pytest.raises(
        UnsupportedError,
        match=r"lower=0\.5\): the mean of the constraint is -0\.3.*0\.8 outside the bound.*inside",
    ):
        barrier.first_variation(P)
    with pytest.raises(UnsupportedError, match=r"upper=-1.*0\.7 outside.* smaller rates"):
        LogBarrier(X, upper=-1.0).first_variation(P)
    # The edge itself is outside.
    edge = Empirical(torch.tensor([[0.0], [1.0]], dtype=torch.float64))
    assert barrier.value(edge).value == -math.inf


@pytest.mark.parametrize("bounds", [{}, {"lower": 0.0, "upper": 1.0}])
def test_exactly_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        LogBarrier(X, **bounds)


@pytest.mark.parametrize("bounds", [{"lower": math.nan}, {"upper": math.inf}])
def test_bad_bounds(bounds: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="finite"):
        LogBarrier(X, **bounds)


# ----------------------------------------------------------------------------------- run files


def test_run_files() -> None:
    """Both can be written in a run file, and its resolved form is a valid one."""
    reward = {"kind": "Linear", "slope": [1.0]}
    tables: list[dict[str, Any]] = [
        {"kind": "SpectralRisk", "reward": reward, "levels": [0.1, 0.9], "slopes": [2, 1, 0]},
        {"kind": "LogBarrier", "constraint": reward, "lower": -2.0},
        {"kind": "LogBarrier", "constraint": reward, "upper": 2.0},
    ]
    for table in tables:
        node = interpret(Functional, table, "objective.utility")
        built: Functional = node.build({})
        assert math.isfinite(built.value(weighted()).value)
        assert interpret(Functional, node.plain, "again").plain == node.plain
        assert isinstance(built.first_variation(weighted()), Potential)
    with pytest.raises(ConfigError, match=r"objective\.utility.*exactly one"):
        interpret(Functional, {"kind": "LogBarrier", "constraint": reward}, "objective.utility")\
            .build({})  # fmt: skip
