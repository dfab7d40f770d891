from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tiltflow.divergences
import tiltflow.utilities
from oracles import (
    FUNCTIONALS,
    GATEAUX_P,
    GATEAUX_PRIOR,
    GATEAUX_REWARD,
    axis,
    grid,
)
from oracles.gateaux import PRIOR, P, Q, gateaux, nodes
from tiltflow.analytic import gaussian
from tiltflow.density import Bank, Density, Empirical, FlowDensity
from tiltflow.divergences import KL
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.functional import Combined, Functional, check, error_of, influence
from tiltflow.kernel import MomentMatched
from tiltflow.potential import BlackBox, Differentiable, Potential
from tiltflow.rewards.points import Linear
from tiltflow.sample import Sampler
from tiltflow.schedule import Cosine
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond
from tiltflow.utilities import (
    EntropicRisk,
    Entropy,
    ExpectedReward,
    LeftCVaR,
    MeanVariance,
    RightCVaR,
)

ACCESSES = (Access.NONE, Access.VALUE, Access.GRAD, Access.BOTH)
names = pytest.mark.parametrize("name", sorted(FUNCTIONALS))


class Restricted(Potential):
    """A potential of which only some abilities are shown."""

    def __init__(self, inner: Potential, access: Access) -> None:
        self.inner, self.access = inner, access

    @property
    def offers(self) -> Access:
        return self.access & self.inner.offers

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.inner.value(x, cond)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.inner.grad(x, cond)


class Shy(Density):
    """Another density, with a restricted log."""

    def __init__(self, inner: Density, access: Access) -> None:
        self.inner, self._log = inner, Restricted(inner.log, access)

    @property
    def bank(self) -> Bank:
        return self.inner.bank

    @property
    def log(self) -> Potential:
        return self._log


# ---------------------------------------------------------------- contract of every functional


def test_every_functional_is_under_contract() -> None:
    """The list of examples is the list of exported functionals."""
    exported = {*tiltflow.utilities.__all__, *tiltflow.divergences.__all__}
    functionals = {
        name
        for name in exported
        for module in (tiltflow.utilities, tiltflow.divergences)
        if isinstance(getattr(module, name, None), type)
        and issubclass(getattr(module, name), Functional)
    }
    assert functionals == {name.split()[0] for name in FUNCTIONALS}


@names
def test_gateaux(name: str) -> None:
    """d/de F[(1-e) p + e q] = int delta F (q - p) at an interior mixture: 1e-6 relative."""
    numeric, predicted = gateaux(FUNCTIONALS[name](GATEAUX_REWARD, PRIOR))
    assert abs(predicted) > 1e-3
    assert numeric == pytest.approx(predicted, rel=1e-6)


@names
def test_offers_are_truthful(name: str) -> None:
    """What `offers` promises is there, and works; `offers_at` is exactly what is there."""
    x = torch.linspace(-2, 2, 11, dtype=torch.float64)[:, None]
    for reward in (
        GATEAUX_REWARD,
        BlackBox(lambda x: x[:, 0]),
        Restricted(GATEAUX_REWARD, Access.GRAD),
    ):
        for access in ACCESSES:
            p = Shy(GATEAUX_P, access)
            functional = FUNCTIONALS[name](reward, Shy(GATEAUX_PRIOR, access))
            promised = functional.offers(p.log.offers)
            assert functional.offers_at(p) & promised == promised
            if functional.offers_at(p) is Access.NONE:
                continue
            variation = functional.first_variation(p)
            assert variation.offers == functional.offers_at(p)
            if Access.VALUE in promised:
                assert variation.value(x).shape == (11,)
            if Access.GRAD in promised:
                assert variation.grad(x).shape == (11, 1)


