"""What is trained and solved for the experiments in the plane of Flow Density Control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from toys import (
    Record,
    Store,
    best_tail,
    kl,
    law_on_grid,
    measured,
    on_grid,
    planned,
    samples,
    weight_of,
)

from tiltflow.algorithms import Iterate, mirror_descent, plan_and_tune
from tiltflow.context import Context
from tiltflow.density import Quadrature
from tiltflow.divergences import KL
from tiltflow.errors import NonFiniteError
from tiltflow.experiment import Plan
from tiltflow.flow import FlowModel
from tiltflow.functional import Functional
from tiltflow.problem import ControlProblem, Solution
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, GridSolver
from tiltflow.utilities import LeftCVaR, RightCVaR

FRESH = 200_000
"""Samples behind every measured number."""


def solver_of(plan: Plan, quick: bool, updates: int | None = None) -> AdjointMatching:
    """The run file's solver, with another number of updates, or twenty."""
    solver = plan.experiment.solver
    assert isinstance(solver, AdjointMatching)
    number = 20 if quick else updates or solver.training.num_updates
    return replace(solver, training=replace(solver.training, num_updates=number))


def rounded(x: Tensor) -> list[list[float]]:
    """The first samples, for the picture."""
    return [[round(v, 2) for v in row] for row in x[:600].tolist()]


def as_published(solver: AdjointMatching) -> AdjointMatching:
    """Gradients only, no clipping, no average of the weights, and the published learning rate."""
    training = replace(solver.training, learning_rate=2e-2, ema=0.0)
    return replace(solver, training=training, use_values=False, clip=None, replay=0)


def stepwise(
    plan: Plan,
    objective: Functional,
    solver: AdjointMatching,
    rates: Sequence[float],
    look: Callable[[FlowModel], Any],
    form: Literal["anchored", "successive"] = "anchored",
) -> list[Any]:
    """Flow Density Control with a training per step; what ``look`` sees after each.

    A training that diverges ends it, at the model before.
    """
    seen: list[Any] = []

    def note(k: int, iterate: Iterate[FlowModel]) -> None:
        seen.append(look(iterate.solution.model))

    try:
        mirror_descent(
            objective, plan.pretrained.model, solver, rates, prior=plan.prior, form=form,
            density=lambda m, seed: plan.experiment.algorithm.density(m, solver.sampler, seed),
            context=Context(plan.seed.child("steps")), on_iterate=note,
        )  # fmt: skip
    except NonFiniteError as error:
        print(f"diverged: {error}", flush=True)
        if not seen:
            raise
    return seen


