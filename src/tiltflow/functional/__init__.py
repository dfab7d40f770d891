"""Functionals of a density, and their algebra: ``objective = utility - weight * divergence``."""

from tiltflow.functional.abilities import FutureDensity, Promise, check, check_priors
from tiltflow.functional.base import (
    Combined,
    Curvature,
    Functional,
    error_of,
    influence,
    per_density,
    spread,
)

__all__ = [
    "Combined",
    "Curvature",
    "Functional",
    "FutureDensity",
    "Promise",
    "check",
    "check_priors",
    "error_of",
    "influence",
    "per_density",
    "spread",
]
