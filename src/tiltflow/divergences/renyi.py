"""Renyi divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch

from tiltflow.density import Density
from tiltflow.divergences.of_ratio import OfRatio, Shape
from tiltflow.errors import ConfigError
from tiltflow.functional import Curvature, per_density
from tiltflow.ratio import ExactRatio, RatioEstimator


@final
@dataclass(frozen=True, eq=False)
class Renyi(OfRatio):
    """D[p] = log E_p exp((b - 1) T) / (b - 1) with T = log p / prior and b the order::

        delta D = b / (b - 1) exp((b - 1) T) / Z          Z = E_p exp((b - 1) T)
        grad delta D = b exp((b - 1) T) / Z grad T

    b -> 1 is KL, b = 2 is log(1 + chi-square), b = 1/2 is -2 log(1 - Hellinger). It grows with b:
    large orders punish the worst over-weighting of any region, orders below 1 forgive regions that
    p drops. Convex in p for b <= 1; above, only quasi-convex (methods, section 3.5). Infinite for
    some b > 1 wherever the tails of p are heavier than the prior's.

    The value is averaged over the bank of p for b >= 1/2, else over the prior's, where it is
    E_prior exp(b T). The second moments are E_prior exp((2 b - 1) T) and E_prior exp(2 b T); as a
    function of its exponent, E_prior exp(s T) is log-convex and 1 at s = 0 and at s = 1, so that
    the first is the smaller exactly for b > 1/2.

    Args:
        prior: the density to stay close to.
        order: b, positive and not 1.
        ratio: how T is known.
    """

    prior: Density
    order: float
    ratio: RatioEstimator = field(default_factory=ExactRatio)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.order) and self.order > 0) or self.order == 1:
            raise ConfigError(
                f"Renyi: order={self.order!r} must be positive and not 1; its limit 1 is KL."
            )

    @property
    def curvature(self) -> Curvature:
        return "convex" if self.order < 1 else "neither"

    @property
    def _over_p(self) -> bool:
        return self.order >= 0.5

    @per_density
    def _log_moment(self, p: Density) -> float:
        """log Z, in the log domain and float64."""
        bank = (p if self._over_p else self._reference(p)).bank
        exponent = self.order - 1 if self._over_p else self.order
        t = self.log_ratio(p).value(bank.points, bank.cond).double()
        return float((exponent * t + bank.weights.double().to(t.device).log()).logsumexp(0))

    def _value(self, p: Density) -> float:
        return self._log_moment(p) / (self.order - 1)

    def _sides(self, p: Density) -> tuple[Shape | None, Shape | None]:
        # D is linear in Z to first order: these integrands carry its error, not its value.
        b, log_z = self.order, self._log_moment(p)
        if self._over_p:
            return lambda t: (
                ((b - 1) * t - log_z).exp() / (b - 1), ((b - 1) * t - log_z).exp()
            ), None  # fmt: skip
        return None, lambda t: (
            (b * t - log_z).exp() / (b - 1), b / (b - 1) * (b * t - log_z).exp()
        )  # fmt: skip

    def _variation(self, p: Density) -> Shape:
        b, log_z = self.order, self._log_moment(p)
        # Minus the constant b / (b - 1), without which the limit b -> 1 is lost in rounding.
        return lambda t: (
            b / (b - 1) * torch.expm1((b - 1) * t - log_z), b * ((b - 1) * t - log_z).exp()
        )  # fmt: skip

    def __str__(self) -> str:
        return f"Renyi({type(self.prior).__name__}, order={self.order:g})"
