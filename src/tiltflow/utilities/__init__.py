"""Utilities: functionals of a density that are to be raised."""

from tiltflow.utilities.cvar import LeftCVaR, RightCVaR
from tiltflow.utilities.entropic_risk import EntropicRisk
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.expected_reward import ExpectedReward
from tiltflow.utilities.mean_variance import MeanVariance

__all__ = ["EntropicRisk", "Entropy", "ExpectedReward", "LeftCVaR", "MeanVariance", "RightCVaR"]
