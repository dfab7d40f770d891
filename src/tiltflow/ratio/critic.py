"""Networks of states alone, fitted to two banks: what learned ratios and critics share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.density import Bank, Density
from tiltflow.errors import ConfigError, ShapeError, UnsupportedError
from tiltflow.potential import Reward
from tiltflow.seed import Seed
from tiltflow.types import Cond

FEWEST_SAMPLES = 100
"""Below this many effective samples on a side, a critic learns the samples by heart."""


@final
class Critic(nn.Module):
    """A smooth fully connected network x -> R of standardised states; 0 before it is trained.

    Args:
        centre: (D,) of flattened states.
        width: (D,), positive; the layers see (x - centre) / width.
        hidden: widths of the hidden layers (SiLU).
        seed: stream of the initial weights; the global one is left alone.
    """

    def __init__(self, centre: Tensor, width: Tensor, hidden: Sequence[int], seed: Seed) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("width", width)
        self.register_buffer("gain", centre.new_ones(()))
        self.centre: Tensor
        self.width: Tensor
        self.gain: Tensor
        generator = seed.generator()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((len(centre), *hidden)):
            layers += [_linear(inputs, outputs, generator), nn.SiLU()]
        last = _linear((len(centre), *hidden)[-1], 1, generator)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last).to(centre)

    def standardised(self, x: Tensor) -> Tensor:
        """(B, *event) -> (B, D), what the layers see."""
        return (x.flatten(1).to(self.centre) - self.centre) / self.width

    def of_standardised(self, z: Tensor) -> Tensor:
        """(B, D) -> (B,), without the gain."""
        out: Tensor = self.layers(z)
        return out.squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *event) -> (B,)."""
        out: Tensor = self.gain * self.of_standardised(self.standardised(x))
        return out


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with PyTorch's usual initial law, from a generator."""
    layer: nn.Linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


@final
@dataclass(frozen=True, eq=False)
class Learned(Reward):
    """The potential of a fitted critic, evaluated in its own precision."""

    critic: Critic
    name: str

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        out: Tensor = self.critic(x)
        return out.to(x.dtype)

    def __str__(self) -> str:
        return self.name


@final
@dataclass(frozen=True)
class Sides:
    """Two banks to tell apart, in float32 on one device; batches are drawn by weight."""

    points: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]

    @staticmethod
    def of(p: Density, q: Density, user: str) -> Sides:
        """The banks of two densities.

        Raises:
            UnsupportedError: for conditional laws.
            ShapeError: where the two have states of different shapes.
            ConfigError: for fewer than 100 effective samples.
        """
        banks = (p.bank, q.bank)
        if any(bank.cond is not None for bank in banks):
            raise UnsupportedError(
                f"{user} compares unconditional laws: a critic of the states alone does not see "
                "the conditions. Use a ratio of known logs (ExactRatio)."
            )
        if banks[0].points.shape[1:] != banks[1].points.shape[1:]:
            raise ShapeError(
                f"{user}: the states of the two densities have shapes "
                f"{tuple(banks[0].points.shape[1:])} and {tuple(banks[1].points.shape[1:])}."
            )
        for density, bank in zip((p, q), banks, strict=True):
            _enough(bank, type(density).__name__, user)
        device = banks[0].points.device
        points = tuple(bank.points.to(device, torch.float32) for bank in banks)
        weights = tuple(bank.weights.detach().double().cpu() for bank in banks)
        return Sides((points[0], points[1]), (weights[0], weights[1]))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (D,) of the even mixture of both sides; float32.

        A coordinate that is constant gets the standard deviation 1.
        """
        x = torch.cat([points.flatten(1) for points in self.points]).double()
        w = 0.5 * torch.cat(self.weights).to(x.device)[:, None]
        mean = (w * x).sum(0)
        std = (w * (x - mean) ** 2).sum(0).sqrt()
        std = torch.where(std > 1e-9 * (1 + mean.abs()), std, torch.ones_like(std))
        return mean.float(), std.float()

    def split(self, fraction: float, seed: Seed) -> tuple[Sides, Sides]:
        """The same without, and only, a random ``fraction`` of the points of each side."""
        kept, held = [], []
        for side, points in enumerate(self.points):
            order = torch.randperm(len(points), generator=seed.child(side).generator())
            cut = max(1, int(fraction * len(points)))
            held.append(order[:cut])
            kept.append(order[cut:])
        return self._at(kept), self._at(held)

    def _at(self, index: Sequence[Tensor]) -> Sides:
        chosen = [
            (points[i.to(points.device)], weights[i] / weights[i].sum())
            for points, weights, i in zip(self.points, self.weights, index, strict=True)
        ]
        return Sides((chosen[0][0], chosen[1][0]), (chosen[0][1], chosen[1][1]))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` points of each side, (count, *event) both."""
        drawn = []
        for points, weights in zip(self.points, self.weights, strict=True):
            index = torch.multinomial(weights, count, replacement=True, generator=generator)
            drawn.append(points[index.to(points.device)])
        return drawn[0], drawn[1]


def _enough(bank: Bank, density: str, user: str) -> None:
    if bank.effective_size < FEWEST_SAMPLES:
        raise ConfigError(
            f"{user}: the bank of {density} has {bank.effective_size:.0f} effective samples; at "
            f"least {FEWEST_SAMPLES} are needed on each side, and thousands are better."
        )


class NoState:
    """The parts of ``training.Loss`` that a short training from addressed seeds does without."""

    def between_rounds(self, update: int) -> bool:
        return False

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load: critics are trained in one go."""


def check_positive(owner: object, *names: str) -> None:
    """Raise ``ConfigError`` for arguments that are not positive."""
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise ConfigError(f"{type(owner).__name__}: {name}={value!r} must be positive.")


__all__ = ["Critic", "Learned", "Sides"]
