"""The lean adjoint: products of gains, matrices of derivatives, and its continuous limit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tiltflow.analytic import GaussianMixture, gaussian
from tiltflow.context import SingleProcess
from tiltflow.delta import MLP, Correction
from tiltflow.errors import NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import (
    Ancestral,
    Auto,
    Deterministic,
    EulerMaruyama,
    Heun,
    LinearKernel,
    MomentMatched,
)
from tiltflow.potential import ZERO, Differentiable, Potential, Rate
from tiltflow.rewards.points import Linear as LinearReward
from tiltflow.rewards.points import Quadratic
from tiltflow.sample import Sampler, Trajectory, step_kl
from tiltflow.schedule import Cosine, Linear, Schedule, VariancePreserving
from tiltflow.seed import Seed
from tiltflow.solvers.lean_adjoint import Rollout, Steps, rollout
from tiltflow.space import Euclidean, Masked, Space, ZeroMean
from tiltflow.types import Access, Cond, expand_as

SEED = Seed(0).child("lean adjoint")
F64 = torch.float64
MOMENTS = ((0.0, 0.5, 1.0), (0.6, 0.3, 0.0))
KERNELS: dict[str, LinearKernel] = {
    "denominator": EulerMaruyama(),
    "both": EulerMaruyama(offset="both"),
    "ancestral": Ancestral(),
    "moments": MomentMatched(*MOMENTS),
}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Roll-outs draw in the default dtype; in float64 recursions agree to 1e-10."""
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def steps_of(kernel: LinearKernel | Auto, model: FlowModel, num_steps: int) -> Steps:
    return Steps.of(Sampler(kernel, num_steps), model, torch.zeros(()))


def run(
    tuned: FlowModel,
    reference: FlowModel,
    kernel: LinearKernel,
    terminal: Potential,
    num_steps: int = 12,
    count: int = 5,
    **options: object,
) -> Rollout:
    steps = steps_of(kernel, reference, num_steps)
    options = {"seed": SEED, "backend": SingleProcess(), **options}
    return rollout(tuned, reference, steps, terminal, count, **options)  # type: ignore[arg-type]


def perturbed(model: FlowModel, seed: int = 1) -> FlowModel:
    """A clone whose trained part has other weights."""
    out, generator = freeze(model.clone()), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.trainable.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return out


def corrected(mixture: GaussianMixture, schedule: Schedule | None = None) -> FlowModel:
    torch.manual_seed(0)
    event = (mixture.means.shape[1],)
    delta = Correction(MLP(event, (8,), zero_init=True))
    return freeze(mixture.flow(schedule, hidden=()).with_delta(delta))


def velocity_network(space: Space | None = None) -> FlowModel:
    torch.manual_seed(3)
    return freeze(
        FlowModel(MLP((2,), (16,)), Linear(), space or Euclidean((2,)), predicts="velocity")
    )


def gains(kernel: LinearKernel, model: FlowModel, num_steps: int) -> list[float]:
    """A_k of the reference mean, m_k(x) = A_k x + c_k, probed at x = 0 and x = 1."""
    grid = kernel.grid(num_steps)
    ends = []
    for value in (0.0, 1.0):
        x = torch.full((num_steps, 1), value, dtype=F64)
        ends.append(kernel.transition(model, x, grid[:-1], grid[1:]).mean[:, 0])
    return (ends[1] - ends[0]).tolist()


# ------------------------------------------------------------------------------ the recursion


