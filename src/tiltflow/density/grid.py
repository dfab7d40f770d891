"""Densities on a grid, for which every integral is a sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density.base import Bank, Density
from tiltflow.errors import ShapeError
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond


@final
class Quadrature(Density):
    """A density on a regular grid in one or two dimensions: every integral is a sum.

    Args:
        axes: one increasing tensor of nodes per dimension, equally spaced.
        log_density: (n_1, ..., n_d) log-density at the nodes, up to a constant; normalised here.
    """

    def __init__(self, axes: Sequence[Tensor], log_density: Tensor) -> None:
        self.axes = tuple(a.double() for a in axes)
        if tuple(log_density.shape) != tuple(len(a) for a in self.axes) or len(self.axes) > 2:
            raise ShapeError("Quadrature: log_density needs one axis per dimension, at most two.")
        self.cell = 1.0
        for a in self.axes:
            self.cell *= float(a[1] - a[0])
        table = log_density.double()
        self.table = table - torch.logsumexp(table.flatten(), 0) - math.log(self.cell)
        self.nodes = torch.stack(torch.meshgrid(*self.axes, indexing="ij"), -1).flatten(
            0, len(self.axes) - 1
        )
        self._log = GridPotential(self.axes, self.table, self.nodes)

    @property
    def event(self) -> tuple[int, ...]:
        return (len(self.axes),)

    @staticmethod
    def of(axes: Sequence[Tensor], log: Potential | Callable[[Tensor], Tensor]) -> Quadrature:
        """From a log-density, a potential or a function of nodes (N, d)."""
        axes = [a.double() for a in axes]
        nodes = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, len(axes) - 1)
        values = log.value(nodes) if isinstance(log, Potential) else log(nodes)
        return Quadrature(axes, values.reshape([len(a) for a in axes]))

    def tilted(self, psi: Potential) -> Quadrature:
        """This law times exp(psi), on the same nodes: the very tensor, see ``remembering``."""
        tilt = psi.value(self.nodes).double().reshape(self.table.shape)
        other = Quadrature(self.axes, self.table + tilt)
        other.nodes = self.nodes
        other._log = GridPotential(self.axes, other.table, self.nodes)
        return other

    @property
    def probabilities(self) -> Tensor:
        """Mass of each node, (N,)."""
        return (self.table.flatten() + math.log(self.cell)).exp()

    @property
    def bank(self) -> Bank:
        return Bank(self.nodes, self.probabilities, None, exact=True)

    @property
    def log(self) -> Potential:
        return self._log

    def total_variation(self, other: Quadrature) -> float:
        """Half the L1 distance to another density on the same grid."""
        return float((self.probabilities - other.probabilities).abs().sum()) / 2


@final
@dataclass(frozen=True, eq=False)
class GridPotential(Potential):
    """A function given at the nodes of a grid; exact there, multilinear in between."""

    axes: tuple[Tensor, ...]
    table: Tensor
    nodes: Tensor

    @property
    def offers(self) -> Access:
        return Access.BOTH

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        # Every iterate of a grid run has nodes of its own, equal to these.
        if x is self.nodes or torch.equal(x, self.nodes):
            return self.table.flatten().to(x)
        return _multilinear(self.axes, self.table, x.double()).to(x)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        spacing = [float(a[1] - a[0]) for a in self.axes]
        slopes = torch.gradient(self.table, spacing=spacing, edge_order=2)
        columns = [_multilinear(self.axes, slope, x.double()) for slope in slopes]
        return torch.stack(columns, -1).to(x)


def _multilinear(axes: Sequence[Tensor], table: Tensor, x: Tensor) -> Tensor:
    """Interpolate ``table`` at x (N, d); constant beyond the edges."""
    cells, fractions = [], []
    for d, axis in enumerate(axes):
        position = (x[:, d] - axis[0]) / (axis[1] - axis[0])
        cell = position.floor().long().clamp(0, len(axis) - 2)
        cells.append(cell)
        fractions.append((position - cell).clamp(0, 1))
    total = torch.zeros_like(x[:, 0])
    for corner in range(2 ** len(axes)):
        bits = [(corner >> d) & 1 for d in range(len(axes))]
        weight = torch.ones_like(total)
        for bit, fraction in zip(bits, fractions, strict=True):
            weight = weight * (fraction if bit else 1 - fraction)
        index = tuple(cell + bit for cell, bit in zip(cells, bits, strict=True))
        total = total + weight * table[index]
    return total
