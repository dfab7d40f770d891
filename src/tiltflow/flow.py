"""Processes: pre-trained flow and diffusion models, and optima that are not flows."""

from __future__ import annotations

import abc
import enum
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.delta import Delta, Full
from tiltflow.errors import ConfigError, ShapeError, UnsupportedError
from tiltflow.schedule import Schedule
from tiltflow.space import Space
from tiltflow.types import Cond, as_times, expand_as


class Prediction(enum.Enum):
    """What a network predicts at (x, t)."""

    VELOCITY = "velocity"
    ENDPOINT = "endpoint"
    NOISE = "noise"
    SCORE = "score"


Moments = tuple[tuple[float, ...], tuple[float, ...]]
"""Times, and the average posterior variance per dimension at them."""


class Process(abc.ABC):
    """A stochastic process known through its end point; holds an ``nn.Module``, is not one."""

    schedule: Schedule
    space: Space
    moments: Moments | None

    @abc.abstractmethod
    def endpoint(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Predicted data, (B, *event), (B,) -> (B, *event)."""

    @property
    @abc.abstractmethod
    def trainable(self) -> nn.Module:
        """The module that is trained and saved."""


@final
class FlowModel(Process):
    """A flow or diffusion model: ``endpoint = E[X_1 | X_t = x]``, hence velocity and score.

    Conversions (X_0 the noise, D = alpha' beta - alpha beta')::

        velocity = alpha' endpoint + beta' noise     endpoint = (beta velocity - beta' x) / D
        noise    = (x - alpha endpoint) / beta       score    = -noise / beta
        endpoint = (x + beta^2 score) / alpha

    Args:
        net: called as ``net(x, t)``, or ``net(x, t, cond)`` where ``takes_cond``; x (B, *event),
            t (B,) in this library's time: 0 noise, 1 data. Adapters convert.
        schedule: the interpolant it was trained with.
        space: where its states live; predictions are projected onto it.
        predicts: what the network returns, a ``Prediction`` or its value as a string.
        delta: what is trained and saved (default: everything, ``Full()``).
        takes_cond: whether the network takes conditions.
        moments: what ``sample.calibrated`` measured: times in [0, 1] and the average posterior
            variance E tr Cov(X_1 | X_t) / dim at them. The kernel ``Auto`` uses it.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        space: Space,
        *,
        predicts: Prediction | str,
        delta: Delta | None = None,
        takes_cond: bool = False,
        moments: Moments | None = None,
    ) -> None:
        self.net, self.schedule, self.space = net, schedule, space
        self.moments = moments
        self.delta: Delta = Full() if delta is None else delta
        self.takes_cond = takes_cond
        try:
            self.predicts = Prediction(predicts)
        except ValueError:
            valid = ", ".join(p.value for p in Prediction)
            raise ConfigError(f"predicts={predicts!r}: must be one of {valid}.") from None

    @property
    def trainable(self) -> nn.Module:
        return self.delta.trainable(self.net)

    def clone(self) -> FlowModel:
        """A copy to train: what is trained is copied, the rest is shared."""
        net, delta = self.delta.clone(self.net)
        return self._with(net=net, delta=delta)

    def with_delta(self, delta: Delta) -> FlowModel:
        """The same model, trained in another way."""
        return self._with(delta=delta)

    def with_moments(self, moments: Moments) -> FlowModel:
        """The same model, knowing its average posterior variance."""
        return self._with(moments=moments)

    def _with(
        self,
        *,
        net: nn.Module | None = None,
        delta: Delta | None = None,
        moments: Moments | None = None,
    ) -> FlowModel:
        return FlowModel(
            net or self.net, self.schedule, self.space, predicts=self.predicts,
            delta=delta or self.delta, takes_cond=self.takes_cond,
            moments=moments or self.moments,
        )  # fmt: skip

    def endpoint(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """E[X_1 | X_t = x], (B, *event)."""
        t = as_times(t, x)
        return self.completed(self.frozen_endpoint(x, t, cond), x, t, cond)

    def affine(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (on_x, on_output), like t: endpoint = on_x x + on_output net(x, t)."""
        schedule = self.schedule
        if self.predicts is Prediction.ENDPOINT:
            return torch.zeros_like(t), torch.ones_like(t)
        if self.predicts is Prediction.VELOCITY:
            d = schedule.wronskian(t)
            return -schedule.d_beta(t) / d, schedule.beta(t) / d
        alpha, beta = schedule.alpha(t), schedule.beta(t)
        return 1 / alpha, (-beta if self.predicts is Prediction.NOISE else beta**2) / alpha

    def frozen_endpoint(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """The end point of the network alone, before a ``Correction`` is added."""
        return self.space.project(self._read(self.output(x, t, cond), x, t), cond)

    def _read(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The end point that an output of the network means."""
        on_x, on_output = self.affine(t)
        return expand_as(on_x, x) * x + expand_as(on_output, x) * output

    def completed(self, frozen: Tensor, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """``frozen_endpoint`` plus what the delta adds to it."""
        shift = self.correction(x, t, cond, frozen)
        if shift is None:
            return frozen
        return frozen + expand_as(self.schedule.beta(t), x) ** 2 * shift

    def velocity(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """v = alpha' E[X_1|x] + beta' E[X_0|x] = kappa x + eta score, (B, *event)."""
        t = as_times(t, x)
        if self.predicts is Prediction.VELOCITY:
            raw = self.space.project(self.output(x, t, cond), cond)
            shift = self.correction(x, t, cond, self._read(raw, x, t))
            _, beta, d = self._coefficients(t, x)
            return raw if shift is None else raw + beta * d * shift
        noise = self.noise(x, t, cond)
        d_alpha = expand_as(self.schedule.d_alpha(t), x)
        d_beta = expand_as(self.schedule.d_beta(t), x)
        if self.predicts is Prediction.ENDPOINT:
            return d_alpha * self.endpoint(x, t, cond) + d_beta * noise
        alpha, beta, _ = self._coefficients(t, x)
        return d_alpha * (x - beta * noise) / alpha + d_beta * noise

    def noise(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """E[X_0 | X_t = x], (B, *event)."""
        t = as_times(t, x)
        alpha, beta, d = self._coefficients(t, x)
        if self.predicts in (Prediction.ENDPOINT, Prediction.VELOCITY):
            if self.predicts is Prediction.ENDPOINT:
                return (x - alpha * self.endpoint(x, t, cond)) / beta
            d_alpha = expand_as(self.schedule.d_alpha(t), x)
            return (d_alpha * x - alpha * self.velocity(x, t, cond)) / d
        raw = self.space.project(self.output(x, t, cond), cond)
        shift = self.correction(x, t, cond, self._read(raw, x, t))
        out = raw if self.predicts is Prediction.NOISE else -beta * raw
        return out if shift is None else out - alpha * beta * shift

    def score(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Gradient of log p_t, (alpha endpoint - x) / beta^2 = -noise / beta, (B, *event)."""
        t = as_times(t, x)
        return -self.noise(x, t, cond) / expand_as(self.schedule.beta(t), x)

    def _coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.schedule
        return expand_as(s.alpha(t), x), expand_as(s.beta(t), x), expand_as(s.wronskian(t), x)

    def output(self, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """What the network returns, in the dtype of x (autocast may differ), (B, *event)."""
        self.space.check(x)
        out: Tensor = self.net(x, t, cond) if self.takes_cond else self.net(x, t)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(
                f"The network {type(self.net).__name__} returned {got} for states of shape "
                f"{tuple(x.shape)}; a prediction has the shape of its input."
            )
        return out.to(x.dtype)

    def correction(
        self, x: Tensor, t: Tensor, cond: Cond | None, frozen: Tensor | None = None
    ) -> Tensor | None:
        """What a ``Correction`` adds to the end point, in units of beta^2; or ``None``.

        ``frozen``: the frozen end point, where it is known. It is computed where it is needed.
        """
        if frozen is None and self.delta.sees_endpoint:
            frozen = self.frozen_endpoint(x, t, cond)
        shift = self.delta.shift(x, t, cond, frozen)
        return None if shift is None else self.space.project(shift.to(x.dtype), cond)


@final
class ControlledProcess(Process):
    """The optimum of a problem with a running reward: a valid SDE, but not a flow.

    It has no score and no probability-flow ODE: (v - kappa x) / eta misses a forward factor
    (methods, section 1.6; on N(0, 1) with running reward -x^2 the SDE has variance 0.614, the ODE
    of the same drift 0.328). ``matching.distil`` turns it into a flow model.
    """

    def __init__(self, model: FlowModel) -> None:
        self._model = model
        self.schedule, self.space = model.schedule, model.space
        self.moments = model.moments

    @property
    def model(self) -> FlowModel:
        """The same network as a flow model, for the one running reward whose optimum is a flow
        (``algorithms.lowerings.one_shot``)."""
        return self._model

    @property
    def trainable(self) -> nn.Module:
        return self._model.trainable

    def endpoint(self, x: Tensor, t: Tensor | float, cond: Cond | None = None) -> Tensor:
        """The drift in end-point units; not a posterior mean."""
        return self._model.endpoint(x, t, cond)


def behaviour_of(model: FlowModel) -> FlowModel | None:
    """The model that roll-outs of a training of ``model`` are made with, where it is another one.

    A network says so by a method ``behaving()``, which returns a network or ``None`` (guidance in
    roll-outs only: ``adapters.diffusers.Guidance``). Trained tensors are shared.
    """
    behaving = getattr(model.net, "behaving", None)
    net = None if behaving is None else behaving()
    return None if net is None else model._with(net=net)


def require_own_rollouts(model: FlowModel, user: str) -> None:
    """Raise ``UnsupportedError`` for a model whose roll-outs are another model's."""
    if behaviour_of(model) is not None:
        raise UnsupportedError(
            f"{user} would leave out that roll-outs of this model are made with guidance "
            "(mode='rollouts'), which only AdjointMatching knows. Use mode='everywhere', or no "
            "guidance."
        )


def freeze(process: FlowModel) -> FlowModel:
    """Switch off gradients and training-time behaviour of all parameters; returns the argument."""
    for module in (process.net, process.trainable):
        module.requires_grad_(False).eval()
    return process


def unfreeze(process: FlowModel) -> FlowModel:
    """Switch on gradients of what is trained; returns the argument.

    The network stays in evaluation mode: drop-out noise in the tuned model alone would count as a
    difference from the reference.
    """
    process.trainable.requires_grad_(True).eval()
    return process


def device_of(process: Process) -> torch.device:
    """The device on which a process lives (CPU when it has no tensors)."""
    for tensor in (*process.trainable.parameters(), *process.trainable.buffers()):
        return tensor.device
    return torch.device("cpu")
