"""Wasserstein distances between samples of Gaussians: bias, gradients and cost of each method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from common import Page, Settings, spread
from torch import Tensor

from tiltflow.density import Empirical
from tiltflow.divergences import MMD, EnergyDistance, Wasserstein
from tiltflow.functional import Functional
from tiltflow.seed import Seed

FRESH = 1000
"""New samples of p at which gradients are compared."""


@dataclass(frozen=True)
class Case:
    """p and q = N(0, I), with everything known: p is moved by ``shift`` e_1 or scaled.

    Args:
        name: a row of the tables.
        power: 1 or 2.
        shift: along the first axis.
        std: of p, in all directions.
        dimension: D.
    """

    name: str
    power: int
    shift: float = 0.0
    std: float = 1.0
    dimension: int = 2

    def moved(self, z: Tensor) -> Tensor:
        """Samples of p from standard normal ones."""
        out = self.std * z
        out[:, 0] += self.shift
        return out

    @property
    def radius(self) -> float:
        """E|Z| of a standard normal in D dimensions."""
        half = self.dimension / 2
        return math.sqrt(2) * math.exp(math.lgamma(half + 0.5) - math.lgamma(half))

    @property
    def exact(self) -> float:
        """W_1 or W_2^2."""
        if self.power == 1:
            return self.shift + (self.std - 1) * self.radius
        return self.shift**2 + self.dimension * (self.std - 1) ** 2

    def gradient(self, x: Tensor) -> Tensor:
        """Of Kantorovich's potential of p's side."""
        if self.power == 2:
            centre = torch.zeros_like(x)
            centre[:, 0] = self.shift
            return 2 * (x - (x - centre) / self.std)
        if self.shift:
            return torch.zeros_like(x).index_fill_(1, torch.tensor([0]), 1.0)
        return x / x.norm(dim=1, keepdim=True)

    def noise(self, x: Tensor, y: Tensor) -> float:
        """How far the exact potentials' means over samples are from their expectations.

        It is the first-order noise of every estimate of the cost; without it, bias remains.
        """
        if self.power == 1:
            f, g = (x[:, 0], y[:, 0]) if self.shift else (x.norm(dim=1), y.norm(dim=1))
            return float(f.mean() - g.mean()) - self.exact
        if self.shift:
            return 2 * self.shift * float((x - y)[:, 0].mean() - self.shift)
        f, g = (1 - 1 / self.std) * (x * x).sum(1), (1 - self.std) * (y * y).sum(1)
        return float(f.mean() + g.mean()) - self.exact


@dataclass(frozen=True)
class Found:
    """Of one method on one pair of banks."""

    bias: float
    slope_error: float
    seconds: float


def normal(case: Case, count: int, seed: Seed) -> Tensor:
    generator = seed.generator()
    return torch.randn(count, case.dimension, generator=generator, dtype=torch.float64)


def measure(case: Case, count: int, seed: int, method: str, epsilon: float) -> Found:
    """Value and gradient of one method; the gradient's error is relative, root mean square."""
    address = Seed(seed).child("transport")
    x = case.moved(normal(case, count, address.child("p")))
    y = normal(case, count, address.child("q"))
    p, prior = Empirical(x), Empirical(y)
    distance = Wasserstein(
        prior,
        case.power,
        method=method,
        epsilon=epsilon,
        max_points=count,  # type: ignore[arg-type]
    )
    start = time.process_time()
    value, potential = distance.value(p).value, distance.first_variation(p)
    seconds = time.process_time() - start
    fresh = case.moved(normal(case, FRESH, address.child("fresh")))
    true = case.gradient(fresh)
    miss = (potential.grad(fresh) - true).square().sum(1).mean().sqrt()
    size = true.square().sum(1).mean().sqrt()
    return Found(value - case.exact - case.noise(x, y), float(miss / size), seconds)


def table(
    page: Page,
    cases: Sequence[Case],
    counts: Sequence[int],
    methods: Sequence[tuple[str, float]],
    settings: Settings,
) -> None:
    """One line for each case, number of samples and method."""
    rows = []
    for case in cases:
        for count in counts:
            for method, epsilon in methods:
                found = [measure(case, count, s, method, epsilon) for s in settings.seeds]
                bias = sum(f.bias for f in found) / len(found)
                name = f"{method}, ε = {epsilon:g}" if method == "sinkhorn" else method
                seconds = sum(f.seconds for f in found) / len(found)
                rows.append([
                    case.name, f"{count}", name, f"{case.exact:.3f}", f"{bias:+.3f}",
                    spread([f.slope_error for f in found], 2), f"{seconds:.2f}",
                ])  # fmt: skip
                print(rows[-1], flush=True)
    page.table(
        ["p", "samples", "method", "exact cost", "bias", "error of the gradient", "CPU-s"], rows
    )


