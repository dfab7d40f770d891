"""Outer loops: from an objective to a model."""

from tiltflow.algorithms.averaging import averaged
from tiltflow.algorithms.bank_plan import Planned, Planning, plan
from tiltflow.algorithms.evidence import Evidence, gate_evidence
from tiltflow.algorithms.feynman_kac import FeynmanKac
from tiltflow.algorithms.lowerings import Descent, Keeper, Lowered, Merging
from tiltflow.algorithms.merging import Merged, merge
from tiltflow.algorithms.mirror_descent import Iterate, mirror_descent
from tiltflow.algorithms.modes import discover_modes
from tiltflow.algorithms.planning import plan_and_tune
from tiltflow.algorithms.rates import Attempt, Fixed, LineSearch, PathKLBound, RateRule
from tiltflow.algorithms.superposition import Superposition
from tiltflow.algorithms.tail_aware import tail_aware
from tiltflow.algorithms.thresholds import Thresholds, optimal_thresholds, smallest_weight
from tiltflow.algorithms.training_free import Averaging, TrainingFree

__all__ = [
    "Attempt",
    "Averaging",
    "Descent",
    "Evidence",
    "FeynmanKac",
    "Fixed",
    "Iterate",
    "Keeper",
    "LineSearch",
    "Lowered",
    "Merged",
    "Merging",
    "PathKLBound",
    "Planned",
    "Planning",
    "RateRule",
    "Superposition",
    "Thresholds",
    "TrainingFree",
    "averaged",
    "discover_modes",
    "gate_evidence",
    "merge",
    "mirror_descent",
    "optimal_thresholds",
    "plan",
    "plan_and_tune",
    "smallest_weight",
    "tail_aware",
]
