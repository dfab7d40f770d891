"""Rewards of images."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.adapters.digits import load_digit_classifier
from tiltflow.errors import ConfigError, ShapeError
from tiltflow.potential import Reward
from tiltflow.types import Cond


@final
@dataclass(frozen=True, eq=False)
class Readability(Reward):
    """How clearly an image shows *some* class: the log-probability of the best one::

        r(x) = max_c log softmax(logits(x) / temperature)_c,      in nats, log(1/classes) <= r <= 0

    Why this one. (a) It does not say *which* digit to draw: every class can reach r = 0, so that
    raising it need not move probability between classes. (b) A log-probability, unlike a
    probability, keeps a slope where the image is bad: that is where a lower tail is improved. (c)
    The shipped classifier was trained for it: on blends of two digits with blended labels and on
    images that are no digits with uniform labels, so that r falls gradually from 0 for a clear
    digit over log(1/2) for "a 3 or an 8" to log(1/10) for a blot. A plain classifier is confident
    on everything, including blots, and such a reward is hacked at once. (d) It is bounded, and
    averaging over an ensemble removes much of what only one network believes.

    At a tie between two classes r has a kink; the gradient there is the mean of the two.

    Args:
        temperature: divides the logits. 1 leaves r calibrated as trained, and saturated: the best
            half of the shipped model's samples lie within 0.04 of the best value. At 2 clear
            images keep a slope too (the best half spans 0.4), so that it matters whether an
            objective looks at the mean or at the tail.
        classifier: (B, *event) -> logits (B, classes); default: the shipped digit classifier.
        members: use only the first so many networks of the shipped ensemble, which costs less: a
            guidance needs a direction, not a verdict. ``None`` uses all.
    """

    temperature: float = 1.0
    classifier: nn.Module | None = None
    members: int | None = None
    _net: nn.Module = field(init=False, repr=False)
    _copies: dict[tuple[str, str], nn.Module] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"Readability: temperature={self.temperature} must be positive.")
        if self.members is not None and (self.classifier is not None or self.members < 1):
            raise ConfigError("Readability: members counts networks of the shipped classifier.")
        net = load_digit_classifier() if self.classifier is None else self.classifier
        if self.members is not None:
            some = load_digit_classifier()
            some.members = nn.ModuleList(list(some.members)[: self.members])
            net = some
        object.__setattr__(self, "_net", net)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.log_probabilities(x).amax(1)

    def class_of(self, x: Tensor) -> Tensor:
        """The most probable class of each image, (B, *event) -> (B,) of int64."""
        with torch.no_grad():
            return self.log_probabilities(x).argmax(1)

    def log_probabilities(self, x: Tensor) -> Tensor:
        """log softmax(logits(x) / temperature), (B, *event) -> (B, classes)."""
        logits: Tensor = self._net_for(x)(x)
        if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
            raise ShapeError(
                f"Readability: the classifier {type(self._net).__name__} returned "
                f"{tuple(logits.shape)} for {x.shape[0]} images; logits are (images, classes)."
            )
        return torch.log_softmax(logits / self.temperature, 1)

    def _net_for(self, x: Tensor) -> nn.Module:
        """The network in the dtype and on the device of ``x``; the original is not changed."""
        own = next(self._net.parameters(), x)
        if (own.device, own.dtype) == (x.device, x.dtype):
            return self._net
        key = (str(x.device), str(x.dtype))
        if key not in self._copies:
            self._copies[key] = copy.deepcopy(self._net).to(device=x.device, dtype=x.dtype)
        return self._copies[key]
