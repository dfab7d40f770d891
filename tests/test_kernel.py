"""Kernels on the linear-Gaussian case, where every chain is two recursions in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from oracles import (
    CHAIN_VARIANCE,
    KERNEL_FORM,
    OWN_VARIANCE,
    QUADRATIC,
    QUADRATIC_STEPS,
    STEPS,
    UNTILTED_ODE,
)
from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import ControlledProcess, FlowModel, Process
from tiltflow.kernel import (
    Ancestral,
    Deterministic,
    EulerMaruyama,
    Heun,
    Kernel,
    MomentMatched,
    Regridded,
    Transition,
)
from tiltflow.schedule import Cosine, Linear, Schedule, Tabulated, VariancePreserving
from tiltflow.seed import Seed
from tiltflow.space import Euclidean, ZeroMean

KERNELS: dict[str, Kernel] = {
    "denominator": EulerMaruyama(),
    "both": EulerMaruyama(offset="both"),
    "ancestral": Ancestral(),
}
F64 = torch.float64


class Chain:
    """A kernel on an affine process: gains A_k, offsets c_k, variances v_k of all steps.

    Probed at x = 0 and x = 1, all steps in one batch: m_k(x) = A_k x + c_k.
    """

    def __init__(self, kernel: Kernel, process: Process, num_steps: int) -> None:
        grid = kernel.grid(num_steps)
        t, s = grid[:-1].repeat(2), grid[1:].repeat(2)
        x = torch.cat([torch.zeros(num_steps, 1), torch.ones(num_steps, 1)]).to(F64)
        out = kernel.transition(process, x, t, s)
        offset, end = out.mean[:num_steps, 0], out.mean[num_steps:, 0]
        self.gains: list[float] = (end - offset).tolist()
        self.offsets: list[float] = offset.tolist()
        self.variances: list[float] = out.variance[:num_steps].tolist()

    def variance(self, start: float = 1.0) -> float:
        """P -> A^2 P + v."""
        for a, v in zip(self.gains, self.variances, strict=True):
            start = a**2 * start + v
        return start

    def mean(self) -> float:
        """m -> A m + c, from 0."""
        m = 0.0
        for a, c in zip(self.gains, self.offsets, strict=True):
            m = a * m + c
        return m

    def adjoints(self) -> list[float]:
        """a_{k+1} of every step for the reward x: a_K = 1, a_k = A_k a_{k+1}."""
        out = [1.0]
        for a in reversed(self.gains[1:]):
            out.append(a * out[-1])
        return out[::-1]


def flow(s: float = 1.0, schedule: Schedule | None = None) -> FlowModel:
    return gaussian([0.0], s).flow(schedule, hidden=())


class Shifted(Process):
    """A reference whose end point is moved by a table of numbers, one per grid time."""

    def __init__(self, model: FlowModel, times: Tensor, shifts: Tensor) -> None:
        self.schedule, self.space, self.model = model.schedule, model.space, model
        self.times, self.shifts, self.moments = times, shifts, None

    def endpoint(self, x: Tensor, t: Tensor | float, cond: object = None) -> Tensor:
        assert isinstance(t, Tensor)
        return self.model.endpoint(x, t) + self.shifts[torch.searchsorted(self.times, t), None]

    @property
    def trainable(self) -> torch.nn.Module:
        return self.model.net


def optimum(kernel: EulerMaruyama | Ancestral, model: FlowModel, num_steps: int) -> Shifted:
    """The fixed point of the kernel form for the reward x: mean = reference.tilted(a_{k+1})."""
    grid = kernel.grid(num_steps)
    t, s = grid[:-1], grid[1:]
    here = kernel.transition(model, torch.zeros(num_steps, 1, dtype=F64), t, s)
    adjoints = torch.tensor(Chain(kernel, model, num_steps).adjoints(), dtype=F64)[:, None]
    change = (here.tilted(adjoints).mean - here.mean)[:, 0]
    return Shifted(model, t, change / kernel.coefficients(model.schedule, t, s).on_endpoint)


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_form_table(name: str) -> None:
    """Table 1.9a, rows "kernel form": ODE and SDE shifts of the tilted chain, to its 3 digits."""
    kernel, model = KERNELS[name], flow()
    assert isinstance(kernel, (EulerMaruyama, Ancestral))
    for i, k in enumerate(STEPS):
        tuned = optimum(kernel, model, k)
        ode, sde = KERNEL_FORM[name][0][i], KERNEL_FORM[name][1][i]
        assert Chain(kernel, tuned, k).mean() == pytest.approx(sde, abs=5.1e-4)
        assert Chain(Deterministic(), tuned, k).mean() == pytest.approx(ode, abs=5.1e-4)
        assert Chain(kernel, tuned, k).variance() == pytest.approx(sde, abs=5.1e-4)


@pytest.mark.parametrize("k", STEPS)
def test_gains_against_the_hand_recursion(k: int) -> None:
    """A_k = 1 + h (2 v(t) - 1/(t+h)), v(t) = (2t-1)/(t^2+(1-t)^2); noise 2h (1-t [+h])/(t+h)."""
    h = 1 / k
    for name in ("denominator", "both"):
        chain = Chain(KERNELS[name], flow(), k)
        for i in range(k):
            t = i * h
            v = (2 * t - 1) / (t**2 + (1 - t) ** 2)
            gain = 1 + h * (2 * v - 1 / (t + h))
            noise = 2 * h * (1 - t + (h if name == "both" else 0)) / (t + h)
            assert chain.gains[i] == pytest.approx(gain, rel=1e-10, abs=1e-10)
            assert chain.variances[i] == pytest.approx(noise, rel=1e-10)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VariancePreserving()], ids=str)
@pytest.mark.parametrize("s", [0.2, 1.0, 2.0])
def test_shift_is_the_chains_own_variance(name: str, schedule: Schedule, s: float) -> None:
    """shift = Var(x_K) - (prod A)^2 Var(x_0), for every kernel and schedule, at every K."""
    kernel = KERNELS[name]
    assert isinstance(kernel, (EulerMaruyama, Ancestral))
    for k in (3, 10, 40):
        chain = Chain(kernel, flow(s, schedule), k)
        memory = math.prod(chain.gains) ** 2
        shift = Chain(kernel, optimum(kernel, flow(s, schedule), k), k).mean() - chain.mean()
        assert shift == pytest.approx(chain.variance() - memory, rel=1e-10)
        if name == "ancestral" and not isinstance(schedule, VariancePreserving):
            assert memory < 1e-20  # alpha_0 = 0: the first step forgets x exactly


@pytest.mark.parametrize("name", KERNELS)
def test_chain_variances(name: str) -> None:
    """Own variances of the chains on N(0, 1), four digits (oracle 17), and of the untilted ODE."""
    for i, k in enumerate(STEPS):
        own = Chain(KERNELS[name], flow(), k).variance()
        assert own == pytest.approx(CHAIN_VARIANCE[name][i], abs=5.1e-5)
        ode = Chain(Deterministic(), flow(), k).variance()
        assert ode == pytest.approx(UNTILTED_ODE[i], abs=5.1e-4)


@pytest.mark.parametrize("s2", OWN_VARIANCE)
def test_own_variance_of_other_data(s2: float) -> None:
    """Table 1.9d: chain variance / data variance for thin and wide data, K = 40 and 100."""
    for name, expected in OWN_VARIANCE[s2].items():
        kernel = KERNELS.get(name, Deterministic())
        for k, value in zip((40, 100), expected, strict=True):
            ratio = Chain(kernel, flow(math.sqrt(s2)), k).variance() / s2
            assert ratio == pytest.approx(value, abs=5.1e-4)


@pytest.mark.parametrize(("name", "d"), QUADRATIC)
def test_quadratic_reward(name: str, d: float) -> None:
    """Table 1.9c, by P = A^2 P / (1 + v P) from P_K = d and closed-loop gains A / (1 + v P)."""
    for k, expected in zip(QUADRATIC_STEPS, QUADRATIC[name, d], strict=True):
        chain = Chain(KERNELS[name], flow(), k)
        p, gains = d, []
        for a, v in zip(reversed(chain.gains), reversed(chain.variances), strict=True):
            gains.append(a / (1 + v * p))
            p = a**2 * p / (1 + v * p)
        variance = 1.0
        for g, v in zip(reversed(gains), chain.variances, strict=True):
            variance = g**2 * variance + v
        assert variance == pytest.approx(expected, abs=5.1e-5)


def test_first_order() -> None:
    """Errors halve when K doubles: own variances 1.84-1.99, ODE shifts 1.9-2.04 (oracle 21)."""
    for name, kernel in KERNELS.items():
        assert isinstance(kernel, (EulerMaruyama, Ancestral))
        own, ode = [], []
        for k in (40, 80, 160):
            own.append(abs(Chain(kernel, flow(), k).variance() - 1))
            ode.append(abs(Chain(Deterministic(), optimum(kernel, flow(), k), k).mean() - 1))
        for i in (0, 1):
            assert 1.8 < own[i] / own[i + 1] < 2.1, name
            assert 1.8 < ode[i] / ode[i + 1] < 2.1, name


def test_heun_is_second_order() -> None:
    """The ODE map of N(0, 0.7^2) data is x -> 0.7 x; Heun's error falls by 4, DDIM's by 2."""
    for kernel, low, high in ((Heun(), 3.5, 4.6), (Deterministic(), 1.8, 2.2)):
        errors = [
            abs(math.prod(Chain(kernel, flow(0.7), k).gains) - 0.7) for k in (40, 80, 160, 320)
        ]
        for coarse, fine in itertools.pairwise(errors):
            assert low < coarse / fine < high, type(kernel).__name__
    assert errors[0] > abs(math.prod(Chain(Heun(), flow(0.7), 40).gains) - 0.7) * 5


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VariancePreserving()], ids=str)
def test_moment_matched_is_exact_on_gaussians(schedule: Schedule) -> None:
    """With c(t) = s^2 b^2 / (a^2 s^2 + b^2) on the grid, the chain has variance s^2 at every K."""
    s2 = 0.49
    for k in (1, 2, 5, 20):
        t = torch.linspace(0, 1, k + 1, dtype=F64)
        a, b = schedule.alpha(t), schedule.beta(t)
        c = s2 * b**2 / (a**2 * s2 + b**2)
        kernel = MomentMatched(tuple(t.tolist()), tuple(c.tolist()))
        model = gaussian([0.3], 0.7).flow(schedule, hidden=())
        chain = Chain(kernel, model, k)
        start = float(a[0]) ** 2 * s2 + float(b[0]) ** 2  # the law of X_0, not quite noise for VP
        assert chain.variance(start) == pytest.approx(s2, rel=1e-10)
        if float(a[0]) == 0:
            assert chain.mean() == pytest.approx(0.3, rel=1e-10)


def test_ddpm_step() -> None:
    """The DDPM transition (1.7) is the ancestral kernel: abar .3 -> .55, x = .7, eps = -.4, 1e-14.

    And the difference of two models is dm = -s_k w_k d(eps).
    """
    now, then, x, noise = 0.3, 0.55, 0.7, -0.4
    c = 1 - now / then
    mean = math.sqrt(then / now) * (x - c / math.sqrt(1 - now) * noise)
    variance = c * (1 - then) / (1 - now)
    schedule = Tabulated((now, then, 0.9))

    class Noise(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, self.value)

    def step(value: float) -> Transition:
        model = FlowModel(Noise(value), schedule, Euclidean((1,)), predicts="noise")
        t, s = torch.zeros(1, dtype=F64), torch.full((1,), 0.5, dtype=F64)
        return Ancestral().transition(model, torch.full((1, 1), x, dtype=F64), t, s)

    out = step(noise)
    assert float(out.mean) == pytest.approx(mean, abs=1e-14)
    assert float(out.variance) == pytest.approx(variance, abs=1e-14)
    w = math.sqrt(then * c / (now * (1 - then)))
    change = float(step(noise + 0.3).mean - out.mean)
    assert change == pytest.approx(-math.sqrt(variance) * w * 0.3, abs=1e-14)


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=str)
def test_ancestral_limits(schedule: Schedule) -> None:
    """t = 0: mean alpha_s x1, variance beta_s^2 (memoryless). s = 1: mean x1, variance 0."""
    t, s = torch.zeros(1, dtype=F64), torch.full((1,), 0.4, dtype=F64)
    first = Ancestral().coefficients(schedule, t, s)
    assert float(first.on_state) == 0
    assert float(first.on_endpoint) == pytest.approx(float(schedule.alpha(s)), rel=1e-14)
    assert float(first.variance) == pytest.approx(float(schedule.beta(s)) ** 2, rel=1e-14)
    last = Ancestral().coefficients(schedule, s, torch.ones(1, dtype=F64))
    assert float(last.on_endpoint) == pytest.approx(1, rel=1e-14)
    assert float(last.variance) < 1e-30
    assert abs(float(last.on_state)) < 1e-30


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VariancePreserving()], ids=str)
def test_euler_is_the_memoryless_sde(schedule: Schedule) -> None:
    """(mean - x)/h -> 2 v - kappa x and variance/h -> 2 eta as h -> 0: first order."""
    model = GaussianMixture([[-1.0], [1.5]], 0.6).flow(schedule, hidden=())
    x, t = torch.tensor([[0.7]], dtype=F64), torch.tensor([0.4], dtype=F64)
    drift = 2 * model.velocity(x, t) - schedule.kappa(t) * x
    for offset in ("denominator", "both"):
        errors, noises = [], []
        for h in (1e-3, 5e-4):
            step = EulerMaruyama(offset=offset).transition(model, x, t, t + h)  # type: ignore[arg-type]
            errors.append(abs(float((step.mean - x) / h - drift)))
            noises.append(abs(float(step.variance / h - 2 * schedule.eta(t))))
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
        assert noises[0] / noises[1] == pytest.approx(2, rel=0.02)
        assert errors[1] < 0.05


def test_noiseless_last_step() -> None:
    """final_noise=False: the step onto t = 1 alone loses its noise; the mean is unchanged."""
    noisy, quiet = (
        Chain(EulerMaruyama(), flow(), 10),
        Chain(EulerMaruyama(final_noise=False), flow(), 10),
    )
    assert quiet.variances[-1] == 0
    assert noisy.variances[-1] > 0
    assert quiet.variances[:-1] == noisy.variances[:-1]
    assert quiet.gains == noisy.gains


def test_transition() -> None:
    """tilted: mean + v a (uphill). kl: |dm|^2 / (2 v). sample: mean and variance (|z| < 4.5)."""
    space = ZeroMean((2, 2))
    mean = space.project(torch.randn(3, 2, 2, generator=Seed(0).generator(), dtype=F64))
    variance = torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    step, a = Transition(mean, variance, space), torch.ones_like(mean)
    tilted = step.tilted(a)
    torch.testing.assert_close(tilted.mean - mean, variance[:, None, None] * a)
    torch.testing.assert_close(tilted.kl(step), 4 * variance / 2)
    n = 4000
    draws = torch.stack([step.sample(Seed(1).child(i).generator()) for i in range(n)])
    torch.testing.assert_close(space.project(draws[0]), draws[0])
    square = ((draws - mean) ** 2).flatten(2).sum(2).mean(0)  # (n, 3) -> mean 2 v (dimension 2)
    assert bool(((square - 2 * variance).abs() < 4.5 * variance * math.sqrt(4 / n)).all())


@pytest.mark.parametrize("kernel", [Deterministic(), Heun()], ids=str)
def test_ode_kernels_refuse_a_controlled_process(kernel: Kernel) -> None:
    """A ControlledProcess has no ODE: integrating one would give a wrong law (section 1.6)."""
    process = ControlledProcess(flow())
    half, x = torch.full((1,), 0.5, dtype=F64), torch.zeros(1, 1, dtype=F64)
    with pytest.raises(UnsupportedError, match="ControlledProcess"):
        kernel.transition(process, x, half, half + 0.1)
    assert EulerMaruyama().transition(process, x, half, half + 0.1).mean.shape == (1, 1)
    assert not kernel.memoryless


def test_grids() -> None:
    """Grids run from 0 to 1; a regridded kernel uses its own nodes, evenly thinned."""
    grid = EulerMaruyama().grid(4)
    assert grid.tolist() == [0, 0.25, 0.5, 0.75, 1]
    regridded = Regridded(Ancestral(), (0.0, 0.1, 0.3, 0.7, 1.0))
    assert regridded.grid(4).tolist() == [0.0, 0.1, 0.3, 0.7, 1.0]
    assert regridded.grid(2).tolist() == [0.0, 0.3, 1.0]
    t, s = torch.tensor([0.1], dtype=F64), torch.tensor([0.3], dtype=F64)
    inner = Ancestral().coefficients(Linear(), t, s)
    assert regridded.coefficients(Linear(), t, s) == inner
    for bad in (0, 5):
        with pytest.raises(ConfigError, match="num_steps"):
            regridded.grid(bad)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: EulerMaruyama(offset="none"), "denominator"),
        (lambda: Regridded(Deterministic(), (0.0, 1.0)), "memoryless"),
        (lambda: Regridded(Ancestral(), (0.0, 0.5, 0.5)), "increase"),
        (lambda: Regridded(Ancestral(), (0.5, 1.1)), "increase"),
        (lambda: MomentMatched((0.0, 1.0), (1.0,)), "equal length"),
        (lambda: MomentMatched((0.0, 1.0), (1.0, -0.1)), "negative"),
        (lambda: EulerMaruyama().grid(0), "num_steps"),
    ],
)
def test_bad_kernels(make: object, match: str) -> None:
    """Bad settings are refused at construction."""
    with pytest.raises(ConfigError, match=match):
        make()  # type: ignore[operator]
