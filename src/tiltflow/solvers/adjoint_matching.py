"""Adjoint Matching (arXiv 2409.08861), in the form that is exact for the discretised problem."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from tiltflow.context import Context
from tiltflow.delta import Correction
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import (
    ControlledProcess,
    FlowModel,
    behaviour_of,
    device_of,
    freeze,
    unfreeze,
)
from tiltflow.kernel import Auto
from tiltflow.potential import Potential, StepReward
from tiltflow.problem import ControlProblem, PathProblem, Result, Solution
from tiltflow.sample import Sampler, adapted, calibrated, step_kl
from tiltflow.solvers.lean_adjoint import Rollout, Steps, rollout
from tiltflow.solvers.targets import (
    Mixer,
    Points,
    adjoint_target,
    choose_steps,
    path_weights,
    weighted_mean,
)
from tiltflow.training import Training, optimise
from tiltflow.types import Access, Conditions, drawn_cond

STARVED = 10
"""So many more roll-outs without any reward gradient than with one end in a warning, and at the
end in ``Result.STARVED``."""

ENOUGH_ACTIVE, MOST_OVERSAMPLED = 0.1, 16
"""Where a smaller fraction of a roll-out feels a hinge, more is simulated, at most 16 times."""


@final
@dataclass(frozen=True, kw_only=True)
class AdjointMatching:
    """Fine-tune a flow model to the optimum of a control problem by regression on adjoints.

    One iteration: roll out the tuned model, carry the adjoint a_K = grad phi back through the
    *reference*, and regress the tuned transition on ``reference.tilted(a_{k+1})``; the loss is
    the KL of the two, in nats (methods, section 2.4). ``a_{k+1}``, not ``a_k``: only this pairing
    is exact for the discretised problem.

    Deviation: where the terminal potential also offers values, and there is neither a running
    reward nor a condition, the target is mixed with one made from the values of whole paths
    (``targets.value_target``), step by step by their noise and by where they contradict each
    other. Both have the same fixed point, up to O(1/K) where steps of fixed variance cannot hold
    the tilt. Gradients re-weight separated modes slowly and with heavy-tailed noise; values do it
    at once. ``use_values=False`` is the paper's method.

    Args:
        sampler: kernel and steps of the roll-outs; sample with as many steps as were trained.
        training: optimiser settings.
        num_trajectories: trajectories of a roll-out.
        updates_per_rollout: optimiser updates made on the points of one roll-out.
        late: fraction of the steps, nearest to the data, that always enter the loss (paper: 1/4).
        early: fraction of the other steps drawn for each trajectory (paper: 10 of 30).
        clip: an end point is moved at most this many times the typical distance of an actual
            end point from the predicted one (``targets.shortened``); ``None`` for no clipping.
            The paper clips the loss of a sample, which drops its gradient; for sparse rewards
            that drops the signal.
        use_values: mix in path values where the potential offers them.
        min_effective: least effective sample fraction of the path weights; below it they are
            tempered, so that a strong tilt is approached in stages.
        replay: number of earlier roll-outs whose points are kept and mixed in; 0 is on-policy.
        oversample: simulate so many times more trajectories than are kept, and keep every one
            that a hinge of the objective acts on, with its weight (``lean_adjoint.kept``).
            ``None``: as many as make a tenth of the kept ones active, at most 16; 1 is plain.
        chunk: largest number of trajectories whose graphs are in memory at once.
        tolerance: stop when the gap to the optimum, KL(P || P*) in nats estimated from the spread
            of the path weights, stays below this for ten roll-outs; 0 never stops early.
        step_tolerance: take as few time steps as keep the relative error of E|X_1|^2 under the
            reference below this (``sample.adapted``; the statistic ``num_steps`` says how many);
            0 keeps the sampler's number.
        num_evaluate: fresh trajectories for the final statistics.

    Cost of an iteration: ``num_steps`` evaluations of both models, at most as many
    vector-Jacobian products of the reference (fewer where values are mixed in), and
    ``updates_per_rollout`` updates.
    """

    needs: ClassVar[Access] = Access.GRAD
    sampler: Sampler = field(default_factory=Sampler)
    training: Training = field(
        default_factory=lambda: Training(num_updates=4000, learning_rate=5e-3, ema=0.99)
    )
    num_trajectories: int = 256
    updates_per_rollout: int = 20
    late: float = 0.25
    early: float = 1 / 3
    clip: float | None = 8.0
    use_values: bool = True
    min_effective: float = 0.5
    replay: int = 3
    oversample: int | None = None
    chunk: int | None = None
    tolerance: float = 0.0
    step_tolerance: float = 0.0
    num_evaluate: int = 1024

    def __post_init__(self) -> None:
        checks = {
            "num_trajectories": self.num_trajectories >= 2,
            "updates_per_rollout": self.updates_per_rollout >= 1,
            "late": 0 < self.late <= 1,
            "early": 0 <= self.early <= 1,
            "clip": self.clip is None or self.clip > 0,
            "min_effective": 0 < self.min_effective < 1,
            "replay": self.replay >= 0,
            "oversample": self.oversample is None or self.oversample >= 1,
            "chunk": self.chunk is None or self.chunk >= 1,
            "tolerance": self.tolerance >= 0,
            "step_tolerance": self.step_tolerance >= 0,
            "num_evaluate": self.num_evaluate >= 2,
        }
        for name, fine in checks.items():
            if not fine:
                raise ConfigError(f"AdjointMatching: {name}={getattr(self, name)!r} out of range.")
        if not self.sampler.kernel.memoryless:
            raise UnsupportedError(
                f"AdjointMatching cannot train with {type(self.sampler.kernel).__name__}: it is "
                "not memoryless, so the tilt would be biased. Train with EulerMaruyama or "
                "Ancestral, and sample with any kernel afterwards."
            )

    def solve(
        self,
        problem: ControlProblem[FlowModel],
        context: Context,
        *,
        init: FlowModel | None = None,
    ) -> Solution[FlowModel]:
        """The reference tilted by exp(terminal), as a flow model.

        Raises:
            CapabilityError: before any work, if the terminal potential has no gradient.
            UnsupportedError: before any work, if there is a tolerance for conditional models.
            NonFiniteError: if a state, adjoint or loss is not finite.
        """
        problem.terminal.require(self.needs, "AdjointMatching")
        return self._run(
            problem.reference, problem.terminal, None, problem.conditions, context, init
        )

    def solve_path(
        self,
        problem: PathProblem[FlowModel],
        context: Context,
        *,
        init: FlowModel | None = None,
    ) -> Solution[ControlledProcess]:
        """The optimum of a problem with a running reward; not a flow model."""
        problem.terminal.require(self.needs, "AdjointMatching")
        solution = self._run(
            problem.reference, problem.terminal, problem.running, problem.conditions, context, init
        )
        return Solution(ControlledProcess(solution.model), solution.result, solution.stats)

    def _run(
        self,
        reference: FlowModel,
        terminal: Potential,
        running: StepReward | None,
        conditions: Conditions | None,
        context: Context,
        init: FlowModel | None,
    ) -> Solution[FlowModel]:
        if self.tolerance > 0 and conditions is not None:
            raise UnsupportedError(
                f"AdjointMatching: tolerance={self.tolerance:g} needs the gap to the optimum, "
                "which is not known for a conditional model: every condition has its own "
                "normaliser. Set tolerance=0 and a number of updates."
            )
        if self.tolerance > 0 and behaviour_of(init or reference) is not None:
            raise UnsupportedError(
                f"AdjointMatching: tolerance={self.tolerance:g} needs the gap to the optimum, "
                "which is not known for guided roll-outs: they have no optimum. Set tolerance=0 "
                "and a number of updates."
            )
        reference = self._calibrated(freeze(reference), init, conditions, context)
        solver = self._with_steps(reference, conditions, context)
        tuned = unfreeze((init or reference).clone())
        tuned = tuned if reference.moments is None else tuned.with_moments(reference.moments)
        loss = _Matching(solver, tuned, reference, terminal, running, conditions, context)
        done = optimise(tuned.trainable, loss, self.training, context)
        freeze(tuned)
        stats = loss.evaluate()
        result = Result.DONE
        if loss.starved >= STARVED:
            result = Result.STARVED
        elif done < self.training.num_updates:
            result = Result.CONVERGED
        stats |= {"num_updates": float(done), "num_steps": float(solver.sampler.num_steps)}
        return Solution(tuned, result, stats)

    def _with_steps(
        self, reference: FlowModel, conditions: Conditions | None, context: Context
    ) -> AdjointMatching:
        """This solver with the number of time steps that its tolerance asks for."""
        if self.step_tolerance == 0:
            return self
        sampler = adapted(
            reference, self.sampler, tolerance=self.step_tolerance,
            seed=context.seed.child("steps"), conditions=conditions,
        )  # fmt: skip
        return replace(self, sampler=sampler)

    def _calibrated(
        self,
        reference: FlowModel,
        init: FlowModel | None,
        conditions: Conditions | None,
        context: Context,
    ) -> FlowModel:
        """The reference with the posterior variance that ``Auto`` needs, measured if unknown."""
        if not isinstance(self.sampler.kernel, Auto) or reference.moments is not None:
            return reference
        if init is not None and init.moments is not None:
            return reference.with_moments(init.moments)
        return calibrated(
            reference, seed=context.seed.child("calibration"), conditions=conditions,
            num_steps=self.sampler.num_steps,
        )  # fmt: skip


def _without_null(model: FlowModel) -> FlowModel:
    """The same function without a correction that is still exactly zero, which costs time."""
    if isinstance(model.delta, Correction) and model.delta.is_null():
        return FlowModel(
            model.net, model.schedule, model.space,
            predicts=model.predicts, takes_cond=model.takes_cond, moments=model.moments,
        )  # fmt: skip
    return model


@final
class _Matching:
    """The loss of Adjoint Matching: makes a roll-out every so many updates, regresses on it."""

    def __init__(
        self,
        solver: AdjointMatching,
        tuned: FlowModel,
        reference: FlowModel,
        terminal: Potential,
        running: StepReward | None,
        conditions: Conditions | None,
        context: Context,
    ) -> None:
        self.solver, self.tuned, self.reference = solver, tuned, _without_null(reference)
        self.terminal, self.running, self.conditions = terminal, running, conditions
        self.context = context
        like = torch.zeros((), device=device_of(reference))
        self.steps = Steps.of(solver.sampler, reference, like)
        self.num_noisy = int((self.steps.weight > 0).sum())
        self.shared = tuned.net is self.reference.net
        self.behaviour = behaviour_of(tuned)
        self.mixer = Mixer()
        self.buffer: list[Points] = []
        self.batches: list[Points] = []
        self.stats: dict[str, float] = {}
        self.activity = math.nan
        self.starved, self.warned, self.gaps = 0, False, torch.full((10,), math.inf)

    # --- the protocol of training.optimise -------------------------------------------------------

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        parts = self.solver.training.accumulate
        position = (update % self.solver.updates_per_rollout) * parts + part
        if position == 0:
            self._roll_out(update // self.solver.updates_per_rollout)
        points = self.batches[position]
        with self.context.backend.autocast():
            x, t, cond, tuned = points.x, points.t, points.cond, self.tuned
            output = (
                tuned.correction(x, t, cond, points.frozen)
                if self.shared
                else tuned.output(x, t, cond)
            )
        assert output is not None
        space = self.tuned.space  # which a raw output may leave; an end point does not
        error = space.project(output - points.target, points.cond)
        return (points.weight * space.inner(error, error)).mean(), self.stats

    def between_rounds(self, update: int) -> bool:
        return update % self.solver.updates_per_rollout == 0

    def converged(self, update: int) -> bool:
        calm = self.solver.tolerance > 0 and self.between_rounds(update)
        return calm and float(self.gaps.mean()) < self.solver.tolerance

    def state(self) -> Mapping[str, Tensor]:
        kept = {
            "noise": self.mixer.noise,
            "gaps": self.gaps,
            "starved": torch.tensor(self.starved),
            "activity": torch.tensor(self.activity, dtype=torch.float64),
        }
        for i, p in enumerate(self.buffer):
            for name in FIELDS:
                kept[f"buffer/{i}/{name}"] = getattr(p, name)
            for key, entry in (p.cond or {}).items():
                if isinstance(entry, Tensor):
                    kept[f"buffer/{i}/cond/{key}"] = entry
        return kept

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.mixer.noise, self.gaps = state["noise"].clone(), state["gaps"].clone()
        self.starved, self.buffer = int(state["starved"]), []
        self.warned = self.starved >= STARVED
        self.activity = float(state["activity"])
        while f"buffer/{len(self.buffer)}/x" in state:
            head = f"buffer/{len(self.buffer)}/"
            cond = {
                k[len(head) + 5 :]: v for k, v in state.items() if k.startswith(head + "cond/")
            }
            fields = {name: state[head + name] for name in FIELDS}
            self.buffer.append(Points(**fields, cond=cond or None))

    # --- one roll-out ----------------------------------------------------------------------------

    def _roll_out(self, number: int) -> None:
        seed = self.context.seed.child("rollout", number)
        if self.context.backend.num_processes > 1:
            seed = seed.child("process", self.context.backend.process_index)
        count, oversample = self.solver.num_trajectories, self._oversample()
        cond = drawn_cond(self.conditions, oversample * count, seed)
        path = rollout(
            self.tuned, self.reference, self.steps, self.terminal, count,
            seed=seed.child("paths"), backend=self.context.backend,
            running=self.running, cond=cond, chunk=self.solver.chunk, carry=self._carry(),
            oversample=oversample, behaviour=self.behaviour,
        )  # fmt: skip
        targets = self._targets(path)
        generator = seed.child("points").generator(path.states.device)
        k, b = choose_steps(self.num_noisy, count, self.solver.late, self.solver.early, generator)
        points = Points.of(path, targets, self.steps, k, b, self.shared)
        self.buffer = [*self.buffer, points][-(self.solver.replay + 1) :]
        self._split(generator)
        if not self.solver.replay:
            self.buffer = []

    def _carry(self) -> tuple[int, float]:
        """As ``Mixer.carry``; without early steps in the loss their adjoints are of no use."""
        if self.solver.early or self.mixer.noise.numel():
            return self.mixer.carry()
        return self.num_noisy - math.ceil(self.solver.late * self.num_noisy), 0.0

    def _oversample(self) -> int:
        """How many times more trajectories to simulate than to keep."""
        if self.solver.oversample is not None:
            return self.solver.oversample
        if math.isnan(self.activity):
            return 1
        return min(max(1, round(ENOUGH_ACTIVE / max(self.activity, 1e-9))), MOST_OVERSAMPLED)

    def _targets(self, path: Rollout) -> Tensor:
        target, active = adjoint_target(path, self.steps, self.solver.clip)
        active = self._agreed(active)
        self._watch(active)
        stands = path.importance
        self.stats = {"path_kl": float(weighted_mean(path.kl, stands)), "active": active}
        if path.value is not None:
            self.stats["terminal"] = float(weighted_mean(path.value, stands))
        # Every condition has a normaliser of its own: weights in common would favour easy ones.
        # And along guided paths they are no weights at all.
        if path.log_weight is None or self.conditions is not None or self.behaviour is not None:
            return target
        weights = path_weights(path.log_weight, self.solver.min_effective, stands)
        gap = self._agreed(_spread(path.log_weight, stands))
        self.gaps = torch.cat([self.gaps[1:], torch.tensor([gap])])
        self.stats |= {"gap": gap, "effective": weights.effective, "temper": weights.temper}
        # With a running reward X_1 given X_t is not that of a flow: adjoints only.
        if not self.solver.use_values or self.running is not None:
            return target
        return self.mixer.mix(path, target, weights, self.solver.clip)

    def _watch(self, active: float) -> None:
        """Note how much of a roll-out has a reward gradient; say so when nothing has."""
        if self.running is not None:  # there is a gradient at every step
            return
        # Oversampling is for hinges, which can tell before any gradient is taken.
        before = active if math.isnan(self.activity) else self.activity
        self.activity = 0.8 * before + 0.2 * active if self.terminal.sparse else 1.0
        # A rare hit teaches nothing, so that it does not wipe out the misses before it.
        step = 1 if active == 0 else -1
        self.starved = min(max(0, self.starved + step), 2 * STARVED)
        if self.starved >= STARVED and not self.warned:
            self.warned = True
            warnings.warn(
                f"AdjointMatching: no sample of the last {STARVED} roll-outs (or of most) "
                "had a reward gradient, so the model does not learn. Lower the level of the tail, "
                "raise the rate in smaller steps, or raise `oversample` or `num_trajectories`.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _agreed(self, number: float) -> float:
        """The mean over processes: all of them must come to the same decisions."""
        backend = self.context.backend
        if backend.num_processes == 1:
            return number
        mean = backend.reduce(torch.tensor(number, device=backend.device), reduction="mean")
        return float(mean)

    def _split(self, generator: torch.Generator) -> None:
        """Cut the points of this round, and as many replayed ones as fit, into mini-batches."""
        number = self.solver.updates_per_rollout * self.solver.training.accumulate
        pool, size = self.buffer[-1], max(1, len(self.buffer[-1].x) // number)
        if len(self.buffer) > 1:
            pool = _joined(self.buffer)
            order = torch.randperm(len(pool.x), generator=generator, device=generator.device)
            pool = pool[order[: size * number]]
        chunks = torch.arange(len(pool.x), device=pool.x.device).tensor_split(number)
        if len(chunks[-1]) == 0:
            raise ConfigError(
                "AdjointMatching: more updates_per_rollout than points; lower it, or raise "
                "num_trajectories."
            )
        self.batches = [pool[c] for c in chunks]

    # --- afterwards ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Statistics of the final model on fresh trajectories."""
        seed, count = self.context.seed.child("evaluate"), self.solver.num_evaluate
        cond, sampler = drawn_cond(self.conditions, count, seed), self.solver.sampler
        path = sampler.simulate(self.tuned, count, seed=seed.child("paths"), cond=cond)
        kl, ratio = step_kl(self.tuned, self.reference, sampler.kernel, path, own=True)
        stats = {"path_kl": float(kl.mean()), "path_kl_error": float(kl.std()) / count**0.5}
        if Access.VALUE in self.terminal.offers and self.running is None:
            value = self.terminal.value(path.end, cond)
            stats |= {
                "terminal": float(value.mean()),
                "terminal_error": float(value.std()) / count**0.5,
            }
            if cond is None:
                effective = path_weights(value - ratio, 1e-9).effective
                stats |= {"gap": _spread(value - ratio), "effective": effective}
        return stats


def _spread(log_weight: Tensor, importance: Tensor | None = None) -> float:
    """KL(P || P*) in nats: log mean exp minus mean of log dP* / dP up to a constant."""
    base = log_weight if importance is None else log_weight + importance.log()
    mean = weighted_mean(log_weight, importance)
    return float(base.logsumexp(0) - math.log(len(log_weight)) - mean)


FIELDS = ("x", "t", "target", "weight", "frozen")


def _joined(parts: list[Points]) -> Points:
    cond = None
    if parts[0].cond is not None:
        if not all(isinstance(e, Tensor) for e in parts[0].cond.values()):
            raise UnsupportedError("Replay needs conditions made of tensors only.")
        cond = {k: torch.cat([p.cond[k] for p in parts]) for k in parts[0].cond}  # type: ignore
    fields = {name: torch.cat([getattr(p, name) for p in parts]) for name in FIELDS}
    return Points(**fields, cond=cond)