# --- risk and novelty ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Tails:
    """An experiment on a tail.

    Args:
        file: the run file.
        mass, side: of the tail.
        nodes: of the grid.
        strong: a smaller KL weight for the mean reward, at which it goes where it wants to.
        updates, rates: of the training in steps, one rate per step.
        published: in steps as published: each from the last model, without the KL, with
            gradients only.
    """

    file: str
    mass: float
    side: str
    nodes: tuple[int, int]
    strong: float
    updates: int
    rates: tuple[float, ...]
    published: bool

    def axes(self, quick: bool) -> list[Tensor]:
        """Of the grid."""
        n1, n2 = (101, 101) if quick else self.nodes
        return [torch.linspace(-5, 5.5, n1), torch.linspace(-4.5, 4.5, n2)]

    def run(self, store: Store, seeds: Sequence[int], quick: bool) -> None:
        """Everything that is missing."""
        store.get("exact", lambda: self.exact(quick))
        todo = {
            "pretrained": lambda plan: self.look(plan, plan.pretrained.model),
            "planned": lambda plan: self.planned(plan, quick),
            "mean": lambda plan: self.mean(plan, weight_of(plan), quick),
            "mean_strong": lambda plan: self.mean(plan, self.strong, quick),
            "steps": lambda plan: self.steps(plan, quick),
        }
        for name, make in todo.items():
            for seed in seeds:
                store.get(f"{name}/{seed}", lambda m=make, s=seed: m(self.plan(s)))

    def plan(self, seed: int) -> Plan:
        """The run file with a seed."""
        return planned(self.file, f"seed={seed}")

    def look(self, plan: Plan, model: FlowModel) -> Record:
        """Measures of a model."""
        x = samples(model, FRESH, plan.experiment.seed)
        found = measured(x, plan.reward, self.mass, self.side)
        if plan.experiment.seed == 0:
            found["points"] = rounded(x)
        return found

    def planned(self, plan: Plan, quick: bool) -> Record:
        """The run file itself: a plan, then one training."""
        settings = plan.experiment.algorithm.planning
        settings = replace(settings, bank_size=100, max_iterations=2) if quick else settings
        solution = plan_and_tune(
            plan.objective, plan.pretrained.model, solver_of(plan, quick), prior=plan.prior,
            context=Context(plan.seed), settings=settings,
        )  # fmt: skip
        return self.look(plan, solution.model) | _stats(solution)

    def mean(self, plan: Plan, weight: float, quick: bool) -> Record:
        """Adjoint Matching on the mean reward."""
        problem = ControlProblem(plan.pretrained.model, (1 / weight) * plan.reward)
        solution = solver_of(plan, quick).solve(problem, Context(plan.seed.child("mean", weight)))
        return self.look(plan, solution.model) | _stats(solution)

    def steps(self, plan: Plan, quick: bool) -> list[Record]:
        """A training per step of mirror descent."""
        solver = solver_of(plan, quick, self.updates)
        if not self.published:
            return stepwise(plan, plan.objective, solver, self.rates, lambda m: self.look(plan, m))
        return stepwise(
            plan, 1.0 * plan.experiment.objective.utility, as_published(solver), self.rates,
            lambda m: self.look(plan, m), "successive",
        )  # fmt: skip

    def exact(self, quick: bool) -> dict[str, Any]:
        """The optimum, the tilts of the mean reward, and exact steps, on a grid."""
        plan = self.plan(0)
        q, weight, reward = law_on_grid(plan, self.axes(quick)), weight_of(plan), plan.reward
        best = best_tail(q, reward, self.mass, self.side, weight)

        def seen(p: Quadrature) -> Record:
            return self.on_grid(plan, p, q)

        found: dict[str, Any] = {"pretrained": seen(q), "optimum": seen(best.p)}
        found["objective"] = best.objective
        for name, w in (("mean", weight), ("mean_strong", self.strong)):
            found[name] = seen(q.tilted((1 / w) * reward)) | {"weight": w}
        found["mean_matched"] = self._matched(q, plan, found["optimum"]["kl"], seen)
        utility = LeftCVaR if self.side == "below" else RightCVaR
        tail = utility(reward, self.mass if self.side == "below" else 1 - self.mass)
        objective = 1.0 * tail if self.published else tail - weight * KL(q)
        found["steps"] = exact_steps(objective, q, self.rates, seen)
        return found

    def on_grid(self, plan: Plan, p: Quadrature, q: Quadrature) -> Record:
        """Measures of a law on a grid, and its KL from the start q."""
        return on_grid(p, q, plan.reward, self.mass, self.side)

    def _matched(
        self, q: Quadrature, plan: Plan, distance: float, seen: Callable[[Quadrature], Record]
    ) -> Record:
        """The tilt of the mean reward whose KL is that of the optimum."""
        low, high = 1e-6, 1.0
        for _ in range(40):
            middle = (low * high) ** 0.5
            near = kl(q.tilted(middle * plan.reward), q) < distance
            low, high = (middle, high) if near else (low, middle)
        return seen(q.tilted(low * plan.reward)) | {"weight": 1 / low}


def exact_steps(
    objective: Functional, q: Quadrature, rates: Sequence[float], seen: Callable[[Quadrature], Any]
) -> list[Any]:
    """The same steps with an exact solver."""
    found: list[Any] = []

    def note(k: int, iterate: Iterate[Quadrature]) -> None:
        found.append(seen(iterate.solution.model))

    mirror_descent(
        objective, q, GridSolver(), rates, density=lambda p, seed: p, prior=q,
        context=Context(Seed(0)), on_iterate=note,
    )  # fmt: skip
    return found


def _stats(solution: Solution[FlowModel]) -> Record:
    keys = ("path_kl", "gap", "plan_kl", "plan_objective", "rounds", "plan_iterations")
    return {key: solution.stats[key] for key in keys if key in solution.stats} | {
        "outcome": solution.result.name
    }


RISK = Tails("fdc_risk", 0.01, "below", (526, 721), 10.0, 1000, (1.0,) * 6, True)
NOVELTY = Tails("fdc_novelty", 0.01, "above", (1051, 901), 15.0, 1000, (0.25 / 6000,) * 4, False)
