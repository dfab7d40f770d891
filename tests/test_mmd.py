"""Kernel distances: closed forms, brute force, and errors that are right also at p = q."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oracles import GATEAUX_PRIOR, grid
from oracles.gateaux import PRIOR, P, gateaux, nodes
from tiltflow.analytic import gaussian
from tiltflow.density import Bank, Density, Empirical, Mixture, Quadrature, Reweighted, UnknownLog
from tiltflow.divergences import MMD, EnergyDistance
from tiltflow.errors import ConfigError, ShapeError
from tiltflow.features import FeatureMap
from tiltflow.functional import Functional
from tiltflow.potential import ZERO, Differentiable, Potential
from tiltflow.seed import Seed
from tiltflow.similarity import GaussianSimilarity, InverseMultiquadric, Similarity
from tiltflow.types import Access


class Atoms(Density):
    """Weighted points that count as known exactly."""

    def __init__(self, points: Tensor, weights: Tensor) -> None:
        self._bank = Bank(points, weights / weights.sum(), exact=True)

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def log(self) -> Potential:
        return UnknownLog("Atoms")


def normal(count: int, dimension: int, *label: str | int) -> Tensor:
    generator = Seed(1).child(*label).generator()
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def weights(count: int, *label: str | int) -> Tensor:
    return torch.rand(count, generator=Seed(2).child(*label).generator(), dtype=torch.float64)


def brute(kernel: Similarity, p: Bank, q: Bank) -> float:
    """The unbiased MMD^2, pair by pair; nodes are compared with themselves too."""

    def mean(a: Bank, b: Bank, skip: bool) -> float:
        total = mass = 0.0
        matrix = kernel.matrix(a.points, b.points)
        for i in range(len(a.points)):
            for j in range(len(b.points)):
                if not (skip and i == j):
                    each = float(a.weights[i] * b.weights[j])
                    total += each * float(matrix[i, j])
                    mass += each
        return total / mass

    return mean(p, p, not p.exact) + mean(q, q, not q.exact) - 2 * mean(p, q, False)


# ------------------------------------------------------------------------------- values


def test_gaussians_in_closed_form() -> None:
    """E k(X, Y) = h / sqrt(v) exp(-d^2 / (2 v)) with v = h^2 + s^2 + t^2, d the shift."""
    h, s, t, d = 0.8, 0.9, 1.3, -0.5

    def mean(a: float, b: float, shift: float) -> float:
        v = h**2 + a**2 + b**2
        return h / math.sqrt(v) * math.exp(-(shift**2) / (2 * v))

    exact = mean(s, s, 0) + mean(t, t, 0) - 2 * mean(s, t, d)
    mmd = MMD(PRIOR, GaussianSimilarity(h))
    assert mmd.value(P).value == pytest.approx(exact, rel=1e-6)
    root = MMD(PRIOR, GaussianSimilarity(h), squared=False)
    assert root.value(P).value == pytest.approx(math.sqrt(exact), rel=1e-6)
    x = torch.tensor([[0.3], [-1.1]], dtype=torch.float64)
    v = h**2 + s**2
    mu_p = h / math.sqrt(v) * torch.exp(-((x[:, 0] + 0.3) ** 2) / (2 * v))
    v = h**2 + t**2
    mu_q = h / math.sqrt(v) * torch.exp(-((x[:, 0] - 0.2) ** 2) / (2 * v))
    torch.testing.assert_close(
        mmd.first_variation(P).value(x), 2 * (mu_p - mu_q), rtol=1e-5, atol=0
    )


def test_energy_distance_of_a_line() -> None:
    """2 int (F - G)^2, exactly for atoms."""
    x = normal(70, 1, "x")
    w, v = weights(70, "w"), weights(70, "v")
    found = EnergyDistance(Atoms(x, v)).value(Atoms(x, w)).value
    order = x[:, 0].argsort()
    gap = (w / w.sum() - v / v.sum())[order].cumsum(0)
    exact = 2 * float((gap[:-1] ** 2 * x[order, 0].diff()).sum())
    assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("exact", [(False, False), (True, False), (True, True)])
def test_against_brute_force(exact: tuple[bool, bool]) -> None:
    """Weighted banks, sampled or exact, of different sizes, in two dimensions."""
    kernel = InverseMultiquadric(0.7)
    make = [Atoms if e else Empirical for e in exact]
    p = make[0](normal(23, 2, "p") + 0.4, weights(23, "p"))
    q = make[1](normal(31, 2, "q"), weights(31, "q"))
    out = MMD(q, kernel).value(p)
    assert out.value == pytest.approx(brute(kernel, p.bank, q.bank), rel=1e-10)
    assert (out.standard_error == 0) == all(exact)
    assert out.count == (0 if exact[0] else 23)


def test_no_bias() -> None:
    """Over 300 pairs of small banks the mean is MMD^2, at p = q (where it is 0) and elsewhere."""
    kernel = GaussianSimilarity(0.8)
    for shift in (0.0, 0.6):
        p, q = gaussian([shift], 0.9), gaussian([0.0], 0.9)
        found = torch.tensor(
            [
                MMD(Empirical(q.sample(20, Seed(k).child("q"))), kernel)
                .value(Empirical(p.sample(15, Seed(k).child("p"))))
                .value
                for k in range(300)
            ]
        )
        exact = MMD(nodes(q), kernel).value(nodes(p)).value
        assert abs(float(found.mean()) - exact) < 4.5 * float(found.std()) / math.sqrt(300)
        assert float(found.min()) < 0 or shift > 0


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("make", [MMD, EnergyDistance])
def test_standard_errors_are_calibrated(make: type[MMD], shift: float) -> None:
    """Over 120 pairs of weighted banks: the spread is the error, which may be larger at p = q.

    A spread of 120 values is known to 6.5 %.
    """
    p, q = gaussian([shift, 0.0], 1.0), gaussian([0.0, 0.0], 1.0)
    out = []
    for k in range(120):
        x = p.sample(150, Seed(k).child("p"))
        tilt = 0.3 * x[:, 1] - 0.045
        sampled = Empirical(x - torch.tensor([0.0, 0.3]), tilt.exp())
        out.append(make(Empirical(q.sample(200, Seed(k).child("q")))).value(sampled))
    spread = float(torch.tensor([o.value for o in out]).std())
    reported = math.sqrt(sum(o.standard_error**2 for o in out) / 120)
    low, high = (0.75, 1.65) if shift < 0.5 else (0.75, 1.35)
    assert low < reported / spread < high


def test_standard_error_of_a_tilt_of_the_prior() -> None:
    """A re-weighted bank is one sample: errors of both sides are one, and 0 without a tilt."""
    q, psi, kernel = gaussian([0.0], 1.0), Differentiable(lambda x: 0.5 * x[:, 0]), 0.8
    exact = MMD(nodes(q), GaussianSimilarity(kernel)).value(nodes(q.tilted([0.5])[0])).value
    out = []
    for k in range(150):
        prior = Empirical(q.sample(200, Seed(k)))
        mmd = MMD(prior, GaussianSimilarity(kernel))
        out.append(mmd.value(Reweighted(prior.bank, prior.log, psi)))
        same = mmd.value(Reweighted(prior.bank, prior.log))
        assert (same.value, same.standard_error) == (0, 0)
    found = torch.tensor([o.value for o in out])
    assert (
        abs(float(found.mean()) - exact) < 4.5 * float(found.std()) / math.sqrt(150) + 0.02 * exact
    )
    reported = math.sqrt(sum(o.standard_error**2 for o in out) / 150)
    assert 0.75 < reported / float(found.std()) < 1.33


# ---------------------------------------------------------------- first variation


@pytest.mark.parametrize("make", [MMD, EnergyDistance])
def test_weights_are_repetitions(make: type[MMD]) -> None:
    """Integer weights give the first variation of the repeated bank."""
    x, q = normal(20, 2, "x"), Empirical(normal(30, 2, "q"))
    counts = torch.arange(20) % 3 + 1
    at = normal(6, 2, "at")
    divergence = make(q)
    weighted = divergence.first_variation(Empirical(x, counts.double()))
    repeated = divergence.first_variation(Empirical(x.repeat_interleave(counts, 0)))
    torch.testing.assert_close(weighted.value(at), repeated.value(at))
    torch.testing.assert_close(weighted.grad(at), repeated.grad(at))


@pytest.mark.parametrize("squared", [True, False])
def test_envelope(squared: bool) -> None:
    """Moving one atom of p changes the value by its weight times the gradient there."""
    x, w, q = normal(15, 2, "x"), weights(15, "w"), Atoms(normal(12, 2, "q"), weights(12, "q"))
    mmd = MMD(q, GaussianSimilarity(0.9), squared=squared)
    p, h = Atoms(x, w), 1e-6
    grad = mmd.first_variation(p).grad(x[4:5])[0] * p.bank.weights[4]
    for d in range(2):
        step = torch.zeros_like(x)
        step[4, d] = h
        numeric = (mmd.value(Atoms(x + step, w)).value - mmd.value(Atoms(x - step, w)).value) / (
            2 * h
        )
        assert numeric == pytest.approx(float(grad[d]), rel=1e-6)


def test_gateaux_of_the_root() -> None:
    numeric, predicted = gateaux(MMD(PRIOR, GaussianSimilarity(0.8), squared=False))
    assert abs(predicted) > 1e-3
    assert numeric == pytest.approx(predicted, rel=1e-6)


def test_at_the_prior_the_root_has_no_direction() -> None:
    """MMD is 0 there, and its first variation the zero potential."""
    same = nodes(GATEAUX_PRIOR)
    root = MMD(PRIOR, GaussianSimilarity(0.8), squared=False)
    assert root.value(same).value == 0
    assert root.first_variation(same) is ZERO


def test_root_of_samples() -> None:
    """The root of MMD^2 with an error that stays finite where MMD^2 is negative."""
    q = gaussian([0.0], 1.0)
    kernel, negative = GaussianSimilarity(0.8), 0
    for k in range(12):
        prior, p = (Empirical(q.sample(60, Seed(k).child(side))) for side in "qp")
        square, root = (MMD(prior, kernel, squared=s).value(p) for s in (True, False))
        negative += square.value < 0
        assert root.value == pytest.approx(math.sqrt(max(square.value, 0)))
        assert 0 < root.standard_error <= math.sqrt(square.standard_error) * (1 + 1e-12)
    assert 0 < negative < 12
    far = Empirical(q.sample(2000, Seed(3)) + 2)
    prior = Empirical(q.sample(2000, Seed(4)))
    square, root = (MMD(prior, kernel, squared=s).value(far) for s in (True, False))
    assert root.standard_error == pytest.approx(square.standard_error / (2 * root.value), rel=0.05)


# ---------------------------------------------------------------- the prior


def test_bandwidth_is_the_priors() -> None:
    """The median distance of the prior's samples; p does not change it."""
    prior = Empirical(normal(400, 2, "q"))
    mmd = MMD(prior)
    exact = float(torch.pdist(prior.bank.points).median())
    for scale in (1.0, 10.0):
        mmd.value(Empirical(scale * normal(100, 2, "p")))
        assert getattr(mmd.kernel, "bandwidth", None) == pytest.approx(exact)


