"""Mirror descent on densities: Flow Density Control."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, final

import torch
from torch import Tensor

from tiltflow.algorithms.bundle import Bundle
from tiltflow.algorithms.rates import Fixed, Predict, RateRule
from tiltflow.algorithms.steps import Goal, Point, Trial, objective_value
from tiltflow.context import Context
from tiltflow.density import Density
from tiltflow.divergences.kl import KL
from tiltflow.errors import CapabilityError, ConfigError
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
            seeds, so that the result is the same, bit for bit. A rule that remembers
            (``LineSearch``) has them solved again, to know what it knew; it is for exact solvers.
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
    memory = getattr(rule, "memory", 1)
    goal = Goal.of(objective, split=memory > 1)
    point = Point(goal, model, p, ZERO)
    loop = _Loop(goal, solver, rule, density, context, conditions, form, step_kl, point)
    loop.check(total)
    if memory > 1 and math.isnan(point.worth.value):
        raise CapabilityError(
            f"mirror_descent: {type(rule).__name__} compares values of the objective, which "
            f"{type(p).__name__} does not know (log p has no values). Give rates, or PathKLBound."
        )
    bundle = Bundle(memory, goal.bent.curvature in ("linear", "concave"))
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
        # The last density is drawn only for somebody who wants to know.
        told = new and on_iterate is not ignore
        gap = stationarity(objective, point.p) if told or tolerance > 0 else math.nan
        if told:
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


@final
@dataclass(frozen=True)
class _Loop(Generic[M]):
    """The arguments of ``mirror_descent``, and one method for each part of a step."""

    goal: Goal
    solver: Solver[M]
    rule: RateRule
    density: Callable[[M, Seed], Density]
    context: Context
    conditions: Conditions | None
    form: Form
    step_kl: Callable[[M, M, Seed], float] | None
    start: Point[M]

    def check(self, total: int) -> None:
        """Raise unless the solver will get what it needs, at the start and at every iterate."""
        user, needs, p = type(self.solver).__name__, self.solver.needs, self.start.p
        check(self.goal.whole, p, needs, user)
        if total == 1:
            return
        offered = self.goal.whole.offers_at(p)
        if self.form == "successive" or p.with_log(p.log) is p:
            later: Density = FutureDensity(Promise(p.log.offers))
        else:
            # What psi offers depends on what its own terms offer: shrink until it is stable.
            for _ in range(3):
                later = FutureDensity(p.log + Promise(offered))
                offered &= self.goal.whole.offers_at(later)
        check(self.goal.whole, later, needs, f"{user} (from the second iteration on)")

    def solve(
        self, k: int, point: Point[M], bundle: Bundle, previous: float | None
    ) -> tuple[Solution[M], Point[M]] | None:
        """Step k and where it leads, solved again until the rule accepts it, or ``None``."""
        point.g.require(self.solver.needs, type(self.solver).__name__)
        bundle.start(point)
        rate, number = self.rule.propose(k, previous, _predictor(point.g, point.p)), 0
        while True:
            direction = bundle.direction(point, rate)
            trial = self._trial(k, point, direction.g, rate, number)
            again = self.rule.retry(
                trial.attempt(rate, number, direction.promise, direction.stuck)
            )
            if again is None:
                bundle.move(trial)
                return trial.solution, trial.new
            if again == 0.0:
                if getattr(self.rule, "edge", False) or not bundle.forget(point):
                    return None
            elif trial.looked_at and (again == rate or trial.error >= 0):
                bundle.add(trial)
            rate, number = again or 0.25 * rate, number + 1

    def _trial(self, k: int, point: Point[M], g: Potential, rate: float, number: int) -> Trial[M]:
        solution = self._attempt(k, point, rate * g, number)
        kl = self._measure(k, point, solution, number)
        solution = replace(solution, stats={**solution.stats, "rate": rate, "step_kl": kl})
        return Trial(point, solution, lambda: self.advance(k, point, g, solution))

    def _attempt(self, k: int, point: Point[M], phi: Potential, attempt: int) -> Solution[M]:
        context = self.context.child("iteration", k)
        if attempt:  # an address of its own, so that a snapshot belongs to one attempt
            context = context.child("attempt", attempt)
        if self.form == "successive":
            problem = ControlProblem(point.model, phi, self.conditions)
        else:
            problem = ControlProblem(self.start.model, point.psi + phi, self.conditions)
        return self.solver.solve(problem, context, init=point.model)

    def _measure(self, k: int, point: Point[M], solution: Solution[M], attempt: int) -> float:
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
        self, k: int, point: Point[M], solution: Solution[M], previous: float | None
    ) -> tuple[Solution[M], Point[M]]:
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

    def advance(self, k: int, point: Point[M], g: Potential, solution: Solution[M]) -> Point[M]:
        """The iterate after step k."""
        p = self.density(solution.model, _seed(self.context, k + 1))
        p, psi = p.at_least(self.goal.whole.samples_needed), ZERO
        if self.form == "anchored":
            psi = point.psi + solution.stats["rate"] * g
            p = p.with_log(self.start.p.log + psi)
        return Point(self.goal, solution.model, p, psi)


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
