"""Divergences: functionals that measure how far a density is from a prior."""

from tiltflow.divergences.kl import KL

__all__ = ["KL"]
