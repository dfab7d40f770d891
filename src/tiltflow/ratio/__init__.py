"""Density ratios and potentials, once, for all that need them."""

from tiltflow.ratio.estimator import ExactRatio, LogRatio, RatioEstimator
from tiltflow.ratio.likelihood import Likelihood, PathRatio
from tiltflow.ratio.logistic import LogisticRatio
from tiltflow.ratio.paths import path_log_density
from tiltflow.ratio.wasserstein import WassersteinCritic

__all__ = [
    "ExactRatio",
    "Likelihood",
    "LogRatio",
    "LogisticRatio",
    "PathRatio",
    "RatioEstimator",
    "WassersteinCritic",
    "path_log_density",
]
