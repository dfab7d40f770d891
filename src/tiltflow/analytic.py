"""Gaussians and Gaussian mixtures: exact densities, exact flow models, exact tilts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.delta import MLP, Correction
from tiltflow.density import Bank, Density
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.potential import Reward
from tiltflow.schedule import Linear, Schedule
from tiltflow.seed import Seed
from tiltflow.space import Euclidean
from tiltflow.types import Cond

Numbers = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


@final
class MixtureEndpoint(nn.Module):
    """E[X_1 | X_t = x] of a Gaussian mixture with diagonal covariances (methods, section 1.3)::

    responsibility_j ~ w_j N(x; alpha m_j, alpha^2 s_j^2 + beta^2)
    endpoint = sum_j responsibility_j (m_j + alpha s_j^2 / V_j (x - alpha m_j))
    """

    def __init__(
        self, means: Tensor, stds: Tensor, log_weights: Tensor, schedule: Schedule
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self._cast: dict[torch.dtype, tuple[Tensor, ...]] = {}
        self.register_buffer("means", means)
        self.register_buffer("variances", stds**2)
        self.register_buffer("log_weights", log_weights)
        self.means: Tensor
        self.variances: Tensor
        self.log_weights: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, D), (B,) -> (B, D)."""
        means, variances, log_weights = self._constants(x.dtype)
        alpha, beta = self.schedule.alpha(t)[:, None, None], self.schedule.beta(t)[:, None, None]
        inverse = (alpha**2 * variances + beta**2).reciprocal()  # 1 / V, (B, J, D)
        offset = x[:, None, :] - alpha * means
        scaled = offset * inverse
        logits = log_weights + 0.5 * (inverse.log() - offset * scaled).sum(-1)
        responsibility = torch.softmax(logits, 1)[..., None]
        return (responsibility * (means + alpha * variances * scaled)).sum(1)

    def _constants(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers, which are in float64, in another dtype; converted once."""
        if dtype not in self._cast or self._cast[dtype][0].device != self.means.device:
            buffers = (self.means, self.variances, self.log_weights)
            self._cast[dtype] = tuple(b.to(dtype) for b in buffers)
        means, variances, log_weights = self._cast[dtype]
        return means, variances, log_weights


@final
@dataclass(frozen=True, eq=False)
class MixtureLog(Reward):
    """log density of a Gaussian mixture, normalised; value and score."""

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        means, stds = self.means.to(x), self.stds.to(x)
        z = (x[:, None, :] - means) / stds
        each = -0.5 * z**2 - stds.log() - 0.5 * math.log(2 * math.pi)
        return torch.logsumexp(self.log_weights.to(x) + each.sum(-1), 1)


@final
class GaussianMixture(Density):
    """sum_j w_j N(m_j, diag(s_j^2)) on R^D, with every quantity in closed form.

    Args:
        means: (J, D).
        stds: a number, (J,) or (J, D).
        weights: (J,), any positive numbers; normalised. Default: equal.
        num_samples: size of ``bank``.
        seed: stream of ``bank``.
    """

    def __init__(
        self,
        means: Numbers,
        stds: Numbers = 1.0,
        weights: Sequence[float] | Tensor | None = None,
        *,
        num_samples: int = 10_000,
        seed: Seed | None = None,
    ) -> None:
        m = torch.as_tensor(means, dtype=torch.float64)
        if m.ndim != 2:
            raise ConfigError("GaussianMixture: means must be (components, dimensions).")
        s = torch.as_tensor(stds, dtype=torch.float64)
        s = (s[:, None] if s.ndim == 1 else s).expand_as(m)
        n = len(m)
        w = torch.ones(n) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if w.shape != (len(m),) or not bool((w > 0).all()) or not bool((s > 0).all()):
            raise ConfigError(
                "GaussianMixture: weights and stds must be positive, one weight per component."
            )
        self.means, self.stds = m, s.contiguous()
        self.log_weights = (w.double() / w.double().sum()).log()
        self.num_samples, self.seed = num_samples, seed or Seed(0).child("mixture")
        self._log = MixtureLog(self.means, self.stds, self.log_weights)

    @property
    def event(self) -> tuple[int, ...]:
        return (self.means.shape[1],)

    @property
    def weights(self) -> Tensor:
        """Normalised weights, (J,)."""
        return self.log_weights.exp()

    @property
    def log(self) -> MixtureLog:
        """Exact log-density."""
        return self._log

    @property
    def bank(self) -> Bank:
        """``num_samples`` exact samples."""
        return Bank.equal(self.sample(self.num_samples, self.seed))

    def sample(self, count: int, seed: Seed) -> Tensor:
        """Exact samples, (count, D), float64."""
        generator = seed.generator()
        j = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[j] + self.stds[j] * z

    def tilted(self, slope: Numbers, curvature: Numbers = 0.0) -> tuple[GaussianMixture, float]:
        """The mixture times exp(slope . x - sum curvature x^2 / 2), and the log normaliser.

        Per component and dimension, with precision 1/s^2 + c: mean (m/s^2 + slope) / precision.

        Raises:
            ConfigError: if a precision is not positive, i.e. the tilt is not integrable.
        """
        a = torch.as_tensor(slope, dtype=torch.float64).expand(self.means.shape[1])
        c = torch.as_tensor(curvature, dtype=torch.float64).expand(self.means.shape[1])
        precision = self.stds**-2 + c
        if not bool((precision > 0).all()):
            raise ConfigError("This quadratic tilt is not integrable against the mixture.")
        mean = (self.means / self.stds**2 + a) / precision
        log_z = 0.5 * (
            precision * mean**2 - self.means**2 / self.stds**2 - (precision * self.stds**2).log()
        ).sum(1)
        logits = self.log_weights + log_z
        total = torch.logsumexp(logits, 0)
        return GaussianMixture(
            mean, precision**-0.5, (logits - total).exp(),
            num_samples=self.num_samples, seed=self.seed,
        ), float(total)  # fmt: skip

    def flow(
        self, schedule: Schedule | None = None, hidden: Sequence[int] = (64, 64, 64)
    ) -> FlowModel:
        """The exact flow model of this density, trainable through a correction network.

        Args:
            schedule: the interpolant (default ``Linear()``).
            hidden: widths of the correction, a ReLU network with four Fourier pairs of t; empty
                for a model that cannot be trained.
        """
        schedule = schedule or Linear()
        net = MixtureEndpoint(self.means, self.stds, self.log_weights, schedule)
        event = (self.means.shape[1],)
        delta = None
        if hidden:
            correction = MLP(event, hidden, activation="relu", frequencies=4, zero_init=True)
            delta = Correction(correction)
        return FlowModel(net, schedule, Euclidean(event), predicts="endpoint", delta=delta)


def gaussian(mean: Sequence[float], std: float | Sequence[float] = 1.0) -> GaussianMixture:
    """N(mean, diag(std^2)) as a mixture of one component."""
    m = torch.as_tensor(mean, dtype=torch.float64)[None]
    return GaussianMixture(m, torch.as_tensor(std, dtype=torch.float64).expand_as(m))


def ring(count: int = 8, radius: float = 2.0, std: float = 0.25) -> GaussianMixture:
    """``count`` equal isotropic Gaussians on a circle, the first at angle 0."""
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)
