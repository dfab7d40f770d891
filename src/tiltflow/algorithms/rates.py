"""How large the steps of an outer loop are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, final

from tiltflow.errors import ConfigError, UnsupportedError

FAR = 3.0
"""Multiple of the promise up to which the error of a linearisation is that of a kink."""

Predict = Callable[[float], float]
"""rate -> KL(exact tilt at that rate || current density), increasing in the rate."""


@final
@dataclass(frozen=True)
class Attempt:
    """A step that was solved and may still be refused.

    Attributes:
        rate: its rate.
        kl: KL(new || old), measured; NaN where it cannot be.
        number: earlier attempts of the same step.
        stats: what the solver reported.
        gain: G[new] - G[old]; evaluated when asked for.
        promise: what the linearised step promises to gain at least where G is smooth enough,
            log E_old[exp(rate g)] / rate - E_old[g] >= 0; 0 where it is rounding, NaN where g has
            no values.
        error: by how much the linearisation at the new density is above G[old]: of the size of
            the promise, if there is a kink between the two, and not negative where G is concave.
            NaN where it is not known, and where to remember the last attempt changed nothing.
    """

    rate: float
    kl: float
    number: int
    stats: Mapping[str, float] = field(default_factory=dict)
    gain: Callable[[], float] = lambda: math.nan
    promise: Callable[[], float] = lambda: math.nan
    error: Callable[[], float] = lambda: math.nan


class RateRule(Protocol):
    """Chooses the rate of each step, and may refuse a step that went too far.

    A rule may have an attribute ``memory``: how many first variations the loop remembers, see
    ``LineSearch``; 1, none but the current one, without it. With an attribute ``edge`` that is
    true, giving a step up is final.
    """

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

    def retry(self, attempt: Attempt) -> float | None:
        """``None`` to accept a step, or the rate to solve again with, smaller unless the loop
        remembers the refused step; 0 gives the step up, so that the loop ends where it is."""
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

    def retry(self, attempt: Attempt) -> float | None:
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

    def retry(self, attempt: Attempt) -> float | None:
        # A predicted rate meets the bound with equality; rounding must not cost a second solve.
        rate, kl = attempt.rate, attempt.kl
        if kl <= self.bound * (1 + 1e-9):
            return None
        if not math.isfinite(kl) or attempt.number >= self.max_retries:
            raise UnsupportedError(
                f"PathKLBound: the step at rate {rate:.3g} measures a KL of {kl:.3g}, bound "
                f"{self.bound:.3g}, after {attempt.number} further attempts. Give the loop a "
                "`step_kl`, train each step longer, or raise the bound."
            )
        return rate * math.sqrt(0.8 * self.bound / kl)


@final
@dataclass(frozen=True, kw_only=True)
class LineSearch:
    """Rates as large as the objective allows, for exact solvers (banks, grids, closed forms).

    A step is kept if it gains at least ``fraction`` of what its linearisation promises; with
    ``fraction = 1`` that is the condition of relative smoothness at rate <= 1 / L, which makes
    mirror descent monotone and gives its rate of convergence without knowing L (Lu, Freund &
    Nesterov, SIAM J. Optim. 28, 2018). Otherwise it is solved again at a quarter of the rate; the
    next step tries ``growth`` times the accepted rate. Trained solvers are too noisy and too
    costly for this: use ``Fixed`` or ``PathKLBound``.

    Deviation: a kink of the objective (``RightCVaR`` and ``SpectralRisk`` at a value that has a
    mass of its own, ``Wasserstein``, ``OptimalDesign`` E) stops steps along one first variation
    wherever they meet it. So the loop remembers first variations of refused and of earlier steps,
    and steps along their best mean (``algorithms/bundle.py``); a refused step is solved again at
    the same rate where it has met a kink. The loop then ends at an optimum, up to rounding, or at
    a stationary point if the objective is not concave. Smooth objectives gain as well: the number
    of steps falls severalfold where they are badly conditioned, e.g. with ``MMD``.

    Args:
        initial: first rate tried.
        max_rate: no rate is larger.
        growth: of the rate after an accepted step, at least 1.
        fraction: of the promised gain, between 0 and 1.
        max_retries: how often a step is solved again before it is given up.
        memory: how many first variations are remembered, with their values on the bank; 1 for
            steps along the last one only. Where banks are redrawn it is 1 in effect.
    """

    initial: float = 1.0
    max_rate: float = 1e6
    growth: float = 2.0
    fraction: float = 0.5
    max_retries: int = 100
    memory: int = 40

    def __post_init__(self) -> None:
        for name in ("initial", "max_rate"):
            _positive(getattr(self, name), f"LineSearch: {name}")
        if self.growth < 1 or not 0 <= self.fraction <= 1 or self.initial > self.max_rate:
            raise ConfigError(
                "LineSearch: need growth >= 1, 0 <= fraction <= 1 and initial <= max_rate, got "
                f"{self.growth}, {self.fraction} and {self.initial} > {self.max_rate}."
            )
        if self.memory < 1 or self.max_retries < 0:
            raise ConfigError(
                "LineSearch: need memory >= 1 and max_retries >= 0, got "
                f"{self.memory} and {self.max_retries}."
            )

    @property
    def length(self) -> int | None:
        return None

    def propose(self, number: int, previous: float | None, predict: Predict | None) -> float:
        return self.initial if previous is None else min(self.growth * previous, self.max_rate)

    def retry(self, attempt: Attempt) -> float | None:
        promise = attempt.promise()
        if promise == 0.0:
            return 0.0
        missing = self.fraction * promise - attempt.gain()
        if missing <= 0:
            return None
        # Remembered, with an error of at least 0, the refused step changes the next one.
        at_kink = self.memory > 1 and -0.1 * missing < attempt.error() <= FAR * promise
        rate = attempt.rate if at_kink else 0.25 * attempt.rate
        return rate if attempt.number < self.max_retries else 0.0


def _positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={value!r} must be positive and finite.")
