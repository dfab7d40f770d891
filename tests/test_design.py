"""Design criteria and moment matching: functionals of the means of features."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from oracles import GATEAUX_FEATURES, GATEAUX_P, axis
from oracles.gateaux import P, gateaux
from tiltflow.analytic import gaussian
from tiltflow.config import interpret
from tiltflow.density import Empirical, Quadrature
from tiltflow.errors import CapabilityError, ConfigError
from tiltflow.features import Coordinates, FeatureMap, Features, Monomials
from tiltflow.functional import Functional
from tiltflow.seed import Seed
from tiltflow.types import Access
from tiltflow.utilities import MomentMatching, OptimalDesign
from tiltflow.utilities.design import Criterion

CRITERIA = get_args(Criterion)
criteria = pytest.mark.parametrize("criterion", CRITERIA)
LINE = Monomials(1)


def bank(count: int, dimension: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(
        count, dimension, generator=Seed(seed).generator(), dtype=torch.float64
    )  # fmt: skip


def mean(potential: Any, q: Empirical) -> float:
    return float(q.expect(potential.value))


def test_design_of_a_gaussian() -> None:
    """N(m, s^2), features (1, x): M = [[1, m], [m, m^2 + s^2]] + ridge, in closed form."""
    m, v, ridge = -0.3, 0.81, 0.05
    a, b, c = 1 + ridge, m, m * m + v + ridge
    det, trace = a * c - b * b, a + c
    least = trace / 2 - math.sqrt(trace**2 / 4 - det)
    exact = {"D": math.log(det), "A": -trace / det, "E": -1 / least}
    for criterion in CRITERIA:
        design = OptimalDesign(LINE, criterion, ridge)
        assert design.value(P).value == pytest.approx(exact[criterion], rel=1e-8)
        assert design.offers(Access.NONE) is Access.BOTH
        assert design.curvature == "concave"


@criteria
def test_design_gradients_in_two_dimensions(criterion: Criterion) -> None:
    """2 J^T A Phi, A = M^-1, M^-2 or v v^T / lambda^2, against the Jacobian and the inverse."""
    features = FeatureMap(lambda x: torch.cat([x, x.prod(1, keepdim=True), x.sin()], 1))
    points, ridge = bank(50), 0.01
    phi = features.value(points)
    inverse = torch.linalg.inv(phi.T @ phi / 50 + ridge * torch.eye(5, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(inverse)
    middle = {
        "D": inverse,
        "A": inverse @ inverse,
        "E": values[-1] ** 2 * torch.outer(vectors[:, -1], vectors[:, -1]),
    }[criterion]
    x = bank(1, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda y: features.value(y)[0], x)[:, 0]
    exact = 2 * jacobian.T @ middle @ features.value(x)[0]
    variation = OptimalDesign(features, criterion, ridge).first_variation(Empirical(points))
    torch.testing.assert_close(variation.grad(x)[0], exact, rtol=1e-9, atol=1e-9)
    value = features.value(x)[0] @ middle @ features.value(x)[0]
    torch.testing.assert_close(variation.value(x)[0], value, rtol=1e-9, atol=1e-9)


@criteria
def test_design_is_concave(criterion: Criterion) -> None:
    """F[q] <= F[p] + int delta F[p] (q - p) for every pair of weighted banks."""
    design, points = OptimalDesign(Monomials(2), criterion, 1e-3), bank(30)
    generator = Seed(3).generator()
    laws = [Empirical(points, torch.rand(30, generator=generator) ** 3) for _ in range(6)]
    for p in laws:
        variation = design.first_variation(p)
        for q in laws:
            bound = design.value(p).value + mean(variation, q) - mean(variation, p)
            assert design.value(q).value <= bound + 1e-9 * abs(bound)


def test_the_best_line_is_measured_at_its_ends() -> None:
    """Kiefer and Wolfowitz: D-optimal for (1, x) on [-1, 1] is half at each end, and there
    Phi^T M^-1 Phi = 1 + x^2 is at most m = 2, the mean, with equality on the support."""
    ends = Empirical(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    variation = OptimalDesign(LINE, ridge=1e-12).first_variation(ends)
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)[:, None]
    torch.testing.assert_close(variation.value(x), 1 + x[:, 0] ** 2)


def test_raising_a_design() -> None:
    """Exact mirror descent from the uniform density on [-1, 1]: log det M rises from log(1/3) at
    every step to 0, its largest value, where the first variation is at most 2."""
    design = OptimalDesign(LINE, ridge=1e-9)
    p = Quadrature([axis(-1, 1, 101)], torch.zeros(101))
    values = [design.value(p).value]
    assert values[0] == pytest.approx(math.log(1 / 3), abs=0.03)
    for _ in range(60):
        p = Quadrature(p.axes, p.table + design.first_variation(p).value(p.nodes))
        values.append(design.value(p).value)
    assert all(a < b for a, b in pairwise(values))
    assert -0.02 < values[-1] < 0
    assert float(design.first_variation(p).value(p.nodes).max()) < 2.05


def test_supergradient_at_a_repeated_eigenvalue() -> None:
    """M = (1/2 + ridge) I: the mean over its eigenvectors favours no direction; F stays below."""
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    design, p = OptimalDesign(Coordinates(), "E", 1e-3), Empirical(cross)
    variation = design.first_variation(p)
    angle = torch.linspace(0, 6, 13, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(
        variation.value(circle), torch.full((13,), 0.5 / 0.501**2, dtype=torch.float64)
    )
    for weights in ([3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 4.0, 4.0]):
        q = Empirical(cross, torch.tensor(weights))
        bound = design.value(p).value + mean(variation, q) - mean(variation, p)
        assert design.value(q).value <= bound + 1e-12


@criteria
def test_singular_design(criterion: Criterion) -> None:
    """Dependent features: regularised, said once per density, and still consistent."""
    twice = FeatureMap(lambda x: torch.cat([x, 2 * x, x.cos()], 1))
    design, p = OptimalDesign(twice, criterion, 0.1), Empirical(bank(200, 1))
    with pytest.warns(UserWarning, match=r"3 features span only 2 dimensions.*ridge=0\.1.*Remove"):
        value = design.value(p).value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variation = design.first_variation(p)
    assert math.isfinite(value)
    assert bool(torch.isfinite(variation.grad(bank(9, 1, seed=1))).all())
    with pytest.warns(UserWarning, match="span only 2"):
        numeric, predicted = gateaux(design)
    # The null direction of E is the same under every p: nothing to gain.
    assert numeric == pytest.approx(predicted, rel=1e-6, abs=1e-7)


def test_hopeless_designs_are_finite() -> None:
    """Features that vanish, or are larger than 1 / eps of one another: finite, and said."""
    for features in (
        FeatureMap(lambda x: 0 * x),
        FeatureMap(lambda x: torch.cat([x, 1e12 * x, 1e12 + x], 1)),
        FeatureMap(lambda x: torch.cat([x, x, x], 1).float()),
    ):
        for criterion in CRITERIA:
            design, p = OptimalDesign(features, criterion), Empirical(bank(50, 1))
            with pytest.warns(UserWarning, match="singular"):
                assert math.isfinite(design.value(p).value)
            assert bool(torch.isfinite(design.first_variation(p).value(bank(5, 1))).all())


@criteria
def test_standard_error_of_a_design(criterion: Criterion) -> None:
    """Over 200 banks the spread of estimates is the reported error, within 4.5/sqrt(400) twice."""
    design = OptimalDesign(GATEAUX_FEATURES, criterion, 0.1)
    out = [design.value(Empirical(GATEAUX_P.sample(600, Seed(2).child(i)))) for i in range(200)]
    values = torch.tensor([o.value for o in out], dtype=torch.float64)
    reported = sum(o.standard_error for o in out) / len(out)
    assert float(values.std()) / reported == pytest.approx(1, abs=2 * 4.5 / math.sqrt(400))


def test_design_in_single_precision() -> None:
    """Linear algebra is in double precision; states and gradients keep their own."""
    p, x = Empirical(bank(100).float()), bank(3).float()
    design = OptimalDesign(Monomials(2))
    variation = design.first_variation(p)
    exact = OptimalDesign(Monomials(2)).first_variation(Empirical(bank(100))).value(bank(3))
    assert variation.value(x).dtype == variation.grad(x).dtype == torch.float32
    torch.testing.assert_close(variation.value(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_features_without_gradient() -> None:
    """Refused with the remedy when the gradient is asked for; values are there."""
    design = OptimalDesign(FeatureMap(lambda x: torch.cat([x, x.cos()], 1).detach()))
    variation = design.first_variation(Empirical(bank(20, 1)))
    assert variation.value(bank(3, 1)).shape == (3,)
    with pytest.raises(CapabilityError, match="no gradient"):
        variation.grad(bank(3, 1))


@pytest.mark.parametrize(
    "arguments", [{"criterion": "C"}, {"ridge": 0.0}, {"ridge": -1.0}, {"ridge": math.nan}]
)
def test_bad_design(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        OptimalDesign(LINE, **arguments)


# ----------------------------------------------------------------------------- moment matching


def test_moments_of_a_gaussian() -> None:
    """N(m, s^2), features (1, x, x^2): minus half the squared gaps; no force at the target."""
    second = 0.09 + 0.81
    gaps = (0.0, -0.3 - 0.5, second - 1.0)
    matching = MomentMatching(Monomials(2), (1.0, 0.5, 1.0))
    assert matching.value(P).value == pytest.approx(-sum(g * g for g in gaps) / 2, rel=1e-9)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    grad = float(matching.first_variation(P).grad(x))
    assert grad == pytest.approx(-gaps[1] - gaps[2] * 1.4)
    there = MomentMatching(Monomials(2), torch.tensor([1.0, -0.3, second]))
    assert there.value(P).value == pytest.approx(0, abs=1e-12)
    assert float(there.first_variation(P).grad(x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("target", [(0.0, 0.0), (0.6, -0.2)])
def test_moment_matching_is_unbiased(target: tuple[float, float]) -> None:
    """Over 400 banks of N(0, 1)^2, at the target and away from it: mean and spread as reported."""
    matching, p = MomentMatching(Coordinates(), target), gaussian([0.0, 0.0], 1.0)
    out = [matching.value(Empirical(p.sample(100, Seed(4).child(i)))) for i in range(400)]
    values = torch.tensor([o.value for o in out], dtype=torch.float64)
    exact = -sum(t * t for t in target) / 2
    error = float(values.std()) / math.sqrt(400)
    # The covariance of a mean is estimated with N where N - 1 is unbiased: 1 / N^2 is left.
    assert abs(float(values.mean()) - exact) < 4.5 * error + 2e-4
    reported = math.sqrt(sum(o.standard_error**2 for o in out) / len(out))
    assert float(values.std()) / reported == pytest.approx(1, abs=2 * 4.5 / math.sqrt(800))


def test_bad_targets() -> None:
    for target in ((), (math.nan,), (math.inf, 0.0), 0.5, torch.zeros(2, 2)):
        with pytest.raises(ConfigError, match="target"):
            MomentMatching(Coordinates(), target)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="1 features, but target has 2 entries"):
        MomentMatching(Coordinates(), (0.0, 0.0)).value(P)


def test_run_files() -> None:
    """Both can be written in a run file, and its resolved form is a valid one."""
    features: dict[str, Any] = {"kind": "Monomials", "degree": 1}
    for table in (
        {"kind": "OptimalDesign", "features": features, "criterion": "A"},
        {"kind": "MomentMatching", "features": features, "target": [1.0, 0.2]},
    ):
        node = interpret(Functional, table, "objective.utility")
        built: Functional = node.build({})
        assert math.isfinite(built.value(P).value)
        assert interpret(Functional, node.plain, "again").plain == node.plain
        assert isinstance(built.features, Features)  # type: ignore[attr-defined]
