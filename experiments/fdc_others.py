"""Transport, exploration and the ablation of ``fdc.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fdc_runs import RISK, as_published, exact_steps, rounded, solver_of, stepwise
from torch import Tensor
from toys import Record, Store, kl, law_on_grid, planned, samples

from tiltflow.algorithms import Planning, plan, plan_and_tune
from tiltflow.context import Context
from tiltflow.density import Empirical, Quadrature, Reweighted
from tiltflow.divergences import KL, Wasserstein
from tiltflow.experiment import Plan
from tiltflow.flow import FlowModel
from tiltflow.problem import ControlProblem
from tiltflow.ratio import Likelihood
from tiltflow.utilities import Entropy, ExpectedReward

# --- reward and transport ------------------------------------------------------------------------

METRICS = {"a": (1.0, 7.0), "b": (7.0, 1.0)}
"""Diagonals of the ground metrics."""

POINTS = 2000
"""Samples on each side of a measured transport."""

PUBLISHED_WEIGHT = 1 / 0.65
"""Weight of the KL of the mean reward (the paper's 1.538)."""


def wasserstein(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both metrics, the reward alone, and the exact optimum on a coarse grid."""
    for m in METRICS:
        store.get(f"exact/{m}", lambda m=m: _exact_transport(m, quick))
    store.get("exact/mean", lambda: _exact_mean(quick))
    for seed in seeds:
        store.get(f"floor/{seed}", lambda s=seed: _floor(s))
        store.get(f"mean/{seed}", lambda s=seed: _reward_alone(s, quick))
        for m in METRICS:
            store.get(f"planned/{m}/{seed}", lambda m=m, s=seed: _with_transport(m, s, quick))


def _look(run: Plan, model: FlowModel) -> Record:
    """Mean reward, mean shift, and exact transport between samples in both metrics."""
    seed = run.experiment.seed
    x = samples(model, 20_000, seed)
    y = samples(run.pretrained.model, POINTS, seed + 1000)
    centre = torch.tensor(run.resolved["models"]["pretrained"]["mean"])
    right, up = (x.mean(0) - centre).tolist()
    points = {"points": rounded(x)} if seed == 0 else {}
    return {"mean": float(run.reward.value(x).mean()), "right": right, "up": up, **points} | {
        f"w1_{m}": _transport(x[:POINTS], y, metric) for m, metric in METRICS.items()
    }


def _transport(x: Tensor, y: Tensor, metric: Sequence[float]) -> float:
    """Exact discrete W1 of two samples."""
    distance = Wasserstein(Empirical(y), power=1, metric=metric, max_points=POINTS)
    return distance.value(Empirical(x)).value


def _floor(seed: int) -> Record:
    """What two independent samples of the pre-trained law are apart."""
    run = planned("fdc_wasserstein_a", f"seed={seed}")
    return _look(run, run.pretrained.model)


def _with_transport(m: str, seed: int, quick: bool) -> Record:
    run = planned(f"fdc_wasserstein_{m}", f"seed={seed}")
    settings = run.experiment.algorithm.planning
    settings = Planning(bank_size=500, max_iterations=2) if quick else settings
    solution = plan_and_tune(
        run.objective, run.pretrained.model, solver_of(run, quick), prior=run.prior,
        context=Context(run.seed), settings=settings,
    )  # fmt: skip
    return _look(run, solution.model) | {"rounds": solution.stats["rounds"]}


def _reward_alone(seed: int, quick: bool) -> Record:
    run = planned("fdc_wasserstein_a", f"seed={seed}")
    problem = ControlProblem(run.pretrained.model, (1 / PUBLISHED_WEIGHT) * run.reward)
    solution = solver_of(run, quick).solve(problem, Context(run.seed.child("mean")))
    return _look(run, solution.model)


def _coarse(run: Plan, quick: bool) -> Quadrature:
    centre = run.resolved["models"]["pretrained"]["mean"]
    nodes = 9 if quick else 34
    return law_on_grid(run, [torch.linspace(c - 10.5, c + 19.2, nodes) for c in centre])


def _of_law(run: Plan, p: Quadrature, q: Quadrature) -> Record:
    mean = (p.probabilities[:, None] * p.nodes).sum(0) - torch.tensor(
        run.resolved["models"]["pretrained"]["mean"], dtype=torch.float64
    )
    found = {"mean": float(p.expect(run.reward.value)), "right": float(mean[0])}
    found |= {"up": float(mean[1]), "kl": kl(p, q)}
    for m, metric in METRICS.items():
        distance = Wasserstein(q, power=1, metric=metric, max_points=len(q.nodes))
        found[f"w1_{m}"] = distance.value(p).value
    return found


def _exact_transport(m: str, quick: bool) -> Record:
    """Mirror descent on all nodes of the grid."""
    run = planned(f"fdc_wasserstein_{m}")
    q = _coarse(run, quick)
    table = run.resolved["objective"]["divergences"]
    weight = {each["kind"]: each["weight"] for each in table}
    distance = Wasserstein(q, power=1, metric=METRICS[m], max_points=len(q.nodes))
    objective = (
        ExpectedReward(run.reward) - weight["Wasserstein"] * distance - weight["KL"] * KL(q)
    )
    start = Reweighted(q.bank, q.log)
    settings = Planning(min_effective=1e-6, max_iterations=2 if quick else 60)
    found = plan(objective, start, settings, prior=q)
    return _of_law(run, q.tilted(found.potential), q) | {
        "iterations": found.iterations, "stationarity": found.stationarity,
    }  # fmt: skip


def _exact_mean(quick: bool) -> Record:
    run = planned("fdc_wasserstein_a")
    q = _coarse(run, quick)
    return _of_law(run, q.tilted((1 / PUBLISHED_WEIGHT) * run.reward), q)


# --- exploration ---------------------------------------------------------------------------------

ALPHAS = (0.0, 0.01, 0.1, 0.5, 1.0)
"""Weights of the KL."""


def exploration(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """All weights, in steps, and the exact powers of the pre-trained law."""
    store.get("exact", _exact_powers)
    for seed in seeds:
        store.get(f"pretrained/{seed}", lambda s=seed: _entropy_of_start(s))
        for alpha in ALPHAS:
            store.get(f"{alpha:g}/{seed}", lambda a=alpha, s=seed: _explored(a, s, quick))


def _entropy(model: FlowModel, seed: int) -> Record:
    """By the likelihood of the flow's ODE, on fresh samples."""
    x = samples(model, 8192, seed)
    log = Likelihood(model, 40).value(x)
    points = {"points": rounded(x)} if seed == 0 else {}
    return {"entropy": -float(log.mean()), "spread": float(x.std(0).mean()), **points}


def _entropy_of_start(seed: int) -> Record:
    run = planned("fdc_exploration", f"seed={seed}")
    return _entropy(run.pretrained.model, seed)


def _explored(alpha: float, seed: int, quick: bool) -> list[Record]:
    """The entropy after each step."""
    run = planned("fdc_exploration", f"seed={seed}")
    objective = Entropy() - alpha * KL(run.prior) if alpha else 1.0 * Entropy()
    rates = run.experiment.algorithm.rates
    assert rates is not None
    return stepwise(
        run, objective, solver_of(run, quick), rates, lambda model: _entropy(model, seed)
    )


def exponents(alpha: float, rates: Sequence[float]) -> list[float]:
    """e_k with p_k ~ p_pre^(e_k): e_{k+1} = (1 - g) e_k + rate alpha, g = rate (1 + alpha)."""
    found, e = [], 1.0
    for rate in rates:
        e = (1 - rate * (1 + alpha)) * e + rate * alpha
        found.append(e)
    return found


def _exact_powers() -> dict[str, Any]:
    """Entropies of powers of the law on a grid, and of exact mirror descent as a check."""
    run = planned("fdc_exploration")
    q = law_on_grid(run, [torch.linspace(-10, 10, 401)] * 2)
    rates = run.experiment.algorithm.rates
    assert rates is not None
    found: dict[str, Any] = {"pretrained": float(Entropy().value(q).value)}
    for alpha in ALPHAS:
        powers = exponents(alpha, rates)
        laws = [Quadrature(q.axes, e * q.table) for e in powers]
        objective = Entropy() - alpha * KL(q) if alpha else 1.0 * Entropy()
        steps = exact_steps(objective, q, rates, lambda p: p)
        found[f"{alpha:g}"] = {
            "exponents": powers,
            "limit": alpha / (1 + alpha),
            "entropy": [Entropy().value(p).value for p in laws],
            "kl": [kl(p, q) for p in laws],
            "deviation": max(a.total_variation(b) for a, b in zip(laws, steps, strict=True)),
        }
    return found


# --- ablation ------------------------------------------------------------------------------------

UPDATES, ETAS = (100, 1000), (1.0, 10.0)
"""Updates per step and inverse rates."""


def ablation(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Steps as published on the risk-averse problem, over K, N and eta.

    One combination is that of the risk-averse experiment, and shared with its results.
    """
    risk = Store(store.path.with_name("risk.json"))
    count = 2 if quick else 6
    for eta in ETAS:
        store.get(f"exact/{eta:g}", lambda e=eta: _exact_risk_steps(e, count, quick))
    for updates in UPDATES:
        for eta in ETAS:
            for seed in seeds:
                key = f"{updates}/{eta:g}/{seed}"
                store.get(
                    key, lambda n=updates, e=eta, s=seed: _steps(risk, n, e, s, count, quick)
                )


def _steps(
    store: Store, updates: int, eta: float, seed: int, count: int, quick: bool
) -> list[Record]:
    if not quick and (updates, 1 / eta) == (RISK.updates, RISK.rates[0]):
        known: list[Record] = store.get(
            f"steps/{seed}", lambda: RISK.steps(RISK.plan(seed), quick)
        )
        return known
    run = RISK.plan(seed)
    solver = as_published(solver_of(run, quick, updates))
    objective = 1.0 * run.experiment.objective.utility
    return stepwise(
        run, objective, solver, [1 / eta] * count, lambda m: RISK.look(run, m), "successive"
    )


def _exact_risk_steps(eta: float, count: int, quick: bool) -> list[Record]:
    run = RISK.plan(0)
    q = law_on_grid(run, RISK.axes(quick))
    return exact_steps(
        1.0 * run.experiment.objective.utility,
        q,
        [1 / eta] * count,
        lambda p: RISK.on_grid(run, p, q),
    )
