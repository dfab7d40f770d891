"""Ground costs of optimal transport, and potentials that live on them."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from tiltflow.density import Bank
from tiltflow.distances import inverse_root, squared_distances
from tiltflow.errors import ConfigError, NonFiniteError, ShapeError
from tiltflow.potential import Potential
from tiltflow.seed import Seed
from tiltflow.similarity import CHUNK
from tiltflow.types import Access, Cond

Power = Literal[1, 2]


@final
@dataclass(frozen=True)
class Ground:
    """The cost of moving a unit of mass: c(x, y) = d(x, y)^power, d(x, y) = |A (x - y)|.

    Args:
        power: 1 or 2.
        metric: the diagonal of A, one positive number per entry of a state; by default ones.
    """

    power: Power = 1
    metric: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise ConfigError(f"Transport: power={self.power!r} must be 1 or 2.")
        if self.metric is not None and not all(math.isfinite(a) and a > 0 for a in self.metric):
            raise ConfigError(
                f"Transport: metric={self.metric!r} must be positive scales, one per dimension; "
                "leave it out for the Euclidean distance."
            )

    @staticmethod
    def of(power: Power, metric: Sequence[float] | Tensor | None) -> Ground:
        """From scales in any form."""
        if metric is None:
            return Ground(power)
        return Ground(power, tuple(torch.as_tensor(metric).double().flatten().tolist()))

    def scales(self, x: Tensor) -> Tensor:
        """The diagonal of A for states like x (N, *event): (D,) float64.

        Raises:
            ShapeError: if there are not as many scales as entries of a state.
        """
        dimension = math.prod(x.shape[1:])
        if self.metric is None:
            return torch.ones(dimension, dtype=torch.float64, device=x.device)
        if len(self.metric) != dimension:
            raise ShapeError(
                f"Transport: the metric has {len(self.metric)} scales, but a state has "
                f"{dimension} entries; give one scale per entry."
            )
        return torch.tensor(self.metric, dtype=torch.float64, device=x.device)

    def scaled(self, x: Tensor) -> Tensor:
        """A x, in which distances are Euclidean: (N, *event) -> (N, D) float64.

        Raises:
            NonFiniteError: if a state is NaN or infinite.
        """
        z = x.detach().double().flatten(1) * self.scales(x)
        if not bool(torch.isfinite(z).all()):
            raise NonFiniteError(
                "transport", "the ground cost", "a state",
                "Check the samples of both densities.",
            )  # fmt: skip
        return z

    def cost(self, z: Tensor, y: Tensor) -> Tensor:
        """c between scaled states, (N, D), (M, D) -> (N, M)."""
        squared = squared_distances(z, y)
        return squared if self.power == 2 else squared.sqrt_()

    def pull(self, z: Tensor, y: Tensor, plan: Tensor) -> Tensor:
        """sum_j plan_ij grad_z c(z_i, y_j), (N, D); the distance has gradient 0 at 0."""
        if self.power == 2:
            plan = 2 * plan
        else:
            plan = plan * inverse_root(squared_distances(z, y))
        centre = y.mean(0)
        return (z - centre) * plan.sum(1, keepdim=True) - plan @ (y - centre)


class OnGround(Potential, abc.ABC):
    """A potential of transport: a function of scaled states, with value and gradient.

    Computed in float64, a part of a batch at a time.
    """

    ground: Ground

    @abc.abstractmethod
    def _at(self, z: Tensor, grad: bool) -> tuple[Tensor, Tensor]:
        """Values (N,) at scaled states (N, D), and if ``grad`` the gradient (N, D) there."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Numbers in memory for each state of a batch."""

    @property
    def offers(self) -> Access:
        return Access.BOTH

    @final
    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.on_scaled(self.ground.scaled(x)).to(x)

    @final
    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[1]

    @final
    @torch.no_grad()
    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        parts = [self._at(z, True) for z in self._split(self.ground.scaled(x))]
        value, grad = (torch.cat(column) for column in zip(*parts, strict=True))
        return value.to(x), (grad * self.ground.scales(x)).view_as(x).to(x)

    @final
    @torch.no_grad()
    def on_scaled(self, z: Tensor) -> Tensor:
        """Values at scaled states, (N, D) -> (N,) float64."""
        return torch.cat([self._at(part, False)[0] for part in self._split(z)])

    @final
    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        return torch.split(z, max(1, CHUNK // self.size))


@final
@dataclass(frozen=True, eq=False)
class Transport:
    """What it costs to turn p into q, and the Kantorovich potentials of both sides::

        cost = max { E_p f + E_q g : f(x) + g(y) <= c(x, y) }

    up to regularisation. f is the first variation of the cost in p, g that in q; both are defined
    everywhere, up to a constant.
    """

    cost: float
    first: Potential
    second: Potential


def atoms(bank: Bank, ground: Ground) -> tuple[Tensor, Tensor]:
    """Scaled points and weights of a bank, (N, D) and (N,) float64, where the weight is not 0."""
    weights = bank.weights.double().to(bank.points.device)
    kept = weights > 0
    return ground.scaled(bank.points[kept]), weights[kept] / weights[kept].sum()


def thinned(bank: Bank, most: int, seed: Seed) -> Bank:
    """At most ``most`` points, drawn without replacement, with their weights.

    Banks of one size lose the same points under one seed: two banks that weigh the same points
    still do.

    Raises:
        ConfigError: if nodes of a grid would have to be left out.
    """
    count = len(bank.points)
    if count <= most:
        return bank
    if bank.exact:
        raise ConfigError(
            f"Transport: a grid of {count} nodes is too large for max_points={most}, and a sum "
            "over part of a grid means nothing. Use a coarser grid or raise max_points."
        )
    generator = seed.child(count).generator()
    index = torch.randperm(count, generator=generator)[:most].sort().values
    index = index.to(bank.points.device)
    weights = bank.weights.double()[index.to(bank.weights.device)]
    if not float(weights.sum()) > 0:
        raise ConfigError(
            f"Transport: {most} of {count} samples, drawn at random, have no weight at all. Raise "
            "max_points, or tilt less."
        )
    return Bank(bank.points[index], weights / weights.sum())
