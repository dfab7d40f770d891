"""Kullback-Leibler divergence of the prior from the density: the one that covers."""

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
class ForwardKL(OfRatio):
    """D[p] = KL(prior || p) = -E_prior T with T = log p / prior: convex in p::

        delta D = -exp(-T)          grad delta D = exp(-T) grad T

    Infinite where p misses mass of the prior: it spreads p over all of the prior, and merging
    models by it gives their mixture (methods, section 5.2). The weight exp(-T) = prior / p is
    unbounded: start from a density that covers the prior, and take small steps.

    The value is averaged over the prior's bank alone: on the other one the integrand is
    -T exp(-T), whose square need not have a mean. Where T is tracked up to a constant, it is the
    divergence of the law that log p stands for, of which no sample is needed.

    Args:
        prior: the density to cover.
        ratio: how T is known.
    """

    prior: Density
    ratio: RatioEstimator = field(default_factory=ExactRatio)

    @property
    def curvature(self) -> Curvature:
        return "convex"

    def _sides(self, p: Density) -> tuple[Shape | None, Shape | None]:
        return None, lambda t: (-t, -torch.ones_like(t))

    def _variation(self, p: Density) -> Shape:
        return lambda t: (-(-t).exp(), (-t).exp())
