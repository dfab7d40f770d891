"""Entropic optimal transport: Sinkhorn's algorithm in the log domain, debiased."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Bank
from tiltflow.distances import median_distance
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.similarity import CHUNK
from tiltflow.transport.ground import Ground, OnGround, Transport, atoms

ROUNDS = 200
"""Most rounds at the final epsilon."""

SCALINGS = 20
"""Cheap iterations of a round, between two in the log domain."""

STAGE = 0.25
"""Ratio of successive epsilons on the way down."""


@final
@dataclass(frozen=True, eq=False)
class Softmin(OnGround):
    """f(x) = -eps log sum_j exp(h_j - c(x, y_j) / eps), h_j = g_j / eps + log v_j.

    Args:
        ground: c.
        points: y, (M, D), scaled.
        heights: h, (M,).
        epsilon: eps, a cost.
    """

    ground: Ground
    points: Tensor
    heights: Tensor
    epsilon: float

    @property
    def size(self) -> int:
        return len(self.points)

    def _at(self, z: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        y = self.points.to(z.device)
        logits = self.ground.cost(z, y).mul_(-1 / self.epsilon).add_(self.heights.to(z))
        total = logits.logsumexp(1)
        value = -self.epsilon * total
        if not grad:
            return value, z
        return value, self.ground.pull(z, y, logits.sub_(total[:, None]).exp_())


@final
@dataclass(frozen=True)
class Entropic:
    """How much entropy, and how exactly solved.

    Args:
        epsilon: the temperature of the plan, as a fraction of the median cost between two
            samples of the prior. Smaller is sharper, noisier and slower.
        tolerance: L1 distance of the plan's marginals from the banks at which to stop.
    """

    epsilon: float = 0.05
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0 and 0 < self.tolerance < 1):
            raise ConfigError(
                f"Sinkhorn: epsilon={self.epsilon!r} must be positive and tolerance="
                f"{self.tolerance!r} between 0 and 1."
            )


@final
@dataclass(frozen=True, eq=False)
class _Side:
    """A bank: scaled points (N, D), log-weights (N,)."""

    points: Tensor
    log: Tensor


def sinkhorn(p: Bank, q: Bank, ground: Ground, how: Entropic) -> Transport:
    """The Sinkhorn divergence of two banks (Genevay et al., 2018; Feydy et al., 2019)::

        cost = OT(p, q) - OT(p, p) / 2 - OT(q, q) / 2,    first = f_pq - f_pp
        OT = min_plan E c + eps KL(plan || p x q) = E_p f + E_q g
        f(x) = -eps log E_q exp((g(y) - c(x, y)) / eps)

    It is 0 at p = q, where the potentials are constant, non-negative, and convex in p; for
    eps -> 0 it is the transport cost. ``first`` is smooth for power 2. Its gradient is a
    difference of mean displacements, to samples of q and to samples of p. 2000 points on each
    side take a few seconds and 100 MB.

    Raises:
        ConfigError: if the points of q are all alike, so that there is no scale for epsilon.
        UnsupportedError: if the marginals do not come within the tolerance.
    """
    (x, a), (y, b) = atoms(p, ground), atoms(q, ground)
    left, right = _Side(x, a.log()), _Side(y, b.log())
    epsilon = how.epsilon * _median_cost(right, ground)
    width = float((torch.cat([x, y]).amax(0) - torch.cat([x, y]).amin(0)).norm())
    stages = _stages(width**ground.power, epsilon)
    same = x.shape == y.shape and torch.equal(x, y) and torch.equal(a, b)
    alone = _alone(right, ground, stages, how.tolerance)
    if same:
        both = Softmin(ground, y, alone / epsilon + right.log, epsilon)
        return Transport(0.0, both - both, both - both)
    own = _alone(left, ground, stages, how.tolerance)
    f, g = _balanced(left, right, ground, stages, how.tolerance)
    cost = float(a @ (f - own) + b @ (g - alone))

    def extended(side: _Side, heights: Tensor) -> Softmin:
        return Softmin(ground, side.points, heights / epsilon + side.log, epsilon)

    return Transport(
        cost,
        extended(right, g) - extended(left, own),
        extended(left, f) - extended(right, alone),
    )


def _median_cost(side: _Side, ground: Ground) -> float:
    """Median cost between two draws from a bank, from at most 1000 of its points."""
    step = math.ceil(len(side.points) / 1000)
    median = median_distance(side.points[::step], side.log[::step].exp())
    if not median > 0:
        raise ConfigError(
            "Sinkhorn: the median distance of the prior's samples is 0; they are all alike, so "
            "that there is no scale for epsilon. Use method='exact'."
        )
    return median**ground.power


def _stages(widest: float, epsilon: float) -> list[float]:
    """Decreasing epsilons from the largest cost to the final one."""
    count = max(0, math.ceil(math.log(max(widest / epsilon, 1.0)) / -math.log(STAGE)))
    return [epsilon * STAGE**-k for k in range(count, -1, -1)]


def _softmin(side: _Side, heights: Tensor, at: Tensor, ground: Ground, epsilon: float) -> Tensor:
    return Softmin(ground, side.points, heights / epsilon + side.log, epsilon).on_scaled(at)


def _miss(side: _Side, before: Tensor, after: Tensor, epsilon: float) -> float:
    """L1 error of the plan's marginal on a side, from its potential and the next one."""
    return float((side.log.exp() * torch.expm1((before - after) / epsilon).abs()).sum())


