"""Functions of one variable with a piecewise linear derivative."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from tiltflow.transport.ground import Ground, OnGround


@final
@dataclass(frozen=True, eq=False)
class PiecewiseQuadratic(OnGround):
    """A function with a piecewise linear derivative; linear beyond its knots.

    Args:
        ground: the metric; the function is one of scaled states.
        knots: (K,), increasing.
        values: (K,), at the knots.
        after: (K,), derivative just after each knot.
        before: (K,), derivative just before each knot.
    """

    ground: Ground
    knots: Tensor
    values: Tensor
    after: Tensor
    before: Tensor

    @staticmethod
    def of(ground: Ground, knots: Tensor, after: Tensor, before: Tensor) -> PiecewiseQuadratic:
        """From the derivative at the knots; zero at the first one."""
        steps = knots.diff() * (after[:-1] + before[1:]) / 2
        values = torch.cat([knots.new_zeros(1), steps.cumsum(0)])
        return PiecewiseQuadratic(ground, knots, values, after, before)

    @property
    def size(self) -> int:
        return 8

    def _at(self, z: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        base, h, slope, bend = self._piece(z[:, 0])
        value = self.values.to(z)[base] + h * (slope + 0.5 * bend * h)
        return value, (slope + bend * h)[:, None]

    def _piece(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each x: the knot it is measured from, distance, slope and second derivative."""
        knots, after, before = (t.to(x) for t in (self.knots, self.after, self.before))
        last = len(knots) - 1
        k = torch.searchsorted(knots, x.contiguous(), right=True) - 1  # -1: before all knots
        base, following = k.clamp(min=0), (k + 1).clamp(max=last)
        inside = (k >= 0) & (k < last)
        slope = torch.where(k < 0, before[base], after[base])
        width = torch.where(inside, knots[following] - knots[base], 1.0)
        bend = torch.where(inside, (before[following] - slope) / width, 0.0)
        return base, x - knots[base], slope, bend

    @cached_property
    def _integrals(self) -> Tensor:
        """Integral from the first knot to each knot, (K,)."""
        h, slope = self.knots.diff(), self.after[:-1]
        parts = h * (self.values[:-1] + h * (2 * slope + self.before[1:]) / 6)
        return torch.cat([h.new_zeros(1), parts.cumsum(0)])

    def integral(self, x: Tensor) -> Tensor:
        """Integral from the first knot to x, (N,)."""
        base, h, slope, bend = self._piece(x)
        value = self.values.to(x)[base]
        return self._integrals.to(x)[base] + h * (value + h * (slope / 2 + h * bend / 6))


@final
@dataclass(frozen=True, eq=False)
class MovingAverage(OnGround):
    """The mean of a function over an interval of some width around each point."""

    ground: Ground
    inner: PiecewiseQuadratic
    width: float

    @property
    def size(self) -> int:
        return 16

    def _at(self, z: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        left, right = z - self.width / 2, z + self.width / 2
        integral = self.inner.integral(right[:, 0]) - self.inner.integral(left[:, 0])
        rise = self.inner.on_scaled(right) - self.inner.on_scaled(left)
        return integral / self.width, (rise / self.width)[:, None]
