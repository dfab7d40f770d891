"""Every utility with every divergence on a grid: mirror descent against a second route."""

from __future__ import annotations

import sys
import time

from common import ROOT, Page, Settings

sys.path.insert(0, str(ROOT.parent / "tests"))

from oracles.pairs import COUNT, DIVERGENCES, MASS, UTILITIES, Pair


def row(utility: str, divergence: str) -> list[str]:
    """Solve one pair both ways."""
    pair, begin = Pair.of(utility, divergence), time.process_time()
    reached, steps = pair.by_mirror_descent()
    seconds = time.process_time() - begin
    best, start = pair.by_second_route(), float(pair.value(MASS, 0.0))
    gain = max(reached, best) - start
    print(f"{utility} - {divergence}: {(best - reached) / gain:.1e}", flush=True)
    return [
        utility, divergence, pair.objective.curvature, f"{gain:.4f}",
        f"{(best - reached) / gain:+.1e}", str(steps), f"{seconds:.1f}",
    ]  # fmt: skip


def main(settings: Settings) -> None:
    """Write docs/benchmarks/pairs.md."""
    page = Page("pairs", "Utility and divergence on a grid: mirror descent and a second route")
    page.text(
        f"Two Gaussians on a line of {COUNT} nodes; objective = utility - weight x divergence, "
        "with the coefficients of `tests/oracles/pairs.py`. Mirror descent: `LineSearch` with the "
        "exact `GridSolver`, directly and by way of the rounded objectives where there are any. "
        "Second route: values written from the formulas without the library, gradients by "
        "autograd, L-BFGS with kinks smoothed less and less, from two starts, and from four where "
        "the objective is not concave. *Below* is (second route - mirror descent) / gain; "
        "negative where mirror descent has found more. Objectives that are not concave may have "
        "several optima; the weights are such that mirror descent is not caught in a poor one.",
    )
    utilities = list(UTILITIES)[:2] if settings.quick else list(UTILITIES)
    rows = [row(u, d) for u in utilities for d in DIVERGENCES]
    head = ["utility", "divergence", "objective", "gain", "below", "steps", "CPU-s"]
    page.table(head, rows)
    page.finish(settings)