@kernels
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VariancePreserving()], ids=str)
def test_products_of_gains(kernel: LinearKernel, schedule: Schedule) -> None:
    """On N(m, s^2): a_k = A_k a_{k+1}, a_K = grad phi(x_K), whatever the tuned model; 1e-10."""
    reference = corrected(gaussian([0.3], 0.7), schedule)
    out = run(perturbed(reference), reference, kernel, Quadratic(0.5, 2.0))
    expected = [-2.0 * (out.states[-1] - 0.5)]
    for a in reversed(gains(kernel, reference, 12)):
        expected.append(a * expected[-1])
    torch.testing.assert_close(out.adjoints, torch.stack(expected[::-1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["correction", "network"])
@kernels
def test_transposed_jacobians(kernel: LinearKernel, kind: str) -> None:
    """a_k = J(m_ref)(x_k)^T a_{k+1} with J from columns of the kernel's own mean; 1e-10.

    The Jacobian is of the reference, which may itself carry a delta, and never of the tuned model.
    """
    mixture = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.4, 0.6])
    reference = perturbed(corrected(mixture), 5) if kind == "correction" else velocity_network()
    tuned = perturbed(reference)
    terminal = Differentiable(lambda x: (2 * x[:, 0]).sin() + x[:, 0] * x[:, 1])
    out = run(tuned, reference, kernel, terminal)
    grid = kernel.grid(12)
    a = terminal.grad(out.states[-1])
    torch.testing.assert_close(out.adjoints[-1], a, rtol=1e-10, atol=1e-10)
    for k in reversed(range(12)):
        t, s = grid[k].expand(1), grid[k + 1].expand(1)

        def mean(x: Tensor, t: Tensor = t, s: Tensor = s) -> Tensor:
            return kernel.transition(reference, x[None], t, s).mean[0]

        jacobians = [torch.autograd.functional.jacobian(mean, x) for x in out.states[k]]
        a = torch.einsum("bij,bi->bj", torch.stack(jacobians), a)  # type: ignore[arg-type]
        torch.testing.assert_close(out.adjoints[k], a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_continuous_limit(s: float) -> None:
    """a(t) -> alpha s^2 / (alpha^2 s^2 + beta^2) a(1), first order for Euler (oracle 12)."""
    reference = corrected(gaussian([0.0], s))

    def error(kernel: LinearKernel, num_steps: int) -> float:
        out = run(reference, reference, kernel, LinearReward(1.0), num_steps, 1)
        t = kernel.grid(num_steps)
        exact = t * s**2 / (t**2 * s**2 + (1 - t) ** 2)
        return float((out.adjoints[:, 0, 0] - exact).abs().max())

    for name in ("denominator", "both"):
        errors = [error(KERNELS[name], k) for k in (80, 160, 320)]
        for coarse, fine in itertools.pairwise(errors):
            assert 1.8 < coarse / fine < 2.2
    # Posterior means compose: the product of Ancestral's gains is d E[X_1 | X_t] / dx at every K.
    assert error(Ancestral(), 7) < 1e-10


def test_zero_velocity() -> None:
    """For v_ref = 0 the adjoint is alpha_t a(1) in the limit (oracle 12), first order in h."""

    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0 * x

    model = FlowModel(Zero(), Linear(), Euclidean((1,)), predicts="velocity")
    errors = []
    for num_steps in (40, 80, 160):
        out = run(model, model, EulerMaruyama(), LinearReward(1.0), num_steps, 1)
        grid = EulerMaruyama().grid(num_steps)
        errors.append(float((out.adjoints[:, 0, 0] - grid).abs().max()))
    # The gain 1 - h / (t + h) = t / (t + h) is exact here: the adjoint is alpha_t at every K.
    assert max(errors) < 1e-12


def test_the_adjoint_is_the_gradient_of_the_value() -> None:
    """Linear reward, Gaussian chain: a_k = d/dx_k E[phi(x_K) | x_k], by a noiseless roll-out."""
    reference = corrected(gaussian([0.3], 0.7))
    out = run(reference, reference, EulerMaruyama(), LinearReward(1.5))
    grid = EulerMaruyama().grid(12)
    for k in (0, 4, 11):
        x = out.states[k].clone().requires_grad_()
        y = x
        for j in range(k, 12):
            y = (
                EulerMaruyama()
                .transition(reference, y, grid[j].expand(5), grid[j + 1].expand(5))
                .mean
            )
        (gradient,) = torch.autograd.grad(1.5 * y.sum(), x)
        torch.testing.assert_close(out.adjoints[k], gradient, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------ values of paths


@kernels
def test_log_ratios_are_those_of_step_kl(kernel: LinearKernel) -> None:
    """kl and phi - log_weight equal ``sample.step_kl`` on the same path; 1e-10."""
    reference = corrected(GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.4, 0.6]))
    tuned, terminal = perturbed(reference), Quadratic()
    out = run(tuned, reference, kernel, terminal)
    path = Trajectory(kernel.grid(12), out.states, out.states[1:])
    kl, log_ratio = step_kl(tuned, reference, kernel, path)
    assert out.log_weight is not None
    assert out.value is not None
    torch.testing.assert_close(out.kl, kl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.value, terminal.value(out.states[-1]))
    torch.testing.assert_close(out.value - out.log_weight, log_ratio, rtol=1e-10, atol=1e-12)
    assert float(kl.min()) > 1e-3


