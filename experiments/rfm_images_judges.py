"""Who judges the images of ``rfm_images.py``: a discriminator, a classifier, Frechet distances."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from toys import Record

from tiltflow.adapters.ddpm_images import CLASSES, MnistClassifier, pixels_of_centred
from tiltflow.metrics import shares
from tiltflow.seed import Seed
from tiltflow.types import Estimate

SURE = 0.9
"""Confidence of the classifier from which on a digit counts as clear."""

UNDECIDED = (0.05, 0.95)
"""The discriminator's probability of fashion of images that look like neither part."""

COMPARED, RESAMPLES = 340, 12
"""Samples behind each Frechet distance, which is biased upwards by few samples and comparable at
equal numbers only; resamples behind its error."""


def numbers(estimate: Estimate) -> list[float]:
    """Value and standard error, as JSON holds them."""
    return [estimate.value, estimate.standard_error]


def real_digits(data: Path, first: int, count: int) -> Tensor:
    """Pixels in [0, 1] of MNIST's test set, (count, 1, 28, 28)."""
    with gzip.open(data / "mnist_t10k" / "t10k-images-idx3-ubyte.gz") as file:
        raw = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    return raw.reshape(-1, 1, 28, 28)[first : first + count].float() / 255


# --- which part ----------------------------------------------------------------------------------


def discriminator(digits: Tensor, fashion: Tensor, seed: Seed, updates: int) -> nn.Module:
    """A small network from pixels to the log-odds of fashion, trained on samples of both parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed.number)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * 49, 1),
        )  # fmt: skip
        x, y = torch.cat([digits, fashion]), torch.zeros(len(digits) + len(fashion))
        y[len(digits) :] = 1
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3, weight_decay=1e-4)
        for _ in range(updates):
            pick = torch.randint(len(x), (128,))
            loss = nn.functional.binary_cross_entropy_with_logits(net(x[pick])[:, 0], y[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images, 256 at a time."""
    return torch.cat([function(part) for part in x.split(256)])


# --- Frechet distances ---------------------------------------------------------------------------


def frechet(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of features (N, D)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def distance(a: Tensor, b: Tensor, count: int = COMPARED) -> list[float]:
    """Frechet distance of the first ``count`` features to those of b; its error is the scatter
    over random halves of them (the delete-half jackknife)."""
    a, b = a[:count].double(), b.double()
    generator = Seed(0).child("halves").generator()
    halves = torch.stack(
        [torch.randperm(len(a), generator=generator)[: len(a) // 2] for _ in range(RESAMPLES)]
    )
    scatter = torch.tensor([frechet(a[half], b) for half in halves]).std()
    return [frechet(a, b), float(scatter)]


# --- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judges:
    """Measures samples of a union.

    Args:
        net: of digits.
        part: from pixels to the log-odds of fashion.
        real: features of real digits.
        fresh: features of samples of both parts, digits and fashion, that no training saw.
    """

    net: MnistClassifier
    part: nn.Module
    real: Tensor
    fresh: tuple[Tensor, Tensor] | None = None

    def fashion(self, x: Tensor) -> Tensor:
        """Probability that each state is of the fashion model, (N,)."""
        return in_batches(lambda s: self.part(pixels_of_centred(s))[:, 0].sigmoid(), x)

    def logs(self, x: Tensor) -> Tensor:
        """Log-probabilities of the digits, (N, 10)."""
        return in_batches(lambda s: self.net(pixels_of_centred(s)).log_softmax(1), x)

    def features(self, x: Tensor) -> Tensor:
        """The classifier's features of states, (N, 500)."""
        return in_batches(lambda s: self.net.features(pixels_of_centred(s)), x)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples that look like digits, and like fashion."""
        fashion = self.fashion(x)
        # Few samples of a smoke run may all be of one part.
        middle = 0.5 if 4 <= int((fashion < 0.5).sum()) <= len(x) - 4 else fashion.median()
        return x[fashion < middle], x[fashion >= middle]

    def measured(self, x: Tensor) -> Record:
        """Shares of parts and of digits, clarity and Frechet distances, with standard errors."""
        fashion, (digits, clothes) = self.fashion(x), self.halves(x)
        low, high = UNDECIDED
        neither = ((fashion > low) & (fashion < high)).double()
        top, label = self.logs(digits).exp().max(1)
        out: Record = {
            "count": len(x),
            "fashion": numbers(Estimate.of((fashion >= 0.5).double())),
            "undecided": numbers(Estimate.of(neither)),
            "clear": numbers(Estimate.of((top > SURE).double())),
            "classes": [numbers(s) for s in shares(label, CLASSES).values()],
            "compared": [min(COMPARED, len(digits)), min(COMPARED, len(clothes))],
        }
        seen = self.features(digits)
        out["to_real"] = distance(seen, self.real)
        if self.fresh is not None:
            out["to_digits"] = distance(seen, self.fresh[0][:COMPARED])
            out["to_fashion"] = distance(self.features(clothes), self.fresh[1][:COMPARED])
        return out

    def of_pixels(self, pixels: Tensor) -> Record:
        """Clarity of real digits, and the distance of some to the others."""
        top = in_batches(lambda s: self.net(s).softmax(1), pixels).amax(1)
        seen = in_batches(self.net.features, pixels)
        return {
            "clear": numbers(Estimate.of((top > SURE).double())),
            "to_real": distance(seen, self.real),
        }
