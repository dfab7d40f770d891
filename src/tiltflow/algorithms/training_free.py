"""Merging without training: samples of a gate from the models alone, every model at each step."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from tiltflow.algorithms.averaging import aligned, averaged
from tiltflow.density import Bank
from tiltflow.errors import ConfigError, NonFiniteError, UnsupportedError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Heun, Kernel, LinearKernel
from tiltflow.operators import Gate, Intersection, Union
from tiltflow.sample import Sampler
from tiltflow.seed import Seed

_ADVICE: dict[type[Gate], str] = {
    Union: "Use Superposition for it.",
    Intersection: "Use FeynmanKac for it.",
}


@final
@dataclass(frozen=True)
class Drawn:
    """Samples of a gate, and what is known about them."""

    bank: Bank
    stats: Mapping[str, float]


class TrainingFree(abc.ABC):
    """A way of sampling a gate of models without training any.

    Each sample costs ``evaluations_per_sample``, which a trained merged model pays once per step
    and not once per step and part.
    """

    gate: ClassVar[type[Gate]]
    """The gate that it samples."""

    @final
    def sample(
        self,
        gate: Gate,
        models: Sequence[FlowModel],
        count: int,
        *,
        seed: Seed,
        sampler: Sampler | None = None,
    ) -> Bank:
        """``draw``'s points and weights."""
        return self.draw(gate, models, count, seed=seed, sampler=sampler).bank

    @final
    def draw(
        self,
        gate: Gate,
        models: Sequence[FlowModel],
        count: int,
        *,
        seed: Seed,
        sampler: Sampler | None = None,
    ) -> Drawn:
        """Samples of a gate.

        Args:
            gate: the gate; its parts may be of any kind, only their models matter.
            models: of the parts, in their order.
            count: number of samples.
            seed: the samples are a function of it.
            sampler: kernel and number of steps; ``Sampler()`` by default.

        Raises:
            ConfigError: for a wrong number of models or samples, or models of different spaces.
            UnsupportedError: for another gate, models with conditions, or a kernel that does not
                fit.
        """
        models = self._checked(gate, models, count)
        with torch.no_grad():
            return self._draw(gate, models, count, seed, sampler or Sampler())

    @final
    def _checked(self, gate: Gate, models: Sequence[FlowModel], count: int) -> Sequence[FlowModel]:
        """The models on one schedule, if they can be sampled."""
        name = type(self).__name__
        if not isinstance(gate, self.gate):
            advice = _ADVICE.get(type(gate), "Train a model of it with merge.")
            raise UnsupportedError(
                f"{name} samples gates of kind {self.gate.__name__}, and {gate} is of kind "
                f"{type(gate).__name__}. {advice}"
            )
        if len(models) != len(gate.parts):
            raise ConfigError(
                f"{name}: {gate} has {len(gate.parts)} parts, but {len(models)} models are given. "
                "Give the model of each part, in their order."
            )
        if count < 1:
            raise ConfigError(f"{name}: count={count} must be at least 1.")
        if any(model.takes_cond for model in models):
            raise UnsupportedError(
                f"{name}: a model takes conditions; fix one for each model first: "
                "views.conditioned(model, cond)."
            )
        return aligned(models)

    @abc.abstractmethod
    def _draw(
        self, gate: Gate, models: Sequence[FlowModel], count: int, seed: Seed, sampler: Sampler
    ) -> Drawn:
        """``draw``, after the checks."""

    def evaluations_per_sample(
        self, models: Sequence[FlowModel], sampler: Sampler | None = None
    ) -> int:
        """Evaluations of networks behind one sample."""
        return len(models) * (sampler or Sampler()).num_steps


@final
@dataclass(frozen=True)
class Averaging(TrainingFree):
    """An intersection by the average of velocities: a heuristic, see ``averaged``.

    It needs no particles and allows the ODE, but its law is not the geometric mean.
    """

    gate: ClassVar[type[Gate]] = Intersection

    def _draw(
        self, gate: Gate, models: Sequence[FlowModel], count: int, seed: Seed, sampler: Sampler
    ) -> Drawn:
        if gate.reward is not None:
            raise UnsupportedError(
                f"Averaging: {gate} has a reward, which an average of velocities leaves out. Use "
                "FeynmanKac, or train a model with merge."
            )
        points = sampler.sample(averaged(models, gate.shares), count, seed=seed)
        return Drawn(Bank.equal(points), {})

    def evaluations_per_sample(
        self, models: Sequence[FlowModel], sampler: Sampler | None = None
    ) -> int:
        sampler = sampler or Sampler()
        steps = sampler.num_steps
        # Heun evaluates twice, but on the last step, which is DDIM's.
        return len(models) * (2 * steps - 1 if isinstance(sampler.kernel, Heun) else steps)


