"""Thresholds of Tail-aware Flow Fine-Tuning: stage 1, on a bank of pre-trained samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from tiltflow.algorithms.threshold_search import Dual, best_thresholds
from tiltflow.density import Density
from tiltflow.errors import ConfigError, NonFiniteError, UnsupportedError
from tiltflow.functional import Certainty, Functional, Hinges, SoftHinge, influence, spread
from tiltflow.potential import Potential, combine, remembering

Ease: TypeAlias = Literal["weight", "level", "width"]
"""What is made milder where a bank is too small: the KL weighs more, the tails are wider, or
their hinges are rounded."""

ACTIVE = 0.01
"""Below this part of the pre-trained samples beyond the threshold, training would starve."""

BEYOND = 30
"""With fewer samples of the bank beyond the threshold, it is the bank's, not the law's."""

UNSURE = 0.25
"""Relative standard error of the tail mass beyond which the thresholds of a bank are noise."""

CARRIED = 0.5
"""Part of the logarithm of the bank's size up to which it knows the KL of a tilt."""


@final
@dataclass(frozen=True)
class Thresholds:
    """The optimum of certainty equivalents less ``weight`` KL on a bank (TFFT, stage 1).

    With y* the optimal thresholds, the optimum tilts the bank by exp(f / weight), where
    f = sum_k c_k u_k(r_k - y*_k), a hinge for a CVaR: the only fine-tuning that is needed is that
    for the reward f.

    Attributes:
        parts: c_k, u_k and r_k.
        at: y*_k, in units of the rewards; 0 for a line, which has none.
        weight: of the KL, in units of the reward.
        value: utility less weight * KL at the optimum.
        utility, kl: its two parts, on the tilted bank; KL in nats.
        drives: E[u_k'(r_k - y*_k)] under the tilt, 1 at an optimum without atoms. For a CVaR this
            is P(r beyond y*) over the mass of the tail.
        bank_error: standard error of the drives, the largest, because the bank is finite; 0 for
            quadrature nodes. That of the realised tail mass after a perfect training, relative.
        active: part of the samples with a gradient, in effect, (E s)^2 / E s^2 of the slopes
            s = u_k' less their least value, of the part that has fewest: P(r beyond y*) for a
            hinge. Of the first roll-outs, if the bank was drawn from the model that the training
            starts from.
        carried: KL of the tilt from the samples as they were drawn, over the logarithm of their
            number, which is the most that they can tell, in the condition where this is largest;
            0 for quadrature nodes.
        beyond: samples of the bank that have a gradient, in effect.
        effective_size: of the tilted bank, 1 / sum of squared weights.
        count: samples in the bank.
        rarest: samples of the condition that has fewest.
    """

    parts: tuple[Certainty, ...]
    at: tuple[float, ...]
    weight: float
    value: float
    utility: float
    kl: float
    drives: tuple[float, ...]
    bank_error: float
    active: float
    carried: float
    beyond: float
    effective_size: float
    count: int
    rarest: int

    @property
    def reward(self) -> Potential:
        """f = sum_k c_k u_k(r_k - y*_k), in units of the reward."""
        at = zip(self.parts, self.at, strict=True)
        return combine(*((part.scale, part.at(y)) for part, y in at))

    @property
    def potential(self) -> Potential:
        """The terminal reward of the fine-tuning, f / weight."""
        return (1 / self.weight) * self.reward

    @property
    def bent(self) -> tuple[int, ...]:
        """Which parts have a threshold: all but lines."""
        return tuple(k for k, part in enumerate(self.parts) if part.shape.bend != "none")

    @property
    def tail(self) -> float | None:
        """The mass of the tail, if this is one CVaR: what P(r beyond y*) should be."""
        shape = self.parts[0].shape
        if len(self.parts) > 1 or not isinstance(shape, Hinges) or shape.side is None:
            return None
        return shape.tail

    @property
    def problem(self) -> str | None:
        """Why a fine-tuning for these thresholds would fail, or ``None``."""
        if not self.bent:
            where = ""
        else:
            many = "s" if len(self.bent) > 1 else ""
            numbers = ", ".join(f"{self.at[k]:.4g}" for k in self.bent[:4])
            where = f" beyond the threshold{many} {numbers}{', ...' if len(self.bent) > 4 else ''}"
        if self.beyond < BEYOND:
            return (
                f"only {self.beyond:.3g} of {self.count} samples are{where}, so that it says "
                "more about the bank than the law"
            )
        if self.rarest < BEYOND and self.rarest < self.count:
            return (
                f"the rarest condition has {self.rarest} samples in the bank, and each condition "
                "has a normaliser of its own"
            )
        if self.carried > CARRIED:
            most = math.log(self.count)
            return (
                f"the tilt is {self.carried * most:.1f} nats from the samples, and {self.count} "
                f"of them cannot tell more than {most:.1f}"
            )
        if self.bank_error > UNSURE:
            return (
                f"{self.count} samples know the mass{where} only to "
                f"{100 * self.bank_error:.0f} % of what it is"
            )
        if self.active < ACTIVE:
            return (
                f"only {100 * self.active:.2g} % of the samples are{where}, so that most "
                "roll-outs would teach nothing"
            )
        return None

    def require_learnable(self) -> None:
        """Raise ``UnsupportedError``, with a remedy, where a fine-tuning would fail."""
        if self.problem is not None:
            raise UnsupportedError(
                f"Tail-aware fine-tuning: {self.problem}. Raise the weight of the KL "
                "(`smallest_weight` says how far), choose a less extreme level, or draw a larger "
                "bank."
            )


