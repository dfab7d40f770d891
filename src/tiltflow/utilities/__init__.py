"""Utilities: functionals of a density that are to be raised."""

from tiltflow.utilities.cvar import LeftCVaR, RightCVaR
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.expected_reward import ExpectedReward

__all__ = ["Entropy", "ExpectedReward", "LeftCVaR", "RightCVaR"]
