"""Metrics: one function each, from numbers of samples to named estimates."""

from __future__ import annotations

from tiltflow.metrics.molecules import molecule_report
from tiltflow.metrics.reward import reward
from tiltflow.metrics.shares import shares
from tiltflow.metrics.tails import bootstrap_interval, left_cvar, right_cvar, tails

__all__ = [
    "bootstrap_interval",
    "left_cvar",
    "molecule_report",
    "reward",
    "right_cvar",
    "shares",
    "tails",
]
