"""How well one can tell from a sample which of several models made it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import CapabilityError, ConfigError
from tiltflow.functional import Curvature, Functional, FutureDensity, Promise, error_of, influence
from tiltflow.potential import Potential
from tiltflow.ratio import ExactRatio, RatioEstimator
from tiltflow.types import Access, Cond, Estimate, expand_as


@final
@dataclass(frozen=True, eq=False)
class MutualInformation(Functional):
    """I(X; Z) of a component index Z and its sample X, as a functional of one component::

        I = sum_k w_k KL(p_k || m),   m = sum_k w_k p_k      delta I / delta p = w log(p / m)

    with p the component that moves and the others held where they are. Raising it makes several
    models specialise (diverse mode discovery; methods, sections 3.3 and 3.5: the sign is +).
    ``algorithms.discover_modes`` moves all components in turn. I is at most log(components); it is
    convex in p, so that mirror descent finds a local optimum, and where all components are equal
    its first variation is zero: they must start apart.

    Args:
        others: the densities of the other components.
        weights: of p, then of the others; positive, normalised here; equal by default.
        ratio: how the log-ratios of the components are known.
        reference: a density that all components are tilts of. Their ratios are then differences
            of those to it, whose normalisers its samples know even where components have
            separated and have no samples in common.
    """

    others: Sequence[Density]
    weights: Sequence[float] | None = None
    ratio: RatioEstimator = field(default_factory=ExactRatio)
    reference: Density | None = None

    def __post_init__(self) -> None:
        count = len(self.others) + 1
        weights = [1.0] * count if self.weights is None else [float(w) for w in self.weights]
        if count < 2:
            raise ConfigError("MutualInformation: needs at least one other component.")
        if len(weights) != count or not all(w > 0 and math.isfinite(w) for w in weights):
            raise ConfigError(
                f"MutualInformation: weights={self.weights!r} must be {count} positive numbers, "
                "of the component itself and then of the others."
            )
        total = sum(weights)
        object.__setattr__(self, "others", tuple(self.others))
        object.__setattr__(self, "weights", tuple(w / total for w in weights))

    @property
    def curvature(self) -> Curvature:
        return "convex"

    @property
    def priors(self) -> tuple[Density, ...]:
        return (*self.others, *(() if self.reference is None else (self.reference,)))

    def offers(self, log: Access) -> Access:
        return self.offers_at(FutureDensity(Promise(log)))

    def offers_at(self, p: Density) -> Access:
        offered = Access.BOTH
        base = p if self.reference is None else self.reference
        for part in self.others if base is p else (p, *self.others):
            offered &= self.ratio.offers(part, base)
        # Shares need values, for the gradient too.
        return offered if Access.VALUE in offered else Access.NONE

    def first_variation(self, p: Density) -> Potential:
        weights = self._weights
        return weights[0] * self._log_share(p, (p, *self.others), weights)

    def value(self, p: Density) -> Estimate:
        """I, from the banks of all components; their errors are added in squares. Those of the
        normalisers of estimated ratios are not counted."""
        if Access.VALUE not in self.offers_at(p):
            raise CapabilityError(
                f"MutualInformation needs values of the log-ratios of its components, but log p "
                f"of {type(p).__name__} offers {p.log.offers}. Use densities with a known "
                "log-probability, or ratio=LogisticRatio(), which learns it from samples."
            )
        parts = (p, *self.others)
        total = variance = 0.0
        for k, part in enumerate(parts):
            rest = [i for i in range(len(parts)) if i != k]
            order = [parts[i] for i in (k, *rest)]
            weights = [self._weights[i] for i in (k, *rest)]
            share = self._log_share(part, order, weights)
            values = influence(share, part)
            bank = part.bank.weights.double().to(values.device)
            total += weights[0] * float((bank * values).sum())
            variance += (weights[0] * error_of(values, part)) ** 2
        count = 0 if p.bank.exact else len(p.bank.weights)
        return Estimate(total, math.sqrt(variance), count)

    @property
    def _weights(self) -> tuple[float, ...]:
        return tuple(self.weights or ())

    def _log_share(
        self, p: Density, parts: Sequence[Density], weights: Sequence[float]
    ) -> Potential:
        """log p / m; the first of the parts is p."""
        if self.reference is None:
            ratios: list[Potential] = [self.ratio.log_ratio(other, p) for other in parts[1:]]
        else:
            own, *rest = (self.ratio.log_ratio(part, self.reference) for part in parts)
            ratios = [other - own for other in rest]
        return LogShare(tuple(ratios), torch.tensor(weights, dtype=torch.float64).log())

    def __str__(self) -> str:
        return f"MutualInformation({len(self.others) + 1} components)"


@final
@dataclass(frozen=True, eq=False)
class LogShare(Potential):
    """log p / sum_k w_k p_k = -log(w_0 + sum_k w_k exp(T_k)), with T_k = log p_k / p.

    Args:
        ratios: T_k of the other components.
        log_weights: of p, then of the others.
    """

    ratios: tuple[Potential, ...]
    log_weights: Tensor

    @property
    def offers(self) -> Access:
        offered = Access.BOTH
        for ratio in self.ratios:
            offered &= ratio.offers
        return offered if Access.VALUE in offered else Access.NONE

    def _logits(self, values: Sequence[Tensor]) -> Tensor:
        own = torch.zeros_like(values[0])
        return self.log_weights.to(own) + torch.stack([own, *values], 1)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return -torch.logsumexp(self._logits([r.value(x, cond) for r in self.ratios]), 1)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[1]

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        both = [ratio.value_and_grad(x, cond) for ratio in self.ratios]
        logits = self._logits([value for value, _ in both])
        shares = torch.softmax(logits, 1)[:, 1:]
        total = torch.zeros_like(x)
        for share, (_, grad) in zip(shares.unbind(1), both, strict=True):
            total = total - expand_as(share, x) * grad
        return -torch.logsumexp(logits, 1), total
