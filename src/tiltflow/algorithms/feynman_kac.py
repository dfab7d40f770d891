"""Intersections without training: particles that are weighted and resampled along the path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from tiltflow.algorithms.training_free import Chains, Drawn, TrainingFree, require_finite
from tiltflow.density import Bank
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel, device_of
from tiltflow.kernel import Transition
from tiltflow.operators import Gate, Intersection
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.types import Access, expand_as


@final
@dataclass(frozen=True)
class FeynmanKac(TrainingFree):
    """An intersection by sequential Monte Carlo::

        prod_i N(m_i, v_i)^{w_i}  =  N(mbar, V) exp(-c_k)
        1 / V = sum_i w_i / v_i,      mbar = V sum_i (w_i / v_i) m_i
        c_k(x) = sum_i w_i |m_i - mbar|^2 / (2 v_i) + (dim / 2) (sum_i w_i log v_i - log V)

    Particles move with N(mbar, V), are weighted with exp(-c_k), and at t = 1 with exp(f / A); they
    are resampled (systematically) where weights have become too unequal. As particles -> infinity
    this is the product of the models' path laws, whose end law is prod_i p_i^{w_i} exp(f / A) / Z
    (methods, section 5.6 C), up to the error of the steps; with equal v_i it moves with the
    average of models and c_k is ``averaging.Disagreement``. In continuous time these are the
    Feynman-Kac correctors for geometric averages (Skreta et al., arXiv 2503.02819).

    Samples of one run are dependent: they share ancestors at t = 0. Of ``stats``, next to
    ``effective_size`` (of the final weights), ``ancestors`` counts those that are left and
    ``effective_ancestors`` is 1 / sum W^2 of the weight W that each holds, the number of
    independent samples that the run is worth at least for what is decided early. ``log_z`` is the
    logarithm of an unbiased estimate of Z = int prod_i p_i^{w_i} exp(f / A), which without a
    reward is at most one: minus its logarithm says how far apart the models are. ``log_z_error``
    is its standard error by ancestors (Chan and Lai, arXiv 1312.5114).

    Args:
        threshold: resample where the effective size falls below this fraction of the particles;
            0 never resamples, 1 does so at every step.
        equal: resample at the end, for points of equal weight.
        lookahead: weight already along the path with exp(t f / A) at the predicted end point. The
            law is the same, as these weights are divided out again; particles then die early
            where the reward can be foreseen, instead of all at the end.
    """

    gate: ClassVar[type[Gate]] = Intersection
    threshold: float = 0.5
    equal: bool = False
    lookahead: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(
                f"FeynmanKac: threshold={self.threshold} is a fraction of the particles and must "
                "lie between 0 and 1."
            )

    def _draw(
        self, gate: Gate, models: Sequence[FlowModel], count: int, seed: Seed, sampler: Sampler
    ) -> Drawn:
        chains = Chains.of(models, sampler, "FeynmanKac")
        reward = None if gate.reward is None else (1 / gate.total) * gate.reward
        if reward is not None:
            reward.require(Access.VALUE, "FeynmanKac")
        shares = torch.tensor(gate.shares, dtype=torch.float64)
        space, device = models[0].space, device_of(models[0])
        generator = seed.generator(device)
        x, cloud = space.noise(count, generator), _Cloud(count, device)
        for k in range(chains.num_steps):
            means = chains.means(x, k)
            mean, variance, cost = _product(chains, means, shares, k)
            cloud.weight(-cost)
            if reward is not None and self.lookahead and k > 0:
                end = _endpoint(chains, x, means, shares, k)
                cloud.foresee(float(chains.times[k]) * reward.value(end).double())
            if cloud.effective_size < self.threshold * count:
                mean = mean[cloud.resample(generator)]
            step = Transition(mean, mean.new_full((count,), variance), space)
            x = require_finite(step.sample(generator), k, "Feynman-Kac")
        if reward is not None:
            cloud.foresee(reward.value(x).double())
        stats = cloud.stats()
        if self.equal:
            x = x[cloud.resample(generator)]
        return Drawn(Bank(x, cloud.weights), stats)


def _product(
    chains: Chains, means: Tensor, shares: Tensor, k: int
) -> tuple[Tensor, float, Tensor]:
    """mbar (B, *event), V and c (B,) of step k; a step without noise has no density, no cost."""
    w = shares.to(means.device)
    if not chains.noisy(k):
        return _averaged(means, w), 0.0, w.new_zeros(means.shape[1])
    v = chains.variances[:, k].to(w)
    precisions = w / v
    variance = 1 / precisions.sum()
    mean = _averaged(means, precisions * variance)
    dimension = chains.models[0].space.dimension(len(mean)).to(w)
    excess = (w * v.log()).sum() - variance.log()
    spread = (precisions[:, None] * chains.squares(means - mean)).sum(0)
    return mean, float(variance), 0.5 * (spread + dimension * excess)


def _averaged(means: Tensor, weights: Tensor) -> Tensor:
    return (expand_as(weights.to(means), means) * means).sum(0)


def _endpoint(chains: Chains, x: Tensor, means: Tensor, shares: Tensor, k: int) -> Tensor:
    """The average predicted end point, read off the means of the steps."""
    ends = []
    t, s = chains.times[k : k + 1], chains.times[k + 1 : k + 2]
    for model, kernel, mean in zip(chains.models, chains.kernels, means, strict=True):
        c = kernel.coefficients(model.schedule, t, s)
        ends.append((mean - float(c.on_state) * x) / float(c.on_endpoint))
    return _averaged(torch.stack(ends), shares.to(x.device))


@final
class _Cloud:
    """Weights and ancestors of particles."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.log_z, self.resamplings = count, 0.0, 0
        self.log_weights = torch.zeros(count, dtype=torch.float64, device=device)
        self.foreseen = torch.zeros_like(self.log_weights)
        self.ancestors = torch.arange(count, device=device)

    @property
    def weights(self) -> Tensor:
        """Normalised, (count,) float64."""
        return self.log_weights.softmax(0)

    @property
    def effective_size(self) -> float:
        return float(1 / (self.weights**2).sum())

    def weight(self, increment: Tensor) -> None:
        self.log_weights = self.log_weights + increment

    def foresee(self, value: Tensor) -> None:
        """Replace what was foreseen of the final weight."""
        self.weight(value - self.foreseen)
        self.foreseen = value

    def resample(self, generator: torch.Generator) -> Tensor:
        """Indices of the particles that go on, (count,), by systematic resampling."""
        self.log_z += self._log_mean()
        u = torch.rand(1, generator=generator, device=generator.device, dtype=torch.float64)
        marks = (torch.arange(self.count, device=u.device) + u) / self.count
        index = torch.searchsorted(self.weights.cumsum(0), marks).clamp(max=self.count - 1)
        self.log_weights = torch.zeros_like(self.log_weights)
        self.foreseen, self.ancestors = self.foreseen[index], self.ancestors[index]
        self.resamplings += 1
        return index

    def _log_mean(self) -> float:
        return float(self.log_weights.logsumexp(0)) - math.log(self.count)

    def stats(self) -> dict[str, float]:
        held = torch.zeros_like(self.log_weights).index_add_(0, self.ancestors, self.weights)
        return {
            "effective_size": self.effective_size,
            "ancestors": float((self.ancestors.bincount() > 0).sum()),
            "effective_ancestors": float(1 / (held**2).sum()),
            "resamplings": float(self.resamplings),
            "log_z": self.log_z + self._log_mean(),
            "log_z_error": float((held - 1 / self.count).square().sum().sqrt()),
        }
