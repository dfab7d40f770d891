"""Every utility and divergence a second time: torch functions of a probability vector on a grid.

Written from the formulas (methods, sections 3.3 and 3.4), differentiable by autograd, without any
functional of the library. Where a formula has kinks, ``blur`` > 0 makes it smooth from above or
from below; ``blur = 0`` is the formula itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Value = Callable[[Tensor, float], Tensor]
"""(probabilities (N,) of the nodes, all positive, blur) -> a number."""


@dataclass(frozen=True)
class Nodes:
    """Nodes (N, d) of a grid with the given cell volume, and two functions of them.

    Attributes:
        x: the nodes.
        cell: volume of a cell; lengths of the cells are equal in all directions.
        r: the reward, (N,).
        phi: features, (N, m).
    """

    x: Tensor
    cell: float
    r: Tensor
    phi: Tensor

    @property
    def squares(self) -> Tensor:
        """Squared distances of the nodes, (N, N)."""
        return (self.x[:, None] - self.x[None]).square().sum(-1)


# ------------------------------------------------------------------------------------- utilities


def expected_reward(on: Nodes) -> Value:
    return lambda p, blur: p @ on.r


def entropy(on: Nodes) -> Value:
    return lambda p, blur: -(p * (p / on.cell).log()).sum()


def quantile(r: Tensor, p: Tensor, level: float) -> Tensor:
    """The smallest value y of r with P(r <= y) >= level."""
    values, order = r.sort()
    return values[int((p[order].cumsum(0) < level * (1 - 1e-12)).sum()).__index__()]


def upper_tail(on: Nodes, level: float) -> Value:
    """int_level^1 q_u du: the nodes in order, the one at the boundary counted in part."""

    def value(p: Tensor, blur: float) -> Tensor:
        if blur:
            return _smooth_upper_tail(on.r, p, level, blur)
        order = on.r.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        taken = torch.minimum(p[order], (1 - level - before).clamp(min=0))
        return (taken * on.r[order]).sum()

    return value


def _smooth_upper_tail(r: Tensor, p: Tensor, level: float, blur: float) -> Tensor:
    """min_y { (1 - level) y + E blur log(1 + exp((r - y) / blur)) }, found by bisection.

    The hinge is raised by at most blur log 2.
    """
    low, high = float(r.min()) - 40 * blur, float(r.max()) + 40 * blur
    with torch.no_grad():
        for _ in range(100):
            y = (low + high) / 2
            above = float(p @ ((r - y) / blur).sigmoid())
            low, high = (y, high) if above > 1 - level else (low, y)
    return (1 - level) * y + p @ (blur * torch.nn.functional.softplus((r - y) / blur))


def right_cvar(on: Nodes, level: float) -> Value:
    tail = upper_tail(on, level)
    return lambda p, blur: tail(p, blur) / (1 - level)


def left_cvar(on: Nodes, level: float) -> Value:
    """The mean is level times the lower tail plus the upper one."""
    tail = upper_tail(on, level)
    return lambda p, blur: (p @ on.r - tail(p, blur)) / level


def spectral_risk(on: Nodes, levels: tuple[float, ...], slopes: tuple[float, ...]) -> Value:
    """sum_i s_i int q_u du over the i-th interval of levels, s of mean one."""
    bounds = (0.0, *levels, 1.0)
    mass = sum(s * (b - a) for s, (a, b) in zip(slopes, pairwise(bounds), strict=True))

    def value(p: Tensor, blur: float) -> Tensor:
        tails = [p @ on.r, *(upper_tail(on, u)(p, blur) for u in levels), p.new_zeros(())]
        parts = (s * (a - b) for s, (a, b) in zip(slopes, pairwise(tails), strict=True))
        return torch.stack(list(parts)).sum() / mass

    return value


def mean_variance(on: Nodes, aversion: float) -> Value:
    return lambda p, blur: p @ on.r - aversion * (p @ on.r**2 - (p @ on.r) ** 2)


def entropic_risk(on: Nodes, b: float) -> Value:
    return lambda p, blur: (p @ (b * on.r).exp()).log() / b


def design(on: Nodes, criterion: str, ridge: float) -> Value:
    """By eigenvalues; the smallest one smoothed as -blur log mean exp(-eigenvalue / blur)."""

    def value(p: Tensor, blur: float) -> Tensor:
        matrix = on.phi.T @ (p[:, None] * on.phi) + ridge * torch.eye(on.phi.shape[1]).to(p)
        spectrum = torch.linalg.eigvalsh(matrix)
        if criterion == "D":
            return spectrum.log().sum()
        if criterion == "A":
            return -(1 / spectrum).sum()
        if blur:
            blurred = blur * float(spectrum.detach()[0])
            least = -blurred * (torch.logsumexp(-spectrum / blurred, 0) - math.log(len(spectrum)))
            return -1 / least
        return -1 / spectrum[0]

    return value


def log_barrier(on: Nodes, lower: float) -> Value:
    def value(p: Tensor, blur: float) -> Tensor:
        margin = p @ on.r - lower
        return margin.log() if bool(margin > 0) else margin - math.inf

    return value


def moment_matching(on: Nodes, target: tuple[float, ...]) -> Value:
    goal = torch.tensor(target, dtype=torch.float64)
    return lambda p, blur: -((p @ on.phi - goal) ** 2).sum() / 2


def gaussian_kernel(on: Nodes, length: float) -> Tensor:
    return (-on.squares / (2 * length**2)).exp()


def kernel_diversity(on: Nodes, length: float, order: int, ridge: float) -> Value:
    """The spectrum of E k_X k_X^T is that of the matrix sqrt(p_i p_j) k_ij."""
    kernel = gaussian_kernel(on, length)

    def value(p: Tensor, blur: float) -> Tensor:
        if order == 2:
            return -(p @ kernel @ p).log()
        root = p.sqrt()
        spectrum = torch.linalg.eigvalsh(root[:, None] * kernel * root).clamp(min=0)
        e = ridge
        return math.log(1 / e) - 1 - ((spectrum + e) * (1 + spectrum / e).log() - spectrum).sum()

    return value


# ----------------------------------------------------------------------------------- divergences


def kl(on: Nodes, q: Tensor) -> Value:
    return lambda p, blur: (p * (p / q).log()).sum()


def forward_kl(on: Nodes, q: Tensor) -> Value:
    return lambda p, blur: (q * (q / p).log()).sum()


def renyi(on: Nodes, q: Tensor, order: float) -> Value:
    b = order
    return lambda p, blur: torch.logsumexp(b * p.log() + (1 - b) * q.log(), 0) / (b - 1)


def chi_square(on: Nodes, q: Tensor) -> Value:
    return lambda p, blur: ((p - q) ** 2 / q).sum()


def hellinger(on: Nodes, q: Tensor) -> Value:
    return lambda p, blur: ((p.sqrt() - q.sqrt()) ** 2).sum() / 2


def jensen_shannon(on: Nodes, q: Tensor) -> Value:
    def value(p: Tensor, blur: float) -> Tensor:
        m = (p + q) / 2
        return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2

    return value


def wasserstein(on: Nodes, q: Tensor) -> Value:
    """On a line, the area between the two distribution functions."""

    def value(p: Tensor, blur: float) -> Tensor:
        gap = (p - q).cumsum(0)[:-1]
        return on.cell * ((gap**2 + blur**2).sqrt() - blur).sum()

    return value


def wasserstein_square(on: Nodes, q: Tensor) -> Value:
    """On a line: int (F^-1 - G^-1)^2, each node spread evenly over its cell.

    Between two levels of either distribution function both quantile functions are linear.
    """
    edges = torch.cat([on.x[:1, 0] - on.cell / 2, on.x[:, 0] + on.cell / 2])

    def quantiles(masses: Tensor, levels: Tensor, middle: Tensor, u: Tensor) -> Tensor:
        i = (torch.searchsorted(levels.detach(), middle, right=True) - 1).clamp(0, len(masses) - 1)
        return edges[i] + on.cell * (u - levels[i]) / masses[i]

    def value(p: Tensor, blur: float) -> Tensor:
        of_p, of_q = (torch.cat([m.new_zeros(1), m.cumsum(0) / m.sum()]) for m in (p, q))
        u = torch.cat([of_p, of_q]).sort().values
        low, high = u[:-1], u[1:]
        middle = ((low + high) / 2).detach()
        a, b = (quantiles(p, of_p, middle, t) - quantiles(q, of_q, middle, t) for t in (low, high))
        return ((high - low) * (a * a + a * b + b * b)).sum() / 3

    return value


def mmd(on: Nodes, q: Tensor, length: float, squared: bool) -> Value:
    kernel = gaussian_kernel(on, length)

    def value(p: Tensor, blur: float) -> Tensor:
        square = (p - q) @ kernel @ (p - q)
        return square if squared else (square.clamp(min=0) + blur**2).sqrt() - blur

    return value


def energy_distance(on: Nodes, q: Tensor) -> Value:
    distances = on.squares.sqrt()
    return lambda p, blur: -(p - q) @ distances @ (p - q)
