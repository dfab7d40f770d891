"""How good the worst and the best samples are: tail means (CVaR). Higher is better."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from tiltflow.errors import ConfigError
from tiltflow.metrics.reward import checked
from tiltflow.types import Estimate


def tails(values: Tensor, *, left: float = 0.1, right: float = 0.9) -> Mapping[str, Estimate]:
    """``left_cvar``: mean of the worst ``left``; ``right_cvar``: of the best ``1 - right``.

    Args:
        values: (N,), the reward of each sample, independent.
        left: level of the left tail, as in ``LeftCVaR(level=...)``.
        right: level of the right tail, as in ``RightCVaR(level=...)``.
    """
    return {"left_cvar": left_cvar(values, left), "right_cvar": right_cvar(values, right)}


def left_cvar(values: Tensor, level: float) -> Estimate:
    """Mean of the worst ``level`` of the rewards, with its standard error::

        m = level N,  k = floor(m):    (sum of the k lowest + (m - k) r_(k+1)) / m

    The boundary sample counts fractionally, so that the number does not jump with N (methods,
    section 1.12). The standard error is that of the influence function
    q - (q - r)_+ / level, q the quantile (Rockafellar and Uryasev, 2000): the estimator is its
    mean, and the error in q enters at second order only. It agrees with the bootstrap.
    """
    if not 0 < level <= 1:
        raise ConfigError(f"left_cvar: level={level} must be inside (0, 1].")
    ordered = checked(values).sort().values
    n = len(ordered)
    mass = level * n
    # Rounding of level * N must not move a whole sample: 0.1 * 30 is 3.0000000000000004.
    whole = min(math.floor(mass + 1e-9), n - 1)
    boundary = ordered[whole]
    total = float(ordered[:whole].sum() + (mass - whole) * boundary)
    shortfall = (boundary - ordered).clamp(min=0) / level
    error = float(shortfall.std()) / math.sqrt(n) if n > 1 else math.inf
    if level == 1:
        error = Estimate.of(ordered).standard_error
    return Estimate(total / mass, error, n)


def right_cvar(values: Tensor, level: float) -> Estimate:
    """Mean of the best ``1 - level`` of the rewards: ``left_cvar`` seen from above."""
    if not 0 <= level < 1:
        raise ConfigError(f"right_cvar: level={level} must be inside [0, 1).")
    mirrored = left_cvar(-checked(values), 1 - level)
    return Estimate(-mirrored.value, mirrored.standard_error, mirrored.count)
