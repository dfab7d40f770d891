"""Potentials: functions of a state that something is to be raised by, known up to a constant."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, NonFiniteError, ShapeError
from tiltflow.types import Access, Cond, expand_as

T = TypeVar("T")


class Potential(abc.ABC):
    """A function phi: x -> R to be raised, known up to an additive constant.

    It *offers* its value, its gradient, or both. A subclass writes ``_value``, ``_grad`` or both
    and says so in ``offers``; callers use ``value`` and ``grad``, which check access, shapes and
    finiteness. Potentials form a vector space: ``a + b``, ``a - b``, ``2 * a``. Equal terms are
    collected, so that ``a - a`` is the zero potential, which offers everything.
    """

    @property
    @abc.abstractmethod
    def offers(self) -> Access:
        """What this potential can compute."""

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        raise NotImplementedError

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        raise NotImplementedError

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        return self._value(x, cond), self._grad(x, cond)

    @final
    def value(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """phi(x), (B, *event) -> (B,).

        Raises:
            CapabilityError: if this potential has no value.
            ShapeError: if the result is not (B,).
            NonFiniteError: if a value is NaN or infinite.
        """
        self.require(Access.VALUE)
        memory = _MEMORY.get()
        if memory is not None and x is memory.points and self.worth_remembering:
            return memory.value(self, cond)
        return self._valued(x, cond)

    @final
    def _valued(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._checked(self._value(x, cond), (x.shape[0],), "value")

    @final
    def grad(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Gradient of phi at each sample, (B, *event) -> (B, *event); raises like ``value``."""
        self.require(Access.GRAD)
        return self._checked(self._grad(x, cond), tuple(x.shape), "gradient")

    @final
    def value_and_grad(self, x: Tensor, cond: Cond | None = None) -> tuple[Tensor, Tensor]:
        """Both sides for the price of one evaluation where that is possible."""
        self.require(Access.BOTH)
        value, grad = self._value_and_grad(x, cond)
        return (
            self._checked(value, (x.shape[0],), "value"),
            self._checked(grad, tuple(x.shape), "gradient"),
        )

    @final
    def require(self, needs: Access, user: str = "The caller") -> None:
        """Raise ``CapabilityError`` unless everything in ``needs`` is offered."""
        missing = needs & ~self.offers
        if missing:
            raise CapabilityError(
                f"{user} needs {needs} of the potential {self}, which offers {self.offers}: "
                f"{missing} is missing. Use a solver that does without it, or "
                "a differentiable reward."
            )

    @final
    def _checked(self, out: Tensor, shape: tuple[int, ...], quantity: str) -> Tensor:
        if not isinstance(out, Tensor) or tuple(out.shape) != shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(
                f"{type(self).__name__} returned a {quantity} of shape {got} where {shape} is "
                "needed: one number per sample for values, one per entry of x for gradients."
            )
        if not bool(torch.isfinite(out).all()):
            bad = int((~torch.isfinite(out.reshape(shape[0], -1)).all(1)).sum())
            raise NonFiniteError(
                f"{type(self).__name__}", f"{bad} of {shape[0]} samples", quantity,
                "Return a finite number for bad states (a reward that can fail should give a "
                "constant penalty with zero gradient).",
            )  # fmt: skip
        return out.detach()

    @property
    def sparse(self) -> bool:
        """Whether it is flat on one side of a threshold, as hinges are; ``active`` then tells
        which side a sample is on, so that roll-outs can keep the few samples of a thin tail."""
        return False

    def active(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Which samples may have a gradient, (B,) of bool; all of them, unless ``sparse``."""
        return torch.ones(len(x), dtype=torch.bool, device=x.device)

    @property
    def worth_remembering(self) -> bool:
        """Whether ``remembering`` keeps its values: not where they cost less than the memory."""
        return True

    @property
    def source(self) -> Potential:
        """What has to be evaluated, of which this is a cheap function; mostly itself."""
        return self

    def of_value(self, value: Tensor) -> Tensor:
        """This potential from the values (B,) of its source."""
        return value

    def of_value_and_grad(self, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """This potential and its gradient from those of its source."""
        return value, grad

    def __add__(self, other: Potential) -> Potential:
        return combine((1.0, self), (1.0, other))

    def __sub__(self, other: Potential) -> Potential:
        return combine((1.0, self), (-1.0, other))

    def __mul__(self, scale: float) -> Potential:
        return combine((float(scale), self))

    __rmul__ = __mul__

    def __neg__(self) -> Potential:
        return combine((-1.0, self))

    def __str__(self) -> str:
        return type(self).__name__


@final
@dataclass
class _Memory:
    """Values of potentials at one set of points; holds the potentials, so that ids stay theirs."""

    points: Tensor
    known: dict[int, tuple[Potential, Tensor]] = field(default_factory=dict)

    def value(self, potential: Potential, cond: Cond | None) -> Tensor:
        if id(potential) not in self.known:
            self.known[id(potential)] = potential, potential._valued(self.points, cond)
        return self.known[id(potential)][1]


_MEMORY: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(points: Tensor) -> Iterator[None]:
    """Within this block, no potential is evaluated twice at ``points`` (this very tensor).

    For loops on a bank: a reward that takes minutes is then paid once. Conditions must be the
    same throughout, as those of a bank are.
    """
    token = _MEMORY.set(_Memory(points))
    try:
        yield
    finally:
        _MEMORY.reset(token)


@final
@dataclass(frozen=True, eq=False)
class Combination(Potential):
    """sum_i c_i phi_i; offers what all of its terms offer. Built by ``combine``."""

    terms: tuple[tuple[float, Potential], ...]

    @property
    def offers(self) -> Access:
        offered = Access.BOTH
        for _, term in self.terms:
            offered &= term.offers
        return offered

    @property
    def sparse(self) -> bool:
        return bool(self.terms) and all(term.sparse for _, term in self.terms)

    def active(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        total = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _, term in self.terms:
            total = total | term.active(x, cond)
        return total

    @property
    def worth_remembering(self) -> bool:
        return False

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        total, value_of = x.new_zeros(x.shape[0]), _once(lambda source: source.value(x, cond))
        for scale, term in self.terms:
            total = total + scale * term.of_value(value_of(term.source))
        return total

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        total, both_of = torch.zeros_like(x), _once(lambda source: source.value_and_grad(x, cond))
        shared = {id(term.source) for _, term in self.terms if term.source is not term}
        for scale, term in self.terms:
            if id(term.source) in shared:
                grad = term.of_value_and_grad(*both_of(term.source))[1]
            else:
                grad = term.grad(x, cond)  # it may have no value
            total = total + scale * grad
        return total

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        value, grad = x.new_zeros(x.shape[0]), torch.zeros_like(x)
        both_of = _once(lambda source: source.value_and_grad(x, cond))
        for scale, term in self.terms:
            v, g = term.of_value_and_grad(*both_of(term.source))
            value, grad = value + scale * v, grad + scale * g
        return value, grad

    def __str__(self) -> str:
        return " + ".join(f"{c:.3g}·{term}" for c, term in self.terms) or "0"


def _once(evaluate: Callable[[Potential], T]) -> Callable[[Potential], T]:
    """Evaluate each object once: several hinges of one reward cost one evaluation."""
    known: dict[int, T] = {}

    def remembered(source: Potential) -> T:
        if id(source) not in known:
            known[id(source)] = evaluate(source)
        return known[id(source)]

    return remembered


def combine(*parts: tuple[float, Potential]) -> Potential:
    """The linear combination of ``(coefficient, potential)`` pairs, equal terms collected.

    Equal means the same object. Terms whose coefficients cancel disappear: the difference of two
    log-densities that share an unknown part is then known, although neither of them is.
    """
    terms: list[tuple[float, Potential]] = []
    for scale, potential in parts:
        inner = potential.terms if isinstance(potential, Combination) else ((1.0, potential),)
        for factor, term in inner:
            known = next((i for i, (_, t) in enumerate(terms) if t is term), None)
            if known is None:
                terms.append((scale * factor, term))
            else:
                terms[known] = (terms[known][0] + scale * factor, term)
    # A coefficient that is rounding noise of the ones it was summed from counts as cancelled.
    largest = max((abs(s) for s, _ in parts), default=0.0)
    kept = tuple((c, term) for c, term in terms if abs(c) > 1e-12 * largest)
    return kept[0][1] if len(kept) == 1 and kept[0][0] == 1.0 else Combination(kept)


ZERO: Potential = Combination(())
"""The potential 0, which offers everything."""


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


class StepReward(Protocol):
    """A running reward f(x, t, s) earned on the step t -> s (already times the step's length)."""

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

    def value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return (s - t) * self.weight(t) * self.potential.value(x, cond)

    def grad(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        return expand_as((s - t) * self.weight(t), x) * self.potential.grad(x, cond)
