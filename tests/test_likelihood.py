"""Log-densities of flow models, by their ODE and along their paths, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tiltflow.analytic import GaussianMixture, gaussian, ring
from tiltflow.delta import MLP
from tiltflow.density import Empirical, FlowDensity, ModelScore
from tiltflow.divergences import KL
from tiltflow.errors import (
    ConfigError,
    NonFiniteError,
    UnsupportedError,
)
from tiltflow.flow import ControlledProcess, FlowModel
from tiltflow.kernel import Ancestral, Deterministic, EulerMaruyama, MomentMatched
from tiltflow.ratio import (
    Likelihood,
    PathRatio,
    path_log_density,
)
from tiltflow.ratio.likelihood import grid, signs
from tiltflow.rewards.points import Linear as Slope
from tiltflow.sample import Sampler, calibrated
from tiltflow.schedule import Cosine, Linear, Schedule, Tabulated, VariancePreserving
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, Masked, Space, ZeroMean
from tiltflow.types import Access, Cond
from tiltflow.utilities import Entropy

F64 = torch.float64


# -------------------------------------------------------------------------------- likelihoods


class As(nn.Module):
    """A network that predicts what another model says."""

    def __init__(self, model: FlowModel, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = getattr(self.model, self.kind)(x, t)
        return out


CASES: list[tuple[str, Schedule]] = [
    ("endpoint", Linear()),
    ("velocity", Linear()),
    ("velocity", Cosine()),
    ("endpoint", Cosine()),
    ("noise", VariancePreserving()),
    ("score", VariancePreserving()),
    ("noise", Tabulated(torch.linspace(0.0001, 0.9999, 200).tolist())),
]


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_likelihood_of_a_mixture(kind: str, schedule: Schedule) -> None:
    """Every parametrisation and schedule, up to the error of 60 steps."""
    law = GaussianMixture([[1.0, 0.0], [-0.5, 0.8]], [0.4, 0.7], [0.4, 0.6])
    exact = law.flow(schedule, hidden=())
    model = FlowModel(As(exact, kind), schedule, Euclidean((2,)), predicts=kind)
    x = law.sample(200, Seed(1))
    error = Likelihood(model, num_steps=60).value(x) - law.log.value(x)
    # The tables of diffusion models end at alpha < 1: the law of their last state is a little
    # wider than the mixture.
    assert abs(float(error.mean())) < 3e-3
    assert float(error.std()) < 0.01


def test_likelihood_is_of_second_order() -> None:
    """Errors fall fourfold when steps double (3.6 to 4.4 times), down to thin modes."""
    law = ring()
    x = law.sample(400, Seed(1))
    errors = [
        float((Likelihood(law.flow(hidden=()), k).value(x) - law.log.value(x)).abs().mean())
        for k in (20, 40, 80)
    ]
    assert 3.6 < errors[0] / errors[1] < 4.4
    assert 3.6 < errors[1] / errors[2] < 4.4
    assert errors[1] < 0.004


def test_likelihood_of_white_noise_is_exact_but_for_the_mean() -> None:
    """u does not move on N(0, 1) data: exact at two steps."""
    law = gaussian([0.0, 0.0])
    x = law.sample(20, Seed(1))
    value = Likelihood(law.flow(hidden=()), num_steps=2).value(x)
    torch.testing.assert_close(value, law.log.value(x), rtol=1e-9, atol=1e-9)


def test_angles_are_those_of_the_schedule() -> None:
    """alpha / beta at the times is the tangent of the angles, which lie closer near the data."""
    for schedule in (Linear(), Cosine(), VariancePreserving()):
        times, angles = grid(schedule, 30)
        tangent = schedule.alpha(times[1:-1]) / schedule.beta(times[1:-1])
        torch.testing.assert_close(tangent, angles[1:-1].tan(), rtol=1e-8, atol=1e-12)
        assert float(times[0]) == 0
        assert float(times[-1]) == 1
        assert bool((angles.diff() > 0).all())
        assert bool((angles.diff().diff() < 0).all())


def test_gradient_is_the_score() -> None:
    """GRAD costs one evaluation: that of the model's score at ``score_time``."""
    model = ring().flow(hidden=())
    log, x = Likelihood(model, score_time=0.95), torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(log.grad(x), ModelScore(model, 0.95).grad(x))
    assert log.offers is Access.BOTH


