"""The optimised certainty equivalent of a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from tiltflow.density import Density
from tiltflow.functional import (
    Certainty,
    Curvature,
    Functional,
    Shape,
    bisected,
    error_of,
    influence,
    per_density,
)
from tiltflow.potential import Potential, offers_through_values
from tiltflow.types import Access, Estimate
from tiltflow.utilities.tails import require_tail, samples_for_tail


@final
@dataclass(frozen=True, eq=False)
class CertaintyEquivalent(Functional):
    """Optimised certainty equivalent (Ben-Tal and Teboulle, 2007)::

        F[p] = opt_y { y + E_p u(r - y) },      delta F = u(r - y) at the optimal y, frozen

    a minimum where u is convex (F is concave in p and favours the best), a maximum where it is
    concave (F is convex in p and guards against the worst). The optimal y has E_p u'(r - y) = 1.

    ``LeftCVaR``, ``RightCVaR``, ``EntropicRisk`` and ``MeanVariance`` are of this form, with
    ``Hinges``, ``Exponential`` and ``Quadratic``; mixtures of quantile hinges are ``Hinges`` with
    several knots or slopes. ``algorithms.tail_aware`` solves all of them with one training.

    Args:
        reward: r; needs a value.
        shape: u.
    """

    reward: Potential
    shape: Shape

    @property
    def curvature(self) -> Curvature:
        return {"none": "linear", "convex": "concave", "concave": "convex"}[self.shape.bend]  # type: ignore[return-value]

    @property
    def samples_needed(self) -> int:
        return samples_for_tail(self.shape.tail) if self.shape.tail < 1 else 2

    def certainties(self) -> tuple[Certainty, ...]:
        return (Certainty(self.reward, self.shape),)

    def offers(self, log: Access) -> Access:
        return (
            self.reward.offers if self.shape.bend == "none" else offers_through_values(self.reward)
        )

    def value(self, p: Density) -> Estimate:
        """y + E_p u(r - y); the influence function is the first variation."""
        y, values = self._threshold(p), influence(self.first_variation(p), p)
        mean = float((p.bank.weights.double().to(values.device) * values).sum())
        count = 0 if p.bank.exact else len(values)
        return Estimate(
            (0.0 if self.shape.bend == "none" else y) + mean, error_of(values, p), count
        )

    def first_variation(self, p: Density) -> Potential:
        """u(r - y) at the plug-in y.

        Raises:
            ConfigError: if fewer than 10 effective samples of the bank lie in the tail of u.
        """
        return self.certainties()[0].at(self._threshold(p))

    @per_density
    def _threshold(self, p: Density) -> float:
        """y with E_p u'(r - y) = 1, by bisection: the slope is monotone in y."""
        self.reward.require(Access.VALUE, "CertaintyEquivalent")
        if self.shape.tail < 1:
            require_tail(self, self.shape.tail, p.bank)
        if self.shape.bend == "none":
            return 0.0
        values = influence(self.reward, p)
        weights = p.bank.weights.double().to(values.device)
        rising = 1.0 if self.shape.bend == "convex" else -1.0

        def too_low(y: float) -> bool:
            return rising * (float((weights * self.shape.applied(values - y)[1]).sum()) - 1) > 0

        low = float(values.min()) - self.shape.unit
        return bisected(too_low, low, float(values.max()) - self.shape.unit)

    def __str__(self) -> str:
        return f"CertaintyEquivalent({self.reward}, {self.shape})"
