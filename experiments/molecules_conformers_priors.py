"""Where conformer flows start from: harmonic noise of the graph, or white noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import get_args

from molecules_conformers_judge import points, shares
from molecules_conformers_models import Work, sizes_of
from molecules_conformers_tables import variation
from tfft_tables import said
from torch import Tensor
from toys import Record, Store, of_seeds, table

from tiltflow.adapters.conformers import Prior
from tiltflow.kernel import Heun
from tiltflow.sample import Sampler
from tiltflow.seed import Seed
from tiltflow.single_point import HARTREE_KCAL

PRIORS: tuple[Prior, ...] = get_args(Prior)
NAMES = {"harmonic": "harmonic, linear path", "gaussian": "white, ETFlow's path (noise 0.1)"}
SAMPLERS = {"sde": "SDE", "ode": "ODE"}

TEXT = """\
The flow a of the conformers above, from either prior, with the same network, data and number of
updates; {steps} evaluations per sample, by the SDE (`Ancestral`) and by the ODE (Heun). Strain is
the median GFN2-xTB energy of {single} samples above that of exact ones, in kcal/mol, *worst
tenth* its 90 % quantile; TV is of the rotamers of {fresh} samples, and {noise:.3f} for exact
ones. Means over the molecules. {spread}"""


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both priors, seed by seed."""
    shared = Store(store.path.parent / "conformers.json")
    work = Work(shared, sizes_of(shared, quick))
    store.get("sizes", lambda: vars(work.sizes))
    store.get("exact/0", lambda: {s: exact(work, s) for s in work.smiles})
    for seed in seeds:
        for prior in PRIORS:
            store.get(f"{prior}/{seed}", lambda p=prior, s=seed: seen(work, p, s))


def exact(work: Work, text: str) -> Record:
    """Of samples of the law itself."""
    return looked(work, text, work.conformers("a")[text][: work.sizes.fresh])


def seen(work: Work, prior: Prior, seed: int) -> Record:
    """Of a flow by both samplers; trained now unless it is on the disk."""
    start, out = time.process_time(), Record()
    flow = work.part("a", prior, seed)
    out["cpu"] = time.process_time() - start
    where = Seed(seed).child("conformers", "priors", prior)
    for text, graph in work.graphs.items():
        steps, count = work.sizes.steps, work.sizes.fresh
        model = flow.flow_of(graph)
        samplers = {"sde": work.sampler, "ode": Sampler(Heun(), (steps + 1) // 2)}
        for name, sampler in samplers.items():
            states = sampler.sample(model, count, seed=where.child(name, text))
            out.setdefault(name, {})[text] = looked(work, text, flow.positions(graph, states))
    return out


def looked(work: Work, text: str, x: Tensor) -> Record:
    """Bonds, energies in kcal/mol and rotamers of samples (B, N, 3)."""
    graph = work.graphs[text]
    known = points()(graph.molecules(x[: work.sizes.single].double().cpu()))
    energies = sorted(p.energy * HARTREE_KCAL for p in known if not p.failure)
    mine = shares(graph, x.float().cpu())
    return {
        "kept": float(graph.kept(x).double().mean()),
        "failed": sum(p.failure is not None for p in known) / len(known),
        "median": statistics.median(energies) if energies else float("nan"),
        "worst": energies[(9 * len(energies)) // 10] if energies else float("nan"),
        "rotamers": variation(mine.tolist(), work.law("a", text).tolist()),
    }


def section(store: Store) -> str:
    """The section in Markdown; empty where nothing was run."""
    known, rows = of_seeds(store, "exact"), []
    for prior in ("harmonic", "gaussian"):
        for name, label in SAMPLERS.items():
            records = of_seeds(store, prior)
            found = [_mean(r[name], known[0]) for r in records]
            if found:
                cpu = max(r["cpu"] for r in records)
                rows.append([
                    f"{NAMES[prior]}, {label}", said(found, "kept", 1, 100) + " %",
                    said(found, "median", 1), said(found, "worst", 1), said(found, "rotamers", 3),
                    f"{cpu:.0f}" if cpu > 1 else "",  # nothing where it was on the disk
                ])  # fmt: skip
    if not rows:
        return ""
    sizes, seeds = store.known["sizes"]["result"], len(of_seeds(store, "gaussian"))
    told = f"± is the standard error over {seeds} seeds of the training."
    spread = told if seeds > 1 else "One seed: differences of a few kcal/mol may be chance."
    noise = statistics.fmean(r["rotamers"] for r in known[0].values())
    return "\n".join([
        "## Conformers: harmonic or white noise", "",
        TEXT.format(**sizes, noise=noise, spread=spread), "",
        *table(["", "bonds kept", "strain", "worst tenth", "TV", "CPU-seconds"], rows),
    ])  # fmt: skip


def _mean(found: Record, exact: Record) -> Record:
    """Over the molecules, energies above those of exact samples."""
    above = [
        r | {key: r[key] - exact[s][key] for key in ("median", "worst")} for s, r in found.items()
    ]
    keys = ("kept", "median", "worst", "rotamers")
    return {key: statistics.fmean(r[key] for r in above) for key in keys}


__all__ = ["run", "section"]
