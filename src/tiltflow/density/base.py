"""What a density is: weighted points, and a log known up to a constant."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, ShapeError
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond, Estimate


@final
@dataclass(frozen=True)
class Bank:
    """Weighted points: points (N, *event), weights (N,) that sum to one, conditions.

    ``exact`` marks quadrature nodes, whose sums have no sampling error.
    """

    points: Tensor
    weights: Tensor
    cond: Cond | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.weights.shape != self.points.shape[:1]:
            raise ShapeError(
                f"Bank: {self.points.shape[0]} points, but weights of shape "
                f"{tuple(self.weights.shape)}."
            )

    @staticmethod
    def equal(points: Tensor, cond: Cond | None = None) -> Bank:
        """Equal weights."""
        n = points.shape[0]
        return Bank(points, points.new_full((n,), 1 / n, dtype=torch.float64), cond)

    @property
    def effective_size(self) -> float:
        """Kish's effective sample size 1 / sum w^2."""
        return float(1 / (self.weights.double() ** 2).sum())


Function = Callable[[Tensor, Cond | None], Tensor]


class Density(abc.ABC):
    """A probability law that functionals integrate against.

    The estimator lives here, not in the functional: ``expect`` is Monte Carlo for samples and
    quadrature for a grid, so a functional is written once and is as exact as its density.
    """

    @property
    @abc.abstractmethod
    def bank(self) -> Bank:
        """Weighted points that represent the law."""

    @property
    @abc.abstractmethod
    def log(self) -> Potential:
        """log p, up to a constant: VALUE is the log-density, GRAD the score."""

    @property
    def event(self) -> tuple[int, ...] | None:
        """Shape of one sample, where it is known without drawing any."""
        return None

    def with_log(self, log: Potential) -> Density:
        """The same law, knowing more of its log-density; itself where ``log`` is exact already."""
        return self

    def at_least(self, num_samples: int) -> Density:
        """The same law with a bank of at least this size, where it can be drawn."""
        return self

    @final
    def expect(self, f: Function) -> Tensor:
        """E_p[f], a scalar tensor in float64."""
        bank = self.bank
        return (bank.weights.double() * f(bank.points, bank.cond).double()).sum()

    @final
    def estimate(self, f: Function) -> Estimate:
        """E_p[f] with its standard error (zero for quadrature)."""
        bank = self.bank
        if bank.exact:
            return Estimate(float(self.expect(f)))
        return Estimate.of(f(bank.points, bank.cond), bank.weights)

    @final
    def quantile(self, f: Function, level: float) -> Tensor:
        """The smallest y with P(f <= y) >= level, a scalar tensor in float64."""
        bank = self.bank
        values, order = f(bank.points, bank.cond).double().sort()
        mass = bank.weights.double()[order].cumsum(0)
        # The last partial sum can fall short of one by rounding.
        index = int(torch.searchsorted(mass, level * float(mass[-1]) * (1 - 1e-12)))
        return values[min(index, len(values) - 1)]


@final
@dataclass(frozen=True, eq=False)
class UnknownLog(Potential):
    """The log-density of a law known by samples only: offers nothing."""

    owner: str

    @property
    def offers(self) -> Access:
        return Access.NONE

    def __str__(self) -> str:
        return f"log {self.owner}"


def require_log(density: Density, needs: Access, user: str) -> None:
    """Raise ``CapabilityError`` unless ``density.log`` offers ``needs``; names the remedy."""
    missing = needs & ~density.log.offers
    if missing:
        raise CapabilityError(
            f"{user} needs {needs} of log p, but {type(density).__name__} offers "
            f"{density.log.offers} of it. Use a density with a log-density (an analytic one, a "
            "Quadrature, or a FlowDensity of the model itself)."
        )
