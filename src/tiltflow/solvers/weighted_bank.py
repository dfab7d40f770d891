"""Banks of samples with their importance weights under a tilted law."""

from __future__ import annotations

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
from tiltflow.types import Cond, Conditions, index_cond


@final
@dataclass(frozen=True)
class Samples:
    """Samples X_1 with what is known about each; nothing is normalised.

    Attributes:
        points: (N, *event).
        value: (N,) float64, the terminal potential phi.
        log_base: (N,) float64, log dP_reference / dP_proposal of the path that led there.
        cond: conditions, or ``None``.
    """

    points: Tensor
    value: Tensor
    log_base: Tensor
    cond: Cond | None = None


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
) -> Samples:
    """Samples of the reference, or half of them of another model.

    With another model the proposal is the mixture (P_reference + P_other) / 2 of the path laws,
    from which both halves come (deterministic mixture sampling; Owen and Zhou 2000, section 4)::

        dP_reference / dP_proposal = 2 / (1 + dP_other / dP_reference) <= 2

    so that no weight of the reference is ever large, and those of the optimum are small where the
    other model has been there.
    """
    cond = None if conditions is None else conditions.draw(count, seed.child("cond"))
    parts: list[Samples] = []
    for name, model, start, stop in _shares(reference, other, count):
        for first in range(start, stop, sampler.batch_size):
            index = torch.arange(first, min(first + sampler.batch_size, stop))
            part = index_cond(cond, index)
            where, size = seed.child(name, first), len(index)
            if other is None:
                ends = sampler.sample(model, size, seed=where, cond=part)
                log_base = torch.zeros(size, dtype=torch.float64, device=ends.device)
            else:
                path = sampler.simulate(model, size, seed=where, cond=part)
                ends, ratio = path.end, step_kl(other, reference, sampler.kernel, path)[1]
                log_base = math.log(2.0) + logsigmoid(-ratio.double())
            value = terminal.value(ends, part).double()
            parts.append(Samples(ends, value, log_base))
    columns = [torch.cat([getattr(p, n) for p in parts]) for n in ("points", "value", "log_base")]
    return Samples(columns[0], columns[1], columns[2], cond)


def _shares(
    reference: FlowModel, other: FlowModel | None, count: int
) -> list[tuple[str, FlowModel, int, int]]:
    """Which samples come from which model."""
    if other is None:
        return [("reference", reference, 0, count)]
    half = count // 2
    return [("reference", reference, 0, half), ("other", other, half, count)]


@final
@dataclass(frozen=True)
class WeightedBank:
    """Samples of a proposal law with weights for two laws, each of mean one.

    Attributes:
        points: (N, *event).
        base: (N,) float64, u = dP_reference / dP_proposal.
        weight: (N,) float64, w = dP* / dP_proposal, proportional to u exp(temper phi).
        cond: conditions, or ``None``.
        group: (N,) which condition each sample has, 0 to G - 1.
        temper: the power of exp(phi); 1 but for a tilt that is approached in stages.
        effective_size: Kish's 1 / sum w^2 of the normalised weights; with conditions that of the
            worst one.
        effective: the same as a fraction of the samples.
        kl: sum w log(w / u) / N, an estimate of KL(p* || p_reference) of the end points.
    """

    points: Tensor
    base: Tensor
    weight: Tensor
    cond: Cond | None
    group: Tensor
    temper: float
    effective_size: float
    effective: float
    kl: float

    @staticmethod
    def of(samples: Samples, temper: float = 1.0) -> WeightedBank:
        """Normalise per condition, because every condition has a normaliser of its own."""
        group, sizes = groups_of(samples.cond, len(samples.value), samples.value.device)
        base, weight = torch.empty_like(samples.value), torch.empty_like(samples.value)
        found: list[tuple[float, float]] = []
        for g, size in enumerate(sizes):
            index = (group == g).nonzero()[:, 0] if len(sizes) > 1 else slice(None)
            log_base, value = samples.log_base[index], samples.value[index]
            # Less its maximum, a constant potential is exactly 0, and w is u to the last bit.
            tilted = log_base + temper * (value - value.max())
            base[index] = size * torch.softmax(log_base, 0)
            weight[index] = size * torch.softmax(tilted, 0)
            effective = effective_size(tilted)
            found.append((effective, effective / size))
        kl = torch.special.xlogy(weight, weight / base.clamp(min=1e-300)).mean()
        return WeightedBank(
            samples.points, base, weight, samples.cond, group, temper,
            min(found)[0], min(f for _, f in found), float(kl),
        )  # fmt: skip


def tempered(samples: Samples, min_effective_size: float) -> WeightedBank:
    """The bank at the largest power of exp(phi), at most 1, with enough effective samples."""
    bank = WeightedBank.of(samples)
    if bank.effective_size >= min_effective_size:
        return bank
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        enough = WeightedBank.of(samples, middle).effective_size >= min_effective_size
        low, high = (middle, high) if enough else (low, middle)
    return WeightedBank.of(samples, low)


def groups_of(
    cond: Cond | None, count: int, device: torch.device
) -> tuple[Tensor, Sequence[int]]:
    """Which samples share their condition: labels (N,) from 0, and the size of each group."""
    if cond is None:
        return torch.zeros(count, dtype=torch.int64, device=device), [count]
    label = torch.zeros(count, dtype=torch.int64)
    for entry in cond.values():
        if isinstance(entry, Tensor):
            codes = torch.unique(entry.cpu().reshape(count, -1), dim=0, return_inverse=True)[1]
        else:
            known = {text: i for i, text in enumerate(dict.fromkeys(entry))}
            codes = torch.tensor([known[text] for text in entry])
        label = torch.unique(label * (int(codes.max()) + 1) + codes, return_inverse=True)[1]
    return label.to(device), torch.bincount(label).tolist()


def require_repeated(sizes: Sequence[int], min_effective_size: float, user: str) -> None:
    """Raise ``UnsupportedError`` where a condition is too rare for a normaliser of its own."""
    rare = min(sizes)
    if rare < min_effective_size:
        raise UnsupportedError(
            f"{user}: every condition has its own normaliser, so its weights need at least "
            f"min_effective_size={min_effective_size:g} samples of the same condition; of "
            f"{len(sizes)} distinct conditions in the bank the rarest has {rare}. Draw from fewer "
            "conditions, raise num_samples, or use AdjointMatching, which needs no normaliser."
        )