@names
def test_gradient_of_the_first_variation(name: str) -> None:
    """The gradient offered is that of the value offered (central differences)."""
    functional = FUNCTIONALS[name](GATEAUX_REWARD, GATEAUX_PRIOR)
    variation = functional.first_variation(GATEAUX_P)
    x, h = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None], 1e-6
    numeric = (variation.value(x + h) - variation.value(x - h)) / (2 * h)
    torch.testing.assert_close(variation.grad(x)[:, 0], numeric, rtol=1e-5, atol=1e-6)


@names
def test_batches_do_not_matter(name: str) -> None:
    """Permuting or splitting a batch changes no value of the first variation."""
    variation = FUNCTIONALS[name](GATEAUX_REWARD, PRIOR).first_variation(P)
    x = torch.linspace(-2, 2, 10, dtype=torch.float64)[:, None]
    whole = variation.value(x)
    torch.testing.assert_close(variation.value(x.flip(0)).flip(0), whole, rtol=1e-12, atol=1e-12)
    halves = torch.cat([variation.value(x[:4]), variation.value(x[4:])])
    torch.testing.assert_close(halves, whole, rtol=1e-12, atol=1e-12)


@names
def test_value_on_a_bank(name: str) -> None:
    """On 20 000 samples the value is the grid's within 4.5 standard errors, which are not zero."""
    bank = gaussian([-0.3], 0.9)
    out = FUNCTIONALS[name](GATEAUX_REWARD, GATEAUX_PRIOR).value(bank)
    exact = FUNCTIONALS[name](GATEAUX_REWARD, PRIOR).value(P)
    assert exact.standard_error == 0
    assert out.standard_error > 0
    assert out.count == 10_000
    assert abs(out.value - exact.value) < 4.5 * out.standard_error


DIVERGENCES = sorted(set(FUNCTIONALS) & set(tiltflow.divergences.__all__))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(name: str) -> None:
    """D >= 0; D(prior, prior) = 0, where the first variation is constant."""
    divergence = FUNCTIONALS[name](GATEAUX_REWARD, PRIOR)
    assert divergence.value(P).value > 0.01
    assert divergence.value(Q).value > 0.01
    same = nodes(GATEAUX_PRIOR)
    assert divergence.value(same).value == pytest.approx(0, abs=1e-12)
    assert float(divergence.first_variation(same).value(same.nodes).std()) < 1e-9


# ------------------------------------------------------------------------------- each of them


def test_expected_reward() -> None:
    """E r, and the reward itself."""
    f = ExpectedReward(Linear(2.0))
    assert f.value(P).value == pytest.approx(-0.6, abs=1e-9)
    assert f.first_variation(P) is f.reward


def test_entropy_of_a_gaussian() -> None:
    """log(s sqrt(2 pi e)), and minus the score."""
    exact = math.log(0.9 * math.sqrt(2 * math.pi * math.e))
    assert Entropy().value(P).value == pytest.approx(exact, rel=1e-9)
    x = torch.tensor([[0.4]], dtype=torch.float64)
    assert float(Entropy().first_variation(GATEAUX_P).grad(x)) == pytest.approx(0.7 / 0.81)


def test_kl_of_gaussians() -> None:
    """log(t/s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2, and the difference of scores."""
    exact = math.log(1.3 / 0.9) + (0.81 + 0.25) / (2 * 1.69) - 0.5
    # 1e-9 of the prior's mass lies beyond the grid.
    assert KL(PRIOR).value(P).value == pytest.approx(exact, abs=5e-9)
    x = torch.tensor([[0.4]], dtype=torch.float64)
    grad = KL(GATEAUX_PRIOR).first_variation(GATEAUX_P).grad(x)
    assert float(grad) == pytest.approx(-0.7 / 0.81 + 0.2 / 1.69)


def test_fractional_boundary() -> None:
    """Values 1..10, RightCVaR(.75): (10 + 9 + .5 * 8) / 2.5 = 9.2; and the mirror image."""
    p = Empirical(torch.arange(1.0, 11)[:, None].repeat(40, 1))
    x = Linear(1.0)
    assert RightCVaR(x, 0.75).value(p).value == pytest.approx(9.2, rel=1e-12)
    assert LeftCVaR(x, 0.25).value(p).value == pytest.approx((1 + 2 + 0.5 * 3) / 2.5, rel=1e-12)


