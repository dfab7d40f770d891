"""Unions without training: paths of the mixture, from every model at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from tiltflow.algorithms.training_free import Chains, Drawn, TrainingFree, require_finite
from tiltflow.density import Bank
from tiltflow.flow import FlowModel, device_of
from tiltflow.kernel import Transition
from tiltflow.operators import Gate, Union, guided_union
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, expand_as


@final
@dataclass(frozen=True)
class Superposition(TrainingFree):
    """A union by posterior-weighted steps::

        kappa_i  ~  w_i prod_{j < k} N(x_{j+1}; m_i(x_j), v_{i,j})        posterior of model i
        x_{k+1}  ~  sum_i kappa_i N(m_i(x_k), v_{i,k})

    The mixture of path laws sum_i w_i P^i has these transitions, by Bayes' rule: samples are
    those of the mixture of the models' chains, exactly, at any number of steps, and need no
    density. In continuous time all paths share one noising process, so that kappa depends on the
    last state alone, kappa_i ~ w_i p_{t,i}(x_t), and the step moves with velocity
    sum_i kappa_i v_i: SuperDiff (Skreta et al., arXiv 2412.17762) with its density estimator
    along the path, of which the product above is the exact discrete form.

    The law is that of drawing one model per sample and following it, at as many times the cost as
    there are models. What it adds is the posterior of each sample (``traced``), and the velocity.

    A reward f re-weights the samples with A / (nu - f), as in ``union_weights``.

    Args:
        mean: move with the averaged mean, N(sum_i kappa_i m_i, sum_i kappa_i v_i), as the
            integrator of SuperDiff does. Steps then lack the variance of m_i under kappa, so that
            samples between modes are under-dispersed; exact only as steps shrink.
    """

    gate: ClassVar[type[Gate]] = Union
    mean: bool = False

    @torch.no_grad()
    def traced(
        self,
        gate: Gate,
        models: Sequence[FlowModel],
        count: int,
        *,
        seed: Seed,
        sampler: Sampler | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Points (count, *event) of the union without its reward, and the posterior of each model
        given the path that led there, (count, models) in float64; arguments and errors as in
        ``draw``. Without ``mean``, posteriors average to w_i, up to the error of the sample.
        """
        models = self._checked(gate, models, count)
        sampler = sampler or Sampler()
        chains = Chains.of(models, sampler, "Superposition")
        points, posteriors = [], []
        for b, start in enumerate(range(0, count, sampler.batch_size)):
            size = min(sampler.batch_size, count - start)
            x, kappa = self._roll(chains, gate.shares, size, seed.child("batch", b))
            points.append(x)
            posteriors.append(kappa.T)
        return torch.cat(points), torch.cat(posteriors)

    def _draw(
        self, gate: Gate, models: Sequence[FlowModel], count: int, seed: Seed, sampler: Sampler
    ) -> Drawn:
        if gate.reward is not None:
            gate.reward.require(Access.VALUE, "Superposition")
        points, kappa = self.traced(gate, models, count, seed=seed, sampler=sampler)
        bank = Bank.equal(points)
        if gate.reward is not None:
            bank = guided_union(bank, gate.reward, gate.total)
        stats = {f"share/{i}": float(share) for i, share in enumerate(kappa.mean(0))}
        certainty = float(kappa.max(1).values.mean())
        return Drawn(
            bank, {**stats, "certainty": certainty, "effective_size": bank.effective_size}
        )

    def _roll(
        self, chains: Chains, shares: Sequence[float], count: int, seed: Seed
    ) -> tuple[Tensor, Tensor]:
        """End points of a batch and kappa, (models, count)."""
        space, device = chains.models[0].space, device_of(chains.models[0])
        generator = seed.generator(device)
        x = space.noise(count, generator)
        prior = torch.tensor(shares, dtype=torch.float64, device=device)
        log_kappa = prior.log()[:, None].repeat(1, count)
        for k in range(chains.num_steps):
            means, v = chains.means(x, k), chains.variances[:, k].to(x)
            step = self._step(log_kappa.exp(), means, v, generator)
            x = require_finite(Transition(*step, space).sample(generator), k, "superposition")
            if chains.noisy(k):
                log_kappa = log_kappa + chains.log_densities(x, means, k)
                log_kappa = log_kappa - log_kappa.logsumexp(0)
        return x, log_kappa.exp()

    def _step(
        self, kappa: Tensor, means: Tensor, v: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, *event) and variance (B,) of the Gaussian to draw from."""
        if self.mean:
            weights = kappa.to(means)
            return (expand_as(weights, means) * means).sum(0), (weights * v[:, None]).sum(0)
        chosen = torch.multinomial(kappa.T, 1, generator=generator)[:, 0]
        return means[chosen, torch.arange(len(chosen), device=chosen.device)], v[chosen]
