"""Interpolants X_t = alpha_t X_1 + beta_t X_0 between noise (t = 0) and data (t = 1)."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError


class Schedule(abc.ABC):
    """X_t = alpha_t X_1 + beta_t X_0 with X_0 ~ N(0, I); t = 0 is noise, t = 1 is data.

    All methods map times of any shape to numbers of that shape. Derived quantities
    (Adjoint Matching, arXiv 2409.08861, section 2)::

        kappa = alpha' / alpha
        D     = alpha' beta - alpha beta'
        eta   = beta (kappa beta - beta') = beta D / alpha
        sigma = sqrt(2 eta)                      the memoryless diffusion coefficient
    """

    @abc.abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""

    @abc.abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""

    @abc.abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Time derivative of ``alpha``."""

    @abc.abstractmethod
    def d_beta(self, t: Tensor) -> Tensor:
        """Time derivative of ``beta``."""

    def time_at(self, angle: Tensor) -> Tensor:
        """The time at which atan2(alpha, beta) is ``angle``, from 0 (noise) to pi / 2 (data).

        Two schedules with one angle have one ratio of data to noise, so that this is the exact
        change of time between them. Clamped to [0, 1]: some paths keep a little data at t = 0.
        By bisection, unless a schedule knows better.
        """
        low, high = torch.zeros_like(angle), torch.ones_like(angle)
        for _ in range(53 if angle.dtype == torch.float64 else 24):
            middle = 0.5 * (low + high)
            below = torch.atan2(self.alpha(middle), self.beta(middle)) < angle
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)

    @final
    def kappa(self, t: Tensor) -> Tensor:
        """alpha' / alpha; infinite where alpha = 0."""
        return self.d_alpha(t) / self.alpha(t)

    @final
    def wronskian(self, t: Tensor) -> Tensor:
        """D = alpha' beta - alpha beta', positive: data comes and noise goes."""
        return self.d_alpha(t) * self.beta(t) - self.alpha(t) * self.d_beta(t)

    @final
    def eta(self, t: Tensor) -> Tensor:
        """beta (kappa beta - beta') = beta D / alpha; infinite where alpha = 0."""
        return self.beta(t) * self.wronskian(t) / self.alpha(t)

    @final
    def sigma(self, t: Tensor) -> Tensor:
        """Memoryless diffusion coefficient sqrt(2 eta)."""
        return (2 * self.eta(t)).sqrt()


