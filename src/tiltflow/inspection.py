"""What a run would be: its objects, whether they fit, how long it takes. Does no work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from tiltflow.config import Leaf, Name, Node, Table
from tiltflow.experiment import Plan
from tiltflow.flow import FlowModel, device_of
from tiltflow.run import check
from tiltflow.seed import Seed
from tiltflow.tables import TailAware
from tiltflow.training import Training
from tiltflow.types import Conditions, drawn_cond

BACKWARD = 2.5
"""Cost of a vector-Jacobian product or of an update, in forward evaluations (about)."""


@final
@dataclass(frozen=True)
class Cost:
    """A rough estimate: network evaluations, seconds on this machine, bytes."""

    evaluations: float
    seconds: float
    bytes: float


def describe(tree: Table, plan: Plan) -> str:
    """Object tree, ability check, and an estimate of time and memory, as text."""
    offered = check(plan)
    cost = estimate(plan)
    solver = plan.experiment.solver
    lines = [
        *tree_lines(tree), "",
        f"objective   {plan.objective}",
        f"abilities   its first variation offers {offered}; {type(solver).__name__} needs "
        f"{solver.needs}: fine",
        f"parameters  {_count(plan):,} trained",
        f"evaluations about {cost.evaluations:,.0f} (in forward units)",
        f"time        about {duration(cost.seconds)} on this machine",
        f"memory      about {cost.bytes / 2**20:,.0f} MiB beside Python and torch",
    ]  # fmt: skip
    return "\n".join(lines)


def tree_lines(node: Node, depth: int = 0) -> Iterator[str]:
    """A resolved file as an indented tree of objects."""
    for key, child in node.children().items():
        label = f"{'  ' * depth}{key.rstrip('_')}"
        if isinstance(child, Leaf | Name) or not child.children():
            if child.plain not in (None, {}, []):
                yield f"{label} = {child.plain!r}"
            continue
        if not isinstance(child, Table) and not any(
            c.children() for c in child.children().values()
        ):
            yield f"{label} = {child.plain!r}"
            continue
        kind = child.kind if isinstance(child, Table) and child.kind else ""
        yield f"{label}: {kind}".rstrip()
        yield from tree_lines(child, depth + 1)


def estimate(plan: Plan) -> Cost:
    """Time a few evaluations of the network and count how often they will be needed."""
    experiment = plan.experiment
    settings, sampler = experiment.evaluate, plan.training_sampler
    solver = experiment.solver
    training = getattr(solver, "training", None)
    updates = training.num_updates if isinstance(training, Training) else 0
    paths = int(getattr(solver, "num_trajectories", 256))
    solve = evaluations_of_solve(solver, updates, sampler.num_steps)
    trainings, drawn = _planned_work(plan)
    solves, banks = trainings + (experiment.baseline is not None), drawn * sampler.num_steps
    if experiment.baseline is not None:
        banks += experiment.baseline.num_samples * sampler.num_steps
    models = 2 + (experiment.baseline is not None)
    final_draws = models * settings.num_samples * settings.sampler.num_steps * 3
    evaluations = solves * solve + banks + final_draws
    cond = drawn_cond(plan.conditions, 64, plan.seed.child("size"))
    size = plan.pretrained.model.space.dimension(64, cond).max().item() * 4
    memory = paths * sampler.num_steps * size * 4 + 3 * size * experiment.algorithm.num_samples
    parameters = sum(p.numel() for p in plan.pretrained.model.net.parameters())
    memory += 4 * 6 * (parameters + _count(plan)) + 2 * 1024 * sampler.num_steps * size
    seconds = seconds_per_state(plan.pretrained.model, plan.seed, paths, plan.conditions)
    return Cost(evaluations, evaluations * seconds, memory)


def evaluations_of_solve(solver: object, updates: int, num_steps: int) -> float:
    """Roll-outs, adjoints and updates of one training, in forward units."""
    paths = int(getattr(solver, "num_trajectories", 256))
    reuse = max(1, int(getattr(solver, "updates_per_rollout", 1)))
    batch = int(getattr(solver, "batch_size", None) or 256)
    rollouts = updates / reuse * paths * num_steps * (2 + BACKWARD)
    return rollouts + updates * batch * (1 + BACKWARD)


def _planned_work(plan: Plan) -> tuple[int, int]:
    """Trainings (at most) of the main solve, and samples drawn for its banks."""
    algorithm = plan.experiment.algorithm
    if isinstance(algorithm, TailAware):
        rounds = algorithm.max_rounds
        return rounds, rounds * (algorithm.bank_size + algorithm.num_samples)
    banks = (algorithm.num_iterations + 1) * algorithm.num_samples
    bank = algorithm.planning.bank_size if plan.planned else 0
    return algorithm.num_iterations, banks + bank


@torch.no_grad()
def seconds_per_state(
    model: FlowModel, seed: Seed, batch: int, conditions: Conditions | None = None
) -> float:
    """Median time of an evaluation, per state."""
    generator = seed.child("timing").generator(device_of(model))
    cond = drawn_cond(conditions, batch, seed.child("timing"))
    x = model.space.noise(batch, generator, cond)
    t = torch.full((batch,), 0.5).to(x)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        model.endpoint(x, t, cond).sum().item()
        times.append(time.perf_counter() - start)
    return sorted(times)[3] / batch


def _count(plan: Plan) -> int:
    return sum(p.numel() for p in plan.pretrained.model.trainable.parameters())


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
