"""The interface between objectives and solvers: problem, solver, solution."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Protocol, TypeVar, final

from tiltflow.context import Context
from tiltflow.flow import ControlledProcess, FlowModel
from tiltflow.potential import Potential, StepReward
from tiltflow.types import Access, Conditions

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)


@final
@dataclass(frozen=True)
class ControlProblem(Generic[M]):
    """max over P: E[terminal(X_1)] - KL(P || P^reference).

    Solved by the reference tilted by exp(terminal); ``terminal`` is already multiplied by the
    rate (or divided by the weight of the KL).
    """

    reference: M
    terminal: Potential
    conditions: Conditions | None = None


@final
@dataclass(frozen=True)
class PathProblem(Generic[M]):
    """max over P: E[terminal(X_1) + sum_k running(X_{t_k}, t_k, t_{k+1})] - KL(P || P^reference).

    Its optimum is in general not a flow: see ``ControlledProcess``.
    """

    reference: M
    terminal: Potential
    running: StepReward
    conditions: Conditions | None = None


class Result(enum.Enum):
    """How a solution ended; the values are sentences for people."""

    DONE = "finished"
    CONVERGED = "stopped early: the measured gap to the optimum fell below the tolerance"
    STARVED = (
        "no training sample had a reward gradient for many updates, so the model did not learn; "
        "lower the level, raise the weight, or smooth the hinge"
    )
    DEGENERATE = (
        "the bank is too small for this tilt (its effective sample size collapsed); "
        "use more samples or a smaller rate"
    )


@final
@dataclass(frozen=True)
class Solution(Generic[M_co]):
    """What a solver returns. ``stats`` always has ``path_kl``, the KL of this step."""

    model: M_co
    result: Result = Result.DONE
    stats: Mapping[str, float] = field(default_factory=dict)


class Solver(Protocol[M]):
    """Solves terminal problems on models of kind M."""

    needs: ClassVar[Access]

    def solve(
        self, problem: ControlProblem[M], context: Context, *, init: M | None = None
    ) -> Solution[M]:
        """The optimum of ``problem``, started from ``init`` (default: the reference)."""
        ...


class PathSolver(Protocol):
    """Solves problems with running rewards."""

    needs: ClassVar[Access]

    def solve_path(
        self,
        problem: PathProblem[FlowModel],
        context: Context,
        *,
        init: FlowModel | None = None,
    ) -> Solution[ControlledProcess]:
        """The optimum of ``problem`` as a controlled process."""
        ...
