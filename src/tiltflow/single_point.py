"""One xTB calculation, for worker processes: no torch here."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import CapabilityError

Method = Literal["GFN1-xTB", "GFN2-xTB"]
Backend = Literal["tblite", "dxtb"]
Array: TypeAlias = NDArray[Any]

BOHR = 0.529177210903
"""In Angstrom (CODATA 2018)."""

HARTREE_EV = 27.211386245988
"""A Hartree in eV."""

HARTREE_KCAL = 627.5094740631
"""A Hartree in kcal/mol."""

DEBYE = 4.803204712570
"""One e Angstrom in Debye."""

NEEDED = {
    "tblite": "tblite is needed for xTB energies: pip install 'tiltflow[molecules]'.",
    "dxtb": "The backend 'dxtb' is not installed: pip install 'tiltflow[dxtb]' (Python below "
    "3.13, numpy below 2), or use the backend 'tblite'.",
}


@final
@dataclass(frozen=True)
class Job:
    """What is to be computed: atomic numbers (n,), positions (n, 3) in Angstrom, and how."""

    numbers: Array
    positions: Array
    method: Method = "GFN2-xTB"
    backend: Backend = "tblite"
    closest: float = 0.3


@final
@dataclass(frozen=True)
class SinglePoint:
    """What came out, of a neutral molecule.

    Attributes:
        energy: in Hartree.
        gradient: of the energy, (n, 3), in Hartree per Angstrom.
        dipole: (3,), in e Angstrom; its length does not depend on the origin.
        gap: energy of the lowest orbital that is less than half full minus that of the highest
            one that is at least half full, in eV.
        failure: why there is none of this, or ``None``.
    """

    energy: float = float("nan")
    gradient: Array = field(default_factory=lambda: np.zeros((0, 3)))
    dipole: Array = field(default_factory=lambda: np.zeros(3))
    gap: float = float("nan")
    failure: str | None = None


def require_backend(backend: Backend, method: Method) -> None:
    """Raise ``CapabilityError`` where a backend is not installed, or not for this method."""
    for package in (backend, "threadpoolctl"):
        if importlib.util.find_spec(package) is None:
            raise CapabilityError(NEEDED[backend])
    hydrogen = Job(np.array([1, 1]), np.array([[0.0, 0, 0], [0, 0, 0.74]]), method, backend)
    try:
        _COMPUTE[backend](hydrogen)
    except Exception as error:  # whatever it is: no molecule could be computed
        raise CapabilityError(
            f"{backend} cannot compute H2 by {method}: {error} {NEEDED[backend]}"
        ) from error


def limit_threads() -> None:
    """Of a worker process: one thread, which is several times faster than two for such sizes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    importlib.import_module("tblite.interface")
    importlib.import_module("threadpoolctl").threadpool_limits(1)


def single_points(jobs: list[Job]) -> list[SinglePoint]:
    """One after another; none of them raises."""
    return [single_point(job) for job in jobs]


def single_point(job: Job) -> SinglePoint:
    """Energy and properties of one molecule; a sentence in ``failure`` where there are none."""
    reason = unusable(job)
    if reason:
        return SinglePoint(failure=reason)
    try:
        found = _COMPUTE[job.backend](job)
    except (RuntimeError, ValueError, ArithmeticError):
        return SinglePoint(failure="not converged")
    if not (np.isfinite(found.energy) and np.isfinite(found.gradient).all()):
        return SinglePoint(failure="not converged")
    return found


def unusable(job: Job) -> str | None:
    """Why a calculation need not be tried: positions, number of atoms, overlapping atoms."""
    x = job.positions
    if len(x) < 2:
        return "fewer than two atoms"
    if not np.isfinite(x).all():
        return "positions not finite"
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    if d[np.triu_indices(len(x), 1)].min() < job.closest:
        return "atoms too close"
    return None


def atom_energy(number: int, method: Method) -> float:
    """Energy of a free neutral atom in its lowest spin state by the same method, in Hartree."""
    return _tblite(Job(np.array([number]), np.zeros((1, 3)), method)).energy


def _tblite(job: Job) -> SinglePoint:
    from tblite.interface import Calculator

    calculator = Calculator(job.method, job.numbers, job.positions / BOHR)
    calculator.set("verbosity", 0)
    found = calculator.singlepoint()
    levels, filled = found.get("orbital-energies"), found.get("orbital-occupations")
    return SinglePoint(
        energy=float(found.get("energy")),
        gradient=np.asarray(found.get("gradient")) / BOHR,
        dipole=np.asarray(found.get("dipole")) * BOHR,
        gap=_gap(np.asarray(levels), np.asarray(filled)) * HARTREE_EV,
    )


def _gap(levels: Array, filled: Array) -> float:
    """LUMO minus HOMO; levels that share electrons of a radical count as half full."""
    levels, filled = levels.reshape(-1), filled.reshape(-1)
    full = filled >= filled.max() / 2
    return float(levels[~full].min() - levels[full].max()) if (~full).any() else float("nan")


def _dxtb(job: Job) -> SinglePoint:
    """By automatic differentiation; without dipole and gap."""
    import dxtb
    import torch

    numbers = torch.as_tensor(job.numbers, dtype=torch.long)
    x = torch.as_tensor(job.positions / BOHR, dtype=torch.float64).requires_grad_()
    parameters = dxtb.GFN1_XTB if job.method == "GFN1-xTB" else dxtb.GFN2_XTB
    options: dict[str, Any] = {"verbosity": 0}
    if importlib.util.find_spec("tad_libcint"):
        options["int_driver"] = "libcint"
    calculator = dxtb.Calculator(numbers, parameters, dtype=torch.float64, opts=options)
    with torch.enable_grad():
        energy = calculator.get_energy(x, chrg=torch.tensor(0.0, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(energy, x)
    return SinglePoint(energy.item(), gradient.numpy() / BOHR)


_COMPUTE: dict[Backend, Callable[[Job], SinglePoint]] = {"tblite": _tblite, "dxtb": _dxtb}
