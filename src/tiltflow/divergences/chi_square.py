"""Pearson's chi-square divergence."""

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
class ChiSquare(OfRatio):
    """D[p] = E_p exp(T) - 1 = int p^2 / prior - 1 with T = log p / prior: convex in p::

        delta D = 2 exp(T)          grad delta D = 2 exp(T) grad T

    Punishes p where the prior is thin more than KL does, exponentially in T; it is the variance of
    importance weights from the prior to p. Infinite already for moderate tails: between Gaussians,
    where the variance of p is twice that of the prior.

    The value is averaged over the bank of p. Over the prior's it would be E exp(2 T) - 1, whose
    second moment E_prior exp(4 T) is greater than E_p exp(2 T) = E_prior exp(3 T).

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
        return lambda t: (torch.expm1(t), t.exp()), None

    def _variation(self, p: Density) -> Shape:
        return lambda t: (2 * t.exp(), 2 * t.exp())
