"""Divergences: functionals that measure how far a density is from a prior."""

from tiltflow.divergences.chi_square import ChiSquare
from tiltflow.divergences.forward_kl import ForwardKL
from tiltflow.divergences.hellinger import Hellinger
from tiltflow.divergences.jensen_shannon import JensenShannon
from tiltflow.divergences.kl import KL
from tiltflow.divergences.mmd import MMD, EnergyDistance
from tiltflow.divergences.renyi import Renyi
from tiltflow.divergences.wasserstein import Wasserstein

__all__ = [
    "KL",
    "MMD",
    "ChiSquare",
    "EnergyDistance",
    "ForwardKL",
    "Hellinger",
    "JensenShannon",
    "Renyi",
    "Wasserstein",
]
