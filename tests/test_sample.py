from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.errors import ConfigError, NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral, EulerMaruyama, Heun, MomentMatched
from tiltflow.sample import Sampler, adapted, calibrated, path_kl, step_kl
from tiltflow.schedule import Linear
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, ZeroMean
from tiltflow.types import Estimate

F64 = torch.float64
SEED = Seed(7)
MIXTURE = GaussianMixture([[-1.0, 0.5], [1.5, -0.3]], 0.5, [0.3, 0.7])
FLOW = MIXTURE.flow(hidden=())


def exact_kernel(mean: float, s2: float, nodes: int = 101) -> MomentMatched:
    """The kernel whose chain on N(mean, s2) is exact on grids inside the table's."""
    t = torch.linspace(0, 1, nodes, dtype=F64)
    return MomentMatched(
        tuple(t.tolist()), tuple((s2 * (1 - t) ** 2 / (t**2 * s2 + (1 - t) ** 2)).tolist())
    )


def test_same_seed_same_bits() -> None:
    """A draw is a function of its seed: equal seeds equal bits, other seeds other samples."""
    sampler = Sampler(num_steps=5)
    first = sampler.sample(FLOW, 50, seed=SEED)
    assert torch.equal(first, sampler.sample(FLOW, 50, seed=SEED))
    assert not torch.equal(first, sampler.sample(FLOW, 50, seed=SEED.child("other")))
    assert first.dtype == torch.float32
    assert first.shape == (50, 2)


def test_sample_is_the_end_of_simulate() -> None:
    """`sample` and `simulate` are one loop: batch b of a sample is a simulation at batch/b."""
    sampler = Sampler(num_steps=6, batch_size=20)
    ends = sampler.sample(FLOW, 50, seed=SEED)
    for b, size in enumerate((20, 20, 10)):
        path = sampler.simulate(FLOW, size, seed=SEED.child("batch", b))
        assert torch.equal(path.end, ends[20 * b : 20 * b + size])


def test_trajectory() -> None:
    """states[k+1] - means[k] is white noise of the kernel's variance: |z| < 4.5 at every step."""
    sampler, n = Sampler(num_steps=8), 4000
    path = sampler.simulate(FLOW, n, seed=SEED, dtype=F64)
    assert path.states.shape == (9, n, 2)
    assert path.means.shape == (8, n, 2)
    assert path.times.tolist() == torch.linspace(0, 1, 9, dtype=F64).tolist()
    for k in range(8):
        t, s = path.times[k : k + 1], path.times[k + 1 : k + 2]
        variance = float(sampler.kernel.resolved(FLOW).variance(FLOW.schedule, t, s))
        square = (path.states[k + 1] - path.means[k]) ** 2 / variance
        assert abs(float(square.mean()) - 1) < 4.5 * math.sqrt(2 / (2 * n))
        step = sampler.kernel.transition(FLOW, path.states[k], t.expand(n), s.expand(n))
        torch.testing.assert_close(step.mean, path.means[k])


def test_samples_have_the_right_law() -> None:
    """Moments of a mixture within 4.5 standard errors plus the chain's own first-order bias."""
    n = 8000
    x = Sampler(num_steps=100).sample(FLOW, n, seed=SEED)
    exact = MIXTURE.sample(200_000, SEED.child("exact"))
    for f in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: (x[:, 0] > 0.25).double()):
        mine, truth = Estimate.of(f(x)), Estimate.of(f(exact))
        assert abs(mine.value - truth.value) < 4.5 * mine.standard_error + 0.01


def test_exact_chain_is_exact() -> None:
    """The moment-matched chain on N(0.3, 0.49) has that law with 5 steps: |z| < 4.5."""
    n, s2 = 20_000, 0.49
    sampler = Sampler(exact_kernel(0.3, s2), num_steps=5)
    x = sampler.sample(gaussian([0.3], 0.7).flow(hidden=()), n, seed=SEED, dtype=F64)
    assert abs(float(x.mean()) - 0.3) < 4.5 * math.sqrt(s2 / n)
    assert abs(float(x.var()) / s2 - 1) < 4.5 * math.sqrt(2 / n)
    coarse = Sampler(Ancestral(), num_steps=5).sample(
        gaussian([0.3], 0.7).flow(hidden=()), n, seed=SEED, dtype=F64
    )
    assert float(coarse.var()) / s2 < 0.8  # what the table repairs


