"""What a merge would be: its circuit, its gates, how long it takes. Does no work."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

from tiltflow.algorithms.lowerings import LOWERINGS
from tiltflow.config import Table
from tiltflow.inspection import (
    BACKWARD,
    duration,
    evaluations_of_solve,
    seconds_per_state,
    tree_lines,
)
from tiltflow.merges.plan import MergePlan, check
from tiltflow.operators import Gate, Intersection, drawn

ITERATED = ("terminal", "trajectory")
"""Lowerings by mirror descent."""


def describe(tree: Table, plan: MergePlan) -> str:
    """Object tree, the circuit, every gate with its lowering, and an estimate of the time."""
    gates = check(plan)
    paths = plan.experiment.merging.solver.num_trajectories
    first = plan.pretrained[plan.root.names[0]].model
    cost = sum(_evaluations(plan, gate, name) for gate, name in gates)
    seconds = cost * seconds_per_state(first, plan.seed, paths, plan.conditions)
    lines = [
        *tree_lines(tree), "", drawn(plan.root), "",
        *(f"{plan.written(gate):30} {name}{_how(plan, gate)}" for gate, name in gates), "",
        f"evaluations about {cost:,.0f} (in forward units)",
        f"time        about {duration(seconds)} on this machine",
    ]  # fmt: skip
    return "\n".join(lines)


def _how(plan: MergePlan, gate: Gate) -> str:
    return "" if type(gate) in plan.experiment.chosen else " (chosen automatically)"


def _evaluations(plan: MergePlan, gate: Gate, name: str) -> float:
    """Of one gate: its trainings, its banks and its evaluation."""
    settings, evaluate, parts = plan.experiment.merging, plan.experiment.evaluate, len(gate.parts)
    solver, steps = settings.solver, settings.solver.sampler.num_steps
    fit = settings.training.num_updates * settings.batch_size * (1 + BACKWARD)
    if name == "one_shot" or name in ITERATED:
        simple = name == "one_shot" or isinstance(gate, Intersection)
        count = 1 if name == "one_shot" else settings.descent.plan(5 if simple else 20)[0]
        solve = evaluations_of_solve(solver, solver.training.num_updates, steps)
        work = count * solve * (parts if name != "terminal" else 1)
        work += fit if name == "trajectory" else 0
    else:
        work = fit + settings.bank_size * settings.sampler.num_steps * parts
    measured = (1 + parts) * evaluate.num_samples * evaluate.sampler.num_steps * (1 + parts)
    return work + measured


def gate_lines() -> Iterator[str]:
    """Gates and how they can be made, for listing; the first way is the default."""
    for gate, ways in LOWERINGS.items():
        yield f"  {gate.__name__.lower():20} {_short(gate, ':')}"
        for name, lowering in ways.items():
            yield f"    {name:18} {_short(lowering.make, '::')}"


def _short(what: object, until: str) -> str:
    """The beginning of a docstring, up to where it goes into details."""
    text = re.split(rf"{until}| \(methods|[;.]", inspect.getdoc(what) or "")[0]
    return textwrap.shorten(text, 74, placeholder=" ...")
