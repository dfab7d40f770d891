"""Another way to one network for a union: its parts as teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.context import Context
from tiltflow.flow import FlowModel, device_of, freeze, unfreeze
from tiltflow.training import Training, optimise
from tiltflow.types import expand_as


@dataclass(frozen=True, eq=False)
class TaughtLoss:
    """|eps(x_t, t) - eps_i(x_t, t)|^2 with x_t from a sample of part i, drawn with its share.

    Given x_t, part i has the posterior kappa_i ~ w_i p_{t,i}(x_t), so that the minimiser is
    sum_i kappa_i eps_i: the noise of the mixture, as with flow matching, whose target is the noise
    that was drawn. What differs is the variance of the target: here it is that of eps_i under
    kappa, which vanishes where one part is certain.

    Args:
        model: what is trained.
        teachers: the parts.
        banks: samples of each.
        counts: of each in a batch, in proportion to their shares.
        context: where the seed comes from.
    """

    model: FlowModel
    teachers: Sequence[FlowModel]
    banks: Sequence[Tensor]
    counts: Sequence[int]
    context: Context

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        generator = self.context.seed.child("update", update, part).generator()
        made = [
            self._pair(teacher, bank, count, generator)
            for teacher, bank, count in zip(self.teachers, self.banks, self.counts, strict=True)
        ]
        x, t, target = (torch.cat(each) for each in zip(*made, strict=True))
        error = self.model.noise(x, t) - target
        dimension = self.model.space.dimension(len(x)).to(error)
        return (self.model.space.inner(error, error) / dimension).mean(), {}

    @torch.no_grad()
    def _pair(
        self, teacher: FlowModel, bank: Tensor, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noised samples of a part, their times, and what the part says."""
        device, schedule = device_of(self.model), self.model.schedule
        end = bank[torch.randint(len(bank), (count,), generator=generator)]
        noise = self.model.space.noise(count, generator).to(device)
        t = torch.rand(count, generator=generator).to(device)
        x = expand_as(schedule.alpha(t), noise) * end.to(device)
        x = x + expand_as(schedule.beta(t), noise) * noise
        return x, t, teacher.noise(x, t)

    def between_rounds(self, update: int) -> bool:
        return True

    def converged(self, update: int) -> bool:
        return False

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load: every batch is drawn from its address."""


def taught(
    start: FlowModel,
    teachers: Sequence[FlowModel],
    banks: Sequence[Tensor],
    shares: Sequence[float],
    training: Training,
    context: Context,
    batch: int,
) -> FlowModel:
    """One network for a union, from ``start``."""
    model = unfreeze(start.clone())
    counts = [round(batch * share) for share in shares]
    loss = TaughtLoss(model, teachers, banks, counts, context)
    optimise(model.trainable, loss, training, context)
    return freeze(model)
