"""Thresholds of certainty equivalents under a KL, on the rewards of a bank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.errors import UnsupportedError
from tiltflow.functional import Certainty, Hinges, bisected, influence
from tiltflow.solvers.weighted_bank import groups_of

CYCLES = 200
"""Rounds through several thresholds, at most; each is searched with the others held."""

SETTLED = 1e-7
"""A round that moves no threshold further than this part of its range is the last."""

CERTAIN = 1e-5
"""A maximum is looked for until none can be better by this part of the median distance to it."""

LOOKED_AT = 20_000
"""Thresholds tried for one maximum, at most; the best of them is taken then."""


@final
@dataclass(frozen=True)
class Group:
    """Samples with equal condition.

    Attributes:
        rewards: (K, n) float64, one row per part.
        log_mass: (n,), weights that sum to one.
        share: of the group.
    """

    rewards: Tensor
    log_mass: Tensor
    share: float


@final
@dataclass(frozen=True)
class Dual:
    """V(y) = sum_k c_k y_k + w E_h log E_q[exp(sum_k c_k u_k(r_k - y_k) / w) | h].

    The best value, over y, of sum_k c_k opt_y {y + E_p u_k(r_k - y)} - w KL(p || q), with the
    optima over y_k of the same kind: minima where the shapes are convex, maxima where they are
    concave. For every y it is attained by the tilt of q with exponent sum_k c_k u_k / w.

    Attributes:
        parts: (c_k, u_k) with their rewards.
        groups: the bank, one group per condition h.
        weight: w.
    """

    parts: tuple[Certainty, ...]
    groups: tuple[Group, ...]
    weight: float

    @staticmethod
    def of(parts: tuple[Certainty, ...], weight: float, p: Density) -> Dual:
        rewards = torch.stack([influence(part.reward, p) for part in parts])
        weights = p.bank.weights.double().to(rewards.device)
        labels, sizes = groups_of(p.bank.cond, rewards.shape[1])
        groups = []
        for label in range(len(sizes)):
            index = (labels == label).nonzero()[:, 0].to(rewards.device)
            mass = weights[index]
            if not float(mass.sum()) > 0:
                continue
            groups.append(Group(rewards[:, index], (mass / mass.sum()).log(), float(mass.sum())))
        return Dual(parts, tuple(groups), weight)

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Between which numbers each optimal threshold is."""
        out = []
        for k, part in enumerate(self.parts):
            low = min(float(g.rewards[k].min()) for g in self.groups) - part.shape.unit
            high = max(float(g.rewards[k].max()) for g in self.groups) - part.shape.unit
            out.append((low - 1e-9 * (abs(low) + high - low), high))
        return out

    def exponents(self, k: int, t: float) -> list[Tensor]:
        """c_k u_k(r_k - t) / w in each group."""
        part = self.parts[k]
        scale = part.scale / self.weight
        return [scale * part.shape.applied(g.rewards[k] - t)[0] for g in self.groups]

    def tilted(self, y: Sequence[float]) -> list[tuple[Tensor, float]]:
        """Log weights of the tilt in each group, normalised, and their log normaliser."""
        logs = [g.log_mass for g in self.groups]
        for k, t in enumerate(y):
            logs = [log + more for log, more in zip(logs, self.exponents(k, t), strict=True)]
        return [(log - log.logsumexp(0), float(log.logsumexp(0))) for log in logs]

    def value(self, y: Sequence[float]) -> float:
        """V(y)."""
        pairs = zip(self.tilted(y), self.groups, strict=True)
        logs = sum(g.share * log_z for (_, log_z), g in pairs)
        lines = sum(
            part.scale * t
            for part, t in zip(self.parts, y, strict=True)
            if part.shape.bend != "none"
        )
        return lines + self.weight * logs

    def drives(self, y: Sequence[float]) -> tuple[float, ...]:
        """E u_k'(r_k - y_k) under the tilt: 1 at an optimum."""
        tilted = self.tilted(y)
        return tuple(
            sum(
                g.share * float((log.exp() * part.shape.applied(g.rewards[k] - y[k])[1]).sum())
                for (log, _), g in zip(tilted, self.groups, strict=True)
            )
            for k, part in enumerate(self.parts)
        )

    def error(self, y: Sequence[float]) -> float:
        """Standard error of the drives, the largest: that of self-normalised weighted means,
        sqrt(sum_i w_i^2 (u_i' - mean)^2)."""
        tilted, worst = self.tilted(y), 0.0
        for k, part in enumerate(self.parts):
            variance = 0.0
            for (log, _), g in zip(tilted, self.groups, strict=True):
                slope = part.shape.applied(g.rewards[k] - y[k])[1]
                weights = log.exp()
                off = slope - (weights * slope).sum()
                variance += g.share**2 * float((weights * off).square().sum())
            worst = max(worst, math.sqrt(variance))
        return worst


