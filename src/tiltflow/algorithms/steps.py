"""Iterates of mirror descent, and steps that may still be refused."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, final

import numpy as np
import numpy.typing as npt

from tiltflow.algorithms.rates import Attempt
from tiltflow.density import Density
from tiltflow.divergences.two_banks import same_points
from tiltflow.errors import CapabilityError, NonFiniteError, TiltflowError, UnsupportedError
from tiltflow.functional import Combined, Functional, influence
from tiltflow.potential import ZERO, Potential
from tiltflow.problem import M, Solution
from tiltflow.types import Access, Estimate

Array: TypeAlias = npt.NDArray[Any]


def objective_value(objective: Functional, p: Density) -> Estimate:
    """G[p], or NaN where the density cannot tell although its first variation is known."""
    try:
        return objective.value(p)
    except CapabilityError:
        return Estimate(math.nan, math.nan)


@final
@dataclass(frozen=True, eq=False)
class Goal:
    """An objective G = ``bent`` + ``convex``.

    A convex part gains more than its linearisation promises, so that only ``bent`` can be the
    reason why a step falls short.
    """

    whole: Functional
    bent: Functional
    convex: Functional | None = None

    @staticmethod
    def of(objective: Functional, split: bool) -> Goal:
        """The convex terms of a sum apart from the others, if that is asked for."""
        terms = objective.terms if split else ()
        lifting = [(c, t) for c, t in terms if t.curvature == ("convex" if c > 0 else "concave")]
        if not lifting:
            return Goal(objective, objective)
        rest = [term for term in terms if term not in lifting]
        return Goal(objective, Combined(rest), Combined(lifting))


@final
@dataclass(frozen=True, eq=False)
class Point(Generic[M]):
    """An iterate: model, its density, and (anchored) the recorded psi = log p - log p_0.

    What G is and does there is found once, when it is asked for.
    """

    goal: Goal
    model: M
    p: Density
    psi: Potential

    @functools.cached_property
    def bent(self) -> Potential:
        """First variation of that part of G."""
        return self.goal.bent.first_variation(self.p)

    @functools.cached_property
    def convex(self) -> Potential:
        """First variation of that part of G."""
        convex = self.goal.convex
        return ZERO if convex is None else convex.first_variation(self.p)

    @functools.cached_property
    def g(self) -> Potential:
        """delta G[p]."""
        return self.bent if self.goal.convex is None else self.bent + self.convex

    @functools.cached_property
    def worth(self) -> Estimate:
        """G[p]."""
        return objective_value(self.goal.whole, self.p)

    @functools.cached_property
    def bent_worth(self) -> float:
        """The value of that part of G."""
        whole = self.goal.convex is None
        return self.worth.value if whole else objective_value(self.goal.bent, self.p).value

    @functools.cached_property
    def weights(self) -> Array:
        """Of the bank, (N,) float64."""
        out: Array = self.p.bank.weights.double().cpu().numpy()
        return out

    def on_bank(self, potential: Potential) -> Array:
        """Values on the bank, (N,) float64."""
        out: Array = influence(potential, self.p).cpu().numpy()
        return out

    @functools.cached_property
    def bent_values(self) -> Array:
        """``bent`` on the bank, (N,); empty where it has no values."""
        return self.on_bank(self.bent) if Access.VALUE in self.bent.offers else np.zeros(0)

    @functools.cached_property
    def g_values(self) -> Array:
        """``g`` on the bank, (N,); empty where it has no values."""
        if Access.VALUE not in self.g.offers or self.goal.convex is None:
            return self.bent_values if Access.VALUE in self.g.offers else np.zeros(0)
        return self.bent_values + self.on_bank(self.convex)

    def shares_bank(self, other: Point[M]) -> bool:
        """Whether both weigh the same points, so that values there can be compared."""
        return same_points(self.p.bank, other.p.bank)


@final
@dataclass(frozen=True, eq=False)
class Trial(Generic[M]):
    """A step that was solved and may still be refused; where it leads is found when asked for."""

    old: Point[M]
    solution: Solution[M]
    find: Callable[[], Point[M]]

    @functools.cached_property
    def new(self) -> Point[M]:
        """Where it leads."""
        return self.find()

    @functools.cached_property
    def gain(self) -> float:
        """G[new] - G[old]; minus infinity where the new density is too far away for a value and
        a first variation, whatever the reason: what is wrong everywhere is noticed at the start.
        """
        try:
            new = self.new
        except (NonFiniteError, UnsupportedError):
            return -math.inf
        try:
            gain = new.worth.value - self.old.worth.value
            if math.isfinite(gain):
                _ = new.g_values
        except TiltflowError:
            return -math.inf
        return gain

    @property
    def looked_at(self) -> bool:
        """Whether its gain has been asked for."""
        return "gain" in self.__dict__

    @functools.cached_property
    def error(self) -> float:
        """By how much the linearisation of the bent part at the new density is above that part at
        the old one; NaN where it cannot be known."""
        if not math.isfinite(self.gain):
            return math.nan
        old, new = self.old, self.new
        if not len(new.g_values) or not old.shares_bank(new):
            return math.nan
        gain = new.bent_worth - old.bent_worth
        return gain - float((new.weights - old.weights) @ new.bent_values)

    def attempt(
        self, rate: float, number: int, promise: Callable[[], float], stuck: bool
    ) -> Attempt:
        """This step as its rate rule sees it; see ``Attempt.error`` for ``stuck``."""
        stats = self.solution.stats
        error = (lambda: math.nan) if stuck else (lambda: self.error)
        return Attempt(
            rate, stats["step_kl"], number, stats,
            gain=lambda: self.gain, promise=promise, error=error,
        )  # fmt: skip
