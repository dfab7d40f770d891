"""Energies of the published model: expected reward, FDC for the right CVaR, and TFFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import molecules_lab as lab
import molecules_texts as texts
import torch
from molecules_lab import Setting
from torch import Tensor
from toys import Record, Store

from tiltflow.algorithms import mirror_descent, smallest_weight, tail_aware
from tiltflow.context import Context
from tiltflow.density import FlowDensity
from tiltflow.divergences import KL
from tiltflow.flow import FlowModel
from tiltflow.guidance import guided
from tiltflow.metrics import right_cvar
from tiltflow.metrics.molecules import formation_energies
from tiltflow.molecules import Molecules
from tiltflow.problem import ControlProblem, Solution
from tiltflow.rewards import Standardised, XTBEnergy
from tiltflow.rewards.single_points import SinglePoints
from tiltflow.seed import Seed
from tiltflow.single_point import HARTREE_KCAL
from tiltflow.solvers import AdjointMatching
from tiltflow.training import Training
from tiltflow.types import Estimate
from tiltflow.utilities import RightCVaR

SMALL = Setting("cpu", steps=50, rollouts=6, trajectories=32, fresh=192, bank=128)
FULL = Setting("gpu", steps=100, rollouts=40, trajectories=128, fresh=10_000, bank=10_000)

ATOMS = 12
"""In every molecule: energies per atom of molecules of one size are compared, and a constant
number of atoms has one normaliser."""

LEVEL = 0.8
"""The tail is the best fifth."""

WEIGHT = 0.1
"""Of the KL for the tails, in spreads of the reward under the model per nat."""

FRONTIER = (0.1, 0.05, 0.025)
"""Weights for expected reward, whose path KLs lie around those of the tails."""

LATE = 0.12
"""Part of the steps, nearest to the data, that are tuned: earlier the predicted molecule is none
that a quantum-chemical program could be asked about."""

CLIP = 16.0
"""Forces are heavy-tailed too."""

ITERATIONS = 2
"""Of FDC."""

TAILS = ("FDC, one step", "FDC", "TFFT")
EXPECTED = {f"expected reward, weight {weight:g}": weight for weight in FRONTIER}
METHODS = (*EXPECTED, *TAILS)


@dataclass
class Task:
    """Model, reward and solver of one seed."""

    chosen: Setting
    seed: Seed

    @functools.cached_property
    def points(self) -> SinglePoints:
        return SinglePoints("GFN2-xTB")

    @functools.cached_property
    def plain(self) -> FlowModel:
        return lab.edm().with_atoms(ATOMS)

    @functools.cached_property
    def reward(self) -> Standardised:
        """Minus the formation energy per atom, in its spreads under the model: of quartiles, as
        one wreck among the molecules would set a standard deviation. The same for all seeds."""
        energy = XTBEnergy(lab.edm().layout, per="formation_per_atom", points=self.points)
        bank = self.density(self.plain, Seed(0).child("bank"))
        return Standardised.under(energy, bank, robust=True)

    @functools.cached_property
    def model(self) -> FlowModel:
        return guided(self.plain, self.reward, since=1 - LATE)

    @functools.cached_property
    def prior(self) -> FlowDensity:
        """The law of the model, with samples enough for the tail."""
        return self.density(self.model, self.seed.child("prior")).at_least(
            self.utility.samples_needed
        )

    @property
    def utility(self) -> RightCVaR:
        return RightCVaR(self.reward, LEVEL)

    def density(self, model: FlowModel, seed: Seed) -> FlowDensity:
        return FlowDensity(
            model, sampler=self.chosen.sampler, num_samples=self.chosen.bank, seed=seed
        )

    def solver(self, share: float = 1.0) -> AdjointMatching:
        """``share`` of all roll-outs."""
        rollouts = max(1, round(share * self.chosen.rollouts))
        return AdjointMatching(
            sampler=self.chosen.sampler, num_trajectories=self.chosen.trajectories,
            late=LATE, early=0.0,
            use_values=False, clip=CLIP, num_evaluate=min(64, self.chosen.bank),
            training=Training(num_updates=20 * rollouts, learning_rate=3e-2, ema=0.9),
        )  # fmt: skip

    def context(self, name: str) -> Context:
        return Context(self.seed.child(name))


def run(store: Store, seeds: Sequence[int], quick: bool) -> None:
    """The model itself, then every method, seed by seed, on the noise of the seed."""
    chosen = lab.setting(quick, SMALL, FULL)
    for seed in seeds:
        task = Task(chosen, Seed(seed).child("energy"))
        store.get(f"{chosen.name}/pre-trained/{seed}", lambda task=task: told(task, None))
        for name in METHODS:
            store.get(
                f"{chosen.name}/{name}/{seed}",
                lambda task=task, name=name: told(task, tuned(task, name)),
            )


def tuned(task: Task, name: str) -> FlowModel:
    """By one of the methods."""
    if name in EXPECTED:
        return expected(task, EXPECTED[name]).model
    if name == "TFFT":
        return tfft(task).model
    return fdc(task, 1 if name == "FDC, one step" else ITERATIONS).model


def expected(task: Task, weight: float) -> Solution[FlowModel]:
    problem = ControlProblem(task.model, (1 / weight) * task.reward)
    return task.solver().solve(problem, task.context("expected"))


def fdc(task: Task, steps: int) -> Solution[FlowModel]:
    """Mirror descent: the hinge at the current quantile, in anchored steps of equal rates; one
    step costs one training."""
    rates = [1 / (WEIGHT * steps)] * steps
    return mirror_descent(
        task.utility - WEIGHT * KL(task.prior), task.model, task.solver(1 / steps), rates,
        density=task.density, context=task.context("fdc"), prior=task.prior,
    )  # fmt: skip


def tfft(task: Task) -> Solution[FlowModel]:
    """One training for the hinge at the best threshold of the bank, at the smallest weight that
    the bank supports: at less, the threshold is beyond nearly all of its samples."""
    weight = max(WEIGHT, 1.01 * smallest_weight(task.utility, task.prior))
    return tail_aware(
        task.utility, task.model, task.solver(), weight=weight, prior=task.prior,
        context=task.context("tfft"), bank_size=task.chosen.bank, anyway=True, tail_samples=40,
    )  # fmt: skip


def told(task: Task, model: FlowModel | None) -> Record:
    """What is told of molecules, with energies in kcal/mol per atom, failures left out and
    counted."""
    found, molecules = lab.measured(
        model or task.plain, task.plain, task.chosen.fresh, steps=task.chosen.steps,
        seed=task.seed.child("fresh"), conditions=None, points=task.points,
    )  # fmt: skip
    return found | energies(task, molecules)


def energies(task: Task, molecules: Molecules) -> Record:
    """Minus formation energies in kcal/mol per atom: mean, mean of the best fifth, spread."""
    found = formation_energies(molecules, task.points)
    rewards = -HARTREE_KCAL * found[found.isfinite()]
    mean, tail = Estimate.of(rewards), right_cvar(rewards, LEVEL)
    return {
        "mean": [mean.value, mean.standard_error],
        "tail": [tail.value, tail.standard_error],
        "spread": [HARTREE_KCAL * task.reward.std, 0.0],
    }


def mean_energy(task: Task, molecules: Molecules, weights: Tensor) -> Estimate:
    """The mean alone, of weighted molecules."""
    found = formation_energies(molecules, task.points)
    kept = found.isfinite()
    return Estimate.of(-HARTREE_KCAL * found[kept], weights[kept] / weights[kept].sum())


TOLD = {"mean": 2, "tail": 2, "xtb_failed": 3} | lab.TOLD

HEADER = lab.header("mean (kcal/mol per atom)", "best fifth", "xTB failed")


def section(store: Store) -> str:
    """Tables of means over seeds, and differences at the same KL."""
    parts = lab.tables(store, ("pre-trained", *METHODS), TOLD, HEADER)
    names = dict.fromkeys(key.split("/")[0] for key in store.known)
    gains = [f"`{name}`: {line}" for name in names for line in compared(store, name)]
    told = [texts.ENERGY.strip(), "", *parts, "\n\n".join(gains), texts.PUBLISHED.rstrip()]
    return "\n".join(told) if parts else ""


def compared(store: Store, name: str) -> list[str]:
    """What a tail gains and what it costs, against expected reward at its path KL, with the error
    of the mean over seeds."""
    labels = {"tail": "best fifth", "mean": "mean", "valid": "valid"}
    lines = []
    for method in TAILS:
        seeds = [key.rsplit("/", 1)[1] for key in store.known if f"{name}/{method}/" in key]
        gains = [gain(store, name, method, seed) for seed in seeds]
        if gains:
            each = [Estimate.of(torch.tensor([g[key] for g in gains])) for key in labels]
            told = ", ".join(
                f"{what} {e.value:+.2f}" + (f" ± {e.standard_error:.2f}" if e.count > 1 else "")
                for what, e in zip(labels.values(), each, strict=True)
            )
            lines.append(f"{method} less expected reward at the same path KL: {told}.")
    return lines


def gain(store: Store, name: str, method: str, seed: str) -> Record:
    """A method less expected reward at its path KL: between the two weights around it, or beyond
    the last, on a straight line in the root of the KL, with which a gentle tilt moves; on the
    same noise."""
    rows = [
        store.known[f"{name}/{label}/{seed}"]["result"] for label in ("pre-trained", *EXPECTED)
    ]
    found = store.known[f"{name}/{method}/{seed}"]["result"]
    at = [math.sqrt(row["path_kl"][0]) for row in rows]
    wanted = math.sqrt(found["path_kl"][0])
    k = max(i for i in range(len(at) - 1) if i == 0 or at[i] <= wanted)
    share = (wanted - at[k]) / (at[k + 1] - at[k])
    return {
        key: found[key][0] - (1 - share) * rows[k][key][0] - share * rows[k + 1][key][0]
        for key in ("tail", "mean", "valid")
    }
