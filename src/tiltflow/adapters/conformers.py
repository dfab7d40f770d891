"""Conformer flows in the manner of ETFlow: positions of given graphs, velocity prediction.

Hassan et al., ETFlow (arXiv 2410.22388), has a large equivariant transformer; here is a small
graph network of the same parametrisation, which trains in minutes on one core. Its states are
positions (N, 3) of zero mean, in Angstrom, and the graph is what it is told: one network serves
many graphs, and each graph has a flow model of its own. Reflections are a symmetry of it: both
hands of a molecule are equally likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tiltflow.adapters.described import load_described, save_described
from tiltflow.adapters.egnn import Messages, Pull
from tiltflow.adapters.harmonic import Bridge, HarmonicPrior, OfPositions, whitened
from tiltflow.adapters.molecular_graph import ORDERS, MolecularGraph
from tiltflow.density import Bank
from tiltflow.errors import ConfigError, UnsupportedError
from tiltflow.flow import FlowModel, Prediction
from tiltflow.molecules import SYMBOLS
from tiltflow.potential import Potential
from tiltflow.schedule import Linear, Schedule
from tiltflow.space import ZeroMean
from tiltflow.types import Cond

SHELLS = 4
"""An atom is told which elements are 0, 1, 2 and 3 bonds away from it."""

FAR = 4
"""Pairs with so many bonds between them, or more, are alike."""

SLACK = 0.05
"""A velocity is a displacement over 1 - t, of which so much is left at t = 1."""

CENTRES, WIDTH = (0.9, 1.3, 1.7, 2.1, 2.5, 2.9, 3.3), 0.35
"""Of the bumps through which distances are seen, in Angstrom."""

Prior = Literal["gaussian", "harmonic"]


@final
class ConformerNet(nn.Module):
    """Velocity of the atoms of a graph, equivariant to rotations and reflections.

    Messages and displacements are those of ``egnn.EGNN``; pairs also know their bond and how many
    bonds lie between them, and atoms the elements around them. The displacement, over
    1 - t + 0.05, is the velocity.

    Args:
        elements: atomic numbers that it knows.
        hidden: width.
        blocks: rounds of messages and displacements.
        coords_range: largest weight of a pair in a displacement.
    """

    def __init__(
        self,
        elements: Sequence[int] = (1, 6, 7, 8, 9),
        hidden: int = 32,
        blocks: int = 3,
        coords_range: float = 4.0,
    ) -> None:
        super().__init__()
        if min(hidden, blocks, len(elements)) < 1:
            raise ConfigError("ConformerNet: elements, hidden and blocks must be at least 1.")
        self.elements = tuple(int(z) for z in elements)
        self.shape = {"hidden": hidden, "blocks": blocks, "coords_range": coords_range}
        self.embedding = nn.Linear(SHELLS * len(self.elements) + 2, hidden)
        edges = len(ORDERS) + FAR - 1 + 2 * (len(CENTRES) + 1)
        self.messages = nn.ModuleList(Messages(hidden, edges) for _ in range(blocks))
        self.pulls = nn.ModuleList(Pull(hidden, coords_range, edges) for _ in range(blocks))
        for pull in self.pulls:
            assert isinstance(pull, Pull)
            last = pull.coord_mlp[-1]
            assert isinstance(last, nn.Linear)
            nn.init.xavier_uniform_(last.weight, gain=0.01)

    def told(self, graph: MolecularGraph) -> tuple[Tensor, Tensor]:
        """What it is told about a graph: of atoms (N, F), of pairs (N, N, E).

        Raises:
            UnsupportedError: for an element that it does not know.
        """
        unknown = sorted({*graph.numbers} - {*self.elements})
        if unknown:
            raise UnsupportedError(
                f"ConformerNet: {graph} has element {unknown[0]} ({SYMBOLS[unknown[0]]}), which "
                f"this network was not made for; it knows "
                f"{', '.join(SYMBOLS[z] for z in self.elements)}."
            )
        types = torch.tensor(graph.numbers)[:, None] == torch.tensor(self.elements)
        shells = [(graph.steps == s).double() @ types.double() for s in range(SHELLS)]
        bonds = [graph.orders == order for order in ORDERS]
        steps = [graph.steps == s for s in range(2, FAR)] + [graph.steps >= FAR]
        return torch.cat(shells, -1), torch.stack([*bonds, *steps], -1).double()

    def forward(self, x: Tensor, t: Tensor, atoms: Tensor, pairs: Tensor) -> Tensor:
        """(B, N, 3), (B,), and ``told`` of the graph -> (B, N, 3), of zero mean."""
        b, n, _ = x.shape
        clock = torch.stack([t, (1 - t + SLACK).log()], -1)[:, None].expand(b, n, 2)
        h = self.embedding(torch.cat([atoms.to(x).expand(b, n, -1), clock], -1))
        apart = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
        pairs, start = pairs.to(x).expand(b, n, n, -1), _seen(x[:, :, None] - x[:, None])
        others, moved = apart.expand(b, n, n), x
        for messages, pull in zip(self.messages, self.pulls, strict=True):
            difference = moved[:, :, None] - moved[:, None]
            now = _seen(difference)
            e = torch.cat([now, start, pairs], -1)
            h = messages(h, e, others)
            weight = pull(h, e) * apart / (now[..., 0] + 1)
            moved = moved + (difference * weight[..., None]).sum(2)
        out = (moved - x) / (1 - t + SLACK)[:, None, None]
        return out - out.mean(1, keepdim=True)


def _seen(difference: Tensor) -> Tensor:
    """Distances, first, and Gaussian bumps of them: (B, N, N, 3) -> (B, N, N, 1 + bumps).

    The small number keeps the root differentiable at zero.
    """
    distance = (difference.square().sum(-1, keepdim=True) + 1e-8).sqrt()
    off = (distance - distance.new_tensor(CENTRES)) / WIDTH
    return torch.cat([distance, (-0.5 * off.square()).exp()], -1)


@final
class _OfOneGraph(nn.Module):
    """The network as a function of positions alone."""

    def __init__(self, net: ConformerNet, graph: MolecularGraph) -> None:
        super().__init__()
        self.net = net
        for name, told in zip(("atoms", "pairs"), net.told(graph), strict=True):
            self.register_buffer(name, told.float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, N, 3), (B,) -> (B, N, 3)."""
        out: Tensor = self.net(x, t, self.atoms, self.pairs)
        return out


