"""Where x lives: a linear subspace, given by its orthogonal projection."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError, ShapeError
from tiltflow.types import Cond, flat_inner


class Space(abc.ABC):
    """A linear subspace of R^event; white noise stays white on its image.

    The projector applies to prior noise, Brownian increments, predictions and adjoints. Densities
    and KLs are then those of the subspace.
    """

    event: tuple[int, ...]

    def shape(self, count: int, cond: Cond | None = None) -> tuple[int, ...]:
        """Shape of a batch of ``count`` states."""
        return (count, *self.event)

    @abc.abstractmethod
    def project(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """Orthogonal projection, (B, *event) -> (B, *event)."""

    @abc.abstractmethod
    def dimension(self, count: int, cond: Cond | None = None) -> Tensor:
        """Dimension of the subspace for each of ``count`` samples, (B,)."""

    @final
    def noise(
        self,
        count: int,
        generator: torch.Generator,
        cond: Cond | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """White noise on the subspace, (count, *event), on the device of ``generator``."""
        z = torch.randn(
            self.shape(count, cond), generator=generator, device=generator.device, dtype=dtype
        )
        return self.project(z, cond)

    @final
    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product of each sample, (B,)."""
        return flat_inner(a, b)

    @final
    def check(self, x: Tensor, name: str = "x") -> None:
        """Raise ``ShapeError`` unless ``x`` is a batch of states of this space."""
        expected = len(self.event) + 1
        variable = not isinstance(self, Euclidean)
        if x.ndim != expected or (not variable and tuple(x.shape[1:]) != self.event):
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}, but the state space is (batch, "
                f"{', '.join(map(str, self.event))}). Check the model's `space`."
            )


@final
@dataclass(frozen=True)
class Euclidean(Space):
    """All of R^event.

    Args:
        event: shape of one state, e.g. ``(2,)`` or ``(1, 28, 28)``.
    """

    event: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "event", _event(self.event))

    def project(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return x

    def dimension(self, count: int, cond: Cond | None = None) -> Tensor:
        return torch.full((count,), math.prod(self.event))


@final
@dataclass(frozen=True)
class Masked(Space):
    """States of N rows of which only some exist, e.g. molecules padded to the largest.

    ``cond[key]`` is a 0/1 tensor (B, N); rows with 0 are zero. N is read from the mask, so that
    batches may be padded to their own largest member.
    """

    event: tuple[int, ...]
    key: str = "mask"

    def __post_init__(self) -> None:
        object.__setattr__(self, "event", _event(self.event))

    def shape(self, count: int, cond: Cond | None = None) -> tuple[int, ...]:
        return (count, _mask(cond, self.key, count).shape[1], *self.event[1:])

    def project(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return x * _rows(cond, self.key, x)

    def dimension(self, count: int, cond: Cond | None = None) -> Tensor:
        return _mask(cond, self.key, count).sum(1).long() * math.prod(self.event[1:])


@final
@dataclass(frozen=True)
class ZeroMean(Space):
    """States whose mean over the axes ``over`` vanishes: zero centre of mass, or zero brightness.

    Args:
        event: shape of one state.
        over: axes of the event over which the mean is taken; ``(0,)`` for atoms x coordinates,
            ``(0, 1, 2)`` for the pixels of an image.
        columns: only the first ``columns`` entries of the last axis are centred (3 for molecules
            that carry features beside positions); ``None`` means all.
        key: name of a 0/1 mask (B, N) over the first axis in the conditions, or ``None``.
    """

    event: tuple[int, ...]
    over: tuple[int, ...] = (0,)
    columns: int | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "event", _event(self.event))
        object.__setattr__(self, "over", tuple(self.over))
        if not self.over or any(a not in range(len(self.event)) for a in self.over):
            raise ConfigError(
                f"ZeroMean: over={self.over} must name axes of the event {self.event}."
            )
        if self.columns is not None and len(self.event) - 1 in self.over:
            raise ConfigError("ZeroMean: `columns` needs the last axis not to be averaged over.")

    def shape(self, count: int, cond: Cond | None = None) -> tuple[int, ...]:
        if self.key is None:
            return (count, *self.event)
        return (count, _mask(cond, self.key, count).shape[1], *self.event[1:])

    def project(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        axes = tuple(a + 1 for a in self.over)
        if self.key is None:
            mean = x.mean(axes, keepdim=True)
            centred = x - mean
        else:
            rows = _rows(cond, self.key, x)
            x = x * rows
            total = rows.expand_as(x).sum(axes, keepdim=True).clamp(min=1)
            centred = (x - x.sum(axes, keepdim=True) / total) * rows
        if self.columns is None:
            return centred
        return torch.cat([centred[..., : self.columns], x[..., self.columns :]], dim=-1)

    def dimension(self, count: int, cond: Cond | None = None) -> Tensor:
        columns = self.event[-1] if self.columns is None else self.columns
        kept = [n for a, n in enumerate(self.event) if a not in self.over]
        lost = math.prod(kept)
        if self.columns is not None:
            lost = lost // self.event[-1] * columns
        rows = (
            torch.full((count,), self.event[0])
            if self.key is None
            else _mask(cond, self.key, count).sum(1).long()
        )
        return rows * math.prod(self.event[1:]) - lost


def _event(event: tuple[int, ...]) -> tuple[int, ...]:
    event = tuple(int(n) for n in event)
    if not event or any(n < 1 for n in event):
        raise ConfigError(f"A state space needs a shape of positive integers, got {event}.")
    return event


def _mask(cond: Cond | None, key: str, count: int) -> Tensor:
    mask = None if cond is None else cond.get(key)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != count:
        raise ShapeError(
            f"The state space needs conditions with a 0/1 tensor '{key}' of shape ({count}, N); "
            "pass cond={...} or set `conditions`."
        )
    return mask


def _rows(cond: Cond | None, key: str, x: Tensor) -> Tensor:
    mask = _mask(cond, key, x.shape[0]).to(x)
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))
