"""Molecular graphs: what a model of conformers is told, and what its samples must keep."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tiltflow.bonds import require_rdkit
from tiltflow.errors import ConfigError, ShapeError, UnsupportedError
from tiltflow.molecules import SYMBOLS, Layout, Molecules, formula
from tiltflow.potential import Potential
from tiltflow.types import Access, Cond

ORDERS = (1.0, 1.5, 2.0, 3.0)
"""Of bonds; 1.5 is aromatic."""

RADII = {1: 0.31, 5: 0.84, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57, 14: 1.11, 15: 1.07, 16: 1.05,
         17: 1.02, 35: 1.20, 53: 1.39}  # fmt: skip
"""Covalent radii in Angstrom (Cordero et al., 2008), by atomic number."""

STRETCH = 1.3
"""Two atoms are bonded where they are nearer than so many times the sum of their radii."""

Bond = tuple[int, int, float]
"""Two atoms, and the order of their bond."""


@final
@dataclass(frozen=True)
class MolecularGraph:
    """Atoms and bonds of one connected molecule, hydrogens included; no handedness.

    Args:
        numbers: atomic numbers of the N atoms.
        bonds: (i, j, order), each pair once; orders are those of ``ORDERS``.

    Raises:
        ConfigError: for fewer than two atoms, a number that is no element, a bond that is not
            between two different atoms, is there twice or has another order, or atoms that the
            bonds do not connect.
    """

    numbers: tuple[int, ...]
    bonds: tuple[Bond, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(int(z) for z in self.numbers))
        bonds = tuple(sorted((min(i, j), max(i, j), float(o)) for i, j, o in self.bonds))
        object.__setattr__(self, "bonds", bonds)
        n = len(self.numbers)
        if n < 2:
            raise ConfigError(
                f"MolecularGraph: a molecule of {n} atom{'' if n == 1 else 's'} has no "
                "conformers; at least two atoms are needed (hydrogens count)."
            )
        for z in self.numbers:
            if not 0 < z < len(SYMBOLS):
                raise ConfigError(
                    f"MolecularGraph: {z} is not the atomic number of an element that is known "
                    f"here; they go from 1 to {len(SYMBOLS) - 1}."
                )
        self._check_bonds()

    def _check_bonds(self) -> None:
        n, seen = len(self.numbers), set[tuple[int, int]]()
        for i, j, order in self.bonds:
            if not (0 <= i < j < n) or order not in ORDERS or (i, j) in seen:
                raise ConfigError(
                    f"MolecularGraph: the bond ({i}, {j}, {order:g}) is not between two different "
                    f"atoms of {n}, is there twice, or has an order other than 1, 1.5, 2 and 3."
                )
            seen.add((i, j))
        apart = torch.nonzero(self.steps[0] < 0)
        if len(apart):
            k = int(apart[0])
            raise ConfigError(
                f"MolecularGraph: the graph is not connected: no bonds lead from atom 0 to atom "
                f"{k} ({SYMBOLS[self.numbers[k]]}). Model each molecule of a mixture by itself."
            )

    @staticmethod
    def of_smiles(smiles: str) -> MolecularGraph:
        """The graph that RDKit reads, with all hydrogens; aromatic bonds have order 1.5.

        Raises:
            CapabilityError: if RDKit is not installed.
            ConfigError: if the text is no SMILES, or see above.
            UnsupportedError: for formal charges.
        """
        require_rdkit()
        from rdkit import Chem, rdBase

        with rdBase.BlockLogs():
            molecule = Chem.MolFromSmiles(smiles)
        if molecule is None:
            raise ConfigError(f"MolecularGraph: RDKit cannot read the SMILES {smiles!r}.")
        if any(atom.GetFormalCharge() for atom in molecule.GetAtoms()):
            raise UnsupportedError(
                f"MolecularGraph: {smiles!r} has atoms with formal charges, which a graph of "
                "elements and bonds does not tell; write it without, or leave it out."
            )
        molecule = Chem.AddHs(molecule)
        bonds = [
            (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondTypeAsDouble())
            for b in molecule.GetBonds()
        ]
        return MolecularGraph(tuple(a.GetAtomicNum() for a in molecule.GetAtoms()), tuple(bonds))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The bonds without orders, e.g. for a ``HarmonicPrior``."""
        return tuple((i, j) for i, j, _ in self.bonds)

    @functools.cached_property
    def orders(self) -> Tensor:
        """Of the bonds, (N, N) of float64; 0 where there is none."""
        out = torch.zeros(len(self), len(self), dtype=torch.float64)
        for i, j, order in self.bonds:
            out[i, j] = out[j, i] = order
        return out

    @functools.cached_property
    def steps(self) -> Tensor:
        """Bonds between two atoms along the shortest way, (N, N) of int64; -1 for no way."""
        n = len(self)
        bonded = (self.orders > 0) | torch.eye(n, dtype=torch.bool)
        out = torch.where(torch.eye(n, dtype=torch.bool), 0, -1)
        reached = torch.eye(n, dtype=torch.bool)
        for step in range(1, n):
            further = (reached.double() @ bonded.double()) > 0
            out[further & ~reached] = step
            reached = further
        return out

    @property
    def layout(self) -> Layout:
        """Of states with types, for rewards of molecules."""
        return Layout(tuple(sorted({*self.numbers})), one_hot=1.0, charge=None)

    def check(self, positions: Tensor) -> None:
        """Raise ``ShapeError`` unless these are positions (B, N, 3) of this graph's atoms."""
        if positions.ndim != 3 or tuple(positions.shape[1:]) != (len(self), 3):
            raise ShapeError(
                f"Positions of shape {tuple(positions.shape)} do not belong to a graph of "
                f"{len(self)} atoms, {self}; they must be (B, {len(self)}, 3)."
            )

    def molecules(self, positions: Tensor) -> Molecules:
        """Conformers (B, N, 3) as molecules."""
        self.check(positions)
        numbers = torch.tensor(self.numbers, device=positions.device)
        return Molecules(positions, numbers.expand(len(positions), -1))

    def kept(self, positions: Tensor) -> Tensor:
        """Which conformers (B, N, 3) have these bonds and no others, (B,) of bool, by distances
        below 1.3 times the sum of covalent radii; not, where positions are not finite.

        Raises:
            ConfigError: for an element without a radius in ``RADII``.
        """
        self.check(positions)
        unknown = sorted({*self.numbers} - {*RADII})
        if unknown:
            raise ConfigError(
                f"MolecularGraph.kept: no covalent radius of {SYMBOLS[unknown[0]]} is known."
            )
        radii = torch.tensor([RADII[z] for z in self.numbers], dtype=torch.float64)
        limit = (STRETCH * (radii[:, None] + radii)).to(positions.device)
        x = positions.double()
        near = (x[:, :, None] - x[:, None]).norm(dim=-1) < limit
        bonded = (self.orders > 0).to(positions.device)
        same = (near.triu(1).flatten(1) == bonded.triu(1).flatten()).all(1)
        out: Tensor = same & x.isfinite().flatten(1).all(1)
        return out

    def rdkit(self) -> Any:
        """RDKit's molecule of it, sanitised, with explicit hydrogens and no conformer."""
        require_rdkit()
        from rdkit import Chem, rdBase

        kinds = dict(zip(ORDERS, ("SINGLE", "AROMATIC", "DOUBLE", "TRIPLE"), strict=True))
        editable = Chem.RWMol()
        for z in self.numbers:
            atom = Chem.Atom(z)
            atom.SetNoImplicit(True)
            editable.AddAtom(atom)
        for i, j, order in self.bonds:
            editable.AddBond(i, j, getattr(Chem.BondType, kinds[order]))
            if order == 1.5:
                for k in (i, j):
                    editable.GetAtomWithIdx(k).SetIsAromatic(True)
        molecule = editable.GetMol()
        try:
            with rdBase.BlockLogs():
                Chem.SanitizeMol(molecule)
        except ValueError as error:  # what RDKit's exceptions of this kind are
            raise ConfigError(f"MolecularGraph: RDKit refuses {self}: {error}") from error
        return molecule

    def __str__(self) -> str:
        return formula(self.numbers)


