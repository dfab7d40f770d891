"""The threshold of Tail-aware Flow Fine-Tuning: stage 1, on a bank of pre-trained samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.functional import influence
from tiltflow.potential import Hinge, Potential, remembering
from tiltflow.solvers.weighted_bank import groups_of
from tiltflow.utilities import LeftCVaR, RightCVaR

Side: TypeAlias = Literal["above", "below"]

ACTIVE = 0.01
"""Below this part of the pre-trained samples beyond the threshold, training would starve."""

BEYOND = 30
"""With fewer samples of the bank beyond the threshold, it is the bank's, not the law's."""

CARRIED = 0.5
"""Part of the logarithm of the bank's size up to which it knows the KL of a tilt."""


@final
@dataclass(frozen=True)
class Threshold:
    """The optimum of a tail less ``weight`` KL on a bank (Tail-aware Flow Fine-Tuning, stage 1).

    With y* the optimal threshold, the optimum tilts the bank by exp(f / weight), where f is the
    hinge at y*: the only fine-tuning that is needed is that for the reward f.

    Attributes:
        hinge: f = (r - y*)_+ / (1 - level) or -(y* - r)_+ / level, in units of the reward.
        weight: of the KL, in units of the reward.
        value: CVaR less weight * KL at the optimum.
        cvar, kl: its two parts, on the tilted bank; KL in nats.
        tail_mass: P(r beyond y*) under the tilt: 1 - level or level at an optimum without atoms.
        level_mass: what it should be.
        active: part of the samples beyond y*: of the first roll-outs that have a gradient, if the
            bank was drawn from the model that the training starts from.
        carried: KL of the tilt from the samples as they were drawn, over the logarithm of their
            number, which is the most that they can tell; 0 for quadrature nodes.
        beyond: samples of the bank beyond y*.
        effective_size: of the tilted bank, 1 / sum of squared weights.
        count: samples in the bank.
    """

    hinge: Hinge
    weight: float
    value: float
    cvar: float
    kl: float
    tail_mass: float
    level_mass: float
    active: float
    carried: float
    beyond: int
    effective_size: float
    count: int

    @property
    def potential(self) -> Potential:
        """The terminal reward of the fine-tuning, f / weight."""
        return (1 / self.weight) * self.hinge

    @property
    def problem(self) -> str | None:
        """Why a fine-tuning for this threshold would fail, or ``None``."""
        if self.beyond < BEYOND:
            return (
                f"only {self.beyond} of {self.count} samples are beyond the threshold "
                f"{self.hinge.threshold:.4g}, so that it says more about the bank than the law"
            )
        if self.carried > CARRIED:
            most = math.log(self.count)
            return (
                f"the tilt is {self.carried * most:.1f} nats from the samples, and {self.count} "
                f"of them cannot tell more than {most:.1f}"
            )
        if self.active < ACTIVE:
            return (
                f"only {100 * self.active:.2g} % of the samples are beyond the threshold "
                f"{self.hinge.threshold:.4g}, so that most roll-outs would teach nothing"
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


def tail_threshold(utility: LeftCVaR | RightCVaR, weight: float, prior: Density) -> Threshold:
    """The optimal threshold for ``utility - weight * KL(prior)`` on the bank of ``prior``.

    ::

        right   min_y  y + w E_h log E_q[exp((r - y)_+ / (w (1 - level))) | h]      convex
        left    max_y  y + w E_h log E_q[exp(-(y - r)_+ / (w level)) | h]           not concave

    (methods, sections 4.2 and 4.3), w = ``weight``. Conditional models have one normaliser for
    each condition h and one threshold for all. Right: the root of the derivative
    1 - P_y(r > y) / (1 - level), by bisection. Left: the best of all observed rewards, which is
    exact, in O(N log N) per condition. In float64 and the log domain.

    Args:
        utility: the tail; the reward needs a value.
        weight: of the KL, in units of the reward; the same in both stages.
        prior: the pre-trained law; its bank grows to what the tail needs.

    Raises:
        ConfigError: for a weight that is not positive.
    """
    if not 0 < weight < math.inf:
        raise ConfigError(f"tail_threshold: weight={weight!r} must be positive and finite.")
    p = prior.at_least(utility.samples_needed)
    bank = _Rewards.of(influence(utility.reward, p), p)
    scale = weight * utility.mass
    if isinstance(utility, RightCVaR):
        side: Side = "above"
        y = _root(bank, scale, utility.mass)
    else:
        side = "below"
        y = _best_knot(bank, scale, weight)
    return _described(utility, weight, p, bank, side, y)


def smallest_weight(
    utility: LeftCVaR | RightCVaR, prior: Density, precision: float = 0.05
) -> float:
    """The smallest weight of the KL, to a relative ``precision``, that the bank supports.

    By bisection of ``Threshold.problem`` between 1e-3 and 1e3 standard deviations of the reward.

    Raises:
        UnsupportedError: if even the largest is too small for the bank.
    """
    p = prior.at_least(utility.samples_needed)
    with remembering(p.bank.points):
        spread = float(influence(utility.reward, p).std()) or 1.0
        low, high = 1e-3 * spread, 1e3 * spread
        tail_threshold(utility, high, p).require_learnable()
        while high / low > 1 + precision:
            middle = math.sqrt(low * high)
            fine = tail_threshold(utility, middle, p).problem is None
            low, high = (low, middle) if fine else (middle, high)
    return high


@final
@dataclass(frozen=True)
class _Rewards:
    """Rewards of a bank in groups of equal condition.

    Attributes:
        groups: rewards, sorted, and log weights that sum to one within the group.
        shares: of the groups.
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    shares: tuple[float, ...]

    @staticmethod
    def of(rewards: Tensor, p: Density) -> _Rewards:
        weights, cond = p.bank.weights.double().to(rewards.device), p.bank.cond
        labels, sizes = groups_of(cond, len(rewards))
        groups, shares = [], []
        for label in range(len(sizes)):
            mine = (labels == label).to(rewards.device)
            values, order = rewards[mine].sort()
            mass = weights[mine][order]
            groups.append((values, (mass / mass.sum()).log()))
            shares.append(float(mass.sum()))
        return _Rewards(tuple(groups), tuple(shares))

    def tilted(self, y: float, scale: float, side: Side) -> list[tuple[Tensor, float]]:
        """Log weights of the tilt in each group, normalised, and their log normaliser."""
        out = []
        for values, log_mass in self.groups:
            over = values - y
            hinge = over.clamp(min=0) if side == "above" else over.clamp(max=0)
            logits = log_mass + hinge / scale
            log_z = float(logits.logsumexp(0))
            out.append((logits - log_z, log_z))
        return out

    def mass_beyond(self, logs: list[Tensor], y: float, side: Side) -> float:
        """P(r beyond y) under log weights in each group."""
        total = 0.0
        for beyond, log, share in zip(self.beyond(y, side), logs, self.shares, strict=True):
            total += share * float(log.exp()[beyond].sum())
        return total

    def beyond(self, y: float, side: Side) -> list[Tensor]:
        """Which rewards of each group are on that side of y."""
        return [values > y if side == "above" else values < y for values, _ in self.groups]


def _root(bank: _Rewards, scale: float, mass: float) -> float:
    """Where P_y(r > y), which falls with y, is the tail mass."""
    low = min(float(values[0]) for values, _ in bank.groups)
    high = max(float(values[-1]) for values, _ in bank.groups)
    low -= 1e-9 * (abs(low) + high - low)
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        tilted = [log for log, _ in bank.tilted(middle, scale, "above")]
        above = bank.mass_beyond(tilted, middle, "above") > mass
        low, high = (middle, high) if above else (low, middle)
    return 0.5 * (low + high)


def _best_knot(bank: _Rewards, scale: float, weight: float) -> float:
    """The observed reward c with the largest c + w E_h log Z_h(c)."""
    knots = torch.unique(torch.cat([values for values, _ in bank.groups]))
    total = knots.clone()
    for (values, log_mass), share in zip(bank.groups, bank.shares, strict=True):
        # Z(c) = e^(-c/s) sum_{r <= c} a e^(r/s) + sum_{r > c} a, by sums over the sorted rewards.
        nothing = values.new_full((1,), -math.inf)
        below = torch.cat([nothing, (log_mass + values / scale).logcumsumexp(0)])
        above = torch.cat([log_mass.flip(0).logcumsumexp(0).flip(0), nothing])
        index = torch.searchsorted(values, knots, right=True)
        log_z = torch.logaddexp(below[index] - knots / scale, above[index])
        total = total + weight * share * log_z
    return float(knots[int(total.argmax())])


def _described(
    utility: LeftCVaR | RightCVaR, weight: float, p: Density, bank: _Rewards, side: Side, y: float
) -> Threshold:
    """The threshold with what it means on the bank."""
    tilted = bank.tilted(y, weight * utility.mass, side)
    logs = [log for log, _ in tilted]
    pairs = list(zip(tilted, bank.shares, strict=True))
    value = y + weight * sum(share * log_z for (_, log_z), share in pairs)
    kl = sum(
        share * float((log.exp() * (log - before)).nan_to_num(0.0).sum())
        for log, (_, before), share in zip(logs, bank.groups, bank.shares, strict=True)
    )
    tilt = torch.cat([share * log.exp() for log, share in zip(logs, bank.shares, strict=True)])
    count, beyond = len(tilt), sum(int(each.sum()) for each in bank.beyond(y, side))
    shift = math.log(count) + float(torch.special.xlogy(tilt, tilt).sum())
    active = bank.mass_beyond([mass for _, mass in bank.groups], y, side)
    return Threshold(
        Hinge(utility.reward, y, 1 / utility.mass, side), weight, value, value + weight * kl, kl,
        bank.mass_beyond(logs, y, side), utility.mass,
        active if p.bank.exact else beyond / count,
        0.0 if p.bank.exact else shift / math.log(count),
        beyond, 1 / float(tilt.square().sum()), count,
    )  # fmt: skip
