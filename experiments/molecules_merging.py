"""Merging on the published model: with a copy tuned for energy, and with its weak twin."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import molecules_energy as energy
import molecules_lab as lab
import molecules_texts as texts
import torch
from molecules_lab import Setting
from toys import Record, Store

from tiltflow.algorithms import (
    FeynmanKac,
    Merging,
    Superposition,
    TrainingFree,
    averaged,
    merge,
)
from tiltflow.context import Context
from tiltflow.flow import FlowModel
from tiltflow.operators import Gate, Intersection, Prior, Union
from tiltflow.seed import Seed
from tiltflow.training import Training
from tiltflow.types import Estimate

SMALL = replace(energy.SMALL, bank=256)
FULL = energy.FULL

SHARES = (0.25, 0.5, 0.75)
"""Of the copy in the intersections without training; the trained one has a half."""

ENDS = (0.001, 0.999)
"""The parts themselves, nearly, on the noise of these intersections: the difference tells more."""

LEARNING_RATE = 2e-5
"""Of distilling the union into the network, from a few hundred samples."""

MODEL, COPY, TWIN = Prior("model"), Prior("copy"), Prior("twin")


@dataclass
class Task:
    """The models of one seed."""

    chosen: Setting
    seed: Seed

    @functools.cached_property
    def energy(self) -> energy.Task:
        return energy.Task(self.chosen, self.seed)

    @functools.cached_property
    def parts(self) -> Mapping[str, FlowModel]:
        """The model, its copy that is tuned for energy, and the same network long before."""
        return {
            "model": self.energy.plain,
            "copy": energy.expected(self.energy, energy.FRONTIER[-1]).model,
            "twin": lab.edm(21).with_atoms(energy.ATOMS),
        }

    def told(self, name: str) -> Record:
        return energy.told(self.energy, self.parts[name])

    def drawn(self, by: TrainingFree, gate: Gate) -> Record:
        """Of samples of a gate, nothing trained: mean energies with the samples' weights, all else
        of samples that are drawn again by them."""
        bank = by.sample(
            gate, [self.parts[part.name] for part in gate.parts], self.chosen.fresh,
            seed=self.seed.child("drawn"), sampler=self.chosen.sampler,
        )  # fmt: skip
        again = torch.multinomial(
            bank.weights, len(bank.points), replacement=True,
            generator=self.seed.child("again").generator(),
        )  # fmt: skip
        equal = bool((bank.weights == bank.weights[0]).all())
        molecules = lab.edm().layout.decode(bank.points if equal else bank.points[again])
        found = lab.reported(molecules, self.energy.points)
        found |= energy.energies(self.energy, molecules)
        all_of_them = lab.edm().layout.decode(bank.points)
        mean = energy.mean_energy(self.energy, all_of_them, bank.weights)
        return found | {"mean": [mean.value, mean.standard_error]}

    def averaged(self) -> Record:
        """Of the average of velocities, on the noise of its parts."""
        model = averaged([self.parts["model"], self.parts["copy"]], [0.5, 0.5])
        return energy.told(self.energy, model)

    def merged(self, gate: Gate) -> Record:
        """Of one model: an intersection by one control problem, from the average of its parts,
        with a guidance of its own; a union by distilling samples into a copy of the network."""
        settings = Merging(
            solver=self.energy.solver(), sampler=self.chosen.sampler, bank_size=self.chosen.bank,
            batch_size=32, until=1.0,
            training=Training(num_updates=self.chosen.bank, learning_rate=LEARNING_RATE, ema=0.99),
        )  # fmt: skip
        start = self.parts["copy"] if COPY in gate.parts else None
        found = merge(
            gate, self.parts, settings=settings, start=start,
            context=Context(self.seed.child("merge", str(gate))),
        )  # fmt: skip
        return energy.told(self.energy, found.model)


def intersection(share: float) -> Intersection:
    return Intersection(MODEL, COPY, weights=(1 - share, share))


def free(share: float) -> str:
    return f"{share:g} copy, `FeynmanKac`"


COPIED, AVERAGED, ONE = "copy", "0.5 copy, averaged", "0.5 copy, one model"
BOTH, DISTILLED = "union with the twin, `Superposition`", "union with the twin, one model"
METHODS: Mapping[str, Callable[[Task], Record]] = {
    "model": lambda task: task.told("model"),
    COPIED: lambda task: task.told("copy"),
    **{
        free(share): lambda task, share=share: task.drawn(FeynmanKac(), intersection(share))
        for share in (*ENDS, *SHARES)
    },
    AVERAGED: lambda task: task.averaged(),
    ONE: lambda task: task.merged(intersection(0.5)),
    "twin": lambda task: task.told("twin"),
    BOTH: lambda task: task.drawn(Superposition(), Union(MODEL, TWIN)),
    DISTILLED: lambda task: task.merged(Union(MODEL, TWIN)),
}


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """Parts, then gates, seed by seed."""
    chosen = lab.setting(quick, SMALL, FULL)
    for seed in seeds:
        task = Task(chosen, Seed(seed).child("merging"))
        for name, make in METHODS.items():
            store.get(f"{chosen.name}/{name}/{seed}", lambda make=make, task=task: make(task))


def section(store: Store) -> str:
    """Tables of means over seeds, and how far gates are from what they should give."""
    parts = lab.tables(store, tuple(METHODS), energy.TOLD, energy.HEADER)
    names = dict.fromkeys(key.split("/")[0] for key in store.known)
    lines = [f"`{name}`: {line}" for name in names for line in judged(store, name)]
    return "\n".join([texts.MERGING.strip(), "", *parts, "\n\n".join(lines)]) if parts else ""


def judged(store: Store, name: str) -> list[str]:
    """Mean energies of intersections less the target between those of the parts, and shares of
    stable atoms of unions less the average of the parts; means over seeds."""
    low, high = (free(share) for share in ENDS)
    targets = {free(share): ("mean", low, high, share) for share in SHARES}
    targets |= {label: ("mean", "model", COPIED, 0.5) for label in (AVERAGED, ONE)}
    targets |= {label: ("atom_stability", "model", "twin", 0.5) for label in (BOTH, DISTILLED)}
    lines = []
    for label, (key, one, other, share) in targets.items():
        found = [lab.by_seed(store, f"{name}/{n}/") for n in (one, other, label)]
        misses = torch.tensor(
            [
                made[key][0] - (1 - share) * first[key][0] - share * second[key][0]
                for first, second, made in zip(*found, strict=False)
            ]
        )
        if len(misses):
            told = Estimate.of(misses)
            error = f" ± {told.standard_error:.3f}" if told.count > 1 else ""
            what = "mean energy" if key == "mean" else "share of stable atoms"
            lines.append(f"{label}: {what} less its target {told.value:+.3f}{error}.")
    return lines