def test_weighted_boundary() -> None:
    """Integer weights are repetitions: a weighted bank gives what the repeated one gives."""
    values, counts = torch.randn(60, generator=Seed(0).generator()), torch.arange(60) % 4 + 1
    weighted = Empirical(values[:, None], counts.double())
    repeated = Empirical(values.repeat_interleave(counts)[:, None])
    for f in (RightCVaR(Linear(1.0), 0.63), LeftCVaR(Linear(1.0), 0.37)):
        assert f.value(weighted).value == pytest.approx(f.value(repeated).value, rel=1e-6)


def test_tails_of_a_gaussian() -> None:
    """Best fifth of N(0, 1): phi(z)/0.2 = 1.3998; slopes exactly 1/level and 1/(1 - level)."""
    p = grid(gaussian([0.0], 1.0), -8, 8, 16_001)
    right, left = RightCVaR(Linear(1.0), 0.8), LeftCVaR(Linear(1.0), 0.2)
    exact = math.exp(-0.5 * 0.8416212335729143**2) / math.sqrt(2 * math.pi) / 0.2
    assert right.value(p).value == pytest.approx(exact, abs=1e-6)
    assert left.value(p).value == pytest.approx(-exact, abs=1e-6)
    assert right.first_variation(p).slope == pytest.approx(5, rel=1e-15)
    assert left.first_variation(p).slope == pytest.approx(5, rel=1e-15)
    assert right.active_fraction(p) == pytest.approx(0.2, abs=1e-3)
    assert left.active_fraction(p) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("level", [0.1, 0.5, 0.83])
def test_mirror_image(level: float) -> None:
    """RightCVaR_b(r) = -LeftCVaR_{1-b}(-r), values and gradients (oracle 29)."""
    r = GATEAUX_REWARD
    right, left = RightCVaR(r, level), LeftCVaR(-r, 1 - level)
    assert right.value(P).value == pytest.approx(-left.value(P).value, rel=1e-3)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(right.first_variation(P).grad(x), -left.first_variation(P).grad(x))


def test_tails_become_the_mean() -> None:
    """RightCVaR level -> 0 and LeftCVaR level -> 1 are E r."""
    mean = ExpectedReward(GATEAUX_REWARD).value(P).value
    assert RightCVaR(GATEAUX_REWARD, 1e-9).value(P).value == pytest.approx(mean, abs=1e-6)
    assert LeftCVaR(GATEAUX_REWARD, 1 - 1e-9).value(P).value == pytest.approx(mean, abs=1e-6)


def test_too_few_tail_samples() -> None:
    """A tail with fewer than 10 effective samples is refused, with the size that is needed."""
    p = gaussian([0.0], 1.0)
    few = Empirical(p.sample(400, Seed(0)))
    with pytest.raises(ConfigError, match=r"LeftCVaR.*4\.0 are in the tail.*num_samples >= 10000"):
        LeftCVaR(Linear(1.0), 0.01).first_variation(few)
    with pytest.raises(ConfigError, match="RightCVaR"):
        RightCVaR(Linear(1.0), 0.99).value(few)
    RightCVaR(Linear(1.0), 0.9).value(few)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.2, 1.5, math.nan])
def test_bad_level(level: float) -> None:
    """A level lies strictly between 0 and 1."""
    with pytest.raises(ConfigError, match="level"):
        LeftCVaR(Linear(1.0), level)


