"""Means of the best and of the worst part of a reward's distribution."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.functional import Certainty, Curvature, Functional, Hinges, error_of, influence
from tiltflow.potential import Hinge, Potential, offers_through_values
from tiltflow.types import Access, Estimate
from tiltflow.utilities.spectral_risk import SpectralRisk
from tiltflow.utilities.tails import require_tail, samples_for_tail


@dataclass(frozen=True, eq=False)
class _Tail(Functional, abc.ABC):
    """What both tails share: a reward, a level, and the quantile of the reward at that level."""

    reward: Potential
    level: float
    _side: ClassVar[Literal["above", "below"]]

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ConfigError(
                f"{type(self).__name__}: level={self.level!r} must lie strictly between 0 and 1."
            )

    @property
    @abc.abstractmethod
    def mass(self) -> float:
        """Probability of the tail."""

    @property
    def curvature(self) -> Curvature:
        return "concave" if self._side == "above" else "convex"

    @property
    def samples_needed(self) -> int:
        return samples_for_tail(self.mass)

    @final
    def certainties(self) -> tuple[Certainty, ...]:
        return (Certainty(self.reward, Hinges.beyond(self.mass, self._side)),)

    @final
    def offers(self, log: Access) -> Access:
        # The gradient needs the value too: it decides which side of the quantile a sample is on.
        return offers_through_values(self.reward)

    @final
    def value(self, p: Density) -> Estimate:
        """y + E_p of the hinge at the quantile y: the tail mean, the sample at the boundary
        counted with the fraction that fills the tail (methods, section 1.12)."""
        hinge = self.first_variation(p)
        values = influence(hinge, p)
        mean = float((p.bank.weights.double().to(values.device) * values).sum())
        count = 0 if p.bank.exact else len(values)
        return Estimate(hinge.threshold + mean, error_of(values, p), count)

    @final
    def first_variation(self, p: Density) -> Hinge:
        """The hinge at the plug-in quantile of ``p``, frozen (Danskin).

        Raises:
            ConfigError: if fewer than 10 effective samples of the bank lie in the tail.
        """
        self.reward.require(Access.VALUE, type(self).__name__)
        require_tail(self, self.mass, p.bank)
        threshold = float(p.quantile(self.reward.value, self.level))
        return Hinge(self.reward, threshold, 1 / self.mass, self._side)

    @final
    def active_fraction(self, p: Density) -> float:
        """Probability under ``p`` of the states that feel the hinge: the tail mass, or less
        where rewards are tied at the quantile."""
        hinge = self.first_variation(p)
        return float(p.expect(lambda x, cond: hinge.active(x, cond).double()))

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.reward}, level={self.level:g})"


@final
@dataclass(frozen=True, eq=False)
class LeftCVaR(_Tail):
    """Mean reward of the worst ``level`` of the samples (lower conditional value at risk)::

        F[p] = max_y { y - E_p (y - r)_+ / level }       delta F = -(q - r)_+ / level

    with q the ``level``-quantile of r. Raising it is risk aversion; it is convex in p, so that
    mirror descent finds a local optimum (``algorithms.tail_aware`` the global one). The scale
    1 / level is exact; published ones differ (methods, section 3.5).

    Args:
        reward: r; needs a value.
        level: mass of the tail, between 0 and 1.
    """

    _side: ClassVar[Literal["above", "below"]] = "below"

    @property
    def mass(self) -> float:
        return self.level

    def rounded(self, p: Density, part: float) -> Functional:
        soft = SpectralRisk(self.reward, (self.level,), (1.0, 0.0)).rounded(p, part)
        return soft if soft.width > 0 else self


@final
@dataclass(frozen=True, eq=False)
class RightCVaR(_Tail):
    """Mean reward of the best ``1 - level`` of the samples (super-quantile)::

        F[p] = min_y { y + E_p (r - y)_+ / (1 - level) }       delta F = (r - q)_+ / (1 - level)

    with q the ``level``-quantile of r. Raising it seeks novelty; it is concave in p. Large rates
    make mirror descent oscillate, because the threshold moves with p (methods, section 3.8).

    Args:
        reward: r; needs a value.
        level: mass of what is ignored, between 0 and 1.
    """

    _side: ClassVar[Literal["above", "below"]] = "above"

    @property
    def mass(self) -> float:
        return 1 - self.level
