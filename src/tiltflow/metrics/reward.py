"""How good samples are: mean and quantiles of a reward. Higher is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.types import Estimate

LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def reward(values: Tensor, *, levels: Sequence[float] = LEVELS) -> Mapping[str, Estimate]:
    """Mean and quantiles of a reward over independent samples, with standard errors.

    Args:
        values: (N,), the reward of each sample.
        levels: levels of the quantiles, inside (0, 1).

    Returns:
        ``mean`` and ``q01``, ``q05``, ... (the level in per cent).
    """
    ordered = checked(values).sort().values
    if any(not 0 < level < 1 for level in levels):
        raise ConfigError(f"reward: levels={tuple(levels)} must be inside (0, 1).")
    quantiles = {f"q{100 * level:02.0f}": _quantile(ordered, level) for level in levels}
    return {"mean": Estimate.of(ordered), **quantiles}


def _quantile(ordered: Tensor, level: float) -> Estimate:
    """The smallest y with P(r <= y) >= level, and Woodruff's (1952) standard error::

        (r_(N p + s) - r_(N p - s)) / 2,    s = sqrt(N p (1 - p))

    i.e. the binomial error of the *rank*, read off as rewards; no density need be estimated.
    """
    n = len(ordered)
    rank = level * n
    spread = math.sqrt(n * level * (1 - level))

    def at(r: float) -> float:
        return float(ordered[min(max(math.ceil(r - 1e-9) - 1, 0), n - 1)])

    return Estimate(at(rank), (at(rank + spread) - at(rank - spread)) / 2, n)


def checked(values: Tensor) -> Tensor:
    """``values`` (N,) in float64, finite and not empty."""
    v = torch.as_tensor(values).detach().double().cpu()
    if v.ndim != 1 or v.numel() == 0:
        raise ShapeError(f"A metric needs one number per sample, (N,) with N > 0, got {v.shape}.")
    if not bool(torch.isfinite(v).all()):
        raise ShapeError("A metric needs finite rewards; some are NaN or infinite.")
    return v
