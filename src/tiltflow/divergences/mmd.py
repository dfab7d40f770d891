"""Kernel distances: maximum mean discrepancy and energy distance; samples are all they need."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Density
from tiltflow.divergences.two_banks import TwoBanks
from tiltflow.errors import ConfigError
from tiltflow.features import Features
from tiltflow.functional import Curvature, Functional, per_density
from tiltflow.potential import ZERO, Potential
from tiltflow.similarity import GaussianSimilarity, MeanEmbedding, NegativeDistance, Similarity
from tiltflow.types import Access, Estimate

PAIRED_SAMPLES = 1000
"""Points behind the second-order part of a standard error."""


@final
@dataclass(frozen=True)
class _Squared:
    """MMD^2 of two banks: unbiased with its standard error, and of the banks as they are."""

    unbiased: float
    standard_error: float
    plug_in: float


@dataclass(frozen=True, eq=False)
class _KernelDistance(Functional, abc.ABC):
    """What MMD and energy distance share: everything but the kernel."""

    prior: Density

    @property
    @abc.abstractmethod
    def kernel(self) -> Similarity:
        """k, fitted."""

    @property
    def curvature(self) -> Curvature:
        return "convex"

    @property
    def priors(self) -> tuple[Density, ...]:
        return (self.prior,)

    @final
    def offers(self, log: Access) -> Access:
        return Access.BOTH

    @final
    def _together(self, p: Density) -> TwoBanks:
        return TwoBanks.of(p.bank, self.prior.bank, type(self).__name__)

    @final
    def _witness(self, p: Density, scale: float) -> Potential:
        """scale (mu_p - mu_q)."""
        banks = self._together(p)
        return MeanEmbedding(self.kernel, banks.points, scale * banks.difference)

    @final
    @per_density
    def _squared(self, p: Density) -> _Squared:
        banks, kernel = self._together(p), self.kernel
        products = kernel.products(banks.points, torch.stack([banks.p, banks.q], 1))
        of_p, of_q = products.unbind(1)
        plug_in = max(float(banks.difference @ (of_p - of_q)), 0.0)
        diagonal = kernel.diagonal(banks.points).to(of_p)
        variance = _variance(banks, kernel, of_p, of_q, diagonal)
        if banks.exact_p and banks.exact_q:
            return _Squared(plug_in, 0.0, plug_in)
        inner = functools.partial(_mean_of_pairs, diagonal=diagonal, user=str(self))
        unbiased = (
            inner(banks.p, banks.p, of_p, banks.exact_p)
            + inner(banks.q, banks.q, of_q, banks.exact_q)
            - 2 * inner(banks.p, banks.q, of_q, banks.exact_p or banks.exact_q)
        )
        return _Squared(unbiased, math.sqrt(variance), plug_in)


def _mean_of_pairs(
    w: Tensor, v: Tensor, products: Tensor, exact: bool, *, diagonal: Tensor, user: str
) -> float:
    """E k(X, Y) from weights of X and Y and ``products`` K v, over pairs of different points.

    sum_{i != j} w_i v_j k_ij / (1 - sum w_i v_i): a sample is not compared with itself, unless it
    is a quadrature node.
    """
    total = float(w @ products)
    if exact:
        return total
    alike = float(w @ v)
    if alike > 1 - 1e-9:
        raise ConfigError(
            f"{user} compares pairs of samples, but one sample has all the weight of its bank. "
            "Draw more samples, or tilt less."
        )
    return (total - float((w * v) @ diagonal)) / (1 - alike)


def _variance(
    banks: TwoBanks, kernel: Similarity, of_p: Tensor, of_q: Tensor, diagonal: Tensor
) -> float:
    """Variance of the unbiased MMD^2, also where p = q.

    The influence function 2 (mu_p - mu_q) gives the variance A of first order. It is measured
    with an error: A is too large by 2 S on average, where S is the variance of second order (that
    of the degenerate part in Hoeffding's decomposition). A - S is therefore right for A >> S, and
    for p = q, where the influence vanishes, A = 2 S and the variance is S.
    """
    noise = banks.noise
    if not bool(noise.any()):
        return 0.0

    def without_itself(products: Tensor, weights: Tensor, exact: bool) -> Tensor:
        if exact:
            return products
        return (products - weights * diagonal) / (1 - weights).clamp(min=1e-9)

    influence = 2 * without_itself(of_p, banks.p, banks.exact_p)
    influence = influence - 2 * without_itself(of_q, banks.q, banks.exact_q)
    first = banks.error(influence, -influence) ** 2
    second = _second_order(banks, kernel, (of_p + of_q) / 2)
    return max(first - second, second)


def _second_order(banks: TwoBanks, kernel: Similarity, embedding: Tensor) -> float:
    """2 sum_{i != j} e_i^2 e_j^2 kc_ij^2 with e the noise weights and kc the centred kernel."""
    squares, mean = banks.noise.square(), (banks.p + banks.q) / 2
    step = math.ceil(len(squares) / PAIRED_SAMPLES)
    part, shift = squares[::step], embedding[::step]
    total = float(part.sum())
    alike = float(part.square().sum()) / total**2 if total > 0 else 1.0
    if alike > 1 - 1e-9:
        return 0.0
    with torch.no_grad():
        matrix = kernel.matrix(banks.points[::step], banks.points[::step]).double()
    centred = matrix - shift[:, None] - shift + mean @ embedding
    centred.fill_diagonal_(0)
    spread = float(part @ centred.square() @ part) / total**2 / (1 - alike)
    return 2 * float(squares.sum()) ** 2 * spread


@final
@dataclass(frozen=True, eq=False)
class MMD(_KernelDistance):
    """Maximum mean discrepancy: the largest difference of means over functions of unit norm::

        MMD^2[p] = E k(X, X') + E k(Y, Y') - 2 E k(X, Y)     delta MMD^2 = 2 (mu_p - mu_q)
        MMD[p]   = |mu_p - mu_q|                             delta MMD   = (mu_p - mu_q) / MMD

    with X ~ p, Y ~ q, q the prior and mu_p(x) = E k(x, X) (Gretton et al., 2012; methods, section
    3.3). Both are convex in p. Their first variations have values and gradients whatever is known
    of the densities; they vanish at p = q.

    Samples are not compared with themselves, so that MMD^2 has no bias and may be negative near
    p = q; nodes of a grid are. The first variation is that of the banks as they are. The standard
    error counts the noise of both banks. It remains right near p = q, where that noise is of
    order 1/N and not normal. The root is biased near p = q, where it is less than its error.
    Two banks of 10 000 samples take a second or two.

    Args:
        prior: q; its bank is used.
        similarity: the kernel. An open bandwidth is the median distance of the prior's samples,
            fixed once: it does not move with p.
        squared: MMD^2, or MMD itself.
    """

    similarity: Similarity = field(default_factory=GaussianSimilarity)
    squared: bool = True

    @functools.cached_property
    def kernel(self) -> Similarity:
        bank = self.prior.bank
        return self.similarity.fitted(bank.points, bank.weights)

    def value(self, p: Density) -> Estimate:
        """MMD^2, or its root (0 where MMD^2 is negative), with standard error.

        Raises:
            ConfigError: if one sample has all the weight of its bank, or no bandwidth can be
                guessed.
            ShapeError: if states of p and of the prior have different shapes.
        """
        out = self._squared(p)
        count = 0 if p.bank.exact else len(p.bank.points)
        if self.squared:
            return Estimate(out.unbiased, out.standard_error, count)
        square, error = max(out.unbiased, 0.0), out.standard_error
        root = math.sqrt(square)
        # sqrt(D + e) - sqrt(D): e / (2 sqrt D) far from zero, and finite at zero.
        scale = math.sqrt(square + error) + root
        return Estimate(root, error / scale if scale > 0 else 0.0, count)

    def first_variation(self, p: Density) -> Potential:
        if self.squared:
            return self._witness(p, 2.0)
        root = math.sqrt(self._squared(p).plug_in)
        return self._witness(p, 1 / root) if root > 1e-9 else ZERO

    def __str__(self) -> str:
        return f"MMD({type(self.prior).__name__}, {self.similarity})"


@final
@dataclass(frozen=True, eq=False)
class EnergyDistance(_KernelDistance):
    """How much farther strangers are than relatives: MMD^2 with k = -|x - y|, no bandwidth::

        D[p] = 2 E|X - Y| - E|X - X'| - E|Y - Y'|       delta D(x) = 2 (E|x - Y| - E|x - X|)

    with X ~ p, Y ~ q, q the prior; in one dimension 2 int (F_p - F_q)^2 (Szekely and Rizzo, 2013).
    In units of the distance; far samples attract as strongly as near ones. Values, errors and
    costs are those of ``MMD``.

    Args:
        prior: q; its bank is used.
        features: distances are between features, or between states by default.
    """

    features: Features | None = None

    @property
    def kernel(self) -> Similarity:
        return NegativeDistance(self.features)

    def value(self, p: Density) -> Estimate:
        """Unbiased, with standard error; raises like ``MMD.value``."""
        out = self._squared(p)
        count = 0 if p.bank.exact else len(p.bank.points)
        return Estimate(out.unbiased, out.standard_error, count)

    def first_variation(self, p: Density) -> Potential:
        return self._witness(p, 2.0)

    def __str__(self) -> str:
        return f"EnergyDistance({type(self.prior).__name__})"


__all__ = ["MMD", "EnergyDistance"]
