"""What divergences made of the density ratio share: value, error, first variation."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from tiltflow.density import Bank, Density
from tiltflow.divergences.two_banks import same_points
from tiltflow.errors import CapabilityError, NonFiniteError
from tiltflow.functional import Functional, FutureDensity, Promise, per_density
from tiltflow.potential import OfReward, Potential, offers_through_values
from tiltflow.ratio import LogRatio, RatioEstimator
from tiltflow.ratio.estimator import OVERLAP
from tiltflow.types import Access, Estimate

Shape: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""T (N,) -> (f(T), f'(T)), both (N,)."""

NOTHING = torch.zeros((), dtype=torch.float64)
"""The influence of a bank that is not averaged over."""


class OfRatio(Functional, abc.ABC):
    """A divergence D[p] = h(E_p a(T), E_prior b(T)) of the log-ratio T = log p / prior.

    A subclass says which side (or both) is averaged, and gives the shape of the first variation.
    Both sides have the same mean in theory; in samples their variances differ, often by orders of
    magnitude, and a subclass takes the better one, by its second moment and not by the measured
    error: an average that has not seen its rare large terms reports a small one.

    Attributes:
        prior: the density to compare with.
        ratio: how T is known; the difference of the two logs by default.
    """

    prior: Density
    ratio: RatioEstimator

    @property
    def priors(self) -> tuple[Density, ...]:
        return (self.prior,)

    @property
    def samples_needed(self) -> int:
        return self.ratio.samples_needed

    def offers(self, log: Access) -> Access:
        return self.offers_at(FutureDensity(Promise(log)))

    def offers_at(self, p: Density) -> Access:
        return self._through(self.ratio.offers(p, self.prior))

    def _through(self, offered: Access) -> Access:
        """What the first variation offers where T offers this; its gradient needs the value."""
        return offered if Access.VALUE in offered else Access.NONE

    @per_density
    def log_ratio(self, p: Density) -> LogRatio:
        """T, normalised; kept for as long as ``p`` lives."""
        return self.ratio.log_ratio(p, self.prior)

    def _reference(self, p: Density) -> Density:
        """The prior; on a re-weighted bank of its own samples, that bank stands for it too."""
        measured = self.log_ratio(p).prior
        return self.prior if measured is None else measured

    @abc.abstractmethod
    def _sides(self, p: Density) -> tuple[Shape | None, Shape | None]:
        """a and b, as functions of T; ``None`` for a bank that is not averaged over."""

    @abc.abstractmethod
    def _variation(self, p: Density) -> Shape:
        """The first variation as a function of T."""

    def _value(self, p: Density) -> float:
        return sum(float(side.mean) for side in self._both(p) if side is not None)

    def value(self, p: Density) -> Estimate:
        """D[p], with the errors of both banks and of the normaliser of T.

        Raises:
            CapabilityError: where the ratio has no values.
            NonFiniteError: where it, or the power of it that is averaged, overflows.
            UnsupportedError: where its normaliser cannot be measured.
        """
        self._require_values(p)
        used = [s for s in self._both(p) if s is not None and not s.bank.exact]
        count = len(used[0].bank.weights) if used else 0
        return Estimate(self._value(p), self._error(p), count)

    def value_influence(self, p: Density) -> Tensor:
        side = self._both(p)[0]
        return NOTHING if side is None else side.values

    def first_variation(self, p: Density) -> Potential:
        self._require_values(p)
        return Variation(self.log_ratio(p), self._variation(p), str(self))

    @per_density
    def _both(self, p: Density) -> tuple[Side | None, Side | None]:
        t, (shape, other) = self.log_ratio(p), self._sides(p)
        return (
            None if shape is None else Side.of(t, shape, p.bank, str(self)),
            None if other is None else Side.of(t, other, self._reference(p).bank, str(self)),
        )

    def _error(self, p: Density) -> float:
        """Standard error, by the influence of every sample of the two banks."""
        side, other = self._both(p)
        on_p = NOTHING if side is None else side.influence
        on_prior = NOTHING if other is None else other.influence
        t = self.log_ratio(p)
        if t.is_estimated:
            # T = difference - log Z, and the influence of a sample on log Z is e^T - 1.
            z = Side.of(t, lambda r: (r.exp(), r.exp()), self._reference(p).bank, str(self))
            slope = sum(float(s.slope) for s in (side, other) if s is not None)
            on_prior = on_prior - slope * z.influence
        both = on_p.ndim == on_prior.ndim == 1
        if both and same_points(p.bank, self._reference(p).bank):  # one sample, weighted twice
            return float((on_p + on_prior).norm())
        return math.hypot(float(on_p.norm()), float(on_prior.norm()))

    def _require_values(self, p: Density) -> None:
        if Access.VALUE not in self.ratio.offers(p, self.prior):
            raise CapabilityError(
                f"{self} needs values of log p - log prior, but log p of {type(p).__name__} "
                f"offers {p.log.offers} and log prior of {type(self.prior).__name__} "
                f"{self.prior.log.offers}. Use densities with a known log-probability, or another "
                "ratio: PathRatio() for flow models, LogisticRatio() for samples."
            )

    def __str__(self) -> str:
        return f"{type(self).__name__}({type(self.prior).__name__})"


@final
@dataclass(frozen=True)
class Side:
    """A function of T on a bank.

    Attributes:
        values: f(T), (N,) float64.
        mean, slope: averages of f(T) and of f'(T).
    """

    bank: Bank
    values: Tensor
    mean: Tensor
    slope: Tensor

    @staticmethod
    def of(t: LogRatio, shape: Shape, bank: Bank, owner: str) -> Side:
        ratio = t.value(bank.points, bank.cond).double()
        values, slopes = shape(ratio)
        weights = bank.weights.double().to(values.device)
        mean, slope = (weights * values).sum(), (weights * slopes).sum()
        if not bool(torch.isfinite(mean) & torch.isfinite(slope)):
            largest = float(ratio.abs().max())
            raise NonFiniteError(owner, f"ratios up to exp({largest:.0f})", "the average", OVERLAP)
        return Side(bank, values, mean, slope)

    @property
    def influence(self) -> Tensor:
        """What each sample contributes to the error of the mean, (N,); zero for quadrature."""
        centred = self.values - self.mean
        return (0.0 if self.bank.exact else 1.0) * self.bank.weights.double().to(centred) * centred


@final
@dataclass(frozen=True, eq=False)
class Variation(OfReward):
    """f(T), with the gradient f'(T) grad T.

    Raises:
        NonFiniteError: where f(T) overflows.
    """

    reward: Potential
    shape: Shape
    owner: str

    @property
    def offers(self) -> Access:
        return offers_through_values(self.reward)

    def applied(self, r: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self.shape(r)
        if not bool(torch.isfinite(value).all() & torch.isfinite(slope).all()):
            raise NonFiniteError(
                self.owner, f"ratios up to exp({float(r.abs().max()):.0f})",
                "the first variation", OVERLAP,
            )  # fmt: skip
        return value, slope

    def __str__(self) -> str:
        return f"first variation of {self.owner}"


__all__ = ["OfRatio", "Shape", "Side", "Variation"]
