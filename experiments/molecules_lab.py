"""What the experiments on the published model share: settings, samples, what is told of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from toys import MODELS, Record, Store

from tiltflow.adapters.edm import EDM, load_edm
from tiltflow.errors import CheckpointError
from tiltflow.flow import FlowModel
from tiltflow.kernel import Ancestral
from tiltflow.metrics.molecules import molecule_report
from tiltflow.molecules import Molecules
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.sample import Sampler, step_kl
from tiltflow.seed import Seed
from tiltflow.types import Conditions, cond_to, drawn_cond, index_cond

FOLDER = MODELS / "edm_qm9_small"

BATCH = 64
"""Molecules that are simulated together: their paths are kept for the path KL."""


@dataclass(frozen=True)
class Setting:
    """What a run costs.

    Args:
        name: begins the keys of its results.
        steps: of the ancestral sampler, in training and afterwards.
        rollouts: of each training, with ``trajectories`` each.
        fresh: molecules that each model is measured on.
        bank: molecules that thresholds and spreads are taken from.
    """

    name: str
    steps: int
    rollouts: int
    trajectories: int
    fresh: int
    bank: int

    @property
    def sampler(self) -> Sampler:
        return Sampler(Ancestral(), self.steps, batch_size=BATCH)


QUICK = Setting("quick", steps=30, rollouts=2, trajectories=8, fresh=6, bank=16)


def setting(quick: bool, small: Setting, full: Setting) -> Setting:
    """The one that fits this machine."""
    if quick:
        return QUICK
    return full if torch.cuda.is_available() else small


@functools.cache
def edm(epoch: int = 341) -> EDM:
    """The published model, on the GPU where there is one.

    Raises:
        CheckpointError: if it is not there.
    """
    if not FOLDER.is_dir():
        raise CheckpointError(
            f"There is no {FOLDER}. Put the published model there, or name the folder of models "
            "by TILTFLOW_MODELS; docs/adapters.md says which it is."
        )
    made = load_edm(FOLDER, epoch=epoch)
    if torch.cuda.is_available():
        made.model.net.cuda()
    return made


def measured(
    model: FlowModel,
    reference: FlowModel,
    count: int,
    *,
    steps: int,
    seed: Seed,
    conditions: Conditions | None,
    points: SinglePoints | None = None,
) -> tuple[Record, Molecules]:
    """``count`` fresh molecules and everything that is told of them, with the path KL in nats.

    Every model is given the same noise and the same numbers of atoms.
    """
    cond = drawn_cond(conditions, count, seed.child("cond"))
    sampler, ends, kls = Sampler(Ancestral(), steps), [], []
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        part = index_cond(cond, torch.arange(start, start + size))
        path = sampler.simulate(model, size, seed=seed.child("batch", start), cond=part)
        ends.append(path.end)
        kls.append(torch.zeros(size))
        if model is not reference:
            kls[-1] = step_kl(model, reference, Ancestral(), path, own=True)[0].cpu()
    molecules = edm().layout.decode(torch.cat(ends).cpu(), cond_to(cond, "cpu"))
    kl = torch.cat(kls).double()
    path_kl = [float(kl.mean()), float(kl.std()) / count**0.5]
    return reported(molecules, points) | {"path_kl": path_kl}, molecules


def reported(molecules: Molecules, points: SinglePoints | None = None) -> Record:
    """Everything that is told of molecules, over all sizes."""
    return {
        name: [found.value, found.standard_error]
        for name, found in molecule_report(molecules, points=points).items()
        if "[" not in name
    }


def row(label: str, told: Mapping[str, list[float]], names: Mapping[str, int]) -> str:
    """A row of a table: numbers with so many digits and their standard errors."""
    cells = [
        f"{told[name][0]:.{digits}f} ± {told[name][1]:.{digits}f}" if name in told else "-"
        for name, digits in names.items()
    ]
    return f"| {label} | {' | '.join(cells)} |"


def pooled(tolds: list[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Means over seeds, whose spread is the error; of one seed, that seed's own."""
    if len(tolds) == 1:
        return dict(tolds[0])
    out = {}
    for name in tolds[0]:
        values = torch.tensor([told[name][0] for told in tolds if name in told])
        out[name] = [float(values.mean()), float(values.std()) / len(values) ** 0.5]
    return out


TOLD = {
    "atom_stability": 3, "molecule_stability": 3, "valid": 3, "valid_connected": 3, "unique": 3,
    "vendi": 0, "path_kl": 2,
}  # fmt: skip
"""What is always told together, and with how many digits."""


def header(*first: str) -> str:
    """Of a table of ``TOLD``, with other columns before it."""
    columns = (
        "", *first, "atoms stable", "molecules stable", "valid", "valid and connected",
        "unique of valid", "Vendi", "path KL (nats)",
    )  # fmt: skip
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def by_seed(store: Store, prefix: str) -> list[Record]:
    """The estimates of all results whose key starts so."""
    return [
        {k: v for k, v in entry["result"].items() if isinstance(v, list)}
        for key, entry in store.known.items()
        if key.startswith(prefix)
    ]


def tables(
    store: Store, methods: Sequence[str], names: Mapping[str, int], header: str
) -> list[str]:
    """Lines of a table for each setting that has results, of means over seeds."""
    lines: list[str] = []
    for setting_name in dict.fromkeys(key.split("/")[0] for key in store.known):
        lines += [f"Setting `{setting_name}`:", "", header]
        for method in methods:
            found = by_seed(store, f"{setting_name}/{method}/")
            if found:
                label = f"{method} ({len(found)} seed{'s' if len(found) > 1 else ''})"
                lines.append(row(label, pooled(found), names))
        lines.append("")
    return lines
