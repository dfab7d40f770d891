"""A constraint on a mean, kept by a barrier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from tiltflow.density import Density
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.functional import Curvature, Functional
from tiltflow.potential import Potential, offers_through_values
from tiltflow.types import Access, Estimate


@final
@dataclass(frozen=True, eq=False)
class LogBarrier(Functional):
    """Keeps the mean of a constraint c above ``lower``, or below ``upper``; concave in p::

        F[p] = log(E_p c - lower)      delta F = c / (E_p c - lower)
        F[p] = log(upper - E_p c)      delta F = -c / (upper - E_p c)

    The barrier is one term of an objective, whose weight says how soon the bound is felt: with a
    concave utility the optimum loses at most ``weight`` against the optimum under the constraint
    (Boyd and Vandenberghe, 2004, section 11.2)::

        ExpectedReward(r) + 0.1 * LogBarrier(c, lower=0.5) - KL(prior)

    At a p outside the bound F is minus infinity and has no first variation: start from a model
    that satisfies it, with rates small enough to stay there (methods, section 3.3).

    Args:
        constraint: c; needs a value.
        lower: smallest mean that is allowed, in units of c; or
        upper: the largest one. Give exactly one.
    """

    constraint: Potential
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        if (self.lower is None) == (self.upper is None):
            raise ConfigError(
                f"LogBarrier: got lower={self.lower!r} and upper={self.upper!r}; give exactly "
                "one of them, and add two barriers for both."
            )
        if not math.isfinite(self._bound):
            raise ConfigError(f"LogBarrier: the bound {self._bound!r} must be a finite number.")

    @property
    def _bound(self) -> float:
        return self.lower if self.lower is not None else float(self.upper or 0.0)

    @property
    def _sign(self) -> float:
        return 1.0 if self.lower is not None else -1.0

    @property
    def curvature(self) -> Curvature:
        return "concave"

    def offers(self, log: Access) -> Access:
        return offers_through_values(self.constraint)

    def margin(self, p: Density) -> Estimate:
        """How far inside the bound the mean is, E_p c - lower or upper - E_p c."""
        self.constraint.require(Access.VALUE, "LogBarrier")
        mean = p.estimate(self.constraint.value)
        margin = self._sign * (mean.value - self._bound)
        return Estimate(margin, mean.standard_error, mean.count)

    def value(self, p: Density) -> Estimate:
        """log of the margin; minus infinity, with an infinite error, where it is not positive."""
        margin = self.margin(p)
        if margin.value <= 0:
            return Estimate(-math.inf, math.inf if margin.count else 0.0, margin.count)
        error = margin.standard_error / margin.value
        return Estimate(math.log(margin.value), error, margin.count)

    def first_variation(self, p: Density) -> Potential:
        """The constraint over the margin, which is frozen.

        Raises:
            UnsupportedError: if p is not strictly inside the bound.
        """
        margin = self.margin(p)
        if margin.value <= 0:
            mean = Estimate(
                self._bound + self._sign * margin.value, margin.standard_error, margin.count
            )
            raise UnsupportedError(
                f"{self}: the mean of the constraint is {mean}, {-margin.value:.3g} outside the "
                "bound, where a barrier has no direction. Start from a model inside it, relax the "
                "bound, or take smaller rates if the start was inside."
            )
        return (self._sign / margin.value) * self.constraint

    def __str__(self) -> str:
        side = "lower" if self.lower is not None else "upper"
        return f"LogBarrier({self.constraint}, {side}={self._bound:g})"
