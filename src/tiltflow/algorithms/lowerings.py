"""How a gate becomes a model: one control problem, or one regression on merged samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from tiltflow.algorithms.averaging import Disagreement, averaged, require_alike
from tiltflow.context import Context
from tiltflow.delta import Correction
from tiltflow.density import Bank, Empirical
from tiltflow.divergences import Wasserstein
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, freeze
from tiltflow.kernel import LinearKernel
from tiltflow.matching import fit_flow
from tiltflow.operators import (
    Contrast,
    Gate,
    Interpolation,
    Intersection,
    Odds,
    Union,
    guided_union,
)
from tiltflow.potential import ZERO, Potential
from tiltflow.problem import PathProblem
from tiltflow.ratio import Likelihood
from tiltflow.sample import Sampler, calibrated
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training
from tiltflow.types import Access, expand_as

PULLS = 30
"""Steps of the ascent that moves points of a barycentre towards a reward."""

APART = 5.0
"""-log of the overlap, int prod_i p_i^{w_i}, in nats, from which on parts hardly meet."""


@final
@dataclass(frozen=True, kw_only=True)
class Merging:
    """Settings of ``merge``.

    Args:
        solver: of intersections.
        sampler: of the parts' samples.
        training: of regressions on merged samples (``matching.fit_flow``).
        bank_size: merged samples.
        batch_size: of the regressions.
        chunk: samples of each part between which transport is solved at a time.
        transports: rounds of the barycentre's fixed point, y <- sum_i w_i T_i(y), if there are
            more than two parts or a reward; two parts need one.
        likelihood_steps: of the ODE that gives log-densities of parts.
        until: time until which an intersection's parts are compared (``one_shot``). Deviation:
            the running cost has no such end, but learned velocities differ by their errors too,
            which it divides by the noise that is left. Exact models lose next to nothing.
    """

    solver: AdjointMatching = field(default_factory=AdjointMatching)
    sampler: Sampler = field(default_factory=Sampler)
    training: Training = field(
        default_factory=lambda: Training(num_updates=4000, learning_rate=2e-3, ema=0.999)
    )
    bank_size: int = 20_000
    batch_size: int = 512
    chunk: int = 1000
    transports: int = 10
    likelihood_steps: int = 60
    until: float = 0.9

    def __post_init__(self) -> None:
        for name in ("bank_size", "batch_size", "chunk", "transports", "likelihood_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Merging: {name}={getattr(self, name)} must be at least 1.")


@final
@dataclass(frozen=True)
class Lowered:
    """A gate's model, and what is known about it."""

    model: FlowModel
    lowering: str
    stats: dict[str, float]


REWARDED: dict[str, Access] = {
    "one_shot": Access.GRAD, "weighted": Access.VALUE, "distilled": Access.VALUE,
    "transported": Access.BOTH, "thinned": Access.VALUE,
}  # fmt: skip
"""What each lowering needs of a gate's reward."""

Lowering = Callable[[Gate, Sequence[FlowModel], FlowModel, Merging, Context], Lowered]
"""(gate, models of its parts, start of the training, settings, context) -> model."""


def one_shot(
    gate: Gate, models: Sequence[FlowModel], start: FlowModel, settings: Merging, context: Context
) -> Lowered:
    """An intersection as one control problem (methods, section 5.6 C)::

        reference  the average of the models
        running    -sum_i w_i |m_i - mbar|^2 / (2 v)          where they disagree
        terminal   f / A

    The product of path laws that share one noising kernel is the path law of the geometric mean,
    so that the optimum is a flow although the problem has a running reward.
    """
    require_alike(models)
    correction = start.delta.null() if isinstance(start.delta, Correction) else None
    reference = freeze(averaged(models, gate.shares, predicts=start.predicts, delta=correction))
    reference = calibrated(
        reference, seed=context.seed.child("calibration"),
        num_steps=settings.solver.sampler.num_steps,
    )  # fmt: skip
    kernel = settings.solver.sampler.kernel.resolved(reference)
    if not isinstance(kernel, LinearKernel):
        raise UnsupportedError(f"Merging: {type(kernel).__name__} has no steps of one evaluation.")
    running = Disagreement(tuple(models), gate.shares, kernel, settings.until)
    terminal = ZERO if gate.reward is None else (1 / gate.total) * gate.reward
    init = None if correction is not None else start.with_moments(reference.moments or ((), ()))
    solution = settings.solver.solve_path(
        PathProblem(reference, terminal, running), context, init=init
    )
    # The one problem with a running reward whose optimum is a flow, see above.
    model = solution.model.model
    stats = dict(solution.stats)
    if gate.reward is None:
        stats["apart"] = _apart(model, running, settings, context) + stats["path_kl"]
        _warn_if_apart(gate, stats["apart"])
    return Lowered(model, "one_shot", stats)


def _apart(model: FlowModel, running: Disagreement, settings: Merging, context: Context) -> float:
    """E[sum_k c_k] of the merged model's paths: with its path KL, -log of the overlap."""
    sampler, count = settings.solver.sampler, settings.solver.num_evaluate
    path = sampler.simulate(model, count, seed=context.seed.child("apart"))
    times, total = sampler.times, torch.zeros(count)
    for k, x in enumerate(path.states[:-1]):
        t, s = (times[i].to(x).expand(count) for i in (k, k + 1))
        total = total - running.value(x, t, s).cpu()
    return float(total.mean())


