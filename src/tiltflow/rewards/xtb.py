"""Rewards of molecules by semi-empirical quantum chemistry (xTB): energy, dipole, gap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from tiltflow.errors import ConfigError
from tiltflow.molecules import Layout, Molecules
from tiltflow.potential import Potential
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.single_point import DEBYE, HARTREE_KCAL, Array, Backend, Method, SinglePoint
from tiltflow.types import Access, Cond

Per = Literal["molecule", "atom", "formation", "formation_per_atom"]

UNITS = {"hartree": 1.0, "kcal/mol": HARTREE_KCAL}


@final
@dataclass(frozen=True, eq=False)
class XTBEnergy(Potential):
    """Minus the xTB energy of a molecule: low energies are high rewards::

        r(x) = -scale * (E(x) - reference)

    E is the total energy of the neutral molecule as it stands (a single point, no relaxation);
    types are read by argmax and constant, so that the gradient is in the positions alone.

    ``per`` says what of it: "molecule" (reference 0, scale 1: the number is mostly the size),
    "atom" (scale 1/n), "formation" (reference: the free atoms by the same method; minus the
    atomisation energy), or "formation_per_atom", which compares molecules of different sizes.

    Failures (see ``SinglePoints``) have no gradient and a finite value, ``failure``. By default
    this is what a molecule of these atoms with a formation energy of +``bound`` per atom has:
    worse than anything that is computed of the same atoms. They are counted in ``failures``.

    The gradient has zero mean over the atoms, and its norm over the molecule is clipped: where
    the forces are stronger than ``max_force``, it is no longer the derivative of the value.

    Args:
        layout: how states are molecules.
        method: "GFN2-xTB" or "GFN1-xTB".
        per: see above.
        unit: "hartree" or "kcal/mol".
        negate: whether low energies are high rewards; ``False`` rewards high energies.
        failure: reward of a failure, in ``unit``; ``None`` for the default above.
        bound: largest absolute formation energy per atom that is believed, in Hartree.
        max_force: largest norm of the gradient of E, in Hartree per Angstrom. It is 0.1 to
            0.4 for nine in ten of G-SchNet's molecules, and 0.2 to 1.3 for a weak model's.
        closest: atoms nearer than this, in Angstrom, are a failure without a calculation.
        workers: processes; 0 computes in this one.
        backend: "tblite" or "dxtb".
        points: where the calculations come from: give several rewards one, and each molecule is
            computed once. It replaces method, bound, closest, workers and backend.

    Raises:
        CapabilityError: if the backend is not installed.
    """

    layout: Layout = field(default_factory=Layout)
    method: Method = "GFN2-xTB"
    per: Per = "molecule"
    unit: Literal["hartree", "kcal/mol"] = "hartree"
    negate: bool = True
    failure: float | None = None
    bound: float = 0.5
    max_force: float = 2.0
    closest: float = 0.3
    workers: int = 0
    backend: Backend = "tblite"
    points: SinglePoints | None = None
    _points: SinglePoints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.per not in ("molecule", "atom", "formation", "formation_per_atom"):
            raise ConfigError(
                f"XTBEnergy: per={self.per!r} must be 'molecule', 'atom', 'formation' or "
                "'formation_per_atom'."
            )
        if self.unit not in UNITS:
            raise ConfigError(f"XTBEnergy: unit={self.unit!r} must be 'hartree' or 'kcal/mol'.")
        if not self.max_force > 0 or not math.isfinite(self.failure or 0.0):
            raise ConfigError(
                f"XTBEnergy: max_force={self.max_force} must be positive and "
                f"failure={self.failure} finite or None."
            )
        points = self.points or SinglePoints(
            self.method, self.backend, self.workers, self.closest, self.bound
        )
        object.__setattr__(self, "_points", points)

    @property
    def offers(self) -> Access:
        return Access.BOTH

    @property
    def failures(self) -> Mapping[str, int]:
        """How often each kind of failure happened so far."""
        return dict(self._points.counts)

    def energies(self, molecules: Molecules) -> Tensor:
        """E of each, (B,) of float64, in Hartree per molecule; NaN for failures."""
        found = self._points(molecules)
        return torch.tensor(
            [math.nan if p.failure else p.energy for p in found], dtype=torch.float64
        )

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[0]

    def _grad(self, x: Tensor, cond: Cond | None) -> Tensor:
        return self._value_and_grad(x, cond)[1]

    def _value_and_grad(self, x: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        molecules = self.layout.decode(x.detach(), cond)
        values, grad = [], torch.zeros(x.shape, dtype=torch.float64)
        for i, point in enumerate(self._points(molecules)):
            atoms = molecules.mask[i].cpu()
            value, pull = self._one(point, molecules.numbers[i][molecules.mask[i]].tolist())
            values.append(value)
            if len(pull):
                grad[i, atoms, :3] = torch.from_numpy(pull)
        return torch.tensor(values, dtype=torch.float64).to(x), grad.to(x)

    def _one(self, point: SinglePoint, numbers: list[int]) -> tuple[float, Array]:
        """Reward of one molecule and its gradient in the positions; (0, 3) for a failure."""
        n, none = max(len(numbers), 1), np.zeros((0, 3))
        scale = (-1 if self.negate else 1) * UNITS[self.unit]
        if self.per in ("atom", "formation_per_atom"):
            scale /= n
        atoms = self._points.free_atoms(numbers)
        reference = atoms if self.per.startswith("formation") else 0.0
        if point.failure:
            worst = n * self._points.bound * (1 if self.negate else -1)
            value = scale * (atoms + worst - reference)
            return value if self.failure is None else self.failure, none
        pull = point.gradient - point.gradient.mean(0)
        shrink = min(1.0, self.max_force / max(float(np.linalg.norm(pull)), 1e-300))
        return scale * (point.energy - reference), scale * shrink * pull

    def __str__(self) -> str:
        sign = "-" if self.negate else ""
        return f"{sign}{self._points} energy per {self.per} in {self.unit}"


@final
@dataclass(frozen=True, eq=False)
class XTBProperty(Potential):
    """Dipole moment or HOMO-LUMO gap of a molecule by xTB; values only.

    The dipole moment is the length of the vector, of the neutral molecule; the gap is that of the
    orbital energies, which for a radical is small. Failures are as in ``XTBEnergy``.

    Args:
        quantity: "dipole" or "gap".
        layout: how states are molecules.
        unit: "debye" or "e angstrom" for the dipole, "ev" for the gap; by default the first.
        method: "GFN2-xTB" or "GFN1-xTB".
        failure: value of a failure, in ``unit``.
        workers: processes; 0 computes in this one.
        points: as in ``XTBEnergy``; it replaces method and workers.

    Raises:
        CapabilityError: if tblite is not installed.
    """

    quantity: Literal["dipole", "gap"]
    layout: Layout = field(default_factory=Layout)
    unit: Literal["debye", "e angstrom", "ev"] | None = None
    method: Method = "GFN2-xTB"
    failure: float = 0.0
    workers: int = 0
    points: SinglePoints | None = None
    _points: SinglePoints = field(init=False, repr=False)

    def __post_init__(self) -> None:
        units = {"dipole": (None, "debye", "e angstrom"), "gap": (None, "ev")}
        if self.quantity not in units or self.unit not in units[self.quantity]:
            raise ConfigError(
                f"XTBProperty: quantity={self.quantity!r} with unit={self.unit!r}; there are "
                "'dipole' in 'debye' or 'e angstrom', and 'gap' in 'ev'."
            )
        if not math.isfinite(self.failure):
            raise ConfigError(f"XTBProperty: failure={self.failure} must be finite.")
        points = self.points or SinglePoints(self.method, workers=self.workers)
        if points.backend != "tblite":
            raise ConfigError("XTBProperty: only the backend 'tblite' has dipoles and gaps.")
        object.__setattr__(self, "_points", points)

    @property
    def offers(self) -> Access:
        return Access.VALUE

    @property
    def failures(self) -> Mapping[str, int]:
        """How often each kind of failure happened so far."""
        return dict(self._points.counts)

    def _value(self, x: Tensor, cond: Cond | None) -> Tensor:
        found = self._points(self.layout.decode(x.detach(), cond))
        return torch.tensor([self._one(p) for p in found], dtype=torch.float64).to(x)

    def _one(self, point: SinglePoint) -> float:
        if point.failure:
            return self.failure
        if self.quantity == "gap":
            return point.gap if math.isfinite(point.gap) else self.failure
        return float(np.linalg.norm(point.dipole)) * (1 if self.unit == "e angstrom" else DEBYE)

    def __str__(self) -> str:
        return f"{self._points} {self.quantity}"


__all__ = ["XTBEnergy", "XTBProperty"]
