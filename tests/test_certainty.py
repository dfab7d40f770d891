"""Certainty equivalents: shapes, values, and their optimal thresholds against other routes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from oracles import axis
from tiltflow.algorithms import LineSearch, mirror_descent, optimal_thresholds
from tiltflow.algorithms.threshold_search import Dual, best_thresholds
from tiltflow.algorithms.thresholds import eased
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import Context
from tiltflow.density import Empirical, Quadrature
from tiltflow.divergences import KL
from tiltflow.errors import ConfigError, NonFiniteError, UnsupportedError
from tiltflow.functional import (
    LINE,
    Certainty,
    Exponential,
    Functional,
    Hinges,
    Quadratic,
    Shape,
    SoftHinge,
)
from tiltflow.potential import Differentiable
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.solvers.exact import GridSolver
from tiltflow.utilities import (
    CertaintyEquivalent,
    EntropicRisk,
    Entropy,
    ExpectedReward,
    LeftCVaR,
    MeanVariance,
    RightCVaR,
    SpectralRisk,
)

X = Linear(1.0)
WAVE = Differentiable(lambda x: (1.5 * x[:, 0]).sin() + 0.3 * x[:, 0])
TWO = Quadrature.of([axis(-4, 4, 401)], GaussianMixture([[-1.0], [1.2]], [0.6, 0.8]).log)
SHAPES: list[Shape] = [
    Hinges((0.0,), (0.0, 5.0)),
    Hinges((-1.0, 0.0, 0.5), (3.0, 2.0, 0.7, 0.2)),
    Hinges((0.5,), (0.5, 4.0)),
    SoftHinge(0.2, 0.3, "above"),
    SoftHinge(0.3, 0.5, "below"),
    Exponential(0.7),
    Exponential(-1.3),
    Quadratic(0.4),
    Quadratic(-0.6),
    LINE,
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@shapes
def test_shapes(shape: Shape) -> None:
    """Slopes against differences, the bend, and where the slope is 1."""
    t = axis(-3.003, 3, 2001)
    u, slope = shape.applied(t)
    smooth = u.diff() / t.diff()
    away = torch.ones(2000, dtype=torch.bool)
    for knot in getattr(shape, "knots", ()):
        away &= (t[1:] < knot) | (t[:-1] > knot)
    middle = 0.5 * (slope[1:] + slope[:-1])
    assert torch.allclose(smooth[away], middle[away], atol=2e-5, rtol=1e-4)
    bends = {"none": 0.0, "convex": 1.0, "concave": -1.0}[shape.bend]
    if bends:
        assert (bends * slope.diff() >= -1e-12).all()
    around = shape.applied(torch.tensor([shape.unit - 1e-6, shape.unit + 1e-6]).double())[1]
    assert float(around.min()) - 1e-5 <= 1 <= float(around.max()) + 1e-5
    assert shape.tail <= 1


@shapes
def test_mirrored(shape: Shape) -> None:
    """-u(-t), and back."""
    t = axis(-2.03, 2, 300)
    assert torch.allclose(shape.mirrored.applied(t)[0], -shape.applied(-t)[0])
    assert torch.allclose(shape.mirrored.mirrored.applied(t)[0], shape.applied(t)[0])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Hinges((0.0,), (0.0,)), "slopes"),
        (lambda: Hinges((1.0, 0.0), (0.0, 1.0, 2.0)), "increase"),
        (lambda: Hinges((0.0, 1.0), (0.0, 2.0, 1.0)), "decrease"),
        (lambda: Hinges((0.0,), (2.0, 3.0)), "between"),
        (lambda: Hinges((math.nan,), (0.0, 3.0)), "increase|finite"),
        (lambda: Hinges((0.0,), (0.0, math.inf)), "finite"),
        (lambda: SoftHinge(0.0, 1.0), "mass"),
        (lambda: SoftHinge(0.1, 0.0), "width"),
        (lambda: SoftHinge(0.1, 1.0, "right"), "side"),  # type: ignore[arg-type]
        (lambda: Exponential(0.0), "sensitivity"),
        (lambda: Quadratic(math.nan), "curvature"),
    ],
)
def test_bad_shapes(make: Callable[[], Shape], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()


SAME: list[tuple[Functional, Shape]] = [
    (LeftCVaR(WAVE, 0.2), Hinges((0.0,), (5.0, 0.0))),
    (RightCVaR(WAVE, 0.8), Hinges((0.0,), (0.0, 1 / (1 - 0.8)))),
    (EntropicRisk(WAVE, 0.9), Exponential(0.9)),
    (EntropicRisk(WAVE, -0.9), Exponential(-0.9)),
    (MeanVariance(WAVE, 0.7), Quadratic(-0.7)),
    (ExpectedReward(WAVE), LINE),
]


@pytest.mark.parametrize(("utility", "shape"), SAME, ids=lambda v: str(v)[:30])
def test_values_by_another_name(utility: Functional, shape: Shape) -> None:
    """Value and first variation, up to a constant, of the named utility."""
    equivalent = CertaintyEquivalent(WAVE, shape)
    assert equivalent.value(TWO).value == pytest.approx(utility.value(TWO).value, abs=1e-6)
    a, b = (f.first_variation(TWO).value(TWO.nodes) for f in (equivalent, utility))
    assert float((a - b).std()) < 1e-6
    assert equivalent.curvature == utility.curvature


UTILITIES: list[Functional] = [
    *(utility for utility, _ in SAME[:-1]),
    SpectralRisk(WAVE, (0.2, 0.7), (3.0, 1.0, 0.5)),
    SpectralRisk(WAVE, (0.2, 0.7), (0.5, 1.0, 3.0)),
    SpectralRisk(WAVE, (0.2,), (1.0, 0.0), width=0.3),
    CertaintyEquivalent(WAVE, Hinges((-1.0, 0.0, 0.5), (3.0, 2.0, 0.7, 0.2))),
    CertaintyEquivalent(WAVE, Hinges((0.0,), (0.5, 5.5))),
    0.5 * ExpectedReward(X) + 0.5 * LeftCVaR(WAVE, 0.1),
    -1.0 * RightCVaR(-WAVE, 0.8) + LeftCVaR(X, 0.3),
]
utilities = pytest.mark.parametrize("utility", UTILITIES, ids=lambda v: str(v)[:60])


@utilities
def test_parts(utility: Functional) -> None:
    """A utility is the sum of its certainty equivalents."""
    parts = utility.certainties()
    assert parts is not None
    total = sum(c.scale * CertaintyEquivalent(c.reward, c.shape).value(TWO).value for c in parts)
    # Values at a quantile of a grid are right up to one node's mass.
    assert total == pytest.approx(utility.value(TWO).value, abs=2e-5)


@utilities
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_value_of_the_dual_is_reached(utility: Functional, weight: float) -> None:
    """V(y*) is the objective of its own tilt: no gap between the two problems."""
    found = optimal_thresholds(utility, weight, TWO)
    tilted = TWO.tilted(found.potential)
    reached = utility.value(tilted).value - weight * KL(TWO).value(tilted).value
    # One node at a kink, whose mass is at most 0.01 here, is counted with one side.
    assert found.value == pytest.approx(reached, abs=1e-4)
    assert found.utility == pytest.approx(utility.value(tilted).value, abs=2e-3)
    atom = float(tilted.probabilities.max())
    for k in found.bent:
        assert abs(found.drives[k] - 1) * found.parts[k].shape.tail < 1.01 * atom


@utilities
def test_no_better_thresholds(utility: Functional) -> None:
    """Against a table of V over one threshold or two."""
    weight = 0.3
    found = optimal_thresholds(utility, weight, TWO)
    dual = Dual.of(found.parts, weight, TWO)
    sign = 1.0 if found.parts[found.bent[0]].shape.bend == "concave" else -1.0
    ends = [axis(*dual.bounds[k], 400 if len(found.bent) == 1 else 40) for k in found.bent]
    best = -math.inf
    for point in torch.cartesian_prod(*ends).reshape(-1, len(ends)).tolist():
        y = [0.0] * len(found.parts)
        for k, t in zip(found.bent, point, strict=True):
            y[k] = t
        best = max(best, sign * dual.value(y))
    assert sign * found.value >= best - 1e-9


def test_several_maxima() -> None:
    """Rewards in clusters: V has several maxima, and halving intervals finds the highest."""
    torch.manual_seed(0)
    for _ in range(6):
        centres, noise = 6 * torch.rand(6, 1).double(), 0.05 * torch.randn(6, 50).double()
        shares = torch.rand(6).double() ** 4
        rewards = (centres + noise).flatten()
        weights = (shares[:, None].expand(6, 50) / shares.sum() / 50).flatten()
        q = Quadrature.of([axis(0, 1, 300)], lambda x, w=weights: w.log())
        reward = Differentiable(lambda x, r=rewards: r + 0.0 * x[:, 0])
        for shape in (Exponential(-2.0), SoftHinge(0.2, 0.05, "below"), Quadratic(-1.0)):
            dual = Dual.of((Certainty(reward, shape),), 0.4, q)
            (y,) = best_thresholds(dual)
            table = max(dual.value([t]) for t in axis(*dual.bounds[0], 500).tolist())
            assert dual.value([y]) >= table - 1e-4


@pytest.mark.parametrize("penalty", [0.0, -1e4, -1e6])
@pytest.mark.parametrize(
    "shape", [SoftHinge(0.2, 0.05, "below"), Hinges((-0.1, 0.0), (5.0, 2.0, 0.0))], ids=str
)
def test_failures_do_not_hide_the_maximum(shape: Shape, penalty: float) -> None:
    """Two clusters of rewards, and a few constant penalties for failed samples."""
    x = 0.05 * gaussian([0.0]).sample(2000, Seed(0))
    x[1600:] += 3
    x[:10] += penalty
    for weight in (1.0, 1.5, 2.0):
        dual = Dual.of((Certainty(X, shape),), weight, Empirical(x))
        (y,) = best_thresholds(dual)
        table = max(dual.value([t]) for t in axis(-1, 4, 801).tolist())
        assert dual.value([y]) >= table - 1e-4


def test_rewards_of_any_size() -> None:
    """Exponents of 1e18 do not swallow the weights of the samples."""
    x = gaussian([0.0]).sample(2000, Seed(0))
    x[:10] = -1e9
    dual = Dual.of((Certainty(X, Quadratic(-0.5)),), 1.0, Empirical(x))
    (y,) = best_thresholds(dual)
    assert dual.drives([y])[0] == pytest.approx(1, abs=1e-4)
    assert dual.value([y]) >= max(dual.value([t]) for t in axis(-3, 3, 400).tolist()) - 1e-6


def test_overflow_is_said() -> None:
    p = Empirical(1000 * gaussian([0.0]).sample(500, Seed(0)))
    with pytest.raises(NonFiniteError, match="Scale the rewards"):
        optimal_thresholds(EntropicRisk(X, 1.0), 1.0, p)


@pytest.mark.parametrize("each", [1, 2, 20])
def test_rare_conditions_are_a_problem(each: int) -> None:
    """A normaliser for each condition needs samples of it."""
    x = gaussian([0.0]).sample(2000, Seed(0))
    p = Empirical(x, cond={"prompt": torch.arange(2000) // each})
    problem = optimal_thresholds(LeftCVaR(X, 0.2), 1.0, p).problem
    assert problem is not None
    assert "rarest condition" in problem


def test_a_line_with_a_knot_is_the_mean() -> None:
    p = Empirical(gaussian([0.0]).sample(2000, Seed(0)))
    line, mean = CertaintyEquivalent(X, Hinges((0.0,), (1.0, 1.0))), ExpectedReward(X)
    a, b = (optimal_thresholds(u, 1.0, p) for u in (line, mean))
    assert (a.value, a.problem) == (pytest.approx(b.value), None)


@pytest.mark.parametrize("aversion", [0.3, 2.0])
def test_mean_less_variance_in_closed_form(aversion: float) -> None:
    """N(0, 1), r = x: the optimum is normal with mean 1 / w and variance w / (w + 2c)."""
    w = 0.8
    q = Quadrature.of([axis(-8, 8, 4001)], gaussian([0.0]).log)
    found = optimal_thresholds(MeanVariance(X, aversion), w, q)
    variance = w / (w + 2 * aversion)
    kl = 0.5 * (variance + 1 / w**2 - 1 - math.log(variance))
    assert found.at[0] == pytest.approx(1 / w, abs=1e-6)
    assert found.kl == pytest.approx(kl, abs=1e-6)
    assert found.utility == pytest.approx(1 / w - aversion * variance, abs=1e-6)


def test_as_good_as_mirror_descent() -> None:
    """On the same grid, by steps that know nothing of thresholds."""
    for utility in (EntropicRisk(WAVE, -1.0), SpectralRisk(WAVE, (0.2, 0.7), (3.0, 1.0, 0.5))):
        found, reached = optimal_thresholds(utility, 1.0, TWO), list[float]()
        mirror_descent(
            utility - KL(TWO), TWO, GridSolver(), LineSearch(initial=0.5, max_rate=1.0),
            density=lambda p, seed: p, context=Context(), form="successive", num_iterations=100,
            tolerance=1e-5, on_iterate=lambda k, it, out=reached: out.append(it.objective.value),
        )  # fmt: skip
        assert found.value == pytest.approx(max(reached), abs=1e-4)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match="plan_and_tune"):
        optimal_thresholds(Entropy(), 1.0, TWO)
    with pytest.raises(UnsupportedError, match="both"):
        optimal_thresholds(LeftCVaR(X, 0.1) + RightCVaR(X, 0.9), 1.0, TWO)


@pytest.mark.parametrize("ease", ["weight", "level", "width"])
def test_eased(ease: str) -> None:
    """The least mild problem that 10,000 samples support, on the way to the starving one."""
    p = Empirical(gaussian([0.0]).sample(10_000, Seed(0)))
    parts = RightCVaR(X, 0.9).certainties()
    found = eased(parts, 1.0, p, ease)  # type: ignore[arg-type]
    assert found.problem is None
    assert found.kl > 0.2
    asked = optimal_thresholds(RightCVaR(X, 0.9), 1.0, p)
    assert asked.problem is not None
    milder = {"weight": found.weight > 1.5, "level": found.parts[0].shape.tail > 0.15,
              "width": isinstance(found.parts[0].shape, SoftHinge)}  # fmt: skip
    assert milder[ease]