def best_thresholds(dual: Dual) -> tuple[float, ...]:
    """The thresholds at the optimum of ``dual``; 0 for a line, which has none.

    One convex part: exact, by bisection of the derivative c (1 - E u'(r - y)). One hinge whose
    tail is below: exact, by comparing all observed rewards. Another concave part: a maximum with
    bounds that leave no place for a better one. Several parts: one after the other until nothing
    moves, which ends at the minimum of a convex V, and at a local maximum, the best from
    several starts, where parts are concave.

    Raises:
        UnsupportedError: if some parts are convex and others concave.
    """
    bends = {part.shape.bend for part in dual.parts} - {"none"}
    if len(bends) > 1:
        raise UnsupportedError(
            "Tail-aware fine-tuning needs all parts of the utility to favour the best (as "
            "RightCVaR) or all to guard against the worst (as LeftCVaR); this one has both. Use "
            "plan_and_tune, which takes any utility."
        )
    bent = [k for k, part in enumerate(dual.parts) if part.shape.bend != "none"]
    bounds = dual.bounds
    ends = []
    for fraction in (0.5,) if len(bent) < 2 or bends == {"convex"} else (0.1, 0.5, 0.9):
        y = [0.0] * len(dual.parts)
        for k in bent:
            low, high = bounds[k]
            y[k] = low + fraction * (high - low)
        ends.append(_settled(dual, bent, bounds, y))
    return max(ends, key=dual.value)


def _settled(
    dual: Dual, bent: list[int], bounds: list[tuple[float, float]], y: list[float]
) -> tuple[float, ...]:
    exponents = [dual.exponents(k, t) for k, t in enumerate(y)]
    for _ in range(CYCLES if len(bent) > 1 else 1):
        moved = 0.0
        for k in bent:
            low, high = bounds[k]
            # Summed anew: a difference of large exponents would lose the log masses.
            logs = [
                g.log_mass + sum(e[i] for j, e in enumerate(exponents) if j != k)
                for i, g in enumerate(dual.groups)
            ]
            new = _along(dual, k, logs, low, high)
            moved, y[k] = max(moved, abs(new - y[k]) / max(high - low, 1e-300)), new
            exponents[k] = dual.exponents(k, new)
        if moved < SETTLED:
            break
    return tuple(y)


def _along(dual: Dual, k: int, logs: list[Tensor], low: float, high: float) -> float:
    """The best threshold of part k; ``logs`` are log masses with the exponents of the others."""
    shape = dual.parts[k].shape
    if shape.bend == "convex":
        return bisected(lambda t: _drive(dual, k, logs, t) > 1, low, high)
    if isinstance(shape, Hinges) and shape.side == "below":
        return _best_knot(dual, k, logs)
    return _highest(dual, k, logs, low, high)


def _drive(dual: Dual, k: int, logs: list[Tensor], t: float) -> float:
    part, total = dual.parts[k], 0.0
    for g, log in zip(dual.groups, logs, strict=True):
        u, slope = part.shape.applied(g.rewards[k] - t)
        weights = (log + part.scale / dual.weight * u).softmax(0)
        total += g.share * float((weights * slope).sum())
    return total


