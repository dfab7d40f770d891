"""Diversity of the published model with KL: more different compositions, by mirror descent."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import molecules_lab as lab
import molecules_texts as texts
from molecules_lab import Setting
from toys import Record, Store

from tiltflow.algorithms import mirror_descent
from tiltflow.bonds import perceived
from tiltflow.context import Context
from tiltflow.density import Empirical, FlowDensity
from tiltflow.divergences import KL
from tiltflow.flow import FlowModel
from tiltflow.guidance import guided
from tiltflow.metrics.molecules import diversity
from tiltflow.molecules import ElementCounts
from tiltflow.sample import path_kl
from tiltflow.seed import Seed
from tiltflow.similarity import GaussianSimilarity
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training
from tiltflow.utilities import KernelDiversity

SMALL = Setting("cpu", steps=50, rollouts=12, trajectories=32, fresh=256, bank=128)
FULL = Setting("gpu", steps=100, rollouts=60, trajectories=128, fresh=10_000, bank=4096)

ATOMS = 18
"""In every molecule, the mean of the data: a law of conditions has a normaliser for each."""

ELEMENTS = (6, 7, 8)
"""Carbon, nitrogen and oxygen; the rest is hydrogen, and hardly any fluorine."""

BANDWIDTH = 1.0
"""Of the Gaussian kernel, in atoms: formulas that differ by two atoms are different."""

LATE = 0.5
"""Part of the steps, nearest to the data, that are tuned: before, the predicted composition says
nothing of that of the sample (R^2 below 0.1 until t = 0.7, 0.8 at t = 0.9)."""

WEIGHT = 0.05
"""Of the KL, in nats of diversity per nat."""

RATES = (0.7 / WEIGHT, 0.7 / WEIGHT)
"""Of mirror descent: each step goes 70 % of the way to the maximum of what it sees."""

COMPARED = 64
"""Valid molecules whose fingerprints are compared: as many of every model."""


@dataclass
class Task:
    """Model, utility and solver of one seed."""

    chosen: Setting
    seed: Seed

    @functools.cached_property
    def model(self) -> FlowModel:
        counts = ElementCounts(lab.edm().layout, ELEMENTS)
        return guided(lab.edm().with_atoms(ATOMS), counts, since=1 - LATE)

    def density(self, model: FlowModel, seed: Seed) -> FlowDensity:
        return FlowDensity(model, sampler=self.chosen.sampler, num_samples=self.chosen.bank,
                           seed=seed)  # fmt: skip

    def step_kl(self, new: FlowModel, old: FlowModel, seed: Seed) -> float:
        """Reported only, so that a few paths are enough."""
        return path_kl(new, old, sampler=self.chosen.sampler, count=16, seed=seed).value

    def tuned(self) -> FlowModel:
        """Anchored mirror descent on diversity less the KL."""
        prior = self.density(self.model, self.seed.child("prior"))
        rollouts = max(1, self.chosen.rollouts // len(RATES))
        solver = AdjointMatching(
            sampler=self.chosen.sampler, num_trajectories=self.chosen.trajectories,
            late=LATE, early=0.0, use_values=False, num_evaluate=2,
            training=Training(num_updates=20 * rollouts, learning_rate=1e-2, ema=0.9),
        )  # fmt: skip
        return mirror_descent(
            KernelDiversity(kernel()) - WEIGHT * KL(prior), self.model, solver, RATES,
            density=self.density, prior=prior, context=Context(self.seed.child("descent")),
            step_kl=self.step_kl,
        ).model  # fmt: skip


def kernel() -> GaussianSimilarity:
    return GaussianSimilarity(BANDWIDTH, ElementCounts(lab.edm().layout, ELEMENTS))


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """The model itself and the tuned one, seed by seed, on the noise of the seed."""
    chosen = lab.setting(quick, SMALL, FULL)
    for seed in seeds:
        task = Task(chosen, Seed(seed).child("diversity"))
        store.get(f"{chosen.name}/pre-trained/{seed}", lambda task=task: told(task, None))
        store.get(f"{chosen.name}/{TUNED}/{seed}", lambda task=task: told(task, task.tuned()))


def told(task: Task, model: FlowModel | None) -> Record:
    """What is told of molecules, the utility, and diversities at one count."""
    plain = lab.edm().with_atoms(ATOMS)
    found, molecules = lab.measured(
        model or plain, plain, task.chosen.fresh, steps=task.chosen.steps,
        seed=task.seed.child("fresh"), conditions=None,
    )  # fmt: skip
    x, _ = lab.edm().layout.encode(molecules)
    entropy = KernelDiversity(kernel()).value(Empirical(x))
    found["formulas"] = [math.exp(entropy.value), math.exp(entropy.value) * entropy.standard_error]
    valid = [m for m in perceived(molecules) if m is not None][:COMPARED]
    if len(valid) == COMPARED:
        same = diversity(valid)
        found["vendi_same"] = [same.value, same.standard_error]
    return found


TUNED = "diversity of formulas"
TOLD = {"formulas": 2, "vendi_same": 1} | lab.TOLD

HEADER = lab.header("Vendi of formulas", f"Vendi of {COMPARED} valid")


def section(store: Store) -> str:
    """A table of means over seeds for each setting, and what was gained for the KL."""
    parts = lab.tables(store, ("pre-trained", TUNED), TOLD, HEADER)
    names = dict.fromkeys(key.split("/")[0] for key in store.known)
    lines = [line for name in names for line in gained(store, name)]
    return "\n".join([texts.DIVERSITY.strip(), "", *parts, *lines]) if parts else ""


def gained(store: Store, name: str) -> list[str]:
    """The gain on the same noise, beside that of a small exact tilt at this KL."""
    first, tuned = (lab.by_seed(store, f"{name}/{label}/") for label in ("pre-trained", TUNED))
    if not tuned:
        return []
    pairs = list(zip(first, tuned, strict=False))
    gains = [math.log(b["formulas"][0] / a["formulas"][0]) for a, b in pairs]
    tilts = [2 * WEIGHT * b["path_kl"][0] for _, b in pairs]
    return [
        f"`{name}`: the utility, the log of the Vendi score of formulas, rose by "
        f"{sum(gains) / len(gains):.3f}. At its maximum a small tilt gains twice the weight times "
        f"the KL, here {sum(tilts) / len(tilts):.3f}."
    ]
