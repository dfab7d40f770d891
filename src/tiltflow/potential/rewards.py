"""Rewards: potentials that users write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError
from tiltflow.potential.base import Potential
from tiltflow.types import Access, Cond


class Reward(Potential):
    """A differentiable reward: a subclass writes ``_value`` in torch, autograd does the rest."""

    @property
    def offers(self) -> Access:
        return Access.BOTH

    @final
    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[1]

    @final
    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self._value(leaf, cond)
            if (
                isinstance(value, Tensor)
                and value.shape == x.shape[:1]
                and not value.requires_grad
            ):
                raise CapabilityError(
                    f"{type(self).__name__} has no gradient: its value does not depend on x "
                    "through differentiable torch operations. Rewrite it in torch, or wrap it in "
                    "BlackBox and use a solver that needs values only."
                )
            self._checked(value, (x.shape[0],), "value")
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad


@final
class Differentiable(Reward):
    """A reward from a function of x (and conditions), differentiable in torch."""

    def __init__(self, function: Callable[..., Tensor], *, takes_cond: bool = False) -> None:
        """``function(x)``, or ``function(x, cond)`` with ``takes_cond``, returns (B,)."""
        self._function, self._takes_cond = function, takes_cond

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._function(x, cond) if self._takes_cond else self._function(x)


@final
class BlackBox(Potential):
    """A reward of which only values are known; for solvers that need no gradient."""

    def __init__(self, function: Callable[..., Tensor], *, takes_cond: bool = False) -> None:
        """``function(x)``, or ``function(x, cond)`` with ``takes_cond``, returns (B,)."""
        self._function, self._takes_cond = function, takes_cond

    @property
    def offers(self) -> Access:
        return Access.VALUE

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        with torch.no_grad():
            return self._function(x, cond) if self._takes_cond else self._function(x)


@final
@dataclass(frozen=True, eq=False)
class Decoded(Potential):
    """A reward on decoded states: phi(decode(x)), e.g. of an image behind an auto-encoder."""

    reward: Potential
    decode: Callable[[Tensor], Tensor]

    @property
    def offers(self) -> Access:
        return self.reward.offers

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        with torch.no_grad():
            return self.reward.value(self.decode(x), cond)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = self.decode(leaf)
        (grad,) = torch.autograd.grad(y, leaf, self.reward.grad(y.detach(), cond))
        return grad

    def __str__(self) -> str:
        return f"Decoded({self.reward})"
