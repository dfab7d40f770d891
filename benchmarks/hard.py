"""Rewards with separated modes and strong tilts: how much of the objective is reached."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from common import Page, Settings, log_normaliser, spread, walk

from tiltflow.analytic import GaussianMixture, ring
from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.potential import Differentiable, Potential
from tiltflow.problem import ControlProblem
from tiltflow.seed import Seed
from tiltflow.solvers import AdjointMatching


@dataclass(frozen=True)
class Case:
    """A mixture and a reward; ``says`` describes them in a sentence."""

    density: GaussianMixture
    reward: Potential
    says: str


def near_third(x: torch.Tensor) -> torch.Tensor:
    """-8 |x - m_3|, smooth at the mode itself."""
    mode = torch.tensor([2 * math.cos(3 * math.pi / 4), 2 * math.sin(3 * math.pi / 4)])
    return -8 * ((x - mode.to(x)).square().sum(1) + 0.01).sqrt()


def double_angle(x: torch.Tensor) -> torch.Tensor:
    """3 cos(2 angle), smoothed at the origin."""
    return 3 * (x[:, 0] ** 2 - x[:, 1] ** 2) / (x.square().sum(1) + 0.1)


CASES = {
    "two opposite arcs": Case(
        ring(), Differentiable(double_angle), "ring, 3 cos(2 angle): four modes lose their mass"
    ),
    "one mode of eight": Case(
        ring(), Differentiable(near_third), "ring, -8 |x - m₃|: nearly all mass moves to one mode"
    ),
    "strong slope": Case(
        ring(), Differentiable(lambda x: 4 * x[:, 0]), "ring, 4 x₁: log E exp r is far from E r"
    ),
    "two far modes": Case(
        GaussianMixture([[-3.0], [3.0]], 0.5),
        Differentiable(lambda x: 5 * x[:, 0].tanh()),
        "modes at ±3 of standard deviation 0.5, 5 tanh(x): log-odds of 10 between flat regions",
    ),
}
# What is compared: the settings, and the stages in which the reward is raised.
METHODS: dict[str, tuple[AdjointMatching, int]] = {
    "default": (AdjointMatching(), 1),
    "`use_values=False`": (AdjointMatching(use_values=False), 1),
    "default, in 3 stages": (AdjointMatching(), 3),
}


def start(case: Case, seed: int) -> FlowModel:
    """The exact flow with a fresh correction."""
    torch.manual_seed(seed)
    return case.density.flow()


def solve(
    case: Case, solver: AdjointMatching, stages: int, settings: Settings, seed: int
) -> tuple[FlowModel, float]:
    """Rewards r/stages, 2r/stages, ..., r, each started from the last; as many updates in all."""
    updates = solver.training.num_updates // stages
    solver = settings.shortened(
        replace(solver, training=replace(solver.training, num_updates=updates))
    )
    model, tuned = start(case, seed), None
    begin = time.process_time()
    for stage in range(1, stages + 1):
        problem = ControlProblem(model, (stage / stages) * case.reward)
        context = Context(Seed(seed).child("stage", stage))
        tuned = solver.solve(problem, context, init=tuned).model
    assert tuned is not None
    return tuned, time.process_time() - begin


def main(settings: Settings) -> None:
    """Write docs/benchmarks/hard.md."""
    page = Page("hard", "Hard rewards: separated modes and strong tilts")
    page.text(
        "Exact mixtures as pre-trained models, KL weight 1. Relative objective gap "
        "(G* - G) / (G* - G(pre)): 0 is the optimum, 1 is no progress. G = E r - path KL on "
        "200 steps of Euler-Maruyama, G* = log E_pre exp r from 4 million exact samples; path KL "
        "bounds the KL of the end points from above, and its discretisation is counted as a gap. "
        "One number per seed. In stages: the reward is raised to a third, two thirds and its full "
        "height, each stage started from the last one, with as many updates in all."
    )
    rows = []
    for name, case in CASES.items():
        exact = case.density.sample(40_000 if settings.quick else 4_000_000, Seed(123))
        values = case.reward.value(exact)
        best, before = log_normaliser(values), float(values.mean())
        for method, (solver, stages) in METHODS.items():
            gaps, seconds, rewards, kls = [], [], [], []
            for seed in settings.seeds:
                tuned, cost = solve(case, solver, stages, settings, seed)
                found = walk(
                    tuned, start(case, seed), case.reward, num_steps=200, count=settings.samples
                )
                gaps.append((best - found.objective) / (best - before))
                seconds.append(cost)
                rewards.append(found.reward)
                kls.append(found.path_kl)
                print(name, method, seed, f"gap {gaps[-1]:.4f}, CPU-s {cost:.1f}", flush=True)
            label = f"{name}: {method}"
            rows.append([
                label, spread(gaps, 4), spread(rewards, 2), spread(kls, 2), spread(seconds, 1)
            ])  # fmt: skip
        weights = torch.softmax(values.double(), 0)
        mean = float((weights * values).sum())
        label, gap_before = f"{name}: exact", f"0 (G* {best:.3f}, before {before:.3f})"
        rows.append([label, gap_before, f"{mean:.2f}", f"{mean - best:.2f}", ""])
    page.text("\n".join(f"- {name}: {case.says}." for name, case in CASES.items()))
    page.table(["problem: method", "relative gap", "mean reward", "path KL", "CPU-s"], rows)
    page.finish(settings)
