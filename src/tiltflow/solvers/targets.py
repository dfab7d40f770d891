"""What the tuned end point is regressed on: the lean adjoint, and the values of whole paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.solvers.lean_adjoint import Rollout, Steps
from tiltflow.types import Cond, expand_as, index_cond


@final
@dataclass(frozen=True)
class Points:
    """A regression problem for the module that is trained.

    The loss of a point is ``weight |output - target|^2`` in nats, with x (N, *event), t (N,),
    target (N, *event) in the units of the module's output, and weight (N,).
    """

    x: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    frozen: Tensor
    cond: Cond | None = None

    def __getitem__(self, index: Tensor) -> Points:
        return Points(
            self.x[index], self.t[index], self.target[index], self.weight[index],
            self.frozen[index], index_cond(self.cond, index),
        )  # fmt: skip

    @staticmethod
    def of(
        path: Rollout, endpoints: Tensor, steps: Steps, k: Tensor, b: Tensor, shared: bool
    ) -> Points:
        """The points (k, b) of a roll-out from target end points (K, B, *event).

        endpoint = base + gain * output, with the frozen end point and beta^2 for a correction
        (``shared`` network), with on_x x and on_output for a network that is trained itself.
        """
        x = path.states[k, b]
        gain = (steps.beta2 if shared else steps.on_output)[k]
        base = path.frozen[k, b] if shared else expand_as(steps.on_x[k], x) * x
        target = (endpoints[k, b] - base) / expand_as(gain, x)
        weight = steps.weight[k] * gain**2
        if path.importance is not None:
            weight = weight * path.importance[b]
        frozen, cond = path.frozen[k, b], index_cond(path.cond, b)
        return Points(x, steps.t[k], target, weight, frozen, cond)


def adjoint_target(path: Rollout, steps: Steps, clip: float | None) -> tuple[Tensor, float]:
    """Adjoint Matching's target: reference endpoint + (variance / on_endpoint) a_{k+1}.

    It is the end point of ``reference.tilted(a_{k+1})``, shortened by ``clip`` (see
    ``shortened``).

    Returns:
        targets (K, B, *event), and the fraction of trajectories with a reward gradient.
    """
    c, adjoint = steps.coefficients, path.adjoints[1:]
    gain = c.variance / c.on_endpoint
    shift = shortened(expand_as(gain, adjoint) * adjoint, path.states[-1] - path.reference, clip)
    active = adjoint[-1].flatten(1).any(1).float()
    return path.reference + shift, float(weighted_mean(active, path.importance))


def weighted_mean(values: Tensor, importance: Tensor | None) -> Tensor:
    """Mean over trajectories, (B,) -> (), each for what it stands for."""
    return (values if importance is None else values * importance).mean()


def shortened(shift: Tensor, actual: Tensor, clip: float | None) -> Tensor:
    """``shift`` (K, B, *event), at most ``clip`` times as long as ``actual`` typically is.

    ``actual`` is where paths ended, seen from the predicted end point. The true shift of a
    conditional mean is about that long at most, whereas single adjoints are heavy-tailed (they
    grow wherever paths part) and so are single paths. The median over the batch, step by step, is
    the yardstick, because outliers do not move it and a reward that is flat for most samples does
    not shrink it.
    """
    if clip is None:
        return shift
    typical = actual.flatten(2).norm(dim=2).median(1, keepdim=True).values
    length = shift.flatten(2).norm(dim=2).clamp(min=1e-30)
    return shift * expand_as((clip * typical / length).clamp(max=1.0), shift)


@dataclass(frozen=True)
class Weights:
    """Importance weights of trajectories under the optimal path law, tempered.

    ``weight`` (B,) has mean one over what the trajectories stand for, and is proportional to
    exp(temper * log_weight); ``temper`` is the largest power, at most one, that keeps the
    effective sample size above its bound.
    """

    weight: Tensor
    temper: float
    effective: float


def path_weights(
    log_weight: Tensor, min_effective: float, importance: Tensor | None = None
) -> Weights:
    """Weights of dP*/dP_tuned ~ exp(phi - log dP_tuned / dP_reference), (B,)."""
    log_weight = (log_weight - log_weight.max()).double()
    base = torch.ones_like(log_weight) if importance is None else importance.double()

    def effective(power: float) -> float:
        w = base * (power * log_weight).exp()
        return float(w.sum() ** 2 / (w**2).sum() * (base**2).mean()) / len(w)

    low, high = 0.0, 1.0
    full = effective(1.0)
    if full < min_effective:
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if effective(middle) >= min_effective else (low, middle)
        high = low
    weight = (high * log_weight).exp()
    return Weights((weight / (base * weight).mean()).float(), high, full)


def value_target(path: Rollout, weights: Weights, actual: Tensor | None = None) -> Tensor:
    """A second target with the same fixed point, from values instead of gradients::

        e_tuned(x_k) + (w - 1)_+ (x_K - e_tuned(x_k))

    At the optimum the path weights w are one, and nothing moves: the noise of this target
    vanishes with the spread of w. Away from it, end points are pulled to where the good paths
    went. This credits a mode for its value at once, where adjoints see only slopes; it needs a
    terminal reward, because only then X_1 given X_t is that of a flow (methods, section 1.5).

    Bad paths do not push. With (w - 1) in full the target would be unbiased for a consistent
    model, E[X_1 - e_tuned | x] = 0; but a model in training is not consistent, and where
    E[w | x] < 1 the error of its end points would grow by 1 - E[w | x] in every round. Positive
    coefficients only ever restore consistency.

    Args:
        path: on-policy trajectories.
        weights: of the trajectories.
        actual: ``actual_shift`` of the path, (K, B, *event); not clipped by default.
    """
    actual = actual_shift(path, None) if actual is None else actual
    return path.tuned + expand_as((weights.weight - 1).clamp(min=0), actual[0]) * actual


def actual_shift(path: Rollout, clip: float | None) -> Tensor:
    """Where paths ended, seen from where the tuned model expected them to, (K, B, *event)."""
    actual = path.states[-1] - path.tuned
    return shortened(actual, actual, clip)


BIAS_WEIGHT = 30.0
"""How much more a squared bias counts than a variance, which averages out over roll-outs."""

DOUBT = 0.5
"""What values lack is held against them only as far as it exceeds this part of what adjoints
lack: between separated modes both lack something, but adjoints everything."""

CARRIED = 1 / 8
"""Fraction of the trajectories that carry their adjoint where values say nearly everything."""


@final
class Mixer:
    """Mixes the two targets step by step, for the least mean squared error.

    The noise of a target at step k is the mean of ``|target - e_tuned|^2``, averaged over
    roll-outs. Against both stands a third estimate of the shift to the optimum, noisy but
    unbiased for a consistent model, (w - 1)(X_1 - e_tuned) (with both signs, unlike the value
    target). What a target lacks is the squared difference of the means; the share of the adjoint
    is then::

        missing = 30 (lack_value - lack_adjoint / 2)_+
        (noise_value + missing) / (noise_value + missing + noise_adjoint + 30 lack_adjoint)

    A reward that is flat where the samples are has adjoints near zero: no noise, and no news.
    Without their lack, values would be ignored exactly where they are needed: between separated
    modes. Where a tail is to be emptied, on the other hand, values only say by a trifle that all
    else is good, whereas adjoints are exact: no noise again, and no news.
    """

    def __init__(self, memory: float = 0.9) -> None:
        self.memory = memory
        self.noise = torch.empty(0)

    def mix(
        self, path: Rollout, adjoint: Tensor, weights: Weights, clip: float | None = None
    ) -> Tensor:
        """The mixture (K, B, *event) of ``adjoint_target`` and ``value_target``.

        A value target of tempered weights goes only the part ``temper`` of the way.
        """
        actual, temper = actual_shift(path, clip), max(weights.temper, 1e-3)
        value = value_target(path, weights, actual)
        shifts = (
            adjoint - path.tuned,
            (value - path.tuned) / temper,
            expand_as((weights.weight - 1) / temper, actual[0]) * actual,
            path.states[:-1],
            expand_as(weights.weight.expand(adjoint.shape[:2]), adjoint) * (adjoint - path.tuned),
        )
        carried = path.carried
        first = 0 if carried is None else carried.first
        stands = path.importance
        seen = _statistics([shift[first:] for shift in shifts], stands)
        if carried is not None:
            few = None if stands is None else stands[carried.index]
            early = _statistics([shift[:first, carried.index] for shift in shifts], few)
            seen = torch.cat([early, seen], 1)
        new = not self.noise.numel()
        self.noise = seen if new else torch.lerp(seen, self.noise, self.memory)
        share = self.share[:, None].expand(adjoint.shape[:2])
        if carried is not None:  # the few that know their adjoint speak for all
            known, fraction = carried.index, len(carried.index) / adjoint.shape[1]
            spoken = torch.zeros_like(share[:first])
            spoken[:, known] = (share[:first, known] / fraction).clamp(max=1.0)
            share = torch.cat([spoken, share[first:]])
        return torch.lerp(value, adjoint, expand_as(share, adjoint))

    @property
    def share(self) -> Tensor:
        """Share of the adjoint at each step, (K,)."""
        by_adjoint, by_value, lack, value_lack = self.noise
        lack = lack.clamp(min=0)
        by_value = by_value + BIAS_WEIGHT * (value_lack - DOUBT * lack).clamp(min=0)
        share: Tensor = by_value / (by_adjoint + by_value + BIAS_WEIGHT * lack).clamp(min=1e-30)
        return share

    def carry(self) -> tuple[int, float]:
        """Before which step only a fraction of the trajectories needs its adjoint, and which.

        Where the share is below an eighth, an eighth of the trajectories can bear it.
        """
        if not self.noise.numel():
            return 0, 1.0
        wanted = (self.share >= CARRIED).nonzero()
        return (int(wanted[0]) if len(wanted) else self.noise.shape[1] - 1), CARRIED


def _statistics(shifts: Sequence[Tensor], importance: Tensor | None) -> Tensor:
    """Mean squares of two shifts, and what each lacks of a third; (4, K).

    The adjoint's shift is weighted with the path weights, as the third, w (X_1 - e), is.
    """
    to_adjoint, to_value, to_optimum, x, weighted = shifts
    ones = x.new_ones(x.shape[1]) if importance is None else importance
    squares = [
        (shift.flatten(2).square().sum(2) * ones).mean(1) for shift in (to_adjoint, to_value)
    ]
    stands = expand_as(ones.expand(x.shape[:2]), x)
    lacks = [_disagreement(stands * (shift - to_optimum), x) for shift in (weighted, to_value)]
    return torch.stack([*squares, *lacks])


def _disagreement(difference: Tensor, x: Tensor) -> Tensor:
    """Squared mean of the difference of two targets, beyond its noise, (K,).

    Each coordinate is compared on average, and weighted with its own state, so that symmetric
    re-weightings count. An unbiased estimate: about zero where the targets agree.
    """
    difference, x = difference.flatten(2), x.flatten(2)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp(min=1e-6)
    total = difference.new_zeros(len(x))
    for weighted in (difference, difference * x):
        excess = weighted.mean(1).square() - weighted.var(1) / weighted.shape[1]
        total = total + excess.sum(1)
    return total


def choose_steps(
    num_steps: int, count: int, late: float, early: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which (step, trajectory) pairs enter the loss: all late steps, some random earlier ones.

    Args:
        num_steps: noisy steps, numbered from the noise end.
        count: trajectories.
        late: fraction of the steps, nearest to the data, that always enter.
        early: fraction of the others, drawn for each trajectory.
        generator: of the draw and of the final shuffle.

    Returns:
        steps and trajectories, both (N,), in random order.
    """
    num_late = min(num_steps, math.ceil(late * num_steps))
    num_early = round(early * (num_steps - num_late))
    score = torch.rand(count, num_steps, generator=generator, device=generator.device)
    score[:, num_steps - num_late :] = 2.0
    k = score.topk(num_late + num_early, dim=1).indices.flatten()
    b = torch.arange(count, device=k.device).repeat_interleave(num_late + num_early)
    order = torch.randperm(len(k), generator=generator, device=generator.device)
    return k[order], b[order]
