"""Boltzmann samples of force fields, for ``molecules_conformers.py``: training data and truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.adapters.molecular_graph import MolecularGraph, embedded

Array = NDArray[np.float64]

KT = 1.192
"""Of 600 K, in kcal/mol."""

LEAPS, STEP = 12, 0.018
"""Of a Hamiltonian move: steps, and their length in Angstrom for a unit momentum."""


@final
@dataclass(frozen=True)
class Energy:
    """A weighted mean of the force fields MMFF94 and UFF, in kcal/mol.

    Args:
        graph: of the molecule.
        weights: "mmff" and "uff" -> weight.
    """

    graph: MolecularGraph
    weights: Mapping[str, float]
    molecule: Any = field(init=False, repr=False)
    fields: list[tuple[float, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from rdkit import Chem
        from rdkit.Chem import rdForceFieldHelpers as Helpers

        molecule = self.graph.rdkit()
        start = Chem.Conformer(len(self.graph))
        for i, x in enumerate(embedded(self.graph, 1, 0)[0].tolist()):
            start.SetAtomPosition(i, x)
        molecule.AddConformer(start)
        known = {
            "mmff": lambda: Helpers.MMFFGetMoleculeForceField(
                molecule, Helpers.MMFFGetMoleculeProperties(molecule)
            ),
            "uff": lambda: Helpers.UFFGetMoleculeForceField(molecule),
        }
        made = [(w, known[name]()) for name, w in self.weights.items() if w]
        object.__setattr__(self, "molecule", molecule)
        object.__setattr__(self, "fields", made)

    def value(self, x: Array) -> float:
        """Of one conformer (N, 3)."""
        flat = x.ravel().tolist()
        return float(sum(w * f.CalcEnergy(flat) for w, f in self.fields))

    def slope(self, x: Array) -> Array:
        """Its gradient, (N, 3)."""
        flat, total = x.ravel().tolist(), np.zeros(x.size)
        for w, f in self.fields:
            f.CalcEnergy(flat)  # the gradient takes distances from the last energy
            total += w * np.asarray(f.CalcGrad(flat))
        return total.reshape(-1, 3)


def boltzmann(
    energy: Energy, count: int, seed: int, *, chains: int = 100, warm: int = 40, apart: int = 4
) -> Tensor:
    """Samples of exp(-E / kT) by Hamiltonian moves and turns about single bonds.

    Chains start from ETKDG's conformers; every ``apart`` sweeps one state of each is kept, after
    ``warm``. Each state is reflected with probability 1/2, a symmetry of E that no move makes.

    Returns:
        (count, N, 3) of float32, of zero mean.
    """
    rng, turns = np.random.default_rng(seed), rotors(energy.graph)
    kept: list[Array] = []
    starts = embedded(energy.graph, chains, seed + 1, relaxed=True).numpy()
    per_chain = -(-count // chains)
    for x in starts:
        for sweep in range(warm + apart * per_chain):
            x = hamiltonian(energy, x, rng)
            for turn in turns:
                x = turned(energy, x, turn, rng)
            if sweep >= warm and (sweep - warm) % apart == apart - 1:
                kept.append(x * rng.choice([-1.0, 1.0]))
    out = torch.tensor(np.stack(kept))[torch.tensor(rng.permutation(len(kept))[:count])]
    return (out - out.mean(1, keepdim=True)).float()


def hamiltonian(energy: Energy, x: Array, rng: np.random.Generator) -> Array:
    """One move of Hamiltonian Monte Carlo."""
    p = rng.standard_normal(x.shape)
    before = energy.value(x) / KT + 0.5 * float((p * p).sum())
    step = STEP * rng.uniform(0.7, 1.3)
    y, p = x, p - 0.5 * step * energy.slope(x) / KT
    for leap in range(LEAPS):
        y = y + step * p
        p = p - (1.0 if leap < LEAPS - 1 else 0.5) * step * energy.slope(y) / KT
    after = energy.value(y) / KT + 0.5 * float((p * p).sum())
    return y if np.log(rng.uniform()) < before - after else x


Turn = tuple[int, int, NDArray[np.int64]]
"""An axis of two atoms, and which atoms move."""


def turned(energy: Energy, x: Array, turn: Turn, rng: np.random.Generator) -> Array:
    """One side of a bond turned about it by any angle, or not."""
    y = rotated(x, turn, rng.uniform(-np.pi, np.pi))
    gain = (energy.value(x) - energy.value(y)) / KT
    return y if np.log(rng.uniform()) < gain else x


def rotated(x: Array, turn: Turn, angle: float) -> Array:
    """One side of a bond turned about it."""
    i, j, moving = turn
    axis, arms, y = (x[j] - x[i]) / np.linalg.norm(x[j] - x[i]), x[moving] - x[j], x.copy()
    along = np.outer(arms @ axis, axis)
    across = np.cos(angle) * (arms - along) + np.sin(angle) * np.cross(axis, arms)
    y[moving] = x[j] + along + across
    return y


def rotors(graph: MolecularGraph) -> list[Turn]:
    """Single bonds, not in rings, both of whose atoms have neighbours off the axis that differ
    from three hydrogens."""
    out: list[Turn] = []
    for i, j, order in graph.bonds:
        ends = [_others(graph, i, j), _others(graph, j, i)]
        plain = [all(graph.numbers[k] == 1 for k in e) and len(e) == 3 for e in ends]
        linear = [bool((graph.orders[k] == 3).any()) for k in (i, j)]
        side = _side(graph, i, j)
        if order == 1 and all(ends) and not any(plain + linear) and i not in side:
            out.append((i, j, np.array(sorted(side), dtype=np.int64)))
    return out


def _others(graph: MolecularGraph, i: int, j: int) -> list[int]:
    """Neighbours of i but j."""
    near: list[int] = torch.nonzero(graph.orders[i])[:, 0].tolist()
    return [k for k in near if k != j]


def _side(graph: MolecularGraph, i: int, j: int) -> set[int]:
    """Atoms that are reached from j without the bond to i; i among them in a ring."""
    seen, new = {j}, set(_others(graph, j, i))
    while new:
        seen |= new
        new = {k for a in new for k in _others(graph, a, -1)} - seen
    return seen


def torsions(graph: MolecularGraph, x: Tensor) -> Tensor:
    """|torsion| about every rotor, in degrees, of conformers (B, N, 3) -> (B, R).

    Ends are the mean of an atom's other heavy neighbours, or of its hydrogens: the same for all
    numberings of equal hydrogens.
    """
    out = []
    for i, j, _ in rotors(graph):
        axis = x[:, j] - x[:, i]
        a, b = (_end(graph, x, p, q) - x[:, p] for p, q in ((i, j), (j, i)))
        u, v = torch.linalg.cross(a, axis), torch.linalg.cross(b, axis)
        cos = torch.nn.functional.cosine_similarity(u, v, dim=-1)
        out.append(torch.rad2deg(cos.clamp(-1, 1).acos()))
    return torch.stack(out, -1) if out else x.new_zeros(len(x), 0)


def _end(graph: MolecularGraph, x: Tensor, i: int, j: int) -> Tensor:
    others = _others(graph, i, j)
    heavy = [k for k in others if graph.numbers[k] > 1]
    return x[:, heavy or others].mean(1)


EDGES = (40.0, 110.0)
"""Classes of a torsion: near 0, near 60 or 90, near 120 to 180 degrees."""


def rotamers(graph: MolecularGraph, x: Tensor) -> Tensor:
    """Class of each conformer by its torsions, (B,) of integers below 3^R."""
    angles = torsions(graph, x)
    third = (angles[..., None] > torch.tensor(EDGES)).sum(-1)
    return (third * 3 ** torch.arange(third.shape[1])).sum(1)
