"""Features: vector-valued functions of a state, for design criteria and for kernels."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, NonFiniteError, ShapeError
from tiltflow.types import Cond


class Features(abc.ABC):
    """A map Phi: x -> R^m; a subclass writes ``_value`` in differentiable torch."""

    @abc.abstractmethod
    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        """(B, *event) -> (B, m)."""

    @final
    def value(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Phi(x), (B, *event) -> (B, m); keeps the graph if x has one.

        Raises:
            ShapeError: if the result is not (B, m).
            NonFiniteError: if an entry is NaN or infinite.
        """
        out = self._value(x, cond)
        if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(
                f"{type(self).__name__} returned {got} for {len(x)} states; features are "
                "(samples, features)."
            )
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError(type(self).__name__, "value", "a feature")
        return out

    @final
    def pullback(self, x: Tensor, cotangent: Tensor, cond: Cond | None = None) -> Tensor:
        """J_Phi(x)^T cotangent, (B, *event), (B, m) -> (B, *event)."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = self.value(leaf, cond)
        (grad,) = torch.autograd.grad(out, leaf, cotangent.to(out), allow_unused=True)
        return torch.zeros_like(x) if grad is None else grad

    @final
    def value_and_jacobian(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
        """Phi(x) and all its gradients, (B, *event) -> (B, m), (B, m, *event), without a graph.

        One backward pass for each of the m features.
        """
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = self.value(leaf, cond)
            rows = [
                torch.autograd.grad(column, leaf, retain_graph=True, allow_unused=True)[0]
                for column in (out.sum(0) if out.requires_grad else ())
            ]
        known = [torch.zeros_like(x) if row is None else row for row in rows]
        return out.detach(), torch.stack(known or [torch.zeros_like(x)] * out.shape[1], 1)

    def __str__(self) -> str:
        return type(self).__name__


@final
@dataclass(frozen=True, eq=False)
class FeatureMap(Features):
    """Features from a function of x, differentiable in torch: (B, *event) -> (B, m)."""

    function: Callable[[Tensor], Tensor]

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.function(x)


@final
@dataclass(frozen=True, eq=False)
class Coordinates(Features):
    """The state itself, flattened: m is the number of its entries."""

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return x.flatten(1)


@final
@dataclass(frozen=True, eq=False)
class Monomials(Features):
    """All monomials of the coordinates of total degree at most ``degree``, the constant included.

    Args:
        degree: at least 0.
    """

    degree: int = 1

    def __post_init__(self) -> None:
        if self.degree < 0:
            raise ConfigError(f"Monomials: degree={self.degree} must not be negative.")

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        flat = x.flatten(1)
        columns = [torch.ones_like(flat[:, 0])]
        for degree in range(1, self.degree + 1):
            for which in combinations_with_replacement(range(flat.shape[1]), degree):
                columns.append(flat[:, list(which)].prod(1))
        return torch.stack(columns, 1)


__all__ = ["Coordinates", "FeatureMap", "Features", "Monomials"]
