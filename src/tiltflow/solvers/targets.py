"""What the tuned end point is regressed on: the lean adjoint, and the values of whole paths."""

from __future__ import annotations

import math
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
    cond: Cond | None = None

    def __getitem__(self, index: Tensor) -> Points:
        return Points(
            self.x[index], self.t[index], self.target[index], self.weight[index],
            index_cond(self.cond, index),
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
        return Points(x, steps.t[k], target, steps.weight[k] * gain**2, index_cond(path.cond, b))


def adjoint_target(path: Rollout, steps: Steps, clip: float | None) -> tuple[Tensor, float]:
    """Adjoint Matching's target: reference endpoint + (variance / on_endpoint) a_{k+1}.

    It is the end point of ``reference.tilted(a_{k+1})``. Samples whose adjoint is longer than
    ``clip`` times the median of the active (non-zero) ones at that step are shortened to it.

    Returns:
        targets (K, B, *event), and the fraction of trajectories with a reward gradient.
    """
    adjoint = path.adjoints[1:]
    norm = adjoint.flatten(2).norm(dim=2)
    active = norm > 0
    if clip is not None:
        typical = torch.where(active, norm, torch.nan).nanmedian(1, keepdim=True).values
        shrink = (clip * typical.nan_to_num(0.0) / norm.clamp(min=1e-30)).clamp(max=1.0)
        adjoint = adjoint * _over(shrink, adjoint)
    c = steps.coefficients
    gain = c.variance / c.on_endpoint
    return path.reference + _over(gain, adjoint) * adjoint, float(active[-1].float().mean())


@dataclass(frozen=True)
class Weights:
    """Importance weights of trajectories under the optimal path law, tempered.

    ``weight`` (B,) has mean one and is proportional to exp(temper * log_weight); ``temper`` is the
    largest power, at most one, that keeps the effective sample size above its bound.
    """

    weight: Tensor
    temper: float
    effective: float


def path_weights(log_weight: Tensor, min_effective: float) -> Weights:
    """Weights of dP*/dP_tuned ~ exp(phi - log dP_tuned / dP_reference), (B,)."""
    log_weight = (log_weight - log_weight.max()).double()

    def effective(power: float) -> float:
        w = torch.softmax(power * log_weight, 0)
        return float(1 / (w**2).sum()) / len(w)

    low, high = 0.0, 1.0
    full = effective(1.0)
    if full < min_effective:
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if effective(middle) >= min_effective else (low, middle)
        high = low
    weight = torch.softmax(high * log_weight, 0) * len(log_weight)
    return Weights(weight.float(), high, full)


def value_target(path: Rollout, weights: Weights) -> Tensor:
    """A second target with the same fixed point, from values instead of gradients.

    At the optimum the path weights w are constant. Away from it, E[w (X_1 - e(x_k)) | x_k] = 0
    defines the optimal end point e*, and E[X_1 - e_tuned(x_k) | x_k] = 0 holds on-policy; their
    difference gives, with a noise that vanishes with the spread of w::

        e_tuned + (w - 1) (x_K - e_tuned)          in expectation e_tuned + E[w|x] (e* - e_tuned)

    This credits a mode for its value at once, where adjoints see only slopes; it needs a terminal
    reward, because only then X_1 given X_t is that of a flow (methods, section 1.5).
    """
    change = weights.weight - 1
    return path.tuned + _over(change.expand(path.tuned.shape[:2]), path.tuned) * (
        path.states[-1] - path.tuned
    )


@final
class Mixer:
    """Mixes the two targets step by step in inverse proportion to their noise.

    The noise of a target at step k is the mean of ``|target - e_tuned|^2``, averaged over
    roll-outs; the share of the adjoint is ``noise_value / (noise_adjoint + noise_value)``, at
    least ``floor``. The adjoint target is anchored at the reference; this keeps the other one,
    which is relative to the tuned model, from drifting.

    A reward that is flat where the samples are has adjoints near zero: no noise, and no news. The
    share is therefore also multiplied by ``noise_adjoint / (noise_adjoint + disagreement)``, where
    the disagreement is the squared difference of the means of both targets. Without this, values
    are ignored exactly where they are needed: between separated modes.
    """

    def __init__(self, floor: float, memory: float = 0.9) -> None:
        self.floor, self.memory = floor, memory
        self.noise = torch.empty(0)

    def mix(self, path: Rollout, adjoint: Tensor, weights: Weights) -> Tensor:
        """Targets (K, B, *event) from the adjoint's (K, B, *event) and the path weights."""
        value = value_target(path, weights)
        temper = max(weights.temper, 1e-3)  # the value target goes only that part of the way
        seen = torch.stack([
            _mean_square(adjoint, path.tuned),
            _mean_square(value, path.tuned) / temper**2,
            _disagreement(adjoint - path.tuned, (value - path.tuned) / temper, path.states[:-1]),
        ])  # fmt: skip
        new = not self.noise.numel()
        self.noise = seen if new else torch.lerp(seen, self.noise, self.memory)
        by_adjoint, by_value, bias = self.noise[0], self.noise[1], self.noise[2].clamp(min=0)
        trust = by_adjoint / (by_adjoint + bias).clamp(min=1e-30)
        share = trust * by_value / (by_adjoint + by_value).clamp(min=1e-30)
        share = share.clamp(min=self.floor)[:, None].expand(adjoint.shape[:2])
        # A path that the optimum would hardly take says nothing but "not here": adjoint only.
        share = torch.where(weights.weight < 0.01, torch.ones_like(share), share)
        return torch.lerp(value, adjoint, _over(share, adjoint))


def _disagreement(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """Squared difference of the means of two targets, beyond its noise, (K,).

    Each coordinate is compared on average, and weighted with its own state, so that symmetric
    re-weightings count. An unbiased estimate: about zero where the targets agree.
    """
    difference, x = (first - second).flatten(2), x.flatten(2)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp(min=1e-6)
    total = difference.new_zeros(len(x))
    for weighted in (difference, difference * x):
        excess = weighted.mean(1).square() - weighted.var(1) / weighted.shape[1]
        total = total + excess.sum(1)
    return total


def _mean_square(target: Tensor, tuned: Tensor) -> Tensor:
    return (target - tuned).flatten(2).square().sum(2).mean(1)


def _over(coefficient: Tensor, x: Tensor) -> Tensor:
    """Broadcast (K,) or (K, B) against (K, B, *event)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


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
