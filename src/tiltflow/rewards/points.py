"""Rewards on vectors: elementary functions with closed-form tilts, for toys and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.potential import Reward
from tiltflow.types import Cond

Numbers = float | Sequence[float] | Tensor
"""A number for all coordinates, or one per coordinate."""


def _numbers(value: Numbers, name: str) -> Tensor:
    try:
        out = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError):
        out = torch.tensor(float("nan"))
    if not bool(torch.isfinite(out).all()):
        raise ConfigError(f"{name}={value!r}: must be a number or a list of finite numbers.")
    return out


@final
@dataclass(frozen=True, eq=False)
class Linear(Reward):
    """r(x) = slope . x; unbounded, in units of slope times x.

    Against N(m, s^2) the tilt exp(r) shifts the mean by s^2 slope and leaves the variance.

    Args:
        slope: a number, or one per coordinate.
    """

    slope: Numbers
    _slope: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_slope", _numbers(self.slope, "Linear: slope"))

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return (_for(x, self._slope, self) * x).flatten(1).sum(1)

    def natural(self) -> tuple[Tensor, Tensor]:
        """(a, c) with r(x) = a . x - sum c x^2 / 2 + const."""
        return self._slope, torch.zeros_like(self._slope)

    def __str__(self) -> str:
        return f"Linear({_short(self.slope)})"


@final
@dataclass(frozen=True, eq=False)
class Quadratic(Reward):
    """r(x) = -sum_d curvature_d (x_d - center_d)^2 / 2; best at the centre, where it is 0.

    Against N(m, s^2) the tilt exp(r) has precision 1 / s^2 + curvature.

    Args:
        center: a number, or one per coordinate.
        curvature: a number, or one per coordinate; negative ones push away from the centre.
    """

    center: Numbers = 0.0
    curvature: Numbers = 1.0
    _center: Tensor = field(init=False, repr=False)
    _curvature: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_center", _numbers(self.center, "Quadratic: center"))
        object.__setattr__(self, "_curvature", _numbers(self.curvature, "Quadratic: curvature"))

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        offset = x - _for(x, self._center, self)
        return -0.5 * (_for(x, self._curvature, self) * offset**2).flatten(1).sum(1)

    def natural(self) -> tuple[Tensor, Tensor]:
        """(a, c) with r(x) = a . x - sum c x^2 / 2 + const."""
        return self._curvature * self._center, self._curvature

    def __str__(self) -> str:
        return f"Quadratic({_short(self.center)}, {_short(self.curvature)})"


@final
@dataclass(frozen=True, eq=False)
class Distance(Reward):
    """r(x) = scale |x - center|, Euclidean; with the default scale, nearer is better.

    Args:
        center: a number, or one per coordinate.
        scale: reward per unit of distance.
    """

    center: Numbers = 0.0
    scale: float = -1.0
    _center: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_center", _numbers(self.center, "Distance: center"))
        _numbers(self.scale, "Distance: scale")

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.scale * _length(x - _for(x, self._center, self))

    def __str__(self) -> str:
        return f"Distance({_short(self.center)})"


@final
@dataclass(frozen=True, eq=False)
class Norm(Reward):
    """r(x) = scale |x|, Euclidean; with the default scale, farther out is better.

    Args:
        scale: reward per unit of length.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _numbers(self.scale, "Norm: scale")

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.scale * _length(x)


def _for(x: Tensor, numbers: Tensor, owner: Reward) -> Tensor:
    """``numbers`` like ``x``: one for all coordinates, or one each."""
    if numbers.ndim and numbers.shape != x.shape[1:]:
        raise ShapeError(
            f"{owner} has {tuple(numbers.shape)} numbers, but states have shape "
            f"{tuple(x.shape[1:])}; give one number, or one per coordinate."
        )
    return numbers.to(x)


def _length(x: Tensor) -> Tensor:
    """|x| of each sample, (B,); its derivative at 0 is taken as 0."""
    length: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return length


def _short(value: Numbers) -> str:
    return str(value.tolist() if isinstance(value, Tensor) else value)
