"""Handwritten digits: a small flow model, a classifier and a judge, shipped with the package.

The data are the 8x8 digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits"): 64
pixels of 17 grey levels, scaled to [-1, 1] (-1 is paper, 1 is ink). ``train_digits`` makes the
files, ``data/digits.json`` says with which command and how good they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from tiltflow.adapters.checkpoint import load_tensors
from tiltflow.errors import CheckpointError
from tiltflow.flow import FlowModel
from tiltflow.schedule import Linear
from tiltflow.space import Euclidean

_Net = TypeVar("_Net", bound=nn.Module)

SIDE = 8
"""Pixels along an edge."""
EVENT = (SIDE * SIDE,)
"""Shape of one state: the pixels, row by row."""
CLASSES = 10
DATA = Path(__file__).resolve().parent.parent / "data"
"""Where the shipped files are."""


@final
class Block(nn.Module):
    """h + W_2 silu(W_1 norm(h) + U e): a residual layer that sees the time features e."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.time = nn.Linear(features, width, bias=False)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(B, width), (B, features) -> (B, width)."""
        out: Tensor = self.second(nn.functional.silu(self.first(self.norm(h)) + self.time(e)))
        return h + out


@final
class DigitNet(nn.Module):
    """Velocity of an 8x8 digit: a residual network of fully connected layers.

    Args:
        width: units per layer.
        depth: residual blocks of two layers.
        frequencies: pairs (cos, sin of pi k t) of time features.
    """

    def __init__(self, width: int = 160, depth: int = 3, frequencies: int = 16) -> None:
        super().__init__()
        features = 1 + 2 * frequencies
        self.register_buffer("bands", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        self.bands: Tensor
        self.enter = nn.Linear(EVENT[0], width)
        self.blocks = nn.ModuleList(Block(width, features) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, EVENT[0])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 64), (B,) -> (B, 64)."""
        angle = t[:, None] * self.bands
        e = torch.cat([t[:, None], angle.cos(), angle.sin()], 1)
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, e)
        out: Tensor = self.leave(nn.functional.silu(self.norm(h)))
        return out


@final
class DigitClassifier(nn.Module):
    """Logits of the ten digits: the mean log-probability of a few small networks.

    Args:
        members: networks in the ensemble.
        channels: channels of the two convolutions of each; empty for fully connected networks.
    """

    def __init__(self, members: int = 3, channels: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            _convolutional(*channels) if channels else _dense() for _ in range(members)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) in [-1, 1] -> (B, 10)."""
        image = x.reshape(-1, 1, SIDE, SIDE)
        return torch.stack([torch.log_softmax(m(image), 1) for m in self.members]).mean(0)


def _convolutional(first: int, second: int) -> nn.Sequential:
    # Smooth activations and strided convolutions: the gradient of a readability reward goes
    # through this network, and max-pooling would make it jump.
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1), nn.SiLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Linear(second * (SIDE // 2) ** 2, 64), nn.SiLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def _dense() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(EVENT[0], 96), nn.SiLU(),
        nn.Linear(96, 64), nn.SiLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def load_digits_flow() -> FlowModel:
    """The pre-trained flow model of 8x8 digits: velocity network, ``Linear`` path, R^64.

    Raises:
        CheckpointError: if the shipped files are missing, damaged or do not belong together.
    """
    card = digits_card()
    net = _load(DigitNet(**card["flow"]["architecture"]), card["flow"])
    return FlowModel(net, Linear(), Euclidean(EVENT), predicts="velocity")


def load_digit_classifier() -> DigitClassifier:
    """The shipped classifier (convolutional ensemble), frozen; raises as ``load_digits_flow``."""
    card = digits_card()["classifier"]
    return _load(DigitClassifier(**card["architecture"]), card).requires_grad_(False)


def load_digit_judge() -> DigitClassifier:
    """A second classifier, of another architecture and seed, frozen; raises likewise.

    A reward that a model was tuned for cannot tell whether it was hacked; the judge, which no
    training sees, can.
    """
    card = digits_card()["judge"]
    return _load(DigitClassifier(**card["architecture"]), card).requires_grad_(False)


def digits_card() -> dict[str, Any]:
    """What is known of the shipped digit models: architecture, training, quality, checksums."""
    path = DATA / "digits.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        for part in ("flow", "classifier", "judge"):
            _ = card[part]["file"], card[part]["sha256"], card[part]["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}, the card of the digit models, is missing or damaged ({error}). {_REMEDY}"
        ) from error
    return dict(card)


_REMEDY = "Install tiltflow again, or train the models anew with `make digits-train`."


def _load(net: _Net, card: Mapping[str, Any]) -> _Net:
    """Weights of a card's file, after checking that it is the file the card was written for."""
    path = DATA / str(card["file"])
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). {_REMEDY}") from error
    if digest != card["sha256"]:
        raise CheckpointError(
            f"{path} is not the file that digits.json describes (SHA-256 {digest[:12]}..., "
            f"expected {str(card['sha256'])[:12]}...). {_REMEDY}"
        )
    net.load_state_dict(load_tensors(path, net.state_dict()))
    net.eval()
    return net
