"""Tail-aware Flow Fine-Tuning: a left or right CVaR for the price of one fine-tuning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

from tiltflow.algorithms.planning import corrected
from tiltflow.algorithms.thresholds import Threshold, smallest_weight, tail_threshold
from tiltflow.context import Context
from tiltflow.density import Density, FlowDensity, Reweighted
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.potential import ZERO, remembering
from tiltflow.problem import ControlProblem, Solution, Solver
from tiltflow.seed import Seed
from tiltflow.utilities import LeftCVaR, RightCVaR

RECALIBRATE = 0.1
"""Relative error of the realised tail mass from which on the threshold is found once more."""


def ignore(number: int, threshold: Threshold, solution: Solution[FlowModel]) -> None:
    """Default of ``on_round``."""


def tail_aware(
    utility: LeftCVaR | RightCVaR,
    model: FlowModel,
    solver: Solver[FlowModel],
    *,
    weight: float,
    prior: FlowDensity,
    context: Context,
    bank_size: int = 10_000,
    max_rounds: int = 1,
    anyway: bool = False,
    on_round: Callable[[int, Threshold, Solution[FlowModel]], None] = ignore,
) -> Solution[FlowModel]:
    """Maximise a tail less ``weight`` KL in two stages (TFFT, arXiv 2602.16796)::

        1. the optimal threshold y* on a bank of pre-trained samples   (``tail_threshold``)
        2. one fine-tuning for the hinge at y*, divided by the weight

    Exact for both tails: the two maxima commute on the left, and the minimum and the maximum on
    the right, where the problem is concave.

    Where the bank is too small for the weight, stage 2 would starve: no roll-out would feel the
    hinge. With ``max_rounds = 1`` that is refused before any training, and the smallest weight
    that the bank supports is named. With more rounds, a model is tuned for that weight, and the
    next threshold is found on samples of this model, weighted by dP_prior / dP_tuned along their
    paths, until the weight that was asked for is reached. There, rounds that are left recalibrate
    the threshold in the same way, while the realised tail mass is more than 10 % off.

    Args:
        utility: the tail.
        model: the pre-trained model.
        solver: a trained solver.
        weight: of the KL, in units of the reward.
        prior: the density of ``model``.
        context: seed, backend, callbacks; round r runs at the address ``round/r``.
        bank_size: samples that a threshold is found on; more where the tail needs them.
        max_rounds: trainings at most.
        anyway: continue with a warning, where it would be refused.
        on_round: called with each threshold and its solution.

    Returns:
        the last solution. ``stats`` has added: ``threshold``, ``weight``, ``plan_objective``,
        ``plan_kl`` and ``plan_tail_mass`` of stage 1, ``active`` (part of the first roll-outs with
        a gradient), ``tail_mass`` (P(r beyond y*) of fresh samples of the tuned model: the level
        or 1 - level after a perfect training), ``tail`` and ``tail_error``, its CVaR, and
        ``rounds``.

    Raises:
        UnsupportedError: before any training, where stage 2 would starve; after the last round,
            if the weight has not been reached. Not with ``anyway``.
    """
    if max_rounds < 1:
        raise ConfigError(f"tail_aware: max_rounds={max_rounds} must be at least 1.")
    if max_rounds > 1 and prior.conditions is not None:
        raise UnsupportedError(
            "tail_aware: rounds re-weight samples of a tuned model, which would change the law of "
            "the conditions. Use max_rounds=1 for conditional models."
        )
    last = Solution(model)
    for r in range(max_rounds):
        at = context.child("round", r)
        size = max(bank_size, utility.samples_needed)
        law: Density = prior.at_least(size)
        if r > 0:
            bank = corrected(last.model, model, ZERO, prior, size, at.seed.child("bank"))
            law = Reweighted(bank, prior.log)
        with remembering(law.bank.points):
            found = tail_threshold(utility, weight, law)
            final = found.problem is None or (anyway and r == max_rounds - 1)
            if not final:
                found = _milder(utility, law, found, refuse=r == max_rounds - 1)
        if final and found.problem is not None:
            warnings.warn(
                f"tail_aware: {found.problem}. The fine-tuning may starve.",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        found.potential.require(solver.needs, type(solver).__name__)
        problem = ControlProblem(model, found.potential, prior.conditions)
        last = solver.solve(problem, at, init=last.model)
        last = replace(
            last, stats={**last.stats, **_stats(utility, found, prior, last.model, at.seed, r)}
        )
        on_round(r, found, last)
        off = abs(last.stats["tail_mass"] / found.level_mass - 1)
        if final and off <= RECALIBRATE:
            break
    return last


def _milder(
    utility: LeftCVaR | RightCVaR, law: Density, wanted: Threshold, refuse: bool
) -> Threshold:
    """The threshold for the smallest weight that the bank supports."""
    least = smallest_weight(utility, law)
    if refuse:
        raise UnsupportedError(
            f"tail_aware: at weight {wanted.weight:.4g}, {wanted.problem}. This bank supports "
            f"weights of {least:.3g} and more: raise the weight, draw a larger bank, or give "
            "more max_rounds to get there by tuning in between."
        )
    return tail_threshold(utility, least, law)


def _stats(
    utility: LeftCVaR | RightCVaR,
    found: Threshold,
    prior: FlowDensity,
    model: FlowModel,
    seed: Seed,
    r: int,
) -> dict[str, float]:
    """What stage 1 said, and what fresh samples of the tuned model say."""
    size = max(prior.num_samples, round(1000 / found.level_mass))
    p = FlowDensity(
        model, sampler=prior.sampler, num_samples=size, seed=seed.child("realised"),
        conditions=prior.conditions,
    )  # fmt: skip
    with remembering(p.bank.points):
        tail, beyond = utility.value(p), p.expect(lambda x, c: found.hinge.active(x, c).double())
    return {
        "threshold": found.hinge.threshold, "weight": found.weight,
        "plan_objective": found.value, "plan_kl": found.kl, "plan_tail_mass": found.tail_mass,
        "active": found.active, "tail_mass": float(beyond),
        "tail": tail.value, "tail_error": tail.standard_error, "rounds": r + 1.0,
    }  # fmt: skip
