"""Utilities: functionals of a density that are to be raised."""

from tiltflow.utilities.certainty_equivalent import CertaintyEquivalent
from tiltflow.utilities.cvar import LeftCVaR, RightCVaR
from tiltflow.utilities.design import OptimalDesign
from tiltflow.utilities.entropic_risk import EntropicRisk
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.expected_reward import ExpectedReward
from tiltflow.utilities.kernel_diversity import KernelDiversity
from tiltflow.utilities.log_barrier import LogBarrier
from tiltflow.utilities.mean_variance import MeanVariance
from tiltflow.utilities.moment_matching import MomentMatching
from tiltflow.utilities.mutual_information import MutualInformation
from tiltflow.utilities.spectral_risk import SpectralRisk

__all__ = [
    "CertaintyEquivalent",
    "EntropicRisk",
    "Entropy",
    "ExpectedReward",
    "KernelDiversity",
    "LeftCVaR",
    "LogBarrier",
    "MeanVariance",
    "MomentMatching",
    "MutualInformation",
    "OptimalDesign",
    "RightCVaR",
    "SpectralRisk",
]
