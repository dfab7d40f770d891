"""What a lowering is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, final

from tiltflow.context import Context
from tiltflow.delta import Full
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.operators import Gate
from tiltflow.problem import Solution
from tiltflow.ratio import LogisticRatio, RatioEstimator
from tiltflow.sample import Sampler
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training
from tiltflow.types import Access, Cond, Conditions, drawn_cond


@final
@dataclass(frozen=True, kw_only=True)
class Descent:
    """Settings of the lowerings by mirror descent, ``terminal`` and ``trajectory``.

    Args:
        num_iterations: K. By default 1 where one exact step is enough (``terminal`` of an
            intersection or a contrast), 20 for other ``terminal`` ones, 5 for ``trajectory``.
        rate: gamma = rate of a step times A, between 0 and 1. By default 1 with one iteration,
            else 0.2.
        score_time: time t at which scores of end points are read (published: 0.995 to 0.9), as
            alpha s_t(alpha x), the score of the data with noise beta / alpha. By default 0.99,
            or 0.9 where the network itself is trained (``Full``): errors of learned velocities
            grow like 1 / (1 - t) in scores, and off the data they have no bound.
        num_samples: samples of the current model and of each part for critics.
        ratio: how log(pbar / p) of a union is learned; the clip is the published remedy against
            overshooting where p misses a part.
        path_weight: lambda_t of ``trajectory``: ``"sigma"``, the memoryless diffusion coefficient
            (flow expansion, molecules), or ``"constant"``, 1.
        until: lambda_t is zero from here on, where scores diverge.
        end_term: add the terminal gradient to ``trajectory``, which as published has the reward
            only at the end.
    """

    num_iterations: int | None = None
    rate: float | None = None
    score_time: float | None = None
    num_samples: int = 4096
    ratio: RatioEstimator = field(default_factory=lambda: LogisticRatio(clip=3.0))
    path_weight: Literal["sigma", "constant"] = "sigma"
    until: float = 0.95
    end_term: bool = False

    def __post_init__(self) -> None:
        checks = {
            "num_iterations": self.num_iterations is None or self.num_iterations >= 1,
            "rate": self.rate is None or 0 < self.rate <= 1,
            "score_time": self.score_time is None or 0 < self.score_time < 1,
            "num_samples": self.num_samples >= 2,
            "until": 0 < self.until < 1,
            "path_weight": self.path_weight in ("sigma", "constant"),
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"Descent: {name}={getattr(self, name)!r} is out of range.")

    def plan(self, num_iterations: int) -> tuple[int, float]:
        """K and gamma, where ``num_iterations`` is the default of K."""
        count = self.num_iterations or num_iterations
        return count, self.rate or (1.0 if count == 1 else 0.2)


@final
@dataclass(frozen=True, kw_only=True)
class Merging:
    """Settings of ``merge``.

    Args:
        solver: of control problems.
        sampler: of the parts' samples.
        training: of regressions on merged samples (``matching.fit_flow``).
        bank_size: merged samples.
        batch_size: of the regressions.
        chunk: samples of each part between which transport is solved at a time.
        transports: rounds of the barycentre's fixed point, y <- sum_i w_i T_i(y), if there are
            more than two parts or a reward; two parts need one.
        likelihood_steps: of the ODE that gives log-densities of parts.
        trace: of that ODE: ``"exact"``, one product per dimension; ``"hutchinson"``, random signs,
            whose noise of several nats per sample in many dimensions the weights then have; or
            ``"auto"``, exact up to 100 dimensions.
        until: time until which an intersection's parts are compared (``one_shot``). Deviation:
            the running cost has no such end, but learned velocities differ by their errors too,
            which it divides by the noise that is left. Exact models lose next to nothing.
        refit: fit a flow to the samples of what a control problem with running rewards returned.
            By default always for ``trajectory``, whose result is no flow, and for ``one_shot``
            where the network itself is trained (``Full``): its SDE is right then, but errors of
            learned velocities make its ODE differ.
        descent: of lowerings by mirror descent.
    """

    solver: AdjointMatching = field(default_factory=AdjointMatching)
    sampler: Sampler = field(default_factory=Sampler)
    training: Training = field(
        default_factory=lambda: Training(num_updates=8000, learning_rate=3e-3, ema=0.9995)
    )
    bank_size: int = 20_000
    batch_size: int = 512
    chunk: int = 1000
    transports: int = 3
    likelihood_steps: int = 60
    trace: Literal["auto", "exact", "hutchinson"] = "auto"
    until: float = 0.9
    refit: bool | None = None
    descent: Descent = field(default_factory=Descent)

    def __post_init__(self) -> None:
        for name in ("bank_size", "batch_size", "chunk", "transports", "likelihood_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Merging: {name}={getattr(self, name)} must be at least 1.")
        if self.trace not in ("auto", "exact", "hutchinson"):
            raise ConfigError(f"Merging: trace={self.trace!r} must be auto, exact or hutchinson.")
        if not 0 < self.until <= 1:
            raise ConfigError(f"Merging: until={self.until} must lie in (0, 1].")


@final
@dataclass(frozen=True)
class Lowered:
    """A gate's model, and what is known about it."""

    model: FlowModel
    lowering: str
    stats: dict[str, float]


