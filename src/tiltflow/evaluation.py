"""Measure models: rewards, tails, distance, achieved tilt, diversity; all with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.errors import CapabilityError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.metrics import left_cvar, reward, right_cvar, shares
from tiltflow.metrics.molecules import molecule_report
from tiltflow.molecules import Molecules
from tiltflow.potential import Potential
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.sample import Sampler, step_kl
from tiltflow.seed import Seed
from tiltflow.solvers.weighted_bank import groups_of
from tiltflow.types import Cond, Conditions, Estimate, drawn_cond, joined_cond

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
ENTROPY_SAMPLES = 2000
"""Nearest neighbours are searched among this many samples at most (quadratic memory)."""


@final
@dataclass(frozen=True)
class Drawn:
    """Samples of one model and what was measured on each of them.

    Args:
        points: (N, *event).
        rewards: (N,).
        judged: by judge, (N,).
        kl: (N,), sum of the KLs of the steps along the path, against the pre-trained model.
        log_ratio: (N,), log dP / dP_pretrained along the path.
        path_ends: (N, *event), ends of the paths that ``kl`` and ``log_ratio`` belong to.
        path_rewards: (N,), rewards of ``path_ends``.
        cond: conditions of ``points`` and of ``path_ends``.
    """

    points: Tensor
    rewards: Tensor
    judged: Mapping[str, Tensor]
    kl: Tensor
    log_ratio: Tensor
    path_ends: Tensor
    path_rewards: Tensor
    cond: Cond | None = None


def draw(
    model: FlowModel,
    pretrained: FlowModel,
    reward_of: Potential,
    judges: Mapping[str, Potential],
    *,
    sampler: Sampler,
    path_sampler: Sampler,
    count: int,
    seed: Seed,
    conditions: Conditions | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Drawn:
    """Sample a model and measure each sample.

    Every model that is compared gets the same ``seed``, hence the same noise and conditions:
    their differences are then far better known than their values.

    The path laws of ``path_sampler`` give ``kl``; it is ``sampler`` itself, unless that integrates
    an ODE, which has no path law.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    size, conds = min(sampler.batch_size, 1024), list[Cond]()
    for batch, start in enumerate(range(0, count, size)):
        number, stream = min(size, count - start), seed.child("batch", batch)
        cond = drawn_cond(conditions, number, stream)
        path = path_sampler.simulate(model, number, seed=stream, cond=cond)
        kl, ratio = step_kl(model, pretrained, path_sampler.kernel, path, own=True)
        ends = path.end
        if sampler != path_sampler:
            ends = sampler.simulate(model, number, seed=stream, cond=cond).end
        parts.append((ends, kl, ratio, path.end))
        conds += [] if cond is None else [cond]
        on_batch(start + number)
    points, kl, ratio, path_ends = (torch.cat(column) for column in zip(*parts, strict=True))
    cond = joined_cond(conds) if conds else None
    judged = {name: judge.value(points, cond).cpu() for name, judge in judges.items()}
    return Drawn(
        points, reward_of.value(points, cond).cpu(), judged, kl.double().cpu(),
        ratio.double().cpu(), path_ends, reward_of.value(path_ends, cond).cpu(), cond,
    )  # fmt: skip


def measure(drawn: Drawn, levels: Sequence[float]) -> dict[str, Estimate]:
    """Numbers of one model, by metric name: ``reward.*``, ``tails.*``, ``path_kl``, judges."""
    out = {}
    for name, estimate in reward(drawn.rewards, levels=QUANTILES).items():
        out[f"reward.{'median' if name == 'q50' else name}"] = estimate
    out["reward.std"] = _std(drawn.rewards)
    for i, level in enumerate(levels):
        left, right = left_cvar(drawn.rewards, level), right_cvar(drawn.rewards, 1 - level)
        out[f"tails.left_cvar_{level:g}"], out[f"tails.right_cvar_{1 - level:g}"] = left, right
        if i == 0:  # the first level is the one that is meant when none is named
            out["tails.left_cvar"], out["tails.right_cvar"] = left, right
    for name, values in drawn.judged.items():
        out[f"{name}.mean"] = Estimate.of(values)
        out[f"{name}.left_cvar"] = left_cvar(values, levels[0])
    out["path_kl"] = Estimate.of(drawn.kl)
    return out


def _std(values: Tensor) -> Estimate:
    """Standard deviation; its error by the delta method, from the fourth moment."""
    v = values.double()
    centred = (v - v.mean()) ** 2
    std, n = float(centred.mean().sqrt()), len(v)
    return Estimate(std, float(centred.std()) / (2 * max(std, 1e-300) * math.sqrt(n)), n)


def compare(drawn: Drawn, before: Drawn, levels: Sequence[float]) -> dict[str, Estimate]:
    """Differences from the pre-trained model, sample by sample with common random numbers.

    Without ``entropy_change`` for conditional models: states of several conditions, such as
    molecules of several sizes, have no common distance.
    """
    gain = Estimate.of(drawn.rewards.double() - before.rewards.double())
    out = {"gain.mean": gain}
    if drawn.cond is None:
        out["entropy_change"] = entropy_change(drawn.points, before.points)
    out |= regression("reward_tilt", drawn.log_ratio, drawn.path_rewards, drawn.cond)
    level = levels[0]
    tuned, pre = left_cvar(drawn.rewards, level), left_cvar(before.rewards, level)
    influence = _shortfall(before.rewards, level) - _shortfall(drawn.rewards, level)
    error = float(influence.std()) / math.sqrt(len(influence))
    out["gain.left_cvar"] = Estimate(tuned.value - pre.value, error, tuned.count)
    median = float(before.rewards.median())
    distance = median - pre.value
    if distance > 0:
        out["gain.tail_to_median"] = Estimate(
            (tuned.value - pre.value) / distance, error / distance, tuned.count
        )
    return out


