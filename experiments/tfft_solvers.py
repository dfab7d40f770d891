"""Adjoint Matching against Weighted Matching for the same thresholds, of ``tfft.py``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import tfft_digits
from tfft_plane import frontier_case
from tfft_toys import Case, counting, exact, looked, run, solver_named
from toys import Record, Store

from tiltflow.errors import NonFiniteError

BUDGETS = (250, 1000, 4000)
"""Updates."""

ON_DIGITS = (100, 400)
"""Of the digits, where roll-outs are dear."""

COMPARED = (
    frontier_case("left", 2.0), frontier_case("left", 0.5),
    frontier_case("right", 5.0), frontier_case("right", 2.0),
)  # fmt: skip


def solvers(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both solvers for the same thresholds, with a few budgets."""
    for case in COMPARED[: 1 if quick else None]:
        key = f"{case.name}/{case.weight:g}"
        store.get(f"exact/{key}", lambda c=case: exact(c, quick))
        for seed in seeds:
            for updates in BUDGETS[: 1 if quick else None]:
                for name in ("adjoint", "weighted"):
                    store.get(
                        f"{name}-{updates}/{key}/{seed}",
                        lambda c=case, n=name, u=updates, s=seed: solved(c, n, u, s, quick),
                    )
    for seed in seeds:
        for updates in ON_DIGITS[: 1 if quick else None]:
            for name in ("adjoint", "weighted"):
                store.get(
                    f"digits-{name}-{updates}/{seed}",
                    lambda n=name, u=updates, s=seed: on_digits(store, n, u, s, quick),
                )


def solved(case: Case, name: str, updates: int, seed: int, quick: bool) -> Record:
    """One tail-aware fine-tuning with one of the solvers; no numbers where it diverges."""
    model, counter = counting(case.model(quick))
    counted = replace(case, model=lambda quick: model)
    begin = time.process_time()
    try:
        solution = run(counted, solver_named(name, updates, quick), seed, quick)
    except NonFiniteError as error:
        return {"failed": str(error), "evaluations": counter[0]}
    found = {"evaluations": counter[0], "cpu": time.process_time() - begin}
    kept = {k: solution.stats[k] for k in ("threshold", "tail_mass", "path_kl")}
    return found | kept | {"outcome": solution.result.name} | looked(case, solution.model, quick)


def on_digits(store: Store, name: str, updates: int, seed: int, quick: bool) -> Record:
    """The least readable digits; with all updates they are those of ``digits``."""
    task = tfft_digits.tasks()[0]
    chosen = tfft_digits.adjoint if name == "adjoint" else tfft_digits.weighted

    def made() -> Record:
        return tfft_digits.measured(
            task, seed, quick,
            lambda m: tfft_digits.tuned(task, m, seed, quick, chosen(quick, updates)),
        )  # fmt: skip

    if updates != tfft_digits.UPDATES:
        return made()
    key = {"adjoint": "tail", "weighted": "weighted"}[name]
    known: Record = Store(store.path.with_name("digits.json")).get(
        f"{key}/{task.name}/{seed}", made
    )
    return known
