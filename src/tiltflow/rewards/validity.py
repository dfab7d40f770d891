"""How far a molecule is from a valid one in one piece, in Angstrom: a reward to repair with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from tiltflow.bonds import VALENCIES, distances, reach
from tiltflow.errors import ConfigError
from tiltflow.molecules import Layout
from tiltflow.potential import Reward
from tiltflow.types import Cond


@final
@dataclass(frozen=True, eq=False)
class ValidityGap(Reward):
    """Minus what is missing for a molecule to be valid and connected, by its bonds::

        g_ijk = reach_k(i, j) + margin - d_ij       k = 1, 2, 3: by how much a bond is too short
        n_i   = #{(j, k): g_ijk > 0} - valency_i    bonds that an atom has too many
        E     = the n_i smallest g_ijk > 0 of every atom i
        D     = d_ij - reach_1(i, j) + margin > 0 along the minimum spanning tree of the atoms
        r(x)  = -sum over g in E and D of g / (g + scale)        <= 0

    reach_k is the distance below which a bond of order k is seen (``bonds.reach``). To be valid,
    RDKit asks that no atom has too many bonds, and to be connected is to be one piece: with
    margin = 0, E and D are empty exactly for molecules that are both. Their sum is how far bonds
    have to be stretched, and pieces to be brought together, for that. r is continuous, also where
    bonds come and go: a bond stops to count when its gap is zero. Unlike a sum of sigmoids it
    pulls from any distance; what is nearly right is pulled most.

    It says nothing of atoms with too few bonds, whose hydrogens RDKit implies (``Valency`` does),
    nor of energies. Types are read by argmax and constant.

    Args:
        layout: how states are molecules.
        scale: half of the price of a gap is paid at this length, in Angstrom.
        margin: how far beyond its limit a distance should be, in Angstrom.

    Raises:
        UnsupportedError: for a layout with elements other than H, C, N, O and F.
    """

    layout: Layout = field(default_factory=Layout)
    scale: float = 0.1
    margin: float = 0.02
    _reach: Tensor = field(init=False, repr=False)
    _valencies: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.scale > 0 or not self.margin >= 0:
            raise ConfigError(
                f"ValidityGap: scale={self.scale} must be positive and margin={self.margin} "
                "not negative."
            )
        elements = self.layout.elements
        object.__setattr__(self, "_reach", reach(elements))
        object.__setattr__(self, "_valencies", torch.tensor([VALENCIES[z] for z in elements]))

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        molecules = self.layout.decode(x.detach(), cond)
        kinds = x[..., 3 : 3 + len(self.layout.elements)].argmax(-1)
        d = distances(x[..., :3])
        limits = self._reach.to(d)[:, kinds[:, :, None], kinds[:, None]]
        valencies = self._valencies.to(x.device)[kinds]
        surplus = _surplus((limits + self.margin - d) * molecules.pairs, valencies)
        apart = spanning_edges((d - limits[0] + self.margin).clamp(min=0), molecules.mask)
        gaps = torch.cat([surplus.flatten(1), apart], 1)
        return -(gaps / (gaps + self.scale)).sum(1)


def _surplus(gaps: Tensor, valencies: Tensor) -> Tensor:
    """Gaps of the bonds beyond the valency, the smallest of each atom; zero elsewhere.

    (3, B, N, N), (B, N) -> (B, N, at most 3 N).
    """
    each = gaps.permute(1, 2, 0, 3).flatten(2)
    bonded = each > 0
    many = bonded.sum(-1) - valencies
    most = max(1, int(many.max())) if many.numel() else 1
    smallest = torch.where(bonded, each, torch.inf).sort(-1).values[..., :most]
    counts = torch.arange(most, device=gaps.device) < many[..., None]
    return torch.where(counts, smallest, torch.zeros_like(smallest))


def spanning_edges(lengths: Tensor, mask: Tensor) -> Tensor:
    """Edges of the minimum spanning trees, (B, N, N), (B, N) -> (B, N - 1); 0 for padding.

    Prim's algorithm: the atom that is nearest to the tree joins it.
    """
    with torch.no_grad():
        far = lengths.masked_fill(~mask[:, None] | ~mask[:, :, None], torch.inf)
        rows = torch.arange(len(far), device=far.device)
        start = mask.int().argmax(1)
        near, parent = far[rows, start], start[:, None].expand_as(mask)
        outside = mask.clone()
        outside[rows, start] = False
        edges = []
        for _ in range(far.shape[1] - 1):
            new = torch.where(outside, near, torch.inf).argmin(1)
            edges.append((parent[rows, new], new, outside[rows, new]))
            outside[rows, new] = False
            closer = far[rows, new] < near
            near = torch.where(closer, far[rows, new], near)
            parent = torch.where(closer, new[:, None], parent)
    if not edges:
        return lengths.new_zeros(len(lengths), 0)
    return torch.stack([torch.where(joins, lengths[rows, a, b], 0.0) for a, b, joins in edges], 1)


__all__ = ["ValidityGap"]
