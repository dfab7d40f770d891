"""Rewards: differentiable or black-box functions of a state."""

from tiltflow.rewards.images import Readability
from tiltflow.rewards.points import Distance, Linear, Norm, Quadratic

__all__ = ["Distance", "Linear", "Norm", "Quadratic", "Readability"]
