"""Tail-aware Flow Fine-Tuning: a certainty equivalent for the price of one fine-tuning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from tiltflow.algorithms.planning import corrected, untouched
from tiltflow.algorithms.thresholds import (
    Ease,
    Thresholds,
    certainties_of,
    eased,
    smallest_weight,
    thresholds_of,
)
from tiltflow.context import Context
from tiltflow.density import Density, FlowDensity, Reweighted
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.functional import Certainty, Functional, influence
from tiltflow.potential import ZERO, remembering
from tiltflow.problem import ControlProblem, Result, Solution, Solver
from tiltflow.seed import Seed
from tiltflow.types import Access, Estimate

RECALIBRATE = 0.1
"""Relative error of the realised tail mass from which on the threshold is found once more."""

FAILED = 0.3
"""Relative error of the realised tail mass from which on the result comes with a warning."""

REALISED = 400
"""Samples in the tail that the realised tail mass is measured on: good to 5 %."""


def ignore(number: int, found: Thresholds, solution: Solution[FlowModel]) -> None:
    """Default of ``on_round``."""


def tail_aware(
    utility: Functional,
    model: FlowModel,
    solver: Solver[FlowModel],
    *,
    weight: float,
    prior: FlowDensity,
    context: Context,
    bank_size: int = 10_000,
    max_rounds: int = 1,
    ease: Ease = "level",
    anyway: bool = False,
    tail_samples: int = REALISED,
    completed: Sequence[Solution[FlowModel]] = (),
    on_round: Callable[[int, Thresholds, Solution[FlowModel]], None] = ignore,
) -> Solution[FlowModel]:
    """Maximise a CVaR less ``weight`` KL in two stages (TFFT, arXiv 2602.16796)::

        1. the optimal threshold y* on a bank of pre-trained samples   (``optimal_thresholds``)
        2. one fine-tuning for the hinge at y*, divided by the weight

    Exact for both tails: the two maxima commute on the left, and the minimum and the maximum on
    the right, where the problem is concave. Generalised here to every certainty equivalent
    opt_y {y + E u(r - y)}, where u(r - y*) takes the place of the hinge, and to sums of them, with
    a threshold each (spectral risks).

    Where the bank is too small for the weight, stage 2 would starve: no roll-out would feel the
    hinge. With ``max_rounds = 1`` that is refused before any training, and the smallest weight
    that the bank supports is named. With more rounds, a model is tuned for a milder problem that
    the bank supports (``ease``), and the next thresholds are found on samples of this model,
    weighted by dP_prior / dP_tuned along their paths, until what was asked for is reached. There,
    rounds that are left recalibrate the thresholds in the same way, while the realised tail mass
    is more than 10 % off.

    Args:
        utility: one that ``optimal_thresholds`` can take, such as ``LeftCVaR``.
        model: the pre-trained model.
        solver: a trained solver.
        weight: of the KL, in units of the reward.
        prior: the density of ``model``.
        context: seed, backend, callbacks; round r runs at the address ``round/r``.
        bank_size: samples that a threshold is found on; more where the tail needs them.
        max_rounds: trainings at most.
        ease: what is made milder in rounds before the last, see ``thresholds.eased``. Of the
            three, wider tails come closest where it was measured (docs/tfft.md).
        anyway: continue with a warning, where it would be refused.
        tail_samples: in the tail of the tuned model, on which the result is checked; the default
            is good to 5 % and takes 400 / level fresh samples, which may cost more than the
            training where samples or rewards are slow.
        completed: solutions of the first rounds of an earlier run with the same arguments, taken
            instead of solved and not told to ``on_round`` again; the rest is the same bit for bit.
        on_round: called with the number, the thresholds and the solution of each new round.

    Returns:
        the last solution. ``stats`` has added, of stage 1: ``threshold`` (``threshold_0``, ...
        where there are several), ``weight``, ``plan_objective``, ``plan_kl``, ``bank_error`` (of
        the tail mass, relative, because the bank is finite), ``active`` (part of the first
        roll-outs with a gradient), ``beyond`` (samples of the bank with one), ``bank`` (their
        whole number). Of fresh samples of the tuned model: ``drive``, E u'(r - y*), of the
        threshold where it is farthest from 1, with ``drive_error``; ``tail`` and ``tail_error``,
        the utility; ``fresh``, their number, ``tail_samples`` in the tail; for a single CVaR
        ``tail_mass`` and ``tail_mass_error``, P(r beyond y*), which after a perfect training is
        ``level_mass``, the level or 1 - level. ``rounds``, and ``settled``: 1 if what was asked
        for is reached and the drive is right to 10 %, or to two errors beyond that, so that no
        round is left to do. A model that stayed where it was ends ``STARVED``, with a warning.

    Raises:
        UnsupportedError: before any training, for a utility that thresholds do not solve, or where
            stage 2 would starve; after the last round, if the weight has not been reached. Not
            with ``anyway``.
    """
    if max_rounds < 1:
        raise ConfigError(f"tail_aware: max_rounds={max_rounds} must be at least 1.")
    if not 0 < weight < math.inf:
        raise ConfigError(f"tail_aware: weight={weight!r} must be positive and finite.")
    if ease not in ("weight", "level", "width"):
        raise ConfigError(f"tail_aware: ease={ease!r} must be 'weight', 'level' or 'width'.")
    if tail_samples < 1:
        raise ConfigError(f"tail_aware: tail_samples={tail_samples} must be at least 1.")
    if max_rounds > 1 and prior.conditions is not None:
        raise UnsupportedError(
            "tail_aware: rounds re-weight samples of a tuned model, which would change the law of "
            "the conditions. Use max_rounds=1 for conditional models."
        )
    parts = certainties_of(utility)
    for part in parts:
        part.reward.require(Access.VALUE, "tail_aware")
        part.at(0.0).require(solver.needs, type(solver).__name__)
    last = completed[-1] if completed else Solution(model)
    for r in range(len(completed), max_rounds):
        if ended(last):
            break
        at = context.child("round", r)
        size = max(bank_size, utility.samples_needed)
        law: Density = prior.at_least(size)
        if r > 0:
            bank = corrected(last.model, model, ZERO, prior, size, at.seed.child("bank"))
            law = Reweighted(bank, prior.log)
        found, final = _thresholds(utility, parts, weight, law, ease, anyway, max_rounds - r)
        problem = ControlProblem(model, found.potential, prior.conditions)
        last = solver.solve(problem, at, init=last.model)
        fresh = _fresh(found, prior, last.model, at.seed, tail_samples)
        stats = _stats(utility, found, fresh, r)
        off = abs(stats["drive"] - 1) - 2 * stats["drive_error"]
        stats["settled"] = float(final and off <= RECALIBRATE)
        last = replace(last, stats={**last.stats, **stats})
        last = _checked(last, found) if r == 0 else last
        on_round(r, found, last)
    _warn_if_failed(last)
    return last


def ended(last: Solution[FlowModel]) -> bool:
    """Whether no round should follow: settled, or the solver gave up."""
    return bool(last.stats.get("settled")) or last.result in (Result.STARVED, Result.DEGENERATE)


def _thresholds(
    utility: Functional,
    parts: tuple[Certainty, ...],
    weight: float,
    law: Density,
    ease: Ease,
    anyway: bool,
    rounds_left: int,
) -> tuple[Thresholds, bool]:
    """What this round trains for, and whether it is what was asked for."""
    with remembering(law.bank.points):
        found = thresholds_of(parts, weight, law)
        if found.problem is None:
            return found, True
        if rounds_left > 1:
            return eased(parts, weight, law, ease), False
        if anyway:
            warnings.warn(
                f"tail_aware: {found.problem}. The fine-tuning may starve.",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
            return found, True
        raise UnsupportedError(
            f"tail_aware: at weight {weight:.4g}, {found.problem}. This bank supports weights of "
            f"{smallest_weight(utility, law):.3g} and more: raise the weight, draw a larger bank, "
            "or give more max_rounds to get there by tuning in between."
        )


def _checked(last: Solution[FlowModel], found: Thresholds) -> Solution[FlowModel]:
    """``STARVED``, with a warning, if the model stayed where it was."""
    kl = last.stats.get("path_kl", math.nan)
    if not untouched(kl, found.kl):
        return last
    warnings.warn(
        f"tail_aware: the optimum is {found.kl:.3g} nats from the start, but the tuned model only "
        f"{kl:.2g}: the training has starved. Raise the weight, give more max_rounds, or give the "
        "solver more trajectories or updates.",
        RuntimeWarning, stacklevel=3,
    )  # fmt: skip
    return replace(last, result=Result.STARVED)


def _warn_if_failed(last: Solution[FlowModel]) -> None:
    """Say it where the tuned model is far from what its thresholds ask for."""
    stats, starved = last.stats, last.result is Result.STARVED  # which has been said
    if not starved and abs(stats["drive"] - 1) - 2 * stats["drive_error"] > FAILED:
        warnings.warn(
            f"tail_aware: E u'(r - y*) of the tuned model, its tail mass over the level for a "
            f"CVaR, is {stats['drive']:.2g} +- {stats['drive_error']:.1g} and should be 1: the "
            "training has not reached the optimum. Give the solver more updates, allow more "
            "max_rounds, or raise the weight.",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


def _fresh(
    found: Thresholds, prior: FlowDensity, model: FlowModel, seed: Seed, tail_samples: int
) -> FlowDensity:
    """The law of the tuned model, with so many samples in its smallest tail."""
    least = min(part.shape.tail for part in found.parts)
    count = max(prior.num_samples, round(tail_samples / least))
    return FlowDensity(
        model, sampler=prior.sampler, num_samples=count, seed=seed.child("realised"),
        conditions=prior.conditions,
    )  # fmt: skip


def _stats(utility: Functional, found: Thresholds, p: FlowDensity, r: int) -> dict[str, float]:
    """What stage 1 said, and what fresh samples ``p`` of the tuned model say."""
    p = p.at_least(utility.samples_needed)
    with remembering(p.bank.points):
        tail = utility.value(p)
        drives = [_drive(found.parts[k], found.at[k], p) for k in found.bent]
    worst = max(drives, key=lambda d: abs(d.value - 1), default=Estimate(1.0))
    numbers = [f"threshold_{k}" for k in found.bent] if len(found.bent) > 1 else ["threshold"]
    stats = dict(zip(numbers, (found.at[k] for k in found.bent), strict=False))
    if found.tail is not None:
        stats |= {
            "level_mass": found.tail, "tail_mass": found.tail * worst.value,
            "tail_mass_error": found.tail * worst.standard_error,
        }  # fmt: skip
    return stats | {
        "weight": found.weight, "plan_objective": found.value, "plan_kl": found.kl,
        "bank_error": found.bank_error, "active": found.active, "beyond": found.beyond,
        "bank": float(found.count),
        "drive": worst.value, "drive_error": worst.standard_error,
        "tail": tail.value, "tail_error": tail.standard_error, "fresh": float(tail.count),
        "rounds": r + 1.0,
    }  # fmt: skip


def _drive(part: Certainty, y: float, p: Density) -> Estimate:
    """E u'(r - y); where rewards are tied at a kink, the number between the slopes of both sides
    that is nearest to 1, because any is a slope there."""
    t = influence(part.reward, p) - y
    nudge = 1e-9 * max(float(t.abs().max()), 1e-300)
    below, above = (part.shape.applied(t + d)[1] for d in (-nudge, nudge))
    sides = (p.estimate(lambda x, c: below), p.estimate(lambda x, c: above))
    low, high = sorted(sides, key=lambda e: e.value)
    return replace(low, value=min(max(low.value, 1.0), high.value))
