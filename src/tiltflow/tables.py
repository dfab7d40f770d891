"""The tables of a run file: frozen dataclasses whose arguments are its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from tiltflow.algorithms.bank_plan import Planning
from tiltflow.algorithms.rates import RateRule
from tiltflow.algorithms.thresholds import Ease
from tiltflow.density import Density, FlowDensity
from tiltflow.divergences import KL
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.functional import Functional
from tiltflow.models import Model
from tiltflow.potential import Potential
from tiltflow.problem import Solver
from tiltflow.ratio import Likelihood
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.signatures import Weighted
from tiltflow.single_point import Method
from tiltflow.types import Conditions


@final
@dataclass(frozen=True, kw_only=True)
class Objective:
    """G = utility + sum_i weight_i utilities_i - sum_i weight_i divergence_i.

    Args:
        utility: what is raised.
        utilities: what else is raised, e.g. a ``LogBarrier``; written like ``divergences``.
        divergences: each a table with ``kind``, ``weight`` and the divergence's own arguments.
    """

    utility: Functional
    utilities: tuple[Weighted, ...] = ()
    divergences: tuple[Weighted, ...] = ()

    @property
    def functional(self) -> Functional:
        """The objective as one expression."""
        total = self.utility
        for term in self.utilities:
            total = total + term.weight * term.functional
        for term in self.divergences:
            total = total - term.weight * term.functional
        return total

    @property
    def weight(self) -> float:
        """Sum of the weights of the divergences."""
        return sum(term.weight for term in self.divergences)


@final
@dataclass(frozen=True, kw_only=True)
class MirrorDescent:
    """Settings of ``algorithms.mirror_descent``.

    Args:
        num_iterations: outer iterations.
        rates: one step size per iteration; or
        rate: a rule that chooses them. With neither, see ``way``.
        way: ``"steps"`` trains in every iteration, as Flow Density Control, algorithm 1;
            ``"plan"`` runs the iterations on a bank of samples and trains once
            (``algorithms.plan_and_tune``). By default ``"auto"``: plan where no rates are given
            and a bank is enough for the objective; one exact step of rate 1/weight where the
            objective is linear but for the KL.
        planning: settings of ``"plan"``.
        num_samples: size of the bank that each linearisation is estimated from.
        score_time: time at which scores are read.
        likelihood_steps: steps of the flow's ODE that give the models' log-densities values, for
            objectives that need more than scores (an entropy that is planned or reported, ratio
            divergences to another model); 0 for scores only.
        form: how a step is posed, see ``mirror_descent``.
        tolerance: stop when the objective is stationary to within this.
    """

    kind: Literal["mirror_descent"] = "mirror_descent"
    num_iterations: int = 1
    rates: tuple[float, ...] | None = None
    rate: RateRule | None = None
    num_samples: int = 4096
    score_time: float = 0.99
    likelihood_steps: int = 0
    way: Literal["auto", "steps", "plan"] = "auto"
    planning: Planning = field(default_factory=Planning)
    form: Literal["anchored", "successive"] = "anchored"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if self.num_iterations < 1 or self.num_samples < 2 or self.likelihood_steps < 0:
            raise ConfigError(
                "num_iterations must be at least 1, num_samples at least 2 and likelihood_steps "
                "at least 0."
            )
        if self.rates is not None and self.rate is not None:
            raise ConfigError("give either rates (numbers) or rate (a rule), not both.")
        if self.rates is not None and len(self.rates) != self.num_iterations:
            raise ConfigError(
                f"rates has {len(self.rates)} entries, but num_iterations is "
                f"{self.num_iterations}; give one rate per iteration."
            )
        if self.rates is not None and min(self.rates) <= 0:
            raise ConfigError("rates must be positive.")
        if self.way == "plan" and (self.rates or self.rate or self.num_iterations > 1):
            raise ConfigError(
                'way = "plan" finds its own steps; leave rates, rate and num_iterations out, or '
                'choose way = "steps".'
            )
        if self.rates is None and self.rate is None and self.num_iterations > 1:
            raise ConfigError(
                f"{self.num_iterations} iterations need rates = [...] (one per iteration) or "
                'rate = { kind = "PathKLBound", ... }.'
            )

    def density(
        self, model: FlowModel, sampler: Sampler, seed: Seed, conditions: Conditions | None = None
    ) -> FlowDensity:
        """The law of a model, as objectives see it."""
        log = None
        if self.likelihood_steps:
            log = Likelihood(model, self.likelihood_steps, score_time=self.score_time)
        return FlowDensity(
            model, sampler=sampler, num_samples=self.num_samples, seed=seed,
            conditions=conditions, score_time=self.score_time, log=log,
        )  # fmt: skip

    @property
    def open(self) -> bool:
        """Whether the file leaves the steps to us."""
        return self.way == "auto" and self.rates is None and self.rate is None

    def schedule_of_rates(self, weight: float) -> Sequence[float] | RateRule:
        """The rates, or 1/weight where the file leaves a single one open."""
        if self.rate is not None:
            return self.rate
        if self.rates is not None:
            return self.rates
        if weight <= 0:
            raise ConfigError(
                "algorithm.rates: missing. Without a divergence there is no weight to derive the "
                "rate 1/weight from; give rates = [...]."
            )
        return (1 / weight,)


@final
@dataclass(frozen=True, kw_only=True)
class TailAware:
    """Settings of ``algorithms.tail_aware``: thresholds first, then one training.

    The objective must be one such utility less one ``KL`` from ``pretrained``; its weight is that
    of both stages.

    Args:
        bank_size: pre-trained samples that a threshold is found on, default 10,000; more where the
            tail needs them.
        max_rounds: trainings at most, default 1. With one, a weight at which the training would
            starve is refused before it; with more, it is approached by way of milder problems.
        ease: what is made milder there: ``"level"`` (the default), ``"weight"`` or ``"width"``
            (``thresholds.eased``).
        anyway: train with a warning where it would be refused, default false.
        num_samples: fresh samples of the tuned model on which its tail is measured, default 4096;
            more where the tail is thin.
        score_time: time at which scores are read, default 0.99; for a baseline that needs them.
    """

    kind: Literal["tail_aware"] = "tail_aware"
    bank_size: int = 10_000
    max_rounds: int = 1
    ease: Ease = "level"
    anyway: bool = False
    num_samples: int = 4096
    score_time: float = 0.99

    def __post_init__(self) -> None:
        if self.bank_size < 2 or self.max_rounds < 1 or self.num_samples < 2:
            raise ConfigError(
                "bank_size and num_samples must be at least 2, and max_rounds at least 1."
            )

    def density(
        self, model: FlowModel, sampler: Sampler, seed: Seed, conditions: Conditions | None = None
    ) -> FlowDensity:
        """The law of a model."""
        return FlowDensity(
            model, sampler=sampler, num_samples=self.num_samples, seed=seed,
            conditions=conditions, score_time=self.score_time,
        )  # fmt: skip

    def utility_of(self, objective: Objective, prior: Density) -> Functional:
        """The utility, if the objective is one that this algorithm solves.

        Args:
            objective: of the run file.
            prior: the law of ``pretrained``.

        Raises:
            ConfigError: if it is not; names the key.
        """
        if objective.utilities:
            raise _unsolved("objective.utilities", "there are more utilities")
        if len(objective.divergences) != 1:
            raise _unsolved("objective.divergences", f"there are {len(objective.divergences)}")
        (term,) = objective.divergences
        if not isinstance(term.functional, KL) or term.functional.prior is not prior:
            told = f"{term.functional} is not a KL from pretrained"
            raise _unsolved("objective.divergences.0", told)
        parts = objective.utility.certainties()
        if not parts:
            told = f"{objective.utility} is not a certainty equivalent"
            raise _unsolved("objective.utility", told)
        if {part.shape.bend for part in parts} >= {"convex", "concave"}:
            told = f"{objective.utility} favours the best and guards against the worst as well"
            raise _unsolved("objective.utility", told)
        return objective.utility


def _unsolved(key: str, told: str) -> ConfigError:
    return ConfigError(
        f'{key}: {told}, but algorithm.kind = "tail_aware" maximises one certainty '
        "equivalent (a CVaR, a spectral or entropic risk, ...) less one KL from pretrained. Use "
        'algorithm.kind = "mirror_descent", which takes any objective.'
    )


@final
@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How the result is measured.

    Args:
        num_samples: samples of each model, drawn with common random numbers.
        sampler: how they are drawn; its path laws give the path-KL.
        levels: CVaR levels of the tails, e.g. 0.1 for the worst and the best tenth.
        reward: what is reported as the reward; default: the utility's.
        keep: samples kept of each model, for the report's pictures.
        energies: ``"GFN2-xTB"`` or ``"GFN1-xTB"``: of models of molecules, also report formation
            energies by this method, in Hartree per atom. Some 20 ms per molecule.
    """

    num_samples: int = 4096
    sampler: Sampler = field(default_factory=Sampler)
    levels: tuple[float, ...] = (0.1,)
    reward: Potential | None = None
    keep: int = 4096
    energies: Method | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 16:
            raise ConfigError("num_samples must be at least 16.")
        if not self.levels or any(not 0 < level <= 0.5 for level in self.levels):
            raise ConfigError("levels must lie in (0, 0.5].")


