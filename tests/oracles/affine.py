"""Models whose end point is affine in x at every step: chains with laws in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiltflow.analytic import gaussian
from tiltflow.delta import Correction
from tiltflow.flow import FlowModel, Process
from tiltflow.kernel import EulerMaruyama
from tiltflow.sample import Sampler

K = 40
EULER = Sampler(EulerMaruyama(), K)


class Affine(nn.Module):
    """x -> slope_k x + offset_k with free numbers at each grid time."""

    def __init__(self, num_steps: int = K) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(num_steps))
        self.offset = nn.Parameter(torch.zeros(num_steps))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = (t * len(self.slope)).round().long().clamp(0, len(self.slope) - 1)
        return self.slope[k, None].to(x) * x + self.offset[k, None].to(x)


def affine(mean: float = 0.0, std: float = 1.0, num_steps: int = K) -> FlowModel:
    """N(mean, std^2) with a correction that is affine at each step."""
    return gaussian([mean], std).flow(hidden=()).with_delta(Correction(Affine(num_steps)))


def steps_of(process: Process, sampler: Sampler) -> list[tuple[float, float, float]]:
    """(gain, offset, variance) of each step of an affine chain."""
    grid, kernel = sampler.times, sampler.kernel.resolved(process)
    out = []
    for k in range(sampler.num_steps):
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        with torch.no_grad():
            step = kernel.transition(process, x, grid[k].expand(2), grid[k + 1].expand(2))
        offset = float(step.mean[0])
        out.append((float(step.mean[1]) - offset, offset, float(step.variance[0])))
    return out


def law(process: Process, sampler: Sampler = EULER) -> tuple[float, float]:
    """Mean and variance of the chain's end: m -> A m + c, P -> A^2 P + v."""
    mean, variance = 0.0, 1.0
    for gain, offset, noise in steps_of(process, sampler):
        mean, variance = gain * mean + offset, gain**2 * variance + noise
    return mean, variance


def optimal_law(
    process: Process, sampler: Sampler, slope: float, curvature: float
) -> tuple[float, float]:
    """Mean and variance of the best chain for E[slope x_K - curvature x_K^2 / 2] - KL.

    Chains whose steps keep their variances. With the value function b x - P x^2 / 2, from the end:
    the best mean is (A x + c + v b) / (1 + v P); then P <- A^2 P / (1 + v P) and
    b <- A (b - P c) / (1 + v P).
    """
    b, p, best = slope, curvature, []
    for gain, offset, noise in reversed(steps_of(process, sampler)):
        shrink = 1 / (1 + noise * p)
        best.append((gain * shrink, (offset + noise * b) * shrink, noise))
        b, p = gain * (b - p * offset) * shrink, gain**2 * p * shrink
    mean, variance = 0.0, 1.0
    for gain, offset, noise in reversed(best):
        mean, variance = gain * mean + offset, gain**2 * variance + noise
    return mean, variance


def tensors(model: FlowModel) -> list[Tensor]:
    """What is trained."""
    return [p.detach() for p in model.trainable.parameters()]


def same(first: FlowModel, second: FlowModel) -> bool:
    """Bit for bit."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)