def test_hutchinson() -> None:
    """Unbiased sample by sample, with independent errors; a function of x alone."""
    law = ring()
    model, x = law.flow(hidden=()), law.sample(2000, Seed(4))
    exact = Likelihood(model, 20)
    noisy = Likelihood(model, 20, trace="hutchinson", batch_size=700)
    error = noisy.value(x) - exact.value(x)
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(2000)
    assert 0.3 < float(error.std()) < 2
    torch.testing.assert_close(noisy.value(x[:10].flip(0)), noisy.value(x)[:10].flip(0))
    other = replace(noisy, seed=Seed(9))
    assert float((other.value(x[:50]) - noisy.value(x[:50])).abs().max()) > 0.1
    quiet = replace(noisy, probes=16)
    assert float((quiet.value(x) - exact.value(x)).std()) == pytest.approx(
        float(error.std()) / 4, rel=0.25
    )


def test_signs() -> None:
    """Means and products of distinct entries vanish (z < 4.5), between seeds and samples too."""
    x = torch.randn(20_000, 2, 2, generator=Seed(0).generator())
    z = signs(x, Seed(1))
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    flat = torch.cat([z.flatten(1), signs(x, Seed(2)).flatten(1)], 1)
    bound = 4.5 / math.sqrt(len(x))
    assert float(flat.mean(0).abs().max()) < bound
    gram = flat.T @ flat / len(x) - torch.eye(8)
    assert float(gram.abs().max()) < bound
    assert float((flat[1:] * flat[:-1]).mean(0).abs().max()) < bound
    # Samples that differ in the last bit of one entry have signs of their own.
    near = x.double()
    near[:, 1, 1] = torch.nextafter(near[:, 1, 1], torch.tensor(math.inf, dtype=F64))
    assert abs(float((signs(near, Seed(1))[:, 0, 0] * z[:, 0, 0]).mean())) < bound


class Standard(nn.Module):
    """The end point of N(0, s^2) on a space."""

    def __init__(self, std: float, space: Space, schedule: Schedule) -> None:
        super().__init__()
        self.variance, self.space, self.schedule = std**2, space, schedule

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        a, b = self.schedule.alpha(t), self.schedule.beta(t)
        gain = a * self.variance / (a**2 * self.variance + b**2)
        # Off the space the network is wrong on purpose: nothing may depend on it.
        inside = self.space.project(x, cond)
        return gain[:, None, None] * inside + 5 * (x - inside) ** 2


def on_space(space: Space, std: float) -> FlowModel:
    net = Standard(std, space, Linear())
    return FlowModel(net, Linear(), space, predicts="endpoint", takes_cond=True)


