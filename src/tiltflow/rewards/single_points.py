"""xTB calculations of many molecules: remembered, spread over processes, failures counted."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np

from tiltflow.errors import CapabilityError, ConfigError
from tiltflow.molecules import Molecules
from tiltflow.single_point import (
    Backend,
    Job,
    Method,
    SinglePoint,
    atom_energy,
    limit_threads,
    require_backend,
    single_points,
)

_POOLS: dict[int, ProcessPoolExecutor] = {}

CHUNKS = 4
"""Parts per process that a batch is cut into: molecules do not take equally long."""


@final
@dataclass(frozen=True, eq=False)
class SinglePoints:
    """Energies, gradients and properties of batches of molecules by xTB.

    A molecule that fails does not disturb the others: its ``SinglePoint`` says why, and
    ``counts`` is raised by one. Reasons are "positions not finite", "fewer than two atoms",
    "atoms too close", "not converged" (also: an element that xTB does not know), "energy out of
    bounds" and "process ended".

    Args:
        method: "GFN2-xTB" (Bannwarth et al., 2019) or "GFN1-xTB" (Grimme et al., 2017).
        backend: "tblite", or "dxtb" (no dipole or gap; several times slower).
        workers: processes, each with one thread; 0 computes in this process. They are started
            once and shared; each imports the script again, which then needs
            ``if __name__ == "__main__":``, and takes the time of its imports.
        closest: distance in Angstrom; atoms nearer than this are a failure without calculation.
        bound: in Hartree per atom. A formation energy (from free atoms) beyond plus or minus this
            is a failure. Molecules in the style of QM9 have -0.28 to -0.16; with 0.5 Angstrom of
            noise on every coordinate it is about 0, and xTB then gives almost any number.
        capacity: how many molecules are remembered, by their very positions.

    Attributes:
        counts: how often each failure happened.

    Raises:
        CapabilityError: if the backend is not installed, or its processes cannot start.
    """

    method: Method = "GFN2-xTB"
    backend: Backend = "tblite"
    workers: int = 0
    closest: float = 0.3
    bound: float = 0.5
    capacity: int = 20_000
    counts: Counter[str] = field(init=False, repr=False, default_factory=Counter)
    _known: OrderedDict[bytes, SinglePoint] = field(
        init=False, repr=False, default_factory=OrderedDict
    )
    _atoms: dict[int, float] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in ("GFN1-xTB", "GFN2-xTB"):
            raise ConfigError(f"method={self.method!r} must be 'GFN2-xTB' or 'GFN1-xTB'.")
        if self.backend not in ("tblite", "dxtb"):
            raise ConfigError(f"backend={self.backend!r} must be 'tblite' or 'dxtb'.")
        if self.workers < 0 or self.capacity < 1 or not (self.closest > 0 and self.bound > 0):
            raise ConfigError(
                f"xTB: workers={self.workers} must not be negative; capacity={self.capacity}, "
                f"closest={self.closest} and bound={self.bound} must be positive."
            )
        require_backend("tblite", self.method)  # for free atoms, too
        require_backend(self.backend, self.method)

    def __call__(self, molecules: Molecules) -> list[SinglePoint]:
        """One result per molecule, in order; equal molecules are computed once."""
        jobs = self._jobs(molecules)
        keys = [job.numbers.tobytes() + b"|" + job.positions.tobytes() for job in jobs]
        new = {k: job for k, job in zip(keys, jobs, strict=True) if k not in self._known}
        found = dict(zip(new, self._computed(list(new.values())), strict=True))
        out = [found[k] if k in found else self._known[k] for k in keys]
        for key, point in zip(keys, out, strict=True):
            self._known[key] = point
            self._known.move_to_end(key)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return out

    def free_atoms(self, numbers: Sequence[int]) -> float:
        """Sum of the energies of free atoms by the same method, in Hartree; 0 is padding."""
        for z in set(numbers) - set(self._atoms):
            self._atoms[z] = atom_energy(z, self.method) if z > 0 else 0.0
        return math.fsum(self._atoms[z] for z in numbers)

    def _jobs(self, molecules: Molecules) -> list[Job]:
        numbers = molecules.numbers.cpu().numpy().astype(np.int64)
        positions = molecules.positions.detach().double().cpu().numpy()
        return [
            Job(z[z > 0], np.ascontiguousarray(x[z > 0]), self.method, self.backend, self.closest)
            for z, x in zip(numbers, positions, strict=True)
        ]

    def _computed(self, jobs: list[Job]) -> list[SinglePoint]:
        if not jobs:
            return []
        raw = in_processes(jobs, self.workers) if self.workers else _here(jobs)
        out = [self._within(job, point) for job, point in zip(jobs, raw, strict=True)]
        self.counts.update(point.failure for point in out if point.failure)
        return out

    def _within(self, job: Job, point: SinglePoint) -> SinglePoint:
        """A failure, where the formation energy is nothing that a molecule can have."""
        if point.failure:
            return point
        formation = point.energy - self.free_atoms(job.numbers.tolist())
        if abs(formation) > self.bound * len(job.numbers):
            return replace(point, failure="energy out of bounds")
        return point

    def __str__(self) -> str:
        return self.method


def _here(jobs: list[Job]) -> list[SinglePoint]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return single_points(jobs)


def in_processes(jobs: list[Job], workers: int) -> list[SinglePoint]:
    """The same by a pool of processes; a process that dies costs the molecule that it was at."""
    pool = _pool(workers)
    size = math.ceil(len(jobs) / (CHUNKS * workers))
    parts = [jobs[i : i + size] for i in range(0, len(jobs), size)]
    futures: list[Future[list[SinglePoint]]] = []
    try:
        futures = [pool.submit(single_points, part) for part in parts]
        return [point for future in futures for point in future.result()]
    except BrokenProcessPool:
        _POOLS.pop(workers, None)
        return [_alone(job, workers) for job in jobs]


def _alone(job: Job, workers: int) -> SinglePoint:
    """One molecule at a time, so that the one that ends a process is known."""
    try:
        return _pool(workers).submit(single_points, [job]).result()[0]
    except BrokenProcessPool:
        _POOLS.pop(workers, None)
        return SinglePoint(failure="process ended")


def _pool(workers: int) -> ProcessPoolExecutor:
    """The pool of so many processes; forked from a clean server where there is one."""
    if workers not in _POOLS:
        kinds = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in kinds else "spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=limit_threads)
        try:
            pool.submit(os.getpid).result()
        except BrokenProcessPool as error:
            raise CapabilityError(
                f"The {workers} processes for xTB cannot start. Put the script's code under "
                "`if __name__ == '__main__':`, as new processes import it, or set workers=0."
            ) from error
        _POOLS[workers] = pool
    return _POOLS[workers]


__all__ = ["SinglePoints"]
