"""One Gaussian step: the object that sampler, lean adjoint and loss share.

A kernel says what p(x_s | x_t) is. Because roll-out, adjoint and regression all read it, they
cannot disagree about offsets, index shifts or signs (methods, sections 1.8 and 2.4).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import ControlledProcess, Process
from tiltflow.schedule import Schedule
from tiltflow.space import Space
from tiltflow.types import Cond, expand_as


@final
@dataclass(frozen=True)
class Transition:
    """X_s | X_t = x ~ N(mean, variance I) on the space; mean (B, *event), variance (B,)."""

    mean: Tensor
    variance: Tensor
    space: Space

    def sample(self, generator: torch.Generator, cond: Cond | None = None) -> Tensor:
        """One draw per sample."""
        z = torch.randn(
            self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype
        ).to(self.mean.device)
        return self.mean + expand_as(self.variance.sqrt(), z) * self.space.project(z, cond)

    def tilted(self, adjoint: Tensor) -> Transition:
        """The transition pushed uphill: mean + variance * adjoint. The one sign of the library."""
        mean = self.mean + expand_as(self.variance, adjoint) * adjoint
        return Transition(mean, self.variance, self.space)

    def kl(self, other: Transition) -> Tensor:
        """KL(self || other) = |mean difference|^2 / (2 variance) for equal variances, (B,).

        A step without noise has no density: drop it before calling this, not after.
        """
        difference = self.mean - other.mean
        return self.space.inner(difference, difference) / (2 * self.variance)


@final
@dataclass(frozen=True)
class Coefficients:
    """mean = on_state x + on_endpoint endpoint(x, t); all (B,)."""

    on_state: Tensor
    on_endpoint: Tensor
    variance: Tensor


class Kernel(abc.ABC):
    """Gaussian steps from time t to time s > t.

    ``memoryless`` kernels make X_1 independent of X_0 in the continuum limit, without which the
    optimum of a control problem is not the tilted density (Adjoint Matching, Proposition 1).
    """

    memoryless: ClassVar[bool]

    @abc.abstractmethod
    def transition(
        self, process: Process, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None
    ) -> Transition:
        """The law of X_s given X_t = x; x (B, *event), t and s (B,)."""

    @abc.abstractmethod
    def variance(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        """Variance of the step, which depends on the times alone, (B,)."""

    def resolved(self, process: Process) -> Kernel:
        """The kernel to use for this process; itself, but for ``Auto``."""
        return self

    def grid(self, num_steps: int) -> Tensor:
        """Times from 0 to 1, (num_steps + 1,), float64; uniform unless a kernel says otherwise."""
        if num_steps < 1:
            raise ConfigError(f"num_steps must be at least 1, got {num_steps}.")
        return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


class LinearKernel(Kernel, abc.ABC):
    """A kernel with one evaluation per step, defined by three numbers."""

    @abc.abstractmethod
    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        """The three numbers of the step t -> s, each (B,)."""

    @final
    def transition(
        self, process: Process, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None
    ) -> Transition:
        if not self.memoryless:
            _refuse_controlled(process, type(self).__name__)
        c = self.coefficients(process.schedule, t, s)
        endpoint = process.endpoint(x, t, cond)
        mean = expand_as(c.on_state, x) * x + expand_as(c.on_endpoint, x) * endpoint
        return Transition(mean, c.variance, process.space)

    @final
    def variance(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        return self.coefficients(schedule, t, s).variance


def _refuse_controlled(process: Process, kernel: str) -> None:
    if isinstance(process, ControlledProcess):
        raise UnsupportedError(
            f"{kernel} integrates the probability-flow ODE, which a ControlledProcess does not "
            "have: it is the optimum of a problem with a running reward. Sample it with "
            "EulerMaruyama, or refit it as a flow with matching.distil."
        )


@final
@dataclass(frozen=True)
class EulerMaruyama(LinearKernel):
    """Euler-Maruyama on the memoryless SDE dX = (2 v - kappa X) dt + sqrt(2 eta) dB::

        mean = x + h (2 v - kappa~ x),   variance = 2 h eta~,   h = s - t
        kappa~ = alpha'_t / alpha_s,     eta~ = beta_t D_t / alpha_s

    The denominators are taken at s, so that the step from t = 0 is finite and forgets x up to a
    gain of order h (-2 h on the linear path).
    Default for flow-matching models: on N(0, 1) data its own variance is 1.2 % high at 40 steps,
    and the tilt error of Adjoint Matching equals that error (methods, table 1.9a).

    Args:
        offset: ``"denominator"`` as above; ``"both"`` adds the step to the numerator too,
            eta~ = eta~ + h D / alpha_s, as Adjoint Matching, appendix G (7.5 % at 40 steps).
        final_noise: ``False`` makes the step onto t = 1 noiseless, for rewards that dislike
            residual noise of standard deviation h * sqrt(2); that step then has no loss.
    """

    memoryless: ClassVar[bool] = True
    offset: Literal["denominator", "both"] = "denominator"
    final_noise: bool = True

    def __post_init__(self) -> None:
        if self.offset not in ("denominator", "both"):
            raise ConfigError(
                f"EulerMaruyama: offset={self.offset!r} must be 'denominator' or 'both'."
            )

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        h = s - t
        beta, d, alpha_s = schedule.beta(t), schedule.wronskian(t), schedule.alpha(s)
        eta = beta * d / alpha_s
        if self.offset == "both":
            eta = eta + h * d / alpha_s
        # v = (D endpoint + beta' x) / beta
        on_state = 1 + 2 * h * schedule.d_beta(t) / beta - h * schedule.d_alpha(t) / alpha_s
        variance = 2 * h * eta
        if not self.final_noise:
            variance = torch.where(s >= 1, torch.zeros_like(variance), variance)
        return Coefficients(on_state, 2 * h * d / beta, variance)


@final
@dataclass(frozen=True)
class Ancestral(LinearKernel):
    """DDPM's step: the posterior of the noising kernel with X_1 replaced by its prediction::

        r = alpha_t / alpha_s,  B = beta_t^2 - r^2 beta_s^2
        mean = (r beta_s^2 x + alpha_s B endpoint) / beta_t^2,   variance = beta_s^2 B / beta_t^2

    Regular at both ends of time, and noiseless on the last step; but it leaves out the variance of
    the posterior, so that chains are under-dispersed (11 % at 40 steps on N(0, 1), section 1.9).
    Use it for diffusion checkpoints that bring their own grid, with many steps.
    """

    memoryless: ClassVar[bool] = True

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        r = schedule.alpha(t) / schedule.alpha(s)
        beta_t2, beta_s2 = schedule.beta(t) ** 2, schedule.beta(s) ** 2
        b = beta_t2 - r**2 * beta_s2
        return Coefficients(
            r * beta_s2 / beta_t2, schedule.alpha(s) * b / beta_t2, beta_s2 * b / beta_t2
        )


@final
@dataclass(frozen=True)
class MomentMatched(LinearKernel):
    """The Gaussian step with the exact mean and the average exact variance of X_s given X_t.

    ``Ancestral``'s mean is the exact conditional mean; the exact conditional covariance adds
    ``on_endpoint^2 Cov(X_1 | X_t)`` to its variance. This kernel adds that term with the average
    posterior variance per dimension, c(t) = E tr Cov(X_1 | X_t) / dim, from a table. On isotropic
    Gaussian data the chain is then exact at *every* number of steps, and so is the tilt.
    The optimal variance under a KL criterion (Bao et al., Analytic-DPM, arXiv 2201.06503).

    Args:
        times: increasing times of the table, from 0 to 1.
        posterior_variance: c at those times, linear in between; ``sample.calibrated`` measures
            both on a model.
    """

    memoryless: ClassVar[bool] = True
    times: tuple[float, ...]
    posterior_variance: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(self.times))
        object.__setattr__(self, "posterior_variance", tuple(self.posterior_variance))
        if len(self.times) != len(self.posterior_variance) or len(self.times) < 2:
            raise ConfigError(
                "MomentMatched: times and posterior_variance need equal length >= 2."
            )
        if any(c < 0 for c in self.posterior_variance):
            raise ConfigError("MomentMatched: posterior_variance must not be negative.")

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        c = Ancestral().coefficients(schedule, t, s)
        extra = c.on_endpoint**2 * _interpolate(t, self.times, self.posterior_variance)
        return Coefficients(c.on_state, c.on_endpoint, c.variance + extra)


def _interpolate(t: Tensor, xs: Sequence[float], ys: Sequence[float]) -> Tensor:
    grid, table = t.new_tensor(xs), t.new_tensor(ys)
    cell = (torch.searchsorted(grid, t.contiguous(), right=True) - 1).clamp(0, len(xs) - 2)
    fraction = ((t - grid[cell]) / (grid[cell + 1] - grid[cell])).clamp(0, 1)
    return table[cell] + fraction * (table[cell + 1] - table[cell])


@final
@dataclass(frozen=True)
class Auto(Kernel):
    """``MomentMatched`` for a model that knows its posterior variance, else ``EulerMaruyama``.

    The default. ``sample.calibrated`` measures the posterior variance once; Adjoint Matching does
    so by itself, and its result remembers it.
    """

    memoryless: ClassVar[bool] = True

    def resolved(self, process: Process) -> LinearKernel:
        return EulerMaruyama() if process.moments is None else MomentMatched(*process.moments)

    def transition(
        self, process: Process, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None
    ) -> Transition:
        return self.resolved(process).transition(process, x, t, s, cond)

    def variance(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        raise UnsupportedError("Auto: call resolved(process) first; the variance depends on it.")


@final
@dataclass(frozen=True)
class Deterministic(LinearKernel):
    """DDIM: x_s = alpha_s endpoint + (beta_s / beta_t) (x - alpha_t endpoint); the flow ODE.

    First order; on the linear path it is Euler's method. It has no transition density, hence no
    KL: it refuses to train, and refuses a ``ControlledProcess``.
    """

    memoryless: ClassVar[bool] = False

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        r = schedule.beta(s) / schedule.beta(t)
        return Coefficients(r, schedule.alpha(s) - r * schedule.alpha(t), torch.zeros_like(t))


@final
@dataclass(frozen=True)
class Heun(Kernel):
    """Heun's second-order method on the flow ODE, two evaluations per step.

    In DDIM's variables y = x / beta, tau = alpha / beta the ODE reads dy / dtau = endpoint; the
    trapezoidal rule in them is exact where the end point is linear in tau. The step onto t = 1
    (beta = 0) is DDIM's. Default for ODE sampling.
    """

    memoryless: ClassVar[bool] = False

    def transition(
        self, process: Process, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None
    ) -> Transition:
        _refuse_controlled(process, type(self).__name__)
        c = Deterministic().coefficients(process.schedule, t, s)
        on_state, on_endpoint = expand_as(c.on_state, x), expand_as(c.on_endpoint, x)
        first = process.endpoint(x, t, cond)
        ddim = on_state * x + on_endpoint * first
        inside = process.schedule.beta(s) > 1e-6
        if not bool(inside.any()):
            return Transition(ddim, c.variance, process.space)
        second = process.endpoint(ddim, torch.where(inside, s, t), cond)
        heun = on_state * x + on_endpoint * 0.5 * (first + second)
        return Transition(torch.where(expand_as(inside, x), heun, ddim), c.variance, process.space)

    def variance(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        return torch.zeros_like(t)


@final
@dataclass(frozen=True)
class Regridded(LinearKernel):
    """Another kernel on other times, e.g. the nodes of a diffusion checkpoint.

    Args:
        kernel: the kernel.
        times: increasing times in [0, 1]; ``num_steps`` must then be ``len(times) - 1``, or fewer:
            a subset of the nodes, as even as possible, is used.
    """

    memoryless: ClassVar[bool] = True
    kernel: LinearKernel
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        if not self.kernel.memoryless:
            raise ConfigError("Regridded: the kernel must be memoryless.")
        increasing = all(a < b for a, b in zip(self.times, self.times[1:], strict=False))
        if len(self.times) < 2 or not increasing or self.times[0] < 0 or self.times[-1] > 1:
            raise ConfigError("Regridded: times must increase inside [0, 1].")

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> Coefficients:
        return self.kernel.coefficients(schedule, t, s)

    def grid(self, num_steps: int) -> Tensor:
        available = len(self.times) - 1
        if not 1 <= num_steps <= available:
            raise ConfigError(
                f"Regridded: num_steps={num_steps}, but the table has {available} steps."
            )
        index = torch.linspace(0, available, num_steps + 1).round().long()
        return torch.tensor(self.times, dtype=torch.float64)[index]
