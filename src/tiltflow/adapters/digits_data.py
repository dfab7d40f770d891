"""The digits themselves, and images that are no digits: what the shipped models are trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from tiltflow.adapters.digits import CLASSES, EVENT, SIDE, DigitClassifier
from tiltflow.errors import UnsupportedError
from tiltflow.seed import Seed

Split: TypeAlias = "tuple[Tensor, Tensor]"
"""Pixels (N, 64) in [-1, 1] and labels (N,)."""

TEST_EVERY = 5
"""Every fifth digit is held out."""


def load_data() -> tuple[Split, Split]:
    """Training and held-out digits of scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UnsupportedError(
            "Training the digit models needs scikit-learn: pip install 'tiltflow[train]'."
        ) from None
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(data.target)
    # A writer's digits follow each other, so a periodic split has the same writers on both sides.
    held_out = torch.arange(len(x)) % TEST_EVERY == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def warped(x: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Small random rotations, scalings, shears and shifts of digits, (B, 64) -> (B, 64)."""
    count = len(x)
    noise = torch.randn(count, 2, 3, generator=generator) * strength
    noise = noise * torch.tensor([[0.08, 0.08, 0.08], [0.08, 0.08, 0.08]])
    maps = torch.eye(2, 3) + noise
    grid = nn.functional.affine_grid(maps, [count, 1, SIDE, SIDE], align_corners=False)
    # Shifted by one, so that what enters from outside is paper (-1), not grey (0).
    image = x.reshape(count, 1, SIDE, SIDE) + 1
    out = nn.functional.grid_sample(image, grid, align_corners=False) - 1
    return out.reshape(count, -1)


def no_digits(x: Tensor, generator: torch.Generator) -> Tensor:
    """Things that are no digits, (B, 64): mosaics, shuffled pixels, blurred noise."""
    count = len(x)
    image = x.reshape(count, SIDE, SIDE)
    mosaic = image.clone()
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            other = torch.randperm(count, generator=generator)
            mosaic[:, rows, columns] = image[other, rows, columns]
    order = torch.rand(count, EVENT[0], generator=generator).argsort(1)
    shuffled = x.gather(1, order)
    blurred = torch.randn(count, 1, SIDE, SIDE, generator=generator)
    blurred = 2.5 * nn.functional.avg_pool2d(blurred, 3, 1, 1).reshape(count, -1)
    kind = torch.randint(0, 4, (count, 1), generator=generator)
    out = torch.where(kind == 0, shuffled, mosaic.reshape(count, -1))
    return torch.where(kind == 1, blurred.clamp(-1, 1), out)


@final
@dataclass(frozen=True, eq=False)
class ClassifierLoss:
    """Cross-entropy against labels that say how readable an image is.

    A third of a batch are digits, a third are blends a x + (1 - a) x' with labels blended alike
    (mixup, arXiv 1710.09412), a third are no digits, with uniform labels (outlier exposure, arXiv
    1812.04606). All are warped and noisy. The log-probability of the best class then falls
    *gradually*, from near 0 for a clear digit to log(1/10) for a blot: a plain classifier's
    saturates on both.
    """

    net: DigitClassifier
    data: Split
    seed: Seed
    batch_size: int = 192
    smoothing: float = 0.02

    def __call__(self, update: int, part: int) -> tuple[Tensor, Mapping[str, float]]:
        x, target = self._batch(self.seed.child("update", update, part).generator())
        loss = x.new_zeros(())
        image = x.reshape(-1, 1, SIDE, SIDE)
        for member in self.net.members:
            loss = loss - (target * torch.log_softmax(member(image), 1)).sum(1).mean()
        return loss / len(self.net.members), {}

    def _batch(self, generator: torch.Generator) -> Split:
        third = self.batch_size // 3
        index = torch.randint(0, len(self.data[0]), (3 * third,), generator=generator)
        x = warped(self.data[0][index], generator)
        one_hot = nn.functional.one_hot(self.data[1][index], CLASSES).float()
        target = one_hot * (1 - self.smoothing) + self.smoothing / CLASSES
        a = torch.rand(third, 1, generator=generator)
        blend = a * x[third : 2 * third] + (1 - a) * x[:third]
        blend_target = a * target[third : 2 * third] + (1 - a) * target[:third]
        blot = no_digits(x[2 * third :], generator)
        x = torch.cat([x[:third], blend, blot])
        target = torch.cat([target[:third], blend_target, torch.full_like(blend_target, 0.1)])
        level = 0.3 * torch.rand(len(x), 1, generator=generator)
        return x + level * torch.randn(x.shape, generator=generator), target

    def between_rounds(self, update: int) -> bool:
        return True

    def converged(self, update: int) -> bool:
        return False

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load: every batch is drawn from its address."""
