"""Weighted means of a reward's quantiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Literal, final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.functional import (
    LINE,
    Certainty,
    Curvature,
    Functional,
    Hinges,
    Shape,
    SoftHinge,
    influence,
    per_density,
    spread,
)
from tiltflow.potential import OfReward, Potential, offers_through_values
from tiltflow.types import Access, Cond, Estimate
from tiltflow.utilities.tails import require_tail, samples_for_tail


@final
@dataclass(frozen=True, eq=False)
class PiecewiseLinear(OfReward):
    """A continuous, piecewise linear function of a reward.

    At a knot the slope is the smaller one of its two sides, as it is for ``Hinge``.

    Args:
        reward: r; its value is needed, for the gradient too.
        knots: (m,), not decreasing.
        slopes: (m + 1,), below the first knot, between the knots, and above the last one.
        height: value at the first knot.
    """

    reward: Potential
    knots: Tensor
    slopes: Tensor
    height: float

    @functools.cached_property
    def heights(self) -> Tensor:
        """Values at the knots, (m,)."""
        rises = self.slopes[1:-1] * self.knots.diff()
        return self.height + torch.cat([rises.new_zeros(1), rises.cumsum(0)])

    def active(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return self.applied(self.reward.value(x, cond))[1] > 0

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        knots, slopes, heights = self.knots.to(r), self.slopes.to(r), self.heights.to(r)
        below, up_to = torch.searchsorted(knots, r), torch.searchsorted(knots, r, right=True)
        anchor = (below - 1).clamp(min=0)
        value = heights[anchor] + slopes[below] * (r - knots[anchor])
        return value, torch.minimum(slopes[below], slopes[up_to])

    def __str__(self) -> str:
        return f"PiecewiseLinear({self.reward}, {len(self.slopes)} pieces)"


@final
@dataclass(frozen=True, eq=False)
class RoundedLinear(OfReward):
    """A sum of a line and of rounded hinges, f(r) = height + slope r + sum_i d_i h(r - y_i) with
    h(z) = w log(1 + exp(z / w)), which is z_+ as w -> 0.

    Args:
        reward: r; its value is needed, for the gradient too.
        knots, changes: y_i and d_i, (m,).
        slope, height: of the line.
        width: w.
    """

    reward: Potential
    knots: Tensor
    changes: Tensor
    slope: float
    height: float
    width: float

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.height + self.slope * r, torch.full_like(r, self.slope)
        for knot, change in zip(self.knots.tolist(), self.changes.tolist(), strict=True):
            z = (r - knot) / self.width
            value = value + change * self.width * torch.nn.functional.softplus(z)
            slope = slope + change * z.sigmoid()
        return value, slope

    def __str__(self) -> str:
        return f"RoundedLinear({self.reward}, {len(self.knots)} hinges)"


@final
@dataclass(frozen=True, eq=False)
class SpectralRisk(Functional):
    """Mean of the quantiles of a reward under a weight on their levels, the spectrum s::

        F[p] = int_0^1 s(u) q_u du,    q_u the u-quantile of r under p
        delta F = a piecewise linear function of r with slope s_i between q(l_i) and q(l_{i+1})

    The spectrum is piecewise constant: s_0 below the level l_1, s_i from l_i to l_{i+1}. Its
    special cases are ``LeftCVaR(r, b)`` with levels (b,) and slopes (1, 0), ``RightCVaR(r, b)``
    with slopes (0, 1), and the mean with equal slopes; in general F is a mean and a CVaR for each
    level at which the spectrum changes, with weights that are not negative (Acerbi, 2002). Values
    count the samples at the levels fractionally, through T(u) = int_u^1 q_v dv
    = (1 - u) q_u + E (r - q_u)_+ and F = sum_i s_i (T(l_i) - T(l_{i+1})).

    Concave in p where the spectrum increases (the best samples weigh most), convex where it
    decreases, so that mirror descent then finds a local optimum.

    With a ``width`` w > 0 every hinge is rounded, z_+ -> w log(1 + exp(z / w)), and its level is
    soft: q_u solves E sigmoid((r - q_u) / w) = 1 - u. Then T changes by at most w log 2, and every
    sample has a gradient. ``plan`` narrows the width by and by to pass over poor local optima.

    Args:
        reward: r; needs a value.
        levels: 0 < l_1 < ... < l_m < 1, at least one.
        slopes: s_0, ..., s_m, not negative, not all zero; scaled here so that s integrates to 1.
        width: w, in units of the reward; 0 for sharp levels.
    """

    reward: Potential
    levels: tuple[float, ...]
    slopes: tuple[float, ...]
    width: float = 0.0

    def __post_init__(self) -> None:
        bounds = (0.0, *self.levels, 1.0)
        if not self.levels or not all(a < b for a, b in pairwise(bounds)):
            raise ConfigError(
                f"SpectralRisk: levels={self.levels!r} must be numbers that increase strictly "
                "between 0 and 1, at least one; ExpectedReward needs none."
            )
        if len(self.slopes) != len(self.levels) + 1:
            raise ConfigError(
                f"SpectralRisk: {len(self.levels)} levels bound {len(self.levels) + 1} pieces, "
                f"but there are {len(self.slopes)} slopes; give one per piece."
            )
        if not all(0 <= s < math.inf for s in self.slopes) or not any(self.slopes):
            raise ConfigError(
                f"SpectralRisk: slopes={self.slopes!r} must not be negative and not all zero."
            )
        if not 0 <= self.width < math.inf:
            raise ConfigError(f"SpectralRisk: width={self.width!r} must be 0 or positive.")

    @staticmethod
    def wang(reward: Potential, shift: float, pieces: int = 32) -> SpectralRisk:
        """Wang's (2000) transform, in ``pieces`` equal pieces: s = h' with
        h(u) = Phi(Phi^-1(u) + shift), Phi the standard normal distribution function.

        ``shift`` > 0 weighs the worst samples (risk aversion, convex), ``shift`` < 0 the best
        (concave), 0 is the mean. On a normal reward F is its mean less ``shift`` standard
        deviations, up to the approximation by pieces.
        """
        if not math.isfinite(shift):
            raise ConfigError(f"SpectralRisk.wang: shift={shift!r} must be a finite number.")
        normal = NormalDist()

        def distortion(u: float) -> float:
            return u if u in (0.0, 1.0) else normal.cdf(normal.inv_cdf(u) + shift)

        return _distorted(reward, distortion, pieces)

    @staticmethod
    def power(reward: Potential, exponent: float, pieces: int = 32) -> SpectralRisk:
        """The spectrum proportional to u^(exponent - 1), in ``pieces`` equal pieces.

        For a whole number n this is the expected best of n samples, up to the approximation by
        pieces. ``exponent`` > 1 weighs the best samples (concave), between 0 and 1 the worst
        (convex), 1 is the mean.
        """
        if not 0 < exponent < math.inf:
            raise ConfigError(f"SpectralRisk.power: exponent={exponent!r} must be positive.")
        return _distorted(reward, lambda u: u**exponent, pieces)

    @property
    def spectrum(self) -> tuple[float, ...]:
        """The slopes, scaled so that the spectrum integrates to one."""
        bounds = (0.0, *self.levels, 1.0)
        mass = sum(s * (b - a) for s, (a, b) in zip(self.slopes, pairwise(bounds), strict=True))
        return tuple(s / mass for s in self.slopes)

    @property
    def _changes(self) -> tuple[tuple[float, float], ...]:
        """(level, change of slope) where the spectrum changes by more than rounding."""
        steps = (b - a for a, b in pairwise(self.slopes))
        least = 1e-12 * max(self.slopes)
        return tuple((u, d) for u, d in zip(self.levels, steps, strict=True) if abs(d) > least)

    @property
    def curvature(self) -> Curvature:
        changes = [d for _, d in self._changes]
        if not changes:
            return "linear"
        if min(changes) > 0:
            return "concave"
        return "convex" if max(changes) < 0 else "neither"

    @property
    def tail(self) -> float:
        """Mass of the smallest tail among the CVaRs that this is a mean of; 1 for the mean.

        Where the spectrum rises at a level it adds the mean of all above it, where it falls that
        of all below it.
        """
        return min((1 - u if d > 0 else u for u, d in self._changes), default=1.0)

    @property
    def samples_needed(self) -> int:
        return 2 if self.tail == 1 else samples_for_tail(self.tail)

    def certainties(self) -> tuple[Certainty, ...]:
        """A mean, and a CVaR of what is above each level where the spectrum rises and below each
        level where it falls."""
        mean, unit, parts = self.spectrum[0], max(self.spectrum) / max(self.slopes), []
        for level, change in self._changes:
            mass = 1 - level if change > 0 else level
            shape = self._hinge(mass, "above" if change > 0 else "below")
            parts.append(Certainty(self.reward, shape, unit * abs(change) * mass))
            mean += unit * min(change, 0.0)
        if abs(mean) > 1e-12:
            parts.append(Certainty(self.reward, LINE).scaled(mean))
        return tuple(parts)

    def _hinge(self, mass: float, side: Literal["above", "below"]) -> Shape:
        if self.width > 0:
            return SoftHinge(mass, self.width, side)
        return Hinges.beyond(mass, side)

    def offers(self, log: Access) -> Access:
        return offers_through_values(self.reward)

    def value(self, p: Density) -> Estimate:
        """Exact on the bank; without a width, samples at the levels are counted fractionally."""
        variation = self.first_variation(p)
        return p.estimate(lambda x, c: variation.of_value(self.reward.value(x, c).double()))

    def rounded(self, p: Density, part: float) -> SpectralRisk:
        if self.curvature in ("linear", "concave"):
            return self
        width = part * spread(influence(self.reward, p), p)
        return replace(self, width=width) if width > 0 else self

    @per_density
    def first_variation(self, p: Density) -> PiecewiseLinear | RoundedLinear:
        """The function of r at the plug-in quantiles of ``p``, frozen; its mean is F.

        Raises:
            ConfigError: if fewer than 10 effective samples of the bank lie in ``tail``.
        """
        self.reward.require(Access.VALUE, "SpectralRisk")
        if self.tail < 1:
            require_tail(self, self.tail, p.bank)
        values = self.reward.value(p.bank.points, p.bank.cond).double()
        if self.width > 0:
            return self._rounded(values, p.bank.weights.double().to(values.device))
        knots = torch.stack([p.quantile(lambda x, c: values, u) for u in self.levels])
        slopes = torch.tensor(self.spectrum, dtype=torch.float64, device=knots.device)
        # F = s_0 E r + sum_i (s_i - s_{i-1}) T(l_i), less E of the hinges: the value at q(l_1).
        above = 1 - torch.tensor(self.levels, dtype=torch.float64, device=knots.device)
        height = slopes[0] * knots[0] + (slopes.diff() * above * knots).sum()
        return PiecewiseLinear(self.reward, knots, slopes, float(height))

    def _rounded(self, values: Tensor, weights: Tensor) -> RoundedLinear:
        """The first variation for a width > 0."""
        spectrum, above = (
            torch.tensor(self.spectrum, dtype=torch.float64),
            1 - values.new_tensor(self.levels),
        )
        knots = torch.stack([soft_quantile(values, weights, u, self.width) for u in self.levels])
        changes = spectrum.diff().to(values)
        height = float((changes * above * knots).sum())
        return RoundedLinear(self.reward, knots, changes, float(spectrum[0]), height, self.width)

    def __str__(self) -> str:
        return f"SpectralRisk({self.reward}, {len(self.slopes)} pieces)"


def soft_quantile(values: Tensor, weights: Tensor, level: float, width: float) -> Tensor:
    """y with E sigmoid((values - y) / width) = 1 - level, a scalar, by bisection to rounding."""
    reach = width * (40 - math.log(min(level, 1 - level)))
    low, high = values.min() - reach, values.max() + reach
    for _ in range(80):
        middle = 0.5 * (low + high)
        above = (weights * ((values - middle) / width).sigmoid()).sum() > 1 - level
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 0.5 * (low + high)


def _distorted(
    reward: Potential, distortion: Callable[[float], float], pieces: int
) -> SpectralRisk:
    """The spectrum whose integral over each of ``pieces`` equal pieces is the distortion's."""
    if pieces < 2:
        raise ConfigError(f"SpectralRisk: pieces={pieces} must be at least 2.")
    h = [distortion(i / pieces) for i in range(pieces + 1)]
    slopes = tuple((b - a) * pieces for a, b in pairwise(h))
    return SpectralRisk(reward, tuple(i / pieces for i in range(1, pieces)), slopes)
