"""A potential whose difference of means is a Wasserstein distance, learned from samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.context import Context
from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.potential import Potential
from tiltflow.ratio.critic import Critic, Learned, NoState, Sides, check_positive
from tiltflow.seed import Seed
from tiltflow.training import Training, optimise

PAIRS = 4096
"""Interpolates on which the slope of a trained critic is measured."""


@final
@dataclass(frozen=True, eq=False)
class WassersteinCritic:
    """A Kantorovich potential by WGAN-GP (Gulrajani et al., arXiv 1704.00028)::

        maximise over phi   E_p phi - E_q phi - penalty E(|A^-1 grad phi| - 1)^2

    at points u x + (1 - u) y with x ~ p, y ~ q, u uniform. For the ground metric
    d(x, y) = |A (x - y)| the difference of means is then near W_1(p, q), and phi near the first
    variation of p -> W_1(p, q). The states are scaled by one number, so that the penalty, like
    W_1 itself, does not depend on the unit of length.

    Deviation: the penalty lets slopes exceed one by about W_1 / (2 penalty) in that unit. The
    trained potential is divided by its root mean square slope at the interpolates.

    Args:
        metric: diagonal of A, one positive number per entry of a state; all 1 by default.
        penalty: strength of the gradient penalty.
        hidden: widths of the hidden layers.
        training: the optimiser loop.
        batch_size: samples of each side per update.
        seed: stream of initial weights and batches; the result is a function of it.
    """

    metric: Sequence[float] | None = None
    penalty: float = 10.0
    hidden: Sequence[int] = (64, 64)
    training: Training = field(
        default_factory=lambda: Training(num_updates=2000, learning_rate=2e-3, betas=(0.5, 0.9))
    )
    batch_size: int = 256
    seed: Seed = field(default_factory=lambda: Seed(0).child("wasserstein_critic"))

    def __post_init__(self) -> None:
        check_positive(self, "penalty", "batch_size")
        if self.metric is not None:
            object.__setattr__(self, "metric", tuple(float(a) for a in self.metric))
            if not self.metric or not all(math.isfinite(a) and a > 0 for a in self.metric):
                raise ConfigError("WassersteinCritic: metric needs one positive number per entry.")

    def fit(self, p: Density, q: Density) -> Potential:
        """The trained potential; offers values and gradients. Costly: keep it.

        Raises:
            ConfigError: if the metric does not fit the states, or a bank is too small.
            UnsupportedError: for conditional laws.
        """
        sides = Sides.of(p, q, "WassersteinCritic")
        mean, std = sides.moments()
        metric = self._metric(mean)
        unit = (metric * std).square().mean().sqrt()
        critic = Critic(mean, unit / metric, self.hidden, self.seed.child("weights"))
        critic.to(mean.device)
        loss = _Penalised(critic, sides, self)
        optimise(critic, loss, self.training, Context(self.seed.child("training")))
        critic.gain.copy_(unit / loss.slope())
        name = f"WassersteinCritic({type(p).__name__}, {type(q).__name__})"
        return Learned(critic.requires_grad_(False), name)

    def _metric(self, like: Tensor) -> Tensor:
        if self.metric is None:
            return torch.ones_like(like)
        if len(self.metric) != len(like):
            raise ConfigError(
                f"WassersteinCritic: metric has {len(self.metric)} entries, a state {len(like)}."
            )
        return like.new_tensor(self.metric)


@final
class _Penalised(NoState):
    """Minus the penalised difference of means, in units in which the metric is Euclidean."""

    def __init__(self, critic: Critic, sides: Sides, settings: WassersteinCritic) -> None:
        self.critic, self.sides, self.settings = critic, sides, settings

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        x, y, slopes = self._batch("update", update, part, count=self.settings.batch_size)
        means = self.critic.of_standardised(x).mean() - self.critic.of_standardised(y).mean()
        penalty = self.settings.penalty * ((slopes - 1) ** 2).mean()
        return penalty - means, {"distance": float(means.detach())}

    def converged(self, update: int) -> bool:
        return False

    def slope(self) -> float:
        """Root mean square slope at interpolates; 1 for a constant (p = q to the eye)."""
        found = float(self._batch("slope", count=PAIRS)[2].detach().square().mean().sqrt())
        return found if found > 0 else 1.0

    def _batch(self, *where: str | int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Standardised points of both sides (B, D), and slopes (B,) between them."""
        generator = self.settings.seed.child(*where).generator()
        x, y = (self.critic.standardised(s) for s in self.sides.draw(count, generator))
        u = torch.rand(count, 1, generator=generator).to(x)
        between = (u * x + (1 - u) * y).requires_grad_()
        with torch.enable_grad():
            out = self.critic.of_standardised(between).sum()
        (grad,) = torch.autograd.grad(out, between, create_graph=True)
        # The root of a square at 0, where training starts, has no derivative.
        return x, y, (grad.square().sum(1) + 1e-12).sqrt()


__all__ = ["WassersteinCritic"]
