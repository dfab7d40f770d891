"""Gates as control problems: one problem, or a mirror descent of several."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from tiltflow.algorithms.averaging import Disagreement, averaged
from tiltflow.algorithms.lowerings.base import Job, Lowered
from tiltflow.algorithms.mirror_descent import mirror_descent
from tiltflow.context import Context
from tiltflow.delta import Correction
from tiltflow.density import FlowDensity, ModelScore
from tiltflow.errors import CapabilityError, UnsupportedError
from tiltflow.flow import ControlledProcess, FlowModel, freeze
from tiltflow.kernel import Auto, LinearKernel
from tiltflow.matching import distil
from tiltflow.operators import Contrast, Gate, Intersection
from tiltflow.potential import ZERO, Potential, StepReward
from tiltflow.problem import PathProblem, Solution
from tiltflow.ratio import Likelihood
from tiltflow.sample import calibrated
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond, expand_as

APART = 5.0
"""-log of the overlap, int prod_i p_i^{w_i}, in nats, from which on parts hardly meet."""


def one_shot(job: Job) -> Lowered:
    """An intersection as one control problem (methods, section 5.6 C)::

        reference  the average of the models
        running    -sum_i w_i |m_i - mbar|^2 / (2 v)          where they disagree
        terminal   f / A

    The product of path laws that share one noising kernel is the path law of the geometric mean,
    so that the optimum is a flow although the problem has a running reward.
    """
    gate, start, settings, context = job.gate, job.start, job.settings, job.context
    reference, sampler = _average(job), settings.solver.sampler
    if isinstance(sampler.kernel, Auto):
        reference = calibrated(
            reference, seed=context.seed.child("calibration"), num_steps=sampler.num_steps,
            conditions=job.conditions,
        )  # fmt: skip
    running = Disagreement(job.models, gate.shares, _kernel(job, reference), settings.until)
    terminal = ZERO if gate.reward is None else (1 / gate.total) * gate.reward
    init = start if job.learned else None
    if init is not None and reference.moments is not None:
        init = init.with_moments(reference.moments)
    problem = PathProblem(reference, terminal, running, job.conditions)
    solution = _solved(job, 0, problem, context, init)
    # The one problem with a running reward whose optimum is a flow, see above.
    model, stats = solution.model, dict(solution.stats)
    if gate.reward is None:
        stats["apart"] = _apart(model, running, job) + stats["path_kl"]
        warn_if_apart(gate, stats["apart"])
    refit = job.learned if settings.refit is None else settings.refit
    lowered = Lowered(model, job.lowering, stats)
    return _refitted(lowered, job) if refit else lowered


def _solved(
    job: Job, number: int, problem: PathProblem[FlowModel], context: Context,
    init: FlowModel | None,
) -> Solution[FlowModel]:  # fmt: skip
    """A problem with a running reward, unless it has been solved before; the process's model."""
    known = job.keeper.solve(job, number)
    if known is not None:
        return known
    found = job.settings.solver.solve_path(problem, context, init=init)
    solution = Solution(found.model.model, found.result, found.stats)
    job.keeper.solved(job, number, solution)
    return solution


def _average(job: Job) -> FlowModel:
    """The reference: with a correction that is still zero, where such are trained."""
    start, correction = job.start, None
    if isinstance(start.delta, Correction):
        correction = start.delta.null()
    return freeze(averaged(job.models, job.gate.shares, predicts=start.predicts, delta=correction))


def untrained(job: Job) -> FlowModel:
    """A model of the structure that the job makes, to load a trained one into."""
    if job.lowering == "one_shot" and isinstance(job.start.delta, Correction):
        return _average(job).clone()
    return job.start.clone()


def _kernel(job: Job, reference: FlowModel) -> LinearKernel:
    kernel = job.settings.solver.sampler.kernel.resolved(reference)
    if not isinstance(kernel, LinearKernel):
        raise UnsupportedError(f"Merging: {type(kernel).__name__} has no steps of one evaluation.")
    return kernel


def _apart(model: FlowModel, running: Disagreement, job: Job) -> float:
    """E[sum_k c_k] of the merged model's paths: with its path KL, -log of the overlap."""
    solver, seed = job.settings.solver, job.context.seed.child("apart")
    sampler, count, cond = solver.sampler, solver.num_evaluate, job.cond(solver.num_evaluate)
    path = sampler.simulate(model, count, seed=seed, cond=cond)
    times, total = sampler.times, torch.zeros(count)
    for k, x in enumerate(path.states[:-1]):
        t, s = (times[i].to(x).expand(count) for i in (k, k + 1))
        total = total - running.value(x, t, s, cond).cpu()
    return float(total.mean())


def warn_if_apart(gate: Gate, apart: float) -> None:
    """Say so if an intersection is hardly likely under any of its parts."""
    if apart > APART:
        warnings.warn(
            f"merge: the parts of {gate} overlap by only exp(-{apart:.1f}): their intersection is "
            "hardly likely under any of them, and its samples may be of neither.",
            RuntimeWarning, stacklevel=5,
        )  # fmt: skip


