"""Solvers of control problems: trained ones and closed forms."""

from tiltflow.solvers.adjoint_matching import AdjointMatching
from tiltflow.solvers.bank import BankSolver
from tiltflow.solvers.direct import DirectBackprop
from tiltflow.solvers.exact import GaussianSolver, GridSolver
from tiltflow.solvers.weighted_matching import WeightedMatching

__all__ = [
    "AdjointMatching",
    "BankSolver",
    "DirectBackprop",
    "GaussianSolver",
    "GridSolver",
    "WeightedMatching",
]
