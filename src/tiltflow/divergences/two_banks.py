"""Two banks as one list of points with two sets of weights: what sample distances start from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Bank
from tiltflow.errors import ShapeError


@final
@dataclass(frozen=True, eq=False)
class TwoBanks:
    """The points of p and of a prior q, (K, *event), with the weights of each, (K,) float64.

    A re-weighted bank of the prior's has the prior's points. Then the two are one sample, listed
    once with two weights, and their errors cancel where the weights agree. Otherwise each point
    has weight zero under one of them.
    """

    points: Tensor
    p: Tensor
    q: Tensor
    exact_p: bool
    exact_q: bool

    @staticmethod
    def of(p: Bank, q: Bank, user: str) -> TwoBanks:
        """The two banks together.

        Raises:
            ShapeError: if their points have different shapes; ``user`` is named.
        """
        require_alike(p, q, user)
        x = p.points
        w, v = p.weights.double().to(x.device), q.weights.double().to(x.device)
        if same_points(p, q):
            return TwoBanks(x, w, v, p.exact, q.exact)
        points = torch.cat([x, q.points.to(x.device)])
        first, second = torch.cat([w, torch.zeros_like(v)]), torch.cat([torch.zeros_like(w), v])
        return TwoBanks(points, first, second, p.exact, q.exact)

    @property
    def difference(self) -> Tensor:
        """The weights of p - q; exactly zero where the two agree."""
        return self.p - self.q

    @property
    def noise(self) -> Tensor:
        """``difference`` without the weights of quadrature nodes, which are not random."""
        return (0.0 if self.exact_p else 1.0) * self.p - (0.0 if self.exact_q else 1.0) * self.q

    def error(self, f: Tensor, g: Tensor) -> float:
        """Standard error of a number with influence f under p and g under q, both (K,).

        sqrt(sum_i (w_i (f_i - E_p f) + v_i (g_i - E_q g))^2), where quadrature nodes count as
        known; a point of both banks contributes both terms at once.
        """
        parts = torch.zeros_like(self.p)
        for weights, values, exact in ((self.p, f, self.exact_p), (self.q, g, self.exact_q)):
            if not exact:
                parts = parts + weights * (values - (weights * values).sum())
        return math.sqrt(float(parts.square().sum()))


def same_points(p: Bank, q: Bank) -> bool:
    """Whether both banks weigh the same points."""
    x, y = p.points, q.points
    if x.shape != y.shape or x.device != y.device:
        return False
    return x is y or torch.equal(x, y.to(x.dtype))


def require_alike(p: Bank, q: Bank, user: str) -> None:
    """Raise ``ShapeError`` unless the states of two banks have one shape."""
    event, other = tuple(p.points.shape[1:]), tuple(q.points.shape[1:])
    if event != other:
        raise ShapeError(
            f"{user}: the states of p have shape {event}, but those of the prior {other}. Compare "
            "densities on one space."
        )
