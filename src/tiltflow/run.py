"""Do what a run file says, in a directory, so that a kill at any moment loses only seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch

from tiltflow.algorithms.mirror_descent import mirror_descent
from tiltflow.algorithms.planning import plan_and_tune
from tiltflow.algorithms.tail_aware import tail_aware
from tiltflow.density import Density
from tiltflow.environment import environment
from tiltflow.errors import CapabilityError, ConfigError, UnsupportedError
from tiltflow.evaluation import matching_rate, tilt_kl
from tiltflow.experiment import PRETRAINED, Plan
from tiltflow.flow import FlowModel, freeze
from tiltflow.potential import Potential
from tiltflow.problem import ControlProblem, Result, Solution
from tiltflow.recorder import Drive, Recorder, finished_iterations
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.rundir import RunDirectory, Solved
from tiltflow.sample import Sampler, path_kl
from tiltflow.seed import Seed
from tiltflow.tables import Baseline, TailAware
from tiltflow.types import Access, Estimate, drawn_cond


@final
@dataclass(frozen=True)
class Outcome:
    """What a run trained: the tuned model, and the baseline with its rate where there is one."""

    tuned: Solution[FlowModel]
    baseline: Solution[FlowModel] | None = None
    baseline_rate: float | None = None


def check(plan: Plan) -> Access:
    """Raise ``CapabilityError`` if the parts do not fit, and probe the reward on a few samples.

    Returns:
        what the first variation of the objective offers at the pre-trained density.
    """
    experiment = plan.experiment
    check_conditions(plan)
    energies_of(plan)
    # A tail-aware run only ever follows its utility; the KL is the solver's own.
    of_tail = isinstance(experiment.algorithm, TailAware)
    followed = experiment.objective.utility if of_tail else plan.objective
    offered = followed.offers_at(plan.prior)
    needs, user = experiment.solver.needs, type(experiment.solver).__name__
    if needs & ~offered:
        raise CapabilityError(
            f"{user} needs {needs} of the objective's first variation, but {followed} "
            f"offers {offered} here. Use a solver that does without, or a differentiable reward."
        )
    plan.reward.require(Access.VALUE, "The evaluation")
    seed = plan.seed.child("probe")
    cond = drawn_cond(plan.conditions, 4, seed)
    x = Sampler(num_steps=4).sample(plan.pretrained.model, 4, seed=seed, cond=cond)
    plan.reward.value(x, cond)
    if experiment.baseline is not None:
        utility = experiment.baseline.utility
        missing = (needs | Access.VALUE) & ~utility.offers_at(plan.prior)
        if missing:
            raise CapabilityError(
                f"baseline.utility: {utility} lacks {missing}, needed by {user}."
            )
    if Access.GRAD in needs and Access.GRAD in plan.reward.offers:
        plan.reward.grad(x, cond)
    return offered


def check_conditions(plan: Plan) -> None:
    """Raise for what needs one normaliser: of a conditional model, every condition has its own.

    Raises:
        UnsupportedError: names the key of the run file.
    """
    experiment, algorithm = plan.experiment, plan.experiment.algorithm
    wrong = {
        'algorithm.way = "plan"': plan.planned,
        "algorithm.max_rounds above 1": isinstance(algorithm, TailAware)
        and algorithm.max_rounds > 1,
        'baseline.match = "path_kl"': experiment.baseline is not None
        and experiment.baseline.match == "path_kl",
        "solver.tolerance above 0": getattr(experiment.solver, "tolerance", 0.0) > 0,
    }
    for key, found in wrong.items():
        if found and plan.conditions is not None:
            raise UnsupportedError(
                f"{key} needs one normaliser, but models.{PRETRAINED} is conditional, and every "
                "condition has a normaliser of its own. Fix the condition (of a model of "
                "molecules, the number of atoms: atoms = 18), or choose another value."
            )


def energies_of(plan: Plan) -> SinglePoints | None:
    """What computes the energies that the evaluation is asked for.

    Raises:
        ConfigError: if samples are not molecules.
        CapabilityError: if the backend is not installed.
    """
    method = plan.experiment.evaluate.energies
    if method is None:
        return None
    if plan.pretrained.layout is None:
        raise ConfigError(f"evaluate.energies: models.{PRETRAINED} does not make molecules.")
    return SinglePoints(method)


def train(plan: Plan, directory: RunDirectory, drive: Drive) -> Outcome:
    """All solves of a run; continues where an earlier process stopped.

    The directory must be claimed and locked by the caller.

    Raises:
        CheckpointError: if a checkpoint is damaged or the disk is full.
    """
    check(plan)
    record_environment(directory, drive.device)
    recorder = Recorder(plan, directory, drive)
    tuned = _tune(plan, directory, recorder)
    if plan.experiment.baseline is None:
        return Outcome(tuned)
    rate, baseline = _compare(plan, plan.experiment.baseline, tuned, directory, recorder)
    return Outcome(tuned, baseline, rate)


def restore(plan: Plan, directory: RunDirectory) -> Outcome:
    """The models of a finished run.

    Raises:
        CheckpointError: if there is no finished iteration.
    """
    solved = finished_iterations(plan, directory)
    if not solved:
        raise ConfigError(
            f"{directory.path} has no finished iteration yet. Run `tiltflow run` on it first."
        )
    tuned = _solution(plan, solved[-1])
    other = directory.load_solved("baseline", plan.pretrained.model.trainable.state_dict())
    if other is None:
        return Outcome(tuned)
    return Outcome(tuned, _solution(plan, other), float(other.notes["rate"]))


def record_environment(directory: RunDirectory, device: torch.device) -> None:
    """Write the environment, or note that the run was continued in another one."""
    now, before = environment(device), directory.read_json(directory.environment)
    if before is None:
        directory.write_json(directory.environment, now)
        return
    known = [{k: v for k, v in before.items() if k != "continued_in"}]
    known += before.get("continued_in", [])
    if now not in known:
        later = [*before.get("continued_in", []), now]
        directory.write_json(directory.environment, {**before, "continued_in": later})


def _tune(plan: Plan, directory: RunDirectory, recorder: Recorder) -> Solution[FlowModel]:
    """The main solve."""
    algorithm = plan.experiment.algorithm
    completed = [_solution(plan, solved) for solved in recorder.solved]
    if completed and _ended(plan, recorder.solved):
        return completed[-1]
    if isinstance(algorithm, TailAware):
        return _tune_tail(plan, algorithm, recorder, completed)
    if plan.planned:
        return plan_and_tune(
            plan.objective, plan.pretrained.model, plan.experiment.solver, prior=plan.prior,
            context=recorder.context(), settings=algorithm.planning, density=_density(plan),
            completed=completed, on_iterate=recorder.on_iterate,
        )  # fmt: skip
    solution: Solution[FlowModel] = mirror_descent(
        plan.objective, plan.pretrained.model, plan.experiment.solver,
        algorithm.schedule_of_rates(plan.experiment.objective.weight),
        density=_density(plan), context=recorder.context(), prior=plan.prior,
        num_iterations=algorithm.num_iterations, conditions=plan.conditions, form=algorithm.form,
        tolerance=algorithm.tolerance, completed=completed, on_iterate=recorder.on_iterate,
    )  # fmt: skip
    return solution


def _tune_tail(
    plan: Plan, settings: TailAware, recorder: Recorder, completed: list[Solution[FlowModel]]
) -> Solution[FlowModel]:
    """The main solve of a tail-aware run."""
    objective = plan.experiment.objective
    return tail_aware(
        settings.utility_of(objective, plan.prior), plan.pretrained.model,
        plan.experiment.solver, weight=objective.weight, prior=plan.prior,
        context=recorder.context(), bank_size=settings.bank_size, max_rounds=settings.max_rounds,
        ease=settings.ease, anyway=settings.anyway, completed=completed,
        on_round=recorder.on_round,
    )  # fmt: skip


def _ended(plan: Plan, solved: Sequence[Solved]) -> bool:
    """Whether no iteration is left: by number, by tolerance, or because the solver gave up."""
    algorithm, last = plan.experiment.algorithm, solved[-1]
    if isinstance(algorithm, TailAware):
        return bool(last.stats["settled"]) or len(solved) >= algorithm.max_rounds
    if last.result in (Result.STARVED, Result.DEGENERATE):
        return True
    if plan.planned:
        exhausted = bool(last.stats["plan_exhausted"])
        return not exhausted or len(solved) >= algorithm.planning.max_rounds
    stationarity = last.notes["stationarity"]
    return len(solved) >= algorithm.num_iterations or (
        stationarity is not None and stationarity < algorithm.tolerance
    )


def _density(plan: Plan) -> Callable[[FlowModel, Seed], Density]:
    algorithm, sampler = plan.experiment.algorithm, plan.training_sampler
    return lambda model, seed: algorithm.density(model, sampler, seed, plan.conditions)


ATTEMPTS = 4
"""Solves that a baseline may take to come as far as the main result."""


def _compare(
    plan: Plan,
    settings: Baseline,
    tuned: Solution[FlowModel],
    directory: RunDirectory,
    recorder: Recorder,
) -> tuple[float, Solution[FlowModel]]:
    """The baseline: one solve of the pre-trained model, at a matched distance."""
    if recorder.baseline is not None:
        return float(recorder.baseline.notes["rate"]), _solution(plan, recorder.baseline)
    potential = settings.utility.first_variation(plan.prior)
    rate: float | None = settings.rate
    notes: dict[str, float | str] = {}
    if rate is None:
        rate, matched = _matched(plan, settings, potential, tuned.model)
        notes.update(matched)
    solution: Solution[FlowModel] | None = None
    for attempt in range(ATTEMPTS):
        context = recorder.context().child("baseline", attempt)
        solution = plan.experiment.solver.solve(
            ControlProblem(plan.pretrained.model, rate * potential, plan.conditions), context,
            init=None if solution is None else solution.model,
        )  # fmt: skip
        recorder.journal.passed(context.seed.path)
        # A trained model is not as far as the exact tilt: go on from it with another rate.
        missed = float(notes.get("matched_kl", 0.0)) / max(solution.stats["path_kl"], 1e-9)
        if settings.rate is not None or attempt + 1 == ATTEMPTS or 0.9 < missed < 1.1:
            break
        rate *= min(max(missed**0.7, 0.2), 5.0)
    assert solution is not None
    notes |= {"rate": rate, "result": solution.result.name}
    recorder.on_baseline(solution, notes)
    return rate, solution


def _matched(
    plan: Plan, settings: Baseline, potential: Potential, tuned: FlowModel
) -> tuple[float, dict[str, float]]:
    """The rate at which the exact tilt is as far from the pre-trained model as ``tuned`` is."""
    sampler, count = plan.training_sampler, settings.num_samples
    seed = plan.seed.child("baseline", "bank")
    bank = sampler.sample(plan.pretrained.model, count, seed=seed)
    values = potential.value(bank).cpu()
    kl = _measured_kl(plan, tuned)
    rate = matching_rate(values, kl.value)
    return rate, {"matched_kl": kl.value, "tilt_kl": tilt_kl(values, rate)}


def _measured_kl(plan: Plan, tuned: FlowModel) -> Estimate:
    sampler = plan.training_sampler
    return path_kl(
        tuned, plan.pretrained.model, sampler=sampler,
        count=min(plan.experiment.evaluate.num_samples, sampler.batch_size),
        seed=plan.seed.child("baseline", "path_kl"),
    )  # fmt: skip


def _solution(plan: Plan, solved: Solved) -> Solution[FlowModel]:
    model = plan.pretrained.model.clone()
    model.trainable.load_state_dict(dict(solved.tensors))
    return Solution(freeze(model), solved.result, solved.stats)
