"""Flow matching on weighted points: pre-training, refitting, and processes made into flows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tiltflow.context import Context
from tiltflow.density import Bank
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import ControlledProcess, FlowModel, Prediction, device_of, unfreeze
from tiltflow.sample import Sampler
from tiltflow.training import Training, optimise
from tiltflow.types import Cond, Conditions, cond_to, drawn_cond, expand_as, index_cond

BLUNT = 0.02
"""Bounds the weight of end points near the data."""


@final
@dataclass(frozen=True, eq=False)
class MatchingLoss:
    """Conditional flow matching on a bank, in the network's own prediction type::

        t ~ U(0, 1),  X_1 ~ bank,  X_0 ~ N(0, I),  x = alpha_t X_1 + beta_t X_0

        velocity : |v(x, t) - (alpha' X_1 + beta' X_0)|^2        noise : |eps(x, t) - X_0|^2
        endpoint : D / (beta + 0.02) |x_1(x, t) - X_1|^2         score : |beta s(x, t) + X_0|^2

    Each is the regression whose minimiser is the conditional expectation (Lipman et al.,
    arXiv 2210.02747, theorem 2); every target has finite variance at both ends of time, which the
    score itself has not. The loss is the mean over samples and dimensions of the space.

    Args:
        model: the model; its predictions are projected onto its space, and so is the noise.
        bank: points, drawn with probability proportional to their weights.
        context: where ``seed`` comes from: update u draws from ``seed/update/u/part``.
        batch_size: points per micro-batch.
    """

    model: FlowModel
    bank: Bank
    context: Context
    batch_size: int

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        where = ("update", update, part, self.context.backend.process_index)
        return self._mean(self.context.seed.child(*where).generator()), {}

    @torch.no_grad()
    def measure(self, num_batches: int = 16) -> float:
        """The loss on batches of its own addresses, so that it is the same after a resumption."""
        seeds = (self.context.seed.child("measure", i) for i in range(num_batches))
        return sum(float(self._mean(seed.generator())) for seed in seeds) / num_batches

    def _mean(self, generator: torch.Generator) -> Tensor:
        x1, cond = self._draw(generator)
        noise = self.model.space.noise(len(x1), generator, cond_to(cond, "cpu"), x1.dtype)
        x0 = noise.to(x1.device)
        t = torch.rand(len(x1), generator=generator, dtype=x1.dtype).to(x1.device)
        with self.context.backend.autocast():
            error = self._error(x0, x1, t, cond)
            if self.model.predicts is Prediction.ENDPOINT:
                error = expand_as(self._velocities(t), error) * error
        error = error.float() if error.dtype in (torch.float16, torch.bfloat16) else error
        dimension = self.model.space.dimension(len(x1), cond).to(error)
        return (self.model.space.inner(error, error) / dimension).mean()

    def _velocities(self, t: Tensor) -> Tensor:
        """sqrt(D / (beta + BLUNT)): errors of end points count more towards the data, half way
        to those of velocities, because a flow turns there by as much as they differ."""
        schedule = self.model.schedule
        return (schedule.wronskian(t) / (schedule.beta(t) + BLUNT)).sqrt()

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Cond | None]:
        """A batch of points, (B, *event), on the device of the bank."""
        weights = self.bank.weights.detach().double().cpu()
        index = torch.multinomial(weights, self.batch_size, replacement=True, generator=generator)
        points = self.bank.points[index.to(self.bank.points.device)]
        device = device_of(self.model)
        cond = index_cond(self.bank.cond, index)
        return points.to(device), cond_to(cond, device)

    def _error(self, x0: Tensor, x1: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
        """Prediction minus target, (B, *event)."""
        schedule = self.model.schedule
        alpha, beta = expand_as(schedule.alpha(t), x1), expand_as(schedule.beta(t), x1)
        x_t = alpha * x1 + beta * x0
        if self.model.predicts is Prediction.ENDPOINT:
            return self.model.endpoint(x_t, t, cond) - x1
        if self.model.predicts is Prediction.VELOCITY:
            d_alpha = expand_as(schedule.d_alpha(t), x1)
            d_beta = expand_as(schedule.d_beta(t), x1)
            return self.model.velocity(x_t, t, cond) - (d_alpha * x1 + d_beta * x0)
        # A score network is judged as a noise network, noise = -beta score: bounded at t = 1.
        return self.model.noise(x_t, t, cond) - x0

    def between_rounds(self, update: int) -> bool:
        return True

    def converged(self, update: int) -> bool:
        return False

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load: every batch is drawn from its address."""


def fit_flow(
    model: FlowModel, bank: Bank, settings: Training, context: Context, *, batch_size: int = 256
) -> Mapping[str, float]:
    """Fit a flow model to weighted points, in place, by conditional flow matching.

    Pre-training, reward-weighted regression (weights proportional to exp(reward)), and the
    distillation of mixtures are this function on different banks.

    Args:
        model: what to train; its ``delta`` says which parameters move.
        bank: points (N, *event) and weights (N,).
        settings: the optimiser loop; ``ema`` near 0.999 gives visibly better samples.
        context: seed, backend, progress, resumption.
        batch_size: points per micro-batch.

    Returns:
        ``updates``, the ``loss`` of the fitted model, and the ``effective_size`` of the bank.
    """
    if batch_size < 1:
        raise ConfigError(f"fit_flow: batch_size={batch_size} must be at least 1.")
    if bank.exact:
        raise UnsupportedError(
            "fit_flow: quadrature nodes are not samples: a flow fitted to them learns the grid. "
            "Draw samples first."
        )
    model.space.check(bank.points, "bank.points")
    unfreeze(model)
    loss = MatchingLoss(model, bank, context, batch_size)
    updates = optimise(model.trainable, loss, settings, context)
    return {
        "updates": float(updates),
        "loss": loss.measure(),
        "effective_size": bank.effective_size,
    }


def distil(
    process: ControlledProcess,
    model: FlowModel,
    *,
    sampler: Sampler,
    count: int,
    settings: Training,
    context: Context,
    conditions: Conditions | None = None,
    batch_size: int = 256,
) -> FlowModel:
    """Refit a controlled process as a flow model with the same law at t = 1.

    The optimum of a problem with a running reward is a valid SDE but not a flow (see
    ``ControlledProcess``): it has no score and no ODE until a flow is fitted to its samples.

    Args:
        process: what to imitate.
        model: where to start from, e.g. the reference; it is not changed.
        sampler: a memoryless sampler of the process.
        count: number of samples.
        settings: the optimiser loop.
        context: seed, backend, progress, resumption.
        conditions: the law of conditions, for conditional processes.
        batch_size: points per micro-batch.

    Returns:
        a new ``FlowModel``.
    """
    seed = context.seed.child("samples")
    cond = drawn_cond(conditions, count, seed)
    samples = sampler.sample(process, count, seed=seed, cond=cond)
    flow = model.clone()
    bank = Bank.equal(samples, cond)
    fit_flow(flow, bank, settings, context.child("fit"), batch_size=batch_size)
    return flow