def _alone(side: _Side, ground: Ground, stages: list[float], tolerance: float) -> Tensor:
    """The symmetric potential of a bank and itself, (N,): f = softmin(f), by averaging."""
    f = torch.zeros_like(side.log)
    for epsilon in stages:
        last = epsilon == stages[-1]
        for _ in range(ROUNDS if last else 2):
            new = _softmin(side, f, side.points, ground, epsilon)
            error = _miss(side, f, new, epsilon)
            f = (f + new) / 2
            if error < tolerance:
                break
        else:
            if last:
                raise _stuck(error, tolerance)
    return f


def _balanced(
    left: _Side, right: _Side, ground: Ground, stages: list[float], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Potentials of both sides, (N,) and (M,); the marginal of the right one is exact."""
    f, g = torch.zeros_like(left.log), torch.zeros_like(right.log)
    for epsilon in stages[:-1]:
        f, g, _ = _updated(left, right, f, g, ground, epsilon)
        f, g = _scaled(left, right, f, g, ground, epsilon, 1.0)
    epsilon, before, relaxation = stages[-1], math.inf, 1.0
    for _ in range(ROUNDS):
        f, g, error = _updated(left, right, f, g, ground, epsilon)
        if error < tolerance:
            return f, g
        relaxation = _relaxation(relaxation, before, error)
        before = error
        f, g = _scaled(left, right, f, g, ground, epsilon, relaxation)
    raise _stuck(error, tolerance)


def _stuck(error: float, tolerance: float) -> UnsupportedError:
    return UnsupportedError(
        f"Sinkhorn: after {ROUNDS} rounds the marginals of the plan are {error:.2g} away from the "
        f"banks, not within tolerance={tolerance:g}. Raise epsilon or the tolerance, or use "
        "method='exact'."
    )


def _updated(
    left: _Side, right: _Side, f: Tensor, g: Tensor, ground: Ground, epsilon: float
) -> tuple[Tensor, Tensor, float]:
    """One exact iteration in the log domain, and how far the left marginal was off before it."""
    new = _softmin(right, g, left.points, ground, epsilon)
    error = _miss(left, f, new, epsilon)
    return new, _softmin(left, new, right.points, ground, epsilon), error


def _scaled(
    left: _Side, right: _Side, f: Tensor, g: Tensor, ground: Ground, epsilon: float, power: float
) -> tuple[Tensor, Tensor]:
    """``SCALINGS`` iterations on the plan that (f, g) define, a product with a matrix each.

    Scalings u, v of its rows and columns are over-relaxed: u -> u (1 / (u K v))^power
    (Thibault et al., 2021). Where they leave the range of numbers, (f, g) is kept.
    """
    kernel = _plan(left, right, f, g, ground, epsilon)
    a, b = left.log.exp(), right.log.exp()
    u, v = torch.zeros_like(f), torch.zeros_like(g)  # logarithms
    for _ in range(SCALINGS):
        u = u - power * (u + (kernel @ (b * v.exp())).log())
        v = v - power * (v + (kernel.T @ (a * u.exp())).log())
    if not bool(torch.isfinite(u).all() & torch.isfinite(v).all()):
        return f, g
    return f + epsilon * u, g + epsilon * v


def _plan(
    left: _Side, right: _Side, f: Tensor, g: Tensor, ground: Ground, epsilon: float
) -> Tensor:
    """exp((f_i + g_j - c_ij) / eps), (N, M): the plan's density relative to p x q."""
    out = torch.empty(len(f), len(g), dtype=f.dtype, device=f.device)
    size = max(1, CHUNK // len(g))
    for x, h, rows in zip(
        torch.split(left.points, size), torch.split(f, size), torch.split(out, size), strict=True
    ):
        logits = (ground.cost(x, right.points) - g).sub_(h[:, None]).mul_(-1 / epsilon)
        rows.copy_(logits.exp_())
    return out


def _relaxation(power: float, before: float, error: float) -> float:
    """The next power of the scalings, from the errors of two rounds.

    Errors that fall by a factor s per iteration under a power w tell the factor r of plain
    iterations, by (s + w - 1)^2 = r s w^2 as for over-relaxed linear equations (Young, 1954);
    the best power is then 2 / (1 + sqrt(1 - r)). A round that did not help is followed by a plain
    one.
    """
    if error >= before:
        return 1.0
    if not math.isfinite(before):
        return power
    factor = (error / before) ** (1 / (SCALINGS + 1))
    if factor <= power - 1:  # faster than the theory of this power allows
        return power
    rate = (factor + power - 1) ** 2 / (factor * power**2)
    return min(1.95, 2 / (1 + math.sqrt(max(1 - rate, 0.0))))
