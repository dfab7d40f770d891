"""Cost, densities and frontier of ``tfft.py``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tfft_toys import (
    CASES,
    PLANE,
    Axes,
    Case,
    Counted,
    adjoint_matching,
    counting,
    exact,
    histogram,
    looked,
    mixture,
    on_grid,
    planning,
    run,
    tail_masses,
)
from toys import Record, Store

from tiltflow.context import Context
from tiltflow.density import Quadrature
from tiltflow.flow import FlowModel
from tiltflow.problem import ControlProblem, Solution
from tiltflow.ratio import Likelihood
from tiltflow.seed import Seed
from tiltflow.utilities import LeftCVaR, RightCVaR

# --- cost ----------------------------------------------------------------------------------------

R = mixture.REWARD
COSTS = tuple(
    Case(name, f"{title}, weight {weight:g}", *PLANE, utility, weight)
    for name, title, utility, weight in (
        ("left-0.1", "left 0.1", LeftCVaR(R, 0.1), 2.0),
        ("left-0.2", "left 0.2", LeftCVaR(R, 0.2), 2.0),
        ("right-0.8", "right 0.8", RightCVaR(R, 0.8), 2.0),
        ("right-0.9-4", "right 0.9", RightCVaR(R, 0.9), 4.0),
        ("right-0.9", "right 0.9", RightCVaR(R, 0.9), 2.0),
    )
)
"""Tails whose cost is compared with that of the mean."""


def cost(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both trainings, one after the other, so that they see the same load of the machine."""
    for seed in seeds:
        store.get(f"mean/{seed}", lambda s=seed: mean_cost(s, quick))
        for case in COSTS:
            store.get(f"{case.name}/{seed}", lambda c=case, s=seed: tail_cost(c, s, quick))


def mean_cost(seed: int, quick: bool) -> Record:
    """One fine-tuning for the mean reward, of the same solver."""
    model, counter = counting(PLANE[0](quick))
    problem, begin = ControlProblem(model, (1 / COSTS[0].weight) * R), time.process_time()
    adjoint_matching(quick).solve(problem, Context(Seed(seed)))
    spent = time.process_time() - begin
    return {"evaluations": counter[0], "inside": counter[0], "cpu": spent}


def tail_cost(case: Case, seed: int, quick: bool) -> Record:
    """Bank, threshold, one training and the statistics after it."""
    model, counter = counting(case.model(quick))
    solver, begin = Counted(adjoint_matching(quick), counter), time.process_time()
    solution = run(replace(case, model=lambda quick: model), solver, seed, quick)
    spent = time.process_time() - begin
    kept = {k: solution.stats[k] for k in ("active", "tail_mass", "rounds")}
    return {"evaluations": counter[0], "inside": solver.inside, "cpu": spent, **kept}


# --- densities -----------------------------------------------------------------------------------