def test_ode_sampling() -> None:
    """Heun's samples are a deterministic map of the noise: x_1 = m + s x_0 for N(m, s^2)."""
    model = gaussian([0.3], 0.7).flow(hidden=())
    path = Sampler(Heun(), num_steps=200).simulate(model, 100, seed=SEED, dtype=F64)
    torch.testing.assert_close(path.end, 0.3 + 0.7 * path.states[0], rtol=0, atol=2e-3)


def test_samples_stay_on_the_space() -> None:
    """On a subspace, noise, states and samples are projected."""
    torch.manual_seed(0)
    space = ZeroMean((3, 2))

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + 1.0

    model = FlowModel(Net(), Linear(), space, predicts="endpoint")
    x = Sampler(num_steps=4).sample(model, 10, seed=SEED)
    assert float(x.mean(1).abs().max()) < 1e-5
    assert float(x.abs().max()) > 0.1


def test_path_kl_of_a_shift() -> None:
    """KL between exact chains of N(0.5, 1) and N(0, 1) is 0.5^2 / 2, with |z| < 4.5."""
    tuned, reference = (gaussian([m], 1.0).flow(hidden=()) for m in (0.5, 0.0))
    sampler = Sampler(exact_kernel(0.0, 1.0), num_steps=20)
    out = path_kl(tuned, reference, sampler=sampler, count=2000, seed=SEED)
    # For a shift every mean difference is the same for all x: the estimate has no noise at all.
    assert out.standard_error < 1e-6
    assert out.value == pytest.approx(0.125, rel=1e-4)
    assert out.count == 2000
    assert path_kl(tuned, tuned, sampler=sampler, count=10, seed=SEED).value == 0


def test_path_kl_converges() -> None:
    """N(.3, .5) and N(-.2, 1.4) (variances): 0.2826669 by eta |ds|^2 (1e-7); chains approach."""
    p, q = gaussian([0.3], math.sqrt(0.5)), gaussian([-0.2], math.sqrt(1.4))
    exact = 0.5 * (math.log(1.4 / 0.5) + (0.5 + 0.25) / 1.4 - 1)
    assert exact == pytest.approx(0.2826669, abs=5e-8)
    pf, qf = p.flow(hidden=()), q.flow(hidden=())
    # x = 2 Gauss points are exact for E of a square of an affine function; t by a fine midpoint.
    n = 20_000
    t = (torch.arange(n, dtype=F64) + 0.5) / n
    mean, std = 0.3 * t, (0.5 * t**2 + (1 - t) ** 2).sqrt()
    total = torch.zeros(n, dtype=F64)
    for sign in (-1, 1):
        x = (mean + sign * std)[:, None]
        total += 0.5 * (pf.score(x, t) - qf.score(x, t))[:, 0] ** 2
    assert float((Linear().eta(t) * total).mean()) == pytest.approx(exact, abs=1e-7)
    errors = []
    for k in (20, 80):
        out = path_kl(pf, qf, sampler=Sampler(num_steps=k), count=20_000, seed=SEED)
        errors.append(abs(out.value - exact) - 4.5 * out.standard_error)
    assert errors[0] < 0.25 * exact
    assert errors[1] < 0.07 * exact


def test_log_ratio_of_paths() -> None:
    """log dP/dQ along paths of P: its mean is the KL, and E_P e^{-log ratio} = 1 (|z| < 4.5)."""
    tuned, reference = (gaussian([m], 1.0).flow(hidden=()) for m in (0.4, 0.0))
    sampler = Sampler(num_steps=20)
    path = sampler.simulate(tuned, 20_000, seed=SEED, dtype=F64)
    kl, log_ratio = step_kl(tuned, reference, sampler.kernel, path)
    gap = Estimate.of(log_ratio - kl)
    assert abs(gap.value) < 4.5 * gap.standard_error
    assert gap.standard_error > 1e-4
    one = Estimate.of((-log_ratio).exp())
    assert abs(one.value - 1) < 4.5 * one.standard_error


def test_log_ratio_of_exact_chains() -> None:
    """Exact chains differ through X_1 alone: log dP/dQ = log p(x_1) / q(x_1) = 0.4 x_1 - 0.08."""
    tuned, reference = (gaussian([m], 1.0).flow(hidden=()) for m in (0.4, 0.0))
    kernel = exact_kernel(0.0, 1.0, nodes=11)
    path = Sampler(kernel, num_steps=10).simulate(tuned, 200, seed=SEED, dtype=F64)
    _, log_ratio = step_kl(tuned, reference, kernel, path)
    torch.testing.assert_close(log_ratio, 0.4 * path.end[:, 0] - 0.08, rtol=0, atol=1e-10)


