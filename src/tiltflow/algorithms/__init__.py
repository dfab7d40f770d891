"""Outer loops: from an objective to a model."""

from tiltflow.algorithms.mirror_descent import Iterate, mirror_descent
from tiltflow.algorithms.rates import Fixed, PathKLBound, RateRule

__all__ = ["Fixed", "Iterate", "PathKLBound", "RateRule", "mirror_descent"]
