"""xTB rewards: energies and gradients per second and core, and what happens to wrecks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Page, Settings

sys.path.insert(0, str(ROOT.parent / "tests"))

from molecule_data import GSCHNET, gschnet
from tiltflow.bonds import perceived
from tiltflow.metrics.molecules import atom_stability
from tiltflow.molecules import Layout, Molecules
from tiltflow.rewards import DrugScore, Valency, XTBEnergy
from tiltflow.rewards.single_points import SinglePoints, _pool
from tiltflow.seed import Seed

NOISES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Angstrom, of Gaussian noise on every coordinate."""


def sample(molecules: Molecules, count: int) -> Molecules:
    """Some of them; the file's order is random."""
    return Molecules(molecules.positions[:count].double(), molecules.numbers[:count])


def clock(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of this process, and of the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def used(workers: int) -> float:
    """CPU-seconds of the processes of a pool so far, where /proc tells them."""
    total = 0
    for process in _pool(workers)._processes:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1]
        total += sum(map(int, fields.split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def speeds(molecules: Molecules) -> list[list[str]]:
    """Energy, gradient, dipole and gap of every molecule, which one calculation gives."""
    rows, n = [], len(molecules)
    for method in ("GFN2-xTB", "GFN1-xTB"):
        points = SinglePoints(method)  # type: ignore[arg-type]
        cpu, wall = clock(lambda p=points: p(molecules))
        again, _ = clock(lambda p=points: p(molecules))
        rows.append([
            method, "in this one", f"{1e3 * cpu / n:.1f}", f"{n / cpu:.0f}", f"{n / wall:.0f}",
            f"{1e3 * again / n:.2f}", str(sum(points.counts.values())),
        ])  # fmt: skip
    for workers in (1, 2):
        points = SinglePoints(workers=workers)
        points(Molecules(molecules.positions[:1] + 1.0, molecules.numbers[:1]))
        list(_pool(workers).map(time.sleep, [5.0] * workers))  # until all have started
        before = used(workers)
        _, wall = clock(lambda p=points: p(molecules))
        cpu = used(workers) - before
        rows.append([
            "GFN2-xTB", str(workers), f"{1e3 * cpu / n:.1f}", f"{n / cpu:.0f}", f"{n / wall:.0f}",
            "", str(sum(points.counts.values())),
        ])  # fmt: skip
    return rows


def by_size(molecules: Molecules) -> list[list[str]]:
    """Milliseconds of GFN2-xTB for each number of atoms."""
    sizes, rows = molecules.mask.sum(1), []
    for low, high in ((9, 12), (13, 15), (16, 18), (19, 21), (22, 29)):
        some = (sizes >= low) & (sizes <= high)
        if not bool(some.any()):
            continue
        group = Molecules(molecules.positions[some], molecules.numbers[some])
        cpu, _ = clock(lambda g=group: SinglePoints()(g))
        rows.append([f"{low} to {high}", str(len(group)), f"{1e3 * cpu / len(group):.1f}"])
    return rows


def others(molecules: Molecules) -> list[list[str]]:
    """Milliseconds of what else is asked of a molecule."""
    x, cond = Layout().encode(molecules)
    asked = {
        "`Valency`, value and gradient": lambda: Valency().value_and_grad(x, cond),
        "`Valency(soft_types=0.5)`": lambda: Valency(soft_types=0.5).value_and_grad(x, cond),
        "EDM's stability": lambda: atom_stability(molecules),
        "RDKit's molecule": lambda: perceived(molecules),
        '`DrugScore("qed")`': lambda: DrugScore("qed").value(x, cond),
        '`DrugScore("ease")`': lambda: DrugScore("ease").value(x, cond),
        '`DrugScore("logp")`': lambda: DrugScore("logp").value(x, cond),
    }
    for work in asked.values():
        work()  # imports and tables
    n = len(molecules)
    return [[name, f"{1e3 * clock(work)[0] / n:.3f}"] for name, work in asked.items()]


def wrecks(molecules: Molecules, seed: int) -> list[list[str]]:
    """Noise on the positions: failures, rewards and forces."""
    rows = []
    for noise in NOISES:
        generator = Seed(seed).child(f"{noise}").generator()
        kick = torch.randn(molecules.positions.shape, generator=generator, dtype=torch.float64)
        off = molecules.positions + noise * kick * molecules.mask[..., None]
        x, cond = Layout().encode(Molecules(off, molecules.numbers))
        free = XTBEnergy(per="formation_per_atom", max_force=1e9)
        cpu, _ = clock(lambda x=x, cond=cond, r=free: r.value(x, cond))
        value, grad = free.value_and_grad(x, cond)
        atoms = molecules.mask.sum(1)
        norms = grad.flatten(1).norm(dim=1) * atoms
        kept = norms > 0
        forces = norms[kept].quantile(torch.tensor([0.5, 0.99]).double()).tolist()
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(free.failures.items()))
        rows.append([
            f"{noise}", f"{1e3 * cpu / len(value):.1f}", f"{1 - float(kept.double().mean()):.3f}",
            f"{float(value[kept].mean()):.3f}", f"{forces[0]:.2f}", f"{forces[1]:.2f}",
            f"{float((norms > 2).double().mean()):.2f}", reasons or "none",
        ])  # fmt: skip
    return rows


def main(settings: Settings) -> None:
    """Write docs/benchmarks/xtb.md."""
    if not GSCHNET.is_file():
        print(f"xtb: no {GSCHNET}; set TILTFLOW_DATA to the folder of data sets.")
        return
    found = sample(gschnet(), 16 if settings.quick else 400)
    page = Page("xtb", "xTB rewards of molecules")
    page.text(
        f"{len(found)} molecules generated by G-SchNet, in the style of QM9 (mean "
        f"{float(found.mask.sum(1).double().mean()):.1f} atoms). One calculation gives energy, "
        "gradient, dipole and gap, by tblite. *Again* is the same batch a second time: value and "
        "gradient at one point cost one calculation. With *processes* the batch is spread over "
        "them; *per second* is of the wall, here of a machine whose two cores had other work "
        "(one-minute load at the start: " + f"{os.getloadavg()[0]:.0f}), so that it says little "
        "about what processes gain on free cores."
    )
    page.table(
        ["method", "processes", "CPU ms each", "per CPU-second", "per second", "again, ms",
         "failures"],
        speeds(found),
    )  # fmt: skip
    page.text("GFN2-xTB by the number of atoms:")
    page.table(["atoms", "molecules", "CPU ms each"], by_size(found))
    page.text("What else a reward or a metric may ask, for all of them in one batch:")
    page.table(["what", "CPU ms each"], others(found))
    page.text(
        "The same molecules with Gaussian noise on every coordinate, as an early model's samples "
        'have it, by `XTBEnergy(per="formation_per_atom")` in Hartree: share of failures, mean '
        "reward of the others, and norms of their gradients of the energy in Hartree per "
        "Angstrom (median, 99 %, and the share above 2, where the default clips)."
    )
    page.table(
        ["noise, Angstrom", "CPU ms each", "failed", "reward", "median force", "99 %", "above 2",
         "failures"],
        wrecks(sample(found, 200), settings.seeds[0]),
    )  # fmt: skip
    page.finish(settings)
