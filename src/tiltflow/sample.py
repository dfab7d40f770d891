"""The only integration loop: simulate a process with a kernel, and what paths tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel, Process, device_of
from tiltflow.kernel import Auto, EulerMaruyama, Kernel, LinearKernel
from tiltflow.seed import Seed
from tiltflow.types import Cond, Conditions, Estimate, drawn_cond, expand_as, index_cond


@final
@dataclass(frozen=True)
class Trajectory:
    """A batch of paths: times (K+1,), states (K+1, B, *event), means of the steps (K, B, *event).

    ``states[k+1] ~ N(means[k], variance_k)``.
    """

    times: Tensor
    states: Tensor
    means: Tensor
    cond: Cond | None = None

    @property
    def end(self) -> Tensor:
        """Final states, (B, *event)."""
        return self.states[-1]


@final
@dataclass(frozen=True)
class Sampler:
    """A kernel and a number of steps.

    Args:
        kernel: the Gaussian step; ``Auto`` by default.
        num_steps: steps from t = 0 to t = 1. The default, 40, is Adjoint Matching's.
        batch_size: ``sample`` works in batches of this size.
    """

    kernel: Kernel = field(default_factory=Auto)
    num_steps: int = 40
    batch_size: int = 4096

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError("Sampler: batch_size must be at least 1.")
        self.kernel.grid(self.num_steps)

    @property
    def times(self) -> Tensor:
        """The time grid, (K+1,), float64."""
        return self.kernel.grid(self.num_steps)

    def simulate(
        self,
        process: Process,
        count: int,
        *,
        seed: Seed,
        cond: Cond | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Trajectory:
        """Paths from X_0 ~ N(0, I), without gradients, on the device of the process."""
        states, means = [], []
        for x, mean in self._steps(process, count, seed, cond, dtype):
            states.append(x)
            means.append(mean)
        return Trajectory(self.times, torch.stack(states), torch.stack(means[1:]), cond)

    def sample(
        self,
        process: Process,
        count: int,
        *,
        seed: Seed,
        cond: Cond | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """End points only, (count, *event); memory does not grow with the number of steps."""
        ends = []
        for b, start in enumerate(range(0, count, self.batch_size)):
            size = min(self.batch_size, count - start)
            part = index_cond(cond, torch.arange(start, start + size))
            x = torch.empty(0)
            for x, _ in self._steps(process, size, seed.child("batch", b), part, dtype):  # noqa: B007
                pass
            ends.append(x)
        return torch.cat(ends)

    @torch.no_grad()
    def _steps(
        self, process: Process, count: int, seed: Seed, cond: Cond | None, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (state, mean of the step that led to it), first the noise itself."""
        generator, kernel = seed.generator(device_of(process)), self.kernel.resolved(process)
        x = process.space.noise(count, generator, cond, dtype)
        yield x, x
        times = self.times.to(x)
        for k in range(self.num_steps):
            t, s = times[k].expand(count), times[k + 1].expand(count)
            step = kernel.transition(process, x, t, s, cond)
            x = step.sample(generator, cond)
            if not bool(torch.isfinite(x).all()):
                raise NonFiniteError(
                    "sampling", k, "the state",
                    "The model returned NaN or diverged at this time step; check its weights, its "
                    "schedule and what it predicts.",
                )  # fmt: skip
            yield x, step.mean


@torch.no_grad()
def step_kl(
    tuned: Process,
    reference: Process,
    kernel: Kernel,
    path: Trajectory,
    *,
    own: bool = False,
) -> tuple[Tensor, Tensor]:
    """KL of each step along a path, and the log-ratio of the path laws.

    Args:
        tuned: P.
        reference: P_ref.
        kernel: of the path's steps.
        path: of any process; of ``tuned`` for the KL to be one.
        own: ``tuned`` has made this path with this kernel, so that its means are known.

    Returns:
        ``kl`` (B,): sum over noisy steps of |m - m_ref|^2 / (2 v); its mean is KL(P || P_ref) of
        the discretised path laws, an upper bound of the KL of their end points.
        ``log_ratio`` (B,): log dP / dP_ref along the path.
    """
    times, kernel = path.times.to(path.states), kernel.resolved(tuned)
    count = path.states.shape[1]
    kl, log_ratio = path.states.new_zeros(count), path.states.new_zeros(count)
    for k in range(len(times) - 1):
        t, s = times[k].expand(count), times[k + 1].expand(count)
        variance = kernel.variance(reference.schedule, t, s)
        if float(variance[0]) == 0.0:
            continue  # a noiseless step has no density; both laws share it
        x, x_next = path.states[k], path.states[k + 1]
        mean = path.means[k] if own else kernel.transition(tuned, x, t, s, path.cond).mean
        shift = mean - kernel.transition(reference, x, t, s, path.cond).mean
        inner = reference.space.inner
        step = inner(shift, shift) / (2 * variance)
        kl = kl + step
        log_ratio = log_ratio + step + inner(shift, x_next - mean) / variance
    return kl, log_ratio


