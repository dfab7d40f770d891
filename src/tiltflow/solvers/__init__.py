"""Solvers of control problems: trained ones and closed forms."""

from tiltflow.solvers.adjoint_matching import AdjointMatching
from tiltflow.solvers.exact import GaussianSolver, GridSolver

__all__ = ["AdjointMatching", "GaussianSolver", "GridSolver"]