def test_noiseless_steps_are_left_out() -> None:
    """A step of variance zero carries no KL and no NaN."""
    tuned, reference = (gaussian([m], 1.0).flow(hidden=()) for m in (0.4, 0.0))
    kernel = EulerMaruyama(final_noise=False)
    out = path_kl(tuned, reference, sampler=Sampler(kernel, num_steps=10), count=50, seed=SEED)
    full = path_kl(tuned, reference, sampler=Sampler(num_steps=10), count=50, seed=SEED)
    assert 0 < out.value < full.value


def test_calibration_measures_the_posterior_variance() -> None:
    """c(t) = s^2 b^2 / (a^2 s^2 + b^2) on N(0, 0.49), within 4.5 standard errors + chain bias."""
    n = 4000
    model = calibrated(gaussian([0.0], 0.7).flow(hidden=()), seed=SEED, count=n, num_steps=50)
    assert model.moments is not None
    t, measured = (torch.tensor(entry, dtype=F64) for entry in model.moments)
    exact = 0.49 * (1 - t) ** 2 / (0.49 * t**2 + (1 - t) ** 2)
    assert measured[-1] == 0
    assert bool(((measured - exact).abs() <= exact * (4.5 * math.sqrt(2 / n) + 0.02)).all())


def test_the_default_kernel_uses_what_the_model_knows() -> None:
    """Auto is MomentMatched with the model's moments, EulerMaruyama without: equal bits."""
    plain = gaussian([0.3], 0.7).flow(hidden=())
    kernel = exact_kernel(0.3, 0.49)
    knowing = plain.with_moments((kernel.times, kernel.posterior_variance))
    for model, used in ((plain, EulerMaruyama()), (knowing, kernel)):
        automatic = Sampler(num_steps=6).sample(model, 30, seed=SEED)
        assert torch.equal(automatic, Sampler(used, num_steps=6).sample(model, 30, seed=SEED))
    assert knowing.clone().moments == knowing.moments


def test_diverging_model() -> None:
    """NaN in a state stops the simulation with the time step; nothing is repaired."""

    class Sick(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.where(t[:, None] > 0.45, x * math.nan, x)

    model = FlowModel(Sick(), Linear(), Euclidean((2,)), predicts="velocity")
    with pytest.raises(NonFiniteError, match=r"sampling, step 5"):
        Sampler(num_steps=10).sample(model, 4, seed=SEED)


def test_bad_samplers() -> None:
    """Impossible settings are refused at construction."""
    with pytest.raises(ConfigError, match="num_steps"):
        Sampler(num_steps=0)
    with pytest.raises(ConfigError, match="batch_size"):
        Sampler(batch_size=0)


# ------------------------------------------------------------------------------ adaptive steps


def test_adapted_steps_follow_the_known_error() -> None:
    """N(0, 1), both offsets: variance 1.261, 1.143, 1.075 at 10, 20, 40 steps (table 1.9a)."""
    model = gaussian([0.0], 1.0).flow(hidden=())
    sampler = Sampler(EulerMaruyama(offset="both"), 3)
    for tolerance, expected in ((0.3, 10), (0.15, 20), (0.08, 40), (0.04, 80)):
        found = adapted(model, sampler, tolerance=tolerance, seed=Seed(1), count=20_000)
        assert found.num_steps == expected
        assert found.kernel == sampler.kernel


def test_adapted_steps_of_an_exact_kernel() -> None:
    """The moment-matched kernel is exact on Gaussians at every number of steps."""
    model = calibrated(gaussian([0.0], 1.0).flow(hidden=()), seed=Seed(0), count=20_000)
    assert adapted(model, Sampler(), tolerance=0.02, seed=Seed(1)).num_steps == 10


def test_adapted_refusals() -> None:
    model = gaussian([0.0], 1.0).flow(hidden=())
    with pytest.raises(ConfigError, match="tolerance"):
        adapted(model, Sampler(), tolerance=0.0, seed=Seed(0))
    with pytest.raises(UnsupportedError, match="Heun"):
        adapted(model, Sampler(Heun()), tolerance=0.1, seed=Seed(0))
