"""Rewards: differentiable or black-box functions of a state."""

from tiltflow.rewards.fields import NoveltyField, RiskField
from tiltflow.rewards.images import Readability
from tiltflow.rewards.points import Distance, Linear, Norm, Quadratic

__all__ = [
    "Distance",
    "Linear",
    "Norm",
    "NoveltyField",
    "Quadratic",
    "Readability",
    "RiskField",
]
