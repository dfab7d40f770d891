"""Plan on a bank, tune once: mirror descent without training, then one fine-tuning."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from tiltflow.algorithms.bank_plan import Planned, Planning, plan, unsampled
from tiltflow.algorithms.mirror_descent import Iterate, ignore, stationarity
from tiltflow.algorithms.steps import objective_value
from tiltflow.context import Context
from tiltflow.density import Bank, Density, FlowDensity, Reweighted
from tiltflow.errors import UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.functional import (
    Functional,
    check,
)
from tiltflow.potential import ZERO, Potential
from tiltflow.problem import ControlProblem, Result, Solution, Solver
from tiltflow.sample import Sampler, step_kl
from tiltflow.seed import Seed
from tiltflow.types import Access

SMALL_PLAN, MISSED = 1e-3, 0.01
"""A tuned model whose path KL is below this fraction of the KL of its plan (in nats, of at least
so many) did not learn, whatever its solver says."""


def plan_and_tune(
    objective: Functional,
    model: FlowModel,
    solver: Solver[FlowModel],
    *,
    prior: FlowDensity,
    context: Context,
    settings: Planning | None = None,
    density: Callable[[FlowModel, Seed], Density] | None = None,
    completed: Sequence[Solution[FlowModel]] = (),
    on_iterate: Callable[[int, Iterate[FlowModel]], None] = ignore,
) -> Solution[FlowModel]:
    """Flow Density Control with one fine-tuning instead of one per step.

    Deviation: Flow Density Control (algorithm 1) trains a model in every step, only to linearise
    at its samples. A weighted bank of pre-trained samples stands for every tilt as well, so that
    ``plan`` finds the optimum without training, and ``solver`` is run once for its potential.
    Where the bank is too thin for the whole way (its effective size), the model is tuned for the
    part that it carries, and the next plan starts from samples of that model, weighted with
    exp(psi) dP_prior / dP_tuned along their paths, so that errors of the tuning do not enter.

    Args:
        objective: G; must be ``plannable``.
        model: the pre-trained model.
        solver: a trained solver.
        prior: the density of ``model`` that the objective refers to.
        context: seed, backend, callbacks; round r runs at the address ``iteration/r``.
        settings: of the plans.
        density: the law of a tuned model, for the statistics; default: like ``prior``.
        completed: solutions of the first rounds of an earlier run with the same arguments.
        on_iterate: called after each round.

    Returns:
        the last solution; ``stats`` has ``plan_objective``, ``plan_objective_error``,
        ``plan_iterations``, ``plan_kl``, ``plan_effective_size`` and ``rounds`` added.

    Raises:
        CapabilityError: before any work, if a bank is not enough for the objective.
        UnsupportedError: before any work, for conditional models: weights on pairs of sample and
            condition would change the law of the conditions.
    """
    settings = settings or Planning()
    if prior.conditions is not None:
        raise UnsupportedError(
            "plan_and_tune: a bank of a conditional model cannot be re-weighted as a whole, "
            "because every condition has its own normaliser. Use mirror_descent."
        )
    check(objective, unsampled(prior), Access.VALUE, "Planning on a bank")
    job = _Job(objective, model, solver, prior, context, settings, density)
    psi, last = ZERO, Solution(model)
    for r in range(settings.max_rounds):
        start, at = job.start(r, last.model, psi), job.at(r).child("plan")
        planned = plan(objective, start, settings, at, prior=prior)
        psi = psi + planned.potential
        new = r >= len(completed)
        last = job.tune(r, planned, psi, last.model) if new else completed[r]
        if new:
            on_iterate(r, job.iterate(r, psi, last))
        if last.result not in (Result.DONE, Result.CONVERGED) or not planned.exhausted:
            break
    return last


@final
@dataclass(frozen=True)
class _Job:
    """The arguments of ``plan_and_tune``, and one method for each part of a round."""

    objective: Functional
    model: FlowModel
    solver: Solver[FlowModel]
    prior: FlowDensity
    context: Context
    settings: Planning
    density: Callable[[FlowModel, Seed], Density] | None

    def at(self, r: int) -> Context:
        return self.context.child("iteration", r)

    def start(self, r: int, model: FlowModel, psi: Potential) -> Reweighted:
        """The bank that round r plans on: pre-trained samples, or corrected ones of ``model``."""
        size = max(self.settings.bank_size, 2 * self.objective.samples_needed)
        if r == 0:
            return Reweighted(self.prior.at_least(size).bank, self.prior.log)
        seed = self.at(r).seed.child("bank")
        bank = corrected(model, self.model, psi, self.prior, size, seed)
        return Reweighted(bank, self.prior.log + psi, origin=self.prior.log)

    def tune(
        self, r: int, planned: Planned, psi: Potential, init: FlowModel
    ) -> Solution[FlowModel]:
        """One fine-tuning of the pre-trained model, started from the last one."""
        psi.require(self.solver.needs, type(self.solver).__name__)
        problem = ControlProblem(self.model, psi)
        solution = self.solver.solve(problem, self.at(r), init=init)
        stats = {
            **solution.stats, "step_kl": planned.kl, "rounds": r + 1.0,
            "plan_objective": planned.objective.value,
            "plan_objective_error": planned.objective.standard_error,
            "plan_iterations": float(planned.iterations), "plan_kl": planned.kl,
            "plan_effective_size": planned.p.bank.effective_size,
            "plan_exhausted": float(planned.exhausted),
        }  # fmt: skip
        result = solution.result
        if r == 0 and untouched(stats.get("path_kl", math.nan), planned.kl):
            result = Result.STARVED
            warnings.warn(
                f"plan_and_tune: the plan is {planned.kl:.3g} nats from the start, but the tuned "
                f"model only {stats['path_kl']:.2g}: the training has missed what the plan asks "
                "for, probably because its roll-outs hardly ever see it. Give the solver more "
                "trajectories or updates, or raise the weight of the divergence.",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
        return replace(solution, result=result, stats=stats)

    def iterate(self, r: int, psi: Potential, last: Solution[FlowModel]) -> Iterate[FlowModel]:
        """What is known of the tuned model."""
        seed = self.at(r).seed.child("density")
        make = self.density or functools.partial(_like, self.prior)
        p = make(last.model, seed).at_least(self.objective.samples_needed)
        p = p.with_log(self.prior.log + psi)
        worth = objective_value(self.objective, p)
        gap = stationarity(self.objective, p)
        return Iterate(r, math.nan, worth, gap, last.stats["step_kl"], last)


def untouched(path_kl: float, planned: float) -> bool:
    """Whether a model stayed where it was: its path KL is at least the KL of its samples."""
    return planned > SMALL_PLAN and path_kl < MISSED * planned


def _like(prior: FlowDensity, model: FlowModel, seed: Seed) -> FlowDensity:
    return FlowDensity(
        model, sampler=prior.sampler, num_samples=prior.num_samples, seed=seed,
        conditions=prior.conditions, score_time=prior.score_time,
    )  # fmt: skip


def corrected(
    model: FlowModel,
    reference: FlowModel,
    psi: Potential,
    prior: FlowDensity,
    count: int,
    seed: Seed,
) -> Bank:
    """Samples of ``model`` with weights exp(psi) dP_reference / dP_model along their paths."""
    sampler = prior.sampler if prior.sampler.kernel.memoryless else Sampler()
    points, log_weights = [], []
    for batch, first in enumerate(range(0, count, sampler.batch_size)):
        size = min(sampler.batch_size, count - first)
        where = seed.child("batch", batch)
        path = sampler.simulate(model, size, seed=where)
        ratio = step_kl(model, reference, sampler.kernel, path, own=True)[1]
        points.append(path.end)
        log_weights.append((psi.value(path.end) - ratio).double())
    return Bank(torch.cat(points), torch.softmax(torch.cat(log_weights), 0))
