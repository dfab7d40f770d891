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
from tiltflow.functional.certainty import Certainty, Shifted, bisected
from tiltflow.functional.shapes import LINE, Exponential, Hinges, Quadratic, Shape, SoftHinge

__all__ = [
    "LINE",
    "Certainty",
    "Combined",
    "Curvature",
    "Exponential",
    "Functional",
    "FutureDensity",
    "Hinges",
    "Promise",
    "Quadratic",
    "Shape",
    "Shifted",
    "SoftHinge",
    "bisected",
    "check",
    "check_priors",
    "error_of",
    "influence",
    "per_density",
    "spread",
]
