"""Plain words about a result: is it good, hacked, collapsed, or did nothing happen?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from tiltflow.problem import Result
from tiltflow.types import Estimate

LARGE_KL = 8.0
"""Nats. Above it, fewer than one in 3000 pre-trained samples could be one of the tuned model."""
STILL_KL = 0.01
"""Nats. Below it, a sample hardly tells the tuned from the pre-trained model."""
COLLAPSE = 0.5
"""A class with less than this part of its pre-trained share has collapsed."""
SMALL_ESS = 0.1
"""Effective share of the samples under which the distance to the optimum is large."""
OFF_LEVEL = 0.1
"""Relative error of a tail mass that is worth a word, if it is also three standard errors."""
SLOPES = (0.7, 1.4)
"""Slope of the achieved tilt that counts as having arrived."""

MOLECULES = {
    "atom_stability": "the share of stable atoms",
    "molecule_stability": "the share of stable molecules", "valid": "the share of valid molecules",
    "valid_connected": "the share of valid molecules in one piece",
    "unique": "the share of distinct ones among the valid",
    "vendi": "the effective number of different ones",
}  # fmt: skip
"""Metrics of molecules of which more is better, and what they are."""

EXPLANATIONS = (
    ("tilt.slope", "Achieved tilt: slope",
     "Regression of the path's log-ratio to the pre-trained model on what the objective's optimum "
     "says it should be. 1: the optimum; under 1: short of it; over 1: beyond."),
    ("tilt.r2", "Achieved tilt: R²",
     "How much of the log-ratio that explains. Low values: the model changed in ways that the "
     "objective does not ask for (or hardly changed at all)."),
    ("reward_tilt.slope", "Log-ratio on the reward: slope",
     "The same regression on the reward itself. For plain expected-reward tuning it is the rate, "
     "1/weight; positive means that better samples became more likely."),
    ("reward_tilt.r2", "Log-ratio on the reward: R²",
     "Near 1 only if the objective is the mean of the reward; a tail objective bends the tilt."),
    ("tilt.ess", "Effective sample size",
     "Share of the tuned samples that would be left after re-weighting them into the exact "
     "optimum. Near 1: nothing left to gain. Under 0.1: far from it."),
    ("entropy_change", "Entropy change, nats",
     "Nearest-neighbour estimate (Kozachenko-Leonenko, third neighbour, up to 2000 samples). "
     "Negative: less diverse. In many dimensions biased; read sign and order of magnitude."),
)  # fmt: skip
"""Metric, its name for people, and what it means."""

Level = Literal["warning", "note"]


@final
@dataclass(frozen=True)
class Finding:
    """One sentence or two about a run, with the numbers it rests on."""

    level: Level
    title: str
    text: str


@final
@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a diagnosis looks at."""

    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]
    shares_before: Mapping[str, Estimate] = field(default_factory=dict)
    shares_after: Mapping[str, Estimate] = field(default_factory=dict)
    result: Result = Result.DONE
    stats: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 0
    judges: tuple[str, ...] = ()
    baseline: Mapping[str, Estimate] | None = None

    @property
    def gain(self) -> float:
        """Rise of the mean reward."""
        return self.after["reward.mean"].value - self.before["reward.mean"].value


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, warnings first."""
    found = [finding for rule in _RULES if (finding := rule(facts)) is not None]
    return sorted(found, key=lambda f: f.level != "warning")


def _hacking(facts: Facts) -> Finding | None:
    kl, gain = facts.after["path_kl"].value, facts.gain
    spread = facts.before["reward.std"].value
    if kl <= LARGE_KL or gain <= 0:
        return None
    return Finding(
        "warning", "The reward rises while the distance explodes",
        f"The mean reward rose by {gain:.3g} ({gain / max(spread, 1e-300):.2g} standard "
        f"deviations), at a path-KL of {kl:.3g} nats; above {LARGE_KL:g} nats fewer than one in "
        f"{math.exp(LARGE_KL):.0f} pre-trained samples look like a tuned one. This is how reward "
        "hacking looks. Look at the samples; raise the weight of the divergence.",
    )  # fmt: skip


def _judged(facts: Facts) -> Finding | None:
    for judge in facts.judges:
        before, after = facts.before[f"{judge}.mean"], facts.after[f"{judge}.mean"]
        error = math.hypot(before.standard_error, after.standard_error)
        if facts.gain > 0 and after.value < before.value - 3 * error:
            return Finding(
                "warning", "An independent judge disagrees",
                f"The reward rose, but the {judge}, which took no part in the training, fell "
                f"from {before.value:.3g} to {after.value:.3g}: the reward was hacked. Raise the "
                "weight of the divergence, or use a more robust reward.",
            )  # fmt: skip
    return None


def _molecules(facts: Facts) -> Finding | None:
    """Of stability, validity and diversity each is easily raised at the cost of the others."""
    fell = []
    for key, told in MOLECULES.items():
        before, after = facts.before.get(f"molecules.{key}"), facts.after.get(f"molecules.{key}")
        # Told of the valid molecules only, the last two are compared where these are not fewer.
        if before is None or after is None or after.count < before.count:
            continue
        error = math.hypot(before.standard_error, after.standard_error)
        if after.value < before.value - 3 * error:
            fell.append(f"{told} from {before.value:.3g} to {after.value:.3g}")
    if not fell or facts.gain <= 0:
        return None
    return Finding(
        "warning", "The reward rose and the molecules got worse",
        f"Beyond three standard errors fell: {'; '.join(fell)}. Look at the molecules below; "
        "raise the weight of the divergence, or add what fell to the reward.",
    )  # fmt: skip


def _still(facts: Facts) -> Finding | None:
    kl, gain = facts.after["path_kl"], facts.after.get("gain.mean", Estimate(0.0))
    if kl.value > STILL_KL or abs(gain.value) > 3 * gain.standard_error > 0:
        return None
    return Finding(
        "warning", "Nothing moved",
        f"The path-KL is {kl.value:.2g} nats and the mean reward changed by {gain.value:.2g} "
        f"± {gain.standard_error:.1g}. Either a knob is off (rate too small, weight too large, "
        "too few updates, learning rate too low) or the reward's gradient does not reach the "
        "model.",
    )  # fmt: skip


def _collapse(facts: Facts) -> Finding | None:
    lost = []
    for name, before in facts.shares_before.items():
        after = facts.shares_after[name]
        # Two standard errors of slack: a rare class may look halved by chance.
        slack = 2 * math.hypot(after.standard_error, COLLAPSE * before.standard_error)
        if after.value < COLLAPSE * before.value - (slack if before.count < 1000 else 0):
            lost.append(f"{name} ({before.value:.1%} to {after.value:.1%})")
    if not lost:
        return None
    return Finding(
        "warning", "Diversity collapsed",
        f"Under half of its pre-trained share: {', '.join(lost)}. The reward prefers other "
        "classes, or the tilt is too strong; raise the weight of the divergence.",
    )  # fmt: skip


def _starved(facts: Facts) -> Finding | None:
    active = facts.stats.get("active")
    if facts.result is Result.DONE or facts.result is Result.CONVERGED:
        if active is None or active >= 0.01:
            return None
        text = f"Only {active:.2%} of the training samples had a gradient of the reward."
        return Finding("warning", "Starved gradients", f"{text} {Result.STARVED.value}.")
    return Finding("warning", "The solver gave up", f"{facts.result.name}: {facts.result.value}.")


def _unconverged(facts: Facts) -> Finding | None:
    slope, r2 = facts.after.get("tilt.slope"), facts.after.get("tilt.r2")
    if slope is None or r2 is None or SLOPES[0] <= slope.value <= SLOPES[1]:
        return None
    side = "short of" if slope.value < SLOPES[0] else "beyond"
    return Finding(
        "note", f"The model is {side} the optimum of its objective",
        f"The achieved tilt has slope {slope.value:.2f} (1 is the optimum; R² {r2.value:.2f}). "
        "More iterations or updates, or other rates, would bring it closer. The result is still "
        "what the table says: a model at the stated distance with the stated reward.",
    )  # fmt: skip


def _off_level(facts: Facts) -> Finding | None:
    """After a tail-aware run: E u'(r - y*) should be 1, which for a CVaR is a tail mass."""
    drive, error = facts.stats.get("drive"), facts.stats.get("drive_error", 0.0)
    if drive is None or abs(drive - 1) <= max(OFF_LEVEL, 3 * error):
        return None
    level = facts.stats.get("level_mass")
    if level is None:
        told = (
            f"E u'(r - y*) is {drive:.3g} ± {error:.1g} at the threshold y* where it should be 1"
        )
    else:
        told = (
            f"{level * drive:.1%} ± {level * error:.1%} of the tuned model's samples are beyond "
            f"the threshold, which should be {level:.1%}"
        )
    rounds = facts.stats.get("rounds", 1.0)
    return Finding(
        "note", "The tuned model's tail is not that of the plan",
        f"{told[0].upper()}{told[1:]}. The training has not come as far as stage 1 planned, or "
        "went too far: train longer or with more trajectories, or give algorithm.max_rounds = "
        f"{rounds + 1:.0f} or more, which finds the threshold again on samples of the tuned "
        "model. Rewards that are tied at the threshold look the same.",
    )  # fmt: skip


def _small_ess(facts: Facts) -> Finding | None:
    ess = facts.after.get("tilt.ess")
    if ess is None or ess.value >= SMALL_ESS:
        return None
    return Finding(
        "note", "The tuned law and the exact optimum overlap little",
        f"Re-weighting the tuned samples into the optimum would leave {ess.value:.1%} of them "
        f"({ess.value * facts.num_samples:.0f} of {facts.num_samples}).",
    )  # fmt: skip


def _unmatched(facts: Facts) -> Finding | None:
    if facts.baseline is None:
        return None
    ours, theirs = facts.after["path_kl"].value, facts.baseline["path_kl"].value
    if abs(theirs - ours) <= 0.25 * max(ours, 0.01):
        return None
    return Finding(
        "note",
        "The baseline is not as far as the tuned model",
        f"Path-KL {theirs:.3g} nats against {ours:.3g}: its training did not reach the distance "
        "that its rate was chosen for, or the bank of pre-trained samples could not show so large "
        "a tilt. Compare the two with that in mind.",
    )


_RULES: tuple[Callable[[Facts], Finding | None], ...] = (
    _hacking, _judged, _molecules, _still, _collapse, _starved, _off_level, _unconverged,
    _small_ess, _unmatched,
)  # fmt: skip
