"""Density ratios learned from samples: a classifier between two laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tiltflow.context import Context
from tiltflow.density import Density
from tiltflow.errors import ConfigError
from tiltflow.ratio.critic import Critic, Learned, NoState, Sides, check_positive
from tiltflow.ratio.estimator import LogRatio, RatioEstimator
from tiltflow.seed import Seed
from tiltflow.training import Training, optimise
from tiltflow.types import Access

CHECK = 25
"""Updates between two looks at the held-out samples."""


@final
@dataclass(frozen=True, eq=False)
class LogisticRatio(RatioEstimator):
    """log p/q learned by telling samples of p from samples of q; needs no log-density.

    The minimiser over T of the logistic loss E_p log(1 + e^-T) + E_q log(1 + e^T) is log p/q
    (Sugiyama et al., Density Ratio Estimation in Machine Learning, 2012, chapter 4). A network of
    standardised states is trained on batches that respect the weights of the banks, and judged on
    a held-out part of each bank: the weights that did best there are kept, and training ends when
    there is no improvement for ``patience`` updates. T is then normalised on the bank of q.

    On laws half a nat apart, KLs are good to a few hundredths of a nat from 10 000 samples of each
    side, in ten dimensions too, and to a tenth from 1000; gradients to a tenth or a fifth in two
    dimensions (docs/benchmarks/ratios.md). Where the laws hardly overlap, the classifier is right
    at once and learns no more. Standard errors of divergences do not contain the network's error.

    Args:
        hidden: widths of the hidden layers.
        training: the optimiser loop, with the greatest number of updates.
        batch_size: samples of each side per update.
        held_out: fraction of each bank that is not trained on.
        patience: updates without improvement on it, after which training ends.
        clip: bound of |T| in nats, as ``ExactRatio``'s.
        seed: stream of initial weights, batches and split; the result is a function of it.
    """

    hidden: Sequence[int] = (64, 64)
    training: Training = field(
        default_factory=lambda: Training(num_updates=1000, learning_rate=2e-3, weight_decay=1e-3)
    )
    batch_size: int = 256
    held_out: float = 0.2
    patience: int = 400
    clip: float | None = None
    seed: Seed = field(default_factory=lambda: Seed(0).child("logistic_ratio"))

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "patience")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"LogisticRatio: held_out={self.held_out!r} must be in (0, 1).")

    @property
    def samples_needed(self) -> int:
        return 2000

    def offers(self, p: Density, q: Density) -> Access:
        return Access.BOTH

    def log_ratio(self, p: Density, q: Density) -> LogRatio:
        """Train the classifier on both banks.

        Raises:
            UnsupportedError: for conditional laws.
            ConfigError: for banks of fewer than 100 effective samples.
        """
        sides = Sides.of(p, q, "LogisticRatio")
        critic = Critic(*sides.moments(), self.hidden, self.seed.child("weights"))
        critic.to(sides.points[0].device)
        loss = _Logistic(critic, *sides.split(self.held_out, self.seed.child("split")), self)
        optimise(critic, loss, self.training, Context(self.seed.child("training")))
        loss.finish()
        name = f"LogisticRatio({type(p).__name__}, {type(q).__name__})"
        return LogRatio(Learned(critic.requires_grad_(False), name), q, self.clip)


@final
class _Logistic(NoState):
    """The logistic loss, and the best weights by the held-out samples."""

    def __init__(self, critic: Critic, kept: Sides, held: Sides, settings: LogisticRatio) -> None:
        self.critic, self.kept, self.held, self.settings = critic, kept, held, settings
        self.best, self.best_at = float("inf"), 0
        self.best_weights: dict[str, Tensor] = {}

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        generator = self.settings.seed.child("update", update, part).generator()
        x, y = self.kept.draw(self.settings.batch_size, generator)
        return softplus(-self.critic(x)).mean() + softplus(self.critic(y)).mean(), {}

    def converged(self, update: int) -> bool:
        if update % CHECK == 0:
            self._look(update)
        return update - self.best_at >= self.settings.patience

    @torch.no_grad()
    def _look(self, update: int) -> None:
        total = 0.0
        for sign, side in ((-1, 0), (1, 1)):
            losses = softplus(sign * self.critic(self.held.points[side])).double().cpu()
            total += float(self.held.weights[side] @ losses)
        if total < self.best:
            self.best, self.best_at = total, update
            self.best_weights = {k: v.clone() for k, v in self.critic.state_dict().items()}

    def finish(self) -> None:
        """Go back to the best weights."""
        self._look(self.settings.training.num_updates)
        self.critic.load_state_dict(self.best_weights)


__all__ = ["LogisticRatio"]
