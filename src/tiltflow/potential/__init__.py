"""Potentials: functions of a state that something is to be raised by, known up to a constant."""

from tiltflow.potential.base import ZERO, Combination, Potential, combine, remembering
from tiltflow.potential.of_reward import Hinge, OfReward, Shaped, offers_through_values
from tiltflow.potential.rewards import BlackBox, Decoded, Differentiable, Reward
from tiltflow.potential.running import Rate, StepReward

__all__ = [
    "ZERO",
    "BlackBox",
    "Combination",
    "Decoded",
    "Differentiable",
    "Hinge",
    "OfReward",
    "Potential",
    "Rate",
    "Reward",
    "Shaped",
    "StepReward",
    "combine",
    "offers_through_values",
    "remembering",
]
