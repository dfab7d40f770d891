"""Density ratios, known and learned, and critics, against closed forms."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiltflow.analytic import GaussianMixture, gaussian, ring
from tiltflow.density import Bank, Density, Empirical, FlowDensity, ModelScore, Reweighted
from tiltflow.errors import (
    CapabilityError,
    ConfigError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
)
from tiltflow.potential import BlackBox, Differentiable, Potential
from tiltflow.ratio import (
    ExactRatio,
    LogisticRatio,
    WassersteinCritic,
)
from tiltflow.ratio.memo import Memo
from tiltflow.rewards.points import Linear as Slope
from tiltflow.seed import Seed
from tiltflow.training import Training
from tiltflow.types import Access, Cond

F64 = torch.float64


class Counting(Potential):
    """x -> slope x_1 + constant, counting its evaluations."""

    def __init__(self, slope: float = 0.5, constant: float = 0.0) -> None:
        self.slope, self.constant, self.calls = slope, constant, 0

    @property
    def offers(self) -> Access:
        return Access.BOTH

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        self.calls += 1
        return self.slope * x[:, 0] + self.constant

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        out = torch.zeros_like(x)
        out[:, 0] = self.slope
        return out


class Undrawn(Density):
    """A density whose bank must not be touched."""

    def __init__(self, log: Potential) -> None:
        self._log = log

    @property
    def bank(self) -> Bank:
        raise AssertionError("a bank was drawn")

    @property
    def log(self) -> Potential:
        return self._log


def sampled(mean: float, std: float, count: int, seed: int) -> Bank:
    return Bank.equal(gaussian([mean], std).sample(count, Seed(seed)))


# ------------------------------------------------------------------------------- exact ratios


def test_ratio_of_normalised_logs() -> None:
    """log p - log q as it is; nothing is drawn."""
    p, q = gaussian([0.5], 0.8), gaussian([0.0], 1.2)
    t = ExactRatio().log_ratio(Undrawn(p.log), Undrawn(q.log))
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    torch.testing.assert_close(t.value(x), p.log.value(x) - q.log.value(x))
    torch.testing.assert_close(t.grad(x), p.log.grad(x) - q.log.grad(x))
    assert t.log_normaliser == 0
    assert not t.is_estimated


def test_tracked_ratio_is_normalised() -> None:
    """log p = log q + 0.5 x + 7 with q = N(0, 1) unknown: T = 0.5 x - 0.125, E_q e^T = 1."""
    q = Reweighted(sampled(0, 1, 20_000, 0), ModelScore(gaussian([0.0]).flow(hidden=()), 0.99))
    p = Undrawn(q.log + Counting(0.5, 7.0))
    estimator = ExactRatio()
    assert estimator.offers(p, Undrawn(q.log)) is Access.BOTH
    t = estimator.log_ratio(p, q)
    x = torch.tensor([[1.0]], dtype=F64)
    # The error of log Z is sd(e^T) / sqrt(n), with variance e^0.25 - 1.
    error = math.sqrt(math.expm1(0.25) / 20_000)
    assert abs(float(t.value(x)) - 0.375) < 4.5 * error
    assert t.is_estimated
    mean = float((q.bank.weights * t.value(q.bank.points).exp()).sum())
    assert mean == pytest.approx(1, abs=1e-12)


def test_gradient_of_a_tracked_ratio() -> None:
    """The gradient of a tracked ratio is that of psi."""
    q = Reweighted(sampled(0, 1, 500, 0), gaussian([0.0]).log)
    psi = Differentiable(lambda x: 0.3 * x[:, 0] ** 2)
    t = ExactRatio().log_ratio(Undrawn(q.log + psi), q)
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    torch.testing.assert_close(t.value_and_grad(x)[1], 0.6 * x)


def test_normaliser_uses_the_weights() -> None:
    """A weighted bank is normalised like the one in which points are repeated."""
    points, counts = gaussian([0.0]).sample(200, Seed(3)), torch.arange(200) % 3 + 1
    log = gaussian([0.0]).log
    psi = Counting()
    values = [
        ExactRatio().log_ratio(Undrawn(log + psi), Reweighted(bank, log)).log_normaliser
        for bank in (
            Bank(points, counts.double() / counts.sum()),
            Bank.equal(points.repeat_interleave(counts, 0)),
        )
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_scores_alone() -> None:
    """Two flow models known by scores: the ratio offers its gradient, and draws nothing."""
    p, q = (FlowDensity(gaussian([m]).flow(hidden=()), num_samples=5) for m in (0.0, 0.5))
    t = ExactRatio().log_ratio(p, q)
    assert t.offers is Access.GRAD
    x = torch.zeros(3, 1)
    torch.testing.assert_close(t.grad(x), p.log.grad(x) - q.log.grad(x))
    assert "bank" not in p.__dict__
    assert "bank" not in q.__dict__


def test_a_density_and_itself() -> None:
    """The ratio is 1, without a normaliser, although the log is a sum of potentials."""
    p = Undrawn(gaussian([0.0]).log + Counting())
    t = ExactRatio().log_ratio(p, p)
    assert t.value(torch.randn(4, 1)).tolist() == [0, 0, 0, 0]


def test_clip() -> None:
    """|T| is bounded, and flat beyond the bound."""
    p, q = gaussian([2.0]), gaussian([0.0])  # T = 2 x - 2
    t = ExactRatio(clip=1.0).log_ratio(p, q)
    x = torch.tensor([[-3.0], [0.75], [1.25], [4.0]], dtype=F64)
    assert t.value(x).tolist() == pytest.approx([-1, -0.5, 0.5, 1])
    value, grad = t.value_and_grad(x)
    assert value.tolist() == pytest.approx([-1, -0.5, 0.5, 1])
    assert grad[:, 0].tolist() == pytest.approx([0, 2, 2, 0])
    assert t.grad(x)[:, 0].tolist() == pytest.approx([0, 2, 2, 0])
    # Where the bound acts cannot be told from scores alone.
    flows = [FlowDensity(gaussian([m]).flow(hidden=())) for m in (0.0, 0.5)]
    assert ExactRatio(clip=1.0).offers(*flows) is Access.NONE


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_bad_clip(clip: float) -> None:
    with pytest.raises(ConfigError, match="clip"):
        ExactRatio(clip=clip)


def test_unknown_ratio() -> None:
    """Samples alone have no ratio; the message names the way out."""
    p = Empirical(torch.zeros(5, 1))
    assert ExactRatio().offers(p, gaussian([0.0])) is Access.NONE
    with pytest.raises(CapabilityError, match=r"Empirical.*offers nothing.*LogisticRatio"):
        ExactRatio().log_ratio(p, gaussian([0.0]))


def test_supports_that_do_not_overlap() -> None:
    """A log-density of minus infinity is an error with remedies, not a NaN and not a 0."""
    wall = BlackBox(lambda x: torch.where(x[:, 0] > 0, 0.0, -math.inf))
    t = ExactRatio().log_ratio(Undrawn(gaussian([0.0]).log), Undrawn(wall))
    assert t.value(torch.ones(2, 1)).shape == (2,)
    with pytest.raises(NonFiniteError, match=r"positive everywhere.*LogisticRatio"):
        t.value(-torch.ones(2, 1))


def test_normaliser_without_samples() -> None:
    """A tilt by 8 standard deviations: no sample of q carries the normaliser."""
    log = gaussian([0.0]).log
    q = Reweighted(sampled(0, 1, 2000, 0), log)
    t = ExactRatio().log_ratio(Undrawn(log + Slope(8.0)), q)
    with pytest.raises(UnsupportedError, match=r"effective samples of the 2000.*smaller steps"):
        t.value(torch.zeros(1, 1))


# ------------------------------------------------------------------------------------- memory


def test_memo() -> None:
    """One evaluation per tensor; changed tensors are new ones, dead ones are forgotten."""
    memo: Memo[float] = Memo()
    calls = []

    def compute() -> float:
        calls.append(1)
        return float(len(calls))

    x = torch.zeros(3)
    cond: Cond = {"y": torch.zeros(3)}
    assert memo.of(x, None, compute) == memo.of(x, None, compute) == 1
    assert memo.of(x, cond, compute) == memo.of(x, cond, compute) == 2
    assert memo.of(x, cond, compute, state=1) == 3
    assert memo.of(torch.zeros(3), None, compute) == 4
    x.add_(1)
    assert memo.of(x, None, compute) == 5
    with torch.inference_mode():
        y = torch.zeros(3)
    assert memo.of(y, None, compute) != memo.of(y, None, compute)
    del x
    gc.collect()
    assert not memo._known


def test_ratios_of_ratios_are_evaluated_once() -> None:
    """psi_{k+1} = psi_k + f(T_k), where T_k contains psi_k: k evaluations, not 2^k."""
    from tiltflow.divergences import ForwardKL

    reward, log = Counting(0.1), gaussian([0.0]).log
    q = Reweighted(sampled(0, 1, 200, 0), log)
    divergence, psi = ForwardKL(q), 1.0 * reward
    for _ in range(12):
        p = Reweighted(sampled(0, 1, 200, 1), log + psi)
        psi = psi + 0.05 * (reward - divergence.first_variation(p))
    psi.value(torch.zeros(1, 1, dtype=F64))  # the normalisers are measured once
    reward.calls = 0
    psi.value_and_grad(torch.zeros(5, 1, dtype=F64))
    assert reward.calls == 13


# ------------------------------------------------------------------------------------ learned


QUICK = Training(num_updates=300, learning_rate=3e-3)


def test_logistic_ratio() -> None:
    """Learned from 4000 samples of each side: T within 0.15 on average, its gradient uphill."""
    p, q = gaussian([0.6, 0.0]), gaussian([0.0, 0.0])
    banks = [Empirical(d.sample(4000, Seed(i))) for i, d in enumerate((p, q))]
    estimator = LogisticRatio()
    assert estimator.offers(*banks) is Access.BOTH
    t = estimator.log_ratio(*banks)
    assert t.offers is Access.BOTH
    x = p.sample(2000, Seed(7))
    error = t.value(x) - (p.log.value(x) - q.log.value(x))
    assert float(error.abs().mean()) < 0.15
    slope = t.grad(x).mean(0)
    assert float(slope[0]) == pytest.approx(0.6, abs=0.12)
    assert float(slope[1]) == pytest.approx(0.0, abs=0.12)
    mean = float((banks[1].bank.weights * t.value(banks[1].bank.points).double().exp()).sum())
    assert mean == pytest.approx(1, abs=1e-5)
    assert t.is_estimated


def test_logistic_ratio_is_a_function_of_its_seed() -> None:
    """Same seed, same bits, whatever the global stream; which is left alone."""
    p, q = (Empirical(gaussian([m]).sample(500, Seed(i))) for i, m in enumerate((0.5, 0.0)))
    estimator, x = LogisticRatio(training=QUICK), torch.linspace(-1, 1, 5)[:, None]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = estimator.log_ratio(p, q).value(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(estimator.log_ratio(p, q).value(x), first)
    assert not torch.equal(replace(estimator, seed=Seed(5)).log_ratio(p, q).value(x), first)


def test_logistic_ratio_respects_weights() -> None:
    """q re-weighted into p by weights: the learned ratio is 0 (0.1 on average); without, not."""
    q = gaussian([0.0])
    points = q.sample(6000, Seed(1))
    weighted = Empirical(points, (0.7 * points[:, 0]).exp())
    other = Empirical(gaussian([0.7]).sample(6000, Seed(2)))
    x = torch.linspace(-0.5, 2, 30, dtype=F64)[:, None]
    estimator = LogisticRatio(training=replace(QUICK, num_updates=600))
    assert float(estimator.log_ratio(weighted, other).value(x).abs().mean()) < 0.1
    assert float(estimator.log_ratio(Empirical(points), other).value(x).abs().mean()) > 0.3


def test_logistic_ratio_of_equal_laws() -> None:
    """Nothing to learn: the held-out part keeps the network near 0."""
    p, q = (Empirical(gaussian([0.0] * 5).sample(1000, Seed(i))) for i in range(2))
    t = LogisticRatio().log_ratio(p, q)
    assert float(t.value(torch.randn(200, 5, generator=Seed(3).generator())).abs().mean()) < 0.1


def test_logistic_ratio_refuses() -> None:
    """Few samples, conditions, other shapes, bad numbers."""
    some = Empirical(torch.randn(200, 2, generator=Seed(0).generator()))
    few = Empirical(torch.randn(50, 2, generator=Seed(0).generator()))
    with pytest.raises(ConfigError, match="50 effective samples"):
        LogisticRatio().log_ratio(few, some)
    conditional = Empirical(some.bank.points, cond={"y": torch.zeros(200)})
    with pytest.raises(UnsupportedError, match="conditions"):
        LogisticRatio().log_ratio(conditional, some)
    with pytest.raises(ShapeError, match="shapes"):
        LogisticRatio().log_ratio(some, Empirical(torch.zeros(200, 3)))
    with pytest.raises(ConfigError, match="held_out"):
        LogisticRatio(held_out=1.0)
    with pytest.raises(ConfigError, match="patience"):
        LogisticRatio(patience=0)


@pytest.mark.parametrize("metric", [None, (1.0, 3.0)])
def test_wasserstein_critic_of_a_translation(metric: tuple[float, ...] | None) -> None:
    """W_1 of a translation by s is |A s|, and the potential's gradient A^2 s / |A s|."""
    q, shift = ring(), torch.tensor([0.8, 0.4], dtype=F64)
    p = GaussianMixture(q.means + shift, 0.25)
    scale = torch.tensor(metric or (1.0, 1.0), dtype=F64)
    critic = WassersteinCritic(metric=metric).fit(
        Empirical(p.sample(3000, Seed(1))), Empirical(q.sample(3000, Seed(2)))
    )
    x, y = p.sample(5000, Seed(3)), q.sample(5000, Seed(4))
    exact = float((scale * shift).norm())
    found = float(critic.value(x).mean() - critic.value(y).mean())
    # 0.06 is the sampling error of the mean shift, in units of the metric.
    assert found == pytest.approx(exact, rel=0.04, abs=0.06 * float(scale.max()))
    offset = (critic.grad(x) - scale**2 * shift / exact) / scale
    assert float(offset.square().sum(1).mean().sqrt()) < 0.15