class Keeper:
    """Keeps what a merge has made, so that one that was killed goes on; this one keeps nothing.

    What it returns must be what an earlier call with the same arguments gave it, loaded into
    ``lowerings.untrained(job)``.
    """

    def gate(self, key: str, job: Job) -> Lowered | None:
        """A gate that was made earlier."""
        return None

    def made(self, key: str, job: Job, lowered: Lowered) -> None:
        """Keep a gate that has just been made."""

    def solve(self, job: Job, number: int) -> Solution[FlowModel] | None:
        """Control problem ``number`` of a gate that was solved earlier."""
        return None

    def solved(self, job: Job, number: int, solution: Solution[FlowModel]) -> None:
        """Keep a control problem that has just been solved."""


@final
@dataclass(frozen=True)
class Job:
    """A gate that is to become a model.

    Attributes:
        gate: the gate.
        models: of its parts, on one schedule.
        start: where trainings start from, on that schedule too.
        lowering: name of how it is to become one.
        settings, context: of the trainings.
        conditions: law of the conditions of conditional models.
        keeper: of solved problems.
    """

    gate: Gate
    models: tuple[FlowModel, ...]
    start: FlowModel
    lowering: str
    settings: Merging
    context: Context
    conditions: Conditions | None = None
    keeper: Keeper = field(default_factory=Keeper)

    @property
    def learned(self) -> bool:
        """Whether the network itself is trained, which then has errors of its own."""
        return isinstance(self.start.delta, Full)

    @property
    def score_time(self) -> float:
        """``Descent.score_time``, or its default."""
        return self.settings.descent.score_time or (0.9 if self.learned else 0.99)

    def cond(self, count: int, *labels: str | int) -> Cond | None:
        """The conditions of ``count`` samples."""
        return drawn_cond(self.conditions, count, self.context.seed.child(*labels))


@final
@dataclass(frozen=True)
class Lowering:
    """A way of making a gate's model.

    Attributes:
        make: does it.
        reward: what it needs of the gate's reward.
        refusal: why it cannot make this gate, conditional or not; empty if it can.
    """

    make: Callable[[Job], Lowered]
    reward: Access
    refusal: Callable[[Gate, bool], str] = lambda gate, conditional: ""

    def objection(self, gate: Gate, conditional: bool) -> str:
        """Why the gate cannot be made in this way, or nothing."""
        if gate.reward is not None and self.reward & ~gate.reward.offers:
            return f"it needs {self.reward} of the reward, which offers {gate.reward.offers}"
        return self.refusal(gate, conditional)
