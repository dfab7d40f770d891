"""Kernel diversity: the Vendi score as a functional."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from torch import Tensor

from oracles import GATEAUX_P, axis
from oracles.gateaux import gateaux
from tiltflow.analytic import gaussian
from tiltflow.config import interpret
from tiltflow.density import Bank, Density, Empirical, Quadrature
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.features import FeatureMap, Features
from tiltflow.functional import Functional
from tiltflow.potential import Potential
from tiltflow.seed import Seed
from tiltflow.similarity import (
    CosineSimilarity,
    GaussianSimilarity,
    InverseMultiquadric,
    LaplaceSimilarity,
    NegativeDistance,
    Similarity,
)
from tiltflow.types import Access
from tiltflow.utilities import KernelDiversity
from tiltflow.utilities.kernel_diversity import LandmarkFeatures

NEAR = GaussianSimilarity(0.7)
PLANE = gaussian([0.0, 0.0], 1.0)
SIMILARITIES = [
    NEAR,
    LaplaceSimilarity(1.0),
    InverseMultiquadric(0.7),
    CosineSimilarity(),
    CosineSimilarity(FeatureMap(lambda x: torch.cat([x, x**2, x.cos()], 1))),
]
similarities = pytest.mark.parametrize("similarity", SIMILARITIES, ids=str)


def log_vendi(similarity: Similarity, points: Tensor) -> float:
    """-sum l log l over the eigenvalues of K / n."""
    spectrum = torch.linalg.eigvalsh(similarity.matrix(points, points) / len(points))
    return float(torch.special.entr(spectrum.clamp(min=0)).sum())


class Exact(Density):
    """Weighted points as a law of their own."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self._bank = Bank(points, weights / weights.sum(), None, exact=True)

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def log(self) -> Potential:
        raise NotImplementedError


def atoms(masses: list[float]) -> Exact:
    """Masses on far points."""
    w = torch.tensor(masses, dtype=torch.float64)
    return Exact(100 * torch.arange(len(w), dtype=torch.float64)[:, None], w)


@similarities
def test_vendi_score(similarity: Similarity) -> None:
    """exp F is the Vendi score of the samples: with all of them as landmarks up to the ridge,
    e log(1 / e) per eigenvalue, at most 300; exactly, for the formula with the ridge."""
    points = PLANE.sample(300, Seed(1))
    e = 1e-6
    out = KernelDiversity(similarity, ridge=e, num_landmarks=300).value(Empirical(points))
    assert abs(out.value - log_vendi(similarity, points)) < 300 * e * math.log(1 / e)
    spectrum = torch.linalg.eigvalsh(similarity.matrix(points, points) / 300).clamp(min=0)
    exact = -math.log(e) - 1 - ((spectrum + e) * torch.log1p(spectrum / e) - spectrum).sum()
    assert out.value == pytest.approx(float(exact), abs=1e-5)  # landmarks explain all but 1e-6


@similarities
def test_order_two(similarity: Similarity) -> None:
    """-log of the mean similarity of two different samples; with weights, of two such draws."""
    points = PLANE.sample(300, Seed(1)).abs()
    matrix = similarity.matrix(points, points)
    w = torch.rand(300, generator=Seed(2).generator(), dtype=torch.float64)
    w = w / w.sum()
    for weights in (torch.full_like(w, 1 / 300), w):
        pairs = torch.outer(weights, weights).fill_diagonal_(0)
        exact = -math.log(float((pairs * matrix).sum() / pairs.sum()))
        value = KernelDiversity(similarity, 2).value(Empirical(points, weights)).value
        assert value == pytest.approx(exact, rel=1e-9)


def test_the_number_of_different_things() -> None:
    """Masses on k points far apart: both orders are Renyi entropies of the masses, log k if
    they are equal; one point has diversity one."""
    equal, unequal, one = atoms([1] * 5), atoms([0.6, 0.3, 0.1]), atoms([1.0])
    first, second = KernelDiversity(NEAR, ridge=1e-9), KernelDiversity(NEAR, 2)
    for f in (first, second):
        assert f.value(equal).value == pytest.approx(math.log(5), abs=1e-6)
        assert f.value(one).value == pytest.approx(0, abs=1e-6)
    entropy = -sum(m * math.log(m) for m in (0.6, 0.3, 0.1))
    assert first.value(unequal).value == pytest.approx(entropy, abs=1e-6)
    assert second.value(unequal).value == pytest.approx(-math.log(0.36 + 0.09 + 0.01))


def test_weights_are_repetitions() -> None:
    """Order 1 with integer weights is order 1 of the repeated samples."""
    points, counts = PLANE.sample(60, Seed(3)), torch.arange(60) % 4 + 1
    f = KernelDiversity(NEAR)
    weighted = f.value(Empirical(points, counts.double())).value
    repeated = f.value(Empirical(points.repeat_interleave(counts, 0))).value
    assert weighted == pytest.approx(repeated, abs=1e-5)


# ----------------------------------------------------------- first variations and curvature