def _best_knot(dual: Dual, k: int, logs: list[Tensor]) -> float:
    """For a hinge with its tail below: the observed reward with the largest V.

    V is convex between two rewards, so that no other threshold is better (methods, section 4.3).
    """
    part = dual.parts[k]
    length = dual.weight / (part.scale * max(part.shape.slopes))  # type: ignore[attr-defined]
    knots = torch.unique(torch.cat([g.rewards[k] for g in dual.groups]))
    total = part.scale * knots
    for g, log in zip(dual.groups, logs, strict=True):
        values, order = g.rewards[k].sort()
        mass = log[order]
        # Z(y) = e^(-y/l) sum_{r <= y} a e^(r/l) + sum_{r > y} a, by sums over the sorted rewards.
        nothing = values.new_full((1,), -math.inf)
        below = torch.cat([nothing, (mass + values / length).logcumsumexp(0)])
        above = torch.cat([mass.flip(0).logcumsumexp(0).flip(0), nothing])
        index = torch.searchsorted(values, knots, right=True)
        log_z = torch.logaddexp(below[index] - knots / length, above[index])
        total = total + dual.weight * g.share * log_z
    return float(knots[int(total.argmax())])


def _highest(dual: Dual, k: int, logs: list[Tensor], low: float, high: float) -> float:
    """The threshold of a concave part with the largest V, by intervals that are halved while they
    may hold a better one.

    Between a and b, u(r - y) is below its tangent at a, because it is concave. With the tangent in
    its place V is convex in y, hence at most the larger of V(a) and of its value at b, and the
    same with a and b exchanged. These bounds are off by the square of b - a only.
    """
    part, w = dual.parts[k], dual.weight

    def at(t: Tensor, step: Tensor) -> Tensor:
        """V at t + step, with the tangent at t in place of u."""
        out = part.scale * (t + step)
        for g, log in zip(dual.groups, logs, strict=True):
            u, slope = part.shape.applied(g.rewards[k] - t[:, None])
            exponent = part.scale / w * (u - step[:, None] * slope)
            out = out + w * g.share * (log + exponent).logsumexp(1)
        return out

    def everywhere(t: Tensor, step: Tensor) -> Tensor:
        size = max(1, 4_000_000 // max(g.rewards.shape[1] for g in dual.groups))
        pairs = zip(torch.split(t, size), torch.split(step, size), strict=True)
        return torch.cat([at(*pair) for pair in pairs])

    rewards = torch.cat([g.rewards[k] for g in dual.groups])
    ranks = torch.linspace(0, len(rewards) - 1, 129, dtype=torch.float64).round().long()
    inner = rewards.sort().values[ranks.to(rewards.device)] - part.shape.unit
    edges = torch.unique(torch.cat([inner.clamp(low, high), inner.new_tensor([low, high])]))
    start = everywhere(edges, torch.zeros_like(edges))
    # The median, not the least, says what differences matter: outliers do not move it.
    best, y, tried = float(start.max()), float(edges[int(start.argmax())]), len(edges)
    least = CERTAIN * max(best - float(start.median()), 1e-9 * abs(best))
    left, right, at_left, at_right = edges[:-1], edges[1:], start[:-1], start[1:]
    reach = float(edges.diff().max()) if len(edges) > 1 else 0.0
    while len(left) and tried < LOOKED_AT:
        width = right - left
        upper = torch.minimum(
            torch.maximum(at_left, everywhere(left, width)),
            torch.maximum(at_right, everywhere(right, -width)),
        )
        middle = 0.5 * (left + right)
        open_ = (upper > best + least) & (middle > left) & (middle < right)
        left, middle, right = left[open_], middle[open_], right[open_]
        if not len(middle):
            break
        found = everywhere(middle, torch.zeros_like(middle))
        tried += 3 * len(middle)
        if float(found.max()) > best:
            i = int(found.argmax())
            best, y, reach = float(found[i]), float(middle[i]), float(right[i] - left[i]) / 2
        at_left = torch.cat([at_left[open_], found])
        at_right = torch.cat([found, at_right[open_]])
        left, right = torch.cat([left, middle]), torch.cat([middle, right])
    polished = _polished(lambda t: _drive(dual, k, logs, t), y, reach, low, high)
    values = everywhere(edges.new_tensor([polished]), edges.new_zeros(1))
    return polished if float(values) >= best else y


def _polished(
    drive: Callable[[float], float], y: float, reach: float, low: float, high: float
) -> float:
    """The zero of the derivative, c (1 - drive), that a maximum near ``y`` is."""
    a, b = max(low, y - reach), min(high, y + reach)
    if drive(a) > 1 or drive(b) < 1:
        return y
    return bisected(lambda t: drive(t) < 1, a, b)