@pytest.mark.parametrize(
    "make", [lambda r: RightCVaR(r, 0.8), lambda r: LeftCVaR(r, 0.2), ExpectedReward]
)
def test_standard_errors_are_calibrated(make: object) -> None:
    """Over 300 banks the spread of estimates is the reported error: ratio within 4.5/sqrt(600).

    Twice that is allowed for the tails, whose influence function drops terms of order 1/n.
    """
    f = make(GATEAUX_REWARD)  # type: ignore[operator]
    banks = [Empirical(GATEAUX_P.sample(500, Seed(0).child(i))) for i in range(300)]
    out = [f.value(bank) for bank in banks]
    values = torch.tensor([o.value for o in out])
    reported = sum(o.standard_error for o in out) / len(out)
    assert float(values.std()) / reported == pytest.approx(1, abs=2 * 4.5 / math.sqrt(600))
    error = reported / math.sqrt(300)
    assert abs(float(values.mean()) - f.value(P).value) < 4.5 * error + 0.01


# ------------------------------------------------------------------------------------ algebra


def test_terms() -> None:
    """Objectives are flat lists of (coefficient, functional); identical ones are collected."""
    f, g, h = Entropy(), ExpectedReward(Linear(1.0)), KL(PRIOR)
    objective = f - 0.5 * (g - 2 * h) + 3 * f
    assert isinstance(objective, Combined)
    assert objective.terms == ((4.0, f), (-0.5, g), (1.0, h))
    assert f.terms == ((1.0, f),)
    assert (-f).terms == ((-1.0, f),)
    assert (f - f).terms == ()
    assert str(g - 0.5 * h) == "ExpectedReward(Linear(1.0)) - 0.5 KL(Quadrature)"
    assert str(-g) == "-ExpectedReward(Linear(1.0))"


def test_combination_is_linear() -> None:
    """Value and first variation of F - 0.5 D + 2 G are those of the parts; Gateaux to 1e-6."""
    f, g, h = Entropy(), RightCVaR(GATEAUX_REWARD, 0.8), KL(PRIOR)
    objective = f - 0.5 * h + 2 * g
    parts = f.value(P).value - 0.5 * h.value(P).value + 2 * g.value(P).value
    assert objective.value(P).value == pytest.approx(parts, rel=1e-12)
    assert objective.value(P).standard_error == 0
    numeric, predicted = gateaux(objective)
    assert numeric == pytest.approx(predicted, rel=1e-6)


def test_offers_of_a_combination() -> None:
    """The intersection of the terms'."""
    black = ExpectedReward(BlackBox(lambda x: x[:, 0]))
    assert (Entropy() + black).offers(Access.BOTH) is Access.VALUE
    assert (Entropy() + black).offers(Access.GRAD) is Access.NONE
    assert (Entropy() - 0.5 * KL(PRIOR)).offers(Access.GRAD) is Access.GRAD


def test_errors_of_correlated_terms() -> None:
    """E r - E r' with r' = r has error 0, not sqrt(2) that of E r; E r + E r' has twice that."""
    r = GATEAUX_REWARD
    f, g = ExpectedReward(r), ExpectedReward(Differentiable(lambda x: r.value(x)))
    p = GATEAUX_P
    assert (f - g).value(p).standard_error == pytest.approx(0, abs=1e-12)
    single = f.value(p).standard_error
    assert (f + g).value(p).standard_error == pytest.approx(2 * single, rel=1e-9)
    assert error_of(influence(r, p), p) == pytest.approx(single, rel=1e-9)


def test_errors_without_influence() -> None:
    """Where a first variation has no value, errors of the terms are added in squares."""
    model = gaussian([0.5], 1.0).flow(hidden=())
    p = FlowDensity(model, num_samples=200, sampler=Sampler(num_steps=10))
    prior = FlowDensity(gaussian([0.0], 0.8).flow(hidden=()), num_samples=200)
    f, h = ExpectedReward(Linear(1.0)), KL(prior)
    parts = f.value(p).standard_error, h.value(p).standard_error
    assert min(parts) > 0
    assert (f - h).value(p).standard_error == pytest.approx(math.hypot(*parts), rel=1e-9)


# ---------------------------------------------------------------------- KL between flow models


