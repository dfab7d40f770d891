"""Mirror descent on densities: Flow Density Control."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, final

import numpy as np
import torch
from torch import Tensor

from tiltflow.algorithms.bundle import Array, Bundle, values_of, weights_of
from tiltflow.algorithms.rates import Attempt, Fixed, Predict, RateRule
from tiltflow.context import Context
from tiltflow.density import Density
from tiltflow.divergences.kl import KL
from tiltflow.divergences.two_banks import same_points
from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, UnsupportedError
from tiltflow.functional import (
    Functional,
    FutureDensity,
    Promise,
    check,
    influence,
    spread,
)
from tiltflow.potential import ZERO, Potential
from tiltflow.problem import ControlProblem, M, Result, Solution, Solver
from tiltflow.seed import Seed
from tiltflow.types import Access, Conditions, Estimate

Form = Literal["anchored", "successive"]


@final
@dataclass(frozen=True)
class Iterate(Generic[M]):
    """One step of the loop, and where it led.

    Attributes:
        number, rate: k, from 0, of the step p_k -> p_{k+1}, and its rate.
        objective: G[p_{k+1}]; NaN where the density cannot tell (the entropy of a flow model).
        stationarity: how far delta G[p_{k+1}] is from constant, see ``stationarity``; NaN where
            the first variation has no values.
        step_kl: KL(p_{k+1} || p_k), measured; NaN where it cannot be.
        solution: what the solver returned; ``stats`` has ``rate`` and ``step_kl`` added.
    """

    number: int
    rate: float
    objective: Estimate
    stationarity: float
    step_kl: float
    solution: Solution[M]


def ignore(number: int, iterate: Iterate[M]) -> None:
    """Default of ``on_iterate``."""


def mirror_descent(
    objective: Functional,
    model: M,
    solver: Solver[M],
    rates: Sequence[float] | RateRule,
    *,
    density: Callable[[M, Seed], Density],
    context: Context,
    prior: Density | None = None,
    num_iterations: int | None = None,
    conditions: Conditions | None = None,
    form: Form = "anchored",
    step_kl: Callable[[M, M, Seed], float] | None = None,
    tolerance: float = 0.0,
    completed: Sequence[Solution[M]] = (),
    on_iterate: Callable[[int, Iterate[M]], None] = ignore,
) -> Solution[M]:
    """Maximise a functional of the density by entropic steps (FDC, algorithm 1)::

        g_k     = delta G[p_k]                                                      linearise
        p_{k+1} = argmax_p E_p[rate_k g_k] - KL(p || p_k)  ~  p_k exp(rate_k g_k)   solve

    Two forms of the step, equal when every solve is exact:

    - ``"successive"``, the paper's: reference = model_k, terminal = rate_k g_k. The errors of the
      solves accumulate, and a KL to the pretrained model needs a difference of scores.
    - ``"anchored"``. Deviation: with psi_k = sum_{j<k} rate_j g_j, log p_k = log p_0 + psi_k;
      reference = model_0, terminal = psi_k + rate_k g_k, started from model_k. Errors do not
      accumulate, and ``KL(prior)`` contributes psi_k itself: no score is needed, if the objective
      was built with the object passed as ``prior``.

    Args:
        objective: G.
        model: the start, model_0.
        solver: solves each step.
        rates: one rate per iteration, or a ``RateRule``. With G = F - weight * KL(prior) and F
            linear, one step of rate 1 / weight is exact.
        density: the law of a model, ``(model, seed) -> Density``.
        context: seed, backend, callbacks; iteration k runs at the address ``iteration/k``.
        prior: the density of ``model`` that the objective refers to; default: ``density(model)``.
        num_iterations: default: the number of rates.
        conditions: law of the conditions, for conditional models.
        form: see above.
        step_kl: ``(new, old, seed) -> KL(new || old)``. Default: the solver's ``step_kl``, its
            ``path_kl`` where its reference is the old model, the path KL of two flow models.
        tolerance: stop when the stationarity falls below it.
        completed: solutions of the first iterations of an earlier run with the same arguments,
            taken instead of solved, and not reported again. All else is recomputed from addressed
            seeds, so that the result is the same, bit for bit.
        on_iterate: called after each step.

    Returns:
        the last solution; ``CONVERGED`` if ``tolerance`` stopped it. A solver that ends
        ``STARVED`` or ``DEGENERATE`` ends the loop.

    Raises:
        CapabilityError: before any sample is drawn, if the solver would miss what it needs.
        ConfigError: if the number of iterations is unclear, or ``form`` unknown.
    """
    rule: RateRule = Fixed(tuple(rates)) if isinstance(rates, Sequence) else rates
    total = _length(rule, num_iterations, len(completed))
    if form not in ("anchored", "successive"):
        raise ConfigError(f"mirror_descent: form={form!r} must be 'anchored' or 'successive'.")
    p = density(model, _seed(context, 0)) if prior is None else prior
    p = p.at_least(objective.samples_needed)
    point = _Point(objective, model, p, ZERO)
    loop = _Loop(objective, solver, rule, density, context, conditions, form, step_kl, point)
    loop.check(total)
    bundle = Bundle(getattr(rule, "memory", 1), objective.curvature in ("linear", "concave"))
    last, rate = Solution(model), None
    for k in range(total):
        new = k >= len(completed)
        if new or bundle.size > 1:
            step = loop.solve(k, point, bundle, rate)
        else:
            step = loop.accept(k, point, completed[k], rate)
        if step is None:
            return replace(last, result=Result.CONVERGED)
        last, point = step
        rate = last.stats["rate"]
        gap = stationarity(objective, point.p) if new or tolerance > 0 else math.nan
        if new:
            on_iterate(k, Iterate(k, rate, point.worth, gap, last.stats["step_kl"], last))
        if last.result not in (Result.DONE, Result.CONVERGED):
            break
        if gap < tolerance:
            return replace(last, result=Result.CONVERGED)
    return last


def stationarity(objective: Functional, p: Density) -> float:
    """How far ``p`` is from a stationary point of G = sum_i c_i F_i, between 0 and 1::

        sd_p(delta G) / sum_i |c_i| sd_p(delta F_i)

    0: nothing is gained by a small step. 1: no term opposes another, as at the start; a single
    term stays at 1 until it is 0. NaN where a first variation has no values.
    """
    if not all(Access.VALUE in term.offers_at(p) for _, term in objective.terms):
        return math.nan
    total, scale = torch.zeros((), dtype=torch.float64), 0.0
    for c, term in objective.terms:
        values = influence(term.first_variation(p), p)
        total, scale = total + c * values, scale + abs(c) * spread(values, p)
    return spread(total, p) / scale if scale > 0 else 0.0


def objective_value(objective: Functional, p: Density) -> Estimate:
    """G[p], or NaN where the density cannot tell although its first variation is known."""
    try:
        return objective.value(p)
    except CapabilityError:
        return Estimate(math.nan, math.nan)


@final
@dataclass(frozen=True)
class _Point(Generic[M]):
    """An iterate: model, its density, and (anchored) the recorded psi = log p - log p_0."""

    objective: Functional
    model: M
    p: Density
    psi: Potential

    @functools.cached_property
    def g(self) -> Potential:
        """delta G[p]."""
        return self.objective.first_variation(self.p)

    @functools.cached_property
    def worth(self) -> Estimate:
        """G[p]."""
        return objective_value(self.objective, self.p)


@final
@dataclass(frozen=True)
class _Trial(Generic[M]):
    """A step that was solved and may still be refused; where it leads is found when asked for."""

    old: _Point[M]
    solution: Solution[M]
    find: Callable[[], _Point[M]]

    @functools.cached_property
    def new(self) -> _Point[M]:
        return self.find()

    @functools.cached_property
    def gain(self) -> float:
        """G[new] - G[old]; minus infinity where the new density is too far away for a value and
        a first variation."""
        try:
            gain = self.new.worth.value - self.old.worth.value
            if math.isfinite(gain):
                _ = self.values
        except (NonFiniteError, UnsupportedError):
            return -math.inf
        return gain

    @functools.cached_property
    def values(self) -> Array:
        """Of the new first variation on the new bank, (N,); empty where it has none."""
        known = Access.VALUE in self.new.g.offers
        return values_of(self.new.g, self.new.p) if known else np.zeros(0)

    @functools.cached_property
    def error(self) -> float:
        """By how much the linearisation at the new density is above G[old]; NaN where unknown."""
        p, q = self.old.p, self.new.p
        if not (math.isfinite(self.gain) and len(self.values) and same_points(p.bank, q.bank)):
            return math.nan
        return self.gain + float((weights_of(p) - weights_of(q)) @ self.values)

    def attempt(self, rate: float, number: int, promise: Callable[[], float]) -> Attempt:
        """This step as its rate rule sees it."""
        stats = self.solution.stats
        return Attempt(
            rate, stats["step_kl"], number, stats,
            gain=lambda: self.gain, promise=promise, error=lambda: self.error,
        )  # fmt: skip


@final
@dataclass(frozen=True)
class _Loop(Generic[M]):
    """The arguments of ``mirror_descent``, and one method for each part of a step."""

    objective: Functional
    solver: Solver[M]
    rule: RateRule
    density: Callable[[M, Seed], Density]
    context: Context
    conditions: Conditions | None
    form: Form
    step_kl: Callable[[M, M, Seed], float] | None
    start: _Point[M]

    def check(self, total: int) -> None:
        """Raise unless the solver will get what it needs, at the start and at every iterate."""
        user, needs, p = type(self.solver).__name__, self.solver.needs, self.start.p
        check(self.objective, p, needs, user)
        if total == 1:
            return
        offered = self.objective.offers_at(p)
        if self.form == "successive" or p.with_log(p.log) is p:
            later: Density = FutureDensity(Promise(p.log.offers))
        else:
            # What psi offers depends on what its own terms offer: shrink until it is stable.
            for _ in range(3):
                later = FutureDensity(p.log + Promise(offered))
                offered &= self.objective.offers_at(later)
        check(self.objective, later, needs, f"{user} (from the second iteration on)")

    def solve(
        self, k: int, point: _Point[M], bundle: Bundle, previous: float | None
    ) -> tuple[Solution[M], _Point[M]] | None:
        """Step k and where it leads, solved again until the rule accepts it, or ``None``."""
        point.g.require(self.solver.needs, type(self.solver).__name__)
        bundle.start(point.g, point.p)
        rate, number = self.rule.propose(k, previous, _predictor(point.g, point.p)), 0
        while True:
            direction = bundle.direction(point.p, rate, lambda: point.worth.value)
            trial = self._trial(k, point, direction.g, rate, number)
            again = self.rule.retry(trial.attempt(rate, number, direction.promise))
            if again is None:
                if bundle.planes and math.isfinite(trial.gain):
                    bundle.move(point.p, trial.new.p, trial.new.g, trial.values, trial.gain)
                return trial.solution, trial.new
            if again == 0.0:
                if not bundle.forget(point.p):
                    return None
            elif bundle.planes and (trial.error >= 0 or again == rate):
                bundle.add(trial.new.g, trial.values, trial.error)
            rate, number = again or 0.25 * rate, number + 1

    def _trial(
        self, k: int, point: _Point[M], g: Potential, rate: float, number: int
    ) -> _Trial[M]:
        solution = self._attempt(k, point, rate * g, number)
        kl = self._measure(k, point, solution, number)
        solution = replace(solution, stats={**solution.stats, "rate": rate, "step_kl": kl})
        return _Trial(point, solution, lambda: self.advance(k, point, g, solution))

    def _attempt(self, k: int, point: _Point[M], phi: Potential, attempt: int) -> Solution[M]:
        context = self.context.child("iteration", k)
        if attempt:  # an address of its own, so that a snapshot belongs to one attempt
            context = context.child("attempt", attempt)
        if self.form == "successive":
            problem = ControlProblem(point.model, phi, self.conditions)
        else:
            problem = ControlProblem(self.start.model, point.psi + phi, self.conditions)
        return self.solver.solve(problem, context, init=point.model)

    def _measure(self, k: int, point: _Point[M], solution: Solution[M], attempt: int) -> float:
        """KL(new || old) of a step, by the best means at hand."""
        seed, stats = self.context.seed.child("iteration", k, "step_kl", attempt), solution.stats
        if self.step_kl is not None:
            return float(self.step_kl(solution.model, point.model, seed))
        same = self.form == "successive" or k == 0  # the solver's reference is the old model
        for key in ("step_kl", "path_kl") if same else ("step_kl",):
            if key in stats:
                return stats[key]
        new, old = self.density(solution.model, seed), self.density(point.model, seed)
        return objective_value(KL(old), new).value

    def accept(
        self, k: int, point: _Point[M], solution: Solution[M], previous: float | None
    ) -> tuple[Solution[M], _Point[M]]:
        """A step solved in an earlier run, with its rate, and where it leads."""
        if "rate" not in solution.stats:
            if not isinstance(self.rule, Fixed):
                raise ConfigError(
                    f"mirror_descent: completed[{k}].stats has no 'rate', which a measured rule "
                    "needs; pass the solutions as on_iterate reported them."
                )
            known = {**solution.stats, "rate": self.rule.propose(k, previous, None)}
            solution = replace(solution, stats=known)
        return solution, self.advance(k, point, point.g, solution)

    def advance(self, k: int, point: _Point[M], g: Potential, solution: Solution[M]) -> _Point[M]:
        """The iterate after step k."""
        p = self.density(solution.model, _seed(self.context, k + 1))
        p, psi = p.at_least(self.objective.samples_needed), ZERO
        if self.form == "anchored":
            psi = point.psi + solution.stats["rate"] * g
            p = p.with_log(self.start.p.log + psi)
        return _Point(self.objective, solution.model, p, psi)


def _seed(context: Context, k: int) -> Seed:
    return context.seed.child("iteration", k, "density")


def _length(rule: RateRule, num_iterations: int | None, done: int) -> int:
    total = rule.length if num_iterations is None else num_iterations
    if total is None:
        raise ConfigError(
            f"mirror_descent: {type(rule).__name__} has no length; give num_iterations."
        )
    if total < 1 or (rule.length is not None and total > rule.length) or done > total:
        raise ConfigError(
            f"mirror_descent: num_iterations={total} with {rule.length or 'any number of'} rates "
            f"and {done} completed iterations; need completed <= num_iterations <= rates."
        )
    return total


def _predictor(g: Potential, p: Density) -> Predict | None:
    """rate -> KL(p exp(rate g) / Z || p), by self-normalised weights on the bank of ``p``."""
    if Access.VALUE not in g.offers:
        return None

    @functools.cache
    def evaluated() -> tuple[Tensor, Tensor]:
        values = influence(g, p)
        return values, p.bank.weights.double().to(values.device).log()

    def predict(rate: float) -> float:
        values, log_weights = evaluated()
        logits = log_weights + rate * values
        log_z = torch.logsumexp(logits, 0)
        return float(((logits - log_z).exp() * rate * values).sum() - log_z)

    return predict