def _shortfall(values: Tensor, level: float) -> Tensor:
    v = values.double()
    return (torch.quantile(v, level) - v).clamp(min=0) / level


def class_shares(labels: Tensor, names: Sequence[str]) -> dict[str, Estimate]:
    """Share of each class, by the class's name."""
    found = shares(labels.cpu(), len(names))
    return {name: found[str(i)] for i, name in enumerate(names)}


def of_molecules(
    molecules: Molecules, energies: SinglePoints | None = None
) -> tuple[dict[str, Estimate], str]:
    """``metrics.molecule_report`` of samples, as ``molecules.*``, or none and why.

    A finished run is not given up because RDKit is missing, or an element unknown to the metrics.
    """
    try:
        found = molecule_report(molecules, points=energies)
    except (CapabilityError, UnsupportedError) as error:
        return {}, str(error)
    return {f"molecules.{name}": estimate for name, estimate in found.items()}, ""


def tilt(drawn: Drawn, target: Potential) -> dict[str, Estimate]:
    """How well the tuned law is the tilt that the objective's optimum would be.

    At the optimum, log dP / dP_pretrained = target(X_1) + const along every path, so that the
    regression of the log-ratio on the target over the tuned model's paths has slope 1 and R^2 1,
    and the weights exp(target - log-ratio), which would turn its samples into the optimum's, are
    all equal. Of a conditional model the constant depends on the condition.

    Returns:
        ``tilt.slope``, ``tilt.r2`` and, without conditions, ``tilt.ess``, the effective sample
        size of those weights as a share of the samples.
    """
    phi = target.value(drawn.path_ends, drawn.cond).double().cpu()
    if drawn.cond is not None:
        return regression("tilt", drawn.log_ratio, phi, drawn.cond)
    weights = torch.softmax(phi - drawn.log_ratio, 0)
    ess = Estimate(float(1 / (weights**2).sum()) / len(phi), 0.0, len(phi))
    return {**regression("tilt", drawn.log_ratio, phi), "tilt.ess": ess}


def regression(name: str, y: Tensor, x: Tensor, cond: Cond | None = None) -> dict[str, Estimate]:
    """Slope and R^2 of y on x (N,), as ``<name>.slope`` and ``<name>.r2``; empty if x is constant.

    The intercept is free, with ``cond`` one for each distinct condition. The slope's error is
    White's, because residuals grow with the tilt.
    """
    group = groups_of(cond, len(x))[0]
    x, y = _centred(x.double(), group), _centred(y.double(), group)
    n, power = len(x), float((x**2).sum())
    if power < 1e-12 * n:
        return {}
    slope = float((x * y).sum()) / power
    residual = y - slope * x
    error = math.sqrt(float((x**2 * residual**2).sum())) / power
    r2 = 1 - float((residual**2).sum()) / max(float((y**2).sum()), 1e-300)
    r2_error = 2 * math.sqrt(max(r2, 0.0)) * (1 - r2) / math.sqrt(n)
    return {f"{name}.slope": Estimate(slope, error, n), f"{name}.r2": Estimate(r2, r2_error, n)}


def _centred(values: Tensor, group: Tensor) -> Tensor:
    """Less the mean of each group."""
    sums = torch.zeros(int(group.max()) + 1, dtype=values.dtype).index_add(0, group, values)
    return values - (sums / torch.bincount(group))[group]


def entropy_change(after: Tensor, before: Tensor, neighbour: int = 3) -> Estimate:
    """Difference of Kozachenko-Leonenko estimates of the entropy, in nats::

        H = d <log distance to the k-th neighbour> + terms of n, d and k

    With equal n, the other terms cancel in the difference. In many dimensions each estimate is
    biased; the bias is similar on both sides, so read the sign and the order of magnitude.
    The standard error takes the distances as independent and does not contain the bias.
    """
    n = min(len(after), len(before), ENTROPY_SAMPLES)
    logs = []
    for points in (after, before):
        flat = points[:n].flatten(1).double()
        distances = torch.cdist(flat, flat)
        nearest = distances.kthvalue(neighbour + 1, 1).values  # the first is the point itself
        logs.append(flat.shape[1] * nearest.clamp(min=1e-300).log())
    change = float(logs[0].mean() - logs[1].mean())
    return Estimate(change, math.sqrt(float(logs[0].var() + logs[1].var()) / n), n)


def tilt_kl(rewards: Tensor, rate: float) -> float:
    """KL(p* || p) of p* = p exp(rate r) / Z, from rewards of samples of p (self-normalised)."""
    scaled = rate * rewards.double()
    log_z = torch.logsumexp(scaled, 0) - math.log(len(scaled))
    return float((torch.softmax(scaled, 0) * scaled).sum() - log_z)


def matching_rate(rewards: Tensor, kl: float) -> float:
    """The rate whose exact tilt is ``kl`` away, by bisection; the KL grows with the rate.

    N samples cannot show a KL near log N (all weight is then on a few of them): the search stops
    at log(N / 100). It also stops where a bounded reward is used up: within a fiftieth of its
    standard deviation from the best sample, more KL buys nothing, at enormous rates.
    """
    r = rewards.double()
    scale, best = max(float(r.std()), 1e-300), float(r.max())
    limit = min(max(kl, 0.0), math.log(len(r) / 100))

    def too_far(rate: float) -> bool:
        mean = float((torch.softmax(rate * r, 0) * r).sum())
        return tilt_kl(r, rate) >= limit or best - mean <= 0.02 * scale

    low, high = 0.0, 1.0 / scale
    while not too_far(high):
        high *= 2
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if too_far(middle) else (middle, high)
    return 0.5 * (low + high)