def exact_sampler(mean: float, steps: int = 10) -> Sampler:
    """A sampler whose chain on N(mean, 1) is exact."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    table = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
    return Sampler(MomentMatched(tuple(t.tolist()), tuple(table.tolist())), num_steps=steps)


def flow_density(mean: float, count: int = 20_000, **kwargs: object) -> FlowDensity:
    return FlowDensity(
        gaussian([mean], 1.0).flow(hidden=()), num_samples=count, sampler=exact_sampler(mean),
        seed=Seed(5).child("mean", str(mean)), **kwargs,  # type: ignore[arg-type]
    )  # fmt: skip


def test_tracked_ratio() -> None:
    """log p = log prior + psi: the first variation is psi, with a value, and no score is read."""
    prior, psi = flow_density(0.0), Linear(0.5)
    p = flow_density(0.5).with_log(prior.log + psi)
    kl = KL(prior)
    assert kl.offers(p.log.offers) is Access.GRAD
    assert kl.offers_at(p) is Access.BOTH
    assert "bank" not in p.__dict__  # nothing was drawn to find out
    assert kl.first_variation(p) is psi
    out = kl.value(p)
    assert abs(out.value - 0.125) < 4.5 * out.standard_error
    assert 0 < out.standard_error < 0.02


def test_error_of_the_normaliser_is_kept() -> None:
    """KL = E_p psi - log E_prior e^psi: the error of the second bank survives combination."""
    prior, psi = flow_density(0.0, 500), Linear(0.5)
    p = flow_density(0.5).with_log(prior.log + psi)
    alone = KL(prior).value(p)
    mean_only = p.estimate(psi.value).standard_error
    assert alone.standard_error > 1.5 * mean_only
    assert (1.0 * KL(prior)).value(p).standard_error == pytest.approx(alone.standard_error)


def test_constants_of_a_ratio_do_not_matter() -> None:
    """psi + const gives the same KL: the normaliser is estimated, not assumed."""
    prior = flow_density(0.0)
    p = flow_density(0.5)
    psi = Differentiable(lambda x: 0.5 * x[:, 0] + 3.0)
    a = KL(prior).value(p.with_log(prior.log + Linear(0.5)))
    b = KL(prior).value(p.with_log(prior.log + psi))
    assert a.value == pytest.approx(b.value, abs=1e-5)


def test_path_kl_route() -> None:
    """Two flow densities known by their scores: the path KL, 1/2 (0.5)^2 on exact chains."""
    p, prior = flow_density(0.5, 1000), flow_density(0.0, 1000)
    assert KL(prior).offers_at(p) is Access.GRAD
    assert KL(prior).value(p).value == pytest.approx(0.125, rel=1e-3)
    assert KL(p).value(p).value == 0


def test_path_kl_needs_one_schedule() -> None:
    """Path laws on different schedules cannot be compared."""
    prior = FlowDensity(gaussian([0.0]).flow(Cosine(), hidden=()))
    with pytest.raises(UnsupportedError, match="one schedule"):
        KL(prior).value(flow_density(0.5, 10))


def test_kl_value_without_densities() -> None:
    """Samples alone have no KL: the message names both sides and the remedy."""
    p = Empirical(torch.zeros(5, 1))
    with pytest.raises(CapabilityError, match=r"Empirical offers nothing.*FlowDensity objects"):
        KL(flow_density(0.0)).value(p)


def test_entropy_value_needs_the_normaliser() -> None:
    """-E log p is refused where log p is unknown, or known up to a constant only."""
    p = flow_density(0.5, 10)
    with pytest.raises(CapabilityError, match=r"Entropy.value"):
        Entropy().value(p)
    with pytest.raises(CapabilityError, match="up to a constant"):
        Entropy().value(p.with_log(gaussian([0.0], 1.0).log + Linear(0.5)))
    known = flow_density(0.5).with_log(gaussian([0.5], 1.0).log)
    out = Entropy().value(known)
    assert abs(out.value - 0.5 * math.log(2 * math.pi * math.e)) < 4.5 * out.standard_error


# -------------------------------------------------------------------------------------- check


def test_check() -> None:
    """A missing ability is a sentence, found without drawing a sample."""
    p = flow_density(0.0)
    objective = ExpectedReward(Linear(1.0)) + Entropy()
    check(objective, p, Access.GRAD, "AdjointMatching")
    with pytest.raises(
        CapabilityError,
        match=r"Entropy offers GRAD here \(FlowDensity knows its score, not its log-probability\)"
        r"; WeightedMatching needs VALUE: VALUE is missing\. Use a solver that needs gradients",
    ):
        check(objective, p, Access.VALUE, "WeightedMatching")
    assert "bank" not in p.__dict__
    black = ExpectedReward(BlackBox(lambda x: x[:, 0]))
    with pytest.raises(
        CapabilityError, match=r"BlackBox.*offers VALUE.*AdjointMatching needs GRAD"
    ):
        check(black, Access.BOTH, Access.GRAD, "AdjointMatching")


def test_quadrature_axes_of_the_contract() -> None:
    """The grid of the contract resolves its densities: mass beyond the ends is below 1e-6."""
    assert float(axis(-8, 8, 4001)[1] - axis(-8, 8, 4001)[0]) == pytest.approx(0.004)
    for p in (P, Q, PRIOR):
        assert float(p.probabilities[[0, -1]].max()) < 1e-9


# ---------------------------------------------------------------- mean and variance


def test_mean_variance_of_a_gaussian() -> None:
    """N(0, s^2), r = x, c: value -c s^2; the step's optimum for KL weight 1 is a Gaussian tilt.

    delta F at N(0, s^2) is x - c x^2 + const: slope 1, curvature 2 c.
    """
    density = nodes(gaussian([0.0], 0.8))
    functional = MeanVariance(Differentiable(lambda x: x[:, 0]), 0.7)
    assert functional.value(density).value == pytest.approx(-0.7 * 0.64, rel=1e-6)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    variation = functional.first_variation(density).value(x)
    torch.testing.assert_close(variation - variation[4], x[:, 0] - 0.7 * x[:, 0] ** 2)


def test_mean_variance_refuses_a_negative_aversion() -> None:
    with pytest.raises(ConfigError, match="aversion"):
        MeanVariance(GATEAUX_REWARD, -1.0)


# ---------------------------------------------------------------- entropic risk


@pytest.mark.parametrize("b", [-3.0, 0.5, 3.0])
def test_entropic_risk_of_a_gaussian(b: float) -> None:
    """N(m, s^2), r = x: (1/b) log E exp(b x) = m + b s^2 / 2, also where exp overflows."""
    density = nodes(gaussian([0.4], 0.8))
    exact = 0.4 + b * 0.64 / 2
    risk = EntropicRisk(Differentiable(lambda x: x[:, 0]), b)
    assert risk.value(density).value == pytest.approx(exact, rel=1e-6)
    shifted = EntropicRisk(Differentiable(lambda x: x[:, 0] + 1000), b)
    assert shifted.value(density).value == pytest.approx(exact + 1000, rel=1e-9)


def test_entropic_risk_standard_error() -> None:
    """The error of the plug-in value is its spread over independent banks (chi-square, 60)."""
    risk = EntropicRisk(Differentiable(lambda x: x[:, 0]), 1.0)
    mixture, found, errors = gaussian([0.0], 1.0), [], []
    for k in range(60):
        estimate = risk.value(Empirical(mixture.sample(2000, Seed(k))))
        found.append(estimate.value)
        errors.append(estimate.standard_error)
    ratio = float(torch.tensor(found).std()) / (sum(errors) / 60)
    assert 0.7 < ratio < 1.3


@pytest.mark.parametrize("b", [0.0, float("nan"), float("inf")])
def test_entropic_risk_refuses_zero(b: float) -> None:
    with pytest.raises(ConfigError, match="sensitivity"):
        EntropicRisk(GATEAUX_REWARD, b)
