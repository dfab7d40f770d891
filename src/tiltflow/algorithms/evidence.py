"""What a gate's model turned out to be: its objective, and its distances from the parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.algorithms.averaging import aligned
from tiltflow.density import Empirical
from tiltflow.divergences import Wasserstein
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel
from tiltflow.operators import Contrast, Gate, Interpolation, Odds, Union
from tiltflow.ratio import Likelihood
from tiltflow.sample import Sampler, step_kl
from tiltflow.seed import Seed
from tiltflow.types import Cond, Conditions, Estimate, joined_cond

EXACT_TRACE = 16
"""Dimensions up to which a contrast's log-densities are computed with exact traces."""


@final
@dataclass(frozen=True)
class Evidence:
    """Measured on fresh samples of a gate's model p and of its parts p_i.

    Attributes:
        objective: the operator's, E f - sum_i a_i D_i(p, p_i); of a contrast what
            ``Gate.objective`` states. (That of a union has the mixture, and is higher by the
            constant sum_i a_i KL(p_i || pbar).)
        reward: E_p f, if there is one.
        kl_to_parts: KL(p || p_i) in nats, by the path identity (methods, section 1.11); for
            models that are not exact, an upper bound.
        kl_from_parts: KL(p_i || p), likewise.
        samples: of p, (N, *event).
        part_samples: of each part.
        cond: conditions of ``samples``.
        part_cond: of the samples of each part.
    """

    objective: Estimate
    reward: Estimate | None
    kl_to_parts: tuple[Estimate, ...]
    kl_from_parts: tuple[Estimate, ...]
    samples: Tensor
    part_samples: tuple[Tensor, ...]
    cond: Cond | None = None
    part_cond: tuple[Cond | None, ...] = ()


def gate_evidence(
    gate: Gate,
    model: FlowModel,
    parts: Sequence[FlowModel],
    *,
    sampler: Sampler,
    count: int,
    seed: Seed,
    conditions: Conditions | None = None,
) -> Evidence:
    """Measure a gate's model against its parts.

    Args:
        gate: the gate.
        model: what ``merge`` made of it.
        parts: the models that it is over, in their order.
        sampler: memoryless; its path laws give the KLs.
        count: samples of each model.
        seed: the result is a function of it.
        conditions: law of the conditions of conditional models.

    Raises:
        ConfigError: for a wrong number of parts, or a sampler without path laws.
    """
    if len(parts) != len(gate.parts):
        raise ConfigError(f"gate_evidence: {gate} has {len(gate.parts)} parts, not {len(parts)}.")
    if not sampler.kernel.memoryless:
        raise ConfigError(
            f"gate_evidence: {type(sampler.kernel).__name__} has no memoryless path law; use "
            "Sampler()."
        )
    model, *parts = aligned([model, *parts])
    draw = _Draw(sampler, count, conditions)
    merged = draw.paths(model, parts, seed.child("merged"))
    others = [draw.paths(part, [model], seed.child("part", i)) for i, part in enumerate(parts)]
    to_parts, from_parts = merged.kls, torch.cat([other.kls for other in others])
    reward = None
    if gate.reward is not None:
        reward = gate.reward.value(merged.ends, merged.cond).double().cpu()
    return Evidence(
        _objective(gate, parts, merged, others, reward),
        None if reward is None else Estimate.of(reward),
        tuple(Estimate.of(kl) for kl in to_parts), tuple(Estimate.of(kl) for kl in from_parts),
        merged.ends, tuple(other.ends for other in others),
        merged.cond, tuple(other.cond for other in others),
    )  # fmt: skip


@final
@dataclass(frozen=True)
class _Paths:
    """Ends (N, *event) of a model's paths, and their KLs against others, (others, N)."""

    ends: Tensor
    cond: Cond | None
    kls: Tensor


@final
@dataclass(frozen=True)
class _Draw:
    sampler: Sampler
    count: int
    conditions: Conditions | None

    def paths(self, model: FlowModel, others: Sequence[FlowModel], seed: Seed) -> _Paths:
        ends, conds, kls = [], [], []
        for batch, start in enumerate(range(0, self.count, self.sampler.batch_size)):
            size, at = min(self.sampler.batch_size, self.count - start), seed.child("batch", batch)
            cond = None if self.conditions is None else self.conditions.draw(size, at.child("c"))
            path = self.sampler.simulate(model, size, seed=at, cond=cond)
            kernel = self.sampler.kernel
            kls.append(torch.stack([step_kl(model, q, kernel, path, own=True)[0] for q in others]))
            ends.append(path.end)
            conds += [] if cond is None else [cond]
        cond = joined_cond(conds) if conds else None
        return _Paths(torch.cat(ends), cond, torch.cat(kls, 1).double().cpu())


def _objective(
    gate: Gate,
    parts: Sequence[FlowModel],
    merged: _Paths,
    others: Sequence[_Paths],
    reward: Tensor | None,
) -> Estimate:
    """The operator's objective; terms on one set of samples are averaged together."""
    weights = torch.tensor(gate.weights, dtype=torch.float64)[:, None]
    own = torch.zeros(merged.kls.shape[1], dtype=torch.float64) if reward is None else reward
    if isinstance(gate, Contrast):
        odds = _odds(gate, parts).value(merged.ends, merged.cond).double().cpu()
        return Estimate.of(own + gate.total * (odds - merged.kls[0]))
    if isinstance(gate, Union):
        losses = [Estimate.of(w * o.kls[0]) for w, o in zip(gate.weights, others, strict=True)]
        return _less(Estimate.of(own), losses)
    if isinstance(gate, Interpolation):
        moved = Empirical(merged.ends)
        costs = [Wasserstein(Empirical(o.ends), gate.power, gate.metric).value(moved)
                 for o in others]  # fmt: skip
        losses = [Estimate(w * c.value, w * c.standard_error, c.count)
                  for w, c in zip(gate.weights, costs, strict=True)]  # fmt: skip
        return _less(Estimate.of(own), losses)
    return Estimate.of(own - (weights * merged.kls).sum(0))


def _less(gain: Estimate, losses: Sequence[Estimate]) -> Estimate:
    """A difference of independent estimates."""
    error = math.hypot(gain.standard_error, *(each.standard_error for each in losses))
    return Estimate(gain.value - sum(each.value for each in losses), error, gain.count)


def _odds(gate: Contrast, parts: Sequence[FlowModel]) -> Odds:
    """log of the factor of a contrast, by the flows' ODEs."""
    few = math.prod(parts[0].space.event) <= EXACT_TRACE
    own, other = (
        Likelihood(part, trace="exact" if few else "hutchinson", probes=1 if few else 4)
        for part in parts
    )
    return gate.odds(own, other)
