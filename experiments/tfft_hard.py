"""Starvation of ``tfft.py``: a weight that the bank does not support."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tfft_toys import (
    GAUSSIAN,
    Case,
    X,
    adjoint_matching,
    counting,
    exact,
    looked,
    run,
    solver_named,
    tail_masses,
)
from toys import Record, Store, tail_mean

from tiltflow.errors import UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.problem import Solution
from tiltflow.utilities import RightCVaR

FAR = Case("far", "N(0, 1), right 0.9, weight 1", *GAUSSIAN, RightCVaR(X, 0.9), 1.0)
"""4.7 nats away: a bank of 10,000 has nothing beyond the threshold."""

PER_ROUND = 1000
"""Updates of each training."""

CURES: Mapping[str, Mapping[str, Any]] = {
    "forced": {"anyway": True},
    "rounds": {"max_rounds": 6, "ease": "weight"},
    "level": {"max_rounds": 6, "ease": "level"},
    "width": {"max_rounds": 6, "ease": "width"},
    "weighted": {"max_rounds": 6, "ease": "weight", "solver": "weighted"},
    "weighted-width": {"max_rounds": 6, "ease": "width", "solver": "weighted"},
}
"""Options of ``tail_aware``, and a solver other than Adjoint Matching."""


def starvation(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """What happens where the bank is too small, with and without a cure."""
    best = store.get("exact", lambda: exact(FAR, quick))
    for seed in seeds:
        store.get(f"refused/{seed}", lambda s=seed: refused(s))  # seconds, also in a smoke run
        for name, options in CURES.items():
            store.get(
                f"{name}/{seed}", lambda o=options, s=seed: cured(o, s, best["threshold"], quick)
            )


def refused(seed: int) -> Record:
    """What the refusal says."""
    try:
        run(FAR, adjoint_matching(False, PER_ROUND), seed, False)
    except UnsupportedError as error:
        return {"text": str(error)}
    return {"text": ""}


def cured(options: Mapping[str, Any], seed: int, threshold: float, quick: bool) -> Record:
    """One call of ``tail_aware``; tail masses are those beyond the exact threshold."""
    model, counter = counting(FAR.model(quick))
    case, rounds = replace(FAR, model=lambda quick: model), list[Record]()

    def note(r: int, found: Any, solution: Solution[FlowModel]) -> None:
        kept = ("weight", "level_mass", "threshold", "active", "tail_mass", "tail", "path_kl")
        known = {k: solution.stats[k] for k in kept if k in solution.stats}
        rounds.append(known | {"outcome": solution.result.name})

    rest = dict(options)
    solver = solver_named(rest.pop("solver", "adjoint"), PER_ROUND, quick)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            solution = run(case, solver, seed, quick, on_round=note, **rest)
        except UnsupportedError as error:
            return {"failed": str(error), "trace": rounds, "evaluations": counter[0]}
    found: Record = {"evaluations": counter[0], "cpu": time.process_time() - begin}
    found |= {"trace": rounds, "outcome": solution.result.name, "stats": dict(solution.stats)}
    found |= {"threshold": solution.stats["threshold"]}
    found |= looked(FAR, solution.model, quick) | masses(FAR, solution.model, threshold, quick)
    return found


def masses(case: Case, tuned: FlowModel, threshold: float, quick: bool) -> Record:
    """Tail masses, and tail means of the same samples."""
    found = tail_masses(case, tuned, threshold, quick)
    for name in ("sampler", "ode"):
        rewards = found.pop(f"rewards_{name}")
        found[f"tail_{name}"] = tail_mean(rewards, case.utility.mass, case.side)
    return found