def optimal_thresholds(utility: Functional, weight: float, prior: Density) -> Thresholds:
    """The optimal thresholds for ``utility - weight * KL(prior)`` on the bank of ``prior``.

    For a certainty equivalent opt_y {y + E_p u(r - y)}, the optimum is that of::

        V(y) = y + w E_h log E_q[exp(u(r - y) / w) | h]

    over y, a minimum where u is convex (RightCVaR; V is convex) and a maximum where it is concave
    (LeftCVaR; V has several local maxima), with w = ``weight`` (methods, sections 4.2 and 4.3,
    for CVaRs). Sums of them have a threshold each. Conditional models have one normaliser for each
    condition h, and thresholds in common. How V is searched: ``best_thresholds``.

    Args:
        utility: of which ``certainties()`` is not ``None``: CVaRs, spectral and entropic risks,
            mean less variance, ``CertaintyEquivalent``, expected rewards, and their sums.
        weight: of the KL, in units of the reward; the same in both stages.
        prior: the pre-trained law; its bank grows to what the tail needs.

    Raises:
        ConfigError: for a weight that is not positive.
        UnsupportedError: for another utility, or where some parts favour the best and others
            guard against the worst.
    """
    return thresholds_of(certainties_of(utility), weight, prior.at_least(utility.samples_needed))


def certainties_of(utility: Functional) -> tuple[Certainty, ...]:
    """The certainty equivalents that a utility is a sum of.

    Raises:
        UnsupportedError: if it is none.
    """
    parts = utility.certainties()
    if not parts:
        raise UnsupportedError(
            f"{utility} is not a sum of certainty equivalents (a CVaR, a spectral or entropic "
            "risk, a mean less a variance, a CertaintyEquivalent or an expected reward), so that "
            "thresholds do not solve it. Use plan_and_tune, which takes any utility."
        )
    return parts


def thresholds_of(parts: tuple[Certainty, ...], weight: float, p: Density) -> Thresholds:
    """The optimal thresholds of certainty equivalents on the bank of ``p``.

    Raises:
        ConfigError: for a weight that is not positive.
        NonFiniteError: where a shape overflows at the rewards.
    """
    if not 0 < weight < math.inf:
        raise ConfigError(f"Thresholds: weight={weight!r} must be positive and finite.")
    dual = Dual.of(parts, weight, p)
    y = best_thresholds(dual)
    tilted, value = dual.tilted(y), dual.value(y)
    drives = dual.drives(y)
    if not all(map(math.isfinite, (value, *drives))):
        raise NonFiniteError(
            "Thresholds", f"{len(parts)} certainty equivalents", "the optimum",
            "Scale the rewards, or choose a smaller sensitivity or curvature.",
        )  # fmt: skip
    pairs = [(log, g) for (log, _), g in zip(tilted, dual.groups, strict=True)]
    kl = sum(
        g.share * float(torch.where(log.exp() > 0, log.exp() * (log - g.log_mass), 0.0).sum())
        for log, g in pairs
    )
    tilt = torch.cat([g.share * log.exp() for log, g in pairs])
    count = len(tilt)
    active = min((_active(dual, k, y[k], p.bank.exact) for k in range(len(parts))), default=1.0)
    return Thresholds(
        parts, y, weight, value, value + weight * kl, kl, drives,
        0.0 if p.bank.exact else dual.error(y), active,
        0.0 if p.bank.exact else max(_carried(log) for log, _ in pairs),
        active * count, 1 / float(tilt.square().sum()), count,
        count if p.bank.exact else min(len(log) for log, _ in pairs),
    )  # fmt: skip


