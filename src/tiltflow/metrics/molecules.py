"""How good molecules are: stability, validity, novelty, diversity and energy, told together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from tiltflow.bonds import connected, perceived, smiles, stable_atoms
from tiltflow.density import Empirical
from tiltflow.errors import CapabilityError, ShapeError
from tiltflow.features import Features
from tiltflow.metrics.shares import shares
from tiltflow.molecules import Molecules
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.similarity import Similarity
from tiltflow.types import Estimate
from tiltflow.utilities import KernelDiversity

MOST_COMPARED = 1000
"""Molecules whose fingerprints are compared with each other."""


@final
@dataclass(frozen=True, eq=False)
class Tanimoto(Similarity):
    """k(x, y) = x.y / (|x|^2 + |y|^2 - x.y) of vectors of zeros and ones: shared / all bits.

    Positive definite with k(x, x) = 1. Two vectors without any bit are alike.
    """

    features: Features | None = None

    def _matrix(self, x: Tensor, y: Tensor) -> Tensor:
        shared = x @ y.T
        either = x.square().sum(1)[:, None] + y.square().sum(1) - shared
        return torch.where(either > 0, shared / either.clamp(min=1e-12), torch.ones_like(either))

    def _diagonal(self, x: Tensor) -> Tensor:
        return x.new_ones(len(x))


def atom_stability(molecules: Molecules) -> Estimate:
    """Share of atoms with the right valency (``bonds.stable_atoms``), over all atoms.

    Atoms of one molecule fail together: the error is that of a ratio of sums over molecules.
    """
    atoms = molecules.mask.sum(1).double().cpu()
    stable = stable_atoms(molecules).sum(1).double().cpu()
    rate = float(stable.sum() / atoms.sum().clamp(min=1))
    scatter = float((stable - rate * atoms).square().sum().sqrt() / atoms.sum().clamp(min=1))
    return Estimate(rate, scatter, len(molecules))


def molecule_stability(molecules: Molecules) -> Estimate:
    """Share of molecules all of whose atoms are stable."""
    stable = (stable_atoms(molecules) | ~molecules.mask).all(1) & molecules.mask.any(1)
    return _share(stable)


def uniqueness(written: Collection[str]) -> Estimate:
    """Distinct SMILES / all SMILES. It falls with their number, which is ``count``.

    The error is the jackknife's: leaving out one of n loses a distinct SMILES where it occurs
    once, in a share s of them; sqrt(s (1 - s) / n), with (n s + 1) / (n + 2) for s.
    """
    n, times = len(written), Counter(written)
    once = (sum(1 for count in times.values() if count == 1) + 1) / (n + 2)
    return Estimate(len(times) / n, math.sqrt(once * (1 - once) / n), n)


def novelty(written: Collection[str], known: Collection[str]) -> Estimate:
    """Share of the distinct SMILES that are not among ``known``, canonical SMILES as well."""
    seen = set(known)
    return _share(torch.tensor([s not in seen for s in sorted(set(written))]))


def diversity(found: Collection[Any], *, at_most: int = MOST_COMPARED) -> Estimate:
    """Vendi score of RDKit molecules: the effective number of different ones::

        exp(-sum_i l_i log l_i),   l_i eigenvalues of T / n,   T_ij Tanimoto similarities

    of Morgan fingerprints (radius 2, 2048 bits) of the molecules without hydrogens (Friedman and
    Dieng, 2023). It grows with n: compare at equal ``count``. Of more than ``at_most``, the first.
    """
    bits = fingerprints(list(found)[:at_most])
    functional = KernelDiversity(Tanimoto(), ridge=1e-9, num_landmarks=len(bits))
    log = functional.value(Empirical(bits))
    return Estimate(math.exp(log.value), math.exp(log.value) * log.standard_error, len(bits))


def fingerprints(found: Collection[Any]) -> Tensor:
    """Morgan fingerprints of RDKit molecules without hydrogens, (n, 2048) of 0. and 1."""
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdFingerprintGenerator

    with rdBase.BlockLogs():
        generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
        rows = [generator.GetFingerprintAsNumPy(Chem.RemoveHs(m)) for m in found]
    return torch.stack([torch.from_numpy(row).double() for row in rows])


def formation_energies(molecules: Molecules, points: SinglePoints) -> Tensor:
    """xTB energy minus that of the free atoms, per atom, (B,), in Hartree; NaN for failures."""
    out = []
    for i, point in enumerate(points(molecules)):
        numbers = molecules[i][0].tolist()
        lost = point.failure is not None
        out.append(
            math.nan if lost else (point.energy - points.free_atoms(numbers)) / len(numbers)
        )
    return torch.tensor(out, dtype=torch.float64)


def energies_by_size(molecules: Molecules, points: SinglePoints) -> Mapping[int, Estimate]:
    """Mean formation energy per atom in Hartree of the molecules of each number of atoms.

    Failures are left out; sizes with fewer than two molecules have an infinite error.
    """
    energies, sizes = formation_energies(molecules, points), molecules.mask.sum(1).cpu()
    out = {}
    for n in sorted({*sizes.tolist()}):
        kept = energies[(sizes == n) & energies.isfinite()]
        if len(kept):
            out[n] = Estimate.of(kept)
    return out


def posebusters(found: Collection[Any | None]) -> Estimate:
    """Share that pass every check of PoseBusters for a single molecule (Buttenschoen et al.,
    2024); ``None``, an invalid molecule, fails. 0.2 s per molecule, 10 s for strained rings.

    Raises:
        CapabilityError: if PoseBusters is not installed.
    """
    try:
        from posebusters import PoseBusters
    except ImportError as error:
        raise CapabilityError(
            "PoseBusters is not installed: pip install 'tiltflow[eval]', or leave it out."
        ) from error
    valid = [m for m in found if m is not None]
    passed = PoseBusters(config="mol").bust(valid).all(axis=1).tolist() if valid else []
    return _share(torch.tensor(passed + [False] * (len(found) - len(valid))))


def molecule_report(
    molecules: Molecules,
    *,
    known: Collection[str] | None = None,
    points: SinglePoints | None = None,
    checks: bool = False,
) -> dict[str, Estimate]:
    """Everything at once, with standard errors: one number of these is easily raised alone.

    * ``atom_stability``, ``molecule_stability``: of all, by EDM's rule.
    * ``valid``: RDKit sanitises it; ``valid_connected``: and it is one piece. Of all.
    * ``unique``: distinct among the valid; ``novel``: of the distinct, not in ``known``.
    * ``vendi``: effective number of different ones among the valid, see ``diversity``.
    * ``atoms``: mean number of atoms.
    * with ``points``: ``xtb_failed``, share of all; ``formation_energy_per_atom`` of the others,
      in Hartree, and ``formation_energy_per_atom[n]`` of those with n atoms.
    * with ``checks``: ``posebusters``, share of all that pass.

    What is told of valid molecules is absent where there is none.

    Args:
        molecules: B > 0 of them, independent samples.
        known: canonical SMILES (``bonds.smiles``) of the training data.
        points: how energies are computed; none without.
        checks: whether to run PoseBusters.

    Raises:
        CapabilityError: if RDKit, or a package that was asked for, is not installed.
        UnsupportedError: for elements other than H, C, N, O and F.
    """
    if len(molecules) == 0:
        raise ShapeError("molecule_report: there are no molecules.")
    found = perceived(molecules)
    out = {
        "atom_stability": atom_stability(molecules),
        "molecule_stability": molecule_stability(molecules),
        "valid": _share(torch.tensor([m is not None for m in found])),
        "valid_connected": _share(torch.tensor([connected(m) for m in found])),
        "atoms": Estimate.of(molecules.mask.sum(1)),
    }
    out |= _of_valid([m for m in found if m is not None], known)
    if points is not None:
        out |= _energies(molecules, points)
    if checks:
        out["posebusters"] = posebusters(found)
    return out


def _of_valid(valid: list[Any], known: Collection[str] | None) -> dict[str, Estimate]:
    written = [s for s in map(smiles, valid) if s is not None]
    if not written:
        return {}
    out = {"unique": uniqueness(written), "vendi": diversity(valid)}
    if known is not None:
        out["novel"] = novelty(written, known)
    return out


def _energies(molecules: Molecules, points: SinglePoints) -> dict[str, Estimate]:
    energies = formation_energies(molecules, points)
    out = {"xtb_failed": _share(energies.isnan())}
    if not bool(energies.isnan().all()):
        out["formation_energy_per_atom"] = Estimate.of(energies[energies.isfinite()])
    by_size = energies_by_size(molecules, points)
    return out | {f"formation_energy_per_atom[{n}]": e for n, e in by_size.items()}


def _share(flags: Tensor) -> Estimate:
    return shares(flags.long(), 2)["1"]


__all__ = [
    "Tanimoto",
    "atom_stability",
    "diversity",
    "energies_by_size",
    "fingerprints",
    "formation_energies",
    "molecule_report",
    "molecule_stability",
    "novelty",
    "posebusters",
    "uniqueness",
]
