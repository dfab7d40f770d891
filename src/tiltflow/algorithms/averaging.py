"""Averages of models: the training-free baseline, and what an intersection is solved from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.delta import Delta
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel, Prediction, require_own_rollouts
from tiltflow.kernel import LinearKernel
from tiltflow.potential import StepReward
from tiltflow.types import Access, Cond
from tiltflow.views import rescheduled


@final
class AveragedNet(nn.Module):
    """sum_i w_i prediction_i(x, t), in one prediction type.

    Args:
        models: on one schedule; their networks are shared, not copied.
        shares: w_i.
        predicts: what is averaged. On one schedule all types give the same average.
    """

    def __init__(
        self, models: Sequence[FlowModel], shares: Sequence[float], predicts: Prediction
    ) -> None:
        super().__init__()
        # What is added to a network belongs to it: both are frozen and moved together.
        self.nets = nn.ModuleList(m for model in models for m in (model.net, model.trainable))
        self._models, self._shares, self._predicts = tuple(models), tuple(shares), predicts

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, *event), (B,) -> (B, *event)."""
        total = torch.zeros_like(x)
        for model, share in zip(self._models, self._shares, strict=True):
            total = total + share * getattr(model, self._predicts.value)(x, t, cond)
        return total


def averaged(
    models: Sequence[FlowModel],
    shares: Sequence[float],
    *,
    predicts: Prediction = Prediction.ENDPOINT,
    delta: Delta | None = None,
) -> FlowModel:
    """The average of velocities, equally of scores or end points: a merged model without training.

    Not the geometric mean of the densities, although often taken for it: the average of noised
    scores is not the score of the noised mean. For N(0, 1) and N(0, 1/4) it has variance 0.46
    (SDE) or 0.50 (ODE), the geometric mean 0.40 (methods, section 5.6).

    Args:
        models: the parts; their networks are shared, not copied.
        shares: w_i, which sum to one.
        predicts: of the result.
        delta: of the result.

    Returns:
        a model on the schedule of the first part.

    Raises:
        ConfigError: for models of different spaces.
    """
    models = aligned(models)
    net, first = AveragedNet(models, shares, predicts), models[0]
    takes_cond = any(model.takes_cond for model in models)
    return FlowModel(
        net, first.schedule, first.space, predicts=predicts, delta=delta, takes_cond=takes_cond
    )


def aligned(models: Sequence[FlowModel]) -> tuple[FlowModel, ...]:
    """The models, all on the schedule of the first (``views.rescheduled``).

    Raises:
        ConfigError: if they have no common space.
        UnsupportedError: if roll-outs of one are another model's.
    """
    first = models[0]
    for model in models:
        require_own_rollouts(model, "Merging")
    for model in models[1:]:
        if model.space != first.space:
            raise ConfigError(
                f"Merging needs one space of states, but one model has {first.space} and another "
                f"{model.space}."
            )
    return tuple(rescheduled(model, models[0].schedule) for model in models)


@final
@dataclass(frozen=True, eq=False)
class Disagreement(StepReward):
    """-sum_i w_i |m_i(x) - mbar(x)|^2 / (2 v) for the step t -> s, with m_i the mean of model i's
    transition, mbar their average and v their common variance.

    It makes the product of transitions exact: prod_i N(m_i, v)^{w_i} = N(mbar, v) exp(reward), so
    that the paths of the intersection are those of the average, with this running reward
    (methods, section 5.6 C). In continuous time it is -eta sum_i w_i |s_i - sbar|^2 dt.

    Args:
        models: the parts.
        shares: w_i.
        kernel: of the steps.
        until: steps that begin later earn nothing.
    """

    models: tuple[FlowModel, ...]
    shares: tuple[float, ...]
    kernel: LinearKernel
    until: float = 1.0

    @property
    def offers(self) -> Access:
        return Access.BOTH

    def value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        with torch.no_grad():
            return self._value(x, t, s, cond)

    def grad(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None = None) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self._value(leaf, t, s, cond).sum(), leaf)
        return grad

    def _value(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond | None) -> Tensor:
        c = self.kernel.coefficients(self.models[0].schedule, t, s)
        # A step without noise has no density: all models end where the average ends. And close to
        # the data the errors of velocities, divided by what is left of the noise, would drown it.
        noisy = (c.variance > 1e-10 * c.on_endpoint**2) & (t <= self.until)
        scale = torch.where(noisy, c.on_endpoint**2 / (2 * c.variance), 0.0)
        ends = [model.endpoint(x, t, cond) for model in self.models]
        pairs = list(zip(self.shares, ends, strict=True))
        mean = sum((w * e for w, e in pairs), torch.zeros_like(x))
        space = self.models[0].space
        spread = sum((w * space.inner(e - mean, e - mean) for w, e in pairs), torch.zeros_like(t))
        return -(scale.to(x) * spread)