@kernels
@pytest.mark.parametrize("kind", ["correction", "network"])
def test_states_follow_the_tuned_chain(kernel: LinearKernel, kind: str) -> None:
    """x_{k+1} - m_tuned(x_k) is sqrt(v_k) times one and the same noise for any tuned model.

    And the three end points are those of the models at the states.
    """
    mixture = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.4, 0.6])
    reference = perturbed(corrected(mixture), 5) if kind == "correction" else velocity_network()
    grid, noises = kernel.grid(12), []
    for tuned in (reference, perturbed(reference)):
        out = run(tuned, reference, kernel, ZERO)
        rows = []
        for k in range(12):
            t, s = grid[k].expand(5), grid[k + 1].expand(5)
            x = out.states[k]
            step = kernel.transition(tuned, x, t, s)
            rows.append(out.states[k + 1] - step.mean)
            for end, model in ((out.tuned, tuned), (out.reference, reference)):
                torch.testing.assert_close(end[k], model.endpoint(x, t), rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(out.frozen[k], reference.frozen_endpoint(x, t))
        noises.append(torch.stack(rows))
    torch.testing.assert_close(noises[0], noises[1], rtol=1e-9, atol=1e-9)


def test_law_of_the_roll_out() -> None:
    """The end points have the chain's own mean and variance, P -> A^2 P + v (|z| < 4.5)."""
    reference, kernel, n = corrected(gaussian([0.0], 0.7)), EulerMaruyama(), 20_000
    out = run(reference, reference, kernel, ZERO, 20, n)
    variance, steps = 1.0, steps_of(kernel, reference, 20)
    for a, v in zip(
        gains(kernel, reference, 20), steps.coefficients.variance.tolist(), strict=True
    ):
        variance = a**2 * variance + v
    assert abs(float(out.states[-1].mean())) < 4.5 * math.sqrt(variance / n)
    assert abs(float(out.states[-1].var()) / variance - 1) < 4.5 * math.sqrt(2 / n)


def test_without_values() -> None:
    """A potential without values gives adjoints, and no log-weights."""

    class Score(Potential):
        @property
        def offers(self) -> Access:
            return Access.GRAD

        def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
            return -x

    reference = corrected(gaussian([0.0], 0.7))
    out = run(reference, reference, EulerMaruyama(), Score())
    both = run(reference, reference, EulerMaruyama(), Quadratic())
    assert out.log_weight is None
    assert out.value is None
    torch.testing.assert_close(out.adjoints, both.adjoints, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ chunks


def test_chunks() -> None:
    """Chunk c of a roll-out is a roll-out of its own: same recursion, one stream of noise.

    The first chunk is the roll-out of that many trajectories; the conditions are cut accordingly.
    """
    reference = corrected(GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.4, 0.6]))
    tuned, terminal = perturbed(reference), Differentiable(lambda x: x[:, 0].sin())
    options = {"count": 23, "num_steps": 6}
    whole = run(tuned, reference, EulerMaruyama(), terminal, chunk=10, **options)  # type: ignore[arg-type]
    first = run(tuned, reference, EulerMaruyama(), terminal, count=10, num_steps=6)
    assert whole.states.shape == (7, 23, 2)
    assert whole.frozen.shape == whole.tuned.shape == whole.reference.shape == (6, 23, 2)
    assert whole.kl.shape == (23,)
    for name in ("states", "adjoints", "tuned", "reference", "frozen"):
        assert torch.equal(getattr(whole, name)[:, :10], getattr(first, name))
    assert torch.equal(whole.kl[:10], first.kl)
    # Every other trajectory obeys the recursion too: its adjoints are those of its own states.
    path = Trajectory(EulerMaruyama().grid(6), whole.states, whole.states[1:])
    kl, _ = step_kl(tuned, reference, EulerMaruyama(), path)
    torch.testing.assert_close(whole.kl, kl, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.adjoints[-1], terminal.grad(whole.states[-1]))
    assert len(torch.unique(whole.states[-1][:, 0])) == 23
    one = run(tuned, reference, EulerMaruyama(), terminal, chunk=23, **options)  # type: ignore[arg-type]
    assert torch.equal(
        one.states, run(tuned, reference, EulerMaruyama(), terminal, **options).states
    )  # type: ignore[arg-type]


