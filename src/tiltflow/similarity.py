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

from tiltflow.distances import inverse_root, median_distance, root, squared_distances
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond

CHUNK = 2**18
"""Entries of a kernel matrix that are in memory at once: what fits into a processor's cache."""

TILE = 2**8
"""Side of a square of the kernel matrix of a bank with itself."""

S = TypeVar("S", bound="Similarity")


class Similarity(abc.ABC):
    """A symmetric kernel k(x, y), (conditionally) positive definite, differentiable in x.

    A subclass writes ``_matrix`` in differentiable torch; ``_pull`` and ``_diagonal`` are slow
    where it does not write them too.
    """

    features: Features | None

    @abc.abstractmethod
    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, D), (M, D) -> (N, M)."""

    def _pull(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_j weights_j k(x, y_j), (N,), and its gradient, (N, D)."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self._matrix(leaf, y) @ weights
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    def _diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i), (N, D) -> (N,)."""
        return torch.cat([self._matrix(row, row)[0] for row in torch.split(x, 1)])

    def fitted(self: S, points: Tensor, weights: Tensor | None = None) -> S:
        """This kernel with open parameters chosen for ``points`` (N, *event) with ``weights``."""
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
    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_i, x_i) of states (N, *event) -> (N,), float64."""
        return self._diagonal(self.embed(x).double())

    @final
    def mean(self, x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights_j k(x, points_j), (N,), in pieces of bounded memory."""
        size = max(1, CHUNK // max(1, len(points)))
        y, w = self.embed(points).to(x.dtype), weights.to(x)
        return torch.cat([self._matrix(self.embed(part), y) @ w for part in torch.split(x, size)])

    @final
    def mean_and_grad(self, x: Tensor, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """``mean`` and its gradient in x, (N,) and (N, *event), in pieces of bounded memory."""
        size = max(1, CHUNK // max(1, len(points)))
        with torch.no_grad():
            y, w = self.embed(points).to(x.dtype), weights.to(x)
        values, grads = [], []
        for part in torch.split(x, size):
            with torch.no_grad():
                value, grad = self._pull(self.embed(part), y, w)
            values.append(value)
            flat = self.features is None
            grads.append(
                grad.view_as(part) if flat else self.features.pullback(part, grad)  # type: ignore[union-attr]
            )
        return torch.cat(values), torch.cat(grads)

    @final
    @torch.no_grad()
    def products(self, points: Tensor, columns: Tensor) -> Tensor:
        """K columns with K = k(points, points): (N, *event), (N, C) -> (N, C), float64.

        Half of the matrix is computed, a tile at a time: about 5 ns per entry of K and thread.
        """
        z, columns = self.embed(points).double(), columns.double().to(points.device)
        out = torch.zeros_like(columns)
        rows = [slice(i, i + TILE) for i in range(0, len(z), TILE)]
        for i, a in enumerate(rows):
            out[a] += self._matrix(z[a], z[a]) @ columns[a]
            for b in rows[i + 1 :]:
                tile = self._matrix(z[a], z[b])
                out[a] += tile @ columns[b]
                out[b] += (columns[a].T @ tile).T
        return out

    def __str__(self) -> str:
        return type(self).__name__


class _OfDistance(Similarity, abc.ABC):
    """A kernel that is a function of the squared distance in units of a length."""

    @property
    @abc.abstractmethod
    def _length(self) -> float:
        """The unit."""

    @abc.abstractmethod
    def _of(self, squared: Tensor) -> Tensor:
        """The kernel; may overwrite its argument."""

    @abc.abstractmethod
    def _slope(self, squared: Tensor, kernel: Tensor) -> Tensor:
        """Its derivative in the squared distance, finite everywhere, where it is ``kernel``."""

    @final
    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return self._of(squared_distances(x / self._length, y / self._length))

    @final
    def _diagonal(self, x: Tensor) -> Tensor:
        return self._of(x.new_zeros(len(x)))

    @final
    def _pull(self, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        h = self._length
        x, y = x / h, y / h
        squared = squared_distances(x, y)
        kernel = self._of(squared.clone())
        pull = self._slope(squared, kernel).mul_(weights)
        # sum_j pull_ij (x_i - y_j), with an origin that keeps the two terms small.
        centre = y.mean(0)
        grad = (x - centre) * pull.sum(1, keepdim=True) - pull @ (y - centre)
        return kernel @ weights, grad * (2 / h)


@dataclass(frozen=True, eq=False)
class _Radial(_OfDistance, abc.ABC):
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

    @torch.no_grad()
    def fitted(self: R, points: Tensor, weights: Tensor | None = None) -> R:
        """With the median heuristic: the median distance of two independent draws, from at most
        1000 of the points.

        Raises:
            ConfigError: if half of the pairs are alike, so that the median is zero.
        """
        if self.bandwidth is not None:
            return self
        step = math.ceil(len(points) / 1000)
        y = self.embed(points[::step]).double()
        w = torch.ones(len(y)) if weights is None else weights[::step]
        median = median_distance(y, w.double().to(y.device))
        if not median > 0:
            raise ConfigError(
                f"{type(self).__name__}: the median distance of the {len(y)} samples is {median}; "
                "they are all alike, so that no bandwidth can be guessed. Give one."
            )
        return replace(self, bandwidth=median)

    @property
    def _length(self) -> float:
        if self.bandwidth is None:
            raise ConfigError(f"{type(self).__name__}: no bandwidth yet; call fitted(points).")
        return self.bandwidth


R = TypeVar("R", bound=_Radial)


@final
@dataclass(frozen=True, eq=False)
class GaussianSimilarity(_Radial):
    """exp(-|x - y|^2 / (2 h^2)); by default h is the median distance of the samples."""

    def _of(self, squared: Tensor) -> Tensor:
        return squared.mul_(-0.5).exp_()

    def _slope(self, squared: Tensor, kernel: Tensor) -> Tensor:
        return -0.5 * kernel


@final
@dataclass(frozen=True, eq=False)
class LaplaceSimilarity(_Radial):
    """exp(-|x - y| / h); by default h is the median distance of the samples."""

    def _of(self, squared: Tensor) -> Tensor:
        return (-root(squared)).exp_()

    def _slope(self, squared: Tensor, kernel: Tensor) -> Tensor:
        return -0.5 * kernel * inverse_root(squared)


@final
@dataclass(frozen=True, eq=False)
class InverseMultiquadric(_Radial):
    """1 / sqrt(1 + |x - y|^2 / h^2): heavy tails, so that far samples still attract."""

    def _of(self, squared: Tensor) -> Tensor:
        return squared.add_(1).rsqrt_()

    def _slope(self, squared: Tensor, kernel: Tensor) -> Tensor:
        return -0.5 * kernel**3


@final
@dataclass(frozen=True, eq=False)
class NegativeDistance(_OfDistance):
    """-|x - y|, the kernel of the energy distance: no bandwidth to choose.

    Conditionally positive definite: good for differences of probability measures only.
    """

    features: Features | None = None

    @property
    def _length(self) -> float:
        return 1.0

    def _of(self, squared: Tensor) -> Tensor:
        return -root(squared)

    def _slope(self, squared: Tensor, kernel: Tensor) -> Tensor:
        return -0.5 * inverse_root(squared)


@final
@dataclass(frozen=True, eq=False)
class CosineSimilarity(Similarity):
    """Cosine of the angle between features (or states)."""

    features: Features | None = None

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize
        return unit(x, dim=1) @ unit(y, dim=1).T

    def _diagonal(self, x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=1).square().sum(1)


@final
@dataclass(frozen=True, eq=False)
class MeanEmbedding(Potential):
    """x -> sum_j weights_j k(x, points_j): the mean embedding of a weighted bank.

    Args:
        similarity: a fitted kernel.
        points: (M, *event).
        weights: (M,), of any sign.
    """

    similarity: Similarity
    points: Tensor
    weights: Tensor

    @property
    def offers(self) -> Access:
        return Access.BOTH

    @torch.no_grad()
    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.similarity.mean(x, self.points, self.weights)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[1]

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        return self.similarity.mean_and_grad(x, self.points, self.weights)

    def __str__(self) -> str:
        return f"MeanEmbedding({self.similarity})"


__all__ = [
    "CosineSimilarity",
    "GaussianSimilarity",
    "InverseMultiquadric",
    "LaplaceSimilarity",
    "MeanEmbedding",
    "NegativeDistance",
    "Similarity",
]
