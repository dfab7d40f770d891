"""W_2^2 between densities on grids of a line, each node spread evenly over its cell.

As a function of the masses of the nodes, the cost of moving atoms has a kink wherever a level of
one distribution function passes one of the other, hundreds of them on the smallest path. With
cells both quantile functions are continuous, and the cost is smooth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.density import Bank
from tiltflow.transport.ground import Ground, Transport
from tiltflow.transport.piecewise import MovingAverage, PiecewiseQuadratic

REGULAR = 1e-6
"""Largest relative difference of steps that counts as equal."""


def spacing(bank: Bank, ground: Ground) -> float:
    """Scaled distance of neighbouring nodes of a regular grid in increasing order; 0 otherwise."""
    if not bank.exact or len(bank.points) < 2:
        return 0.0
    steps = ground.scaled(bank.points)[:, 0].diff()
    mean = float(steps.mean())
    return mean if float((steps - mean).abs().max()) <= REGULAR * mean else 0.0


def between_grids(p: Bank, q: Bank, ground: Ground) -> Transport:
    """The cost between two laws with constant densities on cells, and both potentials.

    With T = G^-1 F, the derivative of the cost in the mass of a node is the mean over its cell of
    the potential with derivative 2 (x - T(x)).
    """
    cost, first = _one_side(p, q, ground)
    return Transport(cost, first, _one_side(q, p, ground)[1])


def _one_side(p: Bank, q: Bank, ground: Ground) -> tuple[float, MovingAverage]:
    x, w = _edges(p, ground)
    y, v = _edges(q, ground)
    # From either end to the median, so that small masses are accurate in both tails.
    level, knots, before, after = _up_to_median(x, w, y, v)
    beyond, *mirrored = _up_to_median(-x.flip(0), w.flip(0), -y.flip(0), v.flip(0))
    inner = beyond < 0.5
    beyond = beyond[inner].flip(0)
    far, far_after, far_before = (-t[inner].flip(0) for t in mirrored)
    mass = torch.cat([level.diff(), 1 - level[-1:] - beyond[:1], -beyond.diff()])
    knots = torch.cat([knots, far])
    before, after = knots - torch.cat([before, far_before]), knots - torch.cat([after, far_after])
    before[0], after[-1] = after[0], before[-1]
    start, end = after[:-1], before[1:]
    cost = float((mass * (start**2 + start * end + end**2)).sum()) / 3
    potential = PiecewiseQuadratic.of(ground, knots, 2 * after, 2 * before)
    return cost, MovingAverage(ground, potential, spacing(p, ground))


def _edges(bank: Bank, ground: Ground) -> tuple[Tensor, Tensor]:
    """Edges of the cells, (N + 1,), and their masses, (N,)."""
    x = ground.scaled(bank.points)[:, 0]
    half = spacing(bank, ground) / 2
    edges = torch.cat([x[:1] - half, (x[1:] + x[:-1]) / 2, x[-1:] + half])
    weights = bank.weights.double().to(x)
    return edges, weights / weights.sum()


def _up_to_median(
    x: Tensor, w: Tensor, y: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where T may bend, as far as the median of p: level, x, and T just before and after."""
    levels, others = (torch.cat([m.new_zeros(1), m.cumsum(0)]) for m in (w, v))
    u = torch.cat([levels, others])
    knots = torch.cat([x, _quantile(x, levels, others, True)])
    kept = u <= 0.5
    u, knots = u[kept], knots[kept]
    order = torch.argsort(knots, stable=True)
    u, knots = u[order], knots[order]
    return u, knots, _quantile(y, others, u, False), _quantile(y, others, u, True)


def _quantile(edges: Tensor, levels: Tensor, u: Tensor, after: bool) -> Tensor:
    """The quantile at u of masses that are even in between edges; its right or left limit."""
    j = (torch.searchsorted(levels, u, right=after) - 1).clamp(0, len(edges) - 2)
    mass = levels[j + 1] - levels[j]
    share = torch.where(mass > 0, (u - levels[j]) / mass, 0.5).clamp(0, 1)
    return edges[j] + share * (edges[j + 1] - edges[j])
