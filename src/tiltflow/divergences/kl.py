"""Kullback-Leibler divergence from a prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from tiltflow.density import Density, FlowDensity
from tiltflow.errors import CapabilityError, UnsupportedError
from tiltflow.functional import Curvature, Functional, error_of, influence
from tiltflow.potential import Combination, Potential
from tiltflow.sample import Sampler, path_kl
from tiltflow.types import Access, Estimate


@final
@dataclass(frozen=True, eq=False)
class KL(Functional):
    """D[p] = E_p log(p / prior), with first variation log p - log prior: convex in p.

    The gradient is a difference of scores. Equal parts of the two logs cancel: where log p is
    ``prior.log + psi``, the first variation is ``psi``, which may have values and gradients
    although a flow's log-density has neither value nor, close to t = 1, a reliable score. That is
    why mirror descent is handed the *same object* that is ``prior`` here.

    Args:
        prior: the density to stay close to.
    """

    prior: Density

    @property
    def curvature(self) -> Curvature:
        return "convex"

    @property
    def priors(self) -> tuple[Density, ...]:
        return (self.prior,)

    def offers(self, log: Access) -> Access:
        return log & self.prior.log.offers

    def offers_at(self, p: Density) -> Access:
        return self.first_variation(p).offers

    def first_variation(self, p: Density) -> Potential:
        return p.log - self.prior.log

    def value(self, p: Density) -> Estimate:
        """E_p log(p / prior), by the best route there is.

        - log p and log prior have values: their difference is averaged over the bank of ``p``.
        - only log p - log prior = psi + const has: E_p psi - log E_prior e^psi. It describes the
          law that log p stands for; where samples of ``p`` differ from it, this is a lower bound.
        - two flow models: the path KL, an upper bound up to the discretisation of the sampler
          (methods, section 1.11).

        Raises:
            CapabilityError: if none applies.
        """
        ratio = self.first_variation(p)
        if Access.VALUE in ratio.offers:
            return self._from_ratio(p, ratio)
        if isinstance(p, FlowDensity) and isinstance(self.prior, FlowDensity):
            return _path_kl(p, self.prior)
        raise CapabilityError(
            f"KL.value needs values of log p - log prior, but log p of {type(p).__name__} offers "
            f"{p.log.offers} and log prior of {type(self.prior).__name__} {self.prior.log.offers}."
            " Use densities with a known log-probability, or two FlowDensity objects, whose path "
            "KL is measured; optimising a KL needs scores only."
        )

    def _from_ratio(self, p: Density, ratio: Potential) -> Estimate:
        if isinstance(ratio, Combination) and not ratio.terms:
            return Estimate(0.0)
        mean = p.estimate(ratio.value)
        # A log that is a sum (prior.log + psi) is a record of tilts, without its normaliser.
        if not isinstance(p.log, Combination) and not isinstance(self.prior.log, Combination):
            return mean
        values = influence(ratio, self.prior)
        top = values.max()
        scaled = (values - top).exp()
        weights = self.prior.bank.weights.double().to(values.device)
        normaliser = float((weights * scaled).sum())
        error = error_of(scaled / normaliser, self.prior)
        return Estimate(
            mean.value - math.log(normaliser) - float(top),
            math.hypot(mean.standard_error, error),
            mean.count,
        )

    def __str__(self) -> str:
        return f"KL({type(self.prior).__name__})"


def _path_kl(p: FlowDensity, prior: FlowDensity) -> Estimate:
    if p.model.schedule != prior.model.schedule:
        raise UnsupportedError(
            "KL.value: the path KL compares flow models with one schedule, but these have "
            f"{p.model.schedule} and {prior.model.schedule}."
        )
    seed, count = p.seed.child("path_kl"), p.num_samples
    cond = None if p.conditions is None else p.conditions.draw(count, seed.child("cond"))
    # An ODE sampler has no path law; the memoryless default measures the same two models.
    sampler = p.sampler if p.sampler.kernel.memoryless else Sampler()
    return path_kl(p.model, prior.model, sampler=sampler, count=count, seed=seed, cond=cond)
