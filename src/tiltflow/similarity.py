"""Similarities: positive definite kernels k(x, y), for MMD, energy distance and diversity.

(`kernel.py` is about Gaussian steps in time; these are the kernels of Hilbert spaces.)
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor

from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.potential import Reward
from tiltflow.types import Cond

CHUNK = 2**22
"""Entries of a kernel matrix that are in memory at once."""

S = TypeVar("S", bound="Similarity")


class Similarity(abc.ABC):
    """A symmetric kernel k(x, y), (conditionally) positive definite, differentiable in x."""

    features: Features | None

    @abc.abstractmethod
    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, D), (M, D) -> (N, M)."""

    def fitted(self: S, points: Tensor) -> S:
        """This kernel with open parameters chosen for ``points`` (N, *event)."""
        return self

    @final
    def embed(self, x: Tensor) -> Tensor:
        """What is compared, features or the state itself: (N, *event) -> (N, D)."""
        return x.flatten(1) if self.features is None else self.features.value(x)

    @final
    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """Kernel matrix of states, (N, *event), (M, *event) -> (N, M)."""
        return self._matrix(self.embed(x), self.embed(y).to(x.dtype))

    @final
    def mean(self, x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights_j k(x, points_j), (N,), in pieces of bounded memory."""
        size = max(1, CHUNK // max(1, len(points)))
        y, w = self.embed(points).to(x.dtype), weights.to(x)
        return torch.cat([self._matrix(self.embed(part), y) @ w for part in torch.split(x, size)])

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, eq=False)
class _Radial(Similarity, abc.ABC):
    """A kernel of the distance over a bandwidth.

    Args:
        bandwidth: a length > 0; by default the median distance of the points it is fitted to.
        features: what is compared; the state itself by default.
    """

    bandwidth: float | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        h = self.bandwidth
        if h is not None and not (math.isfinite(h) and h > 0):
            raise ConfigError(
                f"{type(self).__name__}: bandwidth={h!r} must be a positive length; leave it out "
                "for the median distance of the samples."
            )

    def fitted(self: R, points: Tensor) -> R:
        """With the median heuristic: the median distance among 1000 of the points."""
        if self.bandwidth is not None:
            return self
        y = self.embed(points)
        y = y[:: math.ceil(len(y) / 1000)].double()
        median = float(torch.pdist(y).median()) if len(y) > 1 else 0.0
        if not median > 0:
            raise ConfigError(
                f"{type(self).__name__}: the median distance of the {len(y)} samples is {median}; "
                "they are all alike, so that no bandwidth can be guessed. Give one."
            )
        return replace(self, bandwidth=median)

    @final
    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        if self.bandwidth is None:
            raise ConfigError(f"{type(self).__name__}: no bandwidth yet; call fitted(points).")
        return self._of(_squared(x, y) / self.bandwidth**2)

    @abc.abstractmethod
    def _of(self, squared: Tensor) -> Tensor:
        """The kernel from squared distances in units of the bandwidth."""


R = TypeVar("R", bound=_Radial)


@final
@dataclass(frozen=True, eq=False)
class GaussianSimilarity(_Radial):
    """exp(-|x - y|^2 / (2 h^2)); by default h is the median distance of the samples."""

    def _of(self, squared: Tensor) -> Tensor:
        return (-0.5 * squared).exp()


@final
@dataclass(frozen=True, eq=False)
class LaplaceSimilarity(_Radial):
    """exp(-|x - y| / h); by default h is the median distance of the samples."""

    def _of(self, squared: Tensor) -> Tensor:
        return (-_root(squared)).exp()


@final
@dataclass(frozen=True, eq=False)
class InverseMultiquadric(_Radial):
    """1 / sqrt(1 + |x - y|^2 / h^2): heavy tails, so that far samples still attract."""

    def _of(self, squared: Tensor) -> Tensor:
        return (1 + squared).rsqrt()


@final
@dataclass(frozen=True, eq=False)
class NegativeDistance(Similarity):
    """-|x - y|, the kernel of the energy distance: no bandwidth to choose.

    Conditionally positive definite: good for differences of probability measures only.
    """

    features: Features | None = None

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return -_root(_squared(x, y))


@final
@dataclass(frozen=True, eq=False)
class CosineSimilarity(Similarity):
    """Cosine of the angle between features (or states)."""

    features: Features | None = None

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize
        return unit(x, dim=1) @ unit(y, dim=1).T


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances, (N, M), without the cancellation of |x|^2 + |y|^2 - 2 xy."""
    if x.shape[1] <= 16:
        total = x.new_zeros(len(x), len(y))
        for a, b in zip(x.unbind(1), y.unbind(1), strict=True):
            total = total + (a[:, None] - b[None, :]) ** 2
        return total
    centre = y.mean(0)
    x, y = x - centre, y - centre
    cross = x @ y.T
    return ((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * cross).clamp(min=0)


def _root(squared: Tensor) -> Tensor:
    """Square root whose derivative at 0 is taken as 0."""
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


@final
@dataclass(frozen=True, eq=False)
class MeanEmbedding(Reward):
    """x -> sum_j weights_j k(x, points_j): the mean embedding of a weighted bank.

    Args:
        similarity: a fitted kernel.
        points: (M, *event).
        weights: (M,), of any sign.
    """

    similarity: Similarity
    points: Tensor
    weights: Tensor

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.similarity.mean(x, self.points, self.weights)


__all__ = [
    "CosineSimilarity",
    "GaussianSimilarity",
    "InverseMultiquadric",
    "LaplaceSimilarity",
    "MeanEmbedding",
    "NegativeDistance",
    "Similarity",
]
