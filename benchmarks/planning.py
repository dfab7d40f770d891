"""One training for a planned potential against one training per step of mirror descent."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from common import Page, Settings
from mixture import Best, exact, fingerprint, pretrained, prior_of, reached, table
from utilities import CASES, Case, Results, solver

from tiltflow.algorithms import mirror_descent, plan_and_tune
from tiltflow.context import Context
from tiltflow.density import Density, FlowDensity, Quadrature
from tiltflow.errors import NonFiniteError
from tiltflow.flow import FlowModel
from tiltflow.problem import Solution
from tiltflow.recorder import count_evaluations
from tiltflow.seed import Seed
from tiltflow.solvers.exact import GridSolver

Run = dict[str, float]

OBJECTIVES = ("LeftCVaR", "OptimalDesign(1, x, y; D)")
TOTAL, FEWER = 2000, (250, 500, 1000)
STEPS = (2, 4, 8)
PARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Rates that are tried on the grid, times the weight of the KL: 1 / weight is the largest one."""
FORMS: tuple[Literal["anchored", "successive"], ...] = ("anchored", "successive")
COUNT = 4000


def exact_gap(case: Case, q: Quadrature, best: Best, rates: list[float]) -> float:
    """What is missing after these steps, each solved exactly on the grid."""
    objective = case.objective(q)
    out = mirror_descent(
        objective, q, GridSolver(), rates, density=lambda p, seed: p, context=Context(), prior=q
    )
    return best.gap(objective.value(out.model).value)


def best_rate(case: Case, q: Quadrature, best: Best, steps: int) -> tuple[float, float]:
    """What is missing after exact steps of the best constant rate, and that rate."""
    rates = [part / case.weight for part in PARTS]
    return min((exact_gap(case, q, best, [r] * steps), r) for r in rates)


def planned(case: Case, model: FlowModel, settings: Settings, seed: int) -> Solution[FlowModel]:
    """One plan, one training."""
    prior = prior_of(model, seed)
    return plan_and_tune(
        case.objective(prior), model, solver(case, settings), prior=prior,
        context=Context(Seed(seed)), settings=case.planning,
    )  # fmt: skip


