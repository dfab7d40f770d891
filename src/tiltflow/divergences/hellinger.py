"""Squared Hellinger distance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch

from tiltflow.density import Density
from tiltflow.divergences.of_ratio import OfRatio, Shape
from tiltflow.functional import Curvature
from tiltflow.ratio import ExactRatio, RatioEstimator


@final
@dataclass(frozen=True, eq=False)
class Hellinger(OfRatio):
    """D[p] = 1 - int sqrt(p prior), between 0 and 1: convex in p. With T = log p / prior::

        delta D = -exp(-T / 2) / 2          grad delta D = exp(-T / 2) grad T / 4

    The square of Hellinger's distance with the factor 1/2. Symmetric and bounded; it hardly feels
    anything any more once p and prior are apart.

    The value is 1 - (E_p exp(-T / 2) + E_prior exp(T / 2)) / 2: both means are the integral, both
    integrands have the second moment 1 whatever the densities, and the two banks average out.

    Args:
        prior: the density to stay close to.
        ratio: how T is known.
    """

    prior: Density
    ratio: RatioEstimator = field(default_factory=ExactRatio)

    @property
    def curvature(self) -> Curvature:
        return "convex"

    def _sides(self, p: Density) -> tuple[Shape | None, Shape | None]:
        return (
            lambda t: (-0.5 * torch.expm1(-t / 2), 0.25 * (-t / 2).exp()),
            lambda t: (-0.5 * torch.expm1(t / 2), -0.25 * (t / 2).exp()),
        )

    def _variation(self, p: Density) -> Shape:
        return lambda t: (-0.5 * (-t / 2).exp(), 0.25 * (-t / 2).exp())
