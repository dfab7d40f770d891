"""Plans: mirror descent on a bank of samples, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from tiltflow.algorithms.mirror_descent import Iterate, mirror_descent, stationarity
from tiltflow.algorithms.rates import Attempt, LineSearch, Predict, RateRule
from tiltflow.algorithms.steps import objective_value
from tiltflow.context import Context
from tiltflow.density import Density, FlowDensity, Reweighted
from tiltflow.divergences.kl import KL
from tiltflow.errors import ConfigError
from tiltflow.functional import (
    Functional,
    FutureDensity,
    Promise,
    influence,
    spread,
)
from tiltflow.potential import ZERO, Potential, remembering
from tiltflow.solvers.bank import BankSolver, weights_kl
from tiltflow.types import Access, Estimate

ROUNDINGS = (0.3, 0.03, 0.003)
"""Widths over which kinks are rounded, one after the other, where an ascent may be caught."""

SAME_TILT = 1e-2
"""Two plans whose KL on the bank is below this fraction of their KL to the start are one."""

SAME_GAIN = 1e-3
"""The part of the gain that may be lost for it."""

MAX_THIN, EDGE = 30, 1.5
"""How often a step that makes the bank too thin is tried again at half the rate, and up to which
multiple of the least effective size a bank counts as used up."""


@final
@dataclass(frozen=True)
class Planned:
    """Where mirror descent on a bank went.

    Attributes:
        potential: log p / p_start, up to a constant: the terminal reward of one fine-tuning.
        p: the re-weighted bank.
        objective: G[p].
        stationarity: see ``mirror_descent.stationarity``.
        iterations: steps taken on the way that led there.
        kl: KL(p || start), on the bank.
        exhausted: whether the bank, not the objective, ended the descent.
    """

    potential: Potential
    p: Reweighted
    objective: Estimate
    stationarity: float
    iterations: int
    kl: float
    exhausted: bool


@final
@dataclass(frozen=True, kw_only=True)
class Planning:
    """How a plan is made.

    Args:
        bank_size: samples that a plan is made on; more where the objective's tails need them.
        min_effective: least effective size of the re-weighted bank, as a fraction of the bank;
            where the tilt would go beyond, the plan stops there, a model is tuned, and the next
            plan is made on its samples.
        max_rounds: plans (and tunings) at most.
        max_iterations: steps of one plan at most; they cost no training.
        tolerance: stationarity at which a plan is finished.
    """

    bank_size: int = 16384
    min_effective: float = 0.05
    max_rounds: int = 4
    max_iterations: int = 400
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        checks = {
            "bank_size": self.bank_size >= 100,
            "min_effective": 0 < self.min_effective < 1,
            "max_rounds": self.max_rounds >= 1,
            "max_iterations": self.max_iterations >= 1,
            "tolerance": self.tolerance >= 0,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"Planning: {name}={getattr(self, name)!r} is out of range.")


def plannable(objective: Functional, prior: Density) -> bool:
    """Whether a bank of samples of ``prior`` is enough to linearise the objective."""
    conditional = isinstance(prior, FlowDensity) and prior.conditions is not None
    return not conditional and Access.VALUE in objective.offers_at(unsampled(prior))


def worth_planning(objective: Functional, prior: Density) -> bool:
    """Whether a plan is possible and better than one step at rate 1 / weight.

    That single step is exact where the objective is linear but for the KL to ``prior``.
    """
    others = [t for _, t in objective.terms if not _is_anchor(t, prior.log)]
    anchored = len(others) < len(objective.terms)
    exact = anchored and all(t.curvature == "linear" for t in others)
    return not exact and plannable(objective, prior)


def plan(
    objective: Functional,
    start: Reweighted,
    settings: Planning | None = None,
    context: Context | None = None,
    *,
    prior: Density | None = None,
) -> Planned:
    """Mirror descent on a bank of samples, to the optimum or as far as the bank carries.

    Steps are as long as the objective allows (``LineSearch``). Where it has left tails, a second
    ascent goes by way of their rounded forms (``Functional.rounded``), wide ones first, and the
    better end counts: a left tail has many local optima, of which these pass over most. With
    ``- weight * KL(prior)`` in the objective, the history of steps then collapses: at the optimum
    psi = delta(G + weight KL)[p] / weight, one first variation, which is returned where it gives
    the same weights. Otherwise psi is the sum of all steps.

    Args:
        objective: G.
        start: the bank.
        settings: when to stop.
        context: seed and callbacks; nothing is drawn.
        prior: the density that a KL of the objective refers to; ``start`` by default.
    """
    settings, context = settings or Planning(), context or Context()
    anchor = (prior or start).log
    with remembering(start.bank.points):
        ends = []
        for way in ways(objective, start):
            end = _Ascent(start, 0, False)
            for g in way:
                end = end.then(_ascent(g, start, end.p, settings, context, anchor))
            ends.append(end)
        best = max(ends, key=lambda end: objective_value(objective, end.p).value)
        p = best.p
        psi = ZERO if p is start else p.log - start.log
        single = None if p is start else _collapsed(objective, start, p, psi, anchor)
        psi = psi if single is None else single
        p = start.tilted(psi)
        gap = stationarity(objective, p)
        return Planned(
            psi, p, objective_value(objective, p), gap, best.iterations,
            weights_kl(p.bank, start.bank), best.edge and not gap < settings.tolerance,
        )  # fmt: skip


def ways(objective: Functional, p: Density) -> list[list[Functional]]:
    """Sequences of objectives to raise one after the other, each from where the last one ended:
    the objective alone, and, where ``rounded`` changes it, its rounded forms before it."""
    smooth = [objective.rounded(p, part) for part in ROUNDINGS]
    direct = [objective]
    return [direct] if smooth[0] is objective else [direct, [*smooth, objective]]


@final
@dataclass(frozen=True)
class _Ascent:
    """Where one mirror descent went: the density, steps taken, and whether the bank ended it."""

    p: Reweighted
    iterations: int
    edge: bool

    def then(self, later: _Ascent) -> _Ascent:
        """This one and a later one that started at its end."""
        return replace(later, iterations=self.iterations + later.iterations)


def _ascent(
    objective: Functional, start: Reweighted, p: Reweighted, settings: Planning, context: Context,
    anchor: Potential,
) -> _Ascent:  # fmt: skip
    """Mirror descent from p, a tilt of ``start``."""
    iterates: list[Iterate[Reweighted]] = []
    rate = 1 / max(spread(influence(objective.first_variation(p), p), p), 1e-12)
    cap = _inverse_weight(objective, anchor)
    floor = settings.min_effective * len(start.bank.weights)
    rule = _WhileCarried(LineSearch(initial=min(rate, cap), max_rate=cap), floor)
    mirror_descent(
        objective, p, BankSolver(), rule, density=lambda p, seed: p, context=context, prior=p,
        num_iterations=settings.max_iterations, tolerance=settings.tolerance,
        on_iterate=lambda k, iterate: iterates.append(iterate),
    )  # fmt: skip
    end = iterates[-1].solution.model if iterates else p
    thin = end.bank.effective_size < EDGE * floor
    return _Ascent(end, len(iterates), rule.edge or (thin and end is not start))


@final
class _WhileCarried(RateRule):
    """Another rule's steps, shortened where the bank would become too thin."""

    def __init__(self, rule: LineSearch, floor: float) -> None:
        self.rule, self.floor = rule, floor
        self.edge = False
        """Whether the bank is as thin as it may be."""
        self.thin = 0
        """Tries of this step that made it too thin."""

    @property
    def length(self) -> int | None:
        return self.rule.length

    @property
    def memory(self) -> int:
        """How many first variations the loop remembers."""
        return self.rule.memory

    def propose(self, number: int, previous: float | None, predict: Predict | None) -> float:
        return self.rule.propose(number, previous, predict)

    def retry(self, attempt: Attempt) -> float | None:
        self.thin = 0 if attempt.number == 0 else self.thin
        if self.edge and attempt.number == 0:
            return 0.0  # ever smaller steps would lead nowhere
        if attempt.stats["effective_size"] < self.floor:
            self.thin += 1
            self.edge = self.thin > MAX_THIN
            return 0.0 if self.edge else 0.5 * attempt.rate
        smaller = self.rule.retry(attempt)
        # A first try may be far too long; what counts is where the accepted step ends.
        self.edge = smaller is None and attempt.stats["effective_size"] < EDGE * self.floor
        return smaller


