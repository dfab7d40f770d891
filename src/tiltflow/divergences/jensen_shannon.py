"""Jensen-Shannon divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

from torch.nn.functional import softplus

from tiltflow.density import Density
from tiltflow.divergences.of_ratio import OfRatio, Shape
from tiltflow.functional import Curvature
from tiltflow.ratio import ExactRatio, RatioEstimator


@final
@dataclass(frozen=True, eq=False)
class JensenShannon(OfRatio):
    """D[p] = (KL(p || m) + KL(prior || m)) / 2 with m = (p + prior) / 2, T = log p / prior::

        delta D = log(p / m) / 2 = (log 2 - log(1 + exp(-T))) / 2
        grad delta D = sigmoid(-T) grad T / 2

    Convex in p, symmetric, between 0 and log 2. Nothing in it is unbounded, neither the integrands
    nor the weights of the gradient: the choice where densities hardly overlap, with the price that
    it hardly feels anything any more there.

    Both banks are averaged over, each with its own bounded integrand.

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
            lambda t: (0.5 * (math.log(2) - softplus(-t)), 0.5 * (-t).sigmoid()),
            lambda t: (0.5 * (math.log(2) - softplus(t)), -0.5 * t.sigmoid()),
        )

    def _variation(self, p: Density) -> Shape:
        return lambda t: (0.5 * (math.log(2) - softplus(-t)), 0.5 * (-t).sigmoid())
