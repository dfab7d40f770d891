"""Densities: things one can integrate against."""

from tiltflow.density.base import Bank, Density, Function, UnknownLog, require_log
from tiltflow.density.grid import GridPotential, Quadrature
from tiltflow.density.mixture import Mixture
from tiltflow.density.sampled import Empirical, FlowDensity, ModelScore, Reweighted

__all__ = [
    "Bank",
    "Density",
    "Empirical",
    "FlowDensity",
    "Function",
    "GridPotential",
    "Mixture",
    "ModelScore",
    "Quadrature",
    "Reweighted",
    "UnknownLog",
    "require_log",
]
