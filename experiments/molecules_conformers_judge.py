"""What ``molecules_conformers.py`` measures: xTB before and after relaxation, rotamers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from molecules_conformers_data import Energy, rotamers, rotors
from torch import Tensor
from toys import Record

from tiltflow.adapters.molecular_graph import MolecularGraph, embedded
from tiltflow.errors import ConfigError
from tiltflow.potential import Potential
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.rewards.xtb import XTBEnergy
from tiltflow.single_point import DEBYE, HARTREE_EV, HARTREE_KCAL, Job, SinglePoint, single_points
from tiltflow.types import Access, Cond

KT = 0.592
"""Of the Boltzmann averages of the protocol, in kcal/mol (298 K)."""

SAME = {"energy": 0.1, "dipole": 0.1}
"""Relaxed conformers are the same if energies (kcal/mol) and dipoles (Debye) differ by less."""

FIELD_SAME = 1e-3
"""Conformers relaxed by MMFF94 are the same if their energies (kcal/mol) differ by less."""

WINDOW = 3.0
"""Coverage counts references so many kcal/mol above the lowest."""

FORCE = 3e-4
"""Largest component of the gradient where a relaxation ends, in Hartree per Angstrom."""


@functools.cache
def points() -> SinglePoints:
    """GFN2-xTB, remembered."""
    return SinglePoints()


@final
@dataclass(frozen=True)
class Property:
    """Of a relaxed conformer: energies and gaps in kcal/mol, the dipole moment in Debye."""

    energy: float
    dipole: float
    gap: float


def computed(graph: MolecularGraph, x: Tensor) -> tuple[list[Property], Tensor]:
    """Conformers (B, N, 3) relaxed by GFN2-xTB, those that keep their bonds and converge.

    Returns:
        their properties and positions.
    """
    ends = [relaxed(graph, each) for each in x.double().numpy()]
    found = [(p, y) for p, y in ends if p.failure is None]
    if not found:
        return [], torch.zeros(0, len(graph), 3)
    places = torch.tensor(np.stack([y for _, y in found]))
    fine = graph.kept(places).tolist()
    return [_property(p) for (p, _), f in zip(found, fine, strict=True) if f], places[fine]


def _property(p: SinglePoint) -> Property:
    ev = HARTREE_KCAL / HARTREE_EV
    dipole = float(np.linalg.norm(p.dipole)) * DEBYE
    return Property(p.energy * HARTREE_KCAL, dipole, p.gap * ev)


def relaxed(graph: MolecularGraph, x: Any) -> tuple[SinglePoint, Any]:
    """The end of a descent by L-BFGS with xTB's gradients, (N, 3)."""
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    numbers, last = np.array(graph.numbers, dtype=np.int64), SinglePoint(failure="not begun")

    def worth(flat: Any) -> tuple[float, Any]:
        nonlocal last
        (point,) = single_points([Job(numbers, flat.reshape(-1, 3))])
        last = point
        if point.failure:
            return 1e3, np.zeros_like(flat)
        return point.energy, point.gradient.ravel()

    options = {"gtol": FORCE, "ftol": 1e-11, "maxiter": 300}
    with threadpool_limits(1):
        end = minimize(worth, x.ravel(), jac=True, method="L-BFGS-B", options=options)
        worth(end.x)
    return last, end.x.reshape(-1, 3)


def distinct(found: Sequence[Property]) -> list[Property]:
    """Each conformer once, from the lowest up."""
    out: list[Property] = []
    for p in sorted(found, key=lambda p: p.energy):
        if not any(same(p, q) for q in out):
            out.append(p)
    return out


def same(p: Property, q: Property) -> bool:
    """Whether two relaxed conformers are one."""
    apart = {"energy": abs(p.energy - q.energy), "dipole": abs(p.dipole - q.dipole)}
    return all(apart[key] < SAME[key] for key in SAME)


def references(graph: MolecularGraph, count: int) -> list[Property]:
    """The distinct minima of GFN2-xTB that are reached from the distinct ones, by energy, of
    MMFF94 among ``count`` ETKDG conformers."""
    x = embedded(graph, count, 11, relaxed=True)
    energy = Energy(graph, {"mmff": 1.0})
    levels = torch.tensor([energy.value(each) for each in x.numpy()])
    order = levels.argsort()
    fresh = torch.cat([torch.ones(1), levels[order].diff()]) > FIELD_SAME
    return distinct(computed(graph, x[order[fresh]])[0])


