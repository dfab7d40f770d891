"""All trained solvers at an equal number of network evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from common import Page, Paths, Settings, spread, walk
from ring import pretrained

from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.problem import ControlProblem, Solver
from tiltflow.recorder import count_evaluations
from tiltflow.rewards.points import Linear
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching, DirectBackprop, WeightedMatching
from tiltflow.training import Training

BUDGET = 1_000_000
"""Evaluations of the network by a whole solve: roll-outs, updates, calibration, statistics."""

OVERHEAD = 2 * 40 * 1024 + 3 * 40 * 1024
"""Of these, calibration and the statistics at the end, which are the same for all."""

STEPS = 40


@dataclass(frozen=True)
class Method:
    """A solver with updates to spend.

    Args:
        solver: for a number of updates.
        fixed: evaluations that do not depend on that number, beyond ``OVERHEAD``.
        per_update: evaluations of an update, roll-outs included.
        multiple: of so many updates.
    """

    solver: Callable[[Training], Solver[FlowModel]]
    fixed: int
    per_update: float
    multiple: int = 1

    def within(self, budget: int) -> Solver[FlowModel]:
        """The solver that spends the budget."""
        updates = int((budget - OVERHEAD - self.fixed) / self.per_update)
        updates = max(1, updates // self.multiple) * self.multiple
        return self.solver(Training(num_updates=updates, learning_rate=5e-3, ema=0.99))


def adjoint() -> Method:
    """256 trajectories and 20 updates a round; both models along each path."""
    per_round = 256 * STEPS * 2 + 20 * 256
    return Method(lambda t: AdjointMatching(training=t), 0, per_round / 20, 20)


def weighted(num_samples: int, rounds: int, proposal: str, neighbours: int = 512) -> Method:
    """One evaluation per sample and step, three from a mixed proposal; two per point."""
    banks = rounds + 2 * (rounds - 1) * (proposal == "mixed")
    return Method(
        lambda t: WeightedMatching(
            training=t, num_samples=num_samples, rounds=rounds, neighbours=neighbours,
            proposal=proposal,  # type: ignore[arg-type]
        ),
        num_samples * STEPS * banks, 2 * 256,
    )  # fmt: skip


def direct(depth: int | None) -> Method:
    """64 trajectories an update; the reference along the differentiated steps only."""
    return Method(
        lambda t: DirectBackprop(training=t, depth=depth), 0, 64 * (STEPS + (depth or STEPS))
    )


METHODS = {
    "`AdjointMatching`": adjoint(),
    "`WeightedMatching`, 3 mixed banks of 1024": weighted(1024, 3, "mixed"),
    "`WeightedMatching(neighbours=0)`, 1 bank of 8192": weighted(8192, 1, "reference", 0),
    "`DirectBackprop`": direct(None),
    "`DirectBackprop(depth=10)`": direct(10),
}


@dataclass(frozen=True)
class Run:
    """One solve, measured."""

    found: Paths
    evaluations: float
    seconds: float


CASES = {1.0: list(METHODS), 4.0: [n for n in METHODS if "(" not in n]}
"""Slopes of the reward, and who is asked: all, or those that can reach the optimum."""


def solve(method: Method, model: FlowModel, slope: float, settings: Settings, seed: int) -> Run:
    """One training within the budget, on a copy of the model that counts."""
    reward, counter, copy = Linear([slope, 0.0]), [0], model.clone()
    count_evaluations(copy.net, counter)
    begin = time.process_time()
    solver = method.within(BUDGET // 10 if settings.quick else BUDGET)
    tuned = solver.solve(ControlProblem(copy, reward), Context(Seed(seed))).model
    evaluations, seconds = counter[0], time.process_time() - begin
    count = min(settings.samples, 5000)
    run = Run(walk(tuned, model, reward, num_steps=100, count=count), evaluations, seconds)
    print(type(solver).__name__, slope, seed, run, flush=True)
    return run


def compare(page: Page, settings: Settings, model: FlowModel, slope: float) -> None:
    """The table of one reward."""
    runs = {
        name: [solve(method, model, slope, settings, seed) for seed in settings.seeds]
        for name, method in METHODS.items()
        if name in CASES[slope]
    }
    # log E exp(reward) is known best where path weights are most even.
    nearest = min((r.found for each in runs.values() for r in each), key=lambda f: f.gap)
    best = nearest.gap + nearest.objective
    page.text(f"## Reward {slope:g} x1", f"Best possible objective: {best:.3f}.")
    rows = [
        [
            name,
            spread([best - r.found.objective for r in each], 3),
            spread([r.found.reward for r in each], 2),
            spread([r.found.path_kl for r in each], 2),
            spread([r.evaluations / 1e6 for r in each], 2),
            spread([r.seconds for r in each], 1),
        ]
        for name, each in runs.items()
    ]
    head = ["method", "gap", "mean reward", "path KL", "million evaluations", "CPU-s"]
    page.table(head, rows)


def main(settings: Settings) -> None:
    """Write docs/benchmarks/solvers.md."""
    page = Page("solvers", "Trained solvers at an equal number of network evaluations")
    page.text(
        "The velocity network 3-128-128-128-2 of the [ring](ring.md), all parameters trained, "
        f"KL weight 1, learning rate 5e-3, {STEPS} steps. Every solve may evaluate the network "
        f"{BUDGET / 1e6:g} million times (points times forward passes: roll-outs, updates, "
        "calibration, final statistics; backward passes are not counted, but cost CPU-seconds). "
        "Gap: KL(P ‖ P*) of the path laws in nats, the best objective minus E r - path KL, on "
        "5000 paths of 100 steps of Euler-Maruyama, whose discretisation it contains. One number "
        "per seed. `WeightedMatching` uses values of the reward only, `DirectBackprop` gradients "
        "only, `AdjointMatching` both; `neighbours=0` is plain reward-weighted regression."
    )
    model = pretrained(settings)
    for slope in CASES:
        compare(page, settings, model, slope)
    page.finish(settings)