def test_wasserstein_critic_has_no_unit() -> None:
    """States in millimetres give the same potential, in millimetres."""
    p, q = (gaussian([m, 0.0]).sample(500, Seed(i)) for i, m in enumerate((1.0, 0.0)))
    settings = WassersteinCritic(training=replace(QUICK, betas=(0.5, 0.9)))
    x = torch.randn(5, 2, generator=Seed(5).generator(), dtype=F64)
    metres = settings.fit(Empirical(p), Empirical(q)).value(x)
    millimetres = settings.fit(Empirical(1000 * p), Empirical(1000 * q)).value(1000 * x)
    torch.testing.assert_close(millimetres / 1000, metres, rtol=1e-2, atol=1e-2)


def test_wasserstein_critic_refuses() -> None:
    """A metric of another length or sign, a penalty that is none."""
    some = Empirical(torch.randn(200, 2, generator=Seed(0).generator()))
    with pytest.raises(ConfigError, match="3 entries, a state 2"):
        WassersteinCritic(metric=(1.0, 1.0, 1.0)).fit(some, some)
    with pytest.raises(ConfigError, match="positive number per entry"):
        WassersteinCritic(metric=(1.0, 0.0))
    with pytest.raises(ConfigError, match="penalty"):
        WassersteinCritic(penalty=0.0)