def ensemble(found: Sequence[Property]) -> Record:
    """Boltzmann averages over distinct conformers, and the lowest energy."""
    each = distinct(found)
    energies = torch.tensor([p.energy for p in each], dtype=torch.float64)
    w = torch.softmax(-energies / KT, 0)
    out = {
        key: float((w * torch.tensor([getattr(p, key) for p in each])).sum())
        for key in ("energy", "dipole", "gap")
    }
    return out | {"lowest": float(energies.min())}


def errors(found: Sequence[Property], known: Sequence[Property]) -> Record:
    """|generated - reference| of the averages and of the lowest energy, the coverage, and the mean
    energy of all that was found above the lowest reference."""
    near = [q for q in known if q.energy < known[0].energy + WINDOW]
    if not found:
        return {"coverage": 0.0}
    mine, true = ensemble(found), ensemble(known)
    hit = sum(any(same(p, q) for p in found) for q in near)
    mean = sum(p.energy for p in found) / len(found) - known[0].energy
    gaps = {key: abs(mine[key] - true[key]) for key in true}
    return gaps | {"coverage": hit / len(near), "mean": mean}


def judged(graph: MolecularGraph, x: Tensor, law: Tensor, *, relax: int, single: int) -> Record:
    """Everything about samples (B, N, 3) but ``errors``, in kcal/mol.

    Args:
        graph: of the molecule.
        x: independent samples.
        law: shares of rotamers that the samples should have.
        relax: how many are relaxed.
        single: how many single points as they are.
    """
    energies = points()(graph.molecules(x[:single].double()))
    raw = torch.tensor([p.energy * HARTREE_KCAL for p in energies if not p.failure])
    found, _ = computed(graph, x[:relax])
    mine = shares(graph, x)
    return {
        "kept": float(graph.kept(x).double().mean()),
        "middle": float(raw.median()),
        "found": [[p.energy, p.dipole, p.gap] for p in found],
        "rotamers": float((mine - law).abs().sum() / 2), "shares": mine.tolist(),
        "law": law.tolist(), "relaxed": len(found) / relax,
    }  # fmt: skip


def shares(graph: MolecularGraph, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of the rotamers, of conformers (B, N, 3), (3^R,)."""
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weights is None else weights
    out = torch.zeros(3 ** len(rotors(graph)), dtype=torch.float64)
    return out.index_add_(0, rotamers(graph, x), w.double())


@final
@dataclass(frozen=True, eq=False)
class Lowness(Potential):
    """-E / kT of the molecule by GFN2-xTB after MMFF94 has relaxed it, above a level; values only.

    The strain of samples, which is tens of kT, would otherwise decide everything.

    Args:
        graph: of the molecule.
        kt: in kcal/mol.
        level: energy whose reward is 0, in kcal/mol.
    """

    graph: MolecularGraph
    kt: float
    level: float

    @property
    def offers(self) -> Access:
        return Access.VALUE

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        y = torch.stack([settled(self.graph, each) for each in x.detach().cpu()])
        energy = XTBEnergy(
            self.graph.layout, unit="kcal/mol", negate=False, points=points()
        ).energies(self.graph.molecules(y))
        if not bool(energy.isfinite().all()):
            raise ConfigError("Lowness: xTB does not converge for a conformer of MMFF94.")
        return (-(energy * HARTREE_KCAL - self.level) / self.kt).to(x)


def settled(graph: MolecularGraph, x: Tensor) -> Tensor:
    """A conformer (N, 3) relaxed by MMFF94, of float64."""
    from rdkit.Geometry import Point3D

    molecule, field = _field(graph)
    place = molecule.GetConformer()
    for i, row in enumerate(x.double().tolist()):
        place.SetAtomPosition(i, Point3D(*row))
    field.Minimize(maxIts=1000)
    return torch.tensor(place.GetPositions())


@functools.cache
def _field(graph: MolecularGraph) -> tuple[Any, Any]:
    energy = Energy(graph, {"mmff": 1.0})
    return energy.molecule, energy.fields[0][1]


__all__ = ["Lowness", "Property", "errors", "judged", "references", "shares"]
