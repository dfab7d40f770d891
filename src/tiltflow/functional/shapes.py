"""Shapes u of optimised certainty equivalents, opt_y { y + E u(r - y) }."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError

Bend: TypeAlias = Literal["none", "convex", "concave"]


class Shape(abc.ABC):
    """A function u of one number, convex (then the optimum over y is a minimum), concave (a
    maximum) or a line of slope 1, with a place at which its slope is 1.

    There the optimal y is: with r between r_min and r_max, it is between r_min - unit and
    r_max - unit.
    """

    @property
    @abc.abstractmethod
    def bend(self) -> Bend:
        """Whether u is a line, convex or concave."""

    @property
    @abc.abstractmethod
    def unit(self) -> float:
        """t with slope 1, or between slopes below and above 1."""

    @property
    @abc.abstractmethod
    def mirrored(self) -> Shape:
        """-u(-t): the shape that turns the best into the worst."""

    @abc.abstractmethod
    def applied(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """u(t) and u'(t); at a kink, the smaller slope."""

    @property
    def tail(self) -> float:
        """Probability at least of what the slope, whose mean is 1 at the optimum, lives on."""
        return 1.0


@final
@dataclass(frozen=True)
class Hinges(Shape):
    """Piecewise linear, u(0) = 0: slopes s_0 below the first knot, s_i above the i-th.

    One knot at 0 with slopes (0, 1 / (1 - b)) is RightCVaR, (1 / b, 0) is LeftCVaR, slopes
    (m, m + (1 - m) / (1 - b)) the mixture of the mean, of weight m, and RightCVaR.

    Args:
        knots: increasing; none for a line.
        slopes: one more than knots; not decreasing (convex) or not increasing (concave), with 1
            between the least and the greatest.
    """

    knots: tuple[float, ...] = (0.0,)
    slopes: tuple[float, ...] = (0.0, 1.0)

    @staticmethod
    def beyond(mass: float, side: Literal["above", "below"]) -> Hinges:
        """The hinge of the CVaR of a tail of this mass."""
        return Hinges((0.0,), (0.0, 1 / mass) if side == "above" else (1 / mass, 0.0))

    def __post_init__(self) -> None:
        if len(self.slopes) != len(self.knots) + 1 or sorted(set(self.knots)) != [*self.knots]:
            raise ConfigError(
                f"Hinges: {len(self.knots)} knots {self.knots} need to increase strictly and "
                f"{len(self.knots) + 1} slopes; there are {len(self.slopes)}."
            )
        if not all(map(math.isfinite, (*self.knots, *self.slopes))):
            raise ConfigError(f"Hinges: {self.knots}, {self.slopes} must be finite numbers.")
        if [*self.slopes] not in (sorted(self.slopes), sorted(self.slopes, reverse=True)):
            raise ConfigError(
                f"Hinges: slopes={self.slopes} must not decrease (a minimum over y) or not "
                "increase (a maximum)."
            )
        if not min(self.slopes) <= 1 <= max(self.slopes):
            raise ConfigError(
                f"Hinges: slopes={self.slopes} must have 1 between the least and the greatest; "
                "otherwise y + E u(r - y) has no optimum over y."
            )

    @property
    def bend(self) -> Bend:
        if self.slopes[0] == self.slopes[-1]:
            return "none"
        return "convex" if self.slopes[0] < self.slopes[-1] else "concave"

    @property
    def unit(self) -> float:
        below = sum((s < 1) == (self.bend == "convex") for s in self.slopes)
        return 0.0 if self.bend == "none" else self.knots[min(max(below, 1), len(self.knots)) - 1]

    @property
    def mirrored(self) -> Hinges:
        return Hinges(tuple(0.0 - k for k in self.knots[::-1]), self.slopes[::-1])

    @property
    def tail(self) -> float:
        low, high = min(self.slopes), max(self.slopes)
        return 1.0 if low == high else (1 - low) / (high - low)

    @property
    def side(self) -> Literal["above", "below"] | None:
        """Of a single hinge at 0, the side that is not flat; else ``None``."""
        if self.knots != (0.0,) or 0.0 not in self.slopes:
            return None
        return "above" if self.slopes[0] == 0 else "below"

    def applied(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.slopes[0] * t, torch.full_like(t, self.slopes[0])
        for knot, before, after in zip(self.knots, self.slopes, self.slopes[1:], strict=False):
            change = after - before
            # A hinge, less its value at 0, so that u(0) = 0.
            value = value + change * ((t - knot).clamp(min=0) - max(-knot, 0.0))
            over = t > knot if change > 0 else t >= knot
            slope = slope + change * over.to(t)
        return value, slope


@final
@dataclass(frozen=True)
class SoftHinge(Shape):
    """A hinge, rounded: w log(1 + exp(t / w)) / mass above, -w log(1 + exp(-t / w)) / mass below.

    Args:
        mass: of the tail.
        width: w > 0.
        side: ``"above"`` is convex, ``"below"`` concave.
    """

    mass: float
    width: float
    side: Literal["above", "below"] = "above"

    def __post_init__(self) -> None:
        if not (0 < self.mass < 1 and 0 < self.width < math.inf):
            raise ConfigError(
                f"SoftHinge: mass={self.mass!r} must lie strictly between 0 and 1 and "
                f"width={self.width!r} must be positive."
            )
        if self.side not in ("above", "below"):
            raise ConfigError(f"SoftHinge: side={self.side!r} must be 'above' or 'below'.")

    @property
    def bend(self) -> Bend:
        return "convex" if self.side == "above" else "concave"

    @property
    def unit(self) -> float:
        logit = self.width * math.log(self.mass / (1 - self.mass))
        return logit if self.side == "above" else -logit

    @property
    def mirrored(self) -> SoftHinge:
        return SoftHinge(self.mass, self.width, "below" if self.side == "above" else "above")

    @property
    def tail(self) -> float:
        return self.mass

    def applied(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sign = 1.0 if self.side == "above" else -1.0
        z = sign * t / self.width
        soft = torch.nn.functional.softplus(z, threshold=40.0)
        return sign * self.width / self.mass * soft, z.sigmoid() / self.mass


@final
@dataclass(frozen=True)
class Exponential(Shape):
    """(exp(b t) - 1) / b, of which the certainty equivalent is (1/b) log E exp(b r).

    Args:
        sensitivity: b, not 0; b > 0 is convex.
    """

    sensitivity: float

    def __post_init__(self) -> None:
        if self.sensitivity == 0 or not math.isfinite(self.sensitivity):
            raise ConfigError(
                f"Exponential: sensitivity={self.sensitivity!r} must be a number other than 0."
            )

    @property
    def bend(self) -> Bend:
        return "convex" if self.sensitivity > 0 else "concave"

    @property
    def unit(self) -> float:
        return 0.0

    @property
    def mirrored(self) -> Exponential:
        return Exponential(-self.sensitivity)

    def applied(self, t: Tensor) -> tuple[Tensor, Tensor]:
        grown = (self.sensitivity * t).expm1()
        return grown / self.sensitivity, grown + 1


@final
@dataclass(frozen=True)
class Quadratic(Shape):
    """t + c t^2, of which the certainty equivalent is E r + c Var r.

    Args:
        curvature: c, not 0; c > 0 is convex.
    """

    curvature: float

    def __post_init__(self) -> None:
        if self.curvature == 0 or not math.isfinite(self.curvature):
            raise ConfigError(
                f"Quadratic: curvature={self.curvature!r} must be a number other than 0."
            )

    @property
    def bend(self) -> Bend:
        return "convex" if self.curvature > 0 else "concave"

    @property
    def unit(self) -> float:
        return 0.0

    @property
    def mirrored(self) -> Quadratic:
        return Quadratic(-self.curvature)

    def applied(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return t + self.curvature * t.square(), 1 + 2 * self.curvature * t


LINE = Hinges((), (1.0,))
"""u(t) = t, of which the certainty equivalent is the mean, at any y."""
