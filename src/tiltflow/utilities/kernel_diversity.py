"""How many different things there are: entropies of a similarity's covariance operator."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from tiltflow.density import Bank, Density
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.features import Features
from tiltflow.functional import Curvature, Functional, error_of, influence, per_density
from tiltflow.potential import Potential
from tiltflow.similarity import MeanEmbedding, NegativeDistance, Similarity
from tiltflow.types import Access, Cond, Estimate
from tiltflow.utilities.design import QuadraticForm

MOST_CANDIDATES = 2000
"""Points of the bank among which landmarks are chosen; their kernel matrix is in memory."""

RESIDUAL = 1e-6
"""Part of k(x, x) = 1 that landmarks may leave unexplained at a candidate."""

LOOSE = 0.1
"""A warning is due where the landmarks may raise the entropy by so many nats."""


@final
@dataclass(frozen=True, eq=False)
class LandmarkFeatures(Features):
    """phi(x) = C^-1 k(Z, x) with k(Z, Z) = C C^T: phi(x) . phi(y) = k(x, y) where x or y is in
    the span of the landmarks Z, and |phi(x)|^2 < k(x, x) elsewhere (Nystroem's method).

    Args:
        similarity: k, fitted.
        landmarks: Z, (m, *event).
        factor: C, (m, m), lower triangular.
    """

    similarity: Similarity
    landmarks: Tensor
    factor: Tensor

    @staticmethod
    def of(similarity: Similarity, points: Tensor, most: int) -> LandmarkFeatures:
        """At most ``most`` landmarks among ``points`` (N, *event), each the point that those
        before it explain worst (Cholesky's factorisation with pivots)."""
        matrix = similarity.matrix(points, points).double()
        # Single-precision kernels have residuals that are rounding.
        tolerance = max(RESIDUAL, 100 * torch.finfo(points.dtype).eps)
        residual = matrix.diagonal().clone()
        columns, chosen = matrix.new_zeros(len(matrix), min(most, len(matrix))), []
        for j in range(columns.shape[1]):
            pivot = int(residual.argmax())
            if residual[pivot] <= tolerance:
                break
            known = columns[:, :j] @ columns[pivot, :j]
            columns[:, j] = (matrix[:, pivot] - known) / residual[pivot].sqrt()
            residual = residual - columns[:, j] ** 2
            residual[pivot] = 0.0
            chosen.append(pivot)
        index = torch.tensor(chosen, device=points.device)
        return LandmarkFeatures(similarity, points[index], columns[index, : len(chosen)].tril())

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        kernel = self.similarity.matrix(x, self.landmarks).to(self.factor)
        solved: Tensor = torch.linalg.solve_triangular(self.factor, kernel.T, upper=False)
        return solved.T


@final
@dataclass(frozen=True, eq=False)
class KernelDiversity(Functional):
    """Log of the Vendi score: the logarithm of the number of different things among samples.

    ``order=1``, with rho = E_p k_X k_X^T the covariance operator of the kernel, its eigenvalues
    l_i >= 0 of sum one, and e the ridge::

        F[p] = log(1 / e) - 1 - sum_i [(l_i + e) log(1 + l_i / e) - l_i]
        delta F(x) = -<k_x, log(1 + rho / e) k_x>

    For e -> 0 this is the von Neumann entropy -sum l_i log l_i, the log of the Vendi score
    (Friedman and Dieng, 2023; methods, section 1.12). The ridge keeps the reward of what p has not
    got finite, at log(1 / e), and F exactly consistent with it; it lowers F by about
    e log(1 / e) per eigenvalue. Concave in p. rho is compressed to the span of at most
    ``num_landmarks`` points of the bank, which are chosen whatever their weights are. This raises
    F by up to about log(1 / e) times the part of E k(X, X) that they leave unexplained, and warns
    where that matters. The plug-in value is low by a term of order 1 / N.

    ``order=2``, the Vendi score of order 2, needs no landmarks::

        F[p] = -log E_p k(X, X'),  X, X' independent      delta F(x) = -2 E_p k(x, X) / E_p k

    It is neither concave nor convex in p, but quasi-concave: without a divergence it has no local
    maxima beside the global ones. Samples are not compared with themselves.

    The kernel is part of the functional and must not move with p, so that its bandwidth is given:
    the median heuristic is ``similarity.fitted(samples)``, of samples of the pre-trained model.

    Args:
        similarity: k, positive definite with k(x, x) = 1, and fitted.
        order: 1 or 2.
        ridge: e, between 0 and 1; order 1 only.
        num_landmarks: at most this many; order 1 only.
    """

    similarity: Similarity
    order: Literal[1, 2] = 1
    ridge: float = 1e-6
    num_landmarks: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.similarity, NegativeDistance):
            raise ConfigError(
                "KernelDiversity: NegativeDistance is not positive definite; use a kernel with "
                "k(x, x) = 1, such as GaussianSimilarity or CosineSimilarity."
            )
        if getattr(self.similarity, "bandwidth", 1.0) is None:
            raise ConfigError(
                f"KernelDiversity: {self.similarity} has no bandwidth yet. It must not depend on "
                "the density: give a length, or write similarity.fitted(samples) with samples of "
                "the pre-trained model for their median distance."
            )
        if self.order not in (1, 2):
            raise ConfigError(f"KernelDiversity: order={self.order!r} must be 1 or 2.")
        if not 0 < self.ridge < 1 or self.num_landmarks < 1:
            raise ConfigError(
                f"KernelDiversity: ridge={self.ridge!r} must lie between 0 and 1, and "
                f"num_landmarks={self.num_landmarks!r} must be positive."
            )

    @property
    def curvature(self) -> Curvature:
        return "concave" if self.order == 1 else "neither"

    def offers(self, log: Access) -> Access:
        return Access.BOTH

    def value(self, p: Density) -> Estimate:
        """With the error of the influence function (of first order in 1/sqrt(N)).

        Raises:
            ConfigError: if k(x, x) is not 1.
            UnsupportedError: order 2, if the mean similarity of the samples is not positive.

        Warns:
            UserWarning: order 1, if the landmarks leave too much unexplained.
        """
        if self.order == 2:
            mean, each = self._pairs(p)
            value, values = -math.log(mean), -2 * each / mean
        else:
            spectrum, e = self._operator(p)[1], self.ridge
            shrunk = (spectrum + e) * torch.log1p(spectrum / e) - spectrum
            value = math.log(1 / e) - 1 - float(shrunk.sum())
            values = influence(self.first_variation(p), p)
        return Estimate(value, error_of(values, p), 0 if p.bank.exact else len(values))

    def first_variation(self, p: Density) -> Potential:
        """Minus how well x is covered; raises and warns like ``value``."""
        if self.order == 2:
            bank = p.bank
            return (-2 / self._pairs(p)[0]) * MeanEmbedding(
                self.similarity, bank.points, bank.weights
            )
        features, spectrum, vectors = self._operator(p)
        scaled = vectors * torch.log1p(spectrum / self.ridge)
        return QuadraticForm(features, -scaled @ vectors.T)

    @per_density
    def _operator(self, p: Density) -> tuple[LandmarkFeatures, Tensor, Tensor]:
        """Features of the landmarks, and the eigenvalues and eigenvectors of E phi phi^T."""
        bank, similarity = p.bank, self.similarity
        self._require_unit_diagonal(bank)
        step = math.ceil(len(bank.points) / MOST_CANDIDATES)
        with torch.no_grad():
            features = LandmarkFeatures.of(similarity, bank.points[::step], self.num_landmarks)
            phi = features.value(bank.points, bank.cond)
        spectrum, vectors = torch.linalg.eigh((phi.T * bank.weights.to(phi)) @ phi)
        spectrum = spectrum.clamp(min=0)
        missing = 1 - float(spectrum.sum())
        if missing * math.log(1 / self.ridge) > LOOSE:
            warnings.warn(
                f"KernelDiversity: {len(features.landmarks)} landmarks leave {missing:.1%} of the "
                f"kernel unexplained, so that the entropy may be too high by up to "
                f"{missing * math.log(1 / self.ridge):.2f}. Raise num_landmarks, the ridge or the "
                "bandwidth, or use order=2.",
                stacklevel=4,  # the caller of value or first_variation
            )
        return features, spectrum, vectors

    @per_density
    def _pairs(self, p: Density) -> tuple[float, Tensor]:
        """E k(X, X'), and E k(x_i, X') at the points of the bank, (N,), X' another one."""
        bank = p.bank
        self._require_unit_diagonal(bank)
        weights = bank.weights.double().to(bank.points.device)
        each = self.similarity.products(bank.points, weights[:, None])[:, 0]
        if not bank.exact:  # k(x, x) = 1 is no news
            each = (each - weights) / (1 - weights).clamp(min=1e-12)
            weights = weights * (1 - weights)
        mean = float((weights * each).sum() / weights.sum())
        if not mean > 0:
            raise UnsupportedError(
                f"{self}: the mean similarity of two of the {len(each)} samples is {mean:.3g}, "
                "which has no logarithm. Draw more samples, or use order=1."
            )
        return mean, each

    def _require_unit_diagonal(self, bank: Bank) -> None:
        with torch.no_grad():
            off = float((self.similarity.diagonal(bank.points[:64]) - 1).abs().max())
        if not off < 1e-4:
            raise ConfigError(
                f"KernelDiversity: k(x, x) of {self.similarity} is off 1 by {off:.3g}; a score of "
                "diversity needs a normalised kernel, and states (or features) that are not zero "
                "for CosineSimilarity."
            )

    def __str__(self) -> str:
        return f"KernelDiversity({self.similarity}, order={self.order})"


__all__ = ["KernelDiversity", "LandmarkFeatures"]