SPACES: list[tuple[Space, Cond | None]] = [
    (ZeroMean((4, 3)), None),
    (Masked((4, 3)), {"mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]] * 3)}),
    (ZeroMean((4, 3), key="mask"), {"mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]] * 3)}),
]


def centred_log(space: Space, x: Tensor, cond: Cond | None, std: float) -> Tensor:
    """log N(x; 0, std^2) on the space."""
    constant = space.dimension(len(x), cond).double() * math.log(std * math.sqrt(2 * math.pi))
    return -space.inner(x, x) / (2 * std**2) - constant


@pytest.mark.parametrize(("space", "cond"), SPACES)
def test_likelihood_on_a_space(space: Space, cond: Cond | None) -> None:
    """Densities are those of the subspace, whose dimension may differ by sample."""
    x = 0.6 * space.noise(6, Seed(2).generator(), cond, F64)
    value = Likelihood(on_space(space, 0.6), 40).value(x, cond)
    torch.testing.assert_close(value, centred_log(space, x, cond, 0.6), rtol=0, atol=0.01)


def test_hutchinson_on_a_space() -> None:
    """Probes lie in the subspace: right on average over 3000 samples."""
    space = ZeroMean((4, 3))
    x = 0.6 * space.noise(3000, Seed(2).generator(), None, F64)
    value = Likelihood(on_space(space, 0.6), 20, trace="hutchinson").value(x)
    error = value - Likelihood(on_space(space, 0.6), 20).value(x)
    assert float(error.std()) > 0.1
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(3000)


def test_likelihood_makes_values() -> None:
    """Entropy and KL of flow models get values, right within their errors and the ODE's."""
    p, q = gaussian([0.5], 0.8), gaussian([0.0], 1.0)
    sampler = Sampler(EulerMaruyama(), 100)
    densities = []
    for i, law in enumerate((p, q)):
        model = law.flow(hidden=())
        model = calibrated(model, seed=Seed(0), num_steps=100)
        densities.append(
            FlowDensity(
                model, num_samples=4000, seed=Seed(i), log=Likelihood(model),
                sampler=replace(sampler, kernel=MomentMatched(*(model.moments or ((), ())))),
            )
        )  # fmt: skip
    entropy, kl = Entropy().value(densities[0]), KL(densities[1]).value(densities[0])
    exact = 0.5 * math.log(2 * math.pi * math.e * 0.64)
    assert abs(entropy.value - exact) < 4.5 * entropy.standard_error + 0.002
    exact_kl = math.log(1 / 0.8) + (0.64 + 0.25) / 2 - 0.5
    assert abs(kl.value - exact_kl) < 4.5 * kl.standard_error + 0.002
    assert 0 < kl.standard_error < 0.02


def test_likelihood_remembers_banks_but_not_old_parameters() -> None:
    """A bank is evaluated once; a parameter that moved makes its values new."""
    torch.manual_seed(0)
    model = FlowModel(MLP((2,), (8,)), Linear(), Euclidean((2,)), predicts="velocity")
    log, x = Likelihood(model, 4), torch.randn(5, 2)
    first = log.value(x)
    assert log.value(x) is not first  # a detached alias
    assert log.value(x).data_ptr() == first.data_ptr()
    with torch.no_grad():
        next(model.net.parameters()).add_(0.1)
    assert float((log.value(x) - first).abs().max()) > 1e-4


def test_likelihood_refuses() -> None:
    """Bad numbers, controlled processes, networks that are not finite."""
    model = gaussian([0.0]).flow(hidden=())
    for wrong in ({"num_steps": 0}, {"trace": "guess"}, {"probes": 0}, {"score_time": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Likelihood(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"ControlledProcess.*distil"):
        Likelihood(ControlledProcess(model))  # type: ignore[arg-type]

    class Broken(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x / (t[:, None] > 0.5)

    broken = FlowModel(Broken(), Linear(), Euclidean((1,)), predicts="endpoint")
    with pytest.raises(NonFiniteError, match=r"likelihood.*schedule"):
        Likelihood(broken).value(torch.ones(2, 1))


def test_path_ratio() -> None:
    """Flow models get likelihoods; ratios that are known are not computed."""
    p, q = (
        FlowDensity(gaussian([m], 0.9).flow(hidden=()), num_samples=50, score_time=0.97)
        for m in (0.3, 0.0)
    )
    t = PathRatio(num_steps=40).log_ratio(p, q)
    assert PathRatio().offers(p, q) is Access.BOTH
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    exact = gaussian([0.3], 0.9).log.value(x) - gaussian([0.0], 0.9).log.value(x)
    torch.testing.assert_close(t.value(x), exact, rtol=0, atol=0.003)
    torch.testing.assert_close(t.grad(x), p.model.score(x, 0.97) - q.model.score(x, 0.97))
    psi = Slope(0.5)
    assert PathRatio().log_ratio(p.with_log(q.log + psi), q).difference is psi
    assert PathRatio().offers(Empirical(torch.zeros(3, 1)), q) is Access.NONE


# -------------------------------------------------------------------------------- along paths


def exact_sampler(std: float, steps: int) -> Sampler:
    """A sampler whose chain on centred Gaussian data is exact."""
    t = torch.linspace(0, 1, steps + 1, dtype=F64)
    table = (1 - t) ** 2 * std**2 / (t**2 * std**2 + (1 - t) ** 2)
    return Sampler(MomentMatched(tuple(t.tolist()), tuple(table.tolist())), num_steps=steps)


@pytest.mark.parametrize("steps", [3, 25])
def test_exact_chains_know_their_density(steps: int) -> None:
    """Where the chain is the reverse of the noising, every path knows log p, at any step size."""
    law = gaussian([0.0, 0.0], 0.7)
    points, logs = path_log_density(
        law.flow(hidden=()), exact_sampler(0.7, steps), 50, Seed(1), dtype=F64
    )
    torch.testing.assert_close(logs, law.log.value(points), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("space", "cond"), SPACES)
def test_path_log_density_on_a_space(space: Space, cond: Cond | None) -> None:
    """The dimension is that of the subspace."""
    points, logs = path_log_density(
        on_space(space, 0.6), exact_sampler(0.6, 10), 6, Seed(1), cond=cond, dtype=F64
    )
    exact = centred_log(space, points, cond, 0.6)
    torch.testing.assert_close(logs, exact, rtol=1e-9, atol=1e-9)


def test_points_are_those_of_the_sampler() -> None:
    """Same seed, same samples, batch by batch."""
    model, sampler = ring().flow(hidden=()), Sampler(EulerMaruyama(), 10, batch_size=30)
    points, logs = path_log_density(model, sampler, 70, Seed(3))
    assert torch.equal(points, sampler.sample(model, 70, seed=Seed(3)))
    assert logs.shape == (70,)
    assert logs.dtype is F64


def test_mean_is_a_bound_that_gets_tight() -> None:
    """E estimate >= E log p; for a calibrated kernel the excess falls with the step size."""
    law, excess = ring(), []
    for steps in (20, 80):
        model = calibrated(law.flow(hidden=()), seed=Seed(0), num_steps=steps, count=2048)
        points, logs = path_log_density(model, Sampler(num_steps=steps), 4000, Seed(1))
        error = logs - law.log.value(points.double())
        excess.append(float(error.mean()))
        assert float(error.mean()) > -4.5 * float(error.std()) / math.sqrt(4000)
    assert 0 < excess[1] < 0.4 * excess[0]
    assert excess[1] < 0.08


def test_euler_maruyama_keeps_a_constant_excess() -> None:
    """Its first and last steps have up to twice the variance of the reverse: 0.41 nats per
    dimension, however small the steps."""
    model = gaussian([0.0, 0.0, 0.0]).flow(hidden=())
    for steps in (100, 400):
        points, logs = path_log_density(model, Sampler(EulerMaruyama(), steps), 3000, Seed(1))
        error = (logs - gaussian([0.0, 0.0, 0.0]).log.value(points.double())) / 3
        assert float(error.mean()) == pytest.approx(
            0.41, abs=4.5 * float(error.std()) / math.sqrt(3000) + 0.01
        )


def test_path_log_density_refuses() -> None:
    """No density without noise: found before any work."""
    model = gaussian([0.0]).flow(hidden=())
    with pytest.raises(UnsupportedError, match=r"step 9 of Ancestral.*calibrated"):
        path_log_density(model, Sampler(Ancestral(), 10), 5, Seed(0))
    with pytest.raises(UnsupportedError, match="not memoryless"):
        path_log_density(model, Sampler(Deterministic(), 10), 5, Seed(0))
