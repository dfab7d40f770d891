"""The published models as they are: EDM on QM9 after 341 epochs, and its weak twin after 21."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import molecules_lab as lab
import molecules_texts as texts
from molecules_lab import Setting
from toys import Store

from tiltflow.seed import Seed

SMALL = Setting("cpu", steps=201, rollouts=0, trajectories=0, fresh=512, bank=0)
FULL = replace(SMALL, name="gpu", fresh=10_000)


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Both models with all steps; the first also with fewer. One seed: the samples are many."""
    chosen = lab.setting(quick, SMALL, FULL)
    fewer = [(341, steps) for steps in (100, 50) if steps < chosen.steps]
    for epoch, steps in ((341, chosen.steps), *fewer, (21, chosen.steps)):
        edm = lab.edm(epoch)
        store.get(
            f"{chosen.name}/{epoch}/{steps}",
            lambda edm=edm, steps=steps: {
                "count": chosen.fresh,
                "told": lab.measured(
                    edm.model, edm.model, chosen.fresh, steps=steps,
                    seed=Seed(0).child("pretrained"), conditions=edm.sizes,
                )[0],
            },
        )  # fmt: skip


def section(store: Store) -> str:
    rows = []
    for key, entry in store.known.items():
        name, epoch, steps = key.split("/")
        label = f"{epoch} epochs, {steps} steps, {entry['result']['count']} molecules ({name})"
        rows.append(lab.row(label, entry["result"]["told"], lab.TOLD))
    return "\n".join([texts.PRETRAINED.strip(), "", lab.header(), *rows]) if rows else ""
