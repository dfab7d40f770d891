"""Rewards in units of their own spread under a law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.potential import Potential
from tiltflow.potential.of_reward import OfReward

IQR_OF_NORMAL = 1.3489795
"""Between the quartiles of N(0, 1)."""


@final
@dataclass(frozen=True, eq=False)
class Standardised(OfReward):
    """phi(x) = (r(x) - mean) / std: a weight then means the same for every reward.

    ``Standardised.under(reward, density)`` takes both numbers from a law, such as the pre-trained
    model's; ``robust`` ones where the reward has rare, extreme values, such as the energy of a
    molecule two of whose atoms meet, which alone would set the standard deviation.

    Args:
        reward: r.
        mean: what becomes 0.
        std: what becomes 1; positive.
    """

    reward: Potential
    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (self.std > 0 and math.isfinite(self.std) and math.isfinite(self.mean)):
            raise ConfigError(
                f"Standardised: mean={self.mean} and std={self.std} must be finite and std "
                "positive; a reward that is constant has no spread to divide by."
            )

    @staticmethod
    def under(reward: Potential, p: Density, *, robust: bool = False) -> Standardised:
        """With the mean and the standard deviation of the reward under p; ``robust``: with its
        median and interquartile range / 1.349, which are the same two of a Gaussian."""
        if robust:
            known = reward.value(p.bank.points, p.bank.cond)
            low, middle, high = (
                float(p.quantile(lambda x, cond: known, q)) for q in (0.25, 0.5, 0.75)
            )
            return Standardised(reward, middle, (high - low) / IQR_OF_NORMAL)
        mean = p.expect(reward.value)
        variance = p.expect(lambda x, cond: (reward.value(x, cond).double() - mean) ** 2)
        return Standardised(reward, float(mean), float(variance) ** 0.5)

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return (r - self.mean) / self.std, r.new_full(r.shape, 1 / self.std)

    def __str__(self) -> str:
        return f"Standardised({self.reward})"


__all__ = ["Standardised"]