def _refitted(lowered: Lowered, job: Job) -> Lowered:
    """A flow with the law of the process that a problem with a running reward led to."""
    settings, context = job.settings, job.context.child("refit")
    sampler = settings.solver.sampler
    model = distil(
        ControlledProcess(lowered.model), lowered.model, sampler=sampler, count=settings.bank_size,
        settings=settings.training, context=context, conditions=job.conditions,
        batch_size=settings.batch_size,
    )  # fmt: skip
    model = calibrated(
        freeze(model), seed=context.seed.child("moments"), conditions=job.conditions
    )
    return replace(lowered, model=model, stats={**lowered.stats, "refitted": 1.0})


def terminal(job: Job) -> Lowered:
    """A gate by mirror descent on its objective, with gradients at the end points only (methods,
    section 5.5.2)::

        p_{k+1}  ~  p_k exp((gamma / A) delta G[p_k])

    The paper's algorithm. For an intersection (from scores) and a contrast one step with gamma = 1
    is exact, for the others (from critics) errors of K trainings add up, and the start must cover
    what it is to become.
    """
    gate, descent = job.gate, job.settings.descent
    count, gamma = descent.plan(1 if isinstance(gate, Intersection | Contrast) else 20)
    priors = [_density(job, model, job.context.seed.child("prior", i))
              for i, model in enumerate(job.models)]  # fmt: skip
    own = [p for p in priors if p.model is job.start]
    prior = own[0] if own else _density(job, job.start, job.context.seed.child("prior"))
    completed: list[Solution[FlowModel]] = []
    while len(completed) < count and (known := job.keeper.solve(job, len(completed))):
        completed.append(known)
    solution = mirror_descent(
        gate.objective(priors, ratio=descent.ratio), job.start, job.settings.solver,
        [gamma / gate.total] * count, context=job.context, prior=prior,
        density=lambda model, seed: _density(job, model, seed), conditions=job.conditions,
        completed=completed,
        on_iterate=lambda k, iterate: job.keeper.solved(job, k, iterate.solution),
    )  # fmt: skip
    stats = {**solution.stats, "iterations": float(count)}
    return Lowered(solution.model, job.lowering, stats)


def _density(job: Job, model: FlowModel, seed: Seed) -> FlowDensity:
    """The law of a model; a contrast also needs values of log p."""
    settings, time = job.settings, job.score_time
    log: Potential = ModelScore(model, time, of_data=True)
    if isinstance(job.gate, Contrast):
        log = Likelihood(model, settings.likelihood_steps, score_time=time)
    return FlowDensity(
        model, sampler=settings.sampler, num_samples=settings.descent.num_samples, seed=seed,
        conditions=job.conditions, score_time=time, log=log,
    )  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class ScoreGap(StepReward):
    """The running reward of gradient (s - t) weight(t) (sum_i w_i s_i - s_model)(x, t)."""

    models: tuple[FlowModel, ...]
    shares: tuple[float, ...]
    model: FlowModel
    weight: Callable[[Tensor], Tensor]

    @property
    def offers(self) -> Access:
        return Access.GRAD

    def value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        raise CapabilityError("ScoreGap: only the gradient of this running reward is known.")

    @torch.no_grad()
    def grad(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        weight = (s - t) * self.weight(t)
        if not bool(weight.any()):
            return torch.zeros_like(x)
        total = -self.model.score(x, t, cond)
        for w, model in zip(self.shares, self.models, strict=True):
            total = total + w * model.score(x, t, cond)
        return expand_as(weight, x) * total


def trajectory(job: Job) -> Lowered:
    """An intersection by mirror descent on the objective of whole paths (methods, 5.5.3)::

        running reward    gamma lambda_t (sum_i w_i s_i - s_k)(x, t)        by its gradient
        terminal          gamma f / A

    As published: scores are read off the velocity of the current process, whose running reward
    makes them inexact, so that the iterates come to the average of the velocities, not to the
    geometric mean (section 5.6 B). Few steps, and ``end_term``, come closer.
    """
    gate, descent = job.gate, job.settings.descent
    count, gamma = descent.plan(5)
    model, stats = job.start, dict[str, float]()
    for k in range(count):
        reward = ZERO if gate.reward is None else (gamma / gate.total) * gate.reward
        if descent.end_term:
            reward = reward + gamma * _end_gap(job, model)
        running = ScoreGap(job.models, gate.shares, model, _path_weight(job, gamma))
        problem = PathProblem(model, reward, running, job.conditions)
        solution = _solved(job, k, problem, job.context.child("iteration", k), model)
        model, stats = solution.model, dict(solution.stats)
    lowered = Lowered(model, job.lowering, {**stats, "iterations": float(count)})
    return lowered if job.settings.refit is False else _refitted(lowered, job)


def _end_gap(job: Job, model: FlowModel) -> Potential:
    """sum_i w_i log p_i - log p_model."""

    def log(of: FlowModel) -> Potential:
        return ModelScore(of, job.score_time, of_data=True)

    parts = [w * log(m) for w, m in zip(job.gate.shares, job.models, strict=True)]
    return sum(parts[1:], parts[0]) - log(model)


def _path_weight(job: Job, gamma: float) -> Callable[[Tensor], Tensor]:
    """gamma lambda_t, zero near the data and at t = 0, where sigma is infinite."""
    descent, schedule = job.settings.descent, job.start.schedule

    def weight(t: Tensor) -> Tensor:
        scale = schedule.sigma(t) if descent.path_weight == "sigma" else torch.ones_like(t)
        inside = (t <= descent.until) & torch.isfinite(scale)
        return torch.where(inside, gamma * scale, torch.zeros_like(t))

    return weight