@pytest.mark.filterwarnings("ignore:KernelDiversity:UserWarning")  # few landmarks, on purpose
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "similarity", [NEAR, InverseMultiquadric(1.0), LaplaceSimilarity(3.0)], ids=str
)
def test_gateaux_of_every_order(similarity: Similarity, order: Any) -> None:
    """The contract, for other kernels and for order 2; Laplace's with a large residual."""
    f = KernelDiversity(similarity, order, ridge=1e-4, num_landmarks=64)
    assert f.offers(Access.NONE) is Access.BOTH
    numeric, predicted = gateaux(f)
    assert abs(predicted) > 1e-3
    assert numeric == pytest.approx(predicted, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients(order: Any) -> None:
    """Central differences, on samples in two dimensions."""
    variation = KernelDiversity(NEAR, order).first_variation(Empirical(PLANE.sample(400, Seed(4))))
    x, h = PLANE.sample(20, Seed(5)), 1e-5
    for d in range(2):
        step = torch.zeros_like(x)
        step[:, d] = h
        numeric = (variation.value(x + step) - variation.value(x - step)) / (2 * h)
        torch.testing.assert_close(variation.grad(x)[:, d], numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:KernelDiversity:UserWarning")  # few landmarks, on purpose
def test_order_one_is_concave() -> None:
    """F[q] <= F[p] + int delta F[p] (q - p), also where landmarks leave much unexplained."""
    points, generator = PLANE.sample(80, Seed(6)), Seed(7).generator()
    laws = [Empirical(points, torch.rand(80, generator=generator) ** 4) for _ in range(5)]
    f = KernelDiversity(NEAR, ridge=0.01, num_landmarks=10)
    assert f.curvature == "concave"
    for p in laws:
        variation = f.first_variation(p)
        level = f.value(p).value - float(p.expect(variation.value))
        for q in laws:
            assert f.value(q).value <= level + float(q.expect(variation.value)) + 1e-9


def test_order_two_is_neither() -> None:
    """From one far point to two others it is convex at first; between two points concave."""
    f = KernelDiversity(NEAR, 2)
    assert f.curvature == "neither"

    def bend(start: list[float], end: list[float], t: float, h: float = 1e-3) -> float:
        def at(t: float) -> float:
            masses = [(1 - t) * a + t * b for a, b in zip(start, end, strict=True)]
            return f.value(atoms(masses)).value

        return (at(t + h) + at(t - h) - 2 * at(t)) / h**2

    # Q = (1 - t)^2 + t^2 / 2: (log Q)'' = 3 - 4 at t = 0; (1 - t)^2 + t^2: 8 at t = 1/2.
    assert bend([1, 0, 0], [0, 0.5, 0.5], 1.1e-3) == pytest.approx(1, abs=0.01)
    assert bend([1, 0], [0, 1], 0.5) == pytest.approx(-8, abs=0.01)


def test_order_two_is_quasi_concave() -> None:
    """Along mixtures it is never below both ends."""
    points, generator = PLANE.sample(40, Seed(8)), Seed(9).generator()
    f = KernelDiversity(NEAR, 2)

    def value(weights: Tensor) -> float:
        return f.value(Exact(points, weights)).value

    for _ in range(20):
        a, b = (torch.rand(40, generator=generator, dtype=torch.float64) ** 4 for _ in range(2))
        a, b = a / a.sum(), b / b.sum()
        assert value((a + b) / 2) >= min(value(a), value(b)) - 1e-12


def test_reward_of_novelty() -> None:
    """A point mass: delta F is -log(1 + 1/e) there and 0 far away, whatever the ridge e."""
    p, far = atoms([1.0]), torch.tensor([[0.0], [1e4]], dtype=torch.float64)
    for e in (1e-6, 1e-2):
        values = KernelDiversity(NEAR, ridge=e).first_variation(p).value(far)
        assert values.tolist() == pytest.approx([-math.log(1 + 1 / e), 0], abs=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_raising_it_evens_out(order: Any) -> None:
    """Exact mirror descent on far points: masses 0.7, 0.2, 0.1 become equal thirds."""
    f, p = KernelDiversity(NEAR, order), atoms([0.7, 0.2, 0.1])
    for _ in range(60):
        variation = f.first_variation(p).value(p.bank.points)
        p = atoms((p.bank.weights * (0.3 * variation).exp()).tolist())
    assert p.bank.weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-4)


# ------------------------------------------------------------------------------ on samples


@pytest.mark.parametrize("order", [1, 2])
def test_standard_errors(order: Any) -> None:
    """Over 150 banks: spread as reported; the mean as on the grid, for order 2 without bias."""
    grid = Quadrature.of([axis(-5, 4.5, 1000)], GATEAUX_P.log)
    f = KernelDiversity(NEAR, order)
    out = [f.value(Empirical(GATEAUX_P.sample(300, Seed(10).child(i)))) for i in range(150)]
    values = torch.tensor([o.value for o in out], dtype=torch.float64)
    reported = sum(o.standard_error for o in out) / len(out)
    assert float(values.std()) / reported == pytest.approx(1, abs=2 * 4.5 / math.sqrt(300))
    exact, error = f.value(grid).value, reported / math.sqrt(150)
    if order == 2:
        similar, truth = (-values).exp(), math.exp(-exact)
        assert abs(float(similar.mean()) - truth) < 4.5 * error * truth
    else:  # low, by a term of order 1 / N
        assert -10 / 300 < float(values.mean()) - exact < 4.5 * error


def test_single_precision_and_images() -> None:
    """States of any shape and in float32: as in float64, to six digits of the kernel."""
    points = PLANE.sample(150, Seed(11)).repeat(1, 2).reshape(150, 1, 2, 2)
    for order in (1, 2):
        f = KernelDiversity(GaussianSimilarity(1.0), order)  # type: ignore[arg-type]
        exact, single = f.value(Empirical(points)), f.value(Empirical(points.float()))
        assert single.value == pytest.approx(exact.value, abs=1e-3)
        variation = f.first_variation(Empirical(points.float()))
        grad = variation.grad(points.float())
        assert grad.shape == points.shape
        assert grad.dtype == torch.float32
        reference = f.first_variation(Empirical(points)).grad(points)
        torch.testing.assert_close(grad.double(), reference, rtol=0.02, atol=0.02)


def test_landmarks() -> None:
    """The factor reproduces the kernel among landmarks, and everywhere once they are enough."""
    points = PLANE.sample(200, Seed(12))
    features = LandmarkFeatures.of(NEAR, points, 200)
    assert 20 < len(features.landmarks) < 200
    phi = features.value(points)
    torch.testing.assert_close(phi @ phi.T, NEAR.matrix(points, points), rtol=0, atol=2e-6)
    few = LandmarkFeatures.of(NEAR, points, 7)
    assert len(few.landmarks) == 7
    phi = few.value(few.landmarks)
    torch.testing.assert_close(phi @ phi.T, NEAR.matrix(few.landmarks, few.landmarks))
    assert bool(((few.value(points) ** 2).sum(1) <= 1 + 1e-12).all())


def test_too_few_landmarks() -> None:
    """Said, with by how much the entropy may be too high; which it then is, and not by more."""
    p = Empirical(PLANE.sample(400, Seed(13)))
    with pytest.warns(UserWarning, match=r"20 landmarks leave (.*)% .* too high by up to (\S+)\."):
        few = KernelDiversity(NEAR, num_landmarks=20).value(p).value
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        enough = KernelDiversity(NEAR).value(p).value
        KernelDiversity(NEAR, num_landmarks=20).value(p)
    assert len(caught) == 1
    most = float(str(caught[0].message).split("up to ")[1].split(". ")[0])
    assert enough < few < enough + most


# ----------------------------------------------------------------------------- what is refused


@final
@dataclass(frozen=True, eq=False)
class Unnormalised(Similarity):
    """2 exp(-|x - y|^2)."""

    features: Features | None = None

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * (-(torch.cdist(x, y) ** 2)).exp()


def test_refused_kernels() -> None:
    """Not positive definite, without a bandwidth, not normalised, zero for a zero state."""
    with pytest.raises(ConfigError, match="NegativeDistance is not positive definite"):
        KernelDiversity(NegativeDistance())
    with pytest.raises(ConfigError, match=r"GaussianSimilarity has no bandwidth.*fitted\(samples"):
        KernelDiversity(GaussianSimilarity())
    p, zero = Empirical(PLANE.sample(50, Seed(14))), Empirical(torch.zeros(5, 2))
    for order in (1, 2):
        with pytest.raises(ConfigError, match=r"k\(x, x\) of Unnormalised is off 1 by 1"):
            KernelDiversity(Unnormalised(), order).value(p)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="not zero for CosineSimilarity"):
            KernelDiversity(CosineSimilarity(), order).first_variation(zero)  # type: ignore
    fitted = GaussianSimilarity().fitted(p.bank.points)
    assert math.isfinite(KernelDiversity(fitted).value(p).value)


def test_opposite_samples() -> None:
    """A mean similarity that is not positive has no logarithm; nor has a single sample a pair."""
    opposite = Empirical(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64))
    for p in (opposite, Empirical(torch.ones(1, 2))):
        with pytest.raises(UnsupportedError, match="no logarithm"):
            KernelDiversity(CosineSimilarity(), 2).value(p)


@pytest.mark.parametrize(
    "arguments", [{"order": 3}, {"ridge": 0.0}, {"ridge": 1.0}, {"num_landmarks": 0}]
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        KernelDiversity(NEAR, **arguments)


def test_run_file() -> None:
    """It can be written in a run file, and its resolved form is a valid one."""
    table = {
        "kind": "KernelDiversity", "order": 2,
        "similarity": {"kind": "GaussianSimilarity", "bandwidth": 0.5},
    }  # fmt: skip
    node = interpret(Functional, table, "objective.utility")
    built = node.build({})
    assert isinstance(built, KernelDiversity)
    assert built.order == 2
    assert interpret(Functional, node.plain, "again").plain == node.plain
    assert str(built) == "KernelDiversity(GaussianSimilarity, order=2)"
