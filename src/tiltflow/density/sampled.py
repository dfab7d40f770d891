"""Densities known by samples: given ones, a model's, re-weighted ones."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.density.base import Bank, Density, UnknownLog
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.potential import ZERO, Potential
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, Cond, Conditions, drawn_cond


@final
class Empirical(Density):
    """A law known by (weighted) samples only.

    Args:
        points: (N, *event).
        weights: (N,), normalised here; equal by default.
        cond: conditions of the points.
    """

    def __init__(
        self, points: Tensor, weights: Tensor | None = None, cond: Cond | None = None
    ) -> None:
        if weights is None:
            self._bank = Bank.equal(points, cond)
        else:
            w = weights.double()
            if bool((w < 0).any()) or float(w.sum()) <= 0:
                raise ConfigError("Empirical: weights must be non-negative and not all zero.")
            self._bank = Bank(points, w / w.sum(), cond)
        self._log = UnknownLog("Empirical")

    @property
    def event(self) -> tuple[int, ...]:
        return tuple(self._bank.points.shape[1:])

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def log(self) -> Potential:
        return self._log


@final
class Reweighted(Density):
    """A bank of samples of a law, and a tilt of that law by exp(psi) as weights on them.

    Every functional that needs only rewards, features, kernels or transport is exact on it, as
    far as a finite sample can stand for the law; and so is re-weighting it further.

    Args:
        bank: samples of the law.
        log: log-density of the law, up to a constant; may be unknown.
        psi: log-ratio of the tilt, up to a constant; ``None`` for the law itself.
        origin: log-density of the law from which all tilts are counted; ``log`` by default.
    """

    def __init__(
        self,
        bank: Bank,
        log: Potential,
        psi: Potential | None = None,
        origin: Potential | None = None,
    ) -> None:
        self.base, self._law, self.origin = bank, log, log if origin is None else origin
        self._psi = ZERO if psi is None else psi
        self._log = log if psi is None else log + psi
        self._bank = bank
        if psi is not None:
            logits = bank.weights.log() + psi.value(bank.points, bank.cond).to(bank.weights)
            self._bank = Bank(bank.points, torch.softmax(logits, 0), bank.cond, bank.exact)

    @property
    def bank(self) -> Bank:
        return self._bank

    @property
    def log(self) -> Potential:
        return self._log

    def tilted(self, psi: Potential) -> Reweighted:
        """This law times exp(psi); a tilt of a tilt is one tilt, by the sum."""
        return Reweighted(self.base, self._law, self._psi + psi, self.origin)

    def original(self, psi: Potential) -> Reweighted:
        """The law of ``origin``, of which this is the tilt by psi, on the same points."""
        # From the weights before the tilt: those after it may have underflowed.
        rest = (self._psi - psi).value(self.base.points, self.base.cond)
        weights = torch.softmax(self.base.weights.log() + rest.to(self.base.weights), 0)
        exact = self._bank.exact
        return Reweighted(Bank(self._bank.points, weights, self._bank.cond, exact), self.origin)

    def with_log(self, log: Potential) -> Reweighted:
        other = Reweighted(self.base, self._law, origin=self.origin)
        other._bank, other._psi, other._log = self._bank, self._psi, log
        return other


@final
@dataclass(frozen=True, eq=False)
class ModelScore(Potential):
    """The score of a flow model shortly before t = 1: offers GRAD.

    The score diverges like a network error over eta as t -> 1, so it is read at ``time``; x itself
    is passed unchanged (methods, section 1.10).

    Args:
        model: the model.
        time: when its score is read.
        of_data: pass alpha x and multiply by alpha instead: the score of X_1 + (beta / alpha)
            noise, a law that is nearer to that of X_1 than the one of X_t is.
    """

    model: FlowModel
    time: float
    of_data: bool = False

    @property
    def offers(self) -> Access:
        return Access.GRAD

    @torch.no_grad()
    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        if not self.of_data:
            return self.model.score(x, self.time, cond)
        alpha = float(self.model.schedule.alpha(torch.tensor(self.time, dtype=torch.float64)))
        return alpha * self.model.score(alpha * x, self.time, cond)

    def __str__(self) -> str:
        return "log p (score of the model)"


@final
class FlowDensity(Density):
    """The law of a flow model's samples.

    Args:
        model: the model.
        sampler: how samples are made.
        num_samples: size of the bank, drawn on first use.
        seed: stream of the bank.
        conditions: law of the conditions of a conditional model.
        score_time: time at which the score is read; one constant for all scores of an expression.
        log: log-density when more is known than the score, e.g. along a mirror descent.
    """

    def __init__(
        self,
        model: FlowModel,
        *,
        sampler: Sampler | None = None,
        num_samples: int = 4096,
        seed: Seed | None = None,
        conditions: Conditions | None = None,
        score_time: float = 0.99,
        log: Potential | None = None,
    ) -> None:
        if not 0 < score_time < 1:
            raise ConfigError(f"FlowDensity: score_time={score_time} must lie between 0 and 1.")
        self.model, self.sampler = model, sampler or Sampler()
        self.num_samples, self.seed = num_samples, seed or Seed(0).child("density")
        self.conditions, self.score_time = conditions, score_time
        self._log = ModelScore(model, score_time) if log is None else log

    @property
    def event(self) -> tuple[int, ...]:
        return self.model.space.event

    def with_log(self, log: Potential) -> FlowDensity:
        other = self._with(self.num_samples, log)
        if "bank" in self.__dict__:
            other.__dict__["bank"] = self.__dict__["bank"]
        return other

    def at_least(self, num_samples: int) -> FlowDensity:
        return self if self.num_samples >= num_samples else self._with(num_samples, self._log)

    def _with(self, num_samples: int, log: Potential) -> FlowDensity:
        return FlowDensity(
            self.model, sampler=self.sampler, num_samples=num_samples, seed=self.seed,
            conditions=self.conditions, score_time=self.score_time, log=log,
        )  # fmt: skip

    @functools.cached_property
    def bank(self) -> Bank:
        """``num_samples`` samples of the model, drawn once."""
        seed, count = self.seed.child("bank"), self.num_samples
        cond = drawn_cond(self.conditions, count, seed)
        return Bank.equal(self.sampler.sample(self.model, count, seed=seed, cond=cond), cond)

    @property
    def log(self) -> Potential:
        return self._log
