"""Log-ratios of two densities: the interface, and the ratio of two known logs."""

from __future__ import annotations

import abc
import functools
import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Density, Reweighted
from tiltflow.errors import CapabilityError, ConfigError, NonFiniteError, UnsupportedError
from tiltflow.potential import Combination, Potential, offers_through_values
from tiltflow.ratio.memo import Memo
from tiltflow.types import Access, Cond, expand_as

FEWEST_SAMPLES = 10
"""Below this many effective samples a normaliser is noise."""

OVERLAP = (
    "The two densities hardly overlap there. Start from a density that covers the other, take "
    "smaller steps (rates), or bound the ratio: ExactRatio(clip=...)."
)
"""Remedies, for messages about ratios that overflow."""


class RatioEstimator(abc.ABC):
    """A way of knowing log p/q of two densities."""

    @abc.abstractmethod
    def offers(self, p: Density, q: Density) -> Access:
        """What ``log_ratio`` will offer; draws no sample and trains nothing."""

    @abc.abstractmethod
    def log_ratio(self, p: Density, q: Density) -> LogRatio:
        """T = log p/q in nats, normalised: E_q exp(T) = 1.

        It may be costly (a classifier is trained); callers keep it (``functional.per_density``).
        """

    @property
    def samples_needed(self) -> int:
        """Bank sizes below which the ratio is noise; 2 where there is no such bound."""
        return 2


@final
@dataclass(frozen=True, eq=False)
class LogRatio(Potential):
    """log p/q: a potential minus the logarithm of its normaliser, optionally bounded.

    Args:
        difference: log p/q up to a constant.
        prior: q, on whose bank the normaliser log E_q exp(difference) is measured, at first use;
            ``None`` where ``difference`` is normalised already.
        clip: bound of the absolute value in nats; ``None`` for no bound. Where it acts the
            gradient is 0, and the normalisation is that of the ratio before it was bounded.

    Raises:
        NonFiniteError: by ``value``, where a log-density is not finite.
        UnsupportedError: where fewer than 10 effective samples of the bank of q carry the
            normaliser.
    """

    difference: Potential
    prior: Density | None = None
    clip: float | None = None
    _values: Memo[Tensor] = field(default_factory=Memo, init=False, repr=False)
    _both: Memo[tuple[Tensor, Tensor]] = field(default_factory=Memo, init=False, repr=False)
    _access: Access = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Asked once: ratios contain ratios, and each would ask all of those in it again.
        through = self.clip is not None
        access = offers_through_values(self.difference) if through else self.difference.offers
        object.__setattr__(self, "_access", access)

    @property
    def offers(self) -> Access:
        return self._access

    @property
    def unnormalised(self) -> Potential:
        """The same up to a constant, without the work of finding it."""
        return self.difference if self.clip is None else self

    @functools.cached_property
    def log_normaliser(self) -> float:
        """log E_q exp(difference), in the log domain and float64; 0 where it is known to be."""
        if self.prior is None:
            return 0.0
        bank = self.prior.bank
        values = self._difference(bank.points, bank.cond).double()
        logits = values + bank.weights.double().to(values.device).log()
        log_z = torch.logsumexp(logits, 0)
        carried = float(1 / ((logits - log_z).exp() ** 2).sum())
        enough = min(FEWEST_SAMPLES, 0.5 * bank.effective_size)
        if not bank.exact and carried < enough:
            raise UnsupportedError(
                f"The normaliser of the density ratio {self.difference} rests on {carried:.1f} "
                f"effective samples of the {len(values)} in the bank of "
                f"{type(self.prior).__name__}, fewer than {enough:.0f}. {OVERLAP} More samples of "
                "that bank help where the ratio is moderate."
            )
        return float(log_z)

    @property
    def is_estimated(self) -> bool:
        """Whether the normaliser has a sampling error, sd of exp(T) on the bank of q."""
        return self.prior is not None and not self.prior.bank.exact

    def _difference(self, x: Tensor, cond: Cond | None) -> Tensor:
        try:
            return self._values.of(x, cond, lambda: self.difference.value(x, cond))
        except NonFiniteError as error:
            raise self._no_overlap(error) from error

    def _no_overlap(self, error: NonFiniteError) -> NonFiniteError:
        return NonFiniteError(
            f"density ratio {self.difference}", error.stage, "a log-density",
            "The other density has samples where this one is zero: use one that is positive "
            "everywhere (a Mixture with a wide part), or learn the ratio (LogisticRatio).",
        )  # fmt: skip

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        t = self._difference(x, cond) - self.log_normaliser
        return t if self.clip is None else t.clamp(-self.clip, self.clip)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        if self.clip is None:
            return self.difference.grad(x, cond)
        return self._value_and_grad(x, cond)[1]

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        try:
            both = self._both.of(x, cond, lambda: self.difference.value_and_grad(x, cond))
        except NonFiniteError as error:
            raise self._no_overlap(error) from error
        t, grad = both[0] - self.log_normaliser, both[1]
        if self.clip is None:
            return t, grad
        inside = expand_as((t.abs() < self.clip).to(grad), grad)
        return t.clamp(-self.clip, self.clip), inside * grad

    def __str__(self) -> str:
        return f"log ratio {self.difference}"


@final
@dataclass(frozen=True, eq=False)
class ExactRatio(RatioEstimator):
    """log p - log q of two known logs; the default everywhere.

    Equal parts of the logs cancel. Where log p is ``q.log + psi``, as mirror descent records it,
    the ratio is psi - log E_q exp(psi): log p and log q themselves may be unknown. The normaliser
    is measured on the bank of q wherever one of the logs is a sum of potentials, which is known up
    to a constant only; a log that is not a sum is taken to be normalised.

    Args:
        clip: bound of |log p/q| in nats, the only clipping of ratios in this library. A bounded
            ratio is biased: neither its mean nor the divergence made of it is right where the
            bound acts. Default: no bound.
    """

    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ConfigError(
                f"ExactRatio: clip={self.clip!r} must be a positive number of nats; leave it out "
                "for no bound."
            )

    def offers(self, p: Density, q: Density) -> Access:
        return LogRatio(p.log - q.log, None, self.clip).offers

    def log_ratio(self, p: Density, q: Density) -> LogRatio:
        """See ``RatioEstimator``.

        Raises:
            CapabilityError: if log p - log q offers neither values nor gradients.
        """
        difference = p.log - q.log
        if difference.offers is Access.NONE:
            raise CapabilityError(
                f"The ratio of {type(p).__name__} and {type(q).__name__} is not known: log p "
                f"offers {p.log.offers} and log q {q.log.offers}. Use densities whose log is "
                "known, or learn the ratio from samples: ratio=LogisticRatio()."
            )
        same = isinstance(difference, Combination) and not difference.terms
        tracked = isinstance(p.log, Combination) or isinstance(q.log, Combination)
        if isinstance(p, Reweighted) and p.origin is q.log and not same:
            q = p.original(difference)  # the same points, so that the bank is its own truth
        return LogRatio(difference, q if tracked and not same else None, self.clip)


__all__ = ["ExactRatio", "LogRatio", "RatioEstimator"]
