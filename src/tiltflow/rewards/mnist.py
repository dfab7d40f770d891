"""A classifier of 28x28 digits as a reward, and as a judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from torch import Tensor, nn

from tiltflow.adapters.ddpm_images import (
    CLASSES,
    MnistClassifier,
    load_mnist_classifier,
    pixels_of_centred,
    pixels_of_half,
)
from tiltflow.errors import ConfigError
from tiltflow.potential import Reward
from tiltflow.rewards.images import Readability
from tiltflow.types import Cond

Pixels = Literal["centred", "half"]
"""How a state becomes pixels: of images of zero mean (``DenoisingUNet``), whose background is
shifted to black, or of images in [-0.5, 0.5] (``DenoisingCNN``)."""


@final
class OfState(nn.Module):
    """Logits of a state by a classifier of pixels, (B, 1, 28, 28) -> (B, 10).

    Args:
        net: of pixels in [0, 1].
        pixels: how a state becomes pixels.
    """

    def __init__(self, net: MnistClassifier, pixels: Pixels) -> None:
        super().__init__()
        self.net, self.pixels = net, pixels

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.seen(x))  # type: ignore[no-any-return]

    def seen(self, x: Tensor) -> Tensor:
        """The pixels, (B, 1, 28, 28)."""
        return pixels_of_centred(x) if self.pixels == "centred" else pixels_of_half(x)


@final
@dataclass(frozen=True, eq=False)
class MnistDigit(Reward):
    """How clearly an image shows one digit, by the published MNIST classifier::

        r(x) = log softmax(logits(pixels(x)) / temperature)_label,        in nats, r <= 0

    Without a label, that of the most probable digit: the log of the classifier's confidence,
    r >= -log 10. The classifier was trained on digits alone and is confident on some images that
    show none (9 % of uniform noise), so that a strong reward can be hacked: look at a Frechet
    distance too.

    Args:
        path: of the classifier, ``mnist_classifier/model.safetensors``.
        label: the digit, 0 to 9, or ``None``.
        temperature: divides the logits.
        pixels: how states become pixels: "centred" for ``DenoisingUNet``, "half" for
            ``DenoisingCNN``.

    Raises:
        CheckpointError: if the file is missing, damaged or of another model.
    """

    path: Path
    label: int | None = None
    temperature: float = 1.0
    pixels: Pixels = "centred"
    judge: Readability = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.label is not None and self.label not in range(CLASSES):
            raise ConfigError(f"MnistDigit: label={self.label} must be a digit, 0 to 9.")
        if self.pixels not in ("centred", "half"):
            raise ConfigError(f"MnistDigit: pixels={self.pixels!r} must be 'centred' or 'half'.")
        net = OfState(load_mnist_classifier(self.path), self.pixels)
        object.__setattr__(self, "judge", Readability(self.temperature, net))

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        logs = self.judge.log_probabilities(x)
        return logs.amax(1) if self.label is None else logs[:, self.label]

    def class_of(self, x: Tensor) -> Tensor:
        """The most probable digit of each image, (B, 1, 28, 28) -> (B,) of int64."""
        return self.judge.class_of(x)
