"""Optimised certainty equivalents: opt_y { y + E_p u(r - y) }."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from tiltflow.functional.shapes import Hinges, Shape
from tiltflow.potential import Hinge, OfReward, Potential
from tiltflow.types import Cond


@final
@dataclass(frozen=True, eq=False)
class Shifted(OfReward):
    """u(r - y): a shape of a reward's distance from a threshold."""

    reward: Potential
    shape: Shape
    threshold: float

    @property
    def sparse(self) -> bool:
        ends = (
            self.shape.slopes[:: len(self.shape.knots)] if isinstance(self.shape, Hinges) else ()
        )
        return 0.0 in ends

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape.applied(r - self.threshold)

    def active(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return self.applied(self.reward.value(x, cond))[1] != 0

    def __str__(self) -> str:
        return f"{type(self.shape).__name__}({self.reward} - {self.threshold:.4g})"


@final
@dataclass(frozen=True, eq=False)
class Certainty:
    """scale * opt_y { y + E_p u(r - y) }, the optimum a minimum where u is convex and a maximum
    where it is concave (Ben-Tal and Teboulle, 2007).

    Its first variation is scale * u(r - y) at the optimal y. CVaRs, entropic risks and means less
    variances are of this form, spectral risks and weighted sums are sums of such terms.

    Args:
        reward: r; needs a value.
        shape: u.
        scale: positive.
    """

    reward: Potential
    shape: Shape
    scale: float = 1.0

    def at(self, threshold: float) -> Potential:
        """u(r - y), without the scale; the reward itself where u is a line."""
        if self.shape.bend == "none":
            return self.reward
        if isinstance(self.shape, Hinges) and self.shape.side is not None:
            return Hinge(self.reward, threshold, max(self.shape.slopes), self.shape.side)
        return Shifted(self.reward, self.shape, threshold)

    def scaled(self, factor: float) -> Certainty:
        """``factor`` times this; a negative one turns best into worst: -F[r] is the mirrored
        form of -r."""
        if factor >= 0:
            return Certainty(self.reward, self.shape, factor * self.scale)
        return Certainty(-self.reward, self.shape.mirrored, -factor * self.scale)


def bisected(too_low: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``too_low`` changes from true to false between ``low`` and ``high``, to rounding."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if too_low(middle) else (low, middle)
    return 0.5 * (low + high)
