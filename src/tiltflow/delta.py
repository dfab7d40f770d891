"""What is trained and saved of a model: all of it, or a small network added to it."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from tiltflow.errors import ConfigError
from tiltflow.types import Cond


class Delta(abc.ABC):
    """A way of training a model: which parameters move, and what is copied when it is cloned."""

    @abc.abstractmethod
    def trainable(self, net: nn.Module) -> nn.Module:
        """The module whose parameters are trained and saved."""

    @abc.abstractmethod
    def clone(self, net: nn.Module) -> tuple[nn.Module, Delta]:
        """Copy what is trained, share the rest."""

    sees_endpoint: bool = False
    """Whether ``shift`` is computed from the frozen end point, which it is then given."""

    @abc.abstractmethod
    def shift(
        self, x: Tensor, t: Tensor, cond: Cond | None, endpoint: Tensor | None = None
    ) -> Tensor | None:
        """What is added to the end point, in units of beta^2; ``None`` for nothing."""


@final
class Full(Delta):
    """Train every parameter of the network."""

    def trainable(self, net: nn.Module) -> nn.Module:
        return net

    def clone(self, net: nn.Module) -> tuple[nn.Module, Delta]:
        return copy.deepcopy(net), self

    def shift(
        self, x: Tensor, t: Tensor, cond: Cond | None, endpoint: Tensor | None = None
    ) -> Tensor | None:
        return None


@final
class Correction(Delta):
    """Add a small network c to a frozen model: endpoint = frozen endpoint + beta_t^2 c(x, t).

    For models without trainable parameters (analytic ones, black boxes). In these units the
    optimum of a control problem is c* = grad Phi_t / alpha_t: grad phi at t = 1, the shift of the
    posterior mean at t = 0, bounded in between.

    Args:
        module: ``c(x, t)`` or, with ``takes_cond``, ``c(x, t, cond)``; returns like x. It should
            start at zero, as ``MLP(..., zero_init=True)`` does. A module with a true attribute
            ``sees_endpoint`` is also given ``endpoint=``, the frozen model's at (x, t), which is
            known anyway: what is right or wrong with a sample is easier to see there.
    """

    def __init__(self, module: nn.Module, *, takes_cond: bool = False) -> None:
        self.module, self.takes_cond = module, takes_cond
        self.sees_endpoint = bool(getattr(module, "sees_endpoint", False))

    def is_null(self) -> bool:
        """Whether the last layer is still exactly zero, so that nothing is added."""
        last = [m for m in self.module.modules() if isinstance(m, nn.Linear)][-1:]
        return bool(last) and not any(bool(p.any()) for p in last[0].parameters())

    def null(self) -> Correction:
        """A copy whose last layer is zero, so that it adds nothing.

        Raises:
            ConfigError: if there is no linear layer that could be zero.
        """
        module = copy.deepcopy(self.module)
        last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1:]
        if not last:
            raise ConfigError(
                f"Correction: {type(module).__name__} has no linear layer, so that it cannot be "
                "started from zero. Give a module such as MLP(event, hidden, zero_init=True)."
            )
        for parameter in last[0].parameters():
            nn.init.zeros_(parameter)
        return Correction(module, takes_cond=self.takes_cond)

    def trainable(self, net: nn.Module) -> nn.Module:
        return self.module

    def clone(self, net: nn.Module) -> tuple[nn.Module, Delta]:
        return net, Correction(copy.deepcopy(self.module), takes_cond=self.takes_cond)

    def shift(
        self, x: Tensor, t: Tensor, cond: Cond | None, endpoint: Tensor | None = None
    ) -> Tensor | None:
        if not torch.is_grad_enabled() and self.is_null():
            return None  # untrained, and nobody asks for the gradient of what would be trained
        inputs = (x, t, cond) if self.takes_cond else (x, t)
        seen = {"endpoint": endpoint} if self.sees_endpoint else {}
        out = self.module(*inputs, **seen)
        return out if isinstance(out, Tensor) else None


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh,
}  # fmt: skip


@final
class MLP(nn.Module):
    """A fully connected network of (x, t): event + time features -> hidden... -> event.

    Args:
        event: shape of one state.
        hidden: widths of the hidden layers.
        activation: ``"silu"``, ``"gelu"``, ``"relu"`` or ``"tanh"``.
        frequencies: number of Fourier pairs (cos, sin of pi k t) beside t itself.
        zero_init: start from the zero function, as a ``Correction`` must.
    """

    def __init__(
        self,
        event: Sequence[int],
        hidden: Sequence[int] = (128, 128, 128),
        *,
        activation: str = "silu",
        frequencies: int = 0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ConfigError(f"MLP: activation must be one of {sorted(_ACTIVATIONS)}.")
        self.event = tuple(event)
        size = math.prod(self.event)
        widths = [size + 1 + 2 * frequencies, *hidden]
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Linear(i, o), _ACTIVATIONS[activation]()]
        last = nn.Linear(widths[-1], size)
        if zero_init:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)
        self.register_buffer("bands", math.pi * torch.arange(1, frequencies + 1), persistent=False)
        self.bands: Tensor

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, *event), (B,) -> (B, *event)."""
        parts = [x.flatten(1), t[:, None]]
        if len(self.bands):
            angle = t[:, None] * self.bands
            parts += [angle.cos(), angle.sin()]
        features = torch.cat(parts, 1)
        out: Tensor = self.layers(features)
        return out.reshape(x.shape)
