"""Gates as one regression: flow matching on merged samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tiltflow.algorithms.feynman_kac import FeynmanKac
from tiltflow.algorithms.lowerings.base import Job, Lowered, Merging
from tiltflow.algorithms.lowerings.control import warn_if_apart
from tiltflow.density import Bank, Empirical
from tiltflow.divergences import Wasserstein
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import Auto
from tiltflow.matching import fit_flow
from tiltflow.operators import Contrast, Gate, guided_union
from tiltflow.potential import Potential
from tiltflow.ratio import Likelihood
from tiltflow.sample import calibrated
from tiltflow.solvers.weighted_bank import groups_of
from tiltflow.types import expand_as, joined_cond

PULLS = 30
"""Steps of the ascent that moves points of a barycentre towards a reward."""

EXACT_TRACE, PROBES = 100, 4
"""Dimensions up to which log-densities are computed with exact traces; sign vectors above."""

REPEATED = 50
"""Samples of each condition that a normaliser of its own needs."""


def distilled(job: Job) -> Lowered:
    """A union: flow matching on samples of the mixture, the exact minimiser of the forward KL,
    with weights A / (nu - f) where there is a reward (methods, section 5.7)."""
    bank, gate = _mixture(job), job.gate
    if gate.reward is not None:
        bank = guided_union(bank, gate.reward, gate.total, _groups(bank))
    return _fitted(bank, job)


def _mixture(job: Job) -> Bank:
    """Samples of sum_i w_i p_i."""
    counts, parts = _counts(job.settings.bank_size, job.gate.shares), []
    for i, (model, count) in enumerate(zip(job.models, counts, strict=True)):
        seed, cond = job.context.seed.child("part", i), job.cond(count, "part", i)
        parts.append((job.settings.sampler.sample(model, count, seed=seed, cond=cond), cond))
    conds = [cond for _, cond in parts if cond is not None]
    return Bank.equal(torch.cat([x for x, _ in parts]), joined_cond(conds) if conds else None)


def _groups(bank: Bank) -> Sequence[Tensor]:
    """Indices of the samples of each condition, each of which has a normaliser of its own."""
    labels, sizes = groups_of(bank.cond, len(bank.points))
    if len(sizes) > 1 and min(sizes) < REPEATED:
        raise UnsupportedError(
            f"merge: every condition has its own normaliser, so that {REPEATED} samples of each "
            f"are needed; of {len(sizes)} conditions in the bank the rarest has {min(sizes)}. "
            "Draw from fewer conditions, or raise bank_size."
        )
    labels = labels.to(bank.points.device)
    return [torch.nonzero(labels == k)[:, 0] for k in range(len(sizes))]


def _weighted(bank: Bank, log_weights: Tensor) -> Bank:
    """The bank times exp(log_weights), normalised for each condition."""
    weights = bank.weights.double().to(log_weights.device).clone()
    for group in _groups(bank):
        mass = weights[group].sum()
        weights[group] = mass * torch.softmax(weights[group].log() + log_weights[group], 0)
    return replace(bank, weights=weights)


def _counts(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers near ``total * share`` that sum to ``total``."""
    edges = [round(total * sum(shares[:k])) for k in range(len(shares) + 1)]
    counts = [b - a for a, b in pairwise(edges)]
    if min(counts) < 1:
        raise ConfigError(
            f"Merging: of bank_size={total} samples a part of share {min(shares):.2g} gets none. "
            "Raise bank_size."
        )
    return counts


def transported(job: Job) -> Lowered:
    """An interpolation: flow matching on points of the W_2 barycentre (methods, section 5.2)::

        y  <-  argmax_z  f(z) / A - |z - m|^2,      m = sum_i w_i T_i(y)

    with T_i the optimal transport from the points y to samples of part i, chunk by chunk; without
    a reward y <- m. Chunks are finite, which smooths the result a little.
    """
    settings, points = job.settings, []
    for c, first in enumerate(range(0, settings.bank_size, settings.chunk)):
        size = min(settings.chunk, settings.bank_size - first)
        samples = [
            settings.sampler.sample(model, size, seed=job.context.seed.child("chunk", c, i))
            for i, model in enumerate(job.models)
        ]
        points.append(_barycentre(job.gate, samples, settings.transports))
    return _fitted(Bank.equal(torch.cat(points)), job)


def _barycentre(gate: Gate, samples: Sequence[Tensor], transports: int) -> Tensor:
    """Points whose law is the barycentre of those of ``samples``, (N, *event) each."""
    heaviest = max(range(len(samples)), key=lambda i: gate.shares[i])
    y = samples[heaviest].double()
    penalties = [Wasserstein(Empirical(x.double()), power=2) for x in samples]
    for _ in range(1 if len(samples) == 2 and gate.reward is None else transports):
        # The gradient of W_2^2 at y is 2 (y - T(y)).
        slopes = [penalty.first_variation(Empirical(y)).grad(y) for penalty in penalties]
        total = sum((w * g for w, g in zip(gate.shares, slopes, strict=True)), torch.zeros_like(y))
        mean = y - 0.5 * total
        y = mean if gate.reward is None else _pulled(y, mean, gate.reward, gate.total, samples[0])
    return y.to(samples[0])


