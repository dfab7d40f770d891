"""Functions of the values of one reward."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from tiltflow.potential.base import Potential
from tiltflow.types import Access, Cond, expand_as


def offers_through_values(reward: Potential) -> Access:
    """What a function of a reward's values offers: its gradient needs the value too."""
    return reward.offers if Access.VALUE in reward.offers else Access.NONE


class OfReward(Potential, abc.ABC):
    """A function of the values of one reward: phi = f(r), grad phi = f'(r) grad r."""

    reward: Potential

    @abc.abstractmethod
    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """f(r) and f'(r), both (B,)."""

    @property
    def offers(self) -> Access:
        return offers_through_values(self.reward)

    @property
    def source(self) -> Potential:
        return self.reward

    @property
    def worth_remembering(self) -> bool:
        return False

    @final
    def of_value(self, value: Tensor) -> Tensor:
        return self.applied(value)[0]

    @final
    def of_value_and_grad(self, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        applied, slope = self.applied(value)
        return applied, expand_as(slope.to(grad), grad) * grad

    @final
    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.of_value(self.reward.value(x, cond))

    @final
    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[1]

    @final
    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        return self.of_value_and_grad(*self.reward.value_and_grad(x, cond))


@final
@dataclass(frozen=True, eq=False)
class Hinge(OfReward):
    """One side of a reward, scaled: the first variation of a tail expectation.

    ``side="above"``: slope * (r - threshold)_+ ; ``side="below"``: -slope * (threshold - r)_+.
    Both are non-decreasing in r. The gradient is slope * grad r on the active side, else 0.
    """

    reward: Potential
    threshold: float
    slope: float
    side: Literal["above", "below"]

    @property
    def sparse(self) -> bool:
        return True

    def active(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return self._active(self.reward.value(x, cond))

    def _active(self, r: Tensor) -> Tensor:
        return r > self.threshold if self.side == "above" else r < self.threshold

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        over = r - self.threshold
        excess = over.clamp(min=0) if self.side == "above" else over.clamp(max=0)
        return self.slope * excess, self.slope * self._active(r).to(r)

    def __str__(self) -> str:
        return f"Hinge({self.reward}, {self.side} {self.threshold:.4g})"


@final
@dataclass(frozen=True, eq=False)
class Shaped(OfReward):
    """A smooth function of a reward: phi = f(r), grad phi = f'(r) grad r.

    Args:
        reward: r; its value is needed, for the gradient too.
        shape: r (B,) -> (f(r), f'(r)), both (B,).
        name: for messages.
    """

    reward: Potential
    shape: Callable[[Tensor], tuple[Tensor, Tensor]]
    name: str = "Shaped"

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.shape(r)

    def __str__(self) -> str:
        return f"{self.name}({self.reward})"