@final
class _OfGraphs(nn.Module):
    """The network of several graphs, which ``cond["graph"]`` numbers; each without padding."""

    def __init__(self, net: ConformerNet, flows: Sequence[FlowModel]) -> None:
        super().__init__()
        self.net = net
        self.flows = nn.ModuleList(flow.net for flow in flows)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """(B, N, 3), (B,) -> (B, N, 3)."""
        which, mask = torch.as_tensor(cond["graph"]), torch.as_tensor(cond["mask"])
        out = torch.zeros_like(x)
        for g in sorted({*which.tolist()}):
            rows = torch.nonzero(which == g)[:, 0].to(x.device)
            n = int(mask[rows[0]].sum())
            out[rows, :n] = self.flows[g](x[rows, :n], t[rows])
        return out


@final
@dataclass(frozen=True)
class ConformerFlow:
    """A network of conformers, with the noise that it starts from.

    * ``prior="gaussian"``: white noise of zero mean, and ETFlow's path ``Bridge(noise)``. States
      are positions.
    * ``prior="harmonic"``: x_0 ~ N(0, S) of each graph's ``HarmonicPrior``, and the linear path.
      States are z = L^+ x, in which the noise is white; ``positions`` reads them.

    Args:
        net: velocities of positions.
        prior: see above.
        noise: ETFlow's sigma, for "gaussian".
        stiffness: of the bonds' springs, in 1 / Angstrom^2, for "harmonic".
    """

    net: ConformerNet
    prior: Prior = "gaussian"
    noise: float = 0.1
    stiffness: float = 1.5

    def __post_init__(self) -> None:
        if self.prior not in ("gaussian", "harmonic"):
            raise ConfigError(
                f"ConformerFlow: prior={self.prior!r} must be 'gaussian' or 'harmonic'."
            )

    @property
    def schedule(self) -> Schedule:
        """Of all graphs."""
        return Bridge(self.noise) if self.prior == "gaussian" else Linear()

    def prior_of(self, graph: MolecularGraph) -> HarmonicPrior | None:
        """The harmonic prior of a graph, where there is one."""
        if self.prior == "gaussian":
            return None
        return HarmonicPrior(graph.edges, len(graph), self.stiffness)

    def flow_of(self, graph: MolecularGraph) -> FlowModel:
        """The flow model of one graph; its states are (N, 3). It shares the network.

        Raises:
            UnsupportedError: for an element that the network does not know.
        """
        net, prior = _OfOneGraph(self.net, graph), self.prior_of(graph)
        if prior is not None:
            return whitened(net, self.schedule, prior, predicts=Prediction.VELOCITY)
        space = ZeroMean((len(graph), 3), over=(0,))
        return FlowModel(net, self.schedule, space, predicts=Prediction.VELOCITY)

    def positions(self, graph: MolecularGraph, states: Tensor) -> Tensor:
        """Conformers (B, N, 3) in Angstrom of states of ``flow_of(graph)``."""
        graph.check(states)
        prior = self.prior_of(graph)
        return states if prior is None else prior.positions(states)

    def states(self, graph: MolecularGraph, positions: Tensor) -> Tensor:
        """States of conformers (B, N, 3), which are centred."""
        graph.check(positions)
        prior, x = self.prior_of(graph), positions - positions.mean(1, keepdim=True)
        return x if prior is None else prior.whitened(x)

    def reward_of(self, graph: MolecularGraph, reward: Potential) -> Potential:
        """A reward of positions, e.g. ``OfGraph(...)``, as one of states of ``flow_of(graph)``."""
        prior = self.prior_of(graph)
        return reward if prior is None else OfPositions(reward, prior)

    def together(self, graphs: Sequence[MolecularGraph]) -> FlowModel:
        """One flow model of several graphs, to train them together: cond["graph"] (B,) says
        which, cond["mask"] (B, N) has its atoms first, and N is that of the largest."""
        flows = [self.flow_of(graph) for graph in graphs]
        space = ZeroMean((max(map(len, graphs)), 3), over=(0,), key="mask")
        return FlowModel(
            _OfGraphs(self.net, flows), self.schedule, space, predicts=Prediction.VELOCITY,
            takes_cond=True,
        )  # fmt: skip

    def bank(self, conformers: Mapping[MolecularGraph, Tensor]) -> Bank:
        """Conformers (B_g, N_g, 3) of several graphs as a bank for ``together(list(...))``, in
        which every graph has the same weight.

        Raises:
            ConfigError: if no conformer has the bonds of its graph, e.g. atoms in another order.
        """
        rows = max(map(len, conformers))
        points, which, masks, weights = [], [], [], []
        for g, (graph, positions) in enumerate(conformers.items()):
            states, count = self.states(graph, positions.float()), len(positions)
            if not bool(graph.kept(positions).any()):
                raise ConfigError(
                    f"ConformerFlow.bank: none of the {count} conformers has the bonds of "
                    f"{graph}; are atoms in the graph's order, and positions in Angstrom?"
                )
            points.append(nn.functional.pad(states, (0, 0, 0, rows - len(graph))))
            which.append(torch.full((count,), g))
            masks.append((torch.arange(rows) < len(graph)).float().expand(count, -1))
            weights.append(torch.full((count,), 1 / (count * len(conformers))))
        cond = {"graph": torch.cat(which), "mask": torch.cat(masks)}
        return Bank(torch.cat(points), torch.cat(weights).double(), cond)

    def save(self, path: str | Path) -> None:
        """Write weights and what they belong to as one safetensors file.

        Raises:
            CheckpointError: if the file cannot be written.
        """
        card = {
            "net": {"elements": self.net.elements, **self.net.shape}, "prior": self.prior,
            "noise": self.noise, "stiffness": self.stiffness,
        }  # fmt: skip
        save_described(path, self.net, KIND, card)


KIND = "conformer flow"


def load_conformer_flow(path: str | Path) -> ConformerFlow:
    """What ``ConformerFlow.save`` wrote, frozen.

    Raises:
        CheckpointError: if the file is missing, damaged or of something else.
    """

    def made(card: dict[str, Any]) -> tuple[ConformerFlow, nn.Module]:
        net = ConformerNet(**card.pop("net"))
        return ConformerFlow(net, **card), net

    return load_described(path, KIND, made)


__all__ = ["ConformerFlow", "ConformerNet", "load_conformer_flow"]
