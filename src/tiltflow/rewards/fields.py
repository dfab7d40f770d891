"""Reward fields in the plane, for the toy experiments of Flow Density Control."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.potential import Reward
from tiltflow.types import Cond

HEIGHT = 0.8
"""|x2| of the two spikes of ``NoveltyField``."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class RiskField(Reward):
    """Minus a cost with a safe side and a cheap side (Flow Density Control, risk-averse toy)::

        cost = (1 - right) plain + right (cheap + (disaster - cheap) stripe)
        plain = safe + hill (1 + S(x2; -3, 3) / 10)            right = S(x1; 0.9, 1.5)
        hill = (plateau - safe) S(x1; -1.2, 0.6) + (edge - plateau) S(x1; 0, 1.5)
        stripe = exp(sharpness (cos(2 pi x2 / period) - 1))

    with S(x; a, b) = u^3 (6 u^2 - 15 u + 10) at u = (x - a) / (b - a) in [0, 1]: 0 below a, 1
    above b, twice continuously differentiable. From left to right: a moderate cost, constant; a
    high plateau that still rises towards its edge and with x2; a cheap area, cut by narrow
    stripes at x2 = 0, +-period, ... whose cost is a disaster. Over x2, the cheap area costs
    cheap + (disaster - cheap) e^-s I_0(s) on average, s = sharpness: with the defaults 71.

    -disaster <= r <= -cheap. The published field is a picture only; this one has its shape.

    Args:
        safe: cost on the left.
        plateau: cost in the middle, where its steep rise ends.
        edge: cost to which the plateau rises on.
        cheap: cost on the right, between the stripes.
        disaster: cost in the middle of a stripe.
        period: distance of the stripes.
        sharpness: s above; the standard width of a stripe is period / (2 pi sqrt(s)).
    """

    safe: float = 90.0
    plateau: float = 215.0
    edge: float = 250.0
    cheap: float = 60.0
    disaster: float = 330.0
    period: float = 1.0
    sharpness: float = 100.0

    def __post_init__(self) -> None:
        levels = (self.cheap, self.safe, self.plateau, self.edge, self.disaster)
        highest = self.safe + 1.1 * (self.edge - self.safe)
        finite = all(map(math.isfinite, (*levels, self.period, self.sharpness)))
        if not finite or list(levels) != sorted(levels) or highest > self.disaster:
            raise ConfigError(
                "RiskField: need cheap <= safe <= plateau <= edge, and disaster above all of "
                f"them and of safe + 1.1 (edge - safe) = {highest:g}; got "
                f"{', '.join(f'{level:g}' for level in levels)}."
            )
        if not (self.period > 0 and self.sharpness > 0):
            raise ConfigError("RiskField: period and sharpness must be positive.")

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        x1, x2 = _plane(x, self)
        hill = (self.plateau - self.safe) * _step(x1, -1.2, 0.6)
        hill = hill + (self.edge - self.plateau) * _step(x1, 0.0, 1.5)
        plain = self.safe + hill * (1 + 0.1 * _step(x2, -3.0, 3.0))
        stripe = (self.sharpness * ((2 * math.pi / self.period * x2).cos() - 1)).exp()
        cheap = self.cheap + (self.disaster - self.cheap) * stripe
        return -torch.lerp(plain, cheap, _step(x1, 0.9, 1.5))


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class NoveltyField(Reward):
    """A good side, and a poor side with sparse spikes (Flow Density Control, novelty toy)::

        base = left - (left - middle) S(x1; -1.6, -0.4) - (middle - right) S(x1; 0.4, 1.6)
        r = base + (peak - base) (spike_+ + spike_-)
        spike_+- = 1 - S(|x - (distance, +-0.8)|^2; width^2 / 4, 9 width^2 / 4)

    with S as in ``RiskField``. From left to right: a moderately high reward, a medium one where
    samples start, a low one with two round spikes, flat inside width / 2 and gone beyond
    3 width / 2. Under N(0, I) one sample in 300 reaches 300, with the defaults.

    min(left, middle, right) <= r <= max(left, middle, peak). The published field is a picture
    only; this one has its shape.

    Args:
        left, middle, right: levels of the base.
        peak: reward at the top of a spike.
        width: radius at which a spike has 72 % of its height; below 8 / 15, so that the two
            do not meet.
        distance: of the spikes from the centre, along x1.
    """

    left: float = 55.0
    middle: float = 40.0
    right: float = 10.0
    peak: float = 600.0
    width: float = 0.5
    distance: float = 3.0

    def __post_init__(self) -> None:
        levels = (self.right, self.middle, self.left, self.peak)
        if not all(map(math.isfinite, levels)) or list(levels) != sorted(levels):
            raise ConfigError(
                "NoveltyField: need right <= middle <= left <= peak, got "
                f"{', '.join(f'{level:g}' for level in levels)}."
            )
        if not 0 < self.width < 2 * HEIGHT / 3:
            raise ConfigError(
                f"NoveltyField: width={self.width:g} must lie between 0 and {2 * HEIGHT / 3:.3g}, "
                "or the two spikes meet."
            )

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        x1, x2 = _plane(x, self)
        base = self.left - (self.left - self.middle) * _step(x1, -1.6, -0.4)
        base = base - (self.middle - self.right) * _step(x1, 0.4, 1.6)
        inner, spike = self.width**2, torch.zeros_like(base)
        for height in (HEIGHT, -HEIGHT):
            apart = (x1 - self.distance) ** 2 + (x2 - height) ** 2
            spike = spike + 1 - _step(apart, inner / 4, 9 * inner / 4)
        return torch.lerp(base, torch.full_like(base, self.peak), spike)


def _plane(x: Tensor, owner: Reward) -> tuple[Tensor, Tensor]:
    """Both coordinates, (B,) each."""
    if x.ndim != 2 or x.shape[1] != 2:
        raise ShapeError(f"{owner} is a field in the plane; states have shape {tuple(x.shape)}.")
    return x[:, 0], x[:, 1]


def _step(x: Tensor, start: float, end: float) -> Tensor:
    """0 before ``start``, 1 after ``end``, a polynomial with two continuous derivatives."""
    u = ((x - start) / (end - start)).clamp(0, 1)
    return u**3 * (u * (6 * u - 15) + 10)
