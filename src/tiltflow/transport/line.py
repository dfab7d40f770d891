"""Optimal transport in one dimension, in closed form: distribution functions and quantiles."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.density import Bank
from tiltflow.transport.cells import between_grids, spacing
from tiltflow.transport.ground import Ground, Transport, atoms
from tiltflow.transport.piecewise import PiecewiseQuadratic

TIE = 1e-12
"""Masses that differ by this fraction are the same number with different rounding."""

RAMP = 1e-6
"""Part of the way between two atoms on which T may leave its value at an atom."""


def line(p: Bank, q: Bank, ground: Ground) -> Transport:
    """W_1 or W_2^2 of two weighted banks on a line, exactly, in O(N log N).

    Power 1: cost = int |F - G|, first' = sign(G - F), 0 where F = G (Dudley; Vallender, 1974).
    Power 2: cost = int (F^-1 - G^-1)^2, first' = 2 (x - T(x)) with T the monotone map. At an atom,
    T is the mean of what the atom is sent to; between two atoms, the mean of T is the quantile of
    q at the level between them, which makes ``first`` an exact optimum of the dual problem, and T
    is continuous and increasing (a quadratic spline with one knot in between; Schumaker, 1983).
    Beyond all points ``first`` is continued with its last slope. For p = q it is constant. Nodes
    of regular grids stand for cells (``cells.py``) where both banks are grids.
    """
    if ground.power == 2 and spacing(p, ground) and spacing(q, ground):
        return between_grids(p, q, ground)
    (z, w), (y, v) = atoms(p, ground), atoms(q, ground)
    x, w = _sorted(z[:, 0], w)
    y, v = _sorted(y[:, 0], v)
    if ground.power == 1:
        return _absolute(x, w, y, v, ground)
    first, second = _quadratic(x, w, y, v, ground), _quadratic(y, v, x, w, ground)
    mass, i, j = _coupling(w, v)
    return Transport(float((mass * (x[i] - y[j]) ** 2).sum()), first, second)


def _sorted(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Different points in order, with the weight of each."""
    points, where = torch.unique(x, return_inverse=True)
    return points, torch.zeros_like(points).index_add_(0, where, w)


def _below_and_above(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mass up to each point, itself included, and mass beyond it; each accurate where small."""
    beyond = torch.cat([w.flip(0).cumsum(0).flip(0)[1:], w.new_zeros(1)])
    return w.cumsum(0), beyond


def _absolute(x: Tensor, w: Tensor, y: Tensor, v: Tensor, ground: Ground) -> Transport:
    z, where = torch.unique(torch.cat([x, y]), return_inverse=True)
    masses = torch.zeros(2, len(z), dtype=z.dtype, device=z.device)
    masses[0].index_add_(0, where[: len(x)], w)
    masses[1].index_add_(0, where[len(x) :], v)
    (below_p, above_p), (below_q, above_q) = map(_below_and_above, masses)
    low = below_p + below_q <= above_p + above_q
    excess = torch.where(low, below_p - below_q, above_q - above_p)
    total = torch.where(low, below_p + below_q, above_p + above_q)
    slope = -excess.sign() * (excess.abs() > TIE * total)
    steps = z.diff()
    cost = float((excess[:-1].abs() * steps).sum())
    if len(z) > 1:
        slope[-1] = slope[-2]  # beyond the last point
    values = torch.cat([z.new_zeros(1), (slope[:-1] * steps).cumsum(0)])
    before = torch.cat([slope[:1], slope[:-1]])
    first = PiecewiseQuadratic(ground, z, values, slope, before)
    return Transport(cost, first, PiecewiseQuadratic(ground, z, -values, -slope, -before))


def _quadratic(x: Tensor, w: Tensor, y: Tensor, v: Tensor, ground: Ground) -> PiecewiseQuadratic:
    """The potential of x's side for squared distances."""
    between = _quantiles_between(w, y, v)
    mass, i, j = _coupling(w, v)
    sent = torch.zeros_like(w).index_add_(0, i, mass * y[j])
    moved = torch.zeros_like(w).index_add_(0, i, mass)
    floor = torch.cat([y[:1], between])
    ceiling = torch.cat([between, y[-1:]])
    # An atom of negligible mass gets no mass in floating point.
    at = torch.where(moved > 0, sent / moved, floor)
    at = torch.minimum(torch.maximum(at, floor), ceiling)
    rise = at[1:] - at[:-1]
    share = torch.where(rise > 0, (at[1:] - between) / rise, 0.5).clamp(RAMP, 1 - RAMP)
    knots = _interleaved(x, x[:-1] + share * x.diff())
    target = _interleaved(at, 2 * between - share * at[:-1] - (1 - share) * at[1:])
    slope = 2 * (knots - target)
    return PiecewiseQuadratic.of(ground, knots, slope, slope)


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    """a_0, b_0, a_1, ..., b_{n-2}, a_{n-1}."""
    out = a.new_empty(len(a) + len(b))
    out[::2], out[1::2] = a, b
    return out


def _coupling(w: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of sorted atoms: masses, and which atoms they connect."""
    below, other = w.cumsum(0), v.cumsum(0)
    levels = torch.cat([below, other]).sort().values
    start = torch.cat([levels.new_zeros(1), levels[:-1]])
    middle = (start + levels) / 2
    i = torch.searchsorted(below, middle).clamp(max=len(w) - 1)
    j = torch.searchsorted(other, middle).clamp(max=len(v) - 1)
    return levels - start, i, j


def _quantiles_between(w: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Quantile of (y, v) at the levels between the atoms of w, (n - 1,); the middle of a jump."""
    (below_p, above_p), (below_q, above_q) = _below_and_above(w), _below_and_above(v)
    low = (below_p <= above_p)[:-1]
    levels, beyond = below_p[:-1], -above_p[:-1]
    out = torch.zeros_like(levels)
    for sign, right in ((-1, False), (1, True)):
        from_below = torch.searchsorted(below_q, levels * (1 + sign * TIE), right=right)
        from_above = torch.searchsorted(-above_q, beyond * (1 - sign * TIE), right=right)
        index = torch.where(low, from_below, from_above)
        out += 0.5 * y[index.clamp(max=len(y) - 1)]
    return out
