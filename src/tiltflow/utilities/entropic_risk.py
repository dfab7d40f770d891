"""The certainty equivalent of exponential utility."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.functional import Certainty, Curvature, Exponential, Functional
from tiltflow.potential import Potential, Shaped, offers_through_values
from tiltflow.types import Access, Estimate


@final
@dataclass(frozen=True, eq=False)
class EntropicRisk(Functional):
    """F[p] = (1/b) log E_p exp(b r), with first variation exp(b r) / (b E_p exp(b r)).

    b -> 0 is the mean. b > 0 rewards rare excellence and is concave in p, b < 0 punishes rare
    failure and is convex, so that mirror descent finds a local optimum. The first variation grows
    exponentially in b r: keep b times the spread of r within a few units.

    Args:
        reward: r; needs a value.
        sensitivity: b, not zero, in units of one over the reward.
    """

    reward: Potential
    sensitivity: float

    def __post_init__(self) -> None:
        if self.sensitivity == 0 or not math.isfinite(self.sensitivity):
            raise ConfigError(
                f"EntropicRisk: sensitivity={self.sensitivity!r} must be a number other than 0; "
                "its limit 0 is ExpectedReward."
            )

    @property
    def curvature(self) -> Curvature:
        return "concave" if self.sensitivity > 0 else "convex"

    def certainties(self) -> tuple[Certainty, ...]:
        return (Certainty(self.reward, Exponential(self.sensitivity)),)

    def offers(self, log: Access) -> Access:
        return offers_through_values(self.reward)

    def value(self, p: Density) -> Estimate:
        """Plug-in value; the influence function is the first variation."""
        log_mean = self._log_mean(p)
        influence = p.estimate(self._variation(log_mean).value)
        return replace(influence, value=log_mean / self.sensitivity)

    def first_variation(self, p: Density) -> Potential:
        return self._variation(self._log_mean(p))

    def _variation(self, log_mean: float) -> Potential:
        b = self.sensitivity

        def shape(r: Tensor) -> tuple[Tensor, Tensor]:
            tilt = (b * r - log_mean).exp()
            return tilt / b, tilt

        return Shaped(self.reward, shape, "EntropicRisk")

    def _log_mean(self, p: Density) -> float:
        """log E exp(b r), in the log domain and float64."""
        self.reward.require(Access.VALUE, "EntropicRisk")
        bank = p.bank
        scaled = self.sensitivity * self.reward.value(bank.points, bank.cond).double()
        return float((scaled + bank.weights.double().to(scaled.device).log()).logsumexp(0))

    def __str__(self) -> str:
        return f"EntropicRisk({self.reward}, sensitivity={self.sensitivity:g})"