def test_chunks_have_the_same_law() -> None:
    """Chunked and whole roll-outs agree in mean and variance (two samples, |z| < 4.5)."""
    reference, n = corrected(gaussian([0.0], 0.7)), 8000
    ends = [
        run(reference, reference, EulerMaruyama(), ZERO, 10, n, chunk=c).states[-1][:, 0]
        for c in (None, 300)
    ]
    variance = float(ends[0].var())
    assert abs(float(ends[0].mean() - ends[1].mean())) < 4.5 * math.sqrt(2 * variance / n)
    assert abs(float(ends[1].var()) / variance - 1) < 4.5 * math.sqrt(4 / n)


def test_chunks_cut_conditions() -> None:
    """Trajectory i sees condition i, chunked or not."""

    class Pull(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            level = cond["level"]
            assert isinstance(level, Tensor)
            return expand_as(level, x).expand_as(x)

    model = FlowModel(Pull(), Linear(), Euclidean((1,)), predicts="endpoint", takes_cond=True)
    cond = {"level": torch.linspace(-3, 3, 7)}
    out = run(model, model, EulerMaruyama(), ZERO, count=7, cond=cond, chunk=3)
    torch.testing.assert_close(out.tuned[-1, :, 0], cond["level"])
    assert out.cond is cond


# ------------------------------------------------------------------------------ running rewards


@dataclass(frozen=True)
class OnlyStep:
    """A running reward sum(x^3) on one step of a grid."""

    start: float
    offers: Access = Access.BOTH

    def _here(self, x: Tensor, t: Tensor) -> Tensor:
        return expand_as((t - self.start).abs() < 1e-9, x).to(x)

    def value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return (self._here(x, t) * x**3).sum(1)

    def grad(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return self._here(x, t) * 3 * x**2


def test_running_rewards_enter_uphill() -> None:
    """a_k = A_k a_{k+1} + (s - t) w(t) grad f(x_k): a reward, so with a plus; 1e-10.

    log_weight = phi + sum_k f_k - log dP/dP_ref.
    """
    reference, kernel = corrected(gaussian([0.3], 0.7)), EulerMaruyama()
    tuned, terminal = perturbed(reference), LinearReward(0.4)
    running = Rate(Quadratic(0.0, 3.0), weight=lambda t: 1 + t)
    out = run(tuned, reference, kernel, terminal, running=running)
    grid, a = kernel.grid(12), torch.full((5, 1), 0.4)
    rate = gains(kernel, reference, 12)
    for k in reversed(range(12)):
        h = float(grid[k + 1] - grid[k])
        a = rate[k] * a - h * (1 + float(grid[k])) * 3.0 * out.states[k]
        torch.testing.assert_close(out.adjoints[k], a, rtol=1e-10, atol=1e-10)
    earned = sum(
        -float(grid[k + 1] - grid[k]) * (1 + float(grid[k])) * 1.5 * out.states[k][:, 0] ** 2
        for k in range(12)
    )
    path = Trajectory(grid, out.states, out.states[1:])
    _, ratio = step_kl(tuned, reference, kernel, path)
    assert out.log_weight is not None
    expected = 0.4 * out.states[-1][:, 0] + earned - ratio
    torch.testing.assert_close(out.log_weight, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", [0, 1, 5, 11])
def test_index_of_running_rewards(step: int) -> None:
    """A reward on step j alone changes a_j and earlier, not a_{j+1}, which controls step j.

    So f_0 never acts: the control at step k uses a_{k+1} (methods, section 2.6).
    """
    reference, kernel = corrected(gaussian([0.3], 0.7)), EulerMaruyama()
    start = float(kernel.grid(12)[step])
    plain = run(reference, reference, kernel, LinearReward(1.0))
    out = run(reference, reference, kernel, LinearReward(1.0), running=OnlyStep(start))
    assert torch.equal(out.states, plain.states)
    assert torch.equal(out.adjoints[step + 1 :], plain.adjoints[step + 1 :])
    torch.testing.assert_close(
        out.adjoints[step] - plain.adjoints[step], 3 * plain.states[step] ** 2
    )
    if step == 0:
        assert torch.equal(out.adjoints[1:], plain.adjoints[1:])


# ------------------------------------------------------------------------------ spaces


class Off(nn.Module):
    """A network that leaves the subspace: its output has a mean component."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mlp = MLP((3, 2), (16,))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.mlp(x, t)
        return out + 1.0 + x[:, :1]


@pytest.mark.parametrize("predicts", ["endpoint", "velocity"])
def test_zero_mean_space(predicts: str) -> None:
    """States, end points and adjoints have no centre of mass, and a_k = P J^T a_{k+1}."""
    space = ZeroMean((3, 2))
    reference = freeze(FlowModel(Off(), Linear(), space, predicts=predicts))
    terminal = Differentiable(lambda x: x[:, 0, 0].sin() + x.sum((1, 2)))
    out = run(perturbed(reference), reference, EulerMaruyama(), terminal)
    for tensor in (out.states, out.adjoints, out.tuned, out.reference):
        assert float(tensor.mean(2).abs().max()) < 1e-12
    assert float(out.adjoints.flatten(2).norm(dim=2).min()) > 0
    grid = EulerMaruyama().grid(12)
    for k in (0, 6, 11):
        t, s = grid[k].expand(5), grid[k + 1].expand(5)
        x = out.states[k].clone().requires_grad_()
        mean = EulerMaruyama().transition(reference, space.project(x), t, s).mean
        (expected,) = torch.autograd.grad(mean, x, out.adjoints[k + 1])
        expected = space.project(expected)  # the network has slopes off the space, too
        torch.testing.assert_close(out.adjoints[k], expected, rtol=1e-10, atol=1e-10)


def test_masked_space() -> None:
    """States and adjoints vanish at masked entries."""
    space = Masked((3,), key="mask")
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 1]])

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 1 + 0.3 * x + 0.1 * x.sum(1, keepdim=True)

    reference = FlowModel(Net(), Linear(), space, predicts="endpoint")
    terminal = Differentiable(lambda x: (x - 1).square().sum(1))
    out = run(reference, reference, EulerMaruyama(), terminal, cond={"mask": mask})
    for tensor in (out.states, out.adjoints, out.reference):
        assert float((tensor * (1 - mask)).abs().max()) == 0
    assert float(out.adjoints[:, 0].abs().min()) > 0


# ------------------------------------------------------------------------------ special cases


@kernels
def test_zero_reward(kernel: LinearKernel) -> None:
    """phi = 0: all adjoints are zero, and the reference has no path KL to itself (oracle 14)."""
    reference = corrected(gaussian([0.3], 0.7))
    out = run(reference, reference, kernel, ZERO)
    assert float(out.adjoints.abs().max()) == 0
    assert float(out.kl.abs().max()) == 0
    assert out.log_weight is not None
    assert float(out.log_weight.abs().max()) == 0


def test_noiseless_last_step_carries_the_adjoint() -> None:
    """Zero variance: loss weight 0 and no KL; the adjoint passes: a_{K-1} = A_{K-1} a_K, not 0."""
    reference = corrected(gaussian([0.3], 0.7))
    for kernel in (EulerMaruyama(final_noise=False), Ancestral()):
        steps = steps_of(kernel, reference, 12)
        assert float(steps.weight[-1]) == 0
        assert float(steps.weight[:-1].min()) > 0
        out = run(perturbed(reference), reference, kernel, LinearReward(2.0))
        gain = gains(kernel, reference, 12)[-1]
        assert abs(gain) > 0.1
        torch.testing.assert_close(out.adjoints[-2], torch.full((5, 1), 2 * gain))
        assert bool(torch.isfinite(out.kl).all())
        path = Trajectory(kernel.grid(12), out.states, out.states[1:])
        kl, _ = step_kl(perturbed(reference), reference, kernel, path)
        torch.testing.assert_close(out.kl, kl, rtol=1e-10, atol=1e-12)


def test_steps_are_the_kernel() -> None:
    """``Steps`` holds the kernel's numbers; weight |de|^2 is the KL of two transitions."""
    model = corrected(gaussian([0.3], 0.7))
    steps, grid = steps_of(EulerMaruyama(), model, 8), EulerMaruyama().grid(8)
    c = EulerMaruyama().coefficients(model.schedule, grid[:-1], grid[1:])
    assert torch.equal(steps.coefficients.on_endpoint, c.on_endpoint)
    torch.testing.assert_close(steps.weight, c.on_endpoint**2 / (2 * c.variance))
    torch.testing.assert_close(steps.beta2, (1 - grid[:-1]) ** 2)
    known = model.with_moments(MOMENTS)
    automatic, direct = (steps_of(k, known, 8) for k in (Auto(), MomentMatched(*MOMENTS)))
    assert torch.equal(automatic.coefficients.variance, direct.coefficients.variance)


def test_ode_kernels_are_refused() -> None:
    model = corrected(gaussian([0.3], 0.7))
    for kernel in (Deterministic(), Heun()):
        with pytest.raises(UnsupportedError, match="memoryless"):
            Steps.of(Sampler(kernel, 4), model, torch.zeros(()))


def test_non_finite_roll_outs() -> None:
    """NaN in a state or an adjoint stops at the stage that made it."""

    class Sick(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.where(t[:, None] > 0.45, x * math.nan, x)

    model = FlowModel(Sick(), Linear(), Euclidean((1,)), predicts="velocity")
    with pytest.raises(NonFiniteError, match="roll-out"):
        run(model, model, EulerMaruyama(), ZERO)

    class Kink(nn.Module):
        """x -> sqrt(max(x, 0)): finite, but of infinite slope at 0, so 0 * inf in the product."""

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + (0 * x).sqrt()

    kink = FlowModel(Kink(), Linear(), Euclidean((1,)), predicts="endpoint")
    with pytest.raises(NonFiniteError, match="backward pass"):
        run(kink, kink, EulerMaruyama(), LinearReward(1.0), count=50)


def test_no_graph_survives() -> None:
    """A roll-out is data: nothing in it requires a gradient."""
    reference = corrected(gaussian([0.3], 0.7))
    out = run(replace_grad(perturbed(reference)), reference, EulerMaruyama(), Quadratic())
    for name in (
        "states",
        "adjoints",
        "frozen",
        "reference",
        "tuned",
        "kl",
        "log_weight",
        "value",
    ):
        assert not getattr(out, name).requires_grad, name


def replace_grad(model: FlowModel) -> FlowModel:
    model.trainable.requires_grad_(True)
    return model