def seconds_of(make: Callable[[Empirical], Functional], dimension: int, count: int) -> float:
    """CPU-seconds of value and first variation."""
    case = Case("", 1, shift=1.0, dimension=dimension)
    x, y = (normal(case, count, Seed(0).child(side)) for side in "pq")
    p, functional = Empirical(case.moved(x)), make(Empirical(y))
    start = time.process_time()
    functional.value(p)
    functional.first_variation(p)
    return time.process_time() - start


def large(page: Page, settings: Settings) -> None:
    """What takes all samples of large banks."""
    count = 500 if settings.quick else 10_000
    makers: dict[str, tuple[Callable[[Empirical], Functional], int]] = {
        "Wasserstein, power 1, 1-D": (lambda q: Wasserstein(q, 1), 1),
        "Wasserstein, power 2, 1-D": (lambda q: Wasserstein(q, 2), 1),
        "Wasserstein, power 1, 2-D (thinned to 2000)": (lambda q: Wasserstein(q, 1), 2),
        "Wasserstein, power 2, 2-D (thinned to 2000)": (lambda q: Wasserstein(q, 2), 2),
        "MMD, 2-D": (MMD, 2),
        "EnergyDistance, 2-D": (EnergyDistance, 2),
    }
    rows = [[name, f"{seconds_of(*maker, count):.2f}"] for name, maker in makers.items()]
    page.text(f"## Value, standard error and first variation of two banks of {count}")
    page.table(["functional", "CPU-s"], rows)


def main(settings: Settings) -> None:
    """Write docs/benchmarks/transport.md."""
    counts = (100,) if settings.quick else (500, 2000)
    page = Page("transport", "Wasserstein distances of samples")
    page.text(
        "q = N(0, I); p is q moved by d along an axis or scaled by s about the origin, where cost "
        "and map are known. Banks are independent. `bias` is the mean over the seeds of (cost - "
        "exact cost), without the first-order noise of the samples, which is known here (the "
        "means of the exact potentials). The error of the gradient is root mean square over "
        f"{FRESH} new samples of p, relative to the exact gradient, one number per seed. Times "
        "are those of value, standard error and first variation."
    )
    page.text("## Power 2 (W_2^2), two dimensions")
    moved = [Case(f"moved, d = {d:g}", 2, shift=d) for d in (0.3, 1.0)]
    scaled = [Case(f"scaled, s = {s:g}", 2, std=s) for s in (1.5,)]
    entropic = [("sinkhorn", e) for e in (0.5, 0.1, 0.02)]
    table(page, moved + scaled, counts, [("exact", 0.1), *entropic], settings)
    page.text("## Power 1 (W_1), two dimensions")
    moved = [Case(f"moved, d = {d:g}", 1, shift=d) for d in (0.3, 1.0)]
    scaled = [Case("scaled, s = 1.5", 1, std=1.5)]
    others = [("exact", 0.1), ("sinkhorn", 0.1), ("sinkhorn", 0.02), ("critic", 0.1)]
    table(page, moved + scaled, counts, others, settings)
    page.text("## Eight dimensions")
    high = [Case("W_2^2, moved, d = 1", 2, shift=1.0, dimension=8)]
    table(
        page, high, counts[-1:], [("exact", 0.1), ("sinkhorn", 0.5), ("sinkhorn", 0.1)], settings
    )
    high = [Case("W_1, moved, d = 1", 1, shift=1.0, dimension=8)]
    table(page, high, counts[-1:], [("exact", 0.1), ("critic", 0.1)], settings)
    page.text("## One dimension")
    line = [Case("W_1, moved, d = 1", 1, shift=1.0, dimension=1)]
    line += [Case("W_2^2, moved, d = 1", 2, shift=1.0, dimension=1)]
    line += [Case("W_2^2, scaled, s = 1.5", 2, std=1.5, dimension=1)]
    table(page, line, counts, [("exact", 0.1)], settings)
    large(page, settings)
    page.finish(settings)