@final
@dataclass(frozen=True)
class Linear(Schedule):
    """alpha = t, beta = 1 - t: flow matching with straight conditional paths."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def beta(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time_at(self, angle: Tensor) -> Tensor:
        return angle.sin() / (angle.sin() + angle.cos())


class _Angular(Schedule):
    """alpha = sin(theta_t), beta = cos(theta_t): any path with alpha^2 + beta^2 = 1.

    The angle is finite and smooth at both ends, where the log-SNR is not.
    """

    @abc.abstractmethod
    def _angle(self, t: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _d_angle(self, t: Tensor) -> Tensor: ...

    @final
    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t).sin()

    @final
    def beta(self, t: Tensor) -> Tensor:
        # Exactly 0 at a right angle, where a cosine is 6e-17: a last step has no noise, not some.
        return (math.pi / 2 - self._angle(t)).sin()

    @final
    def d_alpha(self, t: Tensor) -> Tensor:
        return self.beta(t) * self._d_angle(t)

    @final
    def d_beta(self, t: Tensor) -> Tensor:
        return -self._angle(t).sin() * self._d_angle(t)


@final
@dataclass(frozen=True)
class Cosine(_Angular):
    """alpha = sin(pi t / 2), beta = cos(pi t / 2)."""

    def _angle(self, t: Tensor) -> Tensor:
        return t * (math.pi / 2)

    def _d_angle(self, t: Tensor) -> Tensor:
        return torch.full_like(t, math.pi / 2)

    def time_at(self, angle: Tensor) -> Tensor:
        return (angle * (2 / math.pi)).clamp(0, 1)


@final
@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """The VP-SDE: alpha^2 = exp(-int_0^u b), b(u) = b_min + (b_max - b_min) u, u = 1 - t.

    ``alpha^2 + beta^2 = 1``; for every such path kappa = eta. At t = 0 a little of the data is
    left: alpha^2 = exp(-(b_min + b_max) / 2), 4e-5 with the defaults (Song et al., 2021).
    """

    b_min: float = 0.1
    b_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.b_min < self.b_max:
            raise ConfigError(
                f"VariancePreserving: need 0 < b_min < b_max, got {self.b_min} and {self.b_max}."
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        u = 1 - t
        return -0.5 * (self.b_min * u + 0.5 * (self.b_max - self.b_min) * u**2)

    def _rate(self, t: Tensor) -> Tensor:
        """d log alpha / dt."""
        return 0.5 * (self.b_min + (self.b_max - self.b_min) * (1 - t))

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def beta(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self._rate(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return -(self.alpha(t) ** 2) * self._rate(t) / self.beta(t)

    def time_at(self, angle: Tensor) -> Tensor:
        # b_min u + (b_max - b_min) u^2 / 2 = -2 log alpha, without cancellation at either end
        sin, cos = angle.sin().clamp(min=1e-12), angle.cos()
        target = -torch.where(cos < 0.5, torch.log1p(-(cos**2)), 2 * sin.log())
        root = (self.b_min**2 + 2 * (self.b_max - self.b_min) * target).sqrt()
        return (1 - 2 * target / (self.b_min + root)).clamp(0, 1)


@final
@dataclass(frozen=True)
class Tabulated(_Angular):
    """A variance-preserving path through a table of accumulated alpha-bars (DDPM).

    Node k of n sits at t = k / (n - 1), with alpha^2 equal to the table there *exactly*; between
    nodes the angle arcsin(alpha) is linear, so that d_alpha is the exact derivative inside a cell.

    Args:
        alpha_bars: n >= 2 numbers in [0, 1], strictly monotone. Tables are accepted in both
            directions: an increasing one runs from noise to data as our time does, a decreasing
            one (``alphas_cumprod`` of DDPM code: index 0 is data) is reversed.
    """

    alpha_bars: Sequence[float]
    _angles: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alpha_bars, dtype=torch.float64).flatten()
        if table.numel() < 2:
            raise ConfigError("Tabulated: alpha_bars needs at least two numbers.")
        if table[0] > table[-1]:
            table = table.flip(0)
        if not bool((table.diff() > 0).all()) or table[0] < 0 or table[-1] > 1:
            raise ConfigError("Tabulated: alpha_bars must be strictly monotone and inside [0, 1].")
        object.__setattr__(self, "alpha_bars", tuple(table.tolist()))
        object.__setattr__(self, "_angles", torch.atan2(table.sqrt(), (1 - table).sqrt()))

    @property
    def nodes(self) -> Tensor:
        """Times of the table's entries, (n,), from noise to data."""
        return torch.linspace(0, 1, self._angles.numel(), dtype=torch.float64)

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position = t * (self._angles.numel() - 1)
        cell = position.detach().floor().long().clamp(0, self._angles.numel() - 2)
        angles = self._angles.to(t)
        return position - cell, angles[cell], angles[cell + 1]

    def _angle(self, t: Tensor) -> Tensor:
        fraction, left, right = self._cell(t)
        return left.lerp(right, fraction)

    def _d_angle(self, t: Tensor) -> Tensor:
        _, left, right = self._cell(t)
        return (right - left) * (self._angles.numel() - 1)

    def time_at(self, angle: Tensor) -> Tensor:
        angles = self._angles.to(angle)
        cell = torch.searchsorted(angles, angle.contiguous()) - 1
        cell = cell.clamp(0, angles.numel() - 2)
        fraction = (angle - angles[cell]) / (angles[cell + 1] - angles[cell])
        return ((cell + fraction) / (angles.numel() - 1)).clamp(0, 1)
