"""End-point models of molecules in the manner of FlowMol: the network predicts the clean molecule.

Dunn and Koes, FlowMol (arXiv 2404.19739), with continuous types. Its path is
x_tau = alpha(tau) x_1 + (1 - alpha(tau)) x_0 with alpha = sin^2(pi tau^power / 2), and its flow
alpha' / (1 - alpha) (x_1 - x). In the time t = alpha(tau) this is ``Linear``: the velocity in
tau is that in t times alpha'(tau), and the law at the end is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from tiltflow.adapters.atom_counts import AtomCounts
from tiltflow.adapters.described import load_described, save_described
from tiltflow.adapters.egnn import EGNN
from tiltflow.errors import ConfigError
from tiltflow.flow import FlowModel, Prediction
from tiltflow.molecules import Layout
from tiltflow.schedule import Linear
from tiltflow.space import ZeroMean
from tiltflow.types import Cond

ELEMENTS = (6, 1, 7, 8, 9)
"""FlowMol's order on QM9."""


@final
@dataclass(frozen=True)
class Clock:
    """FlowMol's time: alpha(tau) = sin^2(pi tau^power / 2) is this library's.

    Args:
        power: FlowMol's cosine parameter, one for all of a state.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ConfigError(f"Clock: power={self.power} must be positive.")

    def alpha(self, tau: Tensor) -> Tensor:
        """This library's time at the network's."""
        return (0.5 * math.pi * tau**self.power).sin().square()

    def own(self, t: Tensor) -> Tensor:
        """The network's time at this library's, the inverse of ``alpha``."""
        angle = torch.atan2(t.clamp(min=0).sqrt(), (1 - t).clamp(min=0).sqrt())
        return (2 / math.pi * angle) ** (1 / self.power)


@final
class OnItsClock(nn.Module):
    """A network that is asked at its own time, whatever it predicts the clean molecule with.

    Args:
        net: called as ``net(x, tau, cond)``.
        clock: of its path.
    """

    def __init__(self, net: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.net, self.clock = net, clock

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, N, width), (B,) -> like x."""
        out: Tensor = self.net(x, self.clock.own(t), cond)
        return out


@final
class EndpointNet(EGNN):
    """The clean molecule: positions moved by an ``EGNN``, types by a softmax.

    The mean of one-hot types is a probability, which a softmax is; that of positions has zero
    mean, whatever the state's.

    Args:
        types: number of elements.
        one_hot: what a one is written as.
        hidden, blocks, coords_range: of ``EGNN``.
    """

    def __init__(
        self,
        types: int,
        hidden: int = 32,
        blocks: int = 3,
        *,
        one_hot: float = 1.0,
        coords_range: float = 4.0,
    ) -> None:
        super().__init__(types, hidden, blocks, coords_range=coords_range)
        self.one_hot = one_hot
        self.shape = {"types": types, "hidden": hidden, "blocks": blocks, "one_hot": one_hot,
                      "coords_range": coords_range}  # fmt: skip

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, N, 3 + types), (B,) and cond["mask"] (B, N) -> like x; all are atoms without."""
        given = torch.ones(x.shape[:2]) if cond is None else torch.as_tensor(cond["mask"])
        mask = given.to(x)
        out, rows = self.at(x, tau, mask), mask[..., None]
        types = self.one_hot * out[..., 3:].softmax(-1)
        return torch.cat([x[..., :3] + out[..., :3], types], -1) * rows


@final
@dataclass(frozen=True)
class EndpointFlow:
    """A model of molecules that predicts end points, and what its states and sizes are.

    Args:
        net: of states and its own time.
        sizes: number of atoms -> weight, to be passed as ``conditions``.
        elements: atomic numbers in the order of the network's types.
        clock: of its path.
    """

    net: EndpointNet
    sizes: AtomCounts
    elements: tuple[int, ...] = ELEMENTS
    clock: Clock = Clock()

    def __post_init__(self) -> None:
        if len(self.elements) != self.net.shape["types"]:
            raise ConfigError(
                f"EndpointFlow: the network has {self.net.shape['types']} types, but there are "
                f"{len(self.elements)} elements."
            )

    @property
    def layout(self) -> Layout:
        """Of its states: no column for charges."""
        return Layout(self.elements, self.net.one_hot, charge=None)

    @property
    def model(self) -> FlowModel:
        """On the linear path; takes cond["mask"]. It shares the network."""
        event = (max(self.sizes.law), self.layout.width)
        space = ZeroMean(event, over=(0,), columns=3, key=self.layout.key)
        return FlowModel(
            OnItsClock(self.net, self.clock), Linear(), space, predicts=Prediction.ENDPOINT,
            takes_cond=True,
        )  # fmt: skip

    def with_atoms(self, atoms: int) -> FlowModel:
        """The model of molecules with so many atoms, which takes no conditions."""
        if atoms < 2:
            raise ConfigError(
                f"EndpointFlow.with_atoms: {atoms} atoms have no distances; 2 are needed."
            )
        space = ZeroMean((atoms, self.layout.width), over=(0,), columns=3)
        return FlowModel(
            OnItsClock(self.net, self.clock), Linear(), space, predicts=Prediction.ENDPOINT
        )

    def save(self, path: str | Path) -> None:
        """Write weights and what they belong to as one safetensors file.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        card = {
            "net": self.net.shape, "elements": self.elements, "power": self.clock.power,
            "sizes": self.sizes.law,
        }  # fmt: skip
        save_described(path, self.net, KIND, card)


KIND = "endpoint flow"


def load_endpoint_flow(path: str | Path) -> EndpointFlow:
    """What ``EndpointFlow.save`` wrote, frozen.

    Raises:
        CheckpointError: if the file is missing, damaged or of something else.
    """

    def made(card: dict[str, Any]) -> tuple[EndpointFlow, nn.Module]:
        net = EndpointNet(**card["net"])
        sizes = AtomCounts({int(n): w for n, w in card["sizes"].items()})
        return EndpointFlow(net, sizes, tuple(card["elements"]), Clock(card["power"])), net

    return load_described(path, KIND, made)


__all__ = ["Clock", "EndpointFlow", "EndpointNet", "OnItsClock", "load_endpoint_flow"]
