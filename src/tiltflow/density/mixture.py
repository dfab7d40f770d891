"""Mixtures of densities."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density.base import Bank, Density
from tiltflow.errors import ConfigError
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond


@final
class Mixture(Density):
    """sum_i w_i p_i of other densities.

    Args:
        parts: the densities.
        weights: positive numbers, normalised here.
    """

    def __init__(self, parts: Sequence[Density], weights: Sequence[float] | None = None) -> None:
        n = len(parts)
        w = torch.ones(n) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if not parts or w.shape != (len(parts),) or not bool((w > 0).all()):
            raise ConfigError("Mixture: needs one positive weight per part.")
        self.parts, self.weights = tuple(parts), w.double() / w.double().sum()
        self._log = _MixtureLog(tuple(p.log for p in parts), self.weights.log())

    @functools.cached_property
    def bank(self) -> Bank:
        banks = [p.bank for p in self.parts]
        points = torch.cat([b.points for b in banks])
        weights = torch.cat([w * b.weights for w, b in zip(self.weights, banks, strict=True)])
        if any(b.cond is not None for b in banks):
            raise ConfigError("Mixture: conditional densities cannot be mixed.")
        return Bank(points, weights, None, all(b.exact for b in banks))

    @property
    def log(self) -> Potential:
        return self._log


@final
@dataclass(frozen=True, eq=False)
class _MixtureLog(Potential):
    """log sum_i w_i p_i, from normalised log-densities of the parts."""

    parts: tuple[Potential, ...]
    log_weights: Tensor

    @property
    def offers(self) -> Access:
        offered = Access.BOTH
        for part in self.parts:
            offered &= part.offers
        # The score of a mixture needs the responsibilities, i.e. the values.
        return offered if Access.VALUE in offered else Access.NONE

    def _logits(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.log_weights.to(x) + torch.stack([p.value(x, cond) for p in self.parts], 1)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return torch.logsumexp(self._logits(x, cond), 1)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        responsibility = torch.softmax(self._logits(x, cond), 1)
        total = torch.zeros_like(x)
        for i, part in enumerate(self.parts):
            r = responsibility[:, i].reshape((-1,) + (1,) * (x.ndim - 1))
            total = total + r * part.grad(x, cond)
        return total
