"""Remembering what costly functions returned, for as long as their argument lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar, final

from torch import Tensor

from tiltflow.types import Cond

T = TypeVar("T")


@final
@dataclass(frozen=True)
class _Entry(Generic[T]):
    """A result, and what it is the result of."""

    x: weakref.ref[Tensor]
    version: int
    cond: Cond | None
    state: Hashable
    result: T

    def fits(self, x: Tensor, cond: Cond | None, state: Hashable) -> bool:
        return (
            self.x() is x
            and self.version == x._version
            and self.cond is cond
            and self.state == state
        )


@final
class Memo(Generic[T]):
    """Results on batches of states that are still alive, by identity.

    A log-ratio is asked for at one bank by the value, by the first variation and by the error of a
    divergence. In a mirror descent it also occurs in every later log-ratio: without a memory
    the cost of step k would be 2^k. A tensor that was changed in place is a new one.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Entry[T]] = {}

    def of(
        self, x: Tensor, cond: Cond | None, compute: Callable[[], T], state: Hashable = None
    ) -> T:
        """``compute()``, or what it returned last for these arguments.

        Args:
            x: the batch.
            cond: its conditions.
            compute: the function, a constant for equal ``x``, ``cond`` and ``state``.
            state: what else the result depends on, e.g. the versions of parameters.
        """
        if x.is_inference():  # such tensors do not count their changes
            return compute()
        key, known = id(x), self._known
        entry = known.get(key)
        if entry is None or not entry.fits(x, cond, state):
            forget = weakref.ref(x, lambda _: known.pop(key, None))
            entry = _Entry(forget, x._version, cond, state, compute())
            known[key] = entry
        return entry.result


__all__ = ["Memo"]