def densities(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Tuned laws against exact ones."""
    for seed in seeds:
        for case in CASES:
            best = store.get(f"exact/{case.name}", lambda c=case: exact(c, quick))
            store.get(f"{case.name}/{seed}", lambda c=case, s=seed, b=best: tuned(c, s, b, quick))


def tuned(case: Case, seed: int, best: Record, quick: bool) -> Record:
    """One tail-aware fine-tuning, and how far its law is from the optimum."""
    solution = run(case, adjoint_matching(quick, steps=case.steps), seed, quick)
    stats, model = solution.stats, solution.model
    optimum, q = case.best(quick).p, case.law(quick)
    planned = q.tilted((1 / case.weight) * case.hinge(stats["threshold"]))
    found = looked(case, model, quick) | tail_masses(case, model, stats["threshold"], quick)
    edges = torch.tensor(best["laws"]["edges"], dtype=torch.float64)
    for name in ("sampler", "ode"):
        bins = histogram(found.pop(f"rewards_{name}"), edges)
        if seed == 0:
            found[f"bins_{name}"] = bins
    law = law_of(model, list(q.axes))
    found |= {"tv": law.total_variation(optimum), "tv_before": q.total_variation(optimum)}
    bank = on_grid(case, planned, quick) | {"tv": planned.total_variation(optimum)}
    keys = ("threshold", "active", "plan_objective", "plan_kl", "path_kl")
    return found | {k: stats[k] for k in keys} | {f"bank_{k}": v for k, v in bank.items()}


def law_of(model: FlowModel, axes: Axes) -> Quadrature:
    """The density of a model's ODE on a grid."""
    log = Likelihood(model)
    return Quadrature.of(axes, lambda x: log.value(x.float()).double())


# --- frontier ------------------------------------------------------------------------------------

STEPS = (1, 2, 4, 8)
"""Trainings of Flow Density Control, which share the updates of the one training."""

SHARED = 2000
"""Updates of every method of the frontier."""

WEIGHTS = {"left": (2.0, 0.5, 1.0), "right": (2.0, 5.0, 3.0)}
CURVE = tuple(0.3 * 1.15**i for i in range(40))
"""Weights of the exact frontiers."""


def frontier_case(side: str, weight: float) -> Case:
    """A tail in the plane with a weight."""
    utility = LeftCVaR(R, 0.1) if side == "left" else RightCVaR(R, 0.9)
    return Case(side, f"{side}, weight {weight:g}", *PLANE, utility, weight)


def frontier(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Tail mean against KL: the tail-aware method, the mean, and steps, at equal updates."""
    for side in WEIGHTS:
        store.get(f"curve/{side}", lambda s=side: curve(s, quick))
    for seed in seeds:
        for pair in list(zip(*WEIGHTS.values(), strict=True))[: 1 if quick else None]:
            for side, weight in zip(WEIGHTS, pair, strict=True):
                _one_weight(store, frontier_case(side, weight), seed, quick)


def _one_weight(store: Store, case: Case, seed: int, quick: bool) -> None:
    key = f"{case.name}/{case.weight:g}"
    store.get(f"exact/{key}", lambda: exact(case, quick))
    store.get(f"tail/{key}/{seed}", lambda: point(case, quick, lambda m: run(
        replace(case, model=lambda quick: m), adjoint_matching(quick, SHARED), seed, quick
    )))  # fmt: skip
    store.get(f"mean/{key}/{seed}", lambda: point(case, quick, lambda m: adjoint_matching(
        quick, SHARED
    ).solve(ControlProblem(m, (1 / case.weight) * R), Context(Seed(seed)))))  # fmt: skip
    for steps in STEPS[: 2 if quick else None]:
        rate = store.get(f"rate/{steps}/{key}", lambda k=steps: rate_of(case, k, quick))["rate"]
        store.get(f"steps-{steps}/{key}/{seed}", lambda k=steps, r=rate: point(
            case, quick, lambda m: stepped(case, m, [r] * k, seed, quick)
        ))  # fmt: skip


def rate_of(case: Case, steps: int, quick: bool) -> Record:
    """The constant rate after whose exact steps, on the grid, least is missing."""
    best, q = exact(case, quick), case.law(quick)
    optimum = mixture.Best(best["before"], best["objective"], best["kl"], 0.0)
    missing, rate = planning.best_rate(_as_benchmark(case), q, optimum, steps)
    return {"rate": rate, "missing": missing}


def stepped(
    case: Case, model: FlowModel, rates: list[float], seed: int, quick: bool
) -> Solution[FlowModel]:
    """Flow Density Control in its anchored form, the updates shared by the steps."""
    settings = mixture.Settings(quick=quick)
    return planning.stepped(_as_benchmark(case), model, rates, "anchored", settings, seed)


def _as_benchmark(case: Case) -> planning.Case:
    solver = adjoint_matching(False, SHARED)
    return planning.Case(
        case.title, case.utility, case.weight, updates=SHARED,
        learning_rate=solver.training.learning_rate,
    )  # fmt: skip


def point(case: Case, quick: bool, work: Callable[[FlowModel], Solution[FlowModel]]) -> Record:
    """A point of the frontier and its cost."""
    model, counter = counting(case.model(quick))
    begin = time.process_time()
    solution = work(model)
    found = {"evaluations": counter[0], "cpu": time.process_time() - begin}
    return found | looked(case, solution.model, quick)


def curve(side: str, quick: bool) -> Record:
    """Exact tail mean and KL of the tail's optima and of the tilts of the mean."""
    found: Record = {"tail": [], "mean": []}
    for weight in CURVE:
        case = frontier_case(side, weight)
        laws = {"tail": case.best(quick).p, "mean": case.law(quick).tilted((1 / weight) * R)}
        for name, p in laws.items():
            at = on_grid(case, p, quick)
            found[name].append([at["kl"], at["tail"], weight])
    return found
