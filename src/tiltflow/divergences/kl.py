"""Kullback-Leibler divergence from a prior."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.density import Density, FlowDensity
from tiltflow.divergences.of_ratio import OfRatio, Shape
from tiltflow.errors import CapabilityError, UnsupportedError
from tiltflow.functional import Curvature, influence
from tiltflow.potential import Potential
from tiltflow.ratio import ExactRatio, RatioEstimator
from tiltflow.sample import Sampler, path_kl
from tiltflow.types import Access, Estimate, drawn_cond


@final
@dataclass(frozen=True, eq=False)
class KL(OfRatio):
    """D[p] = E_p log(p / prior), with first variation log p - log prior: convex in p.

    The gradient is a difference of scores. Equal parts of the two logs cancel: where log p is
    ``prior.log + psi``, the first variation is ``psi``, which may have values and gradients
    although a flow's log-density has neither value nor, close to t = 1, a reliable score. That is
    why mirror descent is handed the *same object* that is ``prior`` here.

    Args:
        prior: the density to stay close to.
        ratio: how log(p / prior) is known.
    """

    prior: Density
    ratio: RatioEstimator = field(default_factory=ExactRatio)

    @property
    def curvature(self) -> Curvature:
        return "convex"

    def _through(self, offered: Access) -> Access:
        return offered

    def _sides(self, p: Density) -> tuple[Shape | None, Shape | None]:
        return lambda t: (t, torch.ones_like(t)), None

    def _variation(self, p: Density) -> Shape:
        return lambda t: (t, torch.ones_like(t))

    def first_variation(self, p: Density) -> Potential:
        return self.log_ratio(p).unnormalised

    def value_influence(self, p: Density) -> Tensor:
        return influence(self.first_variation(p), p)

    def value(self, p: Density) -> Estimate:
        """E_p log(p / prior), by the best route there is.

        - the ratio has values: they are averaged over the bank of ``p``. Where it is known up to a
          constant only, log p - log prior = psi + const, this is E_p psi - log E_prior e^psi. It
          describes the law that log p stands for; where samples of ``p`` differ from it, this is a
          lower bound.
        - two flow models: the path KL, an upper bound up to the discretisation of the sampler
          (methods, section 1.11); also where the normaliser of psi cannot be measured, because the
          prior's bank hardly reaches ``p``.

        Raises:
            CapabilityError: if none applies.
            UnsupportedError: if the normaliser cannot be measured, and there are no two flows.
        """
        flows = isinstance(p, FlowDensity) and isinstance(self.prior, FlowDensity)
        if Access.VALUE in self.offers_at(p):
            try:
                return super().value(p)
            except UnsupportedError:
                if not flows:
                    raise
        if isinstance(p, FlowDensity) and isinstance(self.prior, FlowDensity):
            return _path_kl(p, self.prior)
        raise CapabilityError(
            f"KL.value needs values of log p - log prior, but log p of {type(p).__name__} offers "
            f"{p.log.offers} and log prior of {type(self.prior).__name__} {self.prior.log.offers}."
            " Use densities with a known log-probability, or two FlowDensity objects, whose path "
            "KL is measured; optimising a KL needs scores only."
        )


def _path_kl(p: FlowDensity, prior: FlowDensity) -> Estimate:
    if p.model.schedule != prior.model.schedule:
        raise UnsupportedError(
            "KL.value: the path KL compares flow models with one schedule, but these have "
            f"{p.model.schedule} and {prior.model.schedule}."
        )
    seed, count = p.seed.child("path_kl"), p.num_samples
    cond = drawn_cond(p.conditions, count, seed)
    # An ODE sampler has no path law; the memoryless default measures the same two models.
    sampler = p.sampler if p.sampler.kernel.memoryless else Sampler()
    return path_kl(p.model, prior.model, sampler=sampler, count=count, seed=seed, cond=cond)
