"""Models whose densities are known: Gaussians and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.analytic import GaussianMixture as ExactMixture
from tiltflow.analytic import ring
from tiltflow.errors import ConfigError
from tiltflow.models.base import Model, Pretrained
from tiltflow.schedule import Linear, Schedule


@final
@dataclass(frozen=True)
class Gaussian(Model):
    """N(mean, diag(std^2)), with its exact flow model and a trainable correction.

    Args:
        mean: one number per dimension.
        std: a number, or one per dimension.
        schedule: the interpolant.
        hidden: widths of the correction network.
        init_seed: seed of the correction's initial weights.
    """

    mean: tuple[float, ...]
    std: float | tuple[float, ...] = 1.0
    schedule: Schedule = field(default_factory=Linear)
    hidden: tuple[int, ...] = (64, 64)
    init_seed: int = 0

    def load(self) -> Pretrained:
        mean = torch.tensor([self.mean], dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        if (
            not self.mean
            or (std.ndim == 1 and len(std) != mean.shape[1])
            or bool((std <= 0).any())
        ):
            raise ConfigError("Gaussian: std must be positive, one number or one per dimension.")
        exact = ExactMixture(mean, std.expand(mean.shape))
        return _analytic(exact, self.schedule, self.hidden, self.init_seed)


@final
@dataclass(frozen=True)
class GaussianMixture(Model):
    """sum_j w_j N(m_j, diag(s_j^2)), with its exact flow model and a trainable correction.

    Args:
        means: one list per component.
        stds: a number, or one per component.
        weights: positive numbers; equal by default.
        schedule: the interpolant.
        hidden: widths of the correction network.
        init_seed: seed of the correction's initial weights.
    """

    means: tuple[tuple[float, ...], ...]
    stds: float | tuple[float, ...] = 1.0
    weights: tuple[float, ...] | None = None
    schedule: Schedule = field(default_factory=Linear)
    hidden: tuple[int, ...] = (64, 64)
    init_seed: int = 0

    def load(self) -> Pretrained:
        if len({len(m) for m in self.means}) != 1:
            raise ConfigError("GaussianMixture: all means need the same number of entries.")
        stds = torch.tensor(self.stds, dtype=torch.float64)
        exact = ExactMixture(self.means, stds, self.weights)
        component = _nearest_component(exact)
        names = tuple(str(j + 1) for j in range(len(self.means)))
        return _analytic(exact, self.schedule, self.hidden, self.init_seed, component, names)


@final
@dataclass(frozen=True)
class Ring(Model):
    """Equal isotropic Gaussians on a circle, the first at angle 0.

    Args:
        count: number of Gaussians.
        radius: of the circle.
        std: of each Gaussian.
        schedule: the interpolant.
        hidden: widths of the correction network.
        init_seed: seed of the correction's initial weights.
    """

    count: int = 8
    radius: float = 2.0
    std: float = 0.25
    schedule: Schedule = field(default_factory=Linear)
    hidden: tuple[int, ...] = (64, 64)
    init_seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.radius < 0 or self.std <= 0:
            raise ConfigError("Ring: count >= 1, radius >= 0 and std > 0 are needed.")

    def load(self) -> Pretrained:
        exact = ring(self.count, self.radius, self.std)
        names = tuple(f"{360 * j // self.count}°" for j in range(self.count))
        return _analytic(
            exact, self.schedule, self.hidden, self.init_seed, _nearest_component(exact), names
        )


def _analytic(
    exact: ExactMixture,
    schedule: Schedule,
    hidden: Sequence[int],
    seed: int,
    classify: Callable[[Tensor], Tensor] | None = None,
    classes: tuple[str, ...] = (),
) -> Pretrained:
    """Initial weights from a seed of their own: a run must not depend on what ran before it."""
    if not hidden:
        raise ConfigError("hidden: needs at least one layer, or there is nothing to train.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = exact.flow(schedule, tuple(hidden))
    return Pretrained(model, None, classify, classes, exact=exact)


def _nearest_component(exact: ExactMixture) -> Callable[[Tensor], Tensor]:
    def classify(x: Tensor) -> Tensor:
        return torch.cdist(x.double(), exact.means.to(x.device)).argmin(1)

    return classify