def test_features() -> None:
    """Only what the features show counts."""
    first = FeatureMap(lambda x: x[:, :1])
    q, p = normal(50, 2, "q"), normal(40, 2, "p")
    for make in (
        lambda prior, f: EnergyDistance(prior, f),
        lambda prior, f: MMD(prior, GaussianSimilarity(features=f)),
    ):
        seen = make(Empirical(q), first).value(Empirical(p)).value
        alone = make(Empirical(q[:, :1]), None).value(Empirical(p[:, :1])).value
        assert seen == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("make", [MMD, EnergyDistance])
def test_what_it_is(make: type[MMD]) -> None:
    prior = Empirical(normal(10, 1, "q"))
    divergence: Functional = make(prior)
    assert divergence.curvature == "convex"
    assert divergence.priors == (prior,)
    assert divergence.offers(Access.NONE) is Access.BOTH
    assert str(divergence).startswith(make.__name__)


def test_convex() -> None:
    """Along mixtures of densities on a grid, values lie below the chord."""
    ends = [grid(gaussian([m], 0.7), -8, 8, 1001) for m in (-1.0, 1.5)]
    prior = grid(gaussian([0.2], 1.3), -8, 8, 1001)
    middle = Quadrature(ends[0].axes, torch.logaddexp(ends[0].table, ends[1].table))
    for divergence in (
        EnergyDistance(prior), MMD(prior), MMD(prior, squared=False),
    ):  # fmt: skip
        chord = sum(divergence.value(end).value for end in ends) / 2
        assert divergence.value(middle).value < chord - 1e-3


