"""The mean of a reward, less its variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.functional import LINE, Certainty, Curvature, Functional, Quadratic
from tiltflow.potential import Potential, Shaped, offers_through_values
from tiltflow.types import Access, Estimate


@final
@dataclass(frozen=True, eq=False)
class MeanVariance(Functional):
    """F[p] = E_p r - c Var_p r, with first variation r - c (r - m)^2, m = E_p r frozen.

    Raising it asks for rewards that are high and alike. It is convex in p, so that mirror descent
    finds a local optimum (methods, table of section 3.3).

    Args:
        reward: r; needs a value.
        aversion: c >= 0, in units of one over the reward.
    """

    reward: Potential
    aversion: float

    def __post_init__(self) -> None:
        if not self.aversion >= 0:
            raise ConfigError(
                f"MeanVariance: aversion={self.aversion!r} must be a number of at least 0."
            )

    @property
    def curvature(self) -> Curvature:
        return "convex" if self.aversion > 0 else "linear"

    def certainties(self) -> tuple[Certainty, ...]:
        shape = Quadratic(-self.aversion) if self.aversion > 0 else LINE
        return (Certainty(self.reward, shape),)

    def offers(self, log: Access) -> Access:
        return offers_through_values(self.reward)

    def value(self, p: Density) -> Estimate:
        """Plug-in value; the influence function is the first variation."""
        # E[r - c (r - m)^2] is E r - c Var r itself.
        return p.estimate(self.first_variation(p).value)

    def first_variation(self, p: Density) -> Potential:
        self.reward.require(Access.VALUE, "MeanVariance")
        mean, c = float(p.expect(self.reward.value)), self.aversion

        def shape(r: Tensor) -> tuple[Tensor, Tensor]:
            return r - c * (r - mean) ** 2, 1 - 2 * c * (r - mean)

        return Shaped(self.reward, shape, "MeanVariance")

    def __str__(self) -> str:
        return f"MeanVariance({self.reward}, aversion={self.aversion:g})"