def _pulled(y: Tensor, mean: Tensor, reward: Potential, total: float, like: Tensor) -> Tensor:
    """Points z that raise f(z) / A - |z - mean|^2, from y: ascent with a step of its own for each
    point, halved where a step did not help, so that no curvature of f makes it diverge."""

    def worth(z: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = reward.value_and_grad(z.to(like))
        off = z - mean
        square = off.flatten(1).square().sum(1)
        return value.double() / total - square, slope.double() / total - 2 * off

    step = torch.full_like(y.flatten(1)[:, 0], 0.5)
    height, slope = worth(y)
    for _ in range(PULLS):
        z = y + expand_as(step, y) * slope
        new, new_slope = worth(z)
        better = new > height
        y = torch.where(expand_as(better, y), z, y)
        slope = torch.where(expand_as(better, y), new_slope, slope)
        height = torch.where(better, new, height)
        step = torch.where(better, (1.5 * step).clamp(max=0.5), 0.3 * step)
    return y


def thinned(job: Job) -> Lowered:
    """A contrast: flow matching on samples of the first part, weighted with the bounded ratio of
    densities and exp(f / A); the densities by the flows' ODEs."""
    gate, settings, count = job.gate, job.settings, job.settings.bank_size
    assert isinstance(gate, Contrast)
    seed, cond = job.context.seed.child("part", 0), job.cond(count, "part", 0)
    bank = Bank.equal(settings.sampler.sample(job.models[0], count, seed=seed, cond=cond), cond)
    odds = gate.odds(*(_flow_log(model, settings) for model in job.models))
    log_weights = odds.value(bank.points, cond).double()
    return _fitted(_weighted(bank, log_weights + _tilt(gate, bank)), job)


def geometric(job: Job) -> Lowered:
    """An intersection by weights: flow matching on samples of the mixture of the parts, weighted
    with prod_i p_i^{w_i} e^{f / A} / pbar; the densities by the flows' ODEs. Exact where the bank
    carries it, also for rewards without gradient."""
    gate, bank = job.gate, _mixture(job)
    flows = [_flow_log(model, job.settings) for model in job.models]
    logs = torch.stack([flow.value(bank.points, bank.cond).double() for flow in flows])
    shares = logs.new_tensor(gate.shares)[:, None]
    log_weights = (shares * logs).sum(0) - (shares.log() + logs).logsumexp(0)
    apart = -float(log_weights.logsumexp(0) - math.log(len(log_weights)))
    warn_if_apart(gate, apart)
    lowered = _fitted(_weighted(bank, log_weights + _tilt(gate, bank)), job)
    return replace(lowered, stats={**lowered.stats, "apart": apart})


def particles(job: Job) -> Lowered:
    """An intersection by sequential Monte Carlo: flow matching on the weighted particles of
    ``FeynmanKac``. Needs velocities only, no log-densities and no gradient of the reward."""
    gate, settings = job.gate, job.settings
    drawn = FeynmanKac().draw(
        gate, job.models, settings.bank_size, seed=job.context.seed.child("particles"),
        sampler=settings.sampler,
    )  # fmt: skip
    known = {"ancestors": drawn.stats["effective_ancestors"]}
    if gate.reward is None:
        known["apart"] = -drawn.stats["log_z"]
        warn_if_apart(gate, known["apart"])
    lowered = _fitted(drawn.bank, job)
    return replace(lowered, stats={**lowered.stats, **known})


def _flow_log(model: FlowModel, settings: Merging) -> Likelihood:
    """log p of a part, with the trace that is affordable."""
    exact = settings.trace == "exact"
    if settings.trace == "auto":
        exact = math.prod(model.space.event) <= EXACT_TRACE
    return Likelihood(
        model, settings.likelihood_steps,
        trace="exact" if exact else "hutchinson", probes=1 if exact else PROBES,
    )  # fmt: skip


def _tilt(gate: Gate, bank: Bank) -> Tensor:
    """f / A at the points, (N,)."""
    if gate.reward is None:
        return torch.zeros(len(bank.points), dtype=torch.float64, device=bank.points.device)
    return gate.reward.value(bank.points, bank.cond).double() / gate.total


def _fitted(bank: Bank, job: Job) -> Lowered:
    """``start``, refitted to a bank."""
    model, settings, context = job.start.clone(), job.settings, job.context
    stats = fit_flow(
        model, bank, settings.training, context.child("fit"), batch_size=settings.batch_size
    )
    model = freeze(model)
    if isinstance(settings.sampler.kernel, Auto):
        seed = context.seed.child("moments")
        model = calibrated(model, seed=seed, conditions=job.conditions)
    return Lowered(model, job.lowering, dict(stats))
