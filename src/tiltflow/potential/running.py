"""Running rewards, earned along a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from tiltflow.potential.base import Potential
from tiltflow.types import Access, Cond, expand_as


class StepReward(Protocol):
    """A running reward f(x, t, s) earned on the step t -> s (already times the step's length)."""

    @property
    def offers(self) -> Access:
        """What can be computed; solvers by adjoints need GRAD only."""
        ...

    def value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, *event), (B,), (B,) -> (B,)."""
        ...

    def grad(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        """Gradient in x, (B, *event)."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Rate(StepReward):
    """A running reward from a rate: f(x, t, s) = (s - t) * weight(t) * potential(x)."""

    potential: Potential
    weight: Callable[[Tensor], Tensor] = torch.ones_like

    @property
    def offers(self) -> Access:
        return self.potential.offers

    def value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return (s - t) * self.weight(t) * self.potential.value(x, cond)

    def grad(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return expand_as((s - t) * self.weight(t), x) * self.potential.grad(x, cond)
