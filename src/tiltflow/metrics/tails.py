"""How good the worst and the best samples are: tail means (CVaR). Higher is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.metrics.reward import checked
from tiltflow.seed import Seed
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


AT_ONCE = 2**18
"""Numbers that the bootstrap holds at a time."""


def bootstrap_interval(
    values: Tensor,
    level: float,
    side: Literal["left", "right"],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: Seed,
) -> tuple[float, float]:
    """Percentile interval of a tail mean (Efron, 1979), with the same fractional boundary.

    A resample gives every sample a multinomial count; with the rewards in order and C_i the sum of
    the first i counts, its tail mean is sum_i (min(C_i, m) - min(C_(i-1), m)) r_(i) / m, m the
    mass ``level`` N. The interval lies between the quantiles (1 - c) / 2 and (1 + c) / 2 of the
    resampled means: it may be longer on one side, as the law of a tail mean is.

    Args:
        values: (N,), the reward of each sample, independent; N > 1.
        level: as in ``left_cvar`` or ``right_cvar``.
        side: ``"left"``, the worst ``level``, or ``"right"``, the best ``1 - level``.
        confidence: c, probability that the interval covers the law's tail mean, for large N.
        resamples: how many.
        seed: of the resamples.

    Returns:
        the lower and the upper end.
    """
    part = level if side == "left" else 1 - level
    if not (0 < part <= 1 and 0 < confidence < 1 and resamples > 0):
        raise ConfigError(
            f"bootstrap_interval: level={level} must be inside (0, 1] on the left and [0, 1) on "
            f"the right, confidence={confidence} inside (0, 1), resamples={resamples} positive."
        )
    sign = 1 if side == "left" else -1
    ordered = (sign * checked(values)).sort().values
    if len(ordered) < 2:
        raise ShapeError("bootstrap_interval: one sample has no scatter; at least 2 are needed.")
    means = sign * _resampled(ordered, part * len(ordered), resamples, seed.generator())
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=means.dtype)
    low, high = torch.quantile(means, ends).tolist()
    return low, high


def _resampled(ordered: Tensor, mass: float, resamples: int, generator: torch.Generator) -> Tensor:
    """The mean of the lowest ``mass`` of each resample, by Abel's summation."""
    n, gaps, out = len(ordered), ordered.diff(), []
    rows = max(1, AT_ONCE // n)
    for first in range(0, resamples, rows):
        index = torch.randint(n, (min(rows, resamples - first), n), generator=generator)
        counts = torch.zeros(index.shape, dtype=torch.float64)
        counts.scatter_add_(1, index, counts.new_ones(()).expand_as(counts))
        below = counts.cumsum(1).clamp_(max=mass)[:, :-1]
        out.append(ordered[-1] - below @ gaps / mass)
    return torch.cat(out)
