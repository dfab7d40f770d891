"""Metrics: one function each, from numbers of samples to named estimates."""

from __future__ import annotations

from tiltflow.metrics.images import frechet, image_features, image_report, per_prompt, vendi
from tiltflow.metrics.molecules import molecule_report
from tiltflow.metrics.reward import reward
from tiltflow.metrics.shares import shares
from tiltflow.metrics.tails import bootstrap_interval, left_cvar, right_cvar, tails

__all__ = [
    "bootstrap_interval",
    "frechet",
    "image_features",
    "image_report",
    "left_cvar",
    "molecule_report",
    "per_prompt",
    "reward",
    "right_cvar",
    "shares",
    "tails",
    "vendi",
]
