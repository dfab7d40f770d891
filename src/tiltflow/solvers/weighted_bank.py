"""Banks of samples with their importance weights under a tilted law."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltflow.errors import UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.potential import Potential
from tiltflow.sample import Sampler, step_kl
from tiltflow.seed import Seed
from tiltflow.solvers.common import effective_size
from tiltflow.types import Cond, Conditions, drawn_cond, index_cond

PATHS = 1024
"""Most paths that are in memory at once."""


@final
@dataclass(frozen=True)
class Samples:
    """Samples X_1 with what is known about each; nothing is normalised.

    Attributes:
        points: (N, *event).
        value: (N,) float64, the terminal potential phi.
        log_base: (N,) float64, log dP_reference / dP_proposal of the path that led there.
        cond: conditions, or ``None``.
        group: (N,) which condition each sample has, 0 to G - 1.
    """

    points: Tensor
    value: Tensor
    log_base: Tensor
    cond: Cond | None
    group: Tensor


@torch.no_grad()
def draw(
    reference: FlowModel,
    other: FlowModel | None,
    terminal: Potential,
    count: int,
    *,
    sampler: Sampler,
    seed: Seed,
    conditions: Conditions | None = None,
    least: float = 1.0,
) -> Samples:
    """Samples of the reference, or half of them of another model.

    With another model the proposal is the mixture (P_reference + P_other) / 2 of the path laws,
    from which both halves come (deterministic mixture sampling; Owen and Zhou, JASA 2000)::

        dP_reference / dP_proposal = 2 / (1 + dP_other / dP_reference) <= 2

    so that no weight of the reference is ever large, and those of the optimum are even where the
    other model is near it: at the optimum itself they are at most 2.

    Raises:
        UnsupportedError: before any sample, if a condition comes up fewer than ``least`` times.
    """
    cond = drawn_cond(conditions, count, seed)
    group, sizes = groups_of(cond, count)
    if cond is not None:
        _require_repeated(sizes, least)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    half = count if other is None else count // 2
    # A ratio needs whole paths in memory.
    size = sampler.batch_size if other is None else min(sampler.batch_size, PATHS)
    for name, model, start, stop in (
        ("reference", reference, 0, half),
        ("other", other or reference, half, count),
    ):
        for first in range(start, stop, size):
            index = torch.arange(first, min(first + size, stop))
            part, where = index_cond(cond, index), seed.child(name, first)
            if other is None:
                ends = sampler.sample(model, len(index), seed=where, cond=part)
                log_base = torch.zeros(len(index), dtype=torch.float64, device=ends.device)
            else:
                path = sampler.simulate(model, len(index), seed=where, cond=part)
                ends, own = path.end, model is other
                ratio = step_kl(other, reference, sampler.kernel, path, own=own)[1]
                log_base = math.log(2) + logsigmoid(-ratio.double())
            parts.append((ends, terminal.value(ends, part).double(), log_base))
    points, value, log_base = (torch.cat(column) for column in zip(*parts, strict=True))
    return Samples(points, value, log_base, cond, group.to(points.device))


@final
@dataclass(frozen=True)
class WeightedBank:
    """Samples of a proposal law with their weights under two laws, each of mean one.

    Attributes:
        points: (N, *event).
        base: (N,) float64, u = dP_reference / dP_proposal.
        weight: (N,) float64, w = dP* / dP_proposal, proportional to u exp(temper phi).
        cond: conditions, or ``None``.
        group: (N,) which condition each sample has; every group is normalised by itself.
        temper: the power of exp(phi); below 1 where a tilt is approached in stages.
        effective_size: (sum w)^2 / sum w^2, with conditions that of the worst one.
        effective: the same as a fraction of the samples.
        tilt_kl: mean of w log(w / u), an estimate of KL(p* || p_reference) of the end points.
            By Jensen's inequality it cannot exceed log(N / effective_size) where u = 1: an
            effective size of 100 also says that exp(KL), the number of samples that weights need
            (Chatterjee and Diaconis, arXiv 1511.01437), is at most N / 100.
    """

    points: Tensor
    base: Tensor
    weight: Tensor
    cond: Cond | None
    group: Tensor
    temper: float
    effective_size: float
    effective: float
    tilt_kl: float

    @staticmethod
    def of(samples: Samples, temper: float = 1.0) -> WeightedBank:
        """Normalise each condition by itself, in the log domain."""
        base, weight = torch.empty_like(samples.value), torch.empty_like(samples.value)
        sizes: list[tuple[float, float]] = []
        for g in range(int(samples.group.max()) + 1):
            index = (samples.group == g).nonzero()[:, 0]
            log_base, value = samples.log_base[index], samples.value[index]
            # Less its maximum a constant potential is exactly 0, and w is u to the last bit.
            tilted = log_base + temper * (value - value.max())
            base[index] = len(index) * torch.softmax(log_base, 0)
            weight[index] = len(index) * torch.softmax(tilted, 0)
            size = effective_size(tilted)
            sizes.append((size, size / len(index)))
        kl = torch.special.xlogy(weight, weight / base.clamp(min=1e-300)).mean()
        least, fraction = (min(column) for column in zip(*sizes, strict=True))
        return WeightedBank(
            samples.points, base, weight, samples.cond, samples.group, temper,
            least, fraction, float(kl),
        )  # fmt: skip

    @property
    def stats(self) -> dict[str, float]:
        """The numbers, for progress and solutions."""
        return {
            "effective_size": self.effective_size, "effective": self.effective,
            "tilt_kl": self.tilt_kl, "temper": self.temper,
        }  # fmt: skip

    @functools.cached_property
    def chance(self) -> Tensor:
        """q (N,), how often a sample is used: half for the reference, half for the optimum."""
        return ((self.base + self.weight) / 2).clamp(min=1e-300)

    @functools.cached_property
    def table(self) -> Tensor:
        """(N, 2): (w - u) u / q and u^2 / q, whose conditional means make ``expected_excess``."""
        share = self.base / self.chance
        return torch.stack([(self.weight - self.base) * share, self.base * share], 1)

    def expected_excess(
        self, x: Tensor, alpha: Tensor, beta: Tensor, own: Tensor, others: Tensor
    ) -> Tensor:
        """c - 1, where c(x_t) estimates E[w | X_t = x_t] from independent samples, (B,).

        c minimises E[(w - c u)^2 / q | X_t = x_t], the noise of ``WeightedMatching``'s loss:
        c = E[w u / q | x_t] / E[u^2 / q | x_t]. Both means are over ``others`` with the exact
        posterior weights N(x_t; alpha x_j, beta^2), without the sample itself (Nadaraya-Watson).

        Args:
            x: noised samples (B, *event).
            alpha: alpha at their times, (B,).
            beta: beta at their times, (B,).
            own: (B,), which samples they are made of; never counted.
            others: (M,), indices of the samples to average over.
        """
        flat, points = x.flatten(1), self.points[others].flatten(1)
        # log N(x; alpha x_j, beta^2) up to what does not depend on j, as one product of matrices.
        slope, half_square = (alpha / beta**2)[:, None], points.square().sum(1, keepdim=True) / 2
        logits = (
            torch.cat([flat * slope, -alpha[:, None] * slope], 1)
            @ torch.cat([points, half_square], 1).T
        )
        hidden = own[:, None] == others
        if self.cond is not None:
            hidden |= self.group[own][:, None] != self.group[others]
        posterior = torch.softmax(logits.masked_fill_(hidden, -torch.inf), 1)
        means = (posterior @ self.table[others].to(x)).nan_to_num(0.0)  # NaN: no neighbour at all
        return means[:, 0] / means[:, 1].clamp(min=1e-30)


def tempered(samples: Samples, least: float) -> WeightedBank:
    """The bank at the largest power of exp(phi), at most 1, of ``least`` effective samples."""
    bank = WeightedBank.of(samples)
    if bank.effective_size >= least:
        return bank
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        enough = WeightedBank.of(samples, middle).effective_size >= least
        low, high = (middle, high) if enough else (low, middle)
    return WeightedBank.of(samples, low)


def groups_of(cond: Cond | None, count: int) -> tuple[Tensor, Sequence[int]]:
    """Which samples share their condition: labels (N,) from 0, and the size of each group."""
    label = torch.zeros(count, dtype=torch.int64)
    for entry in (cond or {}).values():
        if isinstance(entry, Tensor):
            rows = entry.cpu().reshape(count, -1)
            codes = torch.unique(rows, dim=0, return_inverse=True)[1]
        else:
            known = {text: i for i, text in enumerate(dict.fromkeys(entry))}
            codes = torch.tensor([known[text] for text in entry])
        label = torch.unique(label * (int(codes.max()) + 1) + codes, return_inverse=True)[1]
    return label, torch.bincount(label).tolist()


def _require_repeated(sizes: Sequence[int], least: float) -> None:
    if min(sizes) < least:
        raise UnsupportedError(
            "WeightedMatching: every condition has its own normaliser, so that at least "
            f"min_effective_size={least:g} samples of each are needed; of {len(sizes)} distinct "
            f"conditions in the bank of {sum(sizes)} samples the rarest has {min(sizes)}. Draw "
            "from fewer conditions, raise num_samples, or use AdjointMatching, which needs no "
            "normaliser."
        )