def stepped(
    case: Case, model: FlowModel, rates: list[float], form: Literal["anchored", "successive"],
    settings: Settings, seed: int,
) -> Solution[FlowModel]:  # fmt: skip
    """Flow Density Control: one training per rate, all with an equal share of the updates."""
    prior = prior_of(model, seed)

    def density(new: FlowModel, where: Seed) -> Density:
        return FlowDensity(new, seed=where)

    share = replace(case, updates=case.updates // len(rates))
    return mirror_descent(
        case.objective(prior), model, solver(share, settings), rates,
        density=density, context=Context(Seed(seed)), prior=prior, form=form,
    )  # fmt: skip


def measure(
    case: Case, model: FlowModel, best: Best, settings: Settings,
    work: Callable[[FlowModel], Solution[FlowModel]],
) -> Run:  # fmt: skip
    """The gap of what ``work`` makes of a copy of the model that counts, and its cost."""
    copy, counter, begin = model.clone(), [0], time.process_time()
    count_evaluations(copy.net, counter)
    gap = math.inf
    try:
        tuned = work(copy).model
        cost = {"evaluations": counter[0] / 1e6, "seconds": time.process_time() - begin}
        found = reached(case.objective, tuned, model, min(settings.samples, COUNT)).objective
        gap = best.gap(found.value)
    except NonFiniteError:
        cost = {"evaluations": counter[0] / 1e6, "seconds": time.process_time() - begin}
    return {"gap": gap, **cost}


def percent(gap: float) -> str:
    """A gap; one of more than ten times what there is to be gained says nothing."""
    return f"{100 * gap:.1f}" if abs(gap) < 10 else "diverged"


def rows_of(
    case: Case, model: FlowModel, results: Results, settings: Settings
) -> dict[str, tuple[float, list[Run]]]:
    """For each way, what exact steps would leave, and one run per seed."""
    q = table(model, case.nodes)
    best = exact(case.objective, q, case.weight)
    mark = fingerprint(model)

    def each(name: str, work: Callable[[FlowModel, int], Solution[FlowModel]]) -> list[Run]:
        return [
            results.of(
                f"{case.name} - {case.weight:g} KL, {mark}: {name}, seed {s}",
                lambda s=s: measure(case, model, best, settings, lambda m: work(m, s)),
            )
            for s in settings.seeds
        ]

    found = {}
    for updates in (*FEWER, TOTAL):
        less = replace(case, updates=updates)
        runs = each(
            f"plan, {updates} updates", lambda m, s, less=less: planned(less, m, settings, s)
        )
        found[f"plan, {updates}"] = (0.0, runs)
    for steps in STEPS:
        missing, rate = best_rate(case, q, best, steps)
        for form in FORMS:
            name = f"{steps} steps of rate {rate:g}, {form}, {TOTAL} updates"
            runs = each(name, lambda m, s, f=form, r=rate, n=steps: stepped(
                replace(case, updates=TOTAL), m, [r] * n, f, settings, s
            ))  # fmt: skip
            found[f"{steps} steps, {form}, {TOTAL}"] = (missing, runs)
    return found


def median(runs: list[Run], key: str) -> float:
    """Of all seeds."""
    return statistics.median(run[key] for run in runs)


def equal_quality(found: dict[str, tuple[float, list[Run]]], name: str) -> str:
    """Evaluations over those of the shortest plan that is at least as good."""
    gap, cost = (median(found[name][1], key) for key in ("gap", "evaluations"))
    if not abs(gap) < 10:
        return ""
    plans = [runs for key, (_, runs) in found.items() if key.startswith("plan")]
    good = [median(runs, "evaluations") for runs in plans if median(runs, "gap") <= gap]
    return f"{cost / min(good):.1f}" if good else "none as good"


def main(settings: Settings) -> None:
    """Write docs/benchmarks/planning.md; two seeds unless others were asked for."""
    if settings.seeds == Settings().seeds:
        settings = replace(settings, seeds=(0, 1))
    model, results = pretrained(settings), Results("planning", settings.quick)
    page = Page("planning", "A plan and one training against one training per step")
    page.text(INTRODUCTION)
    for name in OBJECTIVES[: 1 if settings.quick else None]:
        case = next(c for c in CASES if c.name.startswith(name))
        found = rows_of(case, model, results, settings)
        page.text(f"## {case.name} - {case.weight:g} KL")
        page.table(
            ["way, updates", "gap, %", "exact steps, %", "million evaluations", "CPU-s",
             "cost at equal quality"],
            [
                [
                    way, " / ".join(percent(run["gap"]) for run in runs),
                    "" if way.startswith("plan") else f"{100 * missing:.1f}",
                    f"{median(runs, 'evaluations'):.2f}", f"{median(runs, 'seconds'):.1f}",
                    "" if way.startswith("plan") else equal_quality(found, way),
                ]
                for way, (missing, runs) in found.items()
            ],
        )  # fmt: skip
    page.finish(settings)


INTRODUCTION = f"""\
The network, the objectives and the gap of [utilities](utilities.md), on {COUNT} samples; one gap
per seed. "plan" is `plan_and_tune`: a bank of samples, mirror descent on it, one training. "K
steps" is `mirror_descent` with K trainings that share {TOTAL} updates, with the constant rate
after whose exact steps, on the grid, least is missing ("exact steps": what is missing then).
Such a rate is not known in practice; it is found here in favour of the steps. Evaluations are
points times forward passes of networks: banks, roll-outs, updates, statistics; without the
measurement. Cost at equal quality: evaluations over those of the plan with the fewest updates
whose median gap is at most that of the steps. "diverged": not finite, or worse than ten times
the possible gain. The successive form needs the difference of two networks' scores close to t =
1."""