def unsampled(prior: Density) -> Density:
    """A stand-in that offers what every re-weighted bank of ``prior`` will offer."""
    return FutureDensity(prior.log + Promise(Access.BOTH))


def _inverse_weight(objective: Functional, anchor: Potential) -> float:
    """1 / weight of the KL to the law with this log-density; 1e6 where there is none."""
    weight = -sum(c for c, term in objective.terms if _is_anchor(term, anchor))
    return 1 / weight if weight > 1e-6 else 1e6


def _is_anchor(term: Functional, anchor: Potential) -> bool:
    return isinstance(term, KL) and term.prior.log is anchor


def _collapsed(
    objective: Functional, start: Reweighted, p: Reweighted, psi: Potential, anchor: Potential
) -> Potential | None:
    """psi by the condition of stationarity, if it is as good as the history of steps.

    One more anchored step at rate 1 / weight: its KL part cancels all earlier ones. At a kink of
    the objective one first variation is not enough.
    """
    rate = _inverse_weight(objective, anchor)
    if rate >= 1e6:
        return None
    single = psi + rate * objective.first_variation(p)
    there = start.tilted(single)
    if not weights_kl(there.bank, p.bank) <= SAME_TILT * weights_kl(p.bank, start.bank):
        return None
    values = [objective_value(objective, law).value for law in (start, p, there)]
    before, reached, collapsed = values
    return single if collapsed >= reached - SAME_GAIN * (reached - before) else None