def path_kl(
    tuned: Process,
    reference: Process,
    *,
    sampler: Sampler,
    count: int,
    seed: Seed,
    cond: Cond | None = None,
) -> Estimate:
    """KL(P_tuned || P_reference) of the sampler's path laws, with standard error.

    For two flow models with one schedule it converges to KL(p_1 || q_1) as the steps shrink
    (methods, section 1.11); otherwise it bounds that KL from above.
    """
    path = sampler.simulate(tuned, count, seed=seed, cond=cond)
    return Estimate.of(step_kl(tuned, reference, sampler.kernel, path, own=True)[0])


MAX_STEPS = 640
"""Most steps that ``adapted`` tries."""


def adapted(
    process: Process,
    sampler: Sampler,
    *,
    tolerance: float,
    seed: Seed,
    count: int = 1024,
    conditions: Conditions | None = None,
) -> Sampler:
    """The sampler with as few steps as its accuracy allows: 10, 20, 40, ..., at most 640.

    Accuracy is the relative error of E|X_1|^2, to which the tilt error of Adjoint Matching is
    proportional (methods, table 1.9a). It is estimated as twice the difference between K and 2 K
    steps, which is right for an error of first order. The two chains share their noise, which
    makes the difference far less noisy than either moment (multilevel Monte Carlo).

    Raises:
        ConfigError: if the tolerance is not positive.
        UnsupportedError: if the kernel has no Gaussian steps of one evaluation.
    """
    if tolerance <= 0:
        raise ConfigError(f"adapted: tolerance must be positive, got {tolerance}.")
    cond = drawn_cond(conditions, count, seed)
    num_steps = 10
    while num_steps < MAX_STEPS:
        trial = replace(sampler, num_steps=num_steps)
        coarse, fine = _coupled(process, trial, count, seed.child(num_steps), cond)
        squares = [float(process.space.inner(x, x).mean()) for x in (coarse, fine)]
        if 2 * abs(squares[0] - squares[1]) <= tolerance * squares[1]:
            return trial
        num_steps *= 2
    return replace(sampler, num_steps=MAX_STEPS)


@torch.no_grad()
def _coupled(
    process: Process, sampler: Sampler, count: int, seed: Seed, cond: Cond | None
) -> tuple[Tensor, Tensor]:
    """End points of chains of K and 2 K steps driven by the same noise."""
    kernel = sampler.kernel.resolved(process)
    if not isinstance(kernel, LinearKernel):
        raise UnsupportedError(f"adapted needs Gaussian steps, not {type(kernel).__name__}.")
    generator, space = seed.generator(device_of(process)), process.space
    coarse = fine = space.noise(count, generator, cond)
    times = kernel.grid(2 * sampler.num_steps).to(coarse)
    for k in range(0, len(times) - 1, 2):
        t, middle, s = (time.expand(count) for time in times[k : k + 3])
        noise, variance = torch.zeros_like(fine), torch.zeros_like(t)
        for a, b in ((t, middle), (middle, s)):
            c = kernel.coefficients(process.schedule, a, b)
            z = expand_as(c.variance.sqrt(), fine) * space.noise(count, generator, cond)
            fine = kernel.transition(process, fine, a, b, cond).mean + z
            noise = expand_as(c.on_state, noise) * noise + z
            variance = c.on_state**2 * variance + c.variance
        step = kernel.transition(process, coarse, t, s, cond)
        scale = (step.variance / variance.clamp(min=1e-30)).sqrt()
        coarse = step.mean + expand_as(scale, noise) * noise
    return coarse, fine


@torch.no_grad()
def calibrated(
    model: FlowModel,
    *,
    seed: Seed,
    count: int = 1024,
    num_steps: int = 40,
    conditions: Conditions | None = None,
) -> FlowModel:
    """The same model, knowing its average posterior variance c(t) = E tr Cov(X_1 | X_t) / dim.

    c(t) is the mean of |X_1 - endpoint(X_t)|^2 / dim over the model's own samples X_1, noised to
    time t. Costs ``2 * num_steps`` evaluations of ``count`` samples.
    """
    cond = drawn_cond(conditions, count, seed)
    sampler = Sampler(EulerMaruyama(), num_steps)
    ends = sampler.sample(model, count, seed=seed.child("ends"), cond=cond)
    generator = seed.child("noise").generator(ends.device)
    dimension = model.space.dimension(count, cond).to(ends)
    table = []
    for time in sampler.times[:-1]:
        t = time.to(ends).expand(count)
        alpha, beta = (
            expand_as(model.schedule.alpha(t), ends),
            expand_as(model.schedule.beta(t), ends),
        )
        x = alpha * ends + beta * model.space.noise(count, generator, cond, ends.dtype)
        residual = ends - model.endpoint(x, t, cond)
        table.append(float((model.space.inner(residual, residual) / dimension).mean()))
    return model.with_moments((tuple(sampler.times.tolist()), (*table, 0.0)))