# ---------------------------------------------------------------- errors


def test_shapes_must_agree() -> None:
    for divergence in (MMD(Empirical(normal(9, 3, "q"))), EnergyDistance(gaussian([0.0, 0.0]))):
        with pytest.raises(ShapeError, match=r"shape \(1,\).*prior"):
            divergence.value(Empirical(normal(9, 1, "p")))
        with pytest.raises(ShapeError):
            divergence.first_variation(Empirical(normal(9, 1, "p")))


def test_one_sample_is_not_enough() -> None:
    """There is no second sample to compare with: alone, or with all the weight."""
    prior = Empirical(normal(9, 1, "q"))
    for p in (
        Empirical(torch.zeros(1, 1)),
        Empirical(torch.randn(3, 1), torch.tensor([0.0, 1, 0])),
    ):
        with pytest.raises(ConfigError, match="one sample has all the weight"):
            MMD(prior).value(p)


def test_degenerate_prior() -> None:
    with pytest.raises(ConfigError, match="all alike"):
        MMD(Empirical(torch.ones(20, 2))).value(Empirical(normal(9, 2, "p")))


def test_mixed_precision() -> None:
    """Samples in single and in double precision can be compared; the result is in double."""
    p, q = normal(200, 2, "p"), normal(200, 2, "q")
    exact = EnergyDistance(Empirical(q)).value(Empirical(p)).value
    mixed = EnergyDistance(Empirical(q)).value(Empirical(p.float()))
    assert mixed.value == pytest.approx(exact, rel=1e-5)
    assert (
        EnergyDistance(Empirical(q))
        .first_variation(Empirical(p.float()))
        .grad(p[:3].float())
        .dtype
        is torch.float32
    )


def test_mixtures_are_banks() -> None:
    """A mixture of empirical laws is a weighted bank like any other."""
    a, b = normal(20, 1, "a"), normal(25, 1, "b") + 1
    prior = Empirical(normal(30, 1, "q"))
    whole = Empirical(
        torch.cat([a, b]), torch.cat([torch.full((20,), 0.3 / 20), torch.full((25,), 0.7 / 25)])
    )
    mixed = Mixture([Empirical(a), Empirical(b)], [0.3, 0.7])
    out, exact = EnergyDistance(prior).value(mixed), EnergyDistance(prior).value(whole)
    assert out.value == pytest.approx(exact.value, rel=1e-6)
    assert out.standard_error == pytest.approx(exact.standard_error, rel=1e-5)
