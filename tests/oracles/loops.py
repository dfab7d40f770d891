"""Driving an outer loop and watching it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from oracles import identity
from tiltflow.algorithms import Iterate, mirror_descent
from tiltflow.context import Context
from tiltflow.functional import Functional
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.solvers.exact import GaussianSolver
from tiltflow.types import Access


def run(
    objective: Functional, start: Any, solver: Any, rates: Any, **options: Any
) -> tuple[Solution[Any], list[Iterate[Any]]]:
    """A run on a density that is its own model, and its iterates."""
    iterates: list[Iterate[Any]] = []
    options = {"density": identity, "context": Context(), **options}
    out = mirror_descent(
        objective, start, solver, rates, on_iterate=lambda k, it: iterates.append(it), **options
    )
    return out, iterates


@dataclass
class Recorder:
    """A solver that notes what it is asked, and may report another result or other stats."""

    inner: Any = field(default_factory=GaussianSolver)
    result: Result = Result.DONE
    keep_stats: bool = True
    needs: ClassVar[Access] = Access.VALUE
    calls: list[tuple[ControlProblem[Any], Context, Any]] = field(default_factory=list)

    def solve(
        self, problem: ControlProblem[Any], context: Context, *, init: Any = None
    ) -> Solution[Any]:
        self.calls.append((problem, context, init))
        out = self.inner.solve(problem, context, init=init)
        return replace(out, result=self.result, stats=out.stats if self.keep_stats else {})