@final
@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A comparison: one solve for another utility, at a matched distance from the pre-trained.

    Args:
        utility: usually ``ExpectedReward``.
        match: ``"path_kl"`` chooses the rate so that the exact tilt is as far (in KL) from the
            pre-trained model as the main result, and corrects it where the trained one is not, a
            few times; ``"rate"`` takes ``rate``.
        rate: used with ``match = "rate"``.
        num_samples: pre-trained samples from which the KL of the exact tilt is estimated.
    """

    utility: Functional
    match: Literal["path_kl", "rate"] = "path_kl"
    rate: float | None = None
    num_samples: int = 16384

    def __post_init__(self) -> None:
        if (self.match == "rate") != (self.rate is not None):
            raise ConfigError('give rate together with match = "rate", and only then.')


@final
@dataclass(frozen=True, kw_only=True)
class Expected:
    """A number that the evaluation must reproduce: |measured - value| <= within."""

    value: float
    within: float
    from_: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run file.

    Args:
        name: of the run; its directory is ``runs/<name>``.
        seed: root of all random streams.
        precision: of the networks, ``"fp32"`` or ``"bf16"``.
        models: by name; ``pretrained`` is the one that is tuned.
        objective: what is maximised.
        algorithm: the outer loop; ``kind`` says which, default ``"mirror_descent"``.
        solver: the inner solver.
        evaluate: how the result is measured.
        baseline: an optional comparison.
        expect: numbers that ``evaluate`` compares with, by metric name.
    """

    name: str = "run"
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    models: Mapping[str, Model]
    objective: Objective
    algorithm: MirrorDescent | TailAware = field(default_factory=MirrorDescent)
    solver: Solver[FlowModel]
    evaluate: Evaluate = field(default_factory=Evaluate)
    baseline: Baseline | None = None
    expect: Mapping[str, Expected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_file_name(self.name)


def require_file_name(name: str) -> None:
    """Refuse a name that a run's directory cannot have."""
    if not name or any(c in name for c in "/\\\0"):
        raise ConfigError("name: must be a file name without slashes.")
