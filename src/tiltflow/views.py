"""Models seen otherwise: on another schedule, or under one condition."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from tiltflow.delta import Correction, Delta
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, Prediction, require_own_rollouts
from tiltflow.schedule import Schedule
from tiltflow.space import Masked, ZeroMean
from tiltflow.types import Cond, expand_as


class _View(nn.Module):
    """A model inside another one's network; what was added to its network belongs to it."""

    def __init__(self, model: FlowModel) -> None:
        super().__init__()
        require_own_rollouts(model, "A view of a model")
        self.net, self.added = model.net, model.trainable
        self._model = model


@final
class _Rescheduled(_View):
    """The end points of a model, at this schedule's times and states."""

    def __init__(self, model: FlowModel, schedule: Schedule) -> None:
        super().__init__(model)
        self._schedule = schedule

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, *event), (B,) -> (B, *event)."""
        alpha, beta = self._schedule.alpha(t), self._schedule.beta(t)
        other = self._model.schedule
        u = other.time_at(torch.atan2(alpha, beta))
        scale = torch.hypot(other.alpha(u), other.beta(u)) / torch.hypot(alpha, beta)
        return self._model.endpoint(expand_as(scale, x) * x, u, cond)


@final
class _Conditioned(_View):
    """A model under one condition for all samples."""

    def __init__(self, model: FlowModel, cond: Cond) -> None:
        super().__init__(model)
        self._cond = cond

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, *event), (B,) -> (B, *event)."""
        cond = {
            key: entry.to(x.device).expand(len(x), *entry.shape[1:])
            if isinstance(entry, Tensor)
            else [entry[0]] * len(x)
            for key, entry in self._cond.items()
        }
        out: Tensor = getattr(self._model, self._model.predicts.value)(x, t, cond)
        return out


def rescheduled(model: FlowModel, schedule: Schedule) -> FlowModel:
    """The same law at t = 1, on another schedule: an exact change of time and scale::

        E[X_1 | X_t = x]  =  E'[X_1 | X'_u = c x]
        alpha'_u / beta'_u = alpha_t / beta_t,      c = alpha'_u / alpha_t = beta'_u / beta_t

    because both paths know as much of the data at equal ratios of data to noise. The ODEs of the
    two have one law; samplers differ by where they put their steps. A path that keeps a little
    data at t = 0 (``VariancePreserving``, DDPM tables) was never trained below that ratio; it is
    asked for its first time there.

    Args:
        model: any flow model; its networks are shared, not copied.
        schedule: of the result, which predicts end points.

    Returns:
        a flow model; trained as ``model`` was: in full, or by a correction that starts from zero.
    """
    if model.schedule == schedule:
        return model
    moments = model.moments
    if moments is not None:  # an average over x, which a change of scale does not change
        u = torch.tensor(moments[0], dtype=torch.float64)
        angle = torch.atan2(model.schedule.alpha(u), model.schedule.beta(u))
        moments = (tuple(schedule.time_at(angle).tolist()), moments[1])
    return FlowModel(
        _Rescheduled(model, schedule), schedule, model.space, predicts=Prediction.ENDPOINT,
        delta=_fresh(model), takes_cond=model.takes_cond, moments=moments,
    )  # fmt: skip


def conditioned(model: FlowModel, cond: Cond) -> FlowModel:
    """A conditional model under one condition, as a model without conditions.

    Two conditions of one model can then be merged, as "a cat" and "a dog".

    Args:
        model: takes conditions.
        cond: of one sample: every entry has leading length 1.

    Raises:
        ConfigError: if the model takes none, or ``cond`` is not of one sample.
        UnsupportedError: if states themselves need the condition (a mask).
    """
    if not model.takes_cond:
        raise ConfigError("conditioned: the model takes no conditions; use it as it is.")
    for key, entry in cond.items():
        if len(entry) != 1:
            raise ConfigError(
                f"conditioned: cond[{key!r}] must be of one sample, with leading length 1, not "
                f"{len(entry)}."
            )
    if isinstance(model.space, Masked | ZeroMean) and model.space.key is not None:
        raise UnsupportedError(
            f"conditioned: states need the condition {model.space.key!r} as a mask; pass "
            "conditions=... instead."
        )
    delta = _fresh(model)
    if isinstance(delta, Correction) and delta.takes_cond:
        raise UnsupportedError(
            "conditioned: the model's correction takes conditions; give the result one that does "
            "not: conditioned(model.with_delta(Full()), cond).with_delta(...)."
        )
    return FlowModel(
        _Conditioned(model, cond), model.schedule, model.space,
        predicts=model.predicts, delta=delta, moments=model.moments,
    )  # fmt: skip


def _fresh(model: FlowModel) -> Delta:
    """The model's way of being trained, with nothing added yet."""
    return model.delta.null() if isinstance(model.delta, Correction) else model.delta
