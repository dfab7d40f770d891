"""Prescribed means of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.functional import Curvature, Functional, per_density
from tiltflow.potential import Reward
from tiltflow.types import Access, Cond, Estimate


@final
@dataclass(frozen=True, eq=False)
class LinearForm(Reward):
    """x -> coefficients . Phi(x), computed in float64.

    Args:
        features: Phi, (B, *event) -> (B, m).
        coefficients: (m,).
    """

    features: Features
    coefficients: Tensor

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        phi = self.features.value(x, cond).double()
        return (phi @ self.coefficients.to(phi)).to(x.dtype)

    def __str__(self) -> str:
        return f"LinearForm({self.features})"


@final
@dataclass(frozen=True, eq=False)
class MomentMatching(Functional):
    """F[p] = -|E_p Phi - m|^2 / 2, with first variation -(E_p Phi - m) . Phi: concave in p.

    Zero where the means of the features are the targets m, negative elsewhere (methods, section
    3.3). Offers a value and a gradient, whatever log p offers.

    Args:
        features: Phi; scale them so that an error of one matters equally in each.
        target: m, one number per feature.
    """

    features: Features
    target: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        try:
            target = torch.as_tensor(self.target, dtype=torch.float64)
        except (TypeError, ValueError):
            target = torch.tensor(math.nan)
        if target.ndim != 1 or not len(target) or not bool(torch.isfinite(target).all()):
            raise ConfigError(
                f"MomentMatching: target={self.target!r} must be a list of finite numbers, one "
                "per feature."
            )

    @property
    def curvature(self) -> Curvature:
        return "concave"

    def offers(self, log: Access) -> Access:
        return Access.BOTH

    def value(self, p: Density) -> Estimate:
        """Without the bias of the plug-in value; the error holds at the target too.

        With C the covariance of the estimated mean, the squared gap is too long by tr C, and a
        Gaussian's has the variance 4 gap^T C gap + 2 tr C^2, where gap^T C gap is itself estimated
        too high by tr C^2.
        """
        gap, covariance = self._gap(p)
        square = float(gap @ gap - covariance.trace())
        noise = float((covariance**2).sum())
        variance = max(float(gap @ covariance @ gap) - noise, 0.0) + noise / 2
        count = 0 if p.bank.exact else len(p.bank.points)
        return Estimate(-square / 2, math.sqrt(variance), count)

    def first_variation(self, p: Density) -> LinearForm:
        return LinearForm(self.features, -self._gap(p)[0])

    @per_density
    def _gap(self, p: Density) -> tuple[Tensor, Tensor]:
        """E_p Phi - m, (m,), and the covariance matrix of its estimate, (m, m)."""
        bank = p.bank
        with torch.no_grad():
            phi = self.features.value(bank.points, bank.cond).double()
        target = torch.as_tensor(self.target, dtype=torch.float64, device=phi.device)
        if len(target) != phi.shape[1]:
            raise ConfigError(
                f"MomentMatching: {self.features} has {phi.shape[1]} features, but target has "
                f"{len(target)} entries; give one per feature."
            )
        weights = bank.weights.to(phi)
        mean = weights @ phi
        spread = torch.zeros_like(phi) if bank.exact else weights[:, None] * (phi - mean)
        return mean - target, spread.T @ spread

    def __str__(self) -> str:
        return f"MomentMatching({self.features})"
