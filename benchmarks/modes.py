"""Diverse mode discovery with trained components: two copies of a bimodal model."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace

import torch
from common import Page, Settings
from mixture import law
from utilities import Results, column, percent

from tiltflow.algorithms import discover_modes
from tiltflow.analytic import GaussianMixture
from tiltflow.context import Context
from tiltflow.density import FlowDensity, Quadrature
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching
from tiltflow.solvers.exact import GridSolver
from tiltflow.types import Estimate
from tiltflow.utilities import MutualInformation

DENSITY = GaussianMixture([[-2.0], [2.0]], 0.5)
ANCHOR, RATES, UPDATES, COUNT = 0.2, (1.0,) * 4, 500, 5000
BEST = (1 - ANCHOR) * math.log(2)
"""Of I - anchor KL: one mode for each component."""


def on_grid() -> list[float]:
    """The objective after each exact iteration."""
    q, seen = Quadrature.of([torch.linspace(-7, 7, 401).double()], DENSITY.log), list[float]()

    def note(k: int, worth: Estimate) -> None:
        seen.append(worth.value)

    discover_modes(
        q, 2, GridSolver(), RATES, prior=q, density=lambda p, seed: p, anchor=ANCHOR,
        context=Context(Seed(0)), on_iterate=note,
    )  # fmt: skip
    return seen


def trained(seed: int, updates: int) -> dict[str, float]:
    """Two components, and what their own ODE laws are worth."""
    torch.manual_seed(seed)
    model, begin = DENSITY.flow(hidden=(128, 128, 128)), time.process_time()
    solver = AdjointMatching()
    solver = replace(solver, training=replace(solver.training, num_updates=updates))
    solutions = discover_modes(
        model, 2, solver, RATES, prior=FlowDensity(model, seed=Seed(12).child(seed)),
        density=lambda m, where: FlowDensity(m, seed=where), anchor=ANCHOR,
        context=Context(Seed(seed)),
    )  # fmt: skip
    seconds = time.process_time() - begin
    a, b = (law(s.model, COUNT) for s in solutions)
    information, kl = MutualInformation((b,)).value(a), 0.0
    for p in (a, b):
        ratio = p.log.value(p.bank.points) - DENSITY.log.value(p.bank.points)
        kl += 0.5 * float(ratio.double().mean())
    means = sorted(float(p.bank.points.mean()) for p in (a, b))
    return {
        "gap": 1 - (information.value - ANCHOR * kl) / BEST, "information": information.value,
        "kl": kl, "left": means[0], "right": means[1], "seconds": seconds,
    }  # fmt: skip


def main(settings: Settings) -> None:
    """Write docs/benchmarks/modes.md; five seeds unless others were asked for."""
    if not settings.quick and settings.seeds == Settings().seeds:
        settings = replace(settings, seeds=(0, 1, 2, 3, 4))
    updates, results = 20 if settings.quick else UPDATES, Results("modes", settings.quick)
    runs = [
        results.of(f"{updates} updates, {len(RATES)} rates, seed {s}",
                   lambda s=s: trained(s, updates))
        for s in settings.seeds
    ]  # fmt: skip
    page = Page("modes", "Diverse modes with trained components")
    page.text(
        "Two copies of the exact flow of two Gaussians at -2 and 2 (standard deviation 0.5), "
        "each with a correction network 1-128-128-128-1, are tuned by `discover_modes`: I(X; Z) "
        f"- {ANCHOR:g} KL, {len(RATES)} iterations of {UPDATES} updates of `AdjointMatching` for "
        f"each component. The optimum, one mode each, is worth {BEST:.4f}; exact iterations on a "
        f"grid reach {' / '.join(f'{v:.4f}' for v in on_grid())}. Laws and log-densities are "
        "those of the tuned networks' ODEs; gap: 1 - value / optimum, from 0 where the components "
        "are equal. Median and range over the seeds.",
    )
    page.table(
        ["", "gap, %", "I, nats (log 2 = 0.693)", "KL, nats", "mean of the left one",
         "mean of the right one", "CPU-s"],
        [[
            "trained", percent(column(runs, "gap")),
            *(f"{statistics.median(column(runs, key)):.3f}"
              for key in ("information", "kl", "left", "right")),
            f"{statistics.median(column(runs, 'seconds')):.0f}",
        ]],
    )  # fmt: skip
    page.finish(settings)
