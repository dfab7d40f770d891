"""Distances between points, and what kernels and transport costs need of them."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances, (N, M); few dimensions without the cancellation of x^2 + y^2 - 2 xy."""
    if x.shape[1] <= (4 if x.dtype is torch.float64 else 16):
        columns = zip(x.unbind(1), y.unbind(1), strict=True)
        parts = ((a[:, None] - b.contiguous()).square_() for a, b in columns)
        total = next(parts, x.new_zeros(len(x), len(y)))
        for part in parts:
            total += part
        return total
    centre = y.mean(0)
    x, y = x - centre, y - centre
    total = torch.addmm((y * y).sum(1), x, y.T, alpha=-2)
    return total.add_((x * x).sum(1, keepdim=True)).clamp_(min=0)


def root(squared: Tensor) -> Tensor:
    """Square root whose derivative at 0 is taken as 0."""
    if not squared.requires_grad:
        return squared.sqrt()
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def inverse_root(squared: Tensor) -> Tensor:
    """1 / sqrt, and 0 at 0: there the gradient of a distance is taken as 0."""
    return torch.where(squared == 0, 0.0, squared.rsqrt())


def median_distance(y: Tensor, weights: Tensor) -> float:
    """Weighted median of the distances of all pairs of y (N, D); 0 for a single point."""
    if len(y) < 2:
        return 0.0
    i, j = torch.triu_indices(len(y), len(y), 1, device=y.device)
    distances, order = torch.pdist(y).sort()
    mass = (weights[i] * weights[j])[order].cumsum(0)
    middle = int(torch.searchsorted(mass, 0.5 * float(mass[-1])))
    return float(distances[min(middle, len(distances) - 1)])
