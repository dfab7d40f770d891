"""How large the steps of an outer loop are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from tiltflow.errors import ConfigError, UnsupportedError

Predict = Callable[[float], float]
"""rate -> KL(exact tilt at that rate || current density), increasing in the rate."""


class RateRule(Protocol):
    """Chooses the rate of each step, and may refuse a step that went too far."""

    @property
    def length(self) -> int | None:
        """Number of iterations the rule has rates for; ``None`` for any number."""
        ...

    def propose(self, number: int, previous: float | None, predict: Predict | None) -> float:
        """The rate to try.

        Args:
            number: the iteration, from 0.
            previous: the accepted rate of the previous iteration.
            predict: the KL an exact solver would move; ``None`` where the first variation has no
                values.
        """
        ...

    def retry(self, rate: float, kl: float, attempt: int) -> float | None:
        """``None`` to accept a step of this measured KL, or the smaller rate to solve again with;
        ``attempt`` counts from 0."""
        ...


@final
@dataclass(frozen=True)
class Fixed:
    """Rates that are known beforehand; they need no measurement.

    Args:
        rates: one per iteration, or one number for all iterations.
    """

    rates: float | Sequence[float]

    def __post_init__(self) -> None:
        if not isinstance(self.rates, (int, float)):
            object.__setattr__(self, "rates", tuple(float(r) for r in self.rates))
        for rate in self.rates if isinstance(self.rates, tuple) else (self.rates,):
            _positive(rate, "Fixed: rates")
        if self.rates == ():
            raise ConfigError("Fixed: rates is empty; give one rate per iteration.")

    @property
    def length(self) -> int | None:
        return None if isinstance(self.rates, (int, float)) else len(self.rates)

    def propose(self, number: int, previous: float | None, predict: Predict | None) -> float:
        rates = self.rates
        return float(rates) if isinstance(rates, (int, float)) else rates[number]

    def retry(self, rate: float, kl: float, attempt: int) -> float | None:
        return None


@final
@dataclass(frozen=True, kw_only=True)
class PathKLBound:
    """The largest rate whose step stays under a KL: a trust region in nats.

    Before the step, the KL of the *exact* tilt is predicted on the bank of the current density
    where the first variation has values, and the rate found by bisection. After the step, its
    measured KL decides: above the bound, the step is solved again with
    ``rate * sqrt(0.8 bound / kl)``, because the KL of a small tilt grows like the rate squared.

    Args:
        bound: largest KL of a step, in nats.
        initial: rate of the first step, where nothing smaller is predicted.
        max_rate: no rate is larger; for F - weight * KL(pretrained), 1 / weight is one exact step.
        growth: a rate is at most this multiple of the previous one.
        max_retries: how often a step is solved again before giving up.
    """

    bound: float
    initial: float
    max_rate: float
    growth: float = 2.0
    max_retries: int = 10

    def __post_init__(self) -> None:
        for name in ("bound", "initial", "max_rate"):
            _positive(getattr(self, name), f"PathKLBound: {name}")
        if self.growth < 1 or self.max_retries < 1 or self.initial > self.max_rate:
            raise ConfigError(
                "PathKLBound: need growth >= 1, max_retries >= 1 and initial <= max_rate, got "
                f"{self.growth}, {self.max_retries} and {self.initial} > {self.max_rate}."
            )

    @property
    def length(self) -> int | None:
        return None

    def propose(self, number: int, previous: float | None, predict: Predict | None) -> float:
        cap = self.initial if previous is None else min(self.growth * previous, self.max_rate)
        if predict is None or predict(cap) <= self.bound:
            return cap
        low, high = 0.0, cap
        for _ in range(60):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if predict(middle) <= self.bound else (low, middle)
        return low

    def retry(self, rate: float, kl: float, attempt: int) -> float | None:
        # A predicted rate meets the bound with equality; rounding must not cost a second solve.
        if kl <= self.bound * (1 + 1e-9):
            return None
        if not math.isfinite(kl) or attempt >= self.max_retries:
            raise UnsupportedError(
                f"PathKLBound: the step at rate {rate:.3g} measures a KL of {kl:.3g}, bound "
                f"{self.bound:.3g}, after {attempt} further attempts. Give the loop a `step_kl`, "
                "train each step longer, or raise the bound."
            )
        return rate * math.sqrt(0.8 * self.bound / kl)


def _positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be positive and finite.")
