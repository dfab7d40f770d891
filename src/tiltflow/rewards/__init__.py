"""Rewards: differentiable or black-box functions of a state."""

from tiltflow.rewards.clip import Aesthetic, ClipScore, aesthetic, clip_score
from tiltflow.rewards.fields import NoveltyField, RiskField
from tiltflow.rewards.images import Readability
from tiltflow.rewards.mnist import MnistDigit
from tiltflow.rewards.molecules import DrugScore, Valency
from tiltflow.rewards.pixels import JpegSize
from tiltflow.rewards.points import Distance, Linear, Norm, Quadratic
from tiltflow.rewards.standardised import Standardised
from tiltflow.rewards.validity import ValidityGap
from tiltflow.rewards.xtb import XTBEnergy, XTBProperty

__all__ = [
    "Aesthetic",
    "ClipScore",
    "Distance",
    "DrugScore",
    "JpegSize",
    "Linear",
    "MnistDigit",
    "Norm",
    "NoveltyField",
    "Quadratic",
    "Readability",
    "RiskField",
    "Standardised",
    "Valency",
    "ValidityGap",
    "XTBEnergy",
    "XTBProperty",
    "aesthetic",
    "clip_score",
]