def _carried(log: Tensor) -> float:
    """KL of a tilt, of log weights (n,), from equal weights, over log n."""
    n = len(log)
    return (
        1.0 if n < 2 else 1 + float(torch.special.xlogy(log.exp(), log.exp()).sum()) / math.log(n)
    )


def _active(dual: Dual, k: int, y: float, exact: bool) -> float:
    """(E s)^2 / E s^2 of the slopes of part k, over samples as they were drawn, or nodes."""
    part, first, second = dual.parts[k], 0.0, 0.0
    if part.shape.bend == "none":
        return 1.0
    # What all samples have in common does not say whether they feel the hinge as well.
    common = min(part.shape.slopes) if isinstance(part.shape, Hinges) and part.shape.knots else 0.0
    for g in dual.groups:
        slope = part.shape.applied(g.rewards[k] - y)[1].sub(common).abs()
        mass = g.share * g.log_mass.exp() if exact else torch.ones_like(slope)
        first, second = (
            first + float((mass * slope).sum()),
            second + float((mass * slope**2).sum()),
        )
    total = 1.0 if exact else float(sum(len(g.log_mass) for g in dual.groups))
    return first**2 / (second * total) if second > 0 else 0.0


def smallest_weight(utility: Functional, prior: Density, precision: float = 0.05) -> float:
    """The smallest weight of the KL, to a relative ``precision``, that the bank supports.

    By bisection of ``Thresholds.problem`` between 1e-3 and 1e3 standard deviations of the reward.

    Raises:
        UnsupportedError: if even the largest is too small for the bank.
    """
    p = prior.at_least(utility.samples_needed)
    parts = certainties_of(utility)
    with remembering(p.bank.points):
        scale = _unit(parts, p)
        low, high = 1e-3 * scale, 1e3 * scale
        thresholds_of(parts, high, p).require_learnable()
        while high / low > 1 + precision:
            middle = math.sqrt(low * high)
            fine = thresholds_of(parts, middle, p).problem is None
            low, high = (low, middle) if fine else (middle, high)
    return high


def eased(parts: tuple[Certainty, ...], weight: float, p: Density, ease: Ease) -> Thresholds:
    """The thresholds of the least mild problem that the bank of ``p`` supports.

    With s from 0 (mild) to 1 (as asked): ``"weight"`` multiplies the weight by up to a thousand
    standard deviations of the reward, geometrically; ``"level"`` makes a tail of mass m one of
    mass m^s, and brings other slopes nearer to 1; ``"width"`` rounds hinges over 10 (1 - s)^2
    standard deviations. Where that is not mild enough, the weight is eased instead.

    Raises:
        UnsupportedError: if even the mildest is too much.
    """
    unit = _unit(parts, p)

    def milder(s: float) -> Thresholds:
        if ease == "weight":
            most = max(1e3 * unit, weight)
            return thresholds_of(parts, weight**s * most ** (1 - s), p)
        if ease == "level":
            return thresholds_of(tuple(_wider(part, s) for part in parts), weight, p)
        width = 10 * unit * (1 - s) ** 2
        return thresholds_of(tuple(_rounder(part, width) for part in parts), weight, p)

    low, high = 0.02, 1.0
    best = milder(low)
    if best.problem is not None and ease != "weight":
        return eased(parts, weight, p, "weight")
    best.require_learnable()
    for _ in range(10):
        middle = 0.5 * (low + high)
        found = milder(middle)
        if found.problem is None:
            low, best = middle, found
        else:
            high = middle
    return best


def _wider(part: Certainty, s: float) -> Certainty:
    shape = part.shape
    if isinstance(shape, SoftHinge):
        return replace(part, shape=replace(shape, mass=shape.mass**s))
    if isinstance(shape, Hinges) and shape.bend != "none":
        slopes = tuple(1 + (v - 1) * s for v in shape.slopes)
        if shape.side is not None:
            slopes = tuple(v**s if v > 0 else 0.0 for v in shape.slopes)
        return replace(part, shape=replace(shape, slopes=slopes))
    return part


def _rounder(part: Certainty, width: float) -> Certainty:
    shape = part.shape
    if isinstance(shape, Hinges) and shape.side is not None and width > 0 and shape.tail < 1:
        return replace(part, shape=SoftHinge(shape.tail, width, shape.side))
    return part


def _unit(parts: tuple[Certainty, ...], p: Density) -> float:
    """Standard deviation of the rewards, the largest."""
    return max(spread(influence(part.reward, p), p) for part in parts) or 1.0
