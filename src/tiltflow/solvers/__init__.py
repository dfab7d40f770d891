"""Solvers of control problems: trained ones and closed forms."""

from tiltflow.solvers.adjoint_matching import AdjointMatching
from tiltflow.solvers.bank import BankSolver
from tiltflow.solvers.exact import GaussianSolver, GridSolver

__all__ = ["AdjointMatching", "BankSolver", "GaussianSolver", "GridSolver"]
