"""Potentials: functions of a state that something is to be raised by, known up to a constant."""

from __future__ import annotations

import abc
import functools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar, final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, NonFiniteError, ShapeError
from tiltflow.types import Access, Cond

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
    sums: deque[tuple[Combination, Tensor]] = field(default_factory=lambda: deque(maxlen=16))
    """Of the last combinations: a sum of steps grows by a term at a time."""

    def value(self, potential: Potential, cond: Cond | None) -> Tensor:
        if id(potential) not in self.known:
            self.known[id(potential)] = potential, potential._valued(self.points, cond)
        return self.known[id(potential)][1]

    def begun(self, whole: Combination) -> tuple[int, Tensor | None]:
        """How many of the first terms have been summed before, and their sum."""
        fitting = (
            (len(old.key), total)
            for old, total in self.sums
            if whole.key[: len(old.key)] == old.key
        )
        return max(fitting, key=lambda known: known[0], default=(0, None))


_MEMORY: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering(points: Tensor) -> Iterator[None]:
    """Within this block, no potential is evaluated twice at ``points`` (this very tensor).

    For loops on a bank: a reward that takes minutes is then paid once. Conditions must be the
    same throughout, as those of a bank are. An inner block on the same points joins the outer one.
    """
    outer = _MEMORY.get()
    joined = outer is not None and outer.points is points
    token = _MEMORY.set(outer if joined else _Memory(points))
    try:
        yield
    finally:
        _MEMORY.reset(token)


@final
@dataclass(frozen=True, eq=False)
class Combination(Potential):
    """sum_i c_i phi_i; offers what all of its terms offer. Built by ``combine``."""

    terms: tuple[tuple[float, Potential], ...]

    @functools.cached_property
    def key(self) -> tuple[tuple[float, int], ...]:
        """Coefficients and identities of the terms."""
        return tuple((c, id(term)) for c, term in self.terms)

    @property
    def offers(self) -> Access:
        return self._offers

    @functools.cached_property
    def _offers(self) -> Access:
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
        memory, value_of = _MEMORY.get(), _once(lambda source: source.value(x, cond))
        if memory is not None and x is not memory.points:
            memory = None
        done, known = (0, None) if memory is None else memory.begun(self)
        total = x.new_zeros(x.shape[0]) if known is None else known
        for scale, term in self.terms[done:]:
            total = total + scale * term.of_value(value_of(term.source))
        if memory is not None:
            memory.sums.append((self, total))
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
    terms: dict[int, tuple[float, Potential]] = {}
    for scale, potential in parts:
        inner = potential.terms if isinstance(potential, Combination) else ((1.0, potential),)
        for factor, term in inner:
            before = terms.get(id(term), (0.0, term))[0]
            terms[id(term)] = (before + scale * factor, term)
    # A coefficient that is rounding noise of the ones it was summed from counts as cancelled.
    largest = max((abs(s) for s, _ in parts), default=0.0)
    kept = tuple((c, term) for c, term in terms.values() if abs(c) > 1e-12 * largest)
    return kept[0][1] if len(kept) == 1 and kept[0][0] == 1.0 else Combination(kept)


ZERO: Potential = Combination(())
"""The potential 0, which offers everything."""
