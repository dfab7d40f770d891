"""Small types shared by all layers."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tiltflow.seed import Seed

Cond: TypeAlias = Mapping[str, Tensor | Sequence[str]]
"""Conditions of a batch; every entry has leading length B."""


class Access(enum.Flag):
    """Which sides of a function can be computed: its value, its gradient, both or neither."""

    NONE = 0
    VALUE = enum.auto()
    GRAD = enum.auto()
    BOTH = VALUE | GRAD

    def __str__(self) -> str:
        names = [m.name for m in (Access.VALUE, Access.GRAD) if m in self and m.name]
        return " and ".join(names) or "nothing"


class Conditions(Protocol):
    """A law of conditions, for conditional models."""

    def draw(self, count: int, seed: Seed) -> Cond:
        """Return the conditions of ``count`` samples."""
        ...


def drawn_cond(conditions: Conditions | None, count: int, seed: Seed) -> Cond | None:
    """The conditions of ``count`` samples; ``None`` for models that take none."""
    return None if conditions is None else conditions.draw(count, seed.child("cond"))


@final
@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the number of samples behind it.

    Exact numbers (quadrature, closed forms) have ``standard_error = 0`` and ``count = 0``.
    """

    value: float
    standard_error: float = 0.0
    count: int = 0

    @staticmethod
    def of(values: Tensor, weights: Tensor | None = None) -> Estimate:
        """Mean of ``values`` (N,) under ``weights`` (N,) that sum to one, with its standard error.

        The error of a self-normalised weighted mean is ``sqrt(sum w_i^2 (f_i - mean)^2)``.
        """
        f = values.detach().double()
        n = f.numel()
        if weights is None:
            error = f.std().item() / math.sqrt(n) if n > 1 else math.inf
            return Estimate(f.mean().item(), error, n)
        w = weights.detach().double().to(f.device)
        mean = (w * f).sum()
        error = ((w * (f - mean)) ** 2).sum().sqrt().item()
        return Estimate(mean.item(), error, n)

    def __str__(self) -> str:
        if self.count == 0 and self.standard_error == 0.0:
            return f"{self.value:.6g}"
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


def expand_as(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append axes to ``coefficient`` until it broadcasts against ``x``, whose first axes it has:
    () or (B,) for x (B, *event), (K,) or (K, B) for x (K, B, *event)."""
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def index_cond(cond: Cond | None, index: Tensor) -> Cond | None:
    """The conditions of the samples at ``index`` (M,)."""
    if cond is None:
        return None
    where = index.tolist()
    return {
        key: entry[index.to(entry.device)]
        if isinstance(entry, Tensor)
        else [entry[i] for i in where]
        for key, entry in cond.items()
    }


def cond_to(cond: Cond | None, device: torch.device | str) -> Cond | None:
    """The same conditions on a device."""
    if cond is None:
        return None
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in cond.items()}


def joined_cond(parts: Sequence[Cond]) -> Cond:
    """The conditions of several batches, one after another; keys of the first."""

    def along(key: str) -> Tensor | list[str]:
        entries = [part[key] for part in parts]
        if isinstance(entries[0], Tensor):
            return torch.cat([torch.as_tensor(e) for e in entries])
        return [text for e in entries for text in e]

    return {key: along(key) for key in parts[0]}


def flat_inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, (B, *event) x (B, *event) -> (B,)."""
    return (a * b).reshape(a.shape[0], -1).sum(1)


def as_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times ``t``, a number or (B,), as a tensor (B,) on the device and in the dtype of ``x``."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.expand(x.shape[0]) if t.ndim == 0 else t