@final
@dataclass(frozen=True)
class Chains:
    """The memoryless chains of several models on one grid, N(m_i(x_k), v_{i,k}).

    Args:
        models: of one space and one schedule.
        kernels: of each model.
        times: (K+1,), float64.
        variances: (models, K), float64; of a step, all are positive or none is.
        batch_size: states that are evaluated at a time.
    """

    models: tuple[FlowModel, ...]
    kernels: tuple[LinearKernel, ...]
    times: Tensor
    variances: Tensor
    batch_size: int

    @staticmethod
    def of(models: Sequence[FlowModel], sampler: Sampler, user: str) -> Chains:
        """The chains that ``sampler`` runs; each model may know its own variances.

        Raises:
            UnsupportedError: for kernels without densities, or of different kinds.
        """
        kernels = [_dense(sampler.kernel.resolved(model), user) for model in models]
        names = sorted({type(kernel).__name__ for kernel in kernels})
        if len(names) > 1:
            raise UnsupportedError(
                f"{user} needs steps of one kind, but the models resolve to {names[0]} and "
                f"{names[1]}: some are calibrated and some are not. Calibrate all of them "
                "(sample.calibrated), or use EulerMaruyama."
            )
        times, schedule = sampler.times, models[0].schedule
        v = torch.stack([kernel.variance(schedule, times[:-1], times[1:]) for kernel in kernels])
        if bool(((v > 0).any(0) & ~(v > 0).all(0)).any()):
            raise UnsupportedError(
                f"{user}: a step is noiseless for one model and noisy for another, so that their "
                "densities cannot be compared. Use EulerMaruyama."
            )
        return Chains(tuple(models), tuple(kernels), times, v, sampler.batch_size)

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.times) - 1

    def noisy(self, k: int) -> bool:
        """Whether step k has a density; where not, it tells nothing about models."""
        return bool(self.variances[0, k] > 0)

    def means(self, x: Tensor, k: int) -> Tensor:
        """m_i(x) of step k for states (B, *event): (models, B, *event)."""
        parts = []
        for start in range(0, len(x), self.batch_size):
            part = x[start : start + self.batch_size]
            t, s = (self.times[j].to(x).expand(len(part)) for j in (k, k + 1))
            pairs = zip(self.models, self.kernels, strict=True)
            parts.append(torch.stack([q.transition(m, part, t, s).mean for m, q in pairs]))
        return torch.cat(parts, 1)

    def log_densities(self, x: Tensor, means: Tensor, k: int) -> Tensor:
        """log N(x; m_i, v_i) of step k up to a constant, (models, B), float64."""
        squares = self.squares(x - means)
        v = self.variances[:, k, None].to(squares)
        dimension = self.models[0].space.dimension(len(x)).to(squares)
        return -0.5 * (squares / v + dimension * v.log())

    def squares(self, offsets: Tensor) -> Tensor:
        """Squared norms of (models, B, *event), in float64."""
        inner = self.models[0].space.inner
        return torch.stack([inner(o, o) for o in offsets.double()])


def _dense(kernel: Kernel, user: str) -> LinearKernel:
    """The kernel, if it is memoryless and its steps have densities."""
    if not kernel.memoryless or not isinstance(kernel, LinearKernel):
        raise UnsupportedError(
            f"{user} compares models by the densities of the memoryless SDE's steps, which "
            f"{type(kernel).__name__} does not have. Use the default kernel or EulerMaruyama."
        )
    return kernel


def require_finite(x: Tensor, k: int, user: str) -> Tensor:
    """The states; refuse NaN and infinity."""
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            user, k, "the state", "A model returned NaN or diverged at this time step."
        )
    return x
