"""Closed forms of merged densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Bank, Quadrature
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.functional import bisected
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond, expand_as


@final
@dataclass(frozen=True, eq=False)
class Odds(Potential):
    """log of p / (p + c q) from two normalised log-densities.

    Args:
        own, other: log p and log q.
        log_scale: log c.
    """

    own: Potential
    other: Potential
    log_scale: float

    @property
    def offers(self) -> Access:
        offered = self.own.offers & self.other.offers
        return offered if Access.VALUE in offered else Access.NONE

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        ratio = self.other.value(x, cond) - self.own.value(x, cond)
        return -torch.nn.functional.softplus(self.log_scale + ratio)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        (a, score), (b, other) = (
            potential.value_and_grad(x, cond) for potential in (self.own, self.other)
        )
        share = (self.log_scale + b - a).sigmoid()
        return expand_as(share, x) * (score - other)


def union_weights(f: Tensor, mass: Tensor, total: float) -> Tensor:
    """dp* / dpbar = A / (nu - f) of a reward-guided union, (N,) float64::

        nu > sup f  with  E_pbar[A / (nu - f)] = 1;      then E_{p*} f = nu - A

    (methods, section 5.2), nu by bisection.

    Args:
        f: (N,), the reward at samples or nodes of pbar.
        mass: (N,), their weights.
        total: A.

    Raises:
        UnsupportedError: if f is worth so much that more than half of the optimum is an atom at
            its maximum, which is no density.
    """
    mass, below = mass.double() / mass.double().sum(), float(f.max()) - f.double()
    if not 0 < total < math.inf:
        raise ConfigError(f"union_weights: total={total!r} must be positive and finite.")
    gap = bisected(lambda g: float((mass * total / (g + below)).sum()) > 1, 0.0, total)
    weights = total / (gap + below)
    best = float((mass * weights)[below == 0].sum())
    if best > 0.5 and float(mass[below == 0].sum()) < 0.1:
        raise UnsupportedError(
            f"Union: the reward, which varies by {float(below.max()):.3g}, is worth more than "
            f"weights of {total:.3g} in all can hold: {best:.0%} of the optimum is an atom at the "
            "best state. Raise the weights, or clip the reward."
        )
    return weights


def guided_union(
    bank: Bank, reward: Potential, total: float, groups: Sequence[Tensor] | None = None
) -> Bank:
    """Samples of the mixture, weighted to be those of the reward-guided union.

    Args:
        bank: of the mixture.
        reward: f.
        total: A.
        groups: indices of samples that have a nu of their own, all by default.
    """
    f = reward.value(bank.points, bank.cond).double()
    weights = bank.weights.to(f.device, torch.float64, copy=True)
    for group in [torch.arange(len(f), device=f.device)] if groups is None else groups:
        each = weights[group]
        weights[group] = each * union_weights(f[group], each, total)
    return replace(bank, weights=weights / weights.sum())


def barycentre(priors: Sequence[Quadrature], shares: Sequence[float]) -> Quadrature:
    """The W_2 barycentre of densities on one line: quantiles are mean quantiles."""
    axis = priors[0].axes[0]
    step = float(axis[1] - axis[0])
    edges = torch.cat([axis - step / 2, axis[-1:] + step / 2])
    zero = edges.new_zeros(1)
    cumulated = [torch.cat([zero, p.probabilities.cumsum(0)]) for p in priors]
    levels = torch.unique(torch.cat(cumulated).clamp(0, 1))
    quantiles = sum(
        share * interpolated(levels, c, edges) for share, c in zip(shares, cumulated, strict=True)
    )
    mass = interpolated(edges, torch.as_tensor(quantiles), levels).diff()
    return Quadrature([axis], mass.clamp(min=1e-300).log() - math.log(step))


def interpolated(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """The piecewise linear function through (knots, values) at x; constant outside."""
    k = torch.searchsorted(knots, x.contiguous(), right=True).clamp(1, len(knots) - 1)
    left, right = knots[k - 1], knots[k]
    part = ((x - left) / (right - left).clamp(min=1e-300)).clamp(0, 1)
    return values[k - 1] + part * (values[k] - values[k - 1])
