"""E(3)-equivariant graph networks over all pairs of atoms, as in EDM.

The network of Satorras et al. (arXiv 2102.09844) in the form of Hoogeboom et al. (EDM, arXiv
2203.17003), re-implemented from its equations with the tensor names of EDM's checkpoints.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from tiltflow.errors import ConfigError

GROUPS = {"cpu": 8}
"""Type of device -> molecules that are evaluated together, padded to the largest of them."""
MOST = 256
"""The same for other devices, which need much work at once to be fast."""


def of_pairs(layer: nn.Linear, h: Tensor, e: Tensor) -> Tensor:
    """``layer([h_i, h_j, e_ij])`` for all pairs: h (B, N, H), e (B, N, N, E) -> (B, N, N, out).

    W [h_i, h_j, e] + b = (A h + b)_i + (B h)_j + C e = [e, 1] [C, (A h + b)_i]^T + (B h)_j: the
    large matrices A and B work on atoms, not on pairs.
    """
    width, edges = h.shape[-1], e.shape[-1]
    receiver, sender, edge = torch.split(layer.weight, [width, width, edges], 1)
    of_receiver = linear(h, receiver, layer.bias)[:, :, None]
    of_edges = edge.T.expand(*h.shape[:2], edges, -1)
    out = torch.cat([e, torch.ones_like(e[..., :1])], -1) @ torch.cat([of_edges, of_receiver], 2)
    out += linear(h, sender)[:, None]
    return out


@final
class _SiLU(nn.Module):
    """silu of what nobody else reads: in place, unless a gradient needs the argument.

    Fresh memory would be a sixth of the time of an evaluation on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        return silu(x, inplace=not torch.is_grad_enabled())


@final
class Messages(nn.Module):
    """h_i + node_mlp([h_i, sum_j a(m_ij) m_ij]), with m_ij = edge_mlp([h_i, h_j, e_ij])."""

    def __init__(self, hidden: int, edges: int = 2) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(
            nn.Linear(2 * hidden + edges, hidden), _SiLU(), nn.Linear(hidden, hidden), _SiLU()
        )
        self.node_mlp = nn.Sequential(
            nn.Linear(2 * hidden, hidden), _SiLU(), nn.Linear(hidden, hidden)
        )
        self.att_mlp = nn.Sequential(nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, h: Tensor, e: Tensor, pairs: Tensor) -> Tensor:
        """(B, N, H), (B, N, N, edges), (B, N, N) weights of pairs -> (B, N, H)."""
        first = self.edge_mlp[0]
        assert isinstance(first, nn.Linear)
        m = self.edge_mlp[1:](of_pairs(first, h, e))
        weights = self.att_mlp(m).squeeze(-1) * pairs
        total = (weights[:, :, None] @ m).squeeze(2)
        out: Tensor = self.node_mlp(torch.cat([h, total], -1))
        return h + out


@final
class Pull(nn.Module):
    """How strongly a pair moves its receiver: coords_range tanh(coord_mlp([h_i, h_j, e_ij]))."""

    def __init__(self, hidden: int, coords_range: float, edges: int = 2) -> None:
        super().__init__()
        self.coords_range = coords_range
        self.coord_mlp = nn.Sequential(
            nn.Linear(2 * hidden + edges, hidden), _SiLU(), nn.Linear(hidden, hidden), _SiLU(),
            nn.Linear(hidden, 1, bias=False),
        )  # fmt: skip

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(B, N, H), (B, N, N, edges) -> (B, N, N)."""
        first = self.coord_mlp[0]
        assert isinstance(first, nn.Linear)
        out: Tensor = self.coord_mlp[1:](of_pairs(first, h, e))
        return self.coords_range * out.squeeze(-1).tanh()


@final
class Block(nn.Module):
    """New features from messages, then new positions: x_i + sum_j u_ij pull_ij."""

    def __init__(self, hidden: int, coords_range: float, norm_constant: float) -> None:
        super().__init__()
        self.norm_constant = norm_constant
        self.gcl_0 = Messages(hidden)
        self.gcl_equiv = Pull(hidden, coords_range)

    def forward(
        self, h: Tensor, x: Tensor, squares: Tensor, rows: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features (B, N, H), positions (B, N, 3) -> the same; ``squares`` (B, N, N) are the
        squared distances of the input, ``rows`` (B, N, 1) and ``pairs`` (B, N, N) masks."""
        difference = x[:, :, None] - x[:, None]
        now = difference.square().sum(-1)
        e = torch.stack([now, squares], -1)
        h = self.gcl_0(h, e, pairs) * rows
        # The small number keeps the square root differentiable at coinciding positions.
        weight = self.gcl_equiv(h, e) * pairs / ((now + 1e-8).sqrt() + self.norm_constant)
        return h, (x + (difference * weight[..., None]).sum(2)) * rows


class EGNN(nn.Module):
    """Displacements of atoms and new features, equivariant to rotations and reflections.

    Args:
        features: columns of a state beside the positions.
        hidden: width H.
        blocks: rounds of messages and displacements.
        coords_range: largest weight of a pair in a displacement.
        norm_constant: c in u_ij = (x_i - x_j) / (|x_i - x_j| + c).
    """

    def __init__(
        self,
        features: int,
        hidden: int = 128,
        blocks: int = 5,
        *,
        coords_range: float = 15.0,
        norm_constant: float = 1.0,
    ) -> None:
        super().__init__()
        if min(features, hidden, blocks) < 1:
            raise ConfigError("EGNN: features, hidden and blocks must be at least 1.")
        self.embedding = nn.Linear(features + 1, hidden)
        self.embedding_out = nn.Linear(hidden, features + 1)
        self._blocks = [f"e_block_{b}" for b in range(blocks)]
        for name in self._blocks:
            self.add_module(name, Block(hidden, coords_range, norm_constant))

    def at(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """Displacements with zero mean, and features.

        Molecules are sorted by size and evaluated in groups, so that padding costs little.

        Args:
            x: states (B, N, 3 + features); rows without an atom must be zero.
            time: (B,), an input like any other.
            mask: (B, N), 1 for an atom and 0 for padding.

        Returns:
            (B, N, 3 + features); zero in rows without an atom.
        """
        mask = mask.to(x)
        places = torch.arange(1, mask.shape[1] + 1, device=x.device)
        last = (mask * places).amax(1).long()
        order, parts = last.argsort(stable=True), []
        for group in torch.split(order, GROUPS.get(x.device.type, MOST)):
            size = max(1, int(last[group].max()))
            part = self.dense(x[group, :size], time[group], mask[group, :size])
            parts.append(pad(part, (0, 0, 0, x.shape[1] - size)))
        return torch.cat(parts)[order.argsort()]

    def dense(self, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
        """As ``at``, all together."""
        rows = mask[..., None]
        atoms = torch.eye(mask.shape[1], dtype=x.dtype, device=x.device)
        pairs = mask[:, :, None] * mask[:, None] * (1 - atoms)
        start = x[..., :3]
        squares = (start[:, :, None] - start[:, None]).square().sum(-1)
        clock = time[:, None, None].expand(*x.shape[:2], 1)
        h, moved = self.embedding(torch.cat([x[..., 3:], clock], -1)), start
        for name in self._blocks:
            h, moved = self.get_submodule(name)(h, moved, squares, rows, pairs)
        displacement = (moved - start) * rows
        total = rows.sum(1, keepdim=True).clamp(min=1)
        displacement = (displacement - displacement.sum(1, keepdim=True) / total) * rows
        return torch.cat([displacement, self.embedding_out(h)[..., :-1] * rows], -1)