def _warn_if_apart(gate: Gate, apart: float) -> None:
    if apart > APART:
        warnings.warn(
            f"merge: the parts of {gate} overlap by only exp(-{apart:.1f}): their intersection is "
            "hardly likely under any of them, and its samples may be of neither.",
            RuntimeWarning, stacklevel=4,
        )  # fmt: skip


def distilled(
    gate: Gate, models: Sequence[FlowModel], start: FlowModel, settings: Merging, context: Context
) -> Lowered:
    """A union: flow matching on samples of the mixture, the exact minimiser of the forward KL,
    with weights A / (nu - f) where there is a reward (methods, section 5.7)."""
    bank = Bank.equal(_mixture(gate, models, settings, context))
    if gate.reward is not None:
        bank = guided_union(bank, gate.reward, gate.total)
    return _fitted(bank, "distilled", start, settings, context)


def _mixture(
    gate: Gate, models: Sequence[FlowModel], settings: Merging, context: Context
) -> Tensor:
    """Samples of sum_i w_i p_i, (N, *event)."""
    counts = _counts(settings.bank_size, gate.shares)
    return torch.cat(
        [
            settings.sampler.sample(model, count, seed=context.seed.child("part", i))
            for i, (model, count) in enumerate(zip(models, counts, strict=True))
        ]
    )


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


def transported(
    gate: Gate, models: Sequence[FlowModel], start: FlowModel, settings: Merging, context: Context
) -> Lowered:
    """An interpolation: flow matching on points of the W_2 barycentre (methods, section 5.2)::

        y  <-  argmax_z  f(z) / A - |z - m|^2,      m = sum_i w_i T_i(y)

    with T_i the optimal transport from the points y to samples of part i, chunk by chunk; without
    a reward y <- m. Chunks are finite, which smooths the result a little.
    """
    points = []
    for c, first in enumerate(range(0, settings.bank_size, settings.chunk)):
        size = min(settings.chunk, settings.bank_size - first)
        samples = [
            settings.sampler.sample(model, size, seed=context.seed.child("chunk", c, i))
            for i, model in enumerate(models)
        ]
        points.append(_barycentre(gate, samples, settings))
    return _fitted(Bank.equal(torch.cat(points)), "transported", start, settings, context)


def _barycentre(gate: Gate, samples: Sequence[Tensor], settings: Merging) -> Tensor:
    """Points whose law is the barycentre of those of ``samples``, (N, *event) each."""
    heaviest = max(range(len(samples)), key=lambda i: gate.shares[i])
    y = samples[heaviest].double()
    penalties = [Wasserstein(Empirical(x.double()), power=2) for x in samples]
    for _ in range(1 if len(samples) == 2 and gate.reward is None else settings.transports):
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


def thinned_out(
    gate: Gate, models: Sequence[FlowModel], start: FlowModel, settings: Merging, context: Context
) -> Lowered:
    """A contrast: flow matching on samples of the first part, weighted with the bounded ratio of
    densities and exp(f / A); the densities by the flows' ODEs."""
    points = settings.sampler.sample(
        models[0], settings.bank_size, seed=context.seed.child("part", 0)
    )
    own, other = (Likelihood(model, settings.likelihood_steps) for model in models)
    odds = Odds(own, other, math.log(gate.weights[1] / gate.weights[0]))
    log_weights = odds.value(points).double()
    if gate.reward is not None:
        log_weights = log_weights + gate.reward.value(points).double() / gate.total
    bank = Bank(points, log_weights.softmax(0).to(points))
    return _fitted(bank, "thinned", start, settings, context)


def geometric(
    gate: Gate, models: Sequence[FlowModel], start: FlowModel, settings: Merging, context: Context
) -> Lowered:
    """An intersection by weights: flow matching on samples of the mixture of the parts, weighted
    with prod_i p_i^{w_i} e^{f / A} / pbar; the densities by the flows' ODEs. Exact where the bank
    carries it, also for rewards without gradient."""
    points = _mixture(gate, models, settings, context)
    logs = torch.stack(
        [Likelihood(model, settings.likelihood_steps).value(points).double() for model in models]
    )
    shares = logs.new_tensor(gate.shares)[:, None]
    log_weights = (shares * logs).sum(0) - (shares.log() + logs).logsumexp(0)
    known = {}
    if gate.reward is None:
        known["apart"] = -float(log_weights.logsumexp(0) - math.log(len(points)))
        _warn_if_apart(gate, known["apart"])
    else:
        log_weights = log_weights + gate.reward.value(points).double() / gate.total
    bank = Bank(points, log_weights.softmax(0).to(points))
    lowered = _fitted(bank, "weighted", start, settings, context)
    return replace(lowered, stats={**lowered.stats, **known})


def _fitted(
    bank: Bank, lowering: str, start: FlowModel, settings: Merging, context: Context
) -> Lowered:
    """``start``, refitted to a bank."""
    model = start.clone()
    stats = fit_flow(
        model, bank, settings.training, context.child("fit"), batch_size=settings.batch_size
    )
    model = calibrated(freeze(model), seed=context.seed.child("moments"))
    return Lowered(model, lowering, dict(stats))


LOWERINGS: dict[type[Gate], dict[str, Lowering]] = {
    Intersection: {"one_shot": one_shot, "weighted": geometric},
    Union: {"distilled": distilled},
    Interpolation: {"transported": transported},
    Contrast: {"thinned": thinned_out},
}
"""By gate; the first is the default."""