@final
@dataclass(frozen=True, eq=False)
class OfGraph(Potential):
    """A potential of molecules, as one of the positions (B, N, 3) of one graph::

        phi([x, types of the graph]),      gradient in the positions alone

    Args:
        potential: of states of ``graph.layout``: ``XTBEnergy(graph.layout)``.
        graph: whose atoms these are.
    """

    potential: Potential
    graph: MolecularGraph

    @property
    def offers(self) -> Access:
        return self.potential.offers

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.potential.value(self._states(x), cond)

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self.potential.grad(self._states(x), cond)[..., :3]

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        value, grad = self.potential.value_and_grad(self._states(x), cond)
        return value, grad[..., :3]

    def _states(self, x: Tensor) -> Tensor:
        self.graph.check(x)
        elements = x.new_tensor(self.graph.layout.elements)
        types = (x.new_tensor(self.graph.numbers)[:, None] == elements).to(x)
        return torch.cat([x, types.expand(len(x), -1, -1)], -1)

    def __str__(self) -> str:
        return f"{self.potential} of {self.graph}"


def embedded(graph: MolecularGraph, count: int, seed: int, *, relaxed: bool = False) -> Tensor:
    """Conformers by RDKit's ETKDG, with MMFF94 minimisation if ``relaxed``, in zero mean.

    Both hands of a molecule occur, as its graph does not tell them apart.

    Returns:
        (count, N, 3) of float64, in Angstrom.

    Raises:
        CapabilityError: if RDKit is not installed.
        ConfigError: if RDKit finds no conformers.
    """
    molecule = graph.rdkit()
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = seed
    made = list(rdDistGeom.EmbedMultipleConfs(molecule, count, parameters))
    if len(made) < count:
        raise ConfigError(f"RDKit finds no conformers of {graph}; check its bonds.")
    if relaxed:
        rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule, maxIters=2000)
    x = torch.tensor(
        [molecule.GetConformer(i).GetPositions().tolist() for i in made], dtype=torch.float64
    )
    return x - x.mean(1, keepdim=True)


__all__ = ["Bond", "MolecularGraph", "OfGraph", "embedded"]
